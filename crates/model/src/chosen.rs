//! The addresses and the MAC address that a pod asks for instead of any.
//!
//! An address that others' firewalls and policies trust is worth having, so who makes pods may not choose one by himself: the namespace must let
//! its pods ([`Chosen::allowed`]), which its tenants cannot write.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::{canonical, family_of};

/// Annotation of a pod: addresses, at most one a family, separated by commas. The family that it does not name gets any.
pub const ADDRESSES_ANNOTATION: &str = "towpath.dev/ip-addresses";
/// Annotation of a pod: the MAC address of its device, six bytes in hexadecimal with colons.
pub const MAC_ANNOTATION: &str = "towpath.dev/mac-address";
/// The same as Calico writes them: a JSON list, and a MAC address. Ours come first.
const OF_CALICO: [&str; 2] = ["cni.projectcalico.org/ipAddrs", "cni.projectcalico.org/hwAddr"];
/// Annotation of a namespace: [`ALLOWED`] lets its pods choose.
pub const CHOICE_ANNOTATION: &str = "towpath.dev/pod-addresses";
/// Its value.
pub const ALLOWED: &str = "chosen";

/// What a pod asks for.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// Addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// MAC address of its device.
    pub mac: Option<[u8; 6]>,
    /// What an annotation says and is not understood, for people. Then the pod gets no network rather than another address.
    pub problem: Option<String>,
}

impl Chosen {
    /// What an object's annotations say; none: nothing.
    pub fn of(annotations: Option<&BTreeMap<String, String>>) -> Option<Box<Self>> {
        let all = annotations?;
        let said = |ours, calicos| [ours, calicos].into_iter().find_map(|name| Some((name, all.get(name)?)));
        let (addresses, mac) = (said(ADDRESSES_ANNOTATION, OF_CALICO[0]), said(MAC_ANNOTATION, OF_CALICO[1]));
        if addresses.is_none() && mac.is_none() {
            return None;
        }
        let mut chosen = Self::default();
        let mut problem = |name: &str, why: String| chosen.problem = Some(format!("annotation {name}: {why}"));
        let addresses = addresses.map(|(name, text)| addresses_in(text).map_err(|why| problem(name, why)));
        let mac = mac.map(|(name, text)| mac_in(text).map_err(|why| problem(name, why)));
        chosen.addresses = addresses.and_then(Result::ok).unwrap_or_default();
        chosen.mac = mac.and_then(Result::ok);
        Some(Box::new(chosen))
    }

    /// Whether a namespace lets its pods choose.
    pub fn allowed(annotations: Option<&BTreeMap<String, String>>) -> bool {
        annotations.and_then(|all| all.get(CHOICE_ANNOTATION)).is_some_and(|value| value == ALLOWED)
    }
}

fn addresses_in(text: &str) -> Result<Vec<IpAddr>, String> {
    let list: Vec<String> = match text.trim().starts_with('[') {
        true => serde_json::from_str(text).map_err(|_| format!("{:?} is no list of texts", beginning(text)))?,
        false => text.split(',').map(|part| part.trim().to_owned()).collect(),
    };
    let mut addresses: Vec<IpAddr> = Vec::new();
    for part in list {
        let address: IpAddr = part.parse().map_err(|_| format!("{:?} is no IP address", beginning(&part)))?;
        let address = canonical(address);
        if let Some(other) = addresses.iter().find(|other| family_of(**other) == family_of(address)) {
            return Err(format!("{other} and {address} are of one family; a pod has one address of each"));
        }
        addresses.push(address);
    }
    Ok(addresses)
}

fn mac_in(text: &str) -> Result<[u8; 6], String> {
    let no_mac = || format!("{:?} is no MAC address, as in 02:00:5e:10:00:01", beginning(text));
    let byte = |part: &str| {
        let digits = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        digits.then(|| u8::from_str_radix(part, 16).ok()).flatten()
    };
    let bytes: Option<Vec<u8>> = text.trim().split(':').map(byte).collect();
    let mac: [u8; 6] = bytes.and_then(|bytes| bytes.try_into().ok()).ok_or_else(no_mac)?;
    match mac {
        [first, ..] if first & 1 == 1 => Err(format!("{} is the MAC address of a group", text.trim())),
        [0, 0, 0, 0, 0, 0] => Err(no_mac()),
        mac => Ok(mac),
    }
}

/// No more of what is not understood is said.
fn beginning(text: &str) -> String {
    text.chars().take(40).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(all: &[(&str, &str)]) -> Option<Chosen> {
        let all = all.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        Chosen::of(Some(&all)).map(|chosen| *chosen)
    }

    fn problem(name: &str, value: &str) -> String {
        let chosen = chosen(&[(name, value)]).unwrap();
        assert!(chosen.addresses.is_empty() && chosen.mac.is_none(), "{chosen:?}");
        chosen.problem.unwrap()
    }

    #[test]
    fn what_is_asked_for_is_read_in_our_words_and_in_calicos() {
        assert_eq!(Chosen::of(None), None);
        assert_eq!(chosen(&[("other", "10.0.0.1")]), None);
        let both = vec!["10.0.0.9".parse().unwrap(), "fd00::9".parse().unwrap()];
        let mac = Some([0x02, 0, 0x5e, 0x10, 0, 0xfe]);
        let expected = Chosen { addresses: both, mac, problem: None };
        let ours = [(ADDRESSES_ANNOTATION, "10.0.0.9, fd00::9"), (MAC_ANNOTATION, "02:00:5E:10:00:fe")];
        assert_eq!(chosen(&ours), Some(expected.clone()));
        let calicos = [(OF_CALICO[0], r#"["::ffff:10.0.0.9", "fd00::9"]"#), (OF_CALICO[1], "02:00:5e:10:00:fe")];
        assert_eq!(chosen(&calicos), Some(expected));
        let mixed = [(OF_CALICO[0], "nonsense"), (ADDRESSES_ANNOTATION, "fd00::9")];
        assert_eq!(chosen(&mixed).unwrap().problem, None, "ours come first");
    }

    #[test]
    fn what_is_not_understood_is_said_and_nothing_is_taken_of_it() {
        for (value, words) in [
            ("", "no IP address"),
            ("10.0.0.300", "no IP address"),
            ("10.0.0.1/24", "no IP address"),
            ("10.0.0.1,10.0.0.2", "of one family"),
            ("[1]", "no list"),
        ] {
            assert!(problem(ADDRESSES_ANNOTATION, value).contains(words), "{value}");
        }
        for value in
            ["", "02:00:5e:10:00", "02:00:5e:10:00:1", "02-00-5e-10-00-01", "00:00:00:00:00:00", "+2:00:5e:10:00:01"]
        {
            assert!(problem(MAC_ANNOTATION, value).contains("no MAC address"), "{value}");
        }
        assert!(problem(MAC_ANNOTATION, "33:33:00:00:00:01").contains("of a group"));
        let long = problem(ADDRESSES_ANNOTATION, &"x".repeat(1 << 16));
        assert!(long.len() < 200, "{long}");
    }

    #[test]
    fn a_namespace_lets_its_pods_choose_by_one_exact_word() {
        let said = |value: &str| Chosen::allowed(Some(&[(CHOICE_ANNOTATION.to_owned(), value.to_owned())].into()));
        assert!(said("chosen") && !said("Chosen") && !said("") && !Chosen::allowed(None));
    }
}
