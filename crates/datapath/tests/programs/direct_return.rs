//! Direct server return: the node where a client comes in tells the endpoint's node whom it asked, and that one answers the client.

use std::net::{IpAddr, SocketAddr};

use towpath_datapath::abi::{Addr, Nat, Tuple};
use towpath_datapath::bpf::{Hook, NodeConfig};
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, FIN, Frame, L4, Mac, RST, SYN};
use crate::services::{speaks_of, unreachable};
use crate::world::*;

const PORT: u16 = 30080;

fn switch(w: &mut World, on: bool) {
    let config = NodeConfig { direct_return: on, ..node_config(w.tunnel, w.uplink) };
    w.programs.apply_node(&config).unwrap();
}

/// The frame's addresses that name an address and port of a Service.
fn named(service: SocketAddr) -> (Mac, Mac) {
    let [e, f] = service.port().to_be_bytes();
    if let IpAddr::V4(ip) = service.ip() {
        let [a, b, c, d] = ip.octets();
        return ([2, 0x75, a, b, c, d], [2, 0x75, 0, 0, e, f]);
    }
    let [a, b, c, d, g, h, ..] = Addr::new(service.ip()).name().unwrap().to_le_bytes();
    ([2, 0x76, a, b, c, d], [2, 0x76, g, h, e, f])
}

/// A client's packet that node 2 forwards to pod a, asked at `service`.
fn forwarded(h: &Hosts, sport: u16, l4: L4, service: SocketAddr) -> Frame {
    let (dst_mac, src_mac) = named(service);
    Frame { dst_mac, src_mac, ..arriving(MAC_TUNNEL, h.outside, sport, h.a, 8080, l4) }
}

fn from_node2(w: &World, frame: &Frame) -> Outcome {
    // One that is to be opened at the uplink, and one that the kernel's device opened.
    w.from_uplink(&crate::envelope::wrap(&frame.bytes(), "192.168.50.2"))
}

fn serve(w: &mut World, family: Family, to: SocketAddr) -> Hosts {
    let h = hosts(family);
    for (n, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp), (3, Protocol::Sctp)] {
        let n = n + 100 * family as u32;
        w.serve(n, family, None, PORT, protocol, &[to]);
        w.serve(n + 10, family, Some(h.service), 80, protocol, &[to]);
    }
    h
}

#[test]
fn the_entry_node_names_what_was_asked_and_keeps_a_connection_whose_answers_it_does_not_see() {
    BOTH.into_iter().for_each(|family| {
        in_both_worlds(move |w| {
            let h = serve(w, family, SocketAddr::new(hosts(family).remote, 8080));
            let ask = |w: &World, sport, to: SocketAddr, l4| {
                let frame = arriving(MAC_UPLINK, h.outside, sport, to.ip(), to.port(), l4);
                w.from_uplink(&frame).into_tunnel(w, ip("192.168.50.2"))
            };
            let (port, address) = (SocketAddr::new(h.node, PORT), SocketAddr::new(h.service, 80));
            // Off: the frame's addresses are the tunnel devices'.
            let ordinary = ask(w, 3999, port, L4::syn());
            assert_eq!((&ordinary.dst_mac[..2], ordinary.src_mac), ([2, 0x74].as_slice(), MAC_TUNNEL));
            switch(w, true);
            for (n, service) in [(0, port), (1, address)] {
                for l4 in [L4::syn(), L4::udp(b"x"), L4::Sctp { payload: b"INIT".into(), checksum: true }] {
                    let got = ask(w, 4000 + n, service, l4.clone());
                    assert_eq!((got.dst_mac, got.src_mac), named(service));
                    assert_eq!((got.src, got.dst), ((h.outside, 4000 + n).into(), (h.remote, 8080).into()));
                    assert_eq!(got.l4, l4);
                }
            }
            // What began before goes on as it began; a pod's own question to the port has nothing to do with it.
            let goes_on = ask(w, 3999, port, L4::tcp(ACK));
            assert_eq!(goes_on.src_mac, MAC_TUNNEL);
            let from_pod = w.from_pod(&sent_by(h.a, 4100, h.service, 80, L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!(from_pod.src_mac, MAC_TUNNEL);
            // The handshake is not seen to its end, and the connection must not end with it.
            ask(w, 4000, port, L4::tcp(ACK));
            ask(w, 4000, port, L4::udp(b"again"));
            w.age(170);
            w.programs.collect().unwrap();
            let held: Vec<(u8, u16)> =
                w.programs.connections().unwrap().iter().map(|c| (c.protocol, c.opener.1)).collect();
            assert!(held.contains(&(6, 4000)) && held.contains(&(17, 4000)), "{held:?}");
            assert!(!held.contains(&(6, 4001)) && !held.contains(&(17, 4001)), "half open: {held:?}");
            w.age(7000);
            assert_eq!(ask(w, 4000, port, L4::data(b"late")).dst.port(), 8080);
            // A half that is closed waits for minutes, a whole one for seconds.
            ask(w, 4000, port, L4::tcp(FIN | ACK));
            w.age(200);
            w.programs.collect().unwrap();
            assert_eq!(w.programs.connections().unwrap().len(), 1);
            w.age(60);
            w.programs.collect().unwrap();
            assert!(w.programs.connections().unwrap().is_empty());
        });
    });
}

#[test]
fn the_endpoints_node_answers_the_client_itself() {
    BOTH.into_iter().for_each(|family| {
        in_world(move |w| {
            let h = serve(w, family, SocketAddr::new(hosts(family).a, 8080));
            switch(w, true);
            let (port, address) = (SocketAddr::new(h.node2, PORT), SocketAddr::new(h.service, 80));
            for (n, service) in [(0, port), (1, address)] {
                let sport = 4000 + n;
                let sctp = |text: &str| L4::Sctp { payload: text.into(), checksum: true };
                for (question, reply) in [
                    (L4::syn(), L4::tcp(SYN | ACK)),
                    (L4::tcp(ACK), L4::data(b"hello")),
                    (L4::udp(b"question?"), L4::udp(b"an answer")),
                    (sctp("INIT"), sctp("INIT ACK")),
                ] {
                    let got = from_node2(w, &forwarded(&h, sport, question.clone(), service)).into_pod(w.pod_a);
                    assert_eq!((got.src, got.dst, got.l4), ((h.outside, sport).into(), (h.a, 8080).into(), question));
                    let back = w.from_pod(&sent_by(h.a, 8080, h.outside, sport, reply.clone())).out_of(3, w.uplink);
                    assert_eq!((back.src, back.dst, back.l4), (service, (h.outside, sport).into(), reply));
                }
                // As the kernel's device opened it, and without the addresses: too big for an envelope of ours, say.
                let more = forwarded(&h, sport, L4::data(b"more"), service);
                w.from_tunnel(&more, "192.168.50.2").into_pod(w.pod_a);
                let plain = Frame { dst_mac: MAC_TUNNEL, src_mac: MAC_ROUTER, ..more };
                w.from_tunnel(&plain, "192.168.50.2").into_pod(w.pod_a);
                let back = w.from_pod(&sent_by(h.a, 8080, h.outside, sport, L4::data(b"x"))).out_of(3, w.uplink);
                assert_eq!(back.src, service);
                let error = w.from_pod(&unreachable(MAC_HOST, (h.outside, sport).into(), (h.a, 8080).into()));
                speaks_of(&error.out_of(3, w.uplink), (h.outside, sport).into(), service);
            }
            let direct =
                w.programs.counters().unwrap().into_iter().find(|c| c.reason.name() == "direct_return").unwrap();
            assert_eq!(direct.packets, 6, "one for each connection");
            // The address moves here, and the connection goes on.
            let moved = arriving(MAC_UPLINK, h.outside, 4001, h.service, 80, L4::data(b"by another way"));
            assert_eq!(w.from_uplink(&moved).into_pod(w.pod_a).dst, SocketAddr::new(h.a, 8080));
            // Both tables let go of it together.
            w.age(9 * 3600);
            w.programs.collect().unwrap();
            assert!(w.programs.connections().unwrap().is_empty());
            assert!(w.entries::<Tuple, Nat>("tp_nat").is_empty());
        });
    });
}

/// A load balancer's address that this node announced moves to another one: what was open to an endpoint here comes in the tunnel then.
#[test]
fn a_connection_to_an_endpoint_here_goes_on_when_the_address_moves_away() {
    BOTH.into_iter().for_each(|family| {
        in_world(move |w| {
            let h = serve(w, family, SocketAddr::new(hosts(family).a, 8080));
            let service = SocketAddr::new(h.service, 80);
            for (n, on) in [(0, false), (1, true)] {
                switch(w, on);
                let sport = 4000 + n;
                let client = SocketAddr::new(h.outside, sport);
                let here = |l4| arriving(MAC_UPLINK, h.outside, sport, h.service, 80, l4);
                for (question, reply) in [(L4::syn(), L4::tcp(SYN | ACK)), (L4::tcp(ACK), L4::data(b"hello"))] {
                    assert_eq!(w.from_uplink(&here(question)).into_pod(w.pod_a).dst, SocketAddr::new(h.a, 8080));
                    let back = w.from_pod(&sent_by(h.a, 8080, h.outside, sport, reply)).out_of(3, w.uplink);
                    assert_eq!((back.src, back.dst), (service, client));
                }
                let moved = from_node2(w, &forwarded(&h, sport, L4::data(b"more"), service)).into_pod(w.pod_a);
                assert_eq!((moved.src, moved.dst), (client, SocketAddr::new(h.a, 8080)));
                let back = w.from_pod(&sent_by(h.a, 8080, h.outside, sport, L4::data(b"answer"))).out_of(3, w.uplink);
                assert_eq!((back.src, back.dst), (service, client));
            }
        });
    });
}

/// Not believed, not known or switched off: the answer goes back in the tunnel as ever.
#[test]
fn what_cannot_be_answered_directly_is_answered_through_the_tunnel() {
    BOTH.into_iter().for_each(|family| {
        in_world(move |w| {
            let h = serve(w, family, SocketAddr::new(hosts(family).a, 8080));
            let mut sport = 4000;
            let mut ordinary = |w: &World, service: SocketAddr| {
                sport += 1;
                from_node2(w, &forwarded(&h, sport, L4::syn(), service)).into_pod(w.pod_a);
                let back = w.from_pod(&sent_by(h.a, 8080, h.outside, sport, L4::tcp(SYN | ACK)));
                assert_eq!(back.into_tunnel(w, ip("192.168.50.2")).src, SocketAddr::new(h.a, 8080), "{service}");
            };
            let port = SocketAddr::new(h.node2, PORT);
            ordinary(w, port);
            switch(w, true);
            // No Service's address, no node's, another port, no NodePort.
            for (at, port) in [(h.outside, 80), (h.b, PORT), (h.service, 81), (h.node2, PORT + 1), (h.node2, 80)] {
                ordinary(w, SocketAddr::new(at, port));
            }
            if h.a.is_ipv6() {
                // A name that nobody has.
                ordinary(w, (ip("2001:db8::77"), PORT).into());
            }
            // A Service of which the pod is no endpoint, at that port.
            w.serve(31, family, None, PORT + 2, Protocol::Tcp, &[(h.b, 8080).into(), (h.a, 8081).into()]);
            ordinary(w, SocketAddr::new(h.node2, PORT + 2));
            // One that another proxy serves to the outside.
            w.clients = Clients::Pods;
            w.serve(32, family, None, PORT + 3, Protocol::Tcp, &[(h.a, 8080).into()]);
            ordinary(w, SocketAddr::new(h.node2, PORT + 3));
            // Who is in the cluster, and who is no node.
            let mut of_pod = forwarded(&h, 5000, L4::syn(), port);
            of_pod.src = SocketAddr::new(h.remote, 5000);
            from_node2(w, &of_pod).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 8080, h.remote, 5000, L4::tcp(SYN | ACK))).into_tunnel(w, ip("192.168.50.2"));
            let stranger = forwarded(&h, 5001, L4::syn(), port);
            w.from_tunnel(&stranger, "198.51.100.7").dropped("tunnel_source");
            // A connection that began in the tunnel stays there when it is switched on meanwhile.
            switch(w, false);
            from_node2(w, &forwarded(&h, 5002, L4::syn(), port)).into_pod(w.pod_a);
            switch(w, true);
            from_node2(w, &forwarded(&h, 5002, L4::tcp(ACK), port)).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 8080, h.outside, 5002, L4::data(b"x"))).into_tunnel(w, ip("192.168.50.2"));
            // And one that began directly stays so when it is switched off.
            from_node2(w, &forwarded(&h, 5003, L4::syn(), port)).into_pod(w.pod_a);
            switch(w, false);
            from_node2(w, &forwarded(&h, 5003, L4::tcp(ACK), port)).into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 8080, h.outside, 5003, L4::data(b"x"))).out_of(3, w.uplink);
        });
    });
}

#[test]
fn policy_sees_the_client_and_fragments_follow() {
    BOTH.into_iter().for_each(|family| {
        in_world(move |w| {
            let h = serve(w, family, SocketAddr::new(hosts(family).a, 8080));
            switch(w, true);
            w.isolate(&w.local_a(), 5, 0);
            w.apply_policy();
            let port = SocketAddr::new(h.node2, PORT);
            from_node2(w, &forwarded(&h, 4000, L4::syn(), port)).dropped("ingress_policy");
            w.allow(5, h.outside, RowProtocol::Ports(Protocol::Tcp), 8080, 1);
            w.allow(5, h.outside, RowProtocol::Ports(Protocol::Udp), 8080, 2);
            w.apply_policy();
            from_node2(w, &forwarded(&h, 4000, L4::syn(), port)).into_pod(w.pod_a);
            for (offset, more) in [(0, true), (72, false)] {
                let fragment = Some((9, offset, more));
                let frame = Frame { fragment, ..forwarded(&h, 4001, L4::udp(&[1; 64]), port) };
                let got = from_node2(w, &frame);
                assert_eq!((got.verdict, got.kind, got.ifindex), (REDIRECT, 1, w.pod_a), "{got:?}");
                let mut answer = sent_by(h.a, 8080, h.outside, 4001, L4::udp(&[2; 64]));
                answer.fragment = fragment;
                let got = w.from_pod(&answer);
                assert_eq!((got.verdict, got.kind, got.ifindex), (REDIRECT, 3, w.uplink), "{got:?}");
                if let IpAddr::V4(node2) = h.node2 {
                    assert_eq!(got.bytes[26..30], node2.octets());
                }
            }
            // One client port, two addresses, one endpoint: the second would get the first's answers.
            let local = arriving(MAC_UPLINK, h.outside, 4000, h.node, PORT, L4::syn());
            let refused = w.from_uplink(&local).out_of(2, w.uplink);
            assert!(matches!(refused.l4, L4::Tcp { flags, .. } if flags & RST != 0), "{refused:?}");
            w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4002, h.node, PORT, L4::syn())).into_pod(w.pod_a);
            let second = forwarded(&h, 4002, L4::syn(), port);
            w.run(Hook::FromTunnel, &second.bytes(), w.tunnel, w.tunnel, Some(ip("192.168.50.2")))
                .dropped("no_backend");
        });
    });
}
