//! What the kernel's tables hold for other nodes: the slow path beneath the kernel programs, complete by itself.
//!
//! Pure: from peers to routes and neighbours. Every remote pod range has a route into the tunnel whose next hop is the range's
//! own gateway address; its permanent neighbour entry names the remote tunnel device's computed MAC, so nothing is ever
//! asked on the overlay. Other nodes' own addresses have the same in a table that only packets from our pods look into,
//! because an underlay may drop pod sources.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::desired::NodePeer;

use super::route::{Encap, Route};
use super::{MAIN_TABLE, NODE_TABLE, gateway_of, host_range, mac, of_family};

/// This node's end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Index of the tunnel device.
    pub device: u32,
    /// VNI.
    pub id: u32,
    /// The node's own addresses: outer sources, and sources of the node's own packets to pods.
    pub addresses: Vec<IpAddr>,
}

/// What should be there for the peers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PeerTables {
    /// Routes to remote pod ranges, main table.
    pub ranges: Vec<Route>,
    /// Routes to remote nodes' own addresses, [`NODE_TABLE`].
    pub nodes: Vec<Route>,
    /// Next hops on the tunnel device.
    pub neighbours: BTreeMap<IpAddr, [u8; 6]>,
    /// Peers that cannot be reached as things are, in words.
    pub problems: Vec<String>,
}

/// Computes the tables. A range or an address that two peers claim stays with the first, and is named in `problems`.
pub fn tables(tunnel: &Tunnel, peers: &[NodePeer]) -> PeerTables {
    let mut tables = PeerTables::default();
    let mut taken = BTreeSet::new();
    for peer in peers.iter().filter(|p| !p.local) {
        let Some(source) = of_family(&tunnel.addresses, peer.tunnel) else {
            tables.problems.push(format!(
                "node {}: its tunnel address {} has a family that this node has no address of",
                peer.name, peer.tunnel
            ));
            continue;
        };
        let encap = Encap { id: tunnel.id, source, destination: peer.tunnel };
        let route = |table, destination, gateway| Route {
            table,
            destination,
            device: tunnel.device,
            gateway: Some(gateway),
            source: of_family(&tunnel.addresses, gateway),
            encap: Some(encap.clone()),
        };
        let mut gateways = Vec::new();
        for range in &peer.pod_cidrs {
            let Some(gateway) = gateway_of(*range).filter(|_| taken.insert((MAIN_TABLE, range.trunc()))) else {
                tables
                    .problems
                    .push(format!("node {}: pod range {range} is another node's, or a single address", peer.name));
                continue;
            };
            gateways.push(gateway);
            tables.neighbours.insert(gateway, mac::of_tunnel(peer.tunnel));
            tables.ranges.push(route(MAIN_TABLE, range.trunc(), gateway));
        }
        for address in &peer.addresses {
            let Some(gateway) = of_family(&gateways, *address) else { continue };
            if taken.insert((NODE_TABLE, host_range(*address))) {
                tables.nodes.push(route(NODE_TABLE, host_range(*address), gateway));
            } else {
                tables.problems.push(format!("node {}: address {address} is another node's too", peer.name));
            }
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use towpath_model::NodeName;

    use super::*;

    fn peer(name: &str, address: &str, ranges: &[&str], local: bool) -> NodePeer {
        let address: IpAddr = address.parse().unwrap();
        NodePeer {
            name: NodeName::new(name),
            addresses: vec![address],
            pod_cidrs: ranges.iter().map(|r| r.parse().unwrap()).collect(),
            tunnel: address,
            local,
        }
    }

    fn tunnel() -> Tunnel {
        Tunnel { device: 7, id: 116, addresses: vec!["192.0.2.1".parse().unwrap()] }
    }

    #[test]
    fn a_remote_node_gets_a_route_a_range_and_one_to_itself() {
        let peers = [
            peer("a", "192.0.2.1", &["10.244.1.0/24"], true),
            peer("b", "192.0.2.2", &["10.244.2.0/24", "fd00:2::/64"], false),
        ];
        let tables = tables(&tunnel(), &peers);
        assert!(tables.problems.is_empty(), "{:?}", tables.problems);
        let ranges: Vec<String> =
            tables.ranges.iter().map(|r| format!("{} via {:?}", r.destination, r.gateway)).collect();
        assert_eq!(ranges, ["10.244.2.0/24 via Some(10.244.2.1)", "fd00:2::/64 via Some(fd00:2::1)"]);
        assert_eq!(tables.ranges[0].source, Some("192.0.2.1".parse().unwrap()));
        assert_eq!(tables.ranges[1].source, None, "this node has no IPv6 address");
        assert_eq!(tables.nodes.len(), 1);
        assert_eq!(tables.nodes[0].destination, "192.0.2.2/32".parse().unwrap());
        assert_eq!(tables.neighbours.len(), 2);
    }

    #[test]
    fn what_two_nodes_claim_stays_with_the_first_and_is_named() {
        let peers =
            [peer("b", "192.0.2.2", &["10.244.2.0/24"], false), peer("c", "192.0.2.3", &["10.244.2.0/24"], false)];
        let tables = tables(&tunnel(), &peers);
        assert_eq!(tables.ranges.len(), 1);
        assert_eq!(tables.neighbours[&"10.244.2.1".parse().unwrap()], mac::of_tunnel("192.0.2.2".parse().unwrap()));
        assert_eq!(tables.problems.len(), 1);
    }

    #[test]
    fn a_tunnel_of_a_family_we_lack_is_named_and_left_out() {
        let tables = tables(&tunnel(), &[peer("b", "2001:db8::2", &["10.244.2.0/24"], false)]);
        assert!(tables.ranges.is_empty());
        assert_eq!(tables.problems.len(), 1);
    }
}
