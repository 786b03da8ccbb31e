//! Pools of addresses for load balancers (`towpath.dev/v1alpha1` [`custom::AddressPool`]), with their ranges parsed.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::custom;
use crate::{Family, Invalid, Labels, Selector, canonical, family_of};

/// Addresses of one family from the first to the last, both in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AddressRange {
    first: IpAddr,
    last: IpAddr,
}

/// An address as a number: their order within a family is that of the numbers.
fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => u128::from(u32::from(v4)),
        IpAddr::V6(v6) => u128::from(v6),
    }
}

/// The address of that number in the family of `like`; none beyond its end.
fn address(number: u128, like: IpAddr) -> Option<IpAddr> {
    match like {
        IpAddr::V4(_) => u32::try_from(number).ok().map(|bits| IpAddr::V4(Ipv4Addr::from(bits))),
        IpAddr::V6(_) => Some(IpAddr::V6(Ipv6Addr::from(number))),
    }
}

impl AddressRange {
    /// From `first` to `last`; none when they are of two families, or the wrong way round.
    pub fn new(first: IpAddr, last: IpAddr) -> Option<Self> {
        let (first, last) = (canonical(first), canonical(last));
        (family_of(first) == family_of(last) && first <= last).then_some(Self { first, last })
    }

    /// Its lowest address.
    pub fn first(&self) -> IpAddr {
        self.first
    }

    /// Its highest address.
    pub fn last(&self) -> IpAddr {
        self.last
    }

    /// Its family.
    pub fn family(&self) -> Family {
        family_of(self.first)
    }

    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        family_of(address) == self.family() && self.first <= address && address <= self.last
    }

    /// Whether an address is in both.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.family() == other.family() && self.first <= other.last && other.first <= self.last
    }

    /// How many addresses are in it; all of IPv6 is one fewer than it is.
    pub fn size(&self) -> u128 {
        (number(self.last) - number(self.first)).saturating_add(1)
    }

    /// The address after one of its addresses; none after the last.
    pub fn after(&self, one: IpAddr) -> Option<IpAddr> {
        let next = address(number(one).checked_add(1)?, one)?;
        self.contains(next).then_some(next)
    }

    /// What is left of it without another range.
    pub fn without(self, other: &Self) -> Vec<Self> {
        if !self.overlaps(other) {
            return vec![self];
        }
        let below = number(other.first).checked_sub(1).and_then(|n| address(n, self.first));
        let above = number(other.last).checked_add(1).and_then(|n| address(n, self.first));
        let lower = below.and_then(|last| Self::new(self.first, last));
        let upper = above.and_then(|first| Self::new(first, self.last));
        lower.into_iter().chain(upper).collect()
    }
}

impl From<IpNet> for AddressRange {
    fn from(net: IpNet) -> Self {
        // The last address of a network, not its broadcast address only: of IPv6, too.
        Self { first: net.network(), last: net.broadcast() }
    }
}

impl fmt::Display for AddressRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last { write!(f, "{}", self.first) } else { write!(f, "{}-{}", self.first, self.last) }
    }
}

impl FromStr for AddressRange {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let one = |text: &str| text.trim().parse::<IpAddr>().map(canonical);
        if let Some((first, last)) = text.split_once('-') {
            let ends = (one(first), one(last));
            let (Ok(first), Ok(last)) = ends else { return Err(format!("{text:?} is no range of two addresses")) };
            return Self::new(first, last).ok_or_else(|| {
                format!("{text:?} goes from a higher address to a lower one, or from one family to the other")
            });
        }
        if text.contains('/') {
            return text.trim().parse::<IpNet>().map(Self::from).map_err(|_| format!("{text:?} is no CIDR"));
        }
        one(text)
            .map(|address| Self { first: address, last: address })
            .map_err(|_| format!("{text:?} is neither a CIDR, nor a range FIRST-LAST, nor an address"))
    }
}

/// Ranges of which no address can be a load balancer's: nobody outside would send there.
const NOT_FOR_LOAD_BALANCERS: [(&str, &str); 9] = [
    ("0.0.0.0/8", "\"this\" network (RFC 1122)"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("224.0.0.0/4", "multicast"),
    ("255.255.255.255/32", "broadcast"),
    ("::/127", "unspecified and loopback"),
    ("::ffff:0.0.0.0/96", "IPv4 in IPv6"),
    ("fe80::/10", "link-local"),
    ("ff00::/8", "multicast"),
];

fn unusable(range: &AddressRange) -> Option<&'static str> {
    let found = NOT_FOR_LOAD_BALANCERS
        .iter()
        .find(|(net, _)| net.parse::<IpNet>().is_ok_and(|net| AddressRange::from(net).overlaps(range)));
    found.map(|(_, what)| *what)
}

/// A pool of addresses for load balancers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressPool {
    /// Its name.
    pub name: String,
    /// Its uid; empty before it is in an API server.
    pub uid: String,
    /// Its addresses: disjoint, in the order of the object.
    pub ranges: Vec<AddressRange>,
    /// Whether Services that name neither a pool nor an address get one from here.
    pub auto_assign: bool,
    /// Labels of the Services that may have them.
    pub services: Selector,
    /// Labels of the namespaces whose Services may have them.
    pub namespaces: Selector,
    /// Whether Services of different namespaces may share one.
    #[serde(default)]
    pub shared_across_namespaces: bool,
    /// Labels of the nodes that may announce them.
    #[serde(default)]
    pub nodes: Selector,
}

impl AddressPool {
    /// Whether an address is in it.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.contains(address))
    }

    /// Whether it is for Services of these labels, in a namespace of those.
    pub fn admits(&self, service: &Labels, namespace: &Labels) -> bool {
        self.services.matches(service) && self.namespaces.matches(namespace)
    }

    /// What can be understood of a pool in which something cannot: the addresses that are clear, and the nodes that may announce
    /// them. Nothing may be given from it, but a mistake in one place need not silence what is in another.
    pub fn readable(object: &custom::AddressPool) -> Self {
        let spec = &object.spec;
        let ranges = spec.addresses.iter().filter_map(|text| text.parse().ok());
        let nodes = spec.node_selector.as_ref().map(|given| Selector::parse(given, "", "spec.nodeSelector"));
        Self {
            name: object.metadata.name.clone().unwrap_or_default(),
            uid: object.metadata.uid.clone().unwrap_or_default(),
            ranges: ranges.filter(|range| unusable(range).is_none()).collect(),
            auto_assign: false,
            services: Selector::everything(),
            namespaces: Selector::everything(),
            shared_across_namespaces: false,
            nodes: nodes.and_then(Result::ok).unwrap_or_else(Selector::everything),
        }
    }

    /// Whether it is for some Services only.
    pub fn is_selective(&self) -> bool {
        !self.services.is_everything() || !self.namespaces.is_everything()
    }
}

impl TryFrom<&custom::AddressPool> for AddressPool {
    type Error = Invalid;

    fn try_from(object: &custom::AddressPool) -> Result<Self, Invalid> {
        let name = object.metadata.name.clone().unwrap_or_default();
        let who = format!("AddressPool {name}");
        let spec = &object.spec;
        let mut ranges: Vec<AddressRange> = Vec::new();
        for (index, text) in spec.addresses.iter().enumerate() {
            let invalid = |reason: String| Invalid::new(&who, format!("spec.addresses[{index}]"), reason);
            let range: AddressRange = text.parse().map_err(invalid)?;
            if let Some(what) = unusable(&range) {
                return Err(invalid(format!("{text:?} has {what} addresses in it, which nobody outside can send to")));
            }
            if let Some(other) = ranges.iter().find(|other| other.overlaps(&range)) {
                return Err(invalid(format!("{text:?} overlaps {other} of the same pool")));
            }
            ranges.push(range);
        }
        let selector = |given: &Option<_>, field: &str| match given {
            Some(given) => Selector::parse(given, &who, field),
            None => Ok(Selector::everything()),
        };
        Ok(Self {
            services: selector(&spec.service_selector, "spec.serviceSelector")?,
            namespaces: selector(&spec.namespace_selector, "spec.namespaceSelector")?,
            auto_assign: spec.auto_assign.unwrap_or(true),
            shared_across_namespaces: spec.allow_sharing_across_namespaces.unwrap_or(false),
            nodes: selector(&spec.node_selector, "spec.nodeSelector")?,
            uid: object.metadata.uid.clone().unwrap_or_default(),
            ranges,
            name,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::custom::AddressPoolSpec;

    fn range(text: &str) -> AddressRange {
        text.parse().unwrap()
    }

    fn pool(addresses: &[&str]) -> Result<AddressPool, Invalid> {
        let addresses = addresses.iter().map(|a| (*a).to_owned()).collect();
        let spec = AddressPoolSpec { addresses, ..AddressPoolSpec::default() };
        AddressPool::try_from(&custom::AddressPool::new("p", spec))
    }

    #[test]
    fn cidrs_ranges_and_addresses_are_read_and_both_ends_are_in_them() {
        assert_eq!(range("192.0.2.16/28"), range("192.0.2.16-192.0.2.31"));
        assert_eq!(range("192.0.2.17/28").to_string(), "192.0.2.16-192.0.2.31", "host bits do not count");
        assert_eq!(range("2001:db8::/126").size(), 4);
        assert_eq!(range("192.0.2.1"), range("192.0.2.1-192.0.2.1"));
        assert_eq!(range("192.0.2.1 - 192.0.2.3").size(), 3);
        assert_eq!(range("2001:db8::/64").size(), 1 << 64);
        assert!(range("192.0.2.0/30").contains("192.0.2.3".parse().unwrap()));
    }

    #[test]
    fn nonsense_says_which_entry_is_wrong_and_why() {
        for (bad, why) in [
            ("192.0.2.9-192.0.2.1", "higher"),
            ("192.0.2.1-2001:db8::1", "family"),
            ("192.0.2.1/33", "CIDR"),
            ("web", "neither"),
            ("127.0.0.0/8", "loopback"),
            ("169.254.1.1", "link-local"),
            ("0.0.0.0/0", "RFC 1122"),
            ("fe80::1", "link-local"),
            ("192.0.2.2", "overlaps 192.0.2.0-192.0.2.3"),
        ] {
            let error = pool(&["192.0.2.0/30", bad]).unwrap_err().to_string();
            assert!(error.contains("AddressPool p: spec.addresses[1]") && error.contains(why), "{bad}: {error}");
        }
    }

    #[test]
    fn of_a_pool_with_a_mistake_the_rest_can_be_read() {
        let addresses =
            ["192.0.2.300", "192.0.2.8/30", "192.0.2.9-192.0.2.1", "127.0.0.1", "192.0.2.20"].map(str::to_owned);
        let spec = AddressPoolSpec { addresses: addresses.to_vec(), ..AddressPoolSpec::default() };
        let read = AddressPool::readable(&custom::AddressPool::new("p", spec));
        assert_eq!(read.ranges, [range("192.0.2.8-192.0.2.11"), range("192.0.2.20")]);
        assert!(!read.auto_assign && read.name == "p");
    }

    #[test]
    fn what_is_taken_out_of_a_range_leaves_the_rest() {
        let all = range("192.0.2.0/24");
        let left = |other: &str| all.without(&range(other)).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(left("192.0.2.10-192.0.2.19"), ["192.0.2.0-192.0.2.9", "192.0.2.20-192.0.2.255"]);
        assert_eq!(left("192.0.2.128/25"), ["192.0.2.0-192.0.2.127"]);
        assert_eq!(left("192.0.0.0/16"), Vec::<String>::new());
        assert_eq!(left("198.51.100.0/24"), ["192.0.2.0-192.0.2.255"]);
        assert_eq!(range("255.255.255.0/24").without(&range("255.255.255.128/25")).len(), 1, "the end of all");
    }

    #[test]
    fn walking_a_range_ends_at_its_last_address() {
        let two = range("192.0.2.1-192.0.2.2");
        assert_eq!(two.after(two.first()), Some(two.last()));
        assert_eq!(two.after(two.last()), None);
        let end = range("255.255.255.255");
        assert_eq!(end.after(end.first()), None);
    }
}
