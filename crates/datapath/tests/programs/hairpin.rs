//! A pod that reaches itself through its Service, without the socket hook: it sees a source that is not its own, and its answer comes
//! from the Service.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use towpath_datapath::bpf::Hook;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, Frame, L4, RST, SYN};
use crate::services::{speaks_of, unreachable};
use crate::world::*;

fn stand_in(family: Family) -> IpAddr {
    ip(if family == Family::V4 { "169.254.116.9" } else { "fd00:7470::9" })
}

/// Pod a is one of its own Service's endpoints, on another port, with three protocols.
fn serve(w: &mut World, family: Family) {
    let h = hosts(family);
    for (n, protocol) in [(1, Protocol::Tcp), (11, Protocol::Udp), (21, Protocol::Sctp)] {
        w.serve(n + family as u32, family, Some(h.service), 80, protocol, &[SocketAddr::new(h.a, 8080)]);
    }
}

fn ask(w: &World, family: Family, l4: L4) -> Outcome {
    let h = hosts(family);
    w.from_pod(&sent_by(h.a, 4000, h.service, 80, l4))
}

fn answer(w: &World, family: Family, l4: L4) -> Outcome {
    w.from_pod(&sent_by(hosts(family).a, 8080, stand_in(family), 4000, l4))
}

#[test]
fn a_pod_reaches_itself_through_its_service() {
    in_world(|w| {
        // Also one that nobody may reach and that may reach nobody: a pod always reaches itself.
        w.isolate(&w.local_a(), 5, 6);
        w.apply_policy();
        for family in BOTH {
            let h = hosts(family);
            serve(w, family);
            let sctp = |text: &str| L4::Sctp { payload: text.into(), checksum: true };
            for (question, reply) in [
                (L4::syn(), L4::tcp(SYN | ACK)),
                (L4::data(b"more"), L4::data(b"and more")),
                (L4::udp(b"question?"), L4::udp(b"an answer")),
                (sctp("INIT"), sctp("INIT ACK")),
            ] {
                let got = ask(w, family, question.clone()).into_pod(w.pod_a);
                let (from, to) = (SocketAddr::new(stand_in(family), 4000), SocketAddr::new(h.a, 8080));
                assert_eq!((got.src, got.dst, got.l4), (from, to, question));
                assert_eq!((got.dst_mac, got.src_mac), (MAC_A, MAC_HOST));
                let back = answer(w, family, reply.clone()).into_pod(w.pod_a);
                assert_eq!((back.src, back.dst, back.l4), ((h.service, 80).into(), (h.a, 4000).into(), reply));
            }
            assert_eq!(w.programs.connections().unwrap().len(), 3);
            assert_eq!(w.entries::<towpath_datapath::abi::Tuple, towpath_datapath::abi::Nat>("tp_nat").len(), 3);
            // Both go together when their time is over, and only then.
            w.programs.collect().unwrap();
            assert_eq!(w.programs.connections().unwrap().len(), 3);
            w.age(9 * 3600);
            w.programs.collect().unwrap();
            assert!(w.programs.connections().unwrap().is_empty());
            assert!(w.entries::<towpath_datapath::abi::Tuple, towpath_datapath::abi::Nat>("tp_nat").is_empty());
        }
    });
}

#[test]
fn by_a_node_port_too_and_one_address_at_a_time_from_one_port() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            serve(w, family);
            w.serve(31 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.a, 8080)]);
            ask(w, family, L4::syn()).into_pod(w.pod_a);
            let other = |l4| w.from_pod(&sent_by(h.a, 4000, h.node, 30080, l4));
            let refused = other(L4::syn()).into_pod(w.pod_a);
            assert_eq!((refused.src, refused.dst), ((h.node, 30080).into(), (h.a, 4000).into()));
            assert!(matches!(refused.l4, L4::Tcp { flags, .. } if flags & RST != 0), "{refused:?}");
            ask(w, family, L4::tcp(RST)).into_pod(w.pod_a);
            other(L4::syn()).into_pod(w.pod_a);
            let back = answer(w, family, L4::tcp(SYN | ACK)).into_pod(w.pod_a);
            assert_eq!(back.src, SocketAddr::new(h.node, 30080));
        }
    });
}

#[test]
fn its_fragments_and_its_complaints_come_back_to_it() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            serve(w, family);
            for (id, offset, more) in [(9, 0, true), (9, 72, false)] {
                let mut frame = sent_by(h.a, 4000, h.service, 80, L4::udp(&[1; 64]));
                frame.fragment = Some((id, offset, more));
                let got = w.from_pod(&frame);
                assert_eq!((got.verdict, got.kind, got.ifindex), (REDIRECT, 1, w.pod_a), "{got:?}");
                let IpAddr::V4(v4) = stand_in(family) else { continue };
                assert_eq!(got.bytes[26..30], v4.octets());
            }
            let backend = SocketAddr::new(h.a, 8080);
            let error = w.from_pod(&unreachable(MAC_HOST, SocketAddr::new(stand_in(family), 4000), backend));
            speaks_of(&error.into_pod(w.pod_a), (h.a, 4000).into(), (h.service, 80).into());
            // Of nothing that was asked.
            let error = unreachable(MAC_HOST, SocketAddr::new(stand_in(family), 4001), backend);
            w.from_pod(&error).dropped("no_pod");
        }
    });
}

#[test]
fn nobody_begins_anything_with_the_address_and_nobody_comes_from_it() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let own = stand_in(family);
            serve(w, family);
            answer(w, family, L4::syn()).dropped("no_pod");
            answer(w, family, L4::udp(b"x")).dropped("no_pod");
            w.from_pod(&sent_by(h.a, 0, own, 0, L4::echo(h.a.is_ipv4(), true, 7))).dropped("no_pod");
            ask(w, family, L4::syn()).into_pod(w.pod_a);
            ask(w, family, L4::udp(b"x")).into_pod(w.pod_a);
            answer(w, family, L4::syn()).dropped("no_pod");
            // Not of another pod either, whose ports are the same.
            w.from_pod(&sent_by(h.b, 8080, own, 4000, L4::tcp(SYN | ACK))).dropped("no_pod");
            // A datagram that is late begins nothing.
            w.age(600);
            answer(w, family, L4::udp(b"late")).dropped("no_pod");
            ask(w, family, L4::udp(b"x")).into_pod(w.pod_a);

            let forged = |mac| Frame { dst_mac: mac, ..arriving(mac, own, 4000, h.a, 8080, L4::udp(b"x")) };
            w.from_uplink(&forged(MAC_UPLINK)).dropped("spoofed_node");
            w.from_tunnel(&forged(MAC_TUNNEL), "192.168.50.2").dropped("tunnel_source");
            let by_stack = w.run(Hook::ToPod, &forged(MAC_A).bytes(), w.pod_a, w.uplink, None);
            by_stack.dropped("spoofed_node");
            w.from_pod(&sent_by(own, 4000, h.b, 80, L4::syn())).dropped("source_address");
            w.from_pod(&sent_by(own, 4000, h.a, 8080, L4::udp(b"x"))).dropped("source_address");
        }
        w.programs.sweep(std::time::Instant::now() + Duration::from_secs(60)).unwrap();
    });
}
