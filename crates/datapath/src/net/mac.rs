//! MAC addresses that are computed, never exchanged: of tunnel devices from the node's tunnel address, of pods from the pod's.
//!
//! All are locally administered unicast addresses (IEEE 802, second bit of the first byte).

use std::net::IpAddr;

/// Host side of every pod's veth. Each pair is a link of its own, so one address serves all.
pub const HOST_SIDE: [u8; 6] = [0x02, 0x74, 0x70, 0x00, 0x00, 0x01];

/// The tunnel device of the node whose tunnel address is `address`. It differs between nodes, because the VXLAN driver
/// takes a frame whose inner source is its own address for a loop and drops it; kernel programs compute the same
/// (`bpf/abi.h`).
pub fn of_tunnel(address: IpAddr) -> [u8; 6] {
    folded(OF_NODES[0], address)
}

/// What the MAC addresses of nodes' devices begin with: of tunnels, and of the backend `udp` between IPv4 addresses ([`crate::udp_names`]; between
/// others they begin as anybody's may, and no link ever sees them).
pub(crate) const OF_NODES: [[u8; 2]; 2] = [[0x02, 0x74], [0x02, 0x77]];

/// What the MAC addresses of pods begin with, of IPv4 and of IPv6.
const OF_PODS: [[u8; 2]; 2] = [[0x06, 0x74], [0x06, 0x76]];

/// The device of the pod that holds `address` (its first), and with the backend `macvlan` each address on the link of the nodes, where kernel programs
/// compute the same (`bpf/abi.h`). So pods of other nodes must have others: of IPv4 it holds the address; of IPv6 the last 16 bits of it, and apart from
/// them a fold of the others, in which up to 65,536 nodes differ wherever they are numbered.
pub fn of_pod(address: IpAddr) -> [u8; 6] {
    match address {
        IpAddr::V4(_) => folded(OF_PODS[0], address),
        IpAddr::V6(v6) => {
            let [first @ .., last] = v6.segments();
            let [a, b] = first.into_iter().fold(0, |all, word| all ^ word).to_be_bytes();
            let [c, d] = last.to_be_bytes();
            [OF_PODS[1][0], OF_PODS[1][1], a, b, c, d]
        }
    }
}

/// Whether an address is one that [`of_pod`] makes.
pub fn is_of_pod(mac: [u8; 6]) -> bool {
    OF_PODS.iter().any(|first| mac.starts_with(first))
}

/// Whether an address is one that this network gives by itself, here or on another node.
pub fn is_ours(mac: [u8; 6]) -> bool {
    mac == HOST_SIDE || is_of_pod(mac) || OF_NODES.iter().any(|first| mac.starts_with(first))
}

/// Two fixed bytes and the XOR of the four 32-bit words of the 16-byte form (IPv4 mapped into IPv6).
fn folded([first, second]: [u8; 2], address: IpAddr) -> [u8; 6] {
    let wide = match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_bits(),
        IpAddr::V6(v6) => v6.to_bits(),
    };
    let word = (wide >> 96) as u32 ^ (wide >> 64) as u32 ^ (wide >> 32) as u32 ^ wide as u32;
    let [a, b, c, d] = word.to_be_bytes();
    [first, second, a, b, c, d]
}

/// As `ip link` writes it.
pub fn text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_other_nodes_have_other_macs_however_nodes_are_numbered() {
        for nodes in
            ["10.244.{}.", "fd00:10:{}::", "fd00:10:244:{}::", "fd00:10:244:0:{}::", "fd00:10:244::{}:", "fd00::{}00:"]
        {
            let mut seen = std::collections::BTreeSet::new();
            for node in 1..64 {
                let prefix = nodes.replace("{}", &node.to_string());
                let pods = (2..130).map(|pod| of_pod(format!("{prefix}{pod}").parse().unwrap()));
                pods.for_each(|mac| assert!(is_of_pod(mac) && seen.insert(mac), "{prefix}: {}", text(mac)));
            }
        }
    }

    #[test]
    fn the_tunnel_address_folds_into_the_mac_as_the_abi_says() {
        assert_eq!(text(of_tunnel("192.168.255.11".parse().unwrap())), "02:74:c0:a8:00:f4");
        assert_eq!(text(of_tunnel("fd00:255::b".parse().unwrap())), "02:74:fd:00:02:5e");
        assert_ne!(of_tunnel("10.0.0.1".parse().unwrap()), of_tunnel("10.0.0.2".parse().unwrap()));
        for mac in [of_tunnel("10.0.0.1".parse().unwrap()), of_pod("10.0.0.1".parse().unwrap()), HOST_SIDE] {
            assert_eq!(mac[0] & 3, 2, "unicast and locally administered");
        }
    }
}
