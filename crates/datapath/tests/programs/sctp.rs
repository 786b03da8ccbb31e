//! SCTP: a Service may lead to another port, although its checksum is a CRC of the whole packet.

use std::net::SocketAddr;

use towpath_model::Protocol;

use crate::frame::{L4, SCTP, crc32c};
use crate::world::*;

fn sctp(payload: &[u8]) -> L4 {
    L4::Sctp { payload: payload.to_vec(), checksum: true }
}

/// Every frame that comes out is read back with its CRC made anew over all of it.
#[test]
fn a_changed_port_leaves_the_checksum_right_at_every_length() {
    assert_eq!(crc32c(b"123456789"), 0xe306_9283, "RFC 3720 B.4 and everybody's check value");
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let mut state = 0x9e37_79b9_7f4a_7c15_u64;
            for n in 0..150u16 {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                let len = if n < 8 { usize::from(n) } else { (state >> 32) as usize % 1400 };
                let payload: Vec<u8> = (0..len).map(|i| (state >> (i % 57)) as u8).collect();
                let (from, to) = (((state >> 16) as u16).max(1), ((state >> 48) as u16).max(1));
                let client = 4000 + n;
                w.serve(1 + family as u32, family, Some(h.service), from, Protocol::Sctp, &[SocketAddr::new(h.b, to)]);
                let asked = w.from_pod(&sent_by(h.a, client, h.service, from, sctp(&payload))).into_pod(w.pod_b);
                assert_eq!((asked.src.port(), asked.dst), (client, SocketAddr::new(h.b, to)));
                assert_eq!(asked.l4, sctp(&payload));
                let back = w.from_pod(&sent_by(h.b, to, h.a, client, sctp(&payload))).into_pod(w.pod_a);
                assert_eq!((back.src, back.l4), (SocketAddr::new(h.service, from), sctp(&payload)));
                w.table = Default::default();
            }
        }
    });
}

#[test]
fn who_comes_from_outside_or_goes_to_another_node_is_translated_too() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30132, Protocol::Sctp, &[SocketAddr::new(h.b, 132)]);
            w.serve(11 + family as u32, family, None, 30133, Protocol::Sctp, &[SocketAddr::new(h.remote, 133)]);
            let ask = |port| w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, port, sctp(b"an INIT")));
            assert_eq!(ask(30132).into_pod(w.pod_b).dst, SocketAddr::new(h.b, 132));
            let back = w.from_pod(&sent_by(h.b, 132, h.outside, 4000, sctp(b"INIT ACK"))).out_of(3, w.uplink);
            assert_eq!((back.src, back.l4), (SocketAddr::new(h.node, 30132), sctp(b"INIT ACK")));
            let gone = ask(30133).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!((gone.dst, gone.l4), (SocketAddr::new(h.remote, 133), sctp(b"an INIT")));
            let answer = arriving(MAC_TUNNEL, h.remote, 133, h.outside, 4000, sctp(b"INIT ACK"));
            let back = w.from_tunnel(&answer, "192.168.50.2").out_of(3, w.uplink);
            assert_eq!(back.src, SocketAddr::new(h.node, 30133));
        }
    });
}

#[test]
fn a_checksum_that_is_not_there_is_not_made_up() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Sctp, &[SocketAddr::new(h.b, 8080)]);
            let bare = L4::Sctp { payload: b"left to the device".to_vec(), checksum: false };
            let got = w.from_pod(&sent_by(h.a, 4000, h.service, 80, bare.clone())).into_pod(w.pod_b);
            assert_eq!((got.dst.port(), got.l4), (8080, bare));
            // A wrong one stays as wrong as it was, for the receiver to find.
            let mut wrong = sent_by(h.a, 4000, h.service, 80, sctp(b"x")).bytes();
            let at = wrong.len() - 1;
            wrong[at] ^= 1;
            let got = w.run(towpath_datapath::bpf::Hook::FromPod, &wrong, w.pod_a, w.pod_a, None);
            let l4 = &got.bytes[got.bytes.len() - 13..];
            let zeroed = [&l4[..8], &[0; 4], &l4[12..]].concat();
            assert_ne!(crc32c(&zeroed).to_le_bytes(), l4[8..12], "{got:?}");
        }
    });
}

/// How much follows the first fragment is not known there, so neither is what the change of a port does to the checksum.
#[test]
fn fragments_pass_where_the_port_stays_and_are_dropped_and_counted_where_it_does_not() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Sctp, &[SocketAddr::new(h.b, 80)]);
            w.serve(11 + family as u32, family, Some(h.service), 81, Protocol::Sctp, &[SocketAddr::new(h.b, 8081)]);
            let first = |port, id| {
                let mut frame = sent_by(h.a, 4000, h.service, port, sctp(&[1; 60]));
                frame.fragment = Some((id, 0, true));
                w.from_pod(&frame)
            };
            let stays = first(80, 1);
            assert_eq!((stays.verdict, stays.ifindex), (REDIRECT, w.pod_b));
            first(81, 2).dropped("fragment");
        }
    });
}

#[test]
fn what_is_too_short_for_a_checksum_is_no_packet_of_sctp() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Sctp, &[SocketAddr::new(h.b, 8080)]);
            let bytes = [4000u16.to_be_bytes(), 80u16.to_be_bytes(), [0; 2], [0; 2], [1; 2]].concat();
            w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::Raw { proto: SCTP, bytes })).dropped("malformed");
            // A Service without a backend is not answered: what would answer SCTP is an ABORT with the sender's own tag.
            w.serve(11 + family as u32, family, Some(h.service), 82, Protocol::Sctp, &[]);
            w.from_pod(&sent_by(h.a, 4000, h.service, 82, sctp(b"x"))).dropped("no_backend");
        }
    });
}
