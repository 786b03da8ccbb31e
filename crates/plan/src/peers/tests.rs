use towpath_model::{Node, NodeName, World};

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv6Addr;
use std::sync::Arc;

use towpath_model::desired::{FlannelPeer, Reach};
use towpath_model::flannel::{self, Flannel, Vtep};

use super::{Peers, Tunnels, plan};

fn node(name: &str, addresses: &[&str], cidrs: &[&str]) -> Node {
    Node {
        name: NodeName::new(name),
        labels: Default::default(),
        internal_ips: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        other_ips: Vec::new(),
        created: 0,
        added: Default::default(),
        flannel: None,
        pod_cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        ready: true,
    }
}

fn world(nodes: Vec<Node>) -> World {
    World { nodes: nodes.into_iter().map(|n| (n.name.clone(), n)).collect(), ..World::default() }
}

fn planned(nodes: Vec<Node>) -> Peers {
    plan(&world(nodes), &NodeName::new("n1"), &[], &tunnels(&[]))
}

fn tunnels(taken_over: &[&str]) -> Tunnels {
    let taken_over = taken_over.iter().map(|n| NodeName::new(*n)).collect::<BTreeSet<_>>();
    Tunnels { vni: 1, taken_over, ..Tunnels::default() }
}

fn names(peers: &Peers) -> Vec<&str> {
    peers.peers.iter().map(|p| p.name.as_str()).collect()
}

fn refusal<'a>(peers: &'a Peers, node: &str) -> &'a str {
    &peers.refused[&NodeName::new(node)][0]
}

#[test]
fn nodes_with_address_and_range_are_peers_this_one_included() {
    let peers = planned(vec![
        node("n2", &["192.168.0.2", "fd00::2"], &["10.244.2.0/24", "fd00:244:2::/64"]),
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
    ]);
    assert_eq!(names(&peers), ["n1", "n2"]);
    assert!(peers.peers[0].local && !peers.peers[1].local);
    assert_eq!(peers.peers[1].tunnel.to_string(), "192.168.0.2");
    assert_eq!(peers.peers[1].pod_cidrs.len(), 2);
    assert!(peers.refused.is_empty());
}

#[test]
fn the_tunnel_is_of_a_family_that_this_node_has() {
    let peers = planned(vec![
        node("n1", &["fd00::1"], &["10.244.1.0/24"]),
        node("n2", &["192.168.0.2", "fd00::2"], &["10.244.2.0/24"]),
        node("n3", &["192.168.0.3"], &["10.244.3.0/24"]),
    ]);
    assert_eq!(names(&peers), ["n1", "n2"]);
    assert_eq!(peers.peers[1].tunnel.to_string(), "fd00::2");
    assert!(refusal(&peers, "n3").contains("no usable IPv6 address"));
}

#[test]
fn nodes_without_address_or_range_are_left_out_with_what_to_do() {
    let peers = planned(vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        node("n2", &[], &["10.244.2.0/24"]),
        node("n3", &["192.168.0.3"], &[]),
    ]);
    assert_eq!(names(&peers), ["n1"]);
    assert!(refusal(&peers, "n2").contains("no InternalIP"));
    assert!(refusal(&peers, "n3").contains("no spec.podCIDRs"));
}

#[test]
fn without_this_node_there_are_no_peers() {
    let peers = planned(vec![node("n2", &["192.168.0.2"], &["10.244.2.0/24"])]);
    assert!(peers.peers.is_empty());
    assert!(refusal(&peers, "n1").contains("not in the cluster yet"));
}

#[test]
fn ranges_that_overlap_stay_with_their_first_owner() {
    let nodes = || {
        vec![
            node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
            node("n2", &["192.168.0.2"], &["10.244.0.0/16", "fd00:2::/64"]),
            node("n3", &["192.168.0.3"], &["10.244.1.0/24"]),
        ]
    };
    let peers = planned(nodes());
    assert_eq!(names(&peers), ["n1", "n2"]);
    assert_eq!(peers.peers[1].pod_cidrs, ["fd00:2::/64".parse().unwrap()], "the rest of the node goes on");
    assert!(refusal(&peers, "n2").contains("overlaps 10.244.1.0/24 of node n1"));
    assert!(refusal(&peers, "n3").contains("overlaps 10.244.1.0/24 of node n1"));

    let before = plan(
        &world(vec![node("n1", &["192.168.0.1"], &["10.244.9.0/24"]), nodes().remove(2)]),
        &NodeName::new("n1"),
        &[],
        &tunnels(&[]),
    );
    let newcomer = vec![
        node("n1", &["192.168.0.1"], &["10.244.9.0/24"]),
        node("n2", &["192.168.0.2"], &["10.244.1.0/25"]),
        node("n3", &["192.168.0.3"], &["10.244.1.0/24"]),
    ];
    let peers = plan(&world(newcomer), &NodeName::new("n1"), &before.peers, &tunnels(&[]));
    assert_eq!(names(&peers), ["n1", "n3"], "who was there keeps its range against who comes before it by name");
}

#[test]
fn what_a_node_has_is_not_taken_by_what_another_says_of_itself_later() {
    let before = planned(vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        node("n2", &["192.168.0.2"], &["10.244.2.0/24", "fd00:2::/64"]),
    ]);
    // n1, which is known as well and comes first by age and by name, says that it is n2.
    let now = vec![
        node("n1", &["192.168.0.2"], &["10.244.2.0/24", "10.244.1.0/24"]),
        node("n2", &["192.168.0.2"], &["10.244.2.0/24", "fd00:2::/64"]),
        node("n3", &["192.168.0.3"], &["10.244.3.0/24"]),
    ];
    let peers = plan(&world(now.clone()), &NodeName::new("n3"), &before.peers, &tunnels(&[]));
    assert_eq!(names(&peers), ["n2", "n3"]);
    assert_eq!(peers.peers[0].pod_cidrs.len(), 2, "in the order that it says: {:?}", peers.peers[0].pod_cidrs);
    assert!(peers.peers[0].pod_cidrs[0] == "10.244.2.0/24".parse().unwrap());
    assert!(refusal(&peers, "n1").contains("192.168.0.2 already belongs to node n2"));
    // A node that has heard of nobody yet gives it to the older of the two.
    let mut young = now;
    young[0].created = 200;
    young[1].created = 100;
    let peers = plan(&world(young), &NodeName::new("n3"), &[], &tunnels(&[]));
    assert_eq!(names(&peers), ["n2", "n3"]);
}

#[test]
fn an_address_belongs_to_one_node_and_no_range_covers_one() {
    let peers = planned(vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        node("n2", &["192.168.0.1"], &["10.244.2.0/24"]),
        node("n3", &["192.168.0.3"], &["192.168.0.0/24"]),
        node("n4", &["127.0.0.1"], &["10.244.4.0/24"]),
    ]);
    assert_eq!(names(&peers), ["n1"]);
    assert!(refusal(&peers, "n2").contains("already belongs to node n1"));
    assert!(refusal(&peers, "n3").contains("covers 192.168.0.1"));
    assert!(refusal(&peers, "n4").contains("cannot be a node's"));
}

const MAC: [u8; 6] = [0xde, 0xad, 0, 0, 0, 2];

fn flannels(mut node: Node, annotations: BTreeMap<String, String>) -> Node {
    node.flannel = Flannel::of(&annotations);
    node
}

fn vxlan(node: Node, address: &str, vni: u32) -> Node {
    flannels(node, flannel::announcing_vxlan(&[(address.parse().unwrap(), Vtep { vni, mac: MAC })]))
}

#[test]
fn a_node_of_flannels_is_reached_by_its_device_and_outer_address() {
    let nodes = || {
        vec![
            vxlan(node("n1", &["192.168.0.1"], &["10.244.1.0/24"]), "192.168.0.1", 1),
            vxlan(node("n2", &["192.168.0.2"], &["10.244.2.0/24"]), "203.0.113.2", 1),
        ]
    };
    let before = plan(&world(nodes()), &NodeName::new("n1"), &[], &tunnels(&["n1"]));
    assert!(before.refused.is_empty(), "{:?}", before.refused);
    assert_eq!(before.peers[0].flannel, None, "this node knows itself");
    let way = |peers: &Peers| (peers.peers[1].flannel, peers.peers[1].reach, peers.peers[1].plain);
    assert_eq!(way(&before), (Some(FlannelPeer { taken_over: false }), Reach::TunnelTo(MAC), true));
    assert_eq!(before.peers[1].tunnel.to_string(), "203.0.113.2");

    let after = plan(&world(nodes()), &NodeName::new("n1"), &before.peers, &tunnels(&["n1", "n2"]));
    assert_eq!(way(&after), (Some(FlannelPeer { taken_over: true }), Reach::TunnelTo(MAC), true));
    assert_eq!(after.peers[1].tunnel.to_string(), "192.168.0.2", "our agents send from the node's own address");
    let known: Vec<String> = after.peers[1].addresses.iter().map(ToString::to_string).collect();
    assert_eq!(known, ["192.168.0.2", "203.0.113.2"], "and Flannel's device for its old pods from the annotation's");

    let mut bare = nodes();
    bare[1].flannel = None;
    let last = plan(&world(bare), &NodeName::new("n1"), &after.peers, &tunnels(&["n1", "n2"]));
    let still_taken = (Some(FlannelPeer { taken_over: true }), Reach::Tunnel, true);
    assert_eq!(way(&last), still_taken, "what is under way as before");
}

#[test]
fn flannel_has_a_tunnel_a_family() {
    let ends = ["192.168.0.2", "fd00::2"].map(|address| (address.parse().unwrap(), Vtep { vni: 1, mac: MAC }));
    let nodes = vec![
        node("n1", &["192.168.0.1", "fd00::1"], &["10.244.1.0/24", "fd00:1::/64"]),
        flannels(
            node("n2", &["192.168.0.2", "fd00::2"], &["10.244.2.0/24", "fd00:2::/64"]),
            flannel::announcing_vxlan(&ends),
        ),
    ];
    let of = |taken_over: &[&str]| {
        let peers = plan(&world(nodes.clone()), &NodeName::new("n1"), &[], &tunnels(taken_over)).peers;
        let show = |p: &towpath_model::desired::NodePeer| format!("{} {} {:?}", p.name, p.tunnel, p.pod_cidrs);
        peers.iter().filter(|p| !p.local).map(show).collect::<Vec<_>>()
    };
    assert_eq!(of(&[]), ["n2 192.168.0.2 [10.244.2.0/24]", "n2 fd00::2 [fd00:2::/64]"]);
    assert_eq!(of(&["n2"]), ["n2 192.168.0.2 [10.244.2.0/24, fd00:2::/64]"]);
}

#[test]
fn host_gw_is_reached_by_route() {
    let annotations = flannel::announcing_host_gw(&["192.168.0.2".parse().unwrap()]);
    let peers = planned(vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        flannels(node("n2", &["192.168.0.2"], &["10.244.2.0/24"]), annotations),
    ]);
    assert_eq!(peers.peers[1].reach, Reach::Route);
}

#[test]
fn a_node_that_is_ready_for_packets_as_they_are_is_reached_by_route_and_keeps_its_tunnel() {
    let nodes =
        ["1", "2", "3"].map(|n| node(&format!("n{n}"), &[&format!("192.168.0.{n}")], &[&format!("10.244.{n}.0/24")]));
    let ways =
        Tunnels { instead: ["n1", "n2"].map(|n| (NodeName::new(n), Reach::Route)).into(), plain: true, ..tunnels(&[]) };
    let peers = plan(&world(nodes.to_vec()), &NodeName::new("n1"), &[], &ways).peers;
    let ways: Vec<_> = peers.iter().map(|peer| (peer.reach, peer.plain)).collect();
    assert_eq!(ways, [(Reach::Tunnel, false), (Reach::Route, true), (Reach::Tunnel, true)]);
    assert_eq!(peers[1].tunnel.to_string(), "192.168.0.2");
}

#[test]
fn datagrams_go_to_the_ipv6_addresses_that_whoever_carries_them_knows_and_to_every_ipv4_address() {
    let reached = |addresses: [&str; 3]| {
        let nodes = ["1", "2", "3"].into_iter().zip(addresses);
        let nodes: Vec<Node> =
            nodes.map(|(n, at)| node(&format!("n{n}"), &[at], &[&format!("10.244.{n}.0/24")])).collect();
        let instead = ["n1", "n2", "n3"].map(|n| (NodeName::new(n), Reach::Udp)).into();
        let udp_known = Arc::new([Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 2)].into());
        let ways = Tunnels { instead, udp_known, ..tunnels(&[]) };
        let peers = plan(&world(nodes), &NodeName::new("n1"), &[], &ways).peers;
        peers.iter().map(|peer| peer.reach).collect::<Vec<_>>()
    };
    assert_eq!(reached(["192.168.0.1", "192.168.0.2", "192.168.0.3"]), [Reach::Tunnel, Reach::Udp, Reach::Udp]);
    assert_eq!(reached(["2001:db8::1", "2001:db8::2", "2001:db8::3"]), [Reach::Tunnel, Reach::Udp, Reach::Tunnel]);
}

#[test]
fn host_gw_over_another_card_stays_there_when_the_node_is_taken_over() {
    let annotations = flannel::announcing_host_gw(&["203.0.113.2".parse().unwrap()]);
    let nodes = vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        flannels(node("n2", &["192.168.0.2"], &["10.244.2.0/24"]), annotations),
    ];
    for taken_over in [&["n1"][..], &["n1", "n2"]] {
        let peers = plan(&world(nodes.clone()), &NodeName::new("n1"), &[], &tunnels(taken_over)).peers;
        assert_eq!(peers[1].tunnel.to_string(), "203.0.113.2", "{taken_over:?}");
    }
}

#[test]
fn what_cannot_work_with_flannel_is_named() {
    let mut odd = flannel::announcing_host_gw(&["192.168.0.3".parse().unwrap()]);
    odd.insert(format!("{}backend-type", flannel::PREFIX), "wireguard".to_owned());
    let peers = planned(vec![
        node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
        vxlan(node("n2", &["192.168.0.2"], &["10.244.2.0/24"]), "192.168.0.2", 7),
        flannels(node("n3", &["192.168.0.3"], &["10.244.3.0/24"]), odd),
    ]);
    assert!(refusal(&peers, "n2").contains("vxlan.vni") && refusal(&peers, "n2").contains('7'));
    assert!(refusal(&peers, "n3").contains("wireguard"));
}

#[test]
fn nobody_takes_an_address_by_an_annotation() {
    for (end, why) in [
        ("192.168.0.2", "belongs to node n2"),
        ("10.244.2.9", "in the pod range 10.244.2.0/24"),
        ("127.0.0.1", "cannot be"),
    ] {
        let annotations = flannel::announcing_vxlan(&[(end.parse().unwrap(), Vtep { vni: 1, mac: MAC })]);
        let nodes = vec![
            node("n1", &["192.168.0.1"], &["10.244.1.0/24"]),
            node("n2", &["192.168.0.2"], &["10.244.2.0/24"]),
            flannels(node("liar", &["192.168.0.9"], &["10.244.9.0/24"]), annotations),
        ];
        let peers = planned(nodes.clone());
        assert_eq!(names(&peers), ["n1", "n2"], "{end}");
        let refused = |peers: &Peers| peers.refused[&NodeName::new("liar")].iter().any(|reason| reason.contains(why));
        assert!(refused(&peers), "{end}: {:?}", peers.refused);
        // A node that was taken over is itself all the same.
        let peers = plan(&world(nodes), &NodeName::new("n1"), &[], &tunnels(&["n1", "n2", "liar"]));
        assert_eq!(names(&peers), ["liar", "n1", "n2"], "{end}");
        assert!(refused(&peers), "{end}: {:?}", peers.refused);
        assert_eq!(peers.peers[0].addresses.len(), 1, "{end}");
    }
}
