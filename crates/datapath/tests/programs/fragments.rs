//! Fragments that do not simply follow the first, and complaints of routers outside about answers that were too big.

use std::net::SocketAddr;

use towpath_model::{Family, Protocol};

use crate::frame::{Frame, L4};
use crate::services::unreachable;
use crate::world::*;

/// The kernel puts the datagram together and cuts it again in order; the pod's own device judges it.
#[test]
fn what_another_node_sends_out_of_order_is_left_to_the_kernel() {
    in_world(|w| {
        w.isolate(&w.local_a(), 5, 0);
        w.apply_policy();
        for h in BOTH.map(hosts) {
            let of = |src, id, offset, more| {
                let frame = arriving(MAC_TUNNEL, src, 4000, h.a, 80, L4::udp(&[1; 64]));
                Frame { fragment: Some((id, offset, more)), ..frame }
            };
            let to_pod = |id, offset, more| w.from_tunnel(&of(h.remote, id, offset, more), "192.168.50.2");
            for (offset, more) in [(72, false), (0, true), (64, true)] {
                assert_eq!(to_pod(9, offset, more).passed().counted, ["to_stack"], "at {offset}");
            }
            // Another datagram, in order, is judged here.
            to_pod(10, 0, true).dropped("ingress_policy");
            // Nobody leaves another's fragments to the kernel, or his own to another address than a pod's.
            w.from_tunnel(&of(h.remote, 11, 72, false), "192.168.50.3").dropped("fragment");
            w.from_tunnel(&of(h.a, 11, 72, false), "192.168.50.2").dropped("fragment");
            w.from_tunnel(&of(h.outside, 11, 72, false), "192.168.50.2").dropped("fragment");
            to_pod(11, 0, true).dropped("ingress_policy");
            let mut to_nobody = of(h.remote, 12, 72, false);
            to_nobody.dst = SocketAddr::new(h.outside, 80);
            w.from_tunnel(&to_nobody, "192.168.50.2").dropped("fragment");
            // At the uplink they go on to the tunnel device, also the first.
            for (offset, more) in [(72, false), (0, true)] {
                let wrapped = crate::envelope::wrap(&of(h.remote, 9, offset, more).bytes(), "192.168.50.2");
                w.from_uplink(&wrapped).passed();
            }
        }
    });
}

#[test]
fn fragments_for_a_service_that_come_before_the_first_are_counted_where_they_are_lost() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(h.b, 5353)]);
            let later = |dst| {
                let frame = arriving(MAC_UPLINK, h.outside, 4000, dst, 53, L4::udp(&[1; 64]));
                w.from_uplink(&Frame { fragment: Some((9, 72, false)), ..frame })
            };
            later(h.service).dropped("fragment");
            // What may be for the node's own sockets is for its stack.
            later(h.node).passed();
        }
    });
}

/// The client is told of what it sent; of what became of that it knows nothing.
#[test]
fn who_sends_what_the_tunnel_has_no_room_for_is_told() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.remote, 5353)]);
            for size in [1450, 1440, 1404] {
                let sent = arriving(MAC_UPLINK, h.outside, 4000, h.node, 30053, L4::udp(&vec![1; size]));
                let mut bytes = sent.bytes();
                if h.node.is_ipv4() {
                    // May not be cut.
                    bytes[20] |= 0x40;
                    bytes[24..26].fill(0);
                    let check = crate::frame::sum(&[&bytes[14..34]]).to_be_bytes();
                    bytes[24..26].copy_from_slice(&check);
                }
                let got = w.run(towpath_datapath::bpf::Hook::FromUplink, &bytes, w.uplink, w.uplink, None);
                let room = 1450 - if h.node.is_ipv4() { 28 } else { 48 };
                if size <= room {
                    assert_eq!((got.verdict, got.kind), (REDIRECT, 3), "{size} bytes");
                    continue;
                }
                let told = got.out_of(2, w.uplink);
                assert_eq!((told.src.ip(), told.dst.ip()), (h.node, h.outside));
                let L4::Icmp { kind, code, rest, payload } = told.l4 else { panic!("{size} bytes: {told:?}") };
                assert_eq!((kind, code), if h.node.is_ipv4() { (3, 4) } else { (2, 0) });
                assert_eq!(u32::from_be_bytes(rest), 1450);
                assert_eq!(payload, bytes[14..14 + payload.len()]);
            }
        }
    });
}

#[test]
fn the_last_fragment_goes_with_those_that_are_too_big_for_the_tunnel() {
    in_world(|w| {
        // Of IPv6 nobody on the way cuts a packet, nor a fragment.
        for family in [Family::V4] {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.remote, 5353)]);
            let send = |id, size, offset, more| {
                let frame = arriving(MAC_UPLINK, h.outside, 4000, h.node, 30053, L4::udp(&vec![1; size]));
                w.from_uplink(&Frame { fragment: Some((id, offset, more)), ..frame })
            };
            for (offset, more) in [(0, true), (1480, false)] {
                let got = send(9, 1440, offset, more);
                got.passed();
                let (at, len) = if h.node.is_ipv4() { (14 + 16, 4) } else { (14 + 24, 16) };
                let octets = match h.remote {
                    std::net::IpAddr::V4(v4) => v4.octets().to_vec(),
                    std::net::IpAddr::V6(v6) => v6.octets().to_vec(),
                };
                assert_eq!(got.bytes[at..at + len], octets, "translated all the same");
            }
            for (offset, more) in [(0, true), (808, false)] {
                let got = send(10, 800, offset, more);
                assert_eq!((got.verdict, got.kind, got.ifindex), (REDIRECT, 3, w.uplink), "{got:?}");
            }
        }
    });
}

/// What a router says of an answer, which it knows by the Service's address, the endpoint hears of its own.
#[test]
fn a_complaint_from_outside_reaches_the_endpoint() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let router = if h.node.is_ipv4() { ip("203.0.113.1") } else { ip("2001:db8:7::1") };
            let client = SocketAddr::new(h.outside, 4000);
            for (n, port, backend) in [(1, 30053, h.b), (11, 30054, h.remote)] {
                w.serve(n + family as u32, family, None, port, Protocol::Udp, &[SocketAddr::new(backend, 5353)]);
                let complaint = |client: SocketAddr, at: SocketAddr| {
                    let mut frame = unreachable(MAC_UPLINK, at, client);
                    frame.src_mac = MAC_ROUTER;
                    frame.src = SocketAddr::new(router, 0);
                    frame
                };
                let asked = SocketAddr::new(h.node, port);
                // Of nothing that is known: the node's own affair.
                w.from_uplink(&complaint(client, asked)).passed();
                let question = arriving(MAC_UPLINK, h.outside, 4000, h.node, port, L4::udp(b"hello"));
                w.from_uplink(&question);
                let got = w.from_uplink(&complaint(client, asked));
                let got = if backend == h.b { got.into_pod(w.pod_b) } else { got.into_tunnel(w, ip("192.168.50.2")) };
                assert_eq!((got.src.ip(), got.dst.ip()), (router, backend));
                let L4::Icmp { payload: quoted, .. } = &got.l4 else { panic!("{got:?}") };
                let sent = sent_by(backend, 5353, client.ip(), client.port(), L4::udp(b"hello")).packet();
                let header = if client.is_ipv4() { 20 } else { 40 };
                assert_eq!(quoted[..header + 4], sent[..header + 4]);
                // Of another's connection.
                w.from_uplink(&complaint(SocketAddr::new(h.outside, 4001), asked)).passed();
            }
            // The endpoint's node lets it in.
            let ask = arriving(MAC_TUNNEL, h.outside, 4000, h.a, 80, L4::udp(b"hello"));
            w.from_tunnel(&ask, "192.168.50.2").into_pod(w.pod_a);
            let mut frame = unreachable(MAC_TUNNEL, SocketAddr::new(h.a, 80), client);
            frame.src = SocketAddr::new(router, 0);
            w.from_tunnel(&frame, "192.168.50.2").into_pod(w.pod_a);
        }
    });
}
