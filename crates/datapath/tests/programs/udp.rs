//! Packets by way of user space (`udp`): what is handed to its device for which node, what is believed of what comes by it, and what stays in
//! envelopes.

use std::net::{IpAddr, SocketAddr};

use towpath_datapath::bpf::{Hook, NodeConfig};
use towpath_datapath::udp_names::mac_of;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, Mac, SYN};
use crate::plain::{node2_at, node2_is};
use crate::world::*;

const PORT: u16 = 8285;
/// The nodes on the device (`bpf/abi.h`).
const NODE1: Mac = [2, 0x77, 192, 168, 50, 1];
const NODE2: Mac = [2, 0x77, 192, 168, 50, 2];
const NODE3: Mac = [2, 0x77, 192, 168, 50, 3];
/// Where nodes' tunnels end if they run over IPv6; what goes by the name of the second; and two more addresses that go by one name.
const ENDS_V6: [&str; 3] = ["fd50::1", "fd50::2", "fd50::3"];
const SAME_AS_NODE2: &str = "fd50::5f93:499b:1e8c:6610";
const PAIR: [&str; 2] = ["2001:db8::1", "2001:db8::4597:d9a9:2684:61f3"];

/// A world with the device, in which node2 takes packets so; its index.
fn begin(w: &mut World) -> u32 {
    sh("ip link add udp0 type veth peer name udp1 && ip link set udp0 up && ip link set udp1 up");
    let device = index_of("udp0");
    let config = NodeConfig { udp: (device, PORT), ..node_config(w.tunnel, w.uplink) };
    w.programs.apply_node(&config).unwrap();
    node2_is(w, Reach::Udp, false);
    device
}

/// What is handed to the device for node2.
#[track_caller]
fn handed(out: &Outcome, device: u32) -> Frame {
    let frame = out.out_of(2, device);
    assert_eq!((frame.dst_mac, frame.src_mac), (NODE2, NODE1));
    assert!(out.counted.contains(&"udp_out"), "{out:?}");
    frame
}

/// A packet of node2's pod as it comes by the device from the node that `from` stands for.
fn comes(w: &World, device: u32, from: Mac, frame: Frame) -> Outcome {
    let bytes = Frame { src_mac: from, dst_mac: NODE1, ..frame }.bytes();
    w.run(Hook::FromTunnel, &bytes, device, device, None)
}

fn asked(family: Family, sport: u16, dport: u16, l4: L4) -> Frame {
    let h = hosts(family);
    arriving(NODE1, h.remote, sport, h.a, dport, l4)
}

#[test]
fn packets_go_by_the_device_and_the_answers_come_so() {
    in_world(|w| {
        let device = begin(w);
        for family in BOTH {
            let h = hosts(family);
            let sent = handed(&w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())), device);
            assert_eq!((sent.src, sent.dst, sent.ttl), ((h.a, 4000).into(), (h.remote, 80).into(), 63));
            let got = comes(w, device, NODE2, asked(family, 80, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.ttl, got.dst_mac, got.src_mac), (h.remote, 63, MAC_A, MAC_HOST));
            let more = sent_by(h.a, 4000, h.remote, 80, L4::data(b"more"));
            assert_eq!(handed(&w.from_pod(&more), device).l4, more.l4);
            let got = comes(w, device, NODE2, asked(family, 80, 4000, L4::data(b"known by now"))).into_pod(w.pod_a);
            assert_eq!(got.l4, L4::data(b"known by now"));
            comes(w, device, NODE2, asked(family, 5000, 80, L4::syn())).into_pod(w.pod_a);
            handed(&w.from_pod(&sent_by(h.a, 80, h.remote, 5000, L4::tcp(SYN | ACK))), device);
        }
    });
}

#[test]
fn all_that_an_envelope_would_carry_goes_by_the_device() {
    in_world(|w| {
        let device = begin(w);
        for family in BOTH {
            let h = hosts(family);
            handed(
                &w.from_pod(&Frame { ttl: 2, ..sent_by(h.a, 4000, h.remote, 80, L4::udp(b"its last hop")) }),
                device,
            );
            if family == Family::V4 {
                let first = sent_by(h.a, 4001, h.remote, 80, L4::udp(b"a first fragment"));
                handed(&w.from_pod(&Frame { fragment: Some((7, 0, true)), ..first }), device);
            }
            comes(w, device, NODE2, asked(family, 5000, 81, L4::udp(b"nobody listens"))).into_pod(w.pod_a);
            let complaint = crate::policy::unreachable(h.a, h.remote, (h.remote, 5000, h.a, 81));
            handed(&w.from_pod(&complaint), device);
            // The other way, of what this pod sent: the kernel of the other node complains, and its pod does.
            handed(&w.from_pod(&sent_by(h.a, 4003, h.remote, 82, L4::udp(b"x"))), device);
            let complaint = crate::policy::unreachable(h.remote, h.a, (h.a, 4003, h.remote, 82));
            comes(w, device, NODE2, complaint).into_pod(w.pod_a);
            // What a pod says to the node itself, and what is too big: the kernel's to answer.
            handed(&w.from_pod(&sent_by(h.a, 4002, h.node2, 9100, L4::syn())), device);
            w.from_pod(&sent_by(h.a, 4004, h.remote, 80, L4::udp(&[0; 1500]))).passed();
            // A node that does not take it.
            let node3 = if family == Family::V4 { ip("10.3.0.30") } else { ip("fd03::30") };
            w.from_pod(&sent_by(h.a, 4000, node3, 80, L4::syn())).into_tunnel(w, ip("192.168.50.3"));
        }
    });
}

#[test]
fn by_the_device_too_a_node_speaks_for_its_own_pods_only() {
    in_world(|w| {
        let device = begin(w);
        for family in BOTH {
            let h = hosts(family);
            let syn = |sport| asked(family, sport, 80, L4::syn());
            for (n, from) in
                [NODE3, NODE1, MAC_ROUTER, [2, 0x77, 10, 2, 0, 20], [2, 0x77, 9, 9, 9, 9]].into_iter().enumerate()
            {
                comes(w, device, from, syn(4000 + n as u16)).dropped("tunnel_source");
            }
            for source in [h.a, h.b, h.node] {
                comes(w, device, NODE2, arriving(NODE1, source, 4100, h.a, 80, L4::syn())).dropped("tunnel_source");
            }
            // A connection of the one does not let in the other.
            comes(w, device, NODE2, syn(4200)).into_pod(w.pod_a);
            comes(w, device, NODE3, asked(family, 4200, 80, L4::data(b"x"))).dropped("tunnel_source");
            // The node itself, and a client outside that it forwards.
            for (n, source) in [h.node2, h.outside].into_iter().enumerate() {
                let frame = arriving(NODE1, source, 4300 + n as u16, h.a, 80, L4::udp(b"x"));
                comes(w, device, NODE2, frame).into_pod(w.pod_a);
            }
        }
    });
}

#[test]
fn policy_holds_for_what_comes_by_the_device() {
    in_world(|w| {
        let device = begin(w);
        w.isolate(&w.local_a(), 1, 0);
        for h in BOTH.map(hosts) {
            w.allow(1, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 5);
        }
        w.apply_policy();
        for family in BOTH {
            comes(w, device, NODE2, asked(family, 4000, 80, L4::syn())).into_pod(w.pod_a);
            comes(w, device, NODE2, asked(family, 4000, 81, L4::syn())).dropped("ingress_policy");
        }
    });
}

#[test]
fn clients_outside_reach_an_endpoint_by_the_device_and_are_answered_so() {
    in_world(|w| {
        let device = begin(w);
        for (id, family) in (1..).zip(BOTH) {
            let h = hosts(family);
            w.serve(id, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            let asks = arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::syn());
            let sent = handed(&w.from_uplink(&asks), device);
            assert_eq!((sent.src, sent.dst), ((h.outside, 4000).into(), (h.remote, 8080).into()));
            let answer = arriving(NODE1, h.remote, 8080, h.outside, 4000, L4::tcp(SYN | ACK));
            let got = comes(w, device, NODE2, answer);
            assert_eq!(got.out_of(3, w.uplink).src, SocketAddr::new(h.node, 30080));
            // Here as an endpoint of that node's client.
            comes(w, device, NODE2, arriving(NODE1, h.outside, 4400, h.a, 80, L4::syn())).into_pod(w.pod_a);
            handed(&w.from_pod(&sent_by(h.a, 80, h.outside, 4400, L4::tcp(SYN | ACK))), device);
        }
    });
}

#[test]
fn whoever_is_no_node_does_not_reach_the_port_of_datagrams() {
    in_both_worlds(|w| {
        let to = |from: &str| {
            arriving(MAC_UPLINK, ip(from), 50000, ip("192.168.50.1"), PORT, L4::udp(b"\x10\0\0\0\0\0\0\0"))
        };
        w.from_uplink(&to("198.51.100.9")).passed();
        begin(w);
        w.from_uplink(&to("198.51.100.9")).dropped("tunnel_outsider");
        w.from_uplink(&to("192.168.50.2")).passed();
        let to =
            |from: &str| arriving(MAC_UPLINK, ip(from), 50000, ip("fd50::1"), PORT, L4::udp(b"\x10\0\0\0\0\0\0\0"));
        node2_at(w, Reach::Udp, false, ENDS_V6);
        w.from_uplink(&to("fd99::9")).dropped("tunnel_outsider");
        w.from_uplink(&to("fd50::2")).passed();
        // Who goes by what a node goes by is no node for that.
        w.from_uplink(&to(SAME_AS_NODE2)).dropped("tunnel_outsider");
    });
}

#[test]
fn a_connection_changes_between_the_device_and_every_other_way_with_its_node() {
    in_world(|w| {
        let device = begin(w);
        for family in BOTH {
            let h = hosts(family);
            let to: IpAddr = ip("192.168.50.2");
            let asks = |w: &World| w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"ask")));
            handed(&w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())), device);
            node2_is(w, Reach::Tunnel, false);
            // What is still under way that way arrives, whichever way the other is sent to.
            comes(w, device, NODE2, asked(family, 80, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            asks(w).into_tunnel(w, to);
            node2_is(w, Reach::Udp, false);
            let answer = asked(family, 80, 4000, L4::data(b"in an envelope"));
            w.from_tunnel(&answer, "192.168.50.2").into_pod(w.pod_a);
            handed(&asks(w), device);
            // Without the device it is a node as any.
            w.programs.apply_node(&node_config(w.tunnel, w.uplink)).unwrap();
            asks(w).into_tunnel(w, to);
            w.programs.apply_node(&NodeConfig { udp: (device, PORT), ..node_config(w.tunnel, w.uplink) }).unwrap();
            handed(&asks(w), device);
        }
    });
}

fn name(node: &str) -> Mac {
    mac_of(ip(node))
}

/// As [`begin`], where nodes' tunnels run over IPv6.
fn begin_v6(w: &mut World) -> u32 {
    let device = begin(w);
    node2_at(w, Reach::Udp, false, ENDS_V6);
    device
}

/// A packet of node2's pod, or another, as it comes by the device from the node that goes by `from`.
fn comes_v6(w: &World, device: u32, from: Mac, frame: Frame) -> Outcome {
    let bytes = Frame { src_mac: from, dst_mac: name(ENDS_V6[0]), ..frame }.bytes();
    w.run(Hook::FromTunnel, &bytes, device, device, None)
}

#[test]
fn between_ipv6_addresses_packets_go_by_the_device_too_and_the_answers_come_so() {
    in_world(|w| {
        let device = begin_v6(w);
        let [node1, node2, _] = ENDS_V6.map(name);
        for family in BOTH {
            let h = hosts(family);
            let handed = |out: &Outcome| {
                let frame = out.out_of(2, device);
                assert_eq!((frame.dst_mac, frame.src_mac), (node2, node1));
                frame
            };
            handed(&w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())));
            comes_v6(w, device, node2, asked(family, 80, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            handed(&w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"more"))));
            comes_v6(w, device, node2, asked(family, 5000, 80, L4::syn())).into_pod(w.pod_a);
            handed(&w.from_pod(&sent_by(h.a, 80, h.remote, 5000, L4::tcp(SYN | ACK))));
            // Another node's client outside, and the way back to it.
            comes_v6(w, device, node2, arriving(node1, h.outside, 4400, h.a, 80, L4::syn())).into_pod(w.pod_a);
            handed(&w.from_pod(&sent_by(h.a, 80, h.outside, 4400, L4::tcp(SYN | ACK))));
            // A node that does not take it, and one that does no longer.
            let node3 = if family == Family::V4 { ip("10.3.0.30") } else { ip("fd03::30") };
            w.from_pod(&sent_by(h.a, 4001, node3, 80, L4::syn())).into_tunnel(w, ip(ENDS_V6[2]));
            node2_at(w, Reach::Tunnel, false, ENDS_V6);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"on"))).into_tunnel(w, ip(ENDS_V6[1]));
            comes_v6(w, device, node2, asked(family, 80, 4000, L4::data(b"late"))).into_pod(w.pod_a);
            node2_at(w, Reach::Udp, false, ENDS_V6);
        }
    });
}

#[test]
fn at_an_ipv6_address_too_a_node_speaks_for_its_own_pods_only() {
    in_world(|w| {
        let device = begin_v6(w);
        let [node1, node2, node3] = ENDS_V6.map(name);
        for family in BOTH {
            let h = hosts(family);
            let nobody = [node1, node3, name("fd50::9"), [0x0a, 0, 0, 0, 0, 0], NODE3, MAC_ROUTER];
            for (from, sport) in nobody.into_iter().zip(4000..) {
                comes_v6(w, device, from, asked(family, sport, 80, L4::syn())).dropped("tunnel_source");
            }
            for source in [h.a, h.b, h.node] {
                comes_v6(w, device, node2, arriving(node1, source, 4100, h.a, 80, L4::syn())).dropped("tunnel_source");
            }
            comes_v6(w, device, node2, asked(family, 4200, 80, L4::syn())).into_pod(w.pod_a);
            comes_v6(w, device, node3, asked(family, 4200, 80, L4::data(b"x"))).dropped("tunnel_source");
        }
    });
}

#[test]
fn of_two_nodes_that_go_by_one_name_the_one_with_the_lower_address_does() {
    in_world(|w| {
        let device = begin_v6(w);
        let [low, high] = PAIR;
        assert_eq!((name(low), name(SAME_AS_NODE2)), (name(high), name(ENDS_V6[1])));
        let syn = |family, sport, of: &str| {
            let node3 = if family == Family::V4 { ip("10.3.0.30") } else { ip("fd03::30") };
            let source = if of == "node2" { hosts(family).remote } else { node3 };
            arriving(name(ENDS_V6[0]), source, sport, hosts(family).a, 80, L4::syn())
        };
        // Whichever of the nodes it is, before and after.
        for (round, (ends, heard, not)) in
            (0..).zip([(["fd50::1", low, high], "node2", "node3"), (["fd50::1", high, low], "node3", "node2")])
        {
            node2_at(w, Reach::Udp, false, ends);
            for family in BOTH {
                comes_v6(w, device, name(high), syn(family, 4000 + round, heard)).into_pod(w.pod_a);
                comes_v6(w, device, name(high), syn(family, 4100 + round, not)).dropped("tunnel_source");
            }
        }
        // This node itself: then it hears nobody.
        node2_at(w, Reach::Udp, false, [high, low, "fd50::3"]);
        comes_v6(w, device, name(low), syn(Family::V4, 4300, "node2")).dropped("tunnel_source");
        node2_at(w, Reach::Udp, false, ["fd50::1", low, "fd50::3"]);
        comes_v6(w, device, name(low), syn(Family::V4, 4300, "node2")).into_pod(w.pod_a);
    });
}
