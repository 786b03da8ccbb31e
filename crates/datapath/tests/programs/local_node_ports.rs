//! NodePorts with a `Local` policy: outside clients get this node's endpoints, clients of this node all of them, and another
//! node's address is that node's to serve.

use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use towpath_datapath::bpf::NodeConfig;
use towpath_model::desired::Frontend;
use towpath_model::{Family, Protocol};

use crate::frame::L4;
use crate::sockets::{backend, hear, in_sockets_world, netns_cookie, tcp_server};
use crate::world::*;

const PORT: u16 = 30090;

/// A NodePort that leads outside clients to `outside` and clients of this node to `inside`.
fn serve(w: &mut World, family: Family, outside: &[SocketAddr], inside: &[SocketAddr]) {
    let id = 21 + family as u32;
    w.serve(id, family, None, PORT, Protocol::Tcp, inside);
    let frontend = Frontend { address: None, family, port: PORT, protocol: Protocol::Tcp };
    let target = w.table.frontends[&frontend].clone();
    w.table.inside.insert(frontend, target);
    w.serve(id + 10, family, None, PORT, Protocol::Tcp, outside);
}

#[test]
fn who_asks_decides_whose_endpoints_answer() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            serve(w, family, &[], &[SocketAddr::new(h.remote, 8080)]);
            let refused = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, PORT, L4::syn()));
            assert_eq!(refused.kind, 2, "this node has no endpoint for outside clients: {refused:?}");
            let out = w.from_pod(&sent_by(h.a, 4000, h.node, PORT, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!(out.dst, SocketAddr::new(h.remote, 8080), "a pod at its own node's address gets all");
            let out = w.from_pod(&sent_by(h.a, 4001, h.node2, PORT, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!(out.dst, SocketAddr::new(h.node2, PORT), "another node's is left to that node");
        }
    });
}

#[test]
fn an_address_for_everybody_leads_a_pod_to_all_endpoints_and_the_outside_to_this_nodes() {
    in_world(|w| {
        for family in BOTH {
            let h = hosts(family);
            let remote = SocketAddr::new(h.remote, 8080);
            let at = Frontend { address: Some(h.service), family, port: 80, protocol: Protocol::Tcp };
            w.serve(41, family, Some(h.service), 80, Protocol::Tcp, &[remote]);
            let target = w.table.frontends[&at].clone();
            w.serve(42, family, Some(h.service), 80, Protocol::Tcp, &[]);
            let alone = w.table.clone();
            let outside = |w: &mut World, port| {
                let syn = arriving(MAC_UPLINK, h.outside, port, h.service, 80, L4::syn());
                assert_eq!(w.from_uplink(&syn).kind, 2, "this node has no endpoint for outside clients");
            };
            outside(w, 4000);
            let syn = |port| sent_by(h.a, port, h.service, 80, L4::syn());
            assert_eq!(w.from_pod(&syn(4001)).kind, 1, "nor for anybody else yet: refused");
            // It comes and goes without the other being written.
            w.table.inside.insert(at, target);
            w.apply_services();
            outside(w, 4002);
            let out = w.from_pod(&syn(4003)).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!(out.dst, remote, "a pod gets all");
            w.table = alone;
            w.apply_services();
            outside(w, 4004);
            assert_eq!(w.from_pod(&syn(4005)).kind, 1);
        }
    });
}

#[test]
fn the_nodes_own_sockets_get_all_endpoints_at_its_own_address_only() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            serve(w, family, &[], &[backend(family, 8080)]);
            let name = SocketAddr::new(hosts(family).node, PORT);
            let server = tcp_server(backend(family, 8080), b"inside");
            assert_eq!(hear(name), (b"inside".to_vec(), name));
            server.join().unwrap();
            // And at a load balancer's address.
            let name = SocketAddr::new(hosts(family).service, 80);
            w.serve(51, family, Some(name.ip()), 80, Protocol::Tcp, &[backend(family, 8080)]);
            let at = Frontend { address: Some(name.ip()), family, port: 80, protocol: Protocol::Tcp };
            w.table.inside.insert(at, w.table.frontends[&at].clone());
            w.serve(52, family, Some(name.ip()), 80, Protocol::Tcp, &[]);
            let server = tcp_server(backend(family, 8080), b"inside");
            assert_eq!(hear(name), (b"inside".to_vec(), name));
            server.join().unwrap();
        }
        // Another node's address, which this test has on its loopback, is not translated.
        let other: IpAddr = hosts(Family::V4).node2;
        sh(&format!("ip addr add {other}/32 dev lo"));
        let there = TcpListener::bind((other, PORT)).unwrap();
        there.set_nonblocking(true).unwrap();
        let _stream = TcpStream::connect((other, PORT)).unwrap();
        assert!(there.accept().is_ok(), "what is sent to another node goes there");
    });
}

/// Whether a socket of the node that connects there gets to the backend, which listens.
fn gets_to(family: Family, address: IpAddr) -> bool {
    let _listening = TcpListener::bind(backend(family, 8080)).unwrap();
    TcpStream::connect_timeout(&SocketAddr::new(address, PORT), Duration::from_millis(500)).is_ok()
}

#[test]
fn an_address_that_was_not_chosen_has_no_node_ports_for_anybody() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            w.serve(
                51 + family as u32,
                family,
                None,
                PORT,
                Protocol::Tcp,
                &[SocketAddr::new(hosts(family).remote, 8080)],
            );
        }
        // From another port each time: what is open goes on.
        let translated = |w: &World, sport: u16| {
            BOTH.map(|family| {
                let h = hosts(family);
                let from_outside = w.from_uplink(&arriving(MAC_UPLINK, h.outside, sport, h.node, PORT, L4::syn()));
                let from_pod = w.from_pod(&sent_by(h.a, sport, h.node, PORT, L4::syn()));
                [from_outside, from_pod].map(|out| out.counted.contains(&"service_translated"))
            })
        };
        let node_config = node_config(w.tunnel, w.uplink);
        assert_eq!(translated(w, 4000), [[true; 2]; 2]);
        w.programs.silence(BOTH.map(|family| hosts(family).node).into());
        w.programs.apply_peers(&peers()).unwrap();
        assert_eq!(translated(w, 4001), [[false; 2]; 2]);
        w.programs.silence(Default::default());
        w.programs.apply_peers(&peers()).unwrap();
        assert_eq!(translated(w, 4002), [[true; 2]; 2]);

        for family in BOTH {
            w.serve(51 + family as u32, family, None, PORT, Protocol::Tcp, &[backend(family, 8080)]);
        }
        let loopback: [IpAddr; 2] = ["127.0.0.1".parse().unwrap(), "::1".parse().unwrap()];
        let own = || [gets_to(Family::V4, loopback[0]), gets_to(Family::V6, loopback[1])];
        for chosen in [(true, true), (false, true), (true, false), (false, false)] {
            let config =
                NodeConfig { loopback_node_ports: chosen, netns_cookie: netns_cookie(), ..node_config.clone() };
            w.programs.apply_node(&config).unwrap();
            assert_eq!(own(), [chosen.0, chosen.1], "IPv4 and IPv6");
        }
        assert!(BOTH.iter().all(|family| gets_to(*family, hosts(*family).node)), "the node's own address");
        w.programs.silence(BOTH.map(|family| hosts(family).node).into());
        w.programs.apply_peers(&peers()).unwrap();
        assert!(!BOTH.iter().any(|family| gets_to(*family, hosts(*family).node)));
    });
}
