//! Clients outside whose backend is no pod: another node, an address outside the cluster, this node itself.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpListener, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use towpath_datapath::abi::*;
use towpath_datapath::bpf::{Hook, Limits};
use towpath_model::desired::Algorithm;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, FIN, Frame, L4, RST, SYN};
use crate::services::{speaks_of, unreachable};
use crate::world::*;

const NODE_PORT: u16 = 30080;
const PORTS: std::ops::RangeInclusive<u16> = TP_SNAT_PORT_MIN as u16..=TP_SNAT_PORT_MAX as u16;

fn sctp(payload: &[u8]) -> L4 {
    L4::Sctp { payload: payload.to_vec(), checksum: true }
}

/// Somebody outside who is no client.
fn far(family: Family) -> IpAddr {
    if family == Family::V4 { ip("203.0.113.77") } else { ip("2001:db8:77::77") }
}

fn serve(w: &mut World, family: Family, protocol: Protocol, backend: SocketAddr) {
    w.serve(1 + family as u32 + 10 * protocol as u32, family, None, NODE_PORT, protocol, &[backend]);
}

fn ask(w: &World, h: &Hosts, port: u16, l4: L4) -> Outcome {
    w.from_uplink(&arriving(MAC_UPLINK, h.outside, port, h.node, NODE_PORT, l4))
}

/// What comes from the network to the node.
fn answer(w: &World, from: SocketAddr, to: SocketAddr, l4: L4) -> Outcome {
    w.from_uplink(&arriving(MAC_UPLINK, from.ip(), from.port(), to.ip(), to.port(), l4))
}

/// What a socket of the node sends out.
fn out(w: &World, frame: &Frame) -> Outcome {
    w.run(Hook::ToUplink, &frame.bytes(), w.uplink, 0, None)
}

fn say(from: SocketAddr, to: SocketAddr, l4: L4) -> Frame {
    sent_by(from.ip(), from.port(), to.ip(), to.port(), l4)
}

/// Lets every one of these connections have been idle for so much longer.
fn age(w: &World, seconds: u64) {
    for (answer, snat) in w.entries::<Tuple, Snat>("tp_snat") {
        let back = |time: u64| time.checked_sub(seconds * 1_000_000_000).unwrap();
        let (last_seen, created) = (back(snat.last_seen), back(snat.created));
        w.write("tp_snat", &answer, &Snat { last_seen, created, ..snat });
    }
}

fn entries(w: &World) -> (usize, usize) {
    (w.entries::<Tuple, Snat>("tp_snat").len(), w.entries::<Tuple, SnatWay>("tp_snat_asked").len())
}

#[test]
fn a_backend_that_is_no_pod_sees_the_node_and_the_client_the_service() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            for (first, backend) in [(4000, h.node2), (5000, far(family))] {
                for (n, protocol, question, reply) in [
                    (0, Protocol::Tcp, L4::syn(), L4::tcp(SYN | ACK)),
                    (1, Protocol::Udp, L4::udp(b"q?"), L4::udp(b"answer")),
                    (2, Protocol::Sctp, sctp(b"INIT"), sctp(b"INIT ACK")),
                ] {
                    let backend = SocketAddr::new(backend, 8080 + n);
                    w.table = Default::default();
                    serve(w, family, protocol, backend);
                    let client = SocketAddr::new(h.outside, first + n);
                    let asked = ask(w, &h, client.port(), question.clone());
                    assert_eq!(asked.counted, ["host_out", "service_translated"]);
                    let asked = asked.out_of(3, w.uplink);
                    assert_eq!((asked.src.ip(), asked.dst, asked.ttl), (h.node, backend, 63));
                    assert!(PORTS.contains(&asked.src.port()), "{asked:?}");
                    assert_eq!(asked.l4, question);
                    let back = answer(w, backend, asked.src, reply.clone()).out_of(3, w.uplink);
                    assert_eq!((back.src, back.dst), (SocketAddr::new(h.node, NODE_PORT), client));
                    assert_eq!((back.l4, back.ttl), (reply, 63));
                    // It goes on as it began, also when the Service has another backend.
                    let other = SocketAddr::new(h.b, 1);
                    w.table = Default::default();
                    w.serve(100 + n as u32, family, None, NODE_PORT, protocol, &[other]);
                    let more = if protocol == Protocol::Tcp { L4::data(b"more") } else { question };
                    let again = ask(w, &h, client.port(), more).out_of(3, w.uplink);
                    assert_eq!((again.src, again.dst), (asked.src, backend));
                    // Nobody else is answered there: it is the node's own business.
                    let stranger = SocketAddr::new(backend.ip(), 9);
                    assert_eq!(answer(w, stranger, asked.src, L4::udp(b"x")).passed().frame().dst, asked.src);
                }
            }
        }
    });
}

#[test]
fn clients_with_one_port_get_a_port_each() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 8080);
            serve(w, family, Protocol::Tcp, backend);
            let client = |n: u8| match h.outside {
                IpAddr::V4(_) => IpAddr::from([198, 51, 100, n]),
                IpAddr::V6(_) => ip(&format!("fd99::{n:x}")),
            };
            let mut ports = BTreeSet::new();
            for n in 100..200 {
                let syn = arriving(MAC_UPLINK, client(n), 4000, h.node, NODE_PORT, L4::syn());
                let first = w.from_uplink(&syn).out_of(3, w.uplink).src;
                assert_eq!(w.from_uplink(&syn).out_of(3, w.uplink).src, first, "a SYN that is sent again");
                assert!(ports.insert(first.port()), "port {} twice", first.port());
                let back = answer(w, backend, first, L4::tcp(SYN | ACK)).out_of(3, w.uplink);
                assert_eq!(back.dst, SocketAddr::new(client(n), 4000));
            }
        }
        assert_eq!(entries(w), (200, 200));
        assert_eq!(w.programs.connections().unwrap().len(), 200);
    });
}

#[test]
fn a_backend_that_is_this_node_sees_the_client_and_its_answer_comes_from_the_service() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let client = SocketAddr::new(h.outside, 4000);
            for (protocol, question, reply) in [
                (Protocol::Tcp, L4::syn(), L4::tcp(SYN | ACK)),
                (Protocol::Udp, L4::udp(b"q?"), L4::udp(b"answer")),
                (Protocol::Sctp, sctp(b"INIT"), sctp(b"INIT ACK")),
            ] {
                let backend = SocketAddr::new(h.node, 8080);
                serve(w, family, protocol, backend);
                w.serve(60 + family as u32 + 10 * protocol as u32, family, Some(h.service), 80, protocol, &[backend]);
                let asked = ask(w, &h, 4000, question.clone()).passed().frame();
                assert_eq!((asked.src, asked.dst, asked.l4), (client, backend, question.clone()));
                let back = out(w, &say(backend, client, reply.clone())).passed().frame();
                assert_eq!((back.src, back.dst, back.l4), (SocketAddr::new(h.node, NODE_PORT), client, reply.clone()));
                // What passes the node is not looked at, nor what the socket says to others.
                let forwarded =
                    w.run(Hook::ToUplink, &say(backend, client, reply.clone()).bytes(), w.uplink, w.pod_a, None);
                assert_eq!(forwarded.passed().frame().src, backend);
                let other = SocketAddr::new(h.outside, 4001);
                assert_eq!(out(w, &say(backend, other, reply)).passed().frame().src, backend);
                // The same ends by way of another address: nobody could tell the two apart.
                let at = arriving(MAC_UPLINK, h.outside, 4000, h.service, 80, question);
                let refused = w.from_uplink(&at);
                match protocol {
                    Protocol::Sctp => refused.dropped("no_backend"),
                    _ => assert_eq!(refused.out_of(2, w.uplink).src.ip(), h.service),
                }
            }
        }
    });
}

#[test]
fn a_connection_that_the_client_has_with_the_node_itself_is_not_taken_over() {
    in_world(|w| {
        sh("ip addr add 198.51.100.9/32 dev lo");
        let h = hosts(Family::V4);
        let listener = TcpListener::bind((h.node, 8080)).unwrap();
        let direct = connection_from(SocketAddr::new(h.outside, 4000), SocketAddr::new(h.node, 8080));
        sh("ip addr del 198.51.100.9/32 dev lo");
        serve(w, Family::V4, Protocol::Tcp, SocketAddr::new(h.node, 8080));
        assert_eq!(ask(w, &h, 4000, L4::syn()).out_of(2, w.uplink).src, SocketAddr::new(h.node, NODE_PORT));
        ask(w, &h, 4001, L4::syn()).passed();
        assert_eq!(entries(w), (1, 1));
        drop((direct, listener));
    });
}

/// A connection from a chosen port.
fn connection_from(from: SocketAddr, to: SocketAddr) -> std::os::fd::OwnedFd {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, socket};
    use std::os::fd::AsRawFd;
    let made = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None).unwrap();
    bind(made.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
    connect(made.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    made
}

#[test]
fn errors_about_either_direction_are_translated_inside_too() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let router = if family == Family::V4 { ip("203.0.113.1") } else { ip("2001:db8:7::1") };
            let client = SocketAddr::new(h.outside, 4000);
            let service = SocketAddr::new(h.node, NODE_PORT);
            let backend = SocketAddr::new(far(family), 5353);
            let header = if family == Family::V4 { 20 } else { 40 };
            serve(w, family, Protocol::Udp, backend);
            let source = ask(w, &h, 4000, L4::udp(b"hello")).out_of(3, w.uplink).src;
            // Of what was sent to the backend: by the backend, by somebody on the way, and that it is too big.
            for from in [backend.ip(), router] {
                for too_big in [false, true] {
                    let mut error = unreachable(MAC_UPLINK, source, backend);
                    error.src = SocketAddr::new(from, 0);
                    error.src_mac = MAC_ROUTER;
                    let room = [0, 0, 5, 0];
                    if let (L4::Icmp { kind, code, rest, .. }, true) = (&mut error.l4, too_big) {
                        (*kind, *code) = if family == Family::V4 { (3, 4) } else { (2, 0) };
                        *rest = room;
                    }
                    let told = w.from_uplink(&error).out_of(3, w.uplink);
                    speaks_of(&told, client, service);
                    let L4::Icmp { rest, .. } = told.l4 else { panic!("{told:?}") };
                    assert_eq!(rest, if too_big { room } else { [0; 4] });
                }
            }
            // Of an answer: by the client, and by somebody on the way.
            for from in [client.ip(), router] {
                let mut error = unreachable(MAC_UPLINK, service, client);
                error.src = SocketAddr::new(from, 0);
                error.src_mac = MAC_ROUTER;
                let told = w.from_uplink(&error).out_of(3, w.uplink);
                assert_eq!((told.src.ip(), told.dst.ip()), (h.node, backend.ip()));
                let L4::Icmp { payload: quoted, .. } = &told.l4 else { panic!("{told:?}") };
                assert_eq!(quoted[..header + 4], say(backend, source, L4::udp(b"hello")).packet()[..header + 4]);
            }
            // Of nothing that is known.
            let mut stranger = unreachable(MAC_UPLINK, SocketAddr::new(h.node, source.port() ^ 1), backend);
            stranger.src_mac = MAC_ROUTER;
            w.from_uplink(&stranger).passed();
        }
    });
}

#[test]
fn errors_of_and_about_the_nodes_own_sockets_speak_of_the_service() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let client = SocketAddr::new(h.outside, 4000);
            let (service, backend) = (SocketAddr::new(h.node, NODE_PORT), SocketAddr::new(h.node, 5353));
            serve(w, family, Protocol::Udp, backend);
            ask(w, &h, 4000, L4::udp(b"hello")).passed();
            speaks_of(&out(w, &unreachable(MAC_ROUTER, client, backend)).passed().frame(), client, service);
            let stranger = SocketAddr::new(h.outside, 4001);
            let error = unreachable(MAC_ROUTER, stranger, backend);
            assert_eq!(out(w, &error).passed().bytes, error.bytes());
            let mut error = unreachable(MAC_UPLINK, service, client);
            error.src_mac = MAC_ROUTER;
            let told = w.from_uplink(&error).passed().frame();
            assert_eq!((told.src.ip(), told.dst.ip()), (client.ip(), backend.ip()));
            let L4::Icmp { payload: quoted, .. } = &told.l4 else { panic!("{told:?}") };
            let header = if family == Family::V4 { 20 } else { 40 };
            assert_eq!(quoted[..header + 4], say(backend, client, L4::udp(b"hello")).packet()[..header + 4]);
        }
    });
}

/// Enters a connection for every port towards a backend but these.
fn fill_ports(w: &World, node: IpAddr, backend: SocketAddr, proto: u8, but: &[u16], snat: &Snat) {
    for port in PORTS.filter(|port| !but.contains(port)) {
        let answer = Tuple {
            saddr: Addr::new(backend.ip()),
            daddr: Addr::new(node),
            sport: Be16::new(backend.port()),
            dport: Be16::new(port),
            proto,
            ..Tuple::default()
        };
        w.write("tp_snat", &answer, snat);
    }
}

#[test]
fn without_a_free_port_a_connection_is_dropped_and_counted_and_takes_none_that_is_established() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 8080);
            serve(w, family, Protocol::Tcp, backend);
            let now = uptime();
            let established = Snat { last_seen: now, created: now, flags: TP_CT_ESTABLISHED, ..Snat::default() };
            fill_ports(w, h.node, backend, 6, &[], &established);
            ask(w, &h, 4000, L4::syn()).dropped("snat_ports");
            // Towards another backend all are free.
            let other = SocketAddr::new(h.node2, 8081);
            w.serve(80 + family as u32, family, None, 30090, Protocol::Tcp, &[other]);
            let there = arriving(MAC_UPLINK, h.outside, 4000, h.node, 30090, L4::syn());
            assert_eq!(w.from_uplink(&there).out_of(3, w.uplink).dst, other);
            // What is not established, and idle for a moment, or closed, gives its port.
            for flags in [0, TP_CT_ESTABLISHED | TP_CT_RST] {
                let last_seen = now - 3_000_000_000;
                let idle = Snat { last_seen, created: last_seen, flags, ..Snat::default() };
                fill_ports(w, h.node, backend, 6, &[], &idle);
                let port = 4100 + flags as u16;
                let asked = ask(w, &h, port, L4::syn());
                assert!(asked.counted.contains(&"ct_recycled"), "{asked:?}");
                let back = answer(w, backend, asked.out_of(3, w.uplink).src, L4::tcp(SYN | ACK)).out_of(3, w.uplink);
                assert_eq!(back.dst, SocketAddr::new(h.outside, port));
            }
        }
    });
}

#[test]
fn a_port_of_the_nodes_own_sockets_is_passed_over() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 8080);
            let now = uptime();
            let established = Snat { last_seen: now, created: now, flags: TP_CT_ESTABLISHED, ..Snat::default() };
            for (protocol, proto, question) in [(Protocol::Udp, 17, L4::udp(b"q?")), (Protocol::Tcp, 6, L4::syn())] {
                serve(w, family, protocol, backend);
                // Steps of one or another length meet the last free ports only now and then.
                let free: Vec<u16> = (61_000..61_400).collect();
                fill_ports(w, h.node, backend, proto, &free, &established);
                let udp: Vec<UdpSocket> = free
                    .iter()
                    .filter(|port| protocol == Protocol::Udp && **port != 61_200)
                    .map(|port| UdpSocket::bind((h.node, *port)).unwrap())
                    .collect();
                let tcp: Vec<TcpListener> = free
                    .iter()
                    .filter(|port| protocol == Protocol::Tcp && **port != 61_200)
                    .map(|port| TcpListener::bind((h.node, *port)).unwrap())
                    .collect();
                for port in 4000..4040 {
                    let asked = ask(w, &h, port, question.clone());
                    if asked.verdict == REDIRECT {
                        assert_eq!(asked.out_of(3, w.uplink).src, SocketAddr::new(h.node, 61_200));
                    } else {
                        asked.dropped("snat_ports");
                    }
                }
                drop((udp, tcp));
                ask(w, &h, 5000, question).out_of(3, w.uplink);
            }
        }
    });
}

#[test]
fn a_full_table_drops_and_counts_what_is_new_and_keeps_what_is_there() {
    in_world_with(Limits { connections: 16, ..Limits::default() }, |w| {
        let h = hosts(Family::V4);
        for (port, backend) in [(NODE_PORT, h.node2), (30081, h.node)] {
            w.serve(u32::from(port), Family::V4, None, port, Protocol::Tcp, &[SocketAddr::new(backend, 8080)]);
        }
        let mut kept = Vec::new();
        for port in 4000..4004 {
            kept.push((port, ask(w, &h, port, L4::syn()).out_of(3, w.uplink).src));
        }
        ask(w, &h, 4004, L4::syn()).dropped("snat_full");
        w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4004, h.node, 30081, L4::syn())).dropped("snat_full");
        for (port, source) in kept {
            assert_eq!(ask(w, &h, port, L4::tcp(ACK)).out_of(3, w.uplink).src, source);
        }
        assert_eq!(entries(w), (4, 4));
        let usage = w.programs.usage().unwrap();
        let usage = usage.iter().find(|usage| usage.map == "tp_snat").unwrap();
        assert_eq!((usage.entries, usage.limit), (4, 4));
    });
}

#[test]
fn a_connection_goes_when_it_is_idle_and_not_before() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let backend = SocketAddr::new(h.node2, 8080);
        serve(w, Family::V4, Protocol::Tcp, backend);
        serve(w, Family::V4, Protocol::Udp, backend);
        let open = |port| {
            let source = ask(w, &h, port, L4::syn()).out_of(3, w.uplink).src;
            answer(w, backend, source, L4::tcp(SYN | ACK)).out_of(3, w.uplink);
            ask(w, &h, port, L4::tcp(ACK)).out_of(3, w.uplink);
            source
        };
        let long = open(4000);
        let closed = open(4001);
        ask(w, &h, 4001, L4::tcp(FIN | ACK)).out_of(3, w.uplink);
        answer(w, backend, closed, L4::tcp(FIN | ACK)).out_of(3, w.uplink);
        let reset = open(4002);
        answer(w, backend, reset, L4::tcp(RST)).out_of(3, w.uplink);
        ask(w, &h, 4003, L4::syn()).out_of(3, w.uplink);
        ask(w, &h, 4004, L4::udp(b"q?")).out_of(3, w.uplink);
        let collected = |seconds| {
            age(w, seconds);
            let removed = object_collect(w);
            (removed, entries(w))
        };
        assert_eq!(collected(0), (0, (5, 5)));
        assert_eq!(collected(11), (2, (3, 3)), "closed from both sides, and reset");
        assert_eq!(collected(20), (1, (2, 2)), "a question without an answer");
        assert_eq!(collected(30), (1, (1, 1)), "a handshake");
        assert_eq!(collected(7 * 3600), (0, (1, 1)));
        assert_eq!(answer(w, backend, long, L4::data(b"late")).out_of(3, w.uplink).dst.port(), 4000);
    });
}

/// Connections that one run of the collector deletes.
fn object_collect(w: &World) -> u32 {
    use libbpf_rs::ProgramInput;
    let mut removed = [0u8; size_of::<Removed>()];
    let program = w.programs.object().progs_mut().find(|p| p.name() == "tp_collect").unwrap();
    program.test_run(ProgramInput { context_in: Some(&mut removed), ..ProgramInput::default() }).unwrap();
    let removed: Removed = of_bytes(&removed);
    assert_eq!(removed.connections, removed.translations, "each with what leads to it");
    removed.connections
}

#[test]
fn what_leads_nowhere_is_collected() {
    in_world(|w| {
        let h = hosts(Family::V4);
        serve(w, Family::V4, Protocol::Tcp, SocketAddr::new(h.node2, 8080));
        ask(w, &h, 4000, L4::syn());
        ask(w, &h, 4001, L4::syn());
        let asked = w.entries::<Tuple, SnatWay>("tp_snat_asked");
        let of = |port| asked.iter().find(|(sent, _)| sent.sport.get() == port).unwrap();
        use libbpf_rs::MapCore as _;
        w.map("tp_snat_asked").delete(&bytes_of(&of(4000).0)).unwrap();
        let way = of(4001).1;
        let answer = Tuple {
            saddr: way.backend,
            daddr: way.source,
            sport: way.backend_port,
            dport: way.source_port,
            proto: 6,
            ..Tuple::default()
        };
        w.map("tp_snat").delete(&bytes_of(&answer)).unwrap();
        // What was entered this moment may be about to be led to.
        w.programs.collect().unwrap();
        assert_eq!(entries(w), (1, 0));
        age(w, 2);
        w.programs.collect().unwrap();
        assert_eq!(entries(w), (0, 0));
    });
}

#[test]
fn of_many_those_that_are_not_established_are_not_waited_for() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let now = uptime();
        for (sport, flags) in [(1, TP_CT_ESTABLISHED), (2, 0)] {
            let last_seen = now - 8_000_000_000;
            let one = Snat { last_seen, created: now, flags, ..Snat::default() };
            fill_ports(w, h.node, SocketAddr::new(h.node2, sport), 6, &[], &one);
        }
        w.programs.collect().unwrap();
        assert_eq!(entries(w).0, PORTS.count());
    });
}

#[test]
fn a_clients_port_that_comes_round_begins_another_connection() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 8080);
            serve(w, family, Protocol::Tcp, backend);
            let source = ask(w, &h, 4000, L4::syn()).out_of(3, w.uplink).src;
            answer(w, backend, source, L4::tcp(SYN | ACK)).out_of(3, w.uplink);
            ask(w, &h, 4000, L4::tcp(RST)).out_of(3, w.uplink);
            // To a pod, and from there to what is no pod again.
            serve(w, family, Protocol::Tcp, SocketAddr::new(h.a, 8080));
            ask(w, &h, 4000, L4::syn()).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 8080, h.outside, 4000, L4::tcp(RST | ACK))).out_of(3, w.uplink);
            serve(w, family, Protocol::Tcp, backend);
            let asked = ask(w, &h, 4000, L4::syn()).out_of(3, w.uplink);
            assert_eq!(asked.dst, backend);
            answer(w, backend, asked.src, L4::tcp(SYN | ACK)).out_of(3, w.uplink);
            assert_eq!(ask(w, &h, 4000, L4::tcp(ACK)).out_of(3, w.uplink).src, asked.src);
        }
        assert_eq!(entries(w), (2, 2));
    });
}

#[test]
fn udp_is_not_held_to_a_backend_that_is_gone() {
    in_world(|w| {
        w.table = Default::default();
        let h = hosts(Family::V4);
        serve(w, Family::V4, Protocol::Udp, SocketAddr::new(h.node2, 53));
        ask(w, &h, 4000, L4::udp(b"q?")).out_of(3, w.uplink);
        let translations = w.programs.translations().unwrap();
        assert_eq!(translations.retain_udp(|held| held.backend.0 == h.node2).unwrap(), 0);
        w.table = Default::default();
        w.serve(2, Family::V4, None, NODE_PORT, Protocol::Udp, &[SocketAddr::new(far(Family::V4), 53)]);
        assert_eq!(ask(w, &h, 4000, L4::udp(b"q?")).out_of(3, w.uplink).dst.ip(), h.node2);
        assert_eq!(translations.retain_udp(|held| held.backend.0 != h.node2).unwrap(), 1);
        assert_eq!(ask(w, &h, 4000, L4::udp(b"q?")).out_of(3, w.uplink).dst.ip(), far(Family::V4));
        // And with the backend's own end.
        w.table = Default::default();
        w.serve(3, Family::V4, None, NODE_PORT, Protocol::Udp, &[SocketAddr::new(h.node2, 53)]);
        for seconds in [10, 20] {
            w.programs.sweep(Instant::now() + Duration::from_secs(seconds)).unwrap();
        }
        assert_eq!(ask(w, &h, 4000, L4::udp(b"q?")).out_of(3, w.uplink).dst.ip(), h.node2);
    });
}

#[test]
fn connections_count_where_backends_are_chosen_by_them() {
    in_world(|w| {
        let h = hosts(Family::V4);
        let backends = [SocketAddr::new(h.node2, 8080), SocketAddr::new(h.node, 8080), SocketAddr::new(h.b, 8080)];
        w.serve(1, Family::V4, None, NODE_PORT, Protocol::Tcp, &backends);
        w.table.frontends.values_mut().for_each(|target| Arc::make_mut(target).algorithm = Algorithm::LeastConnections);
        w.apply_services();
        for port in 4000..4009 {
            ask(w, &h, port, L4::syn());
        }
        let loads: Vec<u32> = w.entries::<u32, Load>("tp_loads").iter().map(|(_, load)| load.flows).collect();
        assert_eq!(loads, [3, 3, 3]);
        age(w, 61);
        w.age(61);
        w.programs.collect().unwrap();
        assert!(w.entries::<u32, Load>("tp_loads").iter().all(|(_, load)| load.flows == 0));
    });
}

#[test]
fn fragments_go_as_their_first_in_both_directions() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 53);
            serve(w, family, Protocol::Udp, backend);
            let fragments = |from: SocketAddr, to: SocketAddr| {
                [(0, true), (72, false)].map(|(offset, more)| {
                    let mut frame = arriving(MAC_UPLINK, from.ip(), from.port(), to.ip(), to.port(), L4::udp(&[1; 64]));
                    frame.fragment = Some((9, offset, more));
                    let got = w.from_uplink(&frame);
                    assert_eq!((got.verdict, got.kind, got.ifindex), (REDIRECT, 3, w.uplink), "at {offset}: {got:?}");
                    let size = if family == Family::V4 { 4 } else { 16 };
                    let at = if family == Family::V4 { 14 + 12 } else { 14 + 8 };
                    let l4 = at + 2 * size + if family == Family::V4 { 0 } else { 8 };
                    let port = u16::from_be_bytes([got.bytes[l4], got.bytes[l4 + 1]]);
                    (got.bytes[at..at + 2 * size].to_vec(), port)
                })
            };
            let octets = |one: IpAddr, other: IpAddr| match (one, other) {
                (IpAddr::V4(one), IpAddr::V4(other)) => [one.octets(), other.octets()].concat(),
                (IpAddr::V6(one), IpAddr::V6(other)) => [one.octets(), other.octets()].concat(),
                _ => panic!("two families"),
            };
            let client = SocketAddr::new(h.outside, 4000);
            let [(first, source), (later, _)] = fragments(client, SocketAddr::new(h.node, NODE_PORT));
            assert_eq!(first, octets(h.node, backend.ip()));
            assert_eq!(later, first);
            let [(first, port), (later, _)] = fragments(backend, SocketAddr::new(h.node, source));
            assert_eq!((&first, port), (&octets(h.node, client.ip()), NODE_PORT));
            assert_eq!(later, first);
        }
    });
}

#[test]
fn what_only_the_stack_could_do_is_dropped_and_counted() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node2, 53);
            serve(w, family, Protocol::Udp, backend);
            let source = ask(w, &h, 4000, L4::udp(b"q?")).out_of(3, w.uplink).src;
            let mut dying = arriving(MAC_UPLINK, h.outside, 4000, h.node, NODE_PORT, L4::udp(b"q?"));
            dying.ttl = 1;
            w.from_uplink(&dying).dropped("snat_odd");
            let mut dying = arriving(MAC_UPLINK, h.node2, 53, source.ip(), source.port(), L4::udp(b"a"));
            dying.ttl = 1;
            w.from_uplink(&dying).dropped("snat_odd");
        }
    });
}

/// A route with a smaller MTU than the device's: nobody on the way will say so in our place.
#[test]
fn who_sends_what_the_way_to_the_backend_has_no_room_for_is_told() {
    in_world(|w| {
        sh("ip link add small type veth peer name small1
            ip link set small mtu 1400; ip link set small up; ip link set small1 up
            ip addr add 203.0.113.1/24 dev small; ip addr add 2001:db8:77::1/64 dev small nodad
            ip neigh add 203.0.113.77 lladdr 02:00:00:00:00:77 dev small
            ip neigh add 2001:db8:77::77 lladdr 02:00:00:00:00:77 dev small");
        for family in BOTH {
            let h = hosts(family);
            serve(w, family, Protocol::Udp, SocketAddr::new(far(family), 53));
            let send = |size: usize| {
                let mut bytes =
                    arriving(MAC_UPLINK, h.outside, 4000, h.node, NODE_PORT, L4::udp(&vec![1; size])).bytes();
                if family == Family::V4 {
                    // May not be cut.
                    bytes[20] |= 0x40;
                    bytes[24..26].fill(0);
                    let check = crate::frame::sum(&[&bytes[14..34]]).to_be_bytes();
                    bytes[24..26].copy_from_slice(&check);
                }
                (w.run(Hook::FromUplink, &bytes, w.uplink, w.uplink, None), bytes)
            };
            let room = 1400 - if family == Family::V4 { 28 } else { 48 };
            let asked = send(room).0.out_of(3, index_of("small"));
            let own = if family == Family::V4 { ip("203.0.113.1") } else { ip("2001:db8:77::1") };
            assert_eq!(asked.src.ip(), own, "the address of the device that leads there");
            let (told, sent) = send(room + 8);
            let told = told.out_of(2, w.uplink);
            assert_eq!((told.src.ip(), told.dst.ip()), (h.node, h.outside));
            let L4::Icmp { kind, code, rest, payload } = told.l4 else { panic!("{told:?}") };
            assert_eq!((kind, code), if family == Family::V4 { (3, 4) } else { (2, 0) });
            assert_eq!(u32::from_be_bytes(rest), 1400);
            assert_eq!(payload, sent[14..14 + payload.len()]);
        }
    });
}

/// A former pod's address, or another network's pod on this node: its answers would pass no hook of ours.
#[test]
fn an_address_in_a_nodes_range_that_no_pod_has_is_refused_as_ever() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        serve(w, Family::V4, Protocol::Tcp, SocketAddr::new(ip("10.1.0.99"), 8080));
        assert_eq!(ask(w, &h, 4000, L4::syn()).out_of(2, w.uplink).src, SocketAddr::new(h.node, NODE_PORT));
        // And one to which nothing leads.
        sh("ip route add unreachable 203.0.113.0/24");
        serve(w, Family::V4, Protocol::Tcp, SocketAddr::new(far(Family::V4), 8080));
        assert_eq!(ask(w, &h, 4001, L4::syn()).out_of(2, w.uplink).src, SocketAddr::new(h.node, NODE_PORT));
        assert_eq!(entries(w), (0, 0));
    });
}

#[test]
fn a_pod_whose_node_becomes_known_is_reached_by_the_next_packet() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            for (protocol, question, reply) in
                [(Protocol::Udp, L4::udp(b"q?"), L4::udp(b"answer")), (Protocol::Tcp, L4::syn(), L4::tcp(SYN | ACK))]
            {
                let mut known = peers();
                known.retain(|peer| peer.name.as_str() != "node2");
                w.programs.apply_peers(&known).unwrap();
                let backend = SocketAddr::new(h.remote, 8080);
                w.table = Default::default();
                serve(w, family, protocol, backend);
                // In no node's range: as somebody outside.
                let lost = ask(w, &h, 4000, question.clone()).out_of(3, w.uplink);
                assert_eq!((lost.src.ip(), lost.dst), (h.node, backend));
                let heard = ask(w, &h, 4001, question.clone()).out_of(3, w.uplink).src;
                answer(w, backend, heard, reply).out_of(3, w.uplink);
                w.programs.apply_peers(&peers()).unwrap();
                let node2 = ip("192.168.50.2");
                let reached = ask(w, &h, 4000, question.clone()).into_tunnel(w, node2);
                assert_eq!((reached.src, reached.dst), (SocketAddr::new(h.outside, 4000), backend));
                // Who was answered goes on as it began.
                let more = if protocol == Protocol::Tcp { L4::tcp(ACK) } else { question };
                assert_eq!(ask(w, &h, 4001, more).out_of(3, w.uplink).src, heard);
                assert_eq!(entries(w), (1, 1));
                w.clear("tp_snat");
                w.clear("tp_snat_asked");
            }
        }
    });
}

#[test]
fn a_packet_that_comes_between_the_two_entries_of_its_connection_is_let_on() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.node, 8080);
            for (protocol, question) in [(Protocol::Udp, L4::udp(b"q?")), (Protocol::Tcp, L4::syn())] {
                serve(w, family, protocol, backend);
                ask(w, &h, 4000, question.clone()).passed();
                // As another CPU has it that has just entered the first.
                w.clear("tp_snat_asked");
                assert_eq!(ask(w, &h, 4000, question).passed().frame().dst, backend);
                assert_eq!(entries(w), (1, 1));
                w.clear("tp_snat");
                w.clear("tp_snat_asked");
            }
        }
    });
}
