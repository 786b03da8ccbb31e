//! What others than the node put into envelopes does not leave with the node's address: another node would believe it.

use std::net::SocketAddr;

use towpath_model::{Family, Protocol};

use crate::frame::{Frame, L4};
use crate::world::*;

const TUNNEL: u16 = 4789;
const NODE_PORT: u16 = 30053;

/// Each kind of thing that a node takes out of something else, and one that it does not.
fn kinds() -> [L4; 4] {
    let header = |proto| L4::Raw { proto, bytes: vec![0x45; 28] };
    [L4::udp(b"vxlan"), header(4), header(41), header(47)]
}

fn is_taken_out(l4: &L4) -> bool {
    !matches!(l4, L4::Raw { proto: 47, .. })
}

/// A node that is not known here (yet).
fn stranger(family: Family) -> std::net::IpAddr {
    if family == Family::V4 { ip("192.168.50.99") } else { ip("fd50::99") }
}

#[test]
fn a_pod_sends_its_own_to_pods_and_to_no_node() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            for l4 in kinds() {
                let to = |dst| sent_by(h.a, 4000, dst, TUNNEL, l4.clone());
                w.from_pod(&to(h.b)).into_pod(w.pod_b);
                w.from_pod(&to(h.remote)).into_tunnel(w, ip("192.168.50.2"));
                for node in [h.node, h.node2, stranger(family), h.outside] {
                    let got = w.from_pod(&to(node));
                    if is_taken_out(&l4) {
                        got.dropped("own_envelope");
                    } else {
                        assert_ne!(got.verdict, DROP, "{got:?}");
                    }
                }
            }
            // By the kernel's routes no more than by ours: what does not fit the tunnel, and what it alone could forward.
            let large = L4::udp(&[0; 1440]);
            w.from_pod(&sent_by(h.a, 4001, h.node2, TUNNEL, large)).dropped("own_envelope");
            let last_hop = Frame { ttl: 1, ..sent_by(h.a, 4002, h.node2, TUNNEL, L4::udp(b"vxlan")) };
            w.from_pod(&last_hop).dropped("own_envelope");
            // Any other port is a pod's to ask.
            w.from_pod(&sent_by(h.a, 4003, stranger(family), TUNNEL + 1, L4::udp(b"vxlan"))).passed();
            w.from_pod(&sent_by(h.a, 4004, stranger(family), TUNNEL, L4::syn())).passed();
        }
        let h = hosts(Family::V4);
        for (offset, more) in [(0, true), (1200, false)] {
            let whole = sent_by(h.a, 4005, stranger(Family::V4), TUNNEL, L4::udp(&[0; 1192]));
            let got = w.from_pod(&Frame { fragment: Some((7, offset, more)), ..whole });
            assert!(["own_envelope", "fragment"].contains(&got.counted[0]), "{got:?}");
        }
    });
}

#[test]
fn no_service_sends_it_for_somebody() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            for backend in [h.node2, stranger(family), h.node] {
                w.table = Default::default();
                w.serve(1, family, None, NODE_PORT, Protocol::Udp, &[SocketAddr::new(backend, TUNNEL)]);
                w.serve(2, family, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(backend, TUNNEL)]);
                let asked = arriving(MAC_UPLINK, h.outside, 4000, h.node, NODE_PORT, L4::udp(b"vxlan"));
                w.from_uplink(&asked).dropped("own_envelope");
                let got = w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"vxlan")));
                assert_eq!((got.verdict, got.counted), (DROP, vec!["own_envelope", "service_translated"]));
            }
        }
    });
}

#[test]
fn nor_is_a_client_answered_there() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            // Somebody outside says that he is a node, which this one does not know, and asks from where envelopes go to.
            for (client, to, pod) in [(stranger(family), h.a, true), (h.outside, h.remote, false)] {
                w.table = Default::default();
                w.serve(1, family, None, NODE_PORT, Protocol::Udp, &[SocketAddr::new(to, 53)]);
                for (port, answered) in [(TUNNEL, false), (TUNNEL + 1, true)] {
                    let asked = arriving(MAC_UPLINK, client, port, h.node, NODE_PORT, L4::udp(b"question"));
                    let asked = w.from_uplink(&asked);
                    let got = if pod {
                        asked.into_pod(w.pod_a);
                        w.from_pod(&sent_by(to, 53, client, port, L4::udp(b"vxlan")))
                    } else {
                        asked.into_tunnel(w, ip("192.168.50.2"));
                        let answer = arriving(MAC_TUNNEL, to, 53, client, port, L4::udp(b"vxlan"));
                        w.from_tunnel(&answer, "192.168.50.2")
                    };
                    if answered {
                        assert_eq!(got.frame().src, SocketAddr::new(h.node, NODE_PORT), "{got:?}");
                    } else {
                        got.dropped("own_envelope");
                    }
                }
            }
        }
    });
}
