//! What nodes go by on the device of the backend `udp`, whose frames have no more room for an address than a MAC address is long (`bpf/abi.h`).
//!
//! Pure. That of an IPv4 address holds it. That of an IPv6 address holds 40 bits of a hash, so from it alone nobody finds the node: who sends has a
//! table, and so have the kernel's programs. It means something on this machine only, and never leaves it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use towpath_model::desired::NodePeer;

use crate::abi::Addr;
use crate::net::mac::OF_NODES;

/// What the MAC address of a node at an IPv6 address begins with: of those that anybody may give (IEEE 802), and none that this network gives to others.
const OF_V6: u8 = 0x0a;

/// The MAC address that stands for the node whose tunnel ends at this address. Of IPv6 addresses, those that differ in their last five bytes only have
/// different ones; that others have the same is rare, unless one looks for it.
pub fn mac_of(node: IpAddr) -> [u8; 6] {
    match node {
        IpAddr::V4(v4) => {
            let ([first, second], [a, b, c, d]) = (OF_NODES[1], v4.octets());
            [first, second, a, b, c, d]
        }
        IpAddr::V6(_) => {
            let [.., a, b, c, d, e] = Addr::new(node).udp_tag().to_be_bytes();
            [OF_V6, a, b, c, d, e]
        }
    }
}

/// The node at an IPv4 address that this stands for.
pub fn ipv4_of(mac: [u8; 6]) -> Option<Ipv4Addr> {
    let [first, second, a, b, c, d] = mac;
    ([first, second] == OF_NODES[1]).then(|| Ipv4Addr::new(a, b, c, d))
}

/// Whether this may stand for a node.
pub fn is_name(mac: [u8; 6]) -> bool {
    mac.first() == Some(&OF_V6) || ipv4_of(mac).is_some()
}

/// The nodes at IPv6 addresses by what they go by. Of two that go by the same, it is the one with the lower address, on every node alike.
pub fn named(nodes: impl IntoIterator<Item = Ipv6Addr>) -> BTreeMap<[u8; 6], Ipv6Addr> {
    let mut named = BTreeMap::<[u8; 6], Ipv6Addr>::new();
    for node in nodes {
        named.entry(mac_of(IpAddr::V6(node))).and_modify(|other| *other = node.min(*other)).or_insert(node);
    }
    named
}

/// The other nodes whose tunnels end at IPv6 addresses and that this node can send datagrams to and hear them from. None if this node itself goes by
/// what another one has.
pub fn others(peers: &[NodePeer]) -> BTreeSet<Ipv6Addr> {
    let v6 = |peer: &NodePeer| if let IpAddr::V6(v6) = peer.tunnel { Some(v6) } else { None };
    let own: Vec<Ipv6Addr> = peers.iter().filter(|peer| peer.local).filter_map(v6).collect();
    let named: BTreeSet<Ipv6Addr> = named(peers.iter().filter_map(v6)).into_values().collect();
    match own.iter().all(|own| named.contains(own)) {
        true => named.into_iter().filter(|node| !own.contains(node)).collect(),
        false => BTreeSet::new(),
    }
}

#[cfg(test)]
mod tests {
    use towpath_model::NodeName;
    use towpath_model::desired::Reach;

    use super::*;

    fn v6(text: &str) -> Ipv6Addr {
        text.parse().unwrap()
    }

    /// Two that go by the same: what a search for it finds, as a node does that may choose its address.
    const PAIR: [&str; 2] = ["fd50::2", "fd50::5f93:499b:1e8c:6610"];

    #[test]
    fn an_ipv4_address_is_in_its_name_and_others_names_are_none() {
        let mac = mac_of([192, 0, 2, 7].into());
        assert_eq!((mac, ipv4_of(mac)), ([0x02, 0x77, 192, 0, 2, 7], Some([192, 0, 2, 7].into())));
        let six = mac_of(IpAddr::V6(v6("2001:db8::1")));
        assert_eq!((six[0], ipv4_of(six)), (0x0a, None));
        assert!(is_name(mac) && is_name(six));
        assert!(!is_name([0xff; 6]) && !is_name([0x02, 0x74, 192, 0, 2, 7]) && !is_name([0x33, 0x33, 0, 0, 0, 1]));
        for mac in [mac, six] {
            assert_eq!(mac[0] & 3, 2, "unicast and locally administered");
        }
    }

    #[test]
    fn nodes_have_names_of_their_own_however_they_are_numbered() {
        let differ =
            |all: BTreeSet<Ipv6Addr>| assert_eq!(named(all.iter().copied()).len(), all.len(), "{:?}", all.first());
        for way in ["2001:db8::{}", "2001:db8::{}:0:0", "2001:db8:0:{}::1", "2001:db8:{}::1", "fd00:{}::a", "{}::1"] {
            differ((1..8192).map(|number| v6(&way.replace("{}", &format!("{number:x}")))).collect());
        }
        let racks = (0..200).flat_map(|rack| (1..250).map(move |node| (rack, node)));
        differ(racks.clone().map(|(rack, node)| v6(&format!("2001:db8:0:{rack:x}::{node:x}"))).collect());
        differ(racks.clone().map(|(rack, node)| v6(&format!("fd00::a00:{:x}", rack << 8 | node))).collect());
        differ(racks.map(|(rack, node)| v6(&format!("fe00::2ff:fe{rack:02x}:{node:x}"))).collect());
    }

    fn peer(name: &str, tunnel: &str, local: bool) -> NodePeer {
        let tunnel: IpAddr = tunnel.parse().unwrap();
        NodePeer {
            name: NodeName::new(name),
            addresses: vec![tunnel],
            pod_cidrs: Vec::new(),
            tunnel,
            local,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        }
    }

    #[test]
    fn of_two_with_one_name_the_lower_has_it_and_the_other_is_told_of_nobody() {
        let [low, high] = PAIR.map(v6);
        assert!(low < high && mac_of(IpAddr::V6(low)) == mac_of(IpAddr::V6(high)));
        for both in [[low, high], [high, low]] {
            assert_eq!(named(both).into_values().collect::<Vec<_>>(), [low]);
        }
        let among = |own: &str| {
            let nodes = ["fd50::1", PAIR[0], PAIR[1], "192.0.2.1"];
            let peers: Vec<NodePeer> = nodes.iter().map(|node| peer(node, node, *node == own)).collect();
            others(&peers).iter().map(Ipv6Addr::to_string).collect::<Vec<_>>()
        };
        assert_eq!(among("fd50::1"), [PAIR[0]]);
        assert_eq!(among(PAIR[0]), ["fd50::1"]);
        assert_eq!(among(PAIR[1]), Vec::<String>::new());
    }
}
