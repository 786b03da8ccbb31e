//! How a backend is chosen, counted; and Services that are for some clients only.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Instant;

use libbpf_rs::{MapCore, MapFlags};
use towpath_datapath::abi::Load;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::L4;
use crate::sockets::{backend, in_sockets_world};
use crate::world::*;

const PORT: u16 = 80;

/// A Service of pod b's at `count` of its ports, from 8001 on.
fn serve(w: &mut World, family: Family, count: u16, algorithm: Algorithm) {
    let h = hosts(family);
    let backends: Vec<SocketAddr> = (1..=count).map(|n| SocketAddr::new(h.b, 8000 + n)).collect();
    w.table = ServiceTable::default();
    w.serve(1, family, Some(h.service), PORT, Protocol::Tcp, &backends);
    let target = std::sync::Arc::make_mut(w.table.frontends.values_mut().next().unwrap());
    target.algorithm = algorithm;
    if algorithm.hashes() {
        // As a planner would, but small: each backend in turn.
        target.table = target.backends.iter().copied().cycle().take(usize::from(count) * 13).collect();
    }
    w.apply_services();
}

fn chosen(w: &World, family: Family, sport: u16) -> u16 {
    let h = hosts(family);
    w.from_pod(&sent_by(h.a, sport, h.service, PORT, L4::syn())).into_pod(w.pod_b).dst.port()
}

fn counts(ports: impl Iterator<Item = u16>) -> BTreeMap<u16, usize> {
    ports.fold(BTreeMap::new(), |mut counts, port| {
        *counts.entry(port).or_default() += 1;
        counts
    })
}

fn loads(w: &World) -> Vec<Load> {
    let map = w.map("tp_loads");
    map.keys().map(|key| of_bytes(&map.lookup(&key, MapFlags::ANY).unwrap().unwrap())).collect()
}

#[test]
fn one_after_the_other() {
    in_both_worlds(|w| {
        serve(w, Family::V4, 5, Algorithm::RoundRobin);
        let order: Vec<u16> = (4000..4050).map(|sport| chosen(w, Family::V4, sport)).collect();
        assert!(order.windows(2).all(|two| two[1] == (two[0] - 8000) % 5 + 8001), "{order:?}");
        // What goes on is no turn.
        assert_eq!(chosen(w, Family::V4, 4049), order[49]);
        // Nor is applying the same once more, or another run of the agent.
        w.apply_services();
        assert_eq!(chosen(w, Family::V4, 4050), order[0]);
    });
}

#[test]
fn the_one_with_the_fewest_open_connections() {
    in_both_worlds(|w| {
        serve(w, Family::V4, 3, Algorithm::LeastConnections);
        let first = counts((4000..4030).map(|sport| chosen(w, Family::V4, sport)));
        assert_eq!(first, BTreeMap::from([(8001, 10), (8002, 10), (8003, 10)]));
        // Retransmissions are not counted twice.
        assert_eq!(counts((4000..4030).map(|sport| chosen(w, Family::V4, sport))), first);
        serve(w, Family::V4, 4, Algorithm::LeastConnections);
        let next = counts((5000..5010).map(|sport| chosen(w, Family::V4, sport)));
        assert_eq!(next, BTreeMap::from([(8004, 10)]), "until it has as many");
        assert_eq!(loads(w), [Load { flows: 10, sockets: 0 }; 4]);
        w.programs.purger().unwrap().purge(&[hosts(Family::V4).a]).unwrap();
        assert_eq!(loads(w), [Load::default(); 4], "what is closed is not open");
    });
}

#[test]
fn what_was_open_before_is_counted_too() {
    in_both_worlds(|w| {
        serve(w, Family::V4, 1, Algorithm::Random);
        (4000..4007).for_each(|sport| assert_eq!(chosen(w, Family::V4, sport), 8001));
        serve(w, Family::V4, 2, Algorithm::LeastConnections);
        let next = counts((5000..5007).map(|sport| chosen(w, Family::V4, sport)));
        assert_eq!(next, BTreeMap::from([(8002, 7)]));
    });
}

#[test]
fn of_many_some_are_looked_at() {
    in_both_worlds(|w| {
        serve(w, Family::V4, 200, Algorithm::LeastConnections);
        let seen = counts((10_000..10_400).map(|sport| chosen(w, Family::V4, sport)));
        let most = seen.values().max().copied().unwrap();
        assert!(seen.len() > 180 && most <= 4, "{seen:?}");
    });
}

/// New connections of clients outside, each from `ports`, to a load balancer's address.
fn from_outside(w: &World, family: Family, client: IpAddr, ports: std::ops::Range<u16>) -> Vec<u16> {
    let h = hosts(family);
    let ask = |sport| {
        let syn = arriving(MAC_UPLINK, client, sport, h.service, PORT, L4::syn());
        w.from_uplink(&syn).into_pod(w.pod_b).dst.port()
    };
    ports.map(ask).collect()
}

fn clients(family: Family, count: u8) -> Vec<IpAddr> {
    let address = |n| match family {
        Family::V4 => IpAddr::from([198, 51, 100, n]),
        Family::V6 => format!("fd99::{n:x}").parse().unwrap(),
    };
    (1..=count).map(address).collect()
}

#[test]
fn by_the_clients_address() {
    in_both_worlds(|w| {
        for family in BOTH {
            serve(w, family, 4, Algorithm::SourceHash);
            let of: Vec<u16> = clients(family, 100)
                .into_iter()
                .map(|client| {
                    let chosen = from_outside(w, family, client, 4000..4005);
                    assert!(chosen.iter().all(|port| *port == chosen[0]), "{client}: {chosen:?}");
                    chosen[0]
                })
                .collect();
            let spread = counts(of.iter().copied());
            assert!(spread.len() == 4 && spread.values().all(|count| (10..=40).contains(count)), "{spread:?}");
            // Nothing is remembered: who has forgotten the connections says the same.
            w.programs.purger().unwrap().purge(&[hosts(family).b]).unwrap();
            let again: Vec<u16> =
                clients(family, 100).into_iter().map(|client| from_outside(w, family, client, 7000..7001)[0]).collect();
            assert_eq!(of, again);
        }
    });
}

#[test]
fn by_addresses_and_ports() {
    in_both_worlds(|w| {
        for family in BOTH {
            serve(w, family, 4, Algorithm::Maglev);
            let client = clients(family, 1)[0];
            let first = from_outside(w, family, client, 4000..4400);
            let spread = counts(first.iter().copied());
            assert!(spread.len() == 4 && spread.values().all(|count| (60..=140).contains(count)), "{spread:?}");
            w.programs.purger().unwrap().purge(&[client]).unwrap();
            assert_eq!(from_outside(w, family, client, 4000..4400), first);
        }
    });
}

#[test]
fn frontends_of_a_service_share_a_table() {
    in_both_worlds(|w| {
        serve(w, Family::V4, 4, Algorithm::Maglev);
        let slots = |w: &World| w.map("tp_slots").keys().count();
        w.programs.sweep(Instant::now() + std::time::Duration::from_secs(5)).unwrap();
        assert_eq!(slots(w), 52);
        let (frontend, target) = w.table.frontends.iter().map(|(f, t)| (*f, t.clone())).next().unwrap();
        w.table.frontends.insert(Frontend { address: None, port: 30080, ..frontend }, target);
        w.apply_services();
        assert_eq!(slots(w), 52);
        // Another one is written once, and the old one goes when nobody reads it any more.
        let turned: Vec<BackendId> = w.table.frontends[&frontend].table.iter().rev().copied().collect();
        let turned: std::sync::Arc<[BackendId]> = turned.into();
        w.table.frontends.values_mut().map(std::sync::Arc::make_mut).for_each(|target| target.table = turned.clone());
        w.apply_services();
        assert_eq!(slots(w), 104);
        w.programs.sweep(Instant::now() + std::time::Duration::from_secs(10)).unwrap();
        assert_eq!(slots(w), 52);
        from_outside(w, Family::V4, clients(Family::V4, 1)[0], 4000..4010);
        // The same in another place in memory is the same.
        let copy: std::sync::Arc<[BackendId]> = turned.to_vec().into();
        w.table.frontends.values_mut().map(std::sync::Arc::make_mut).for_each(|target| target.table = copy.clone());
        w.apply_services();
        w.programs.sweep(Instant::now() + std::time::Duration::from_secs(20)).unwrap();
        assert_eq!(slots(w), 52);
        from_outside(w, Family::V4, clients(Family::V4, 1)[0], 5000..5010);
    });
}

#[test]
fn only_clients_in_its_ranges_use_a_load_balancer() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            serve(w, family, 2, Algorithm::Random);
            let ranges = ["198.51.100.0/28", "fd99::/124", "10.1.0.10/32", "fd01::10/128"];
            let ranges = ranges.map(|range| range.parse().unwrap());
            w.table
                .frontends
                .values_mut()
                .map(std::sync::Arc::make_mut)
                .for_each(|target| target.sources = Some(ranges.as_slice().into()));
            w.apply_services();
            let [inside, outside] = [clients(family, 15)[14], clients(family, 17)[16]];
            from_outside(w, family, inside, 4000..4002);
            let syn = arriving(MAC_UPLINK, outside, 4000, h.service, PORT, L4::syn());
            w.from_uplink(&syn).dropped("source_range");
            // Pods, too, one by one.
            chosen(w, family, 4000);
            let b = sent_by(h.b, 4000, h.service, PORT, L4::syn());
            w.from_pod(&b).dropped("source_range");
            // No ranges at all are nobody's; none given is everybody's.
            w.table
                .frontends
                .values_mut()
                .map(std::sync::Arc::make_mut)
                .for_each(|target| target.sources = Some([].into()));
            w.apply_services();
            let syn = arriving(MAC_UPLINK, inside, 4010, h.service, PORT, L4::syn());
            w.from_uplink(&syn).dropped("source_range");
            w.table.frontends.values_mut().map(std::sync::Arc::make_mut).for_each(|target| target.sources = None);
            w.apply_services();
            from_outside(w, family, outside, 4020..4021);
            assert_eq!(w.map("tp_source_ranges").keys().count(), 0);
        }
    });
}

#[test]
fn ranges_for_which_there_is_no_room_let_nobody_in() {
    let limits = towpath_datapath::bpf::Limits { services: 8, ..Default::default() };
    in_world_with(limits, |w| {
        let h = hosts(Family::V4);
        serve(w, Family::V4, 2, Algorithm::Random);
        let outside = clients(Family::V4, 1)[0];
        from_outside(w, Family::V4, outside, 4000..4002);
        let ranges: Vec<ipnet::IpNet> = (1..=10).map(|n| format!("192.0.{n}.0/24").parse().unwrap()).collect();
        w.table
            .frontends
            .values_mut()
            .map(std::sync::Arc::make_mut)
            .for_each(|target| target.sources = Some(ranges.as_slice().into()));
        let applied = w.programs.apply_services(&w.table, Instant::now()).unwrap();
        let [left_out] = applied.left_out.as_slice() else { panic!("{:?}", applied.left_out) };
        assert!(left_out.reason.contains("tp_source_ranges"), "{left_out:?}");
        let syn = arriving(MAC_UPLINK, outside, 4010, h.service, PORT, L4::syn());
        w.from_uplink(&syn).dropped("source_range");
    });
}

fn at(w: &mut World, ports: &[u16], algorithm: Algorithm, protocol: Protocol) {
    let backends: Vec<SocketAddr> = ports.iter().map(|port| backend(Family::V4, *port)).collect();
    w.table = ServiceTable::default();
    w.serve(1, Family::V4, Some(hosts(Family::V4).service), PORT, protocol, &backends);
    w.table.frontends.values_mut().map(std::sync::Arc::make_mut).for_each(|target| target.algorithm = algorithm);
    w.apply_services();
}

#[test]
fn sockets_are_counted_from_connect_to_close() {
    in_sockets_world(|w, _| {
        let ports = [7001, 7002, 7003];
        at(w, &ports, Algorithm::LeastConnections, Protocol::Tcp);
        let listeners: Vec<TcpListener> =
            ports.iter().map(|port| TcpListener::bind(backend(Family::V4, *port)).unwrap()).collect();
        let service = SocketAddr::new(hosts(Family::V4).service, PORT);
        let mut open: Vec<(u16, TcpStream, TcpStream)> = Vec::new();
        let connect = |open: &mut Vec<(u16, TcpStream, TcpStream)>| {
            let before: u32 = loads(w).iter().map(|load| load.sockets).sum();
            let stream = TcpStream::connect(service).unwrap();
            assert_eq!(loads(w).iter().map(|load| load.sockets).sum::<u32>(), before + 1);
            for listener in &listeners {
                listener.set_nonblocking(true).unwrap();
                if let Ok((accepted, _)) = listener.accept() {
                    open.push((listener.local_addr().unwrap().port(), stream, accepted));
                    return;
                }
            }
            panic!("nobody was connected to");
        };
        (0..9).for_each(|_| connect(&mut open));
        assert_eq!(counts(open.iter().map(|(port, ..)| *port)), BTreeMap::from([(7001, 3), (7002, 3), (7003, 3)]));
        open.retain(|(port, ..)| *port != 7002);
        let kept = open.len();
        (0..3).for_each(|_| connect(&mut open));
        assert_eq!(counts(open[kept..].iter().map(|(port, ..)| *port)), BTreeMap::from([(7002, 3)]));
        open.clear();
        assert_eq!(loads(w), [Load::default(); 3]);
    });
}

#[test]
fn a_socket_that_connects_again_is_counted_once() {
    in_sockets_world(|w, _| {
        at(w, &[7001, 7002], Algorithm::LeastConnections, Protocol::Udp);
        let socket = UdpSocket::bind("10.7.0.1:0").unwrap();
        for _ in 0..10 {
            socket.connect(SocketAddr::new(hosts(Family::V4).service, PORT)).unwrap();
            assert_eq!(loads(w).iter().map(|load| load.sockets).sum::<u32>(), 1);
        }
        socket.connect("10.7.0.1:9").unwrap();
        assert_eq!(loads(w), [Load::default(); 2], "no Service's any more");
    });
}

#[test]
fn sockets_take_turns_and_are_told_when_a_service_is_not_for_them() {
    in_sockets_world(|w, _| {
        at(w, &[7001, 7002, 7003], Algorithm::RoundRobin, Protocol::Udp);
        let service = SocketAddr::new(hosts(Family::V4).service, PORT);
        let receivers: Vec<UdpSocket> =
            [7001, 7002, 7003].iter().map(|port| UdpSocket::bind(backend(Family::V4, *port)).unwrap()).collect();
        let client = UdpSocket::bind("10.7.0.1:0").unwrap();
        (0..30).for_each(|_| assert_eq!(client.send_to(b"x", service).unwrap(), 1));
        for receiver in &receivers {
            receiver.set_nonblocking(true).unwrap();
            let heard = std::iter::from_fn(|| receiver.recv(&mut [0; 8]).ok()).count();
            assert_eq!(heard, 10);
        }
        w.table
            .frontends
            .values_mut()
            .map(std::sync::Arc::make_mut)
            .for_each(|target| target.sources = Some(["192.0.2.0/24".parse().unwrap()].into()));
        w.programs.apply_services(&w.table, Instant::now()).unwrap();
        let refused = client.send_to(b"x", service).unwrap_err();
        assert_eq!(refused.kind(), std::io::ErrorKind::PermissionDenied);
    });
}
