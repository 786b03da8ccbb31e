//! What the kernel's tables hold for other nodes: the slow path beneath the kernel programs, complete by itself.
//!
//! Pure: from peers to routes and neighbours. Every remote pod range has a route into the tunnel whose next hop is the range's
//! own gateway address; its permanent neighbour entry names the remote tunnel device's computed MAC, so nothing is ever
//! asked on the overlay. Other nodes' own addresses have the same in a table that only packets from our pods look into,
//! because an underlay may drop pod sources. A node whose pods are sent packets as they are has routes to its ranges over its own
//! addresses instead; all else stays.
//!
//! Over a tunnel device that another network lent (Flannel's, while its pods are here) routes carry no tunnel key: the device finds the
//! node by the MAC address in its forwarding table, which is written too. Next hops are then the ranges' network addresses, as
//! Flannel's, so that its entries and ours are the same. Its routes for IPv6 are by other devices, and serve as long as they are there:
//! IPv6 takes no second route whose next hop is within the range of the first, on another device.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::NodeName;
use towpath_model::desired::{NodePeer, Reach};

use super::route::{Encap, Route};
use super::{MAIN_TABLE, NODE_TABLE, gateway_of, host_range, mac, of_family};
use crate::udp_names;

/// This node's end of the tunnel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tunnel {
    /// Index of the tunnel device.
    pub device: u32,
    /// VNI.
    pub id: u32,
    /// The node's own addresses: outer sources, and sources of the node's own packets to pods.
    pub addresses: Vec<IpAddr>,
    /// Gateways of the node's pod ranges: sources of its packets to pods of Flannel's nodes, which would answer a node's address
    /// past the tunnel.
    pub gateways: Vec<IpAddr>,
    /// The device is another network's.
    pub lent: bool,
    /// Beside a lent device: that network's own device for IPv6, 0 when there is none.
    pub lent_v6: u32,
    /// Beside a lent device: IPv6 ranges that another network's routes lead to, and the devices they do it by.
    pub led: BTreeMap<IpNet, u32>,
    /// Index of the uplink.
    pub uplink: u32,
    /// Index of the device of the backend `udp`; 0: there is none.
    pub udp: u32,
    /// The devices that lead to nodes which take packets as they are, IPv4 and IPv6.
    pub plain: BTreeMap<NodeName, [u32; 2]>,
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
    /// Next hops on the device of `udp`: of all peers, whatever they are reached by, so that a route finds its own there as soon as it leads there.
    pub udp_neighbours: BTreeMap<IpAddr, [u8; 6]>,
    /// Of a lent tunnel device: where frames for a MAC address go.
    pub forwarding: BTreeMap<[u8; 6], IpAddr>,
    /// Ranges whose route another network may have made; it serves as well.
    pub yielding: BTreeSet<IpNet>,
    /// Peers that cannot be reached as things are, in words.
    pub problems: Vec<String>,
}

/// Computes the tables. A range or an address that two peers claim stays with the first, and is named in `problems`.
pub fn tables(tunnel: &Tunnel, peers: &[NodePeer]) -> PeerTables {
    let mut tables = PeerTables::default();
    let mut taken = BTreeSet::new();
    for peer in peers.iter().filter(|p| !p.local) {
        // What Flannel's own device for IPv6 does beside the lent one is not repeated.
        if tunnel.lent && peer.tunnel.is_ipv6() && tunnel.addresses.iter().any(IpAddr::is_ipv4) {
            continue;
        }
        let Some(source) = of_family(&tunnel.addresses, peer.tunnel) else {
            tables.problems.push(format!(
                "node {}: its tunnel address {} has a family that this node has no address of",
                peer.name, peer.tunnel
            ));
            continue;
        };
        let udp = udp_mac(tunnel, peer);
        let reach = match (peer.reach, udp) {
            (Reach::Udp, None) => Reach::Tunnel,
            (reach, _) => reach,
        };
        let path = Path::to(tunnel, peer, source, reach);
        // What other networks' nodes do not take in a tunnel goes to the nodes themselves as it is, too.
        let to_node = match (reach, peer.flannel) {
            (plain, None) if plain.is_plain() => Path::to(tunnel, peer, source, Reach::Tunnel),
            _ => Path::to(tunnel, peer, source, reach),
        };
        let mut gateways = Vec::new();
        for range in &peer.pod_cidrs {
            let Some(gateway) = path.next_hop(*range).filter(|_| taken.insert((MAIN_TABLE, range.trunc()))) else {
                tables
                    .problems
                    .push(format!("node {}: pod range {range} is another node's, or a single address", peer.name));
                continue;
            };
            if tunnel.lent || peer.flannel.is_some() {
                tables.yielding.insert(range.trunc());
            }
            if !tunnel.led.contains_key(&range.trunc()) {
                tables.ranges.push(path.route(MAIN_TABLE, range.trunc(), gateway));
            }
            if let (Some(mac), Some(gateway)) = (to_node.mac, to_node.next_hop(*range)) {
                gateways.push((gateway, *range));
                tables.udp_neighbours.extend(udp.map(|mac| (gateway, mac)));
                // In the tunnel, too: no route finds its next hop gone while a peer changes its way.
                let mac = if reach == Reach::Udp { mac::of_tunnel(peer.tunnel) } else { mac };
                tables.neighbours.insert(gateway, mac);
                tables.forwarding.extend(tunnel.lent.then_some((mac, peer.tunnel)));
            }
        }
        for address in &peer.addresses {
            let next = gateways.iter().find(|(gateway, _)| gateway.is_ipv4() == address.is_ipv4());
            let Some((gateway, range)) = next.copied() else { continue };
            if taken.insert((NODE_TABLE, host_range(*address))) {
                let route = to_node.route(NODE_TABLE, host_range(*address), gateway);
                match tunnel.led.get(&range.trunc()) {
                    None => tables.nodes.push(route),
                    Some(&device) if device == tunnel.lent_v6 => tables.nodes.push(Route { device, ..route }),
                    // Pods' packets go there as they are; so do those to the node itself, without a route of ours.
                    Some(_) => {}
                }
            } else {
                tables.problems.push(format!("node {}: address {address} is another node's too", peer.name));
            }
        }
    }
    tables
}

/// MAC address of a peer on the device of `udp`; none: it is not to be had there, or the device is not.
fn udp_mac(tunnel: &Tunnel, peer: &NodePeer) -> Option<[u8; 6]> {
    (tunnel.udp > 0 && !tunnel.lent).then(|| udp_names::mac_of(peer.tunnel))
}

/// How the kernel's routes lead to a peer.
struct Path<'a> {
    tunnel: &'a Tunnel,
    peer: &'a NodePeer,
    /// Of the peer's tunnel device; none: packets go as they are.
    mac: Option<[u8; 6]>,
    /// The device that its packets go by, where they do not go as they are.
    device: u32,
    encap: Option<Encap>,
    /// What the node's own packets have as their source, at most one a family.
    sources: &'a [IpAddr],
}

impl<'a> Path<'a> {
    fn to(tunnel: &'a Tunnel, peer: &'a NodePeer, source: IpAddr, reach: Reach) -> Self {
        let mac = match reach {
            // What the programs do not send otherwise the kernel puts into envelopes.
            Reach::Tunnel | Reach::Ipip => Some(mac::of_tunnel(peer.tunnel)),
            Reach::TunnelTo(mac) => Some(mac),
            Reach::Udp => udp_mac(tunnel, peer),
            Reach::Route | Reach::Link => None,
        };
        let udp = reach == Reach::Udp;
        let encap = Encap { id: tunnel.id, source, destination: peer.tunnel };
        let sources = match (mac, peer.flannel) {
            // The device's own address is the one that Flannel's nodes answer in the tunnel.
            (Some(_), _) if tunnel.lent => &[],
            (Some(_), Some(flannel)) if !flannel.taken_over => tunnel.gateways.as_slice(),
            _ => tunnel.addresses.as_slice(),
        };
        let device = if udp { tunnel.udp } else { tunnel.device };
        Self {
            tunnel,
            peer,
            mac,
            device,
            encap: Some(encap).filter(|_| mac.is_some() && !tunnel.lent && !udp),
            sources,
        }
    }

    fn next_hop(&self, range: IpNet) -> Option<IpAddr> {
        match (self.mac, self.tunnel.lent) {
            // Flannel's nodes have a peer a family; ours have an address of each.
            (None, _) => {
                let mut ends = std::iter::once(&self.peer.tunnel).chain(&self.peer.addresses);
                ends.find(|next| next.is_ipv4() == range.addr().is_ipv4()).copied()
            }
            (Some(_), true) => gateway_of(range).map(|_| range.network()),
            (Some(_), false) => gateway_of(range),
        }
    }

    fn plain_device(&self, gateway: IpAddr) -> u32 {
        let [v4, v6] = self.tunnel.plain.get(&self.peer.name).copied().unwrap_or([self.tunnel.uplink; 2]);
        if gateway.is_ipv4() { v4 } else { v6 }
    }

    fn route(&self, table: u32, destination: IpNet, gateway: IpAddr) -> Route {
        Route {
            table,
            destination,
            device: if self.mac.is_some() { self.device } else { self.plain_device(gateway) },
            gateway: Some(gateway),
            source: of_family(self.sources, gateway),
            encap: self.encap.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peer(name: &str, address: &str, ranges: &[&str], local: bool) -> NodePeer {
        let address: IpAddr = address.parse().unwrap();
        NodePeer {
            name: NodeName::new(name),
            addresses: vec![address],
            pod_cidrs: ranges.iter().map(|r| r.parse().unwrap()).collect(),
            tunnel: address,
            local,
            reach: Reach::Tunnel,
            plain: false,
            flannel: None,
        }
    }

    fn tunnel() -> Tunnel {
        Tunnel {
            device: 7,
            id: 116,
            addresses: vec!["192.0.2.1".parse().unwrap()],
            gateways: vec!["10.244.1.1".parse().unwrap()],
            lent: false,
            lent_v6: 0,
            led: BTreeMap::new(),
            uplink: 2,
            udp: 9,
            plain: BTreeMap::new(),
        }
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

    const VTEP: [u8; 6] = [0xde, 0xad, 0, 0, 0, 2];

    fn flannels(reach: Reach) -> NodePeer {
        let flannel = Some(towpath_model::desired::FlannelPeer { taken_over: false });
        NodePeer { flannel, reach, plain: true, ..peer("b", "192.0.2.2", &["10.244.2.0/24"], false) }
    }

    #[test]
    fn a_node_of_flannels_takes_frames_for_its_own_device_and_answers_a_pod_range_in_the_tunnel() {
        let tables = tables(&tunnel(), &[flannels(Reach::TunnelTo(VTEP))]);
        assert_eq!(tables.neighbours[&"10.244.2.1".parse().unwrap()], VTEP);
        assert_eq!(tables.ranges[0].source, Some("10.244.1.1".parse().unwrap()));
        assert!(tables.ranges[0].encap.is_some() && tables.forwarding.is_empty());
    }

    #[test]
    fn over_a_lent_device_everything_is_as_flannel_makes_it() {
        let tunnel = Tunnel { lent: true, ..tunnel() };
        let tables = tables(&tunnel, &[flannels(Reach::TunnelTo(VTEP))]);
        assert_eq!(tables.ranges[0].gateway, Some("10.244.2.0".parse().unwrap()));
        assert_eq!((&tables.ranges[0].encap, tables.ranges[0].source), (&None, None));
        assert_eq!(tables.neighbours[&"10.244.2.0".parse().unwrap()], VTEP);
        assert_eq!(tables.forwarding[&VTEP], "192.0.2.2".parse::<IpAddr>().unwrap());
        assert!(tables.yielding.contains(&"10.244.2.0/24".parse().unwrap()));
    }

    #[test]
    fn a_range_of_ipv6_that_flannel_leads_to_keeps_its_route_and_its_node_is_reached_the_same_way() {
        let mut b = peer("b", "192.0.2.2", &["10.244.2.0/24", "fd00:2::/64"], false);
        b.addresses.push("2001:db8::2".parse().unwrap());
        let range: IpNet = "fd00:2::/64".parse().unwrap();
        let by = |led: &[(IpNet, u32)]| {
            let own = Tunnel { lent: true, lent_v6: 8, led: led.iter().copied().collect(), ..tunnel() };
            let tables = tables(&own, std::slice::from_ref(&b));
            let routes = tables.ranges.iter().chain(&tables.nodes);
            let words = routes.map(|r| format!("{} via {} by {}", r.destination, r.gateway.unwrap(), r.device));
            words.collect::<Vec<_>>()
        };
        let (pods, node) = ("10.244.2.0/24 via 10.244.2.0 by 7", "192.0.2.2/32 via 10.244.2.0 by 7");
        assert_eq!(by(&[(range, 8)]), [pods, node, "2001:db8::2/128 via fd00:2:: by 8"]);
        assert_eq!(by(&[(range, 2)]), [pods, node], "as they are");
        let never_flannels = [pods, "fd00:2::/64 via fd00:2:: by 7", node, "2001:db8::2/128 via fd00:2:: by 7"];
        assert_eq!(by(&[]), never_flannels);
    }

    #[test]
    fn a_node_that_takes_packets_as_they_are_has_its_pods_over_itself_and_its_own_addresses_in_the_tunnel() {
        let mut b = peer("b", "192.0.2.2", &["10.244.2.0/24", "fd00:2::/64"], false);
        (b.reach, b.plain) = (Reach::Route, true);
        b.addresses.push("2001:db8::2".parse().unwrap());
        let with = tables(&tunnel(), std::slice::from_ref(&b));
        let next: Vec<_> =
            with.ranges.iter().map(|r| (r.device, r.gateway.unwrap().to_string(), r.encap.is_some())).collect();
        assert_eq!(next, [(2, "192.0.2.2".to_owned(), false), (2, "2001:db8::2".to_owned(), false)]);
        assert_eq!(with.ranges[0].source, Some("192.0.2.1".parse().unwrap()));
        // The rest is as with a tunnel, so that nothing goes while a node changes its way.
        let without = tables(&tunnel(), &[NodePeer { reach: Reach::Tunnel, ..b }]);
        assert_eq!((with.nodes.len(), &with.nodes, &with.neighbours), (2, &without.nodes, &without.neighbours));
    }

    #[test]
    fn a_node_that_takes_udp_has_everything_over_that_device_and_its_place_in_the_tunnel_besides() {
        let b = NodePeer { reach: Reach::Udp, ..peer("b", "192.0.2.2", &["10.244.2.0/24"], false) };
        let with = tables(&tunnel(), std::slice::from_ref(&b));
        let gateway: IpAddr = "10.244.2.1".parse().unwrap();
        for route in with.ranges.iter().chain(&with.nodes) {
            assert_eq!((route.device, route.gateway, &route.encap), (9, Some(gateway), &None));
        }
        assert_eq!(with.udp_neighbours[&gateway], [0x02, 0x77, 192, 0, 2, 2]);
        assert_eq!(with.neighbours[&gateway], mac::of_tunnel("192.0.2.2".parse().unwrap()));
        // Neighbours are the same before and after; without the device it is a node as any.
        let six = NodePeer { reach: Reach::Udp, ..peer("c", "2001:db8::1", &["10.244.3.0/24"], false) };
        let own = Tunnel { addresses: vec!["2001:db8::9".parse().unwrap()], ..tunnel() };
        let over_ipv6 = tables(&own, &[six]);
        let next: IpAddr = "10.244.3.1".parse().unwrap();
        assert_eq!((over_ipv6.ranges[0].device, &over_ipv6.ranges[0].encap), (9, &None));
        assert_eq!(over_ipv6.udp_neighbours[&next], udp_names::mac_of("2001:db8::1".parse().unwrap()));
        let before = tables(&tunnel(), &[NodePeer { reach: Reach::Tunnel, ..b.clone() }]);
        assert_eq!((&before.neighbours, &before.udp_neighbours), (&with.neighbours, &with.udp_neighbours));
        let without = tables(&Tunnel { udp: 0, ..tunnel() }, &[b]);
        assert_eq!((&without.ranges, without.udp_neighbours.len()), (&before.ranges, 0));
    }

    #[test]
    fn host_gw_is_a_route_over_the_node_itself() {
        let tables = tables(&tunnel(), &[flannels(Reach::Route)]);
        let route = &tables.ranges[0];
        assert_eq!((route.device, route.gateway), (2, Some("192.0.2.2".parse().unwrap())));
        assert!(route.encap.is_none() && tables.neighbours.is_empty() && tables.nodes.is_empty());
        let plain = [(NodeName::new("b"), [9, 2])].into();
        let over_another_card = super::tables(&Tunnel { plain, ..tunnel() }, &[flannels(Reach::Route)]);
        assert_eq!(over_another_card.ranges[0].device, 9);
    }
}
