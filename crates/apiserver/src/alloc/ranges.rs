//! Ranges of addresses and ports and the order in which their members are tried.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::ops::RangeInclusive;

use ipnet::IpNet;

use super::families::Family;

/// Members of a range that are given out at most (kube-apiserver's bound for IPv6).
const MAX_MEMBERS: u128 = 1 << 16;

/// One Service address range.
pub(super) struct AddressRange {
    cidr: IpNet,
}

impl AddressRange {
    pub(super) fn new(cidr: IpNet) -> Self {
        Self { cidr: cidr.trunc() }
    }

    pub(super) fn cidr(&self) -> IpNet {
        self.cidr
    }

    pub(super) fn family(&self) -> Family {
        match self.cidr {
            IpNet::V4(_) => Family::V4,
            IpNet::V6(_) => Family::V6,
        }
    }

    /// Usable members: without the network's own address and, for IPv4, the broadcast address.
    fn last(&self) -> u128 {
        let bits = u32::from(self.cidr.max_prefix_len() - self.cidr.prefix_len());
        let size = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
        match self.cidr {
            IpNet::V4(_) => size.saturating_sub(2),
            IpNet::V6(_) => size.saturating_sub(1),
        }
    }

    /// The address at an offset.
    pub(super) fn address(&self, offset: u128) -> Option<IpAddr> {
        if offset == 0 || offset > self.last() {
            return None;
        }
        match self.cidr {
            IpNet::V4(net) => {
                let number = u32::from(net.network()).checked_add(u32::try_from(offset).ok()?)?;
                Some(IpAddr::V4(Ipv4Addr::from(number)))
            }
            IpNet::V6(net) => Some(IpAddr::V6(Ipv6Addr::from(u128::from(net.network()).checked_add(offset)?))),
        }
    }

    pub(super) fn holds(&self, address: IpAddr) -> bool {
        let last = self.address(self.last());
        let broadcast = matches!(self.cidr, IpNet::V4(_)) && last.is_some_and(|last| address > last);
        self.cidr.contains(&address) && address != self.cidr.network() && !broadcast
    }

    /// Offsets that are left to people first: `min(max(16, size/16), 256)`.
    fn reserved(&self) -> u128 {
        if self.last() < 16 { 0 } else { (self.last() / 16).clamp(16, 256) }
    }

    /// Addresses in the order in which they are tried: from a random place of the upper part, then the lower part.
    pub(super) fn candidates(&self) -> impl Iterator<Item = IpAddr> {
        let last = self.last().min(MAX_MEMBERS);
        let lower = self.reserved();
        let count = last.saturating_sub(lower);
        let start = if count == 0 { 0 } else { uuid::Uuid::new_v4().as_u128() % count };
        let upper = (0..count).map(move |step| lower + 1 + (start + step) % count);
        upper.chain(1..=lower).filter_map(|offset| self.address(offset))
    }
}

/// The node port range.
pub(super) struct PortRange {
    range: RangeInclusive<u16>,
}

impl PortRange {
    pub(super) fn new(range: RangeInclusive<u16>) -> Self {
        Self { range }
    }

    pub(super) fn holds(&self, port: u16) -> bool {
        self.range.contains(&port)
    }

    pub(super) fn text(&self) -> String {
        format!("{}-{}", self.range.start(), self.range.end())
    }

    /// Ports in the order in which they are tried: from a random place of the upper part, then the lower part
    /// (`min(max(16, size/32), 128)` ports).
    pub(super) fn candidates(&self) -> impl Iterator<Item = u16> {
        let (first, last) = (u32::from(*self.range.start()), u32::from(*self.range.end()));
        let size = (last + 1).saturating_sub(first);
        let lower = if size < 16 { 0 } else { (size / 32).clamp(16, 128).min(size) };
        let count = size - lower;
        let random = (uuid::Uuid::new_v4().as_u128() & 0xffff) as u32;
        let start = if count == 0 { 0 } else { random % count };
        let upper = (0..count).map(move |step| first + lower + (start + step) % count);
        upper.chain(first..first + lower).filter_map(|port| u16::try_from(port).ok())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn every_usable_address_is_tried_once_and_the_lower_part_last() {
        let range = AddressRange::new("10.96.0.0/24".parse().unwrap());
        let all: Vec<IpAddr> = range.candidates().collect();
        assert_eq!(all.len(), 254);
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 254);
        assert!(all[..200].iter().all(|address| *address > "10.96.0.16".parse::<IpAddr>().unwrap()));
        assert!(!range.holds("10.96.0.0".parse().unwrap()) && !range.holds("10.96.0.255".parse().unwrap()));
        assert!(range.holds("10.96.0.10".parse().unwrap()));
        let v6 = AddressRange::new("fd00:10:96::/112".parse().unwrap());
        assert_eq!(v6.address(10), Some("fd00:10:96::a".parse().unwrap()));
    }

    #[test]
    fn every_node_port_is_tried_once_and_the_lower_part_last() {
        let range = PortRange::new(30000..=32767);
        let all: Vec<u16> = range.candidates().collect();
        assert_eq!(all.iter().collect::<HashSet<_>>().len(), 2768);
        assert!(all[..2600].iter().all(|port| *port >= 30086));
        assert_eq!(PortRange::new(5..=5).candidates().collect::<Vec<_>>(), [5]);
    }
}
