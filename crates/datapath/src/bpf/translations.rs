//! Translations of the veth path (`tp_nat`), read and deleted from any thread.

use libbpf_rs::Object;

use super::error::Result;
use super::map::Map;
use super::observe::End;
use super::purge::Called;
use crate::abi::{Nat, Tuple};

/// Whom a flow is translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// Whom its client sends to.
    pub service: End,
    /// Who gets it.
    pub backend: End,
}

/// The table.
#[derive(Debug)]
pub struct Translations {
    map: Map<Tuple, Nat>,
    /// Deletes one, and counts it off.
    delete: Called,
}

impl Translations {
    pub(super) fn open(object: &Object) -> Result<Self> {
        Ok(Self { map: Map::open(object, "tp_nat")?, delete: Called::new(object, "tp_untranslate")? })
    }

    /// Deletes the UDP translations that `keep` does not want: the flow's next packet is translated anew, or refused. How many
    /// there were. Reads the whole table: milliseconds for 100,000.
    ///
    /// # Errors
    /// The kernel fails.
    pub fn retain_udp(&self, keep: impl Fn(&Translation) -> bool) -> Result<usize> {
        let mut removed = 0;
        for (sent, nat) in self.map.entries()?.iter().filter(|(sent, _)| i32::from(sent.proto) == libc::IPPROTO_UDP) {
            let translation = Translation {
                service: (sent.daddr.ip(), sent.dport.get()),
                backend: (nat.daddr.ip(), nat.dport.get()),
            };
            if !keep(&translation) {
                let mut sent = *sent;
                removed += self.delete.call(&mut sent)? as usize;
            }
        }
        Ok(removed)
    }
}
