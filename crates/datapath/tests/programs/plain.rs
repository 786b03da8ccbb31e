//! Nodes whose pods are sent packets as they are (`host-gw`): which way a packet goes, what is taken from whom, and what stays in envelopes.

use std::net::{IpAddr, SocketAddr};

use towpath_datapath::bpf::Surroundings;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, SYN};
use crate::policy::unreachable;
use crate::world::*;

/// The end of node2's tunnel.
fn node2() -> IpAddr {
    ip("192.168.50.2")
}

/// The pods of node2 are `reach`ed so, and may send as they are where `plain` is said. The kernel's routes to its IPv6 pods lead over it.
pub fn node2_is(w: &mut World, reach: Reach, plain: bool) {
    node2_at(w, reach, plain, ["192.168.50.1", "192.168.50.2", "192.168.50.3"]);
}

/// The same, where tunnels of the nodes end at these addresses.
pub fn node2_at(w: &mut World, reach: Reach, plain: bool, ends: [&str; 3]) {
    sh("ip -6 route replace fd02::/64 via fd50::2 dev up0");
    let mut peers = peers();
    (peers[1].reach, peers[1].plain) = (reach, plain);
    peers.iter_mut().zip(ends).for_each(|(peer, end)| peer.tunnel = ip(end));
    let devices = [(peers[1].name.clone(), [w.uplink; 2])].into();
    w.programs.surround(Surroundings { plain: devices, ..Surroundings::default() });
    w.programs.apply_peers(&peers).unwrap();
}

/// A packet of node2's pod as it comes by the uplink.
fn comes(family: Family, sport: u16, dport: u16, l4: L4) -> Frame {
    let h = hosts(family);
    arriving(MAC_UPLINK, h.remote, sport, h.a, dport, l4)
}

/// What leaves a pod for node2's goes as it is, out of the uplink.
#[track_caller]
fn goes_plain(w: &World, family: Family, frame: &Frame) {
    let h = hosts(family);
    let out = w.from_pod(frame);
    let sent = out.out_of(3, w.uplink);
    assert_eq!((sent.src.ip(), sent.dst.ip(), sent.ttl), (h.a, h.remote, 63));
    assert_eq!(out.counted, ["host_out"]);
}

#[test]
fn packets_go_as_they_are_and_the_answers_come_so() {
    in_world(|w| {
        node2_is(w, Reach::Route, true);
        for family in BOTH {
            let h = hosts(family);
            goes_plain(w, family, &sent_by(h.a, 4000, h.remote, 80, L4::syn()));
            let got = w.from_uplink(&comes(family, 80, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.ttl, got.dst_mac, got.src_mac), (h.remote, 63, MAC_A, MAC_HOST));
            goes_plain(w, family, &sent_by(h.a, 4000, h.remote, 80, L4::data(b"more")));
            // What is too big for the way, and what has no further hop to go, is the kernel's to answer.
            let big = L4::data(&[0; 1500]);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, big)).passed();
            w.from_pod(&Frame { ttl: 1, ..sent_by(h.a, 4000, h.remote, 80, L4::data(b"last")) }).passed();
        }
    });
}

#[test]
fn while_the_routes_lead_elsewhere_an_ipv6_packet_goes_in_an_envelope() {
    in_world(|w| {
        node2_is(w, Reach::Route, true);
        let h = hosts(Family::V6);
        for (port, routes) in [
            (4000, "ip -6 route replace fd02::/64 dev vx0"),
            (4001, "ip -6 route del fd02::/64"),
            (4002, "ip -6 route add fd02::/64 via fd50::3 dev up0"),
        ] {
            sh(routes);
            let sent = w.from_pod(&sent_by(h.a, port, h.remote, 80, L4::syn())).into_tunnel(w, node2());
            assert_eq!((sent.src.ip(), sent.dst.ip()), (h.a, h.remote));
        }
        // The route comes, and the next packet goes by it.
        sh("ip -6 route replace fd02::/64 via fd50::2 dev up0");
        goes_plain(w, Family::V6, &sent_by(h.a, 4002, h.remote, 80, L4::data(b"more")));
    });
}

#[test]
fn a_connection_changes_its_way_with_its_node_and_loses_no_packet() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let asks = |w: &World| w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"ask")));
            let answer = |l4| arriving(MAC_TUNNEL, h.remote, 80, h.a, 4000, l4);
            node2_is(w, Reach::Tunnel, false);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, node2());
            w.from_tunnel(&answer(L4::tcp(SYN | ACK)), "192.168.50.2").into_pod(w.pod_a);
            // This node takes both ways, and the other one is the first to change.
            node2_is(w, Reach::Tunnel, true);
            w.from_uplink(&comes(family, 80, 4000, L4::data(b"plain"))).into_pod(w.pod_a);
            asks(w).into_tunnel(w, node2());
            // Now this one; what is still under way in an envelope arrives, and changes nothing.
            node2_is(w, Reach::Route, true);
            w.from_tunnel(&answer(L4::data(b"late")), "192.168.50.2").into_pod(w.pod_a);
            goes_plain(w, family, &sent_by(h.a, 4000, h.remote, 80, L4::data(b"ask")));
            w.from_tunnel(&answer(L4::data(b"later")), "192.168.50.2").into_pod(w.pod_a);
            goes_plain(w, family, &sent_by(h.a, 4000, h.remote, 80, L4::data(b"ask")));
            // And back.
            node2_is(w, Reach::Tunnel, true);
            asks(w).into_tunnel(w, node2());
            w.from_uplink(&comes(family, 80, 4000, L4::data(b"late"))).into_pod(w.pod_a);
            asks(w).into_tunnel(w, node2());
            node2_is(w, Reach::Tunnel, false);
            w.from_uplink(&comes(family, 80, 4000, L4::data(b"too late"))).dropped("spoofed_node");
            asks(w).into_tunnel(w, node2());
        }
    });
}

/// An error is judged again as well after a change, and the connection's way is looked up with its own next packet.
#[test]
fn an_error_about_a_connection_does_not_keep_it_on_its_former_way() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            node2_is(w, Reach::Tunnel, true);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 53, L4::udp(b"ask"))).into_tunnel(w, node2());
            node2_is(w, Reach::Route, true);
            let mut error = unreachable(h.remote, h.a, (h.a, 4000, h.remote, 53));
            (error.src_mac, error.dst_mac) = (MAC_ROUTER, MAC_TUNNEL);
            w.from_tunnel(&error, "192.168.50.2").into_pod(w.pod_a);
            goes_plain(w, family, &sent_by(h.a, 4000, h.remote, 53, L4::udp(b"ask")));
        }
    });
}

#[test]
fn who_began_as_it_is_is_answered_as_this_node_sends() {
    in_world(|w| {
        for (n, (reach, family)) in
            (0..).zip([Reach::Tunnel, Reach::Route].into_iter().flat_map(|r| BOTH.map(|f| (r, f))))
        {
            let h = hosts(family);
            node2_is(w, reach, true);
            w.from_uplink(&comes(family, 5000 + n, 80, L4::syn())).into_pod(w.pod_a);
            let answer = sent_by(h.a, 80, h.remote, 5000 + n, L4::tcp(SYN | ACK));
            match reach {
                Reach::Route => goes_plain(w, family, &answer),
                _ => drop(w.from_pod(&answer).into_tunnel(w, node2())),
            }
        }
    });
}

#[test]
fn nobody_else_sends_as_a_pod_and_policy_holds() {
    in_world(|w| {
        node2_is(w, Reach::Route, true);
        let a = w.local_a();
        w.isolate(&a, 5, 0);
        for h in BOTH.map(hosts) {
            w.allow(5, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 1);
        }
        w.apply_policy();
        for family in BOTH {
            let h = hosts(family);
            w.from_uplink(&comes(family, 4000, 80, L4::syn())).into_pod(w.pod_a);
            w.from_uplink(&comes(family, 4000, 81, L4::syn())).dropped("ingress_policy");
            // A node of whom nobody said so, a pod of this one, and the same packet by another device.
            let third = if family == Family::V4 { ip("10.3.0.5") } else { ip("fd03::5") };
            w.from_uplink(&arriving(MAC_UPLINK, third, 4001, h.a, 80, L4::syn())).dropped("spoofed_node");
            w.from_uplink(&arriving(MAC_UPLINK, h.b, 4001, h.a, 80, L4::syn())).dropped("spoofed_node");
            w.to_pod(&comes(family, 4002, 80, L4::syn()), w.pod_a, w.pod_b).dropped("spoofed_node");
            // For this node itself, and for a pod that is not here: the kernel's.
            w.from_uplink(&arriving(MAC_UPLINK, h.remote, 4003, h.node, 22, L4::syn())).passed();
        }
    });
}

#[test]
fn a_service_whose_backend_is_there_is_reached_so_too() {
    in_world(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
        let asks = |l4| sent_by(h.a, 4000, h.service, 80, l4);
        node2_is(w, Reach::Route, true);
        assert_eq!(w.from_pod(&asks(L4::syn())).out_of(3, w.uplink).dst, (h.remote, 8080).into());
        let answer = w.from_uplink(&comes(Family::V4, 8080, 4000, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
        assert_eq!(answer.src, (h.service, 80).into());
        // The first looks at the connection, the second goes on by its translation, and both know of a change.
        for text in ["one", "two", "three"] {
            assert_eq!(w.from_pod(&asks(L4::data(text.as_bytes()))).out_of(3, w.uplink).dst, (h.remote, 8080).into());
        }
        node2_is(w, Reach::Tunnel, true);
        for text in ["four", "five", "six"] {
            w.from_pod(&asks(L4::data(text.as_bytes()))).into_tunnel(w, h.node2);
        }
        node2_is(w, Reach::Route, true);
        for text in ["seven", "eight", "nine"] {
            w.from_pod(&asks(L4::data(text.as_bytes()))).out_of(3, w.uplink);
        }
    });
}

#[test]
fn clients_outside_come_and_are_answered_in_envelopes() {
    in_world(|w| {
        node2_is(w, Reach::Route, true);
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            // Here for a pod there: its answer has to come back by this node.
            let asked = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::syn()));
            assert_eq!(asked.into_tunnel(w, node2()).src, (h.outside, 4000).into());
            w.from_tunnel(&arriving(MAC_TUNNEL, h.remote, 8080, h.outside, 4000, L4::tcp(SYN | ACK)), "192.168.50.2")
                .out_of(3, w.uplink);
            // There for a pod here.
            w.from_tunnel(&arriving(MAC_TUNNEL, h.outside, 5000, h.a, 80, L4::syn()), "192.168.50.2").into_pod(w.pod_a);
            let answer = sent_by(h.a, 80, h.outside, 5000, L4::tcp(SYN | ACK));
            w.from_pod(&answer).into_tunnel(w, node2());
            // Nodes themselves, too.
            w.from_pod(&sent_by(h.a, 4000, h.node2, 22, L4::syn())).into_tunnel(w, node2());
        }
    });
}
