//! Sets of addresses of both families on one line: IPv4 where `::ffff:0:0/96` maps it, IPv6 around it.
//!
//! An IPv6 prefix never holds an IPv4 address and the other way round, as `ipBlock` has it.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Subnets, Ipv6Subnets};
use serde::{Serialize, Serializer};
use towpath_model::{Family, canonical};

use super::ranges::Ranges;

const V4: u128 = 0xffff_0000_0000;
const V4_LAST: u128 = V4 + 0xffff_ffff;

/// Where an address is on the line.
pub(crate) fn number(address: IpAddr) -> u128 {
    match canonical(address) {
        IpAddr::V4(a) => V4 + u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// The address at a place of the line.
pub(crate) fn address(number: u128) -> IpAddr {
    canonical(IpAddr::V6(Ipv6Addr::from_bits(number)))
}

/// Addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Addresses(pub(crate) Ranges);

impl Addresses {
    /// Every address of a family.
    pub fn of_family(family: Family) -> Self {
        let v4 = Ranges::of(V4, V4_LAST);
        match family {
            Family::V4 => Self(v4),
            Family::V6 => Self(Ranges::of(0, u128::MAX).without(&v4)),
        }
    }

    /// Every address.
    pub fn all() -> Self {
        Self(Ranges::of(0, u128::MAX))
    }

    /// The addresses of a prefix.
    pub fn of(net: &IpNet) -> Self {
        match net {
            IpNet::V4(_) => Self(Ranges::of(number(net.network()), number(net.broadcast()))),
            IpNet::V6(n) => {
                let whole = Ranges::of(n.network().to_bits(), n.broadcast().to_bits());
                Self(whole.without(&Ranges::of(V4, V4_LAST)))
            }
        }
    }

    /// One address.
    pub fn one(address: IpAddr) -> Self {
        Self(Ranges::one(number(address)))
    }

    /// The addresses of all prefixes.
    pub fn of_all<'n>(nets: impl IntoIterator<Item = &'n IpNet>) -> Self {
        Self(Ranges::collect(nets.into_iter().flat_map(|net| Self::of(net).0.iter().collect::<Vec<_>>())))
    }

    /// What is in any of them.
    pub(crate) fn any_of<'a>(list: impl IntoIterator<Item = &'a Self>) -> Self {
        Self(Ranges::collect(list.into_iter().flat_map(|addresses| addresses.0.iter())))
    }

    /// The addresses of an `ipBlock`.
    pub fn of_block(cidr: &IpNet, except: &[IpNet]) -> Self {
        let whole = Self::of(cidr);
        if except.is_empty() { whole } else { whole.without(&Self::of_all(except)) }
    }

    /// Whether an address is in it.
    pub fn has(&self, address: IpAddr) -> bool {
        self.0.has(number(address))
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is in both.
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.and(&other.0))
    }

    /// What is in either.
    pub fn or(&self, other: &Self) -> Self {
        Self(self.0.or(&other.0))
    }

    /// What is in this and not in the other.
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.without(&other.0))
    }

    /// One of them to show: of IPv4 if there is one, and not the address that names a network.
    pub fn sample(&self) -> Option<IpAddr> {
        let v4 = self.and(&Self::of_family(Family::V4));
        let from = if v4.is_empty() { self } else { &v4 };
        let dull = |ip: &IpAddr| match ip {
            IpAddr::V4(a) => a.octets()[3] == 0 || a.octets()[0] == 0,
            IpAddr::V6(a) => a.segments()[7] == 0 || a.segments()[0] == 0,
        };
        // Where a range begins inside of what is usually not given to anybody (0.0.0.0/8, ::/16), look further on.
        let usual = from.without(&Self::of_all(&unusual()));
        let candidates = usual.0.some(2).into_iter().chain(from.0.some(2)).map(address).collect::<Vec<_>>();
        candidates.iter().copied().find(|ip| !dull(ip)).or_else(|| candidates.first().copied())
    }

    /// The fewest prefixes that make it up, by family.
    pub fn prefixes(&self) -> Vec<IpNet> {
        let mut out: Vec<IpNet> = Vec::new();
        let v4 = self.0.and(&Ranges::of(V4, V4_LAST));
        for (first, last) in v4.iter() {
            if let (IpAddr::V4(first), IpAddr::V4(last)) = (address(first), address(last)) {
                out.extend(Ipv4Subnets::new(first, last, 0).map(IpNet::V4));
            }
        }
        let mut v6 = self.0.without(&v4);
        // What surrounds the mapped range wholly is written as if that were of it: no IPv6 address lies in it.
        if v6.has(V4 - 1) && v6.has(V4_LAST + 1) {
            v6 = v6.or(&Ranges::of(V4, V4_LAST));
        }
        for (first, last) in v6.iter() {
            out.extend(Ipv6Subnets::new(Ipv6Addr::from_bits(first), Ipv6Addr::from_bits(last), 0).map(IpNet::V6));
        }
        out
    }
}

fn unusual() -> [IpNet; 2] {
    let v4 = ipnet::Ipv4Net::new(Ipv4Addr::UNSPECIFIED, 8).unwrap_or_default();
    let v6 = ipnet::Ipv6Net::new(Ipv6Addr::UNSPECIFIED, 16).unwrap_or_default();
    [v4.into(), v6.into()]
}

impl fmt::Display for Addresses {
    /// As a list of prefixes, single addresses without a length.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list: Vec<String> = self
            .prefixes()
            .iter()
            .map(|net| if net.prefix_len() == net.max_prefix_len() { net.addr().to_string() } else { net.to_string() })
            .collect();
        if list.is_empty() { f.write_str("none") } else { f.write_str(&list.join(", ")) }
    }
}

impl Serialize for Addresses {
    /// A list of prefixes.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.prefixes().serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn net(text: &str) -> IpNet {
        text.parse().unwrap()
    }

    #[test]
    fn families_do_not_hold_each_other() {
        let v6 = Addresses::of(&net("::/0"));
        assert!(!v6.has("10.0.0.1".parse().unwrap()) && !v6.has("::ffff:10.0.0.1".parse().unwrap()));
        assert!(v6.has("2001:db8::1".parse().unwrap()));
        assert_eq!(v6, Addresses::of_family(Family::V6));
        assert_eq!(v6.to_string(), "::/0");
        assert!(Addresses::of(&net("::ffff:10.0.0.0/104")).is_empty());
        assert_eq!(Addresses::of(&net("0.0.0.0/0")), Addresses::of_family(Family::V4));
        assert_eq!(Addresses::all().to_string(), "0.0.0.0/0, ::/0");
    }

    #[test]
    fn a_block_with_a_hole_is_the_prefixes_around_it() {
        let block = Addresses::of_block(&net("192.168.26.0/24"), &[net("192.168.26.128/25")]);
        assert_eq!(block.to_string(), "192.168.26.0/25");
        assert!(!block.has("192.168.26.200".parse().unwrap()));
        assert_eq!(Addresses::one("10.0.0.1".parse().unwrap()).to_string(), "10.0.0.1");
    }

    #[test]
    fn a_sample_is_an_address_that_somebody_could_have() {
        assert_eq!(Addresses::all().sample(), Some("1.0.0.1".parse().unwrap()));
        assert_eq!(Addresses::of(&net("10.1.0.0/16")).sample(), Some("10.1.0.1".parse().unwrap()));
        assert_eq!(Addresses::of(&net("10.1.0.0/32")).sample(), Some("10.1.0.0".parse().unwrap()));
        assert_eq!(Addresses::of(&net("2001:db8::/64")).sample(), Some("2001:db8::1".parse().unwrap()));
        assert_eq!(Addresses::of(&net("0.0.0.0/32")).sample(), Some("0.0.0.0".parse().unwrap()));
    }
}
