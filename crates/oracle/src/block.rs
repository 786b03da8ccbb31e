//! CIDR containment, bit by bit.

use std::net::IpAddr;

/// Whether an address is in a range. A range of one family holds no address of the other.
pub(crate) fn contains(cidr: &str, address: IpAddr) -> bool {
    let Some((network, length)) = cidr.split_once('/') else { return false };
    let (Ok(network), Ok(length)) = (network.parse::<IpAddr>(), length.parse::<usize>()) else { return false };
    match (network, address) {
        (IpAddr::V4(n), IpAddr::V4(a)) => length <= 32 && same_bits(&n.octets(), &a.octets(), length),
        (IpAddr::V6(n), IpAddr::V6(a)) => length <= 128 && same_bits(&n.octets(), &a.octets(), length),
        _ => false,
    }
}

fn same_bits(one: &[u8], other: &[u8], count: usize) -> bool {
    let bits = |bytes: &[u8]| -> Vec<bool> {
        bytes.iter().flat_map(|byte| (0..8).rev().map(move |i| byte >> i & 1 == 1)).take(count).collect()
    };
    bits(one) == bits(other)
}
