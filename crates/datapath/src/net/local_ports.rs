//! Source ports that Linux gives to the node's own sockets, and those that are kept from it.
//!
//! The programs give clients outside a port of [`TP_SNAT_PORT_MIN`] or more of the node (`bpf/far.h`). They pass over one that a socket has
//! by then, and Linux knows nothing of those that they gave: so the two ranges must not meet. As Linux comes they do not.

use std::ops::RangeInclusive;

use super::error::Error;
use super::sysctl;
use crate::abi::{TP_SNAT_PORT_MAX, TP_SNAT_PORT_MIN};

const RANGE: &str = "ipv4/ip_local_port_range";
const RESERVED: &str = "ipv4/ip_local_reserved_ports";

/// What is wrong with the sysctls of the calling thread's network namespace, and what to do; none: nothing. For both families.
///
/// # Errors
/// They cannot be read.
pub fn problem() -> Result<Option<String>, Error> {
    let (range, reserved) = (sysctl::get(RANGE)?, sysctl::get(RESERVED)?);
    Ok(meets(&range, &reserved).map(|shared| {
        format!(
            "sysctl net.ipv4.ip_local_port_range is {}, so this node's own connections may take source ports that Services' clients have here \
             ({} to {} of {TP_SNAT_PORT_MIN} to {TP_SNAT_PORT_MAX}), and lose their answers: end it below {TP_SNAT_PORT_MIN}, as with \
             `sysctl -w net.ipv4.ip_local_port_range=\"32768 60999\"`, or add {TP_SNAT_PORT_MIN}-{TP_SNAT_PORT_MAX} to \
             net.ipv4.ip_local_reserved_ports",
            range.split_whitespace().collect::<Vec<_>>().join("-"),
            shared.start(),
            shared.end()
        )
    }))
}

/// The first stretch of the programs' ports that a socket may be given: in the range, and not reserved. What cannot be read is nothing.
fn meets(range: &str, reserved: &str) -> Option<RangeInclusive<u32>> {
    let mut ends = range.split_whitespace().map_while(|word| word.parse::<u32>().ok());
    let (first, last) = (ends.next()?.max(TP_SNAT_PORT_MIN), ends.next()?.min(TP_SNAT_PORT_MAX));
    let mut kept: Vec<(u32, u32)> = reserved.split(',').filter_map(stretch).collect();
    kept.sort_unstable();
    let mut free = first;
    for (from, to) in kept {
        if from > free {
            return (free <= last).then(|| free..=last.min(from - 1));
        }
        free = free.max(to.saturating_add(1));
    }
    (free <= last).then_some(free..=last)
}

/// `8080` or `61000-65535`.
fn stretch(text: &str) -> Option<(u32, u32)> {
    let (from, to) = text.split_once('-').unwrap_or((text, text));
    Some((from.trim().parse().ok()?, to.trim().parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::alone;

    #[test]
    fn a_range_that_reaches_into_the_programs_ports_is_found_unless_they_are_reserved() {
        assert_eq!(meets("32768\t60999", ""), None, "as Linux comes");
        assert_eq!(meets("1024\t65535", ""), Some(61000..=65535));
        assert_eq!(meets("32768 61000", "8080"), Some(61000..=61000));
        assert_eq!(meets("62000 63000", ""), Some(62000..=63000));
        assert_eq!(meets("1024 65535", "61000-65535"), None);
        assert_eq!(meets("1024 65535", "61000-62000,62001-65535,80"), None);
        assert_eq!(meets("1024 65535", "61000-62000,64000-65535"), Some(62001..=63999));
        assert_eq!(meets("1024 61500", "61400-61500"), Some(61000..=61399));
        assert_eq!(meets("1024 61500", "61000-65535"), None);
        assert_eq!(meets("1024 61500", "61600"), Some(61000..=61500));
        assert_eq!(meets("", "x-y,,-"), None);
    }

    #[test]
    fn a_widened_range_is_told_in_words_that_say_what_to_do() {
        let said = alone(|| {
            sysctl::set(RANGE, "32768\t60999").unwrap();
            let before = problem().unwrap();
            sysctl::set(RANGE, "1024\t65535").unwrap();
            let wide = problem().unwrap();
            sysctl::set(RESERVED, "61000-65535").unwrap();
            [before, wide, problem().unwrap()]
        });
        let Some([before, wide, reserved]) = said else { return };
        assert_eq!((before, reserved), (None, None));
        let wide = wide.unwrap();
        assert!(wide.contains("is 1024-65535,") && wide.contains("61000 to 65535"), "{wide}");
    }
}
