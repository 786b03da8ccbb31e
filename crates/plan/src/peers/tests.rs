use towpath_model::{Node, NodeName, World};

use super::{Peers, plan};

fn node(name: &str, addresses: &[&str], cidrs: &[&str]) -> Node {
    Node {
        name: NodeName::new(name),
        labels: Default::default(),
        internal_ips: addresses.iter().map(|a| a.parse().unwrap()).collect(),
        pod_cidrs: cidrs.iter().map(|c| c.parse().unwrap()).collect(),
        ready: true,
    }
}

fn world(nodes: Vec<Node>) -> World {
    World { nodes: nodes.into_iter().map(|n| (n.name.clone(), n)).collect(), ..World::default() }
}

fn planned(nodes: Vec<Node>) -> Peers {
    plan(&world(nodes), &NodeName::new("n1"), &[])
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
    );
    let newcomer = vec![
        node("n1", &["192.168.0.1"], &["10.244.9.0/24"]),
        node("n2", &["192.168.0.2"], &["10.244.1.0/25"]),
        node("n3", &["192.168.0.3"], &["10.244.1.0/24"]),
    ];
    let peers = plan(&world(newcomer), &NodeName::new("n1"), &before.peers);
    assert_eq!(names(&peers), ["n1", "n3"], "who was there keeps its range against who comes before it by name");
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
