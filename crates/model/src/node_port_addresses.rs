//! At which of a node's addresses NodePorts answer: kube-proxy's `--nodeport-addresses` (KEP-5266 for `primary`).

use std::net::IpAddr;

use ipnet::IpNet;

use crate::Invalid;

/// The selection, the same on every node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum NodePortAddresses {
    /// Every address of the node, loopback among them for its own processes.
    #[default]
    All,
    /// Those that its object names (`status.addresses` of type `InternalIP`), at most one a family.
    Primary,
    /// Those in these ranges. Loopback answers if `127.0.0.1`, or `::1`, is in one.
    In(Vec<IpNet>),
}

impl NodePortAddresses {
    /// From `primary` alone, or CIDRs; without any it is every address.
    ///
    /// # Errors
    /// Something else, by its place in the list.
    pub fn parse(list: &[String]) -> Result<Self, Invalid> {
        match list {
            [] => return Ok(Self::All),
            [only] if only == "primary" => return Ok(Self::Primary),
            _ => {}
        }
        let range = |(index, text): (usize, &String)| {
            let fault = |why: String| Invalid::new("nodePortAddresses", format!("[{index}]"), why);
            if text == "primary" {
                return Err(fault("primary stands alone, or not at all".to_owned()));
            }
            let parsed: IpNet = text.parse().map_err(|_| fault(format!("{text:?} is neither a CIDR nor primary")))?;
            Ok(parsed.trunc())
        };
        list.iter().enumerate().map(range).collect::<Result<_, _>>().map(Self::In)
    }

    /// Whether NodePorts answer at an address of a node; `primary`: its object names it.
    pub fn has(&self, address: IpAddr, primary: bool) -> bool {
        match self {
            Self::All => true,
            Self::Primary => primary,
            Self::In(ranges) => ranges.iter().any(|range| range.contains(&address)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(list: &[&str]) -> Result<NodePortAddresses, Invalid> {
        NodePortAddresses::parse(&list.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn it_is_every_address_the_primary_ones_or_those_in_ranges() {
        let (own, vip, lo) = ("192.0.2.1", "192.0.2.200", "127.0.0.1");
        let at = |list: &[&str]| {
            let selected = parse(list).unwrap();
            [(own, true), (vip, false), (lo, false)]
                .map(|(address, primary)| selected.has(address.parse().unwrap(), primary))
        };
        assert_eq!(at(&[]), [true, true, true]);
        assert_eq!(at(&["primary"]), [true, false, false]);
        assert_eq!(at(&["192.0.2.128/25"]), [false, true, false]);
        assert_eq!(at(&["192.0.2.0/25", "127.0.0.0/8"]), [true, false, true]);
        assert_eq!(at(&["2001:db8::/32"]), [false, false, false]);
    }

    #[test]
    fn nonsense_is_named_by_its_place() {
        for list in [["192.0.2.0/24", "primary"], ["192.0.2.0/24", "192.0.2.1"], ["192.0.2.0/24", "all"]] {
            let said = parse(&list).unwrap_err().to_string();
            assert!(said.starts_with("nodePortAddresses: [1]"), "{said}");
        }
    }
}
