//! Addresses and prefixes as the ABI writes them: 16 bytes, IPv4 mapped into IPv6.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use towpath_model::{Family, canonical};

use crate::abi::{Addr, CidrKey, TP_SERVICE_BITS_SHIFT};

/// Bits of a [`CidrKey`] before the address: the family.
const FAMILY_BITS: u32 = 32;
/// Bits of a mapped IPv4 address before its own.
const MAPPED_BITS: u32 = 96;

impl Addr {
    /// As the kernel programs write it.
    pub fn new(address: IpAddr) -> Self {
        let v6 = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Self { b: v6.octets() }
    }

    /// As people write it.
    pub fn ip(self) -> IpAddr {
        canonical(IpAddr::V6(Ipv6Addr::from(self.b)))
    }

    /// The zero address of a family: "any node address" in a Service key.
    pub fn any(family: Family) -> Self {
        match family {
            Family::V4 => Self::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED)),
            Family::V6 => Self::default(),
        }
    }

    /// What stands for an IPv6 address where 48 bits must do (`tp_name_of` in `bpf/direct_return.h`); none for one of IPv4, which needs no such thing.
    pub fn name(self) -> Option<u64> {
        self.ip().is_ipv6().then(|| self.hash() >> 16)
    }

    /// 40 bits of the hash, by which a node goes on the device of the backend `udp` ([`crate::udp_names`]).
    pub(crate) fn udp_tag(self) -> u64 {
        self.hash() >> 24
    }

    /// Which bit of `tp_service_bits` is the address's (`tp_service_bit` in `bpf/addr.h`).
    pub fn service_bit(self) -> u32 {
        (self.hash() >> (64 - TP_SERVICE_BITS_SHIFT)) as u32
    }

    /// `tp_mix_addr` in `bpf/addr.h`.
    fn hash(self) -> u64 {
        let mix = |hash: u64, word: [u8; 8]| {
            let product = (hash ^ u64::from_ne_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            product ^ (product >> 29)
        };
        let [a, b, c, d, e, f, g, h, second @ ..] = self.b;
        mix(mix(0, [a, b, c, d, e, f, g, h]), second)
    }

    /// Whether all bytes are zero: no address.
    pub fn is_zero(self) -> bool {
        self == Self::default()
    }
}

impl CidrKey {
    /// Key of a prefix; host bits are cleared.
    pub fn new(net: IpNet) -> Self {
        let net = net.trunc();
        let bits = u32::from(net.prefix_len());
        let (prefixlen, family) = match net {
            IpNet::V4(_) => (FAMILY_BITS + MAPPED_BITS + bits, 4),
            IpNet::V6(_) => (FAMILY_BITS + bits, 6),
        };
        Self { prefixlen, family, addr: Addr::new(net.addr()) }
    }

    /// Key of one address.
    pub fn host(address: IpAddr) -> Self {
        Self::new(IpNet::from(address))
    }

    /// The prefix; none for a key that no prefix has.
    pub fn net(self) -> Option<IpNet> {
        match self.addr.ip() {
            IpAddr::V4(v4) if self.family == 4 => {
                let bits = self.prefixlen.checked_sub(FAMILY_BITS + MAPPED_BITS)?;
                Ipv4Net::new(v4, u8::try_from(bits).ok()?).ok().map(IpNet::V4)
            }
            IpAddr::V6(v6) if self.family == 6 => {
                let bits = self.prefixlen.checked_sub(FAMILY_BITS)?;
                Ipv6Net::new(v6, u8::try_from(bits).ok()?).ok().map(IpNet::V6)
            }
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prefixes_count_from_the_family_and_come_back() {
        for (text, prefixlen) in
            [("0.0.0.0/0", 128), ("10.1.2.0/24", 152), ("10.1.2.3/32", 160), ("::/0", 32), ("fd00::/64", 96)]
        {
            let net: IpNet = text.parse().unwrap();
            let key = CidrKey::new(net);
            assert_eq!(key.prefixlen, prefixlen, "{text}");
            assert_eq!(key.net(), Some(net));
        }
    }

    #[test]
    fn the_two_any_node_addresses_differ() {
        assert_ne!(Addr::any(Family::V4), Addr::any(Family::V6));
        assert!(Addr::any(Family::V6).is_zero());
    }
}
