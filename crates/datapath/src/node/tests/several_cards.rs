//! A node with a second way out: what comes in there is judged and translated as at the uplink, and a default route may move there.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use super::lab::{CLSACT, Kind, Lab, Ns, OPEN, PROGRAMS, TestNode, root, tcp, tcp_to};
use super::shortcut::services;
use crate::bpf::{Hook, Programs};
use crate::net::link::{self, Veth};
use crate::net::netlink::Netlink;

const NODE: &str = "203.0.113.1";
const BEYOND: &str = "203.0.113.9";

/// A host behind a second card of the node.
fn second_card(node: &TestNode) -> Ns {
    let beyond = Ns::new();
    let there = beyond.fd();
    node.ns.run(|| {
        let veth = Veth {
            host_name: "eth1",
            host_mac: [2, 0, 0, 0, 3, 1],
            pod_name: "eth0",
            pod_mac: [2, 0, 0, 0, 3, 2],
            pod_netns: there.as_fd(),
            mtu: 1500,
        };
        link::create_veth(&mut Netlink::open().unwrap(), &veth).unwrap();
    });
    node.ns.sh(&format!("ip addr add {NODE}/24 dev eth1; ip link set eth1 up"));
    beyond.sh(&format!("ip addr add {BEYOND}/24 dev eth0; ip link set eth0 up; ip route add default via {NODE}"));
    assert!(beyond.comes_to_ping(NODE));
    beyond
}

fn spoofed(node: &TestNode) -> u64 {
    let counters = node.call(|node| node.observe(Programs::counters)).unwrap();
    counters.iter().filter(|count| count.reason.name().contains("spoof")).map(|count| count.packets).sum()
}

/// Whether the uplink's programs run at the second card.
fn is_hooked(node: &TestNode, kind: Kind) -> bool {
    if kind.clsact {
        return node.ns.sh("tc filter show dev eth1 ingress").contains("tp_from_uplink");
    }
    let index = node.ns.run(|| link::existing(&mut Netlink::open().unwrap(), "eth1").unwrap().index);
    node.call(|node| node.observe(Programs::attached)).unwrap().contains(&(index, Hook::FromUplink))
}

#[test]
fn node_ports_answer_at_a_second_card_and_nobody_is_somebody_else_there() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(PROGRAMS);
    let beyond = second_card(&lab.n1);
    lab.n1.config.devices = vec!["eth*".to_owned()];
    for node in [&mut lab.n1, &mut lab.n2] {
        node.open();
        node.apply_peers();
    }
    let (asking, near, far) = (lab.n1.pod(12, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    let entry: SocketAddr = format!("{NODE}:30080").parse().unwrap();
    for backend in [&near, &far] {
        for node in [&lab.n1, &lab.n2] {
            let table = services(&backend.pod.addresses);
            node.call(move |node| node.apply_services(&table)).unwrap();
        }
        let seen = tcp_to(&beyond, &backend.ns, 80, entry).unwrap_or_else(|e| panic!("to {}: {e}", backend.pod.name));
        assert_eq!(seen.to_string(), BEYOND, "to {}", backend.pod.name);
        // A pod of the node may know the address, too.
        assert!(tcp_to(&asking.ns, &backend.ns, 80, entry).is_ok(), "from a pod to {}", backend.pod.name);
    }
    let before = spoofed(&lab.n1);
    beyond.sh("ip addr add 10.244.2.77/32 dev lo");
    assert!(!beyond.pings(&format!("-I 10.244.2.77 {}", near.v4())));
    assert!(spoofed(&lab.n1) > before, "a pod's address does not come from there");
}

fn a_default_route_moves(kind: Kind) {
    let mut lab = Lab::new(kind);
    let beyond = second_card(&lab.n1);
    let pod = lab.n1.pod(11, OPEN);
    lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert!(!is_hooked(&lab.n1, kind), "a device of this kind may lead anywhere");
    lab.n1.ns.sh(&format!("ip route replace default via {BEYOND} dev eth1"));
    beyond.sh("ip addr add 198.18.0.1/32 dev lo");
    let audited = lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert_eq!(audited.problems, Vec::<String>::new());
    let facts = lab.n1.call(|node| Ok(node.facts().clone())).unwrap();
    assert!(is_hooked(&lab.n1, kind), "{facts:?}");
    let seen = tcp(&pod.ns, &beyond, "198.18.0.1:8000".parse().unwrap()).unwrap();
    assert_eq!(seen.to_string(), NODE, "masqueraded as what leaves there");
    assert!(lab.n1.ns.pings("192.0.2.2"), "other nodes are where they were");
    lab.n1.ns.sh("ip route replace default via 192.0.2.254 dev eth0");
    lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert!(!is_hooked(&lab.n1, kind), "it leads nowhere any more");
    // Also where nobody was there to see it.
    lab.n1.ns.sh(&format!("ip route replace default via {BEYOND} dev eth1"));
    lab.n1.call(|node| Ok(node.audit())).unwrap();
    assert!(is_hooked(&lab.n1, kind));
    lab.n1.close();
    lab.n1.ns.sh("ip route replace default via 192.0.2.254 dev eth0");
    lab.n1.open();
    assert!(!is_hooked(&lab.n1, kind), "it led nowhere any more when the node started again");
    assert_eq!(tcp(&pod.ns, &lab.outside, "198.51.100.9:8001".parse().unwrap()).unwrap().to_string(), "192.0.2.1");
}

#[test]
fn a_default_route_that_moves_is_followed() {
    if root() {
        a_default_route_moves(PROGRAMS);
        a_default_route_moves(CLSACT);
    }
}
