//! IP headers alone around packets (`ipip`): built, taken off, what stays in envelopes, and who may send so.

use std::net::{IpAddr, SocketAddr};

use towpath_datapath::bpf::Hook;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::envelope;
use crate::frame::{ACK, Frame, L4, SYN, read, sum};
use crate::plain::node2_is;
use crate::world::*;

const ETHERNET: usize = 14;
const HEADER: usize = 20;
const NODE1: &str = "192.168.50.1";
const NODE2: &str = "192.168.50.2";

/// A frame in a header from the node at `from` to this one; `tos`: its second byte.
fn wrap(frame: &Frame, from: &str, tos: u8) -> Vec<u8> {
    let inner = frame.bytes();
    let address = |text: &str| match ip(text) {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => panic!("{v6} in an IPv4 header"),
    };
    let length = u16::try_from(inner.len() - ETHERNET + HEADER).unwrap().to_be_bytes();
    let protocol = if frame.src.is_ipv4() { 4 } else { 41 };
    let mut header = [&[0x45, tos], length.as_slice(), &[0, 1, 0x40, 0, 64, protocol, 0, 0]].concat();
    header.extend(address(from));
    header.extend(address(NODE1));
    let check = sum(&[&header]).to_be_bytes();
    header[10..12].copy_from_slice(&check);
    [&inner[..12], &[8, 0], &header, &inner[ETHERNET..]].concat()
}

/// What is in the header of a packet that goes to node2.
#[track_caller]
fn wrapped(w: &World, out: &Outcome) -> Frame {
    assert_eq!((out.verdict, out.kind, out.ifindex), (REDIRECT, 3, w.uplink), "{out:?}");
    assert_eq!(out.counted, ["ipip_out"]);
    let (link, packet) = out.bytes.split_at(ETHERNET);
    let (header, inner) = packet.split_at(HEADER);
    assert_eq!((&link[12..], header[0], sum(&[header])), ([8, 0].as_slice(), 0x45, 0), "{out:?}");
    assert_eq!(usize::from(u16::from_be_bytes([header[2], header[3]])), packet.len());
    assert_eq!((&header[6..8], header[8]), ([0x40, 0].as_slice(), 64), "not to be fragmented, with a life of its own");
    assert_eq!((&header[12..16], &header[16..]), ([192, 168, 50, 1].as_slice(), [192, 168, 50, 2].as_slice()));
    let kind: [u8; 2] = match header[9] {
        4 => [8, 0],
        41 => [0x86, 0xdd],
        other => panic!("protocol {other}"),
    };
    read(&[&link[..12], &kind, inner].concat())
}

fn uplink(w: &World, bytes: &[u8]) -> Outcome {
    w.run(Hook::FromUplink, bytes, w.uplink, w.uplink, None)
}

/// A packet of node2's pod as it comes in a header.
fn comes(w: &World, family: Family, sport: u16, dport: u16, l4: L4) -> Outcome {
    let h = hosts(family);
    uplink(w, &wrap(&arriving(MAC_UPLINK, h.remote, sport, h.a, dport, l4), NODE2, 0))
}

#[test]
fn packets_go_in_a_header_and_the_answers_come_so() {
    in_world(|w| {
        node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            let sent = wrapped(w, &w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())));
            assert_eq!((sent.src, sent.dst, sent.ttl), ((h.a, 4000).into(), (h.remote, 80).into(), 63));
            let got = comes(w, family, 80, 4000, L4::tcp(SYN | ACK)).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.ttl, got.dst_mac, got.src_mac), (h.remote, 63, MAC_A, MAC_HOST));
            let more = wrapped(w, &w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"more"))));
            assert_eq!(more.l4, L4::data(b"more"));
            let got = comes(w, family, 80, 4000, L4::data(b"known by now")).into_pod(w.pod_a);
            assert_eq!(got.l4, L4::data(b"known by now"));
            // Whoever began over there is answered so, too.
            comes(w, family, 5000, 80, L4::syn()).into_pod(w.pod_a);
            wrapped(w, &w.from_pod(&sent_by(h.a, 80, h.remote, 5000, L4::tcp(SYN | ACK))));
        }
    });
}

#[test]
fn what_the_other_end_could_not_take_out_by_itself_goes_in_an_envelope() {
    in_world(|w| {
        node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            let last = Frame { ttl: 2, ..sent_by(h.a, 4000, h.remote, 80, L4::udp(b"its last hop")) };
            w.from_pod(&last).into_tunnel(w, ip(NODE2));
            let first = sent_by(h.a, 4001, h.remote, 80, L4::udp(b"a first fragment"));
            if family == Family::V4 {
                w.from_pod(&Frame { fragment: Some((7, 0, true)), ..first }).into_tunnel(w, ip(NODE2));
            }
            // A complaint of a packet that came from there.
            comes(w, family, 5000, 81, L4::udp(b"nobody listens")).into_pod(w.pod_a);
            let complaint = crate::policy::unreachable(h.a, h.remote, (h.remote, 5000, h.a, 81));
            w.from_pod(&complaint).into_tunnel(w, ip(NODE2));
            // And what a pod says to the node itself.
            w.from_pod(&sent_by(h.a, 4002, h.node2, 9100, L4::syn())).into_tunnel(w, ip(NODE2));
        }
    });
}

#[test]
fn what_does_not_fit_the_way_with_a_header_is_the_tunnel_devices() {
    in_world(|w| {
        node2_is(w, Reach::Ipip, false);
        sh("ip route replace 192.168.50.2 dev up0 mtu lock 600");
        let h = hosts(Family::V4);
        wrapped(w, &w.from_pod(&sent_by(h.a, 4003, h.remote, 80, L4::udp(&[7; 300]))));
        w.from_pod(&sent_by(h.a, 4003, h.remote, 80, L4::udp(&[7; 800]))).by_tunnel_device(w);
    });
}

#[test]
fn between_ipv6_addresses_packets_go_in_envelopes() {
    in_world(|w| {
        let mut far = peers();
        (far[1].reach, far[1].tunnel) = (Reach::Ipip, ip("fd50::2"));
        w.programs.apply_peers(&far).unwrap();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).by_tunnel_device(w);
        }
    });
}

#[test]
fn nobody_else_sends_as_a_pod_and_policy_holds() {
    in_world(|w| {
        w.isolate(&w.local_a(), 1, 0);
        for h in BOTH.map(hosts) {
            w.allow(1, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 5);
        }
        w.apply_policy();
        // Whatever this node and that one send by.
        for (n, reach) in (0..).zip([Reach::Tunnel, Reach::Ipip, Reach::Route]) {
            node2_is(w, reach, true);
            for family in BOTH {
                let h = hosts(family);
                let port = 4000 + n;
                comes(w, family, port, 80, L4::syn()).into_pod(w.pod_a);
                comes(w, family, port, 81, L4::syn()).dropped("ingress_policy");
                let from =
                    |src, outer| uplink(w, &wrap(&arriving(MAC_UPLINK, src, port, h.a, 80, L4::syn()), outer, 0));
                // Another node, a stranger, this node itself; and pods of this node, or it, or one outside, by that node.
                for outer in ["192.168.50.3", "198.51.100.9", NODE1] {
                    from(h.remote, outer).dropped("tunnel_outsider");
                }
                for src in [h.a, h.b, h.node, h.outside] {
                    from(src, NODE2).dropped("tunnel_outsider");
                }
            }
        }
    });
}

#[test]
fn what_is_for_no_pod_here_is_the_kernels() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let syn = |to, port| arriving(MAC_UPLINK, h.remote, 4000, to, port, L4::syn());
            let same = |what: &str, bytes: &[u8]| {
                let got = uplink(w, bytes);
                assert_eq!((got.verdict, got.bytes.as_slice()), (PASS, bytes), "{what}");
            };
            same("for the node itself", &wrap(&syn(h.node, 22), NODE2, 0));
            let nobody = if family == Family::V4 { ip("10.1.0.99") } else { ip("fd01::99") };
            same("for nobody", &wrap(&syn(nobody, 80), NODE2, 0));
            same("at the end of its life", &wrap(&Frame { ttl: 1, ..syn(h.a, 80) }, NODE2, 0));
            let whole = wrap(&syn(h.a, 80), NODE2, 0);
            for len in ETHERNET + HEADER..whole.len() {
                assert_eq!(uplink(w, &whole[..len]).verdict, PASS, "{len} of {} bytes", whole.len());
            }
            uplink(w, &whole).into_pod(w.pod_a);
        }
    });
}

#[test]
fn congestion_met_on_the_way_is_told_or_costs_the_packet() {
    in_world(|w| {
        node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            // By the bits of the pod's own packet: as it leaves a pod, and what becomes of it when its header was marked on the way.
            for (n, (own, outer)) in (0..).zip([(0_u8, 0_u8), (1, 1), (2, 2), (3, 2)]) {
                let mark = |bytes: &mut Vec<u8>, at: usize| match family {
                    Family::V6 => bytes[at + 1] = own << 4,
                    Family::V4 => {
                        bytes[at + 1] = own;
                        bytes[at + 10..at + 12].fill(0);
                        let check = sum(&[&bytes[at..at + HEADER]]).to_be_bytes();
                        bytes[at + 10..at + 12].copy_from_slice(&check);
                    }
                };
                let mut bytes = sent_by(h.a, 4000 + n, h.remote, 80, L4::syn()).bytes();
                mark(&mut bytes, ETHERNET);
                let out = w.run(Hook::FromPod, &bytes, w.pod_a, w.pod_a, None);
                wrapped(w, &out);
                assert_eq!(out.bytes[ETHERNET + 1], outer, "{own}");

                let mut bytes = wrap(&arriving(MAC_UPLINK, h.remote, 5000 + n, h.a, 80, L4::syn()), NODE2, 3);
                mark(&mut bytes, ETHERNET + HEADER);
                let got = uplink(w, &bytes);
                if own == 0 {
                    got.dropped("congested");
                    continue;
                }
                assert_eq!((got.into_pod(w.pod_a).ttl, got.kind), (63, 1));
                let marked = if family == Family::V4 { got.bytes[ETHERNET + 1] } else { got.bytes[ETHERNET + 1] >> 4 };
                assert_eq!(marked & 3, 3, "{own}");
                if family == Family::V4 {
                    assert_eq!(sum(&[&got.bytes[ETHERNET..ETHERNET + HEADER]]), 0);
                }
            }
        }
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
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, ip(NODE2));
            w.from_tunnel(&answer(L4::tcp(SYN | ACK)), NODE2).into_pod(w.pod_a);
            // The other one is the first to change, then this one; what is under way still arrives, and changes nothing.
            comes(w, family, 80, 4000, L4::data(b"in a header")).into_pod(w.pod_a);
            asks(w).into_tunnel(w, ip(NODE2));
            node2_is(w, Reach::Ipip, false);
            w.from_tunnel(&answer(L4::data(b"late")), NODE2).into_pod(w.pod_a);
            wrapped(w, &asks(w));
            w.from_tunnel(&answer(L4::data(b"later")), NODE2).into_pod(w.pod_a);
            wrapped(w, &asks(w));
            // On to host-gw and back, and to envelopes again.
            node2_is(w, Reach::Route, true);
            comes(w, family, 80, 4000, L4::data(b"late")).into_pod(w.pod_a);
            assert_eq!(asks(w).counted, ["host_out"]);
            node2_is(w, Reach::Ipip, true);
            uplink(w, &arriving(MAC_UPLINK, h.remote, 80, h.a, 4000, L4::data(b"late")).bytes()).into_pod(w.pod_a);
            wrapped(w, &asks(w));
            node2_is(w, Reach::Tunnel, false);
            asks(w).into_tunnel(w, ip(NODE2));
            comes(w, family, 80, 4000, L4::data(b"late")).into_pod(w.pod_a);
            asks(w).into_tunnel(w, ip(NODE2));
        }
    });
}

#[test]
fn a_service_whose_backend_is_there_is_reached_so_too() {
    in_world(|w| {
        for (id, family) in (1..).zip(BOTH) {
            let h = hosts(family);
            w.serve(id, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            node2_is(w, Reach::Ipip, false);
            let asks = |l4| sent_by(h.a, 4000, h.service, 80, l4);
            assert_eq!(wrapped_after_translation(w, &w.from_pod(&asks(L4::syn()))).dst, (h.remote, 8080).into());
            let answer = comes(w, family, 8080, 4000, L4::tcp(SYN | ACK)).into_pod(w.pod_a);
            assert_eq!(answer.src, (h.service, 80).into());
            // The first looks at the connection, the second goes on by its translation, and both know of a change.
            for text in ["one", "two", "three"] {
                wrapped_after_translation(w, &w.from_pod(&asks(L4::data(text.as_bytes()))));
            }
            node2_is(w, Reach::Tunnel, false);
            for text in ["four", "five"] {
                w.from_pod(&asks(L4::data(text.as_bytes()))).into_tunnel(w, ip(NODE2));
            }
        }
    });
}

#[track_caller]
fn wrapped_after_translation(w: &World, out: &Outcome) -> Frame {
    assert_eq!(out.counted, ["ipip_out", "service_translated"]);
    wrapped(w, &Outcome { counted: vec!["ipip_out"], bytes: out.bytes.clone(), ..*out })
}

#[test]
fn another_networks_tunnel_on_this_node_is_left_alone() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            // Between two addresses that are nobody's here, from a node and from a stranger.
            let far = if family == Family::V4 { ip("172.16.9.9") } else { ip("fd16::9") };
            let bytes = wrap(&arriving(MAC_UPLINK, far, 4000, h.outside, 80, L4::syn()), "198.51.100.9", 0);
            let got = uplink(w, &bytes);
            assert_eq!((got.verdict, got.bytes.as_slice()), (PASS, bytes.as_slice()));
        }
        // It has no room for both a header and an envelope's: what is in an envelope is an envelope's.
        let h = hosts(Family::V4);
        let syn = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn());
        w.from_uplink(&envelope::wrap(&syn.bytes(), NODE2)).into_pod(w.pod_a);
    });
}
