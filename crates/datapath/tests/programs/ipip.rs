//! IP headers alone around packets (`ipip`): built, taken off, what stays in envelopes, and who may send so.

use std::net::{IpAddr, SocketAddr};

use towpath_datapath::bpf::Hook;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::envelope;
use crate::frame::{ACK, Frame, L4, SYN, read, sum};
use crate::plain::node2_at;
use crate::world::*;

const ETHERNET: usize = 14;

/// What headers are of: the addresses of the nodes that they go between.
#[derive(Clone, Copy)]
struct Outer {
    family: Family,
    node1: &'static str,
    node2: &'static str,
    node3: &'static str,
    stranger: &'static str,
}

const OUTER: [Outer; 2] = [
    Outer {
        family: Family::V4,
        node1: "192.168.50.1",
        node2: "192.168.50.2",
        node3: "192.168.50.3",
        stranger: "198.51.100.9",
    },
    Outer { family: Family::V6, node1: "fd50::1", node2: "fd50::2", node3: "fd50::3", stranger: "fd99::9" },
];

impl Outer {
    /// Bytes of a header.
    fn header(self) -> usize {
        if self.family == Family::V4 { 20 } else { 40 }
    }

    /// The pods of node2 are `reach`ed so, between these addresses.
    fn node2_is(self, w: &mut World, reach: Reach, plain: bool) {
        node2_at(w, reach, plain, [self.node1, self.node2, self.node3]);
    }

    /// A frame in a header from the node at `from` to this one; `ecn`: its mark of congestion.
    fn wrap(self, frame: &Frame, from: &str, ecn: u8) -> Vec<u8> {
        self.wrap_bytes(&frame.bytes(), from, ecn)
    }

    fn wrap_bytes(self, inner: &[u8], from: &str, ecn: u8) -> Vec<u8> {
        let address = |text: &str| match ip(text) {
            IpAddr::V4(v4) => v4.octets().to_vec(),
            IpAddr::V6(v6) => v6.octets().to_vec(),
        };
        let protocol = if inner[12..14] == [8, 0] { 4 } else { 41 };
        let payload = u16::try_from(inner.len() - ETHERNET).unwrap();
        let (kind, mut header) = match self.family {
            Family::V4 => {
                let length = (payload + 20).to_be_bytes();
                ([8, 0], [&[0x45, ecn], length.as_slice(), &[0, 1, 0x40, 0, 64, protocol, 0, 0]].concat())
            }
            Family::V6 => {
                let length = payload.to_be_bytes();
                ([0x86, 0xdd], [&[0x60, ecn << 4, 0, 0], length.as_slice(), &[protocol, 64]].concat())
            }
        };
        header.extend(address(from));
        header.extend(address(self.node1));
        if self.family == Family::V4 {
            let check = sum(&[&header]).to_be_bytes();
            header[10..12].copy_from_slice(&check);
        }
        [&inner[..12], &kind, &header, &inner[ETHERNET..]].concat()
    }

    /// What is in the header of a packet that goes to node2.
    #[track_caller]
    fn wrapped(self, w: &World, out: &Outcome) -> Frame {
        assert_eq!((out.verdict, out.kind, out.ifindex), (REDIRECT, 3, w.uplink), "{out:?}");
        assert_eq!(out.counted, ["ipip_out"]);
        let (link, packet) = out.bytes.split_at(ETHERNET);
        let (header, inner) = packet.split_at(self.header());
        let protocol = match self.family {
            Family::V4 => {
                assert_eq!((&link[12..], header[0], sum(&[header])), ([8, 0].as_slice(), 0x45, 0), "{out:?}");
                assert_eq!(usize::from(u16::from_be_bytes([header[2], header[3]])), packet.len());
                assert_eq!((&header[6..8], header[8]), ([0x40, 0].as_slice(), 64), "whole, with a life of its own");
                assert_eq!(
                    (&header[12..16], &header[16..]),
                    ([192, 168, 50, 1].as_slice(), [192, 168, 50, 2].as_slice())
                );
                header[9]
            }
            Family::V6 => {
                assert_eq!((&link[12..], header[0]), ([0x86, 0xdd].as_slice(), 0x60), "{out:?}");
                assert_ne!((header[1] & 15, header[2], header[3]), (0, 0, 0), "a label for its flow");
                assert_eq!(usize::from(u16::from_be_bytes([header[4], header[5]])), inner.len());
                assert_eq!(header[7], 64, "a life of its own");
                let address = |n| [&[0xfd, 0x50], [0; 13].as_slice(), &[n]].concat();
                assert_eq!((&header[8..24], &header[24..]), (address(1).as_slice(), address(2).as_slice()));
                header[6]
            }
        };
        let kind: [u8; 2] = match protocol {
            4 => [8, 0],
            41 => [0x86, 0xdd],
            other => panic!("protocol {other}"),
        };
        read(&[&link[..12], &kind, inner].concat())
    }

    /// The same of one that a Service translated.
    #[track_caller]
    fn wrapped_after_translation(self, w: &World, out: &Outcome) -> Frame {
        assert_eq!(out.counted, ["ipip_out", "service_translated"]);
        self.wrapped(w, &Outcome { counted: vec!["ipip_out"], bytes: out.bytes.clone(), ..*out })
    }

    /// A packet of node2's pod as it comes in a header.
    fn comes(self, w: &World, family: Family, sport: u16, dport: u16, l4: L4) -> Outcome {
        let h = hosts(family);
        uplink(w, &self.wrap(&arriving(MAC_UPLINK, h.remote, sport, h.a, dport, l4), self.node2, 0))
    }
}

fn uplink(w: &World, bytes: &[u8]) -> Outcome {
    w.run(Hook::FromUplink, bytes, w.uplink, w.uplink, None)
}

/// Each family of pods over each of nodes, in a world of its own a family of nodes.
fn over_both(test: impl Fn(&mut World, Outer) + Copy + Send + 'static) {
    for outer in OUTER {
        in_world(move |w| test(w, outer));
    }
}

#[test]
fn packets_go_in_a_header_and_the_answers_come_so() {
    over_both(|w, o| {
        o.node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            let sent = o.wrapped(w, &w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())));
            assert_eq!((sent.src, sent.dst, sent.ttl), ((h.a, 4000).into(), (h.remote, 80).into(), 63));
            let got = o.comes(w, family, 80, 4000, L4::tcp(SYN | ACK)).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.ttl, got.dst_mac, got.src_mac), (h.remote, 63, MAC_A, MAC_HOST));
            let more = o.wrapped(w, &w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"more"))));
            assert_eq!(more.l4, L4::data(b"more"));
            let got = o.comes(w, family, 80, 4000, L4::data(b"known by now")).into_pod(w.pod_a);
            assert_eq!(got.l4, L4::data(b"known by now"));
            // Whoever began over there is answered so, too.
            o.comes(w, family, 5000, 80, L4::syn()).into_pod(w.pod_a);
            o.wrapped(w, &w.from_pod(&sent_by(h.a, 80, h.remote, 5000, L4::tcp(SYN | ACK))));
        }
    });
}

#[test]
fn what_the_other_end_could_not_take_out_by_itself_goes_in_an_envelope() {
    over_both(|w, o| {
        o.node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            let last = Frame { ttl: 2, ..sent_by(h.a, 4000, h.remote, 80, L4::udp(b"its last hop")) };
            w.from_pod(&last).into_tunnel(w, ip(o.node2));
            let first = sent_by(h.a, 4001, h.remote, 80, L4::udp(b"a first fragment"));
            if family == Family::V4 {
                w.from_pod(&Frame { fragment: Some((7, 0, true)), ..first }).into_tunnel(w, ip(o.node2));
            }
            // A complaint of a packet that came from there.
            o.comes(w, family, 5000, 81, L4::udp(b"nobody listens")).into_pod(w.pod_a);
            let complaint = crate::policy::unreachable(h.a, h.remote, (h.remote, 5000, h.a, 81));
            w.from_pod(&complaint).into_tunnel(w, ip(o.node2));
            // And what a pod says to the node itself.
            w.from_pod(&sent_by(h.a, 4002, h.node2, 9100, L4::syn())).into_tunnel(w, ip(o.node2));
        }
    });
}

#[test]
fn what_does_not_fit_the_way_with_a_header_is_the_tunnel_devices() {
    over_both(|w, o| {
        o.node2_is(w, Reach::Ipip, false);
        sh(&format!("ip route replace {} dev up0 mtu lock 1290", o.node2));
        for family in BOTH {
            let h = hosts(family);
            // To the byte: all but the headers of the pod's own packet, and the one around it.
            let fits = 1290 - o.header() - if family == Family::V4 { 28 } else { 48 };
            o.wrapped(w, &w.from_pod(&sent_by(h.a, 4003, h.remote, 80, L4::udp(&vec![7; fits]))));
            w.from_pod(&sent_by(h.a, 4003, h.remote, 80, L4::udp(&vec![7; fits + 1]))).by_tunnel_device(w);
        }
    });
}

#[test]
fn nobody_else_sends_as_a_pod_and_policy_holds() {
    over_both(|w, o| {
        w.isolate(&w.local_a(), 1, 0);
        for h in BOTH.map(hosts) {
            w.allow(1, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 5);
        }
        w.apply_policy();
        // Whatever this node and that one send by.
        for (n, reach) in (0..).zip([Reach::Tunnel, Reach::Ipip, Reach::Route]) {
            o.node2_is(w, reach, true);
            for family in BOTH {
                let h = hosts(family);
                let port = 4000 + n;
                o.comes(w, family, port, 80, L4::syn()).into_pod(w.pod_a);
                o.comes(w, family, port, 81, L4::syn()).dropped("ingress_policy");
                let from =
                    |src, outer| uplink(w, &o.wrap(&arriving(MAC_UPLINK, src, port, h.a, 80, L4::syn()), outer, 0));
                // Another node, a stranger, this node itself; and pods of this node, or it, or one outside, by that node.
                for outer in [o.node3, o.stranger, o.node1] {
                    from(h.remote, outer).dropped("tunnel_outsider");
                }
                for src in [h.a, h.b, h.node, h.outside] {
                    from(src, o.node2).dropped("tunnel_outsider");
                }
            }
        }
    });
}

#[test]
fn what_is_for_no_pod_here_is_the_kernels() {
    over_both(|w, o| {
        for family in BOTH {
            let h = hosts(family);
            let syn = |to, port| arriving(MAC_UPLINK, h.remote, 4000, to, port, L4::syn());
            let same = |what: &str, bytes: &[u8]| {
                let got = uplink(w, bytes);
                assert_eq!((got.verdict, got.bytes.as_slice()), (PASS, bytes), "{what}");
            };
            same("for the node itself", &o.wrap(&syn(h.node, 22), o.node2, 0));
            let nobody = if family == Family::V4 { ip("10.1.0.99") } else { ip("fd01::99") };
            same("for nobody", &o.wrap(&syn(nobody, 80), o.node2, 0));
            same("at the end of its life", &o.wrap(&Frame { ttl: 1, ..syn(h.a, 80) }, o.node2, 0));
            let whole = o.wrap(&syn(h.a, 80), o.node2, 0);
            for len in ETHERNET + o.header()..whole.len() {
                assert_eq!(uplink(w, &whole[..len]).verdict, PASS, "{len} of {} bytes", whole.len());
            }
            uplink(w, &whole).into_pod(w.pod_a);
        }
    });
}

#[test]
fn congestion_met_on_the_way_is_told_or_costs_the_packet() {
    over_both(|w, o| {
        o.node2_is(w, Reach::Ipip, false);
        for family in BOTH {
            let h = hosts(family);
            // By the bits of the pod's own packet: as it leaves a pod, and what becomes of it when its header was marked on the way.
            for (n, (own, outer)) in (0..).zip([(0_u8, 0_u8), (1, 1), (2, 2), (3, 2)]) {
                let mark = |bytes: &mut Vec<u8>, at: usize| match family {
                    Family::V6 => bytes[at + 1] = own << 4,
                    Family::V4 => {
                        bytes[at + 1] = own;
                        bytes[at + 10..at + 12].fill(0);
                        let check = sum(&[&bytes[at..at + 20]]).to_be_bytes();
                        bytes[at + 10..at + 12].copy_from_slice(&check);
                    }
                };
                let mut bytes = sent_by(h.a, 4000 + n, h.remote, 80, L4::syn()).bytes();
                mark(&mut bytes, ETHERNET);
                let out = w.run(Hook::FromPod, &bytes, w.pod_a, w.pod_a, None);
                o.wrapped(w, &out);
                let said = out.bytes[ETHERNET + 1];
                assert_eq!(if o.family == Family::V4 { said & 3 } else { said >> 4 & 3 }, outer, "{own}");

                let mut bytes = o.wrap(&arriving(MAC_UPLINK, h.remote, 5000 + n, h.a, 80, L4::syn()), o.node2, 3);
                mark(&mut bytes, ETHERNET + o.header());
                let got = uplink(w, &bytes);
                if own == 0 {
                    got.dropped("congested");
                    continue;
                }
                assert_eq!((got.into_pod(w.pod_a).ttl, got.kind), (63, 1));
                let marked = if family == Family::V4 { got.bytes[ETHERNET + 1] } else { got.bytes[ETHERNET + 1] >> 4 };
                assert_eq!(marked & 3, 3, "{own}");
                if family == Family::V4 {
                    assert_eq!(sum(&[&got.bytes[ETHERNET..ETHERNET + 20]]), 0);
                }
            }
        }
    });
}

#[test]
fn a_connection_changes_its_way_with_its_node_and_loses_no_packet() {
    over_both(|w, o| {
        for family in BOTH {
            let h = hosts(family);
            let asks = |w: &World| w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::data(b"ask")));
            let answer = |l4| arriving(MAC_TUNNEL, h.remote, 80, h.a, 4000, l4);
            o.node2_is(w, Reach::Tunnel, false);
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, ip(o.node2));
            w.from_tunnel(&answer(L4::tcp(SYN | ACK)), o.node2).into_pod(w.pod_a);
            // The other one is the first to change, then this one; what is under way still arrives, and changes nothing.
            o.comes(w, family, 80, 4000, L4::data(b"in a header")).into_pod(w.pod_a);
            asks(w).into_tunnel(w, ip(o.node2));
            o.node2_is(w, Reach::Ipip, false);
            w.from_tunnel(&answer(L4::data(b"late")), o.node2).into_pod(w.pod_a);
            o.wrapped(w, &asks(w));
            w.from_tunnel(&answer(L4::data(b"later")), o.node2).into_pod(w.pod_a);
            o.wrapped(w, &asks(w));
            // On to host-gw and back, and to envelopes again.
            o.node2_is(w, Reach::Route, true);
            o.comes(w, family, 80, 4000, L4::data(b"late")).into_pod(w.pod_a);
            // An IPv4 packet has no next hop as it is towards a node that is known by an IPv6 address.
            let plain = if (family, o.family) == (Family::V4, Family::V6) { "tunnel_out" } else { "host_out" };
            assert_eq!(asks(w).counted, [plain]);
            o.node2_is(w, Reach::Ipip, true);
            uplink(w, &arriving(MAC_UPLINK, h.remote, 80, h.a, 4000, L4::data(b"late")).bytes()).into_pod(w.pod_a);
            o.wrapped(w, &asks(w));
            o.node2_is(w, Reach::Tunnel, false);
            asks(w).into_tunnel(w, ip(o.node2));
            o.comes(w, family, 80, 4000, L4::data(b"late")).into_pod(w.pod_a);
            asks(w).into_tunnel(w, ip(o.node2));
        }
    });
}

#[test]
fn a_service_whose_backend_is_there_is_reached_so_too() {
    over_both(|w, o| {
        for (id, family) in (1..).zip(BOTH) {
            let h = hosts(family);
            w.serve(id, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            o.node2_is(w, Reach::Ipip, false);
            let asks = |l4| sent_by(h.a, 4000, h.service, 80, l4);
            assert_eq!(o.wrapped_after_translation(w, &w.from_pod(&asks(L4::syn()))).dst, (h.remote, 8080).into());
            let answer = o.comes(w, family, 8080, 4000, L4::tcp(SYN | ACK)).into_pod(w.pod_a);
            assert_eq!(answer.src, (h.service, 80).into());
            // The first looks at the connection, the second goes on by its translation, and both know of a change.
            for text in ["one", "two", "three"] {
                o.wrapped_after_translation(w, &w.from_pod(&asks(L4::data(text.as_bytes()))));
            }
            o.node2_is(w, Reach::Tunnel, false);
            for text in ["four", "five"] {
                w.from_pod(&asks(L4::data(text.as_bytes()))).into_tunnel(w, ip(o.node2));
            }
        }
    });
}

#[test]
fn another_networks_tunnel_on_this_node_is_left_alone() {
    over_both(|w, o| {
        for family in BOTH {
            let h = hosts(family);
            // Between two addresses that are nobody's here, from a node and from a stranger.
            let far = if family == Family::V4 { ip("172.16.9.9") } else { ip("fd16::9") };
            let bytes = o.wrap(&arriving(MAC_UPLINK, far, 4000, h.outside, 80, L4::syn()), o.stranger, 0);
            let got = uplink(w, &bytes);
            assert_eq!((got.verdict, got.bytes.as_slice()), (PASS, bytes.as_slice()));
        }
        // It has no room for both a header and an envelope's: what is in an envelope is an envelope's.
        let h = hosts(Family::V4);
        let syn = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn());
        w.from_uplink(&envelope::wrap(&syn.bytes(), "192.168.50.2")).into_pod(w.pod_a);
    });
}
