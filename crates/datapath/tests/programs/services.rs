//! Services on the veth path: translated once a connection, translated back, refused at once without a backend.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, FIN, L4, RST, SYN};
use crate::world::*;

#[test]
fn a_service_is_translated_and_its_answer_translated_back() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.b, 8080);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[backend]);
            w.serve(11 + family as u32, family, Some(h.service), 80, Protocol::Udp, &[backend]);
            for (ask, answer) in [(L4::syn(), L4::tcp(SYN | ACK)), (L4::udp(b"question?"), L4::udp(b"an answer"))] {
                let got = w.from_pod(&sent_by(h.a, 4000, h.service, 80, ask.clone())).into_pod(w.pod_b);
                assert_eq!((got.src.ip(), got.dst), (h.a, backend));
                assert_eq!(got.l4, ask);
                let back = w.from_pod(&sent_by(h.b, 8080, h.a, 4000, answer.clone())).into_pod(w.pod_a);
                assert_eq!(back.src, SocketAddr::new(h.service, 80));
                assert_eq!(back.l4, answer);
                let again = w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::data(b"more")));
                if matches!(ask, L4::Tcp { .. }) {
                    assert_eq!(again.into_pod(w.pod_b).dst, backend);
                }
            }
        }
    });
}

/// A client that reaches one backend by two addresses from one port has two connections, of which the backend knows one. What the
/// second sends is refused while the first is open, so that neither gets the other's answers.
#[test]
fn who_asks_one_backend_by_two_addresses_from_one_port_gets_no_answer_of_the_others() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.b, 8080);
            for (n, protocol) in [(1, Protocol::Tcp), (11, Protocol::Udp)] {
                w.serve(n + family as u32, family, Some(h.service), 80, protocol, &[backend]);
                w.serve(n + 20 + family as u32, family, None, 30080, protocol, &[backend]);
            }
            let (by_service, by_port) = ((h.service, 80), (h.node, 30080));
            let send = |w: &World, to: (std::net::IpAddr, u16), l4| w.from_pod(&sent_by(h.a, 4000, to.0, to.1, l4));
            let answered_by = |w: &World, l4| w.from_pod(&sent_by(h.b, 8080, h.a, 4000, l4)).into_pod(w.pod_a).src;
            let reset = |frame: crate::frame::Frame, from: (std::net::IpAddr, u16)| {
                assert_eq!((frame.src, frame.dst), (from.into(), SocketAddr::new(h.a, 4000)));
                assert!(matches!(frame.l4, L4::Tcp { flags, .. } if flags & RST != 0), "{frame:?}");
            };
            for (first, second) in [(by_service, by_port), (by_port, by_service)] {
                send(w, first, L4::syn()).into_pod(w.pod_b);
                for other in [second, (h.b, 8080)] {
                    // While the first shakes hands, and when it is open.
                    reset(send(w, other, L4::syn()).into_pod(w.pod_a), other);
                    assert_eq!(answered_by(w, L4::tcp(SYN | ACK)), first.into());
                    send(w, first, L4::data(b"x")).into_pod(w.pod_b);
                    reset(send(w, other, L4::syn()).into_pod(w.pod_a), other);
                    assert_eq!(answered_by(w, L4::data(b"y")), first.into());
                }
                // When it is closed, the port is free.
                send(w, first, L4::tcp(RST)).into_pod(w.pod_b);
                send(w, second, L4::syn()).into_pod(w.pod_b);
                assert_eq!(answered_by(w, L4::tcp(SYN | ACK)), second.into());
                send(w, second, L4::tcp(RST)).into_pod(w.pod_b);
            }
            // The pod itself, and then by the Service.
            send(w, (h.b, 8080), L4::syn()).into_pod(w.pod_b);
            reset(send(w, by_service, L4::syn()).into_pod(w.pod_a), by_service);
            assert_eq!(answered_by(w, L4::tcp(SYN | ACK)), SocketAddr::new(h.b, 8080));
            // One socket may send to both, without a connection.
            send(w, by_service, L4::udp(b"x")).into_pod(w.pod_b);
            for other in [by_port, (h.b, 8080)] {
                let refused = send(w, other, L4::udp(b"x")).into_pod(w.pod_a);
                assert!(refused.src.ip() == other.0 && matches!(refused.l4, L4::Icmp { .. }), "{refused:?}");
            }
            assert_eq!(answered_by(w, L4::udp(b"y")), by_service.into());
            send(w, by_service, L4::udp(b"x")).into_pod(w.pod_b);
        }
    });
}

#[test]
fn who_is_outside_is_told_apart_by_the_address_that_was_asked() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            for (n, port) in [(1, 30080), (11, 30081)] {
                w.serve(n + family as u32, family, None, port, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
            }
            let ask = |w: &World, port, l4| w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, port, l4));
            ask(w, 30080, L4::syn()).into_pod(w.pod_b);
            let refused = ask(w, 30081, L4::syn()).out_of(2, w.uplink);
            assert_eq!(refused.src, SocketAddr::new(h.node, 30081));
            let answer = w.from_pod(&sent_by(h.b, 8080, h.outside, 4000, L4::tcp(SYN | ACK))).out_of(3, w.uplink);
            assert_eq!(answer.src, SocketAddr::new(h.node, 30080));
        }
    });
}

#[test]
fn a_udp_packet_without_a_checksum_stays_without() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(h.b, 5353)]);
        let bare = L4::Udp { payload: b"query".to_vec(), checksum: false };
        let got = w.from_pod(&sent_by(h.a, 4000, h.service, 53, bare.clone())).into_pod(w.pod_b);
        assert_eq!((got.dst.port(), got.l4), (5353, bare));
    });
}

#[test]
fn a_remote_backend_is_reached_through_the_tunnel_and_its_answer_restored() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            let out = w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!(out.dst, SocketAddr::new(h.remote, 8080));
            let back = arriving(MAC_TUNNEL, h.remote, 8080, h.a, 4000, L4::tcp(SYN | ACK));
            let back = w.from_tunnel(&back, "192.168.50.2").into_pod(w.pod_a);
            assert_eq!(back.src, SocketAddr::new(h.service, 80));
        }
    });
}

#[test]
fn a_connection_keeps_its_backend_and_a_new_one_chooses_again() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (1..=8).map(|n| SocketAddr::new(h.b, 8000 + n)).collect();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &backends);
        let port_of =
            |w: &World, sport, l4| w.from_pod(&sent_by(h.a, sport, h.service, 80, l4)).into_pod(w.pod_b).dst.port();
        let mut seen = std::collections::BTreeSet::new();
        for sport in 4000..4100 {
            let first = port_of(w, sport, L4::syn());
            seen.insert(first);
            // A retransmission, and what follows, go where the first went.
            assert_eq!(port_of(w, sport, L4::syn()), first);
            assert_eq!(port_of(w, sport, L4::data(b"x")), first);
        }
        assert_eq!(seen.len(), 8);
        // A connection outlives its backend's place in the list.
        let stays = port_of(w, 4000, L4::data(b"x"));
        let keep = backends.iter().find(|b| b.port() != stays).copied().unwrap();
        let id = *w.table.backends.iter().find(|(_, b)| b.port == keep.port()).unwrap().0;
        w.table.frontends.values_mut().map(std::sync::Arc::make_mut).for_each(|target| target.backends = vec![id]);
        w.apply_services();
        w.programs.sweep(Instant::now() + Duration::from_secs(60)).unwrap();
        assert_eq!(port_of(w, 4000, L4::data(b"x")), stays);
        assert_eq!(port_of(w, 4200, L4::syn()), keep.port());
    });
}

/// Who writes a client's address and a SYN takes its connection to nobody else (and a client whose port has come round is told by the open end).
#[test]
fn a_syn_of_a_connection_that_is_open_goes_where_that_goes_and_once_it_is_closed_chooses() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let family = if h.a.is_ipv4() { Family::V4 } else { Family::V6 };
            let backends: Vec<SocketAddr> = (1..=8).map(|n| SocketAddr::new(h.b, 8000 + n)).collect();
            w.serve(1, family, Some(h.service), 80, Protocol::Tcp, &backends);
            let asks = |w: &World, l4| w.from_pod(&sent_by(h.a, 4000, h.service, 80, l4)).into_pod(w.pod_b).dst.port();
            let from_outside = |w: &World, l4| {
                let frame = arriving(MAC_UPLINK, h.outside, 4000, h.service, 80, l4);
                w.from_uplink(&frame).into_pod(w.pod_b).dst.port()
            };
            for client in [h.a, h.outside] {
                let sends = |w: &World, l4| if client == h.a { asks(w, l4) } else { from_outside(w, l4) };
                let first = sends(w, L4::syn());
                w.from_pod(&sent_by(h.b, first, client, 4000, L4::tcp(SYN | ACK)));
                assert_eq!(sends(w, L4::tcp(ACK)), first);
                let again: BTreeSet<u16> = (0..40).map(|_| sends(w, L4::syn())).collect();
                assert_eq!(again, [first].into(), "of {client}");
                assert_eq!(sends(w, L4::data(b"goes on")), first);
                // What a client answers that began anew, and was told what is open.
                assert_eq!(sends(w, L4::tcp(RST)), first);
                let seen: BTreeSet<u16> = (0..100)
                    .map(|_| {
                        let chosen = sends(w, L4::syn());
                        sends(w, L4::tcp(RST));
                        chosen
                    })
                    .collect();
                assert!(seen.len() > 4, "{seen:?}");
            }
        }
    });
}

#[test]
fn a_backend_that_is_gone_lets_go_of_what_was_pinned_to_it() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(h.remote, 53)]);
        w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"x"))).into_tunnel(w, ip("192.168.50.2"));
        w.table = ServiceTable::default();
        w.serve(2, Family::V4, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(h.b, 53)]);
        // Within the grace period the same socket still talks to the old one, afterwards to the new.
        w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"x"))).into_tunnel(w, ip("192.168.50.2"));
        assert!(w.programs.sweep(Instant::now() + Duration::from_secs(10)).unwrap() >= 3);
        w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"x"))).into_pod(w.pod_b);
    });
}

#[test]
fn client_affinity_holds_a_client_until_its_backend_leaves_the_list() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (1..=8).map(|n| SocketAddr::new(h.b, 8000 + n)).collect();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &backends);
        w.table
            .frontends
            .values_mut()
            .map(std::sync::Arc::make_mut)
            .for_each(|target| target.affinity_seconds = Some(60));
        w.apply_services();
        let ports = |w: &World| -> std::collections::BTreeSet<u16> {
            let new = |sport| w.from_pod(&sent_by(h.a, sport, h.service, 80, L4::syn())).into_pod(w.pod_b).dst.port();
            (4000..4040).map(new).collect()
        };
        let held = ports(w);
        assert_eq!(held.len(), 1);
        let port = *held.first().unwrap();
        let gone = *w.table.backends.iter().find(|(_, b)| b.port == port).unwrap().0;
        w.table
            .frontends
            .values_mut()
            .map(std::sync::Arc::make_mut)
            .for_each(|target| target.backends.retain(|b| *b != gone));
        w.apply_services();
        let moved: std::collections::BTreeSet<u16> = (5000..5040)
            .map(|sport| w.from_pod(&sent_by(h.a, sport, h.service, 80, L4::syn())).into_pod(w.pod_b).dst.port())
            .collect();
        assert_eq!(moved.len(), 1);
        assert!(!moved.contains(&port));
    });
}

#[test]
fn without_a_backend_tcp_gets_a_reset() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[]);
            let back = w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_pod(w.pod_a);
            assert_eq!((back.src, back.dst), (SocketAddr::new(h.service, 80), SocketAddr::new(h.a, 4000)));
            assert_eq!((back.dst_mac, back.src_mac), (MAC_A, MAC_HOST));
            assert_eq!(back.l4, L4::Tcp { flags: RST | ACK, seq: 0, ack: 1001, payload: vec![] });
            let back = w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::data(b"late"))).into_pod(w.pod_a);
            assert!(matches!(back.l4, L4::Tcp { flags: RST, seq: 7000, ack: 0, .. }), "{back:?}");
            w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::tcp(RST))).dropped("no_backend");
            // A finished half is counted into what is acknowledged.
            let fin = L4::Tcp { flags: FIN, seq: 10, ack: 0, payload: b"abc".to_vec() };
            let back = w.from_pod(&sent_by(h.a, 4000, h.service, 80, fin)).into_pod(w.pod_a);
            assert!(matches!(back.l4, L4::Tcp { ack: 14, .. }), "{back:?}");
        }
        assert!(w.programs.connections().unwrap().is_empty());
    });
}

#[test]
fn without_a_backend_udp_gets_port_unreachable() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 53, Protocol::Udp, &[]);
            for payload in [b"".as_slice(), b"x", &[5; 900]] {
                let ask = sent_by(h.a, 4000, h.service, 53, L4::udp(payload));
                let back = w.from_pod(&ask).into_pod(w.pod_a);
                assert_eq!((back.src.ip(), back.dst.ip(), back.dst_mac), (h.service, h.a, MAC_A));
                let L4::Icmp { kind, code, payload: quoted, .. } = back.l4 else { panic!("{back:?}") };
                let (expected, quote) = if family == Family::V4 { ((3, 3), 28) } else { ((1, 4), 48) };
                assert_eq!((kind, code), expected);
                assert_eq!(quoted, ask.packet()[..quote]);
            }
        }
    });
}

#[test]
fn a_service_address_does_not_answer_pings() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 80)]);
            w.from_pod(&sent_by(h.a, 0, h.service, 0, L4::echo(h.a.is_ipv4(), true, 5))).dropped("service_icmp");
        }
    });
}

#[test]
fn egress_policy_sees_the_backend_and_not_the_service() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        let a = w.local_a();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
        w.isolate(&a, 0, 6);
        w.allow(6, h.b, RowProtocol::Ports(Protocol::Tcp), 80, 1);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).dropped("egress_policy");
        w.allow(6, h.b, RowProtocol::Ports(Protocol::Tcp), 8080, 2);
        w.apply_policy();
        w.from_pod(&sent_by(h.a, 4000, h.service, 80, L4::syn())).into_pod(w.pod_b);
    });
}

#[test]
fn fragments_of_a_translated_datagram_go_the_same_way() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, Some(h.service), 53, Protocol::Udp, &[SocketAddr::new(h.b, 5353)]);
        let mut first = sent_by(h.a, 4000, h.service, 53, L4::udp(&[1; 64]));
        let mut later = first.clone();
        first.fragment = Some((9, 0, true));
        later.fragment = Some((9, 72, false));
        for frame in [first, later] {
            let outcome = w.from_pod(&frame);
            assert_eq!((outcome.verdict, outcome.ifindex), (REDIRECT, w.pod_b));
            assert_eq!(outcome.bytes[30..34], [10, 1, 0, 11]);
            assert_eq!(crate::frame::sum(&[&outcome.bytes[14..34]]), 0);
        }
    });
}

/// An ICMP error of a backend about the translated packet `client` → `backend`.
pub fn unreachable(mac: crate::frame::Mac, client: SocketAddr, backend: SocketAddr) -> crate::frame::Frame {
    let inner = sent_by(client.ip(), client.port(), backend.ip(), backend.port(), L4::udp(b"hello")).packet();
    let (kind, code) = if client.is_ipv4() { (3, 3) } else { (1, 4) };
    let mut frame = sent_by(backend.ip(), 0, client.ip(), 0, L4::Icmp { kind, code, rest: [0; 4], payload: inner });
    frame.dst_mac = mac;
    frame
}

/// The error comes from the Service and quotes what the client sent.
#[track_caller]
pub fn speaks_of(error: &crate::frame::Frame, client: SocketAddr, service: SocketAddr) {
    assert_eq!((error.src.ip(), error.dst.ip()), (service.ip(), client.ip()));
    let L4::Icmp { payload: quoted, .. } = &error.l4 else { panic!("{error:?}") };
    let sent = sent_by(client.ip(), client.port(), service.ip(), service.port(), L4::udp(b"hello")).packet();
    // All but the checksum of the quoted transport header.
    let header = if client.is_ipv4() { 20 } else { 40 };
    assert_eq!(quoted[..header + 6], sent[..header + 6]);
}

#[test]
fn an_icmp_error_of_a_backend_speaks_of_the_service() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let (name, backend) = (SocketAddr::new(h.service, 53), SocketAddr::new(h.b, 5353));
            w.serve(1 + family as u32, family, Some(h.service), 53, Protocol::Udp, &[backend]);
            w.serve(11 + family as u32, family, None, 30053, Protocol::Udp, &[backend]);
            w.serve(21 + family as u32, family, None, 30054, Protocol::Udp, &[SocketAddr::new(h.remote, 5353)]);
            // Same node.
            let client = SocketAddr::new(h.a, 4000);
            w.from_pod(&sent_by(h.a, 4000, h.service, 53, L4::udp(b"hello"))).into_pod(w.pod_b);
            speaks_of(&w.from_pod(&unreachable(MAC_HOST, client, backend)).into_pod(w.pod_a), client, name);
            // The client is outside, the backend here.
            let client = SocketAddr::new(h.outside, 4000);
            let ask = |port| arriving(MAC_UPLINK, h.outside, 4000, h.node, port, L4::udp(b"hello"));
            w.from_uplink(&ask(30053)).into_pod(w.pod_b);
            let error = w.from_pod(&unreachable(MAC_HOST, client, backend)).out_of(3, w.uplink);
            speaks_of(&error, client, SocketAddr::new(h.node, 30053));
            // The client is outside, the backend behind another node.
            w.from_uplink(&ask(30054)).into_tunnel(w, ip("192.168.50.2"));
            let complaint = unreachable(MAC_TUNNEL, client, SocketAddr::new(h.remote, 5353));
            let error = w.from_tunnel(&complaint, "192.168.50.2").out_of(3, w.uplink);
            speaks_of(&error, client, SocketAddr::new(h.node, 30054));
            // Of a flow that nobody has, nothing is said outside.
            let other = unreachable(MAC_TUNNEL, SocketAddr::new(h.outside, 4001), SocketAddr::new(h.remote, 5353));
            w.from_tunnel(&other, "192.168.50.2").dropped("no_pod");
        }
    });
}

/// A table out of few addresses, ports and backends, so that they come back, in every way that entries differ.
fn some_table(seed: u64) -> ServiceTable {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut below = |limit: u64| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 11) % limit
    };
    let mut table = ServiceTable::default();
    for n in 1..=6u32 {
        if below(4) > 0 {
            let address = hosts(Family::V4).b;
            table
                .backends
                .insert(BackendId(n), BackendAddress { address, port: 8000 + n as u16, protocol: Protocol::Tcp });
        }
    }
    for n in 0..8u32 {
        if below(3) == 0 {
            continue;
        }
        let backends: Vec<BackendId> = table.backends.keys().copied().filter(|_| below(2) == 0).collect();
        let algorithm = Algorithm::ALL[below(5) as usize];
        let hashed = algorithm.hashes() && !backends.is_empty();
        let ranges: Vec<ipnet::IpNet> =
            (0..below(3)).map(|_| format!("10.{}.0.0/16", below(3)).parse().unwrap()).collect();
        let target = FrontendTarget {
            id: ServiceId(n + 1),
            table: if hashed { backends.iter().copied().cycle().take(23).collect() } else { Default::default() },
            backends,
            algorithm,
            affinity_seconds: (below(3) == 0).then_some(60),
            clients: if below(3) == 0 { Clients::Pods } else { Clients::All },
            sources: (below(3) == 0).then(|| ranges.into()),
            service: towpath_model::NamespacedName::new("default", "svc"),
            port_name: String::new(),
        };
        // Two ports at each of four addresses, one of them "any node address".
        let address = [Some(ip("10.96.0.1")), Some(ip("10.96.0.2")), Some(ip("10.96.0.3")), None][n as usize / 2];
        let frontend = Frontend { address, family: Family::V4, port: 80 + (n % 2) as u16, protocol: Protocol::Tcp };
        if address.is_none() && below(2) == 0 {
            table.inside.insert(frontend, target.clone().into());
        }
        table.frontends.insert(frontend, target.into());
    }
    table
}

fn difference(from: &ServiceTable, to: &ServiceTable) -> ServiceChanges {
    fn of<K: Ord + Copy, V: Clone + PartialEq>(from: &BTreeMap<K, V>, to: &BTreeMap<K, V>) -> BTreeMap<K, Option<V>> {
        let keys: std::collections::BTreeSet<K> = from.keys().chain(to.keys()).copied().collect();
        keys.into_iter().filter(|k| from.get(k) != to.get(k)).map(|k| (k, to.get(&k).cloned())).collect()
    }
    ServiceChanges {
        frontends: of(&from.frontends, &to.frontends),
        inside: of(&from.inside, &to.inside),
        lingering: of(&from.lingering, &to.lingering),
        backends: of(&from.backends, &to.backends),
    }
}

#[test]
fn changes_one_by_one_end_where_the_whole_table_does() {
    in_both_worlds(|w| {
        let mut now = Instant::now();
        let mut table = some_table(0);
        assert!(
            w.programs.apply_service_changes(&difference(&Default::default(), &table), now).is_err(),
            "changes of what?"
        );
        w.programs.apply_services(&table, now).unwrap();
        for seed in 1..150 {
            let next = some_table(seed);
            now += Duration::from_millis(700);
            w.programs.apply_service_changes(&difference(&table, &next), now).unwrap();
            w.programs.sweep(now).unwrap();
            let left = w.programs.apply_services(&next, now).unwrap();
            assert_eq!(left, Default::default(), "after {seed} the whole table was another");
            table = next;
        }
        w.programs.apply_service_changes(&difference(&table, &Default::default()), now).unwrap();
        // Counts of connections stay the longest.
        w.programs.sweep(now + Duration::from_secs(400)).unwrap();
        for map in ["tp_services", "tp_slots", "tp_backends", "tp_source_ranges", "tp_loads"] {
            assert_eq!(libbpf_rs::MapCore::keys(&w.map(map)).count(), 0, "{map}");
        }
    });
}

#[test]
fn a_table_that_is_full_leaves_out_what_came_last_and_touches_nothing_else() {
    for (map, limit) in [("tp_services", 8u32), ("tp_slots", 6), ("tp_backends", 5)] {
        let mut limits = towpath_datapath::bpf::Limits::default();
        match map {
            "tp_services" => limits.services = limit,
            "tp_slots" => limits.slots = limit,
            _ => limits.backends = limit,
        }
        in_world_with(limits, move |w| {
            let h = hosts(Family::V4);
            let at = |n: u8| IpAddr::from([10, 96, 1, n]);
            let mut left_out = Vec::new();
            let mut fit = 0;
            for n in 1..=9u8 {
                let backends = [SocketAddr::new(h.b, 8000 + u16::from(n))];
                let mut table = w.table.clone();
                put_service(&mut table, u32::from(n), at(n), &backends);
                w.table = table;
                let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
                match applied.left_out.as_slice() {
                    [] => fit = n,
                    some => left_out = some.to_vec(),
                }
            }
            assert!((3..9).contains(&fit), "{map}: {fit} fit");
            assert_eq!(left_out.len(), usize::from(9 - fit), "{map}: {left_out:?}");
            assert!(
                left_out[0].reason.contains(map) && left_out[0].reason.contains(&limit.to_string()),
                "{left_out:?}"
            );
            assert!(left_out[0].service.name.starts_with("svc-"), "{left_out:?}");
            for n in 1..=fit {
                let got = w.from_pod(&sent_by(h.a, 4000 + u16::from(n), at(n), 80, L4::syn())).into_pod(w.pod_b);
                assert_eq!(got.dst.port(), 8000 + u16::from(n), "{map}");
            }
            // One goes, and when its grace is over there is room for another.
            let gone = w.table.frontends.keys().next().copied().unwrap();
            let target = w.table.frontends.remove(&gone).unwrap();
            w.table.backends.retain(|id, _| !target.backends.contains(id));
            w.programs.apply_services(&w.table, Instant::now()).unwrap();
            w.programs.sweep(Instant::now() + Duration::from_secs(10)).unwrap();
            let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
            assert_eq!(applied.left_out.len(), left_out.len() - 1, "{map}");
            // What there is room for follows changes meanwhile, and the others are not forgotten.
            let changed = w.programs.apply_service_changes(&ServiceChanges::default(), Instant::now()).unwrap();
            assert_eq!(changed.left_out.len(), applied.left_out.len());
        });
    }
}

fn put_service(table: &mut ServiceTable, n: u32, address: IpAddr, to: &[SocketAddr]) {
    let mut backends = Vec::new();
    for (index, at) in (1u32..).zip(to) {
        let id = BackendId(n * 100 + index);
        backends.push(id);
        table.backends.insert(id, BackendAddress { address: at.ip(), port: at.port(), protocol: Protocol::Tcp });
    }
    let target = FrontendTarget {
        id: ServiceId(n),
        backends,
        algorithm: Algorithm::Random,
        table: Default::default(),
        affinity_seconds: None,
        clients: Clients::All,
        sources: None,
        service: towpath_model::NamespacedName::new("default", format!("svc-{n}")),
        port_name: String::new(),
    };
    let frontend = Frontend { address: Some(address), family: Family::V4, port: 80, protocol: Protocol::Tcp };
    table.frontends.insert(frontend, target.into());
}
