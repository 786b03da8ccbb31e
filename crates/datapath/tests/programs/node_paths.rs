//! The tunnel and the uplink: who may send what, and NodePorts for local and remote backends.

use std::net::SocketAddr;

use towpath_datapath::bpf::Hook;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4, RST, SYN};
use crate::world::*;

#[test]
fn the_tunnel_delivers_what_the_owning_node_sends() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for (src, port, outer) in
                [(h.remote, 4000, "192.168.50.2"), (h.node2, 4000, "192.168.50.2"), (h.remote, 4001, "fd50::2")]
            {
                let frame = arriving(MAC_TUNNEL, src, port, h.a, 80, L4::syn());
                let got = w.from_tunnel(&frame, outer).into_pod(w.pod_a);
                assert_eq!((got.src.ip(), got.ttl, got.dst_mac, got.src_mac), (src, 63, MAC_A, MAC_HOST));
                // The answer goes to the node from which the question came, by its tunnel's address whichever that sent from.
                w.from_pod(&sent_by(h.a, 80, src, port, L4::tcp(SYN | ACK))).into_tunnel(w, ip("192.168.50.2"));
                w.from_tunnel(&arriving(MAC_TUNNEL, src, port, h.a, 80, L4::tcp(ACK)), outer).into_pod(w.pod_a);
            }
            let to_node = arriving(MAC_TUNNEL, h.remote, 4000, h.node, 22, L4::syn());
            w.from_tunnel(&to_node, "192.168.50.2").passed();
        }
    });
}

#[test]
fn the_tunnel_takes_no_source_from_who_does_not_own_it() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            let good = arriving(MAC_TUNNEL, h.remote, 4000, h.a, 80, L4::syn());
            w.from_tunnel(&good, "192.168.50.2").into_pod(w.pod_a);
            // Also a flow that is already known.
            for outer in ["192.168.50.3", "192.168.50.1", "198.51.100.9"] {
                w.from_tunnel(&good, outer).dropped("tunnel_source");
            }
            for src in [h.b, h.a, h.node] {
                let frame = arriving(MAC_TUNNEL, src, 4000, h.a, 80, L4::syn());
                w.from_tunnel(&frame, "192.168.50.2").dropped("tunnel_source");
            }
            // Without tunnel metadata (or with another network's identifier) nothing is known of the sender.
            let none = w.run(towpath_datapath::bpf::Hook::FromTunnel, &good.bytes(), w.tunnel, w.tunnel, None);
            none.dropped("tunnel_source");
            // An outside client is forwarded by a node to a pod, by nobody else and to nobody else.
            let client = arriving(MAC_TUNNEL, h.outside, 4000, h.a, 80, L4::syn());
            w.from_tunnel(&client, "198.51.100.7").dropped("tunnel_source");
            let to_node = arriving(MAC_TUNNEL, h.outside, 4000, h.node, 22, L4::syn());
            w.from_tunnel(&to_node, "192.168.50.2").dropped("tunnel_source");
            // What a pod asked of the outside directly is not answered, and so not taken over, by a node.
            w.from_pod(&sent_by(h.a, 4444, h.outside, 443, L4::syn())).passed();
            let answer = arriving(MAC_TUNNEL, h.outside, 443, h.a, 4444, L4::tcp(SYN | ACK));
            w.from_tunnel(&answer, "192.168.50.2").dropped("tunnel_source");
            let nobody = arriving(MAC_TUNNEL, h.remote, 4000, h.outside, 22, L4::syn());
            w.from_tunnel(&nobody, "192.168.50.2").dropped("no_pod");
        }
    });
}

#[test]
fn ingress_policy_holds_for_what_the_tunnel_brings() {
    in_both_worlds(|w| {
        let a = w.local_a();
        w.isolate(&a, 5, 0);
        for h in BOTH.map(hosts) {
            w.allow(5, h.remote, RowProtocol::Ports(Protocol::Tcp), 80, 1);
        }
        w.apply_policy();
        for h in BOTH.map(hosts) {
            let frame = |port| arriving(MAC_TUNNEL, h.remote, 4000, h.a, port, L4::syn());
            w.from_tunnel(&frame(80), "192.168.50.2").into_pod(w.pod_a);
            w.from_tunnel(&frame(81), "192.168.50.2").dropped("ingress_policy");
        }
    });
}

/// IP takes a datagram from a frame to all for its own, whatever is in front of it (CVE-2020-8558 was tried so as well).
#[test]
fn a_frame_to_all_brings_no_other_source_than_one_to_the_node() {
    in_both_worlds(|w| {
        for (h, loopback) in [(hosts(Family::V4), ip("127.0.0.1")), (hosts(Family::V6), ip("::1"))] {
            let to_own = |mac, src, dst, port| w.from_uplink(&arriving(mac, src, 4000, dst, port, L4::udp(b"to all")));
            for all in [[0xff; 6], [0x33, 0x33, 0, 0, 0, 1]] {
                for src in [h.node, h.a, h.remote] {
                    to_own(all, src, h.node, 53).dropped("spoofed_node");
                }
                to_own(all, h.outside, loopback, 53).dropped("loopback");
                to_own(all, loopback, h.node, 53).dropped("loopback");
                to_own(all, h.outside, h.node, 4789).dropped("tunnel_outsider");
                for src in [h.node2, h.outside] {
                    to_own(all, src, h.node, 53).passed();
                    to_own(all, src, h.a, 53).passed();
                }
            }
        }
    });
}

/// The kernel reads on where these programs do not, and puts pieces together.
#[test]
fn what_cannot_be_read_to_its_end_brings_no_address_of_the_cluster_either() {
    in_both_worlds(|w| {
        let run = |frame: &[u8]| w.run(Hook::FromUplink, frame, w.uplink, w.uplink, None);
        // The first piece of a TCP header, and the second.
        let pieces = |src, dst| {
            let mut head = arriving(MAC_UPLINK, src, 4000, dst, 22, L4::Raw { proto: 6, bytes: vec![0; 8] });
            let mut rest = head.clone();
            head.fragment = Some((7, 0, true));
            rest.fragment = Some((7, 8, false));
            [head.bytes(), rest.bytes()]
        };
        // More extension headers than are walked.
        let behind = |src, dst| {
            let mut chain = [[60, 0, 1, 4, 0, 0, 0, 0].as_slice(); 7].concat();
            chain[48] = 17;
            chain.extend([0x0f, 0xa0, 0, 53, 0, 8, 0, 0]);
            [arriving(MAC_UPLINK, src, 0, dst, 0, L4::Raw { proto: 60, bytes: chain }).bytes()]
        };
        let (four, six) = (hosts(Family::V4), hosts(Family::V6));
        for src in [four.node, four.a, four.remote] {
            pieces(src, four.node).iter().for_each(|frame| run(frame).dropped("spoofed_node"));
        }
        for src in [six.node, six.a, six.remote] {
            behind(src, six.node).iter().for_each(|frame| run(frame).dropped("spoofed_node"));
        }
        pieces(four.outside, ip("127.0.0.1")).iter().for_each(|frame| run(frame).dropped("loopback"));
        behind(six.outside, ip("::1")).iter().for_each(|frame| run(frame).dropped("loopback"));
        // Anybody else's is the kernel's.
        for frame in pieces(four.outside, four.node) {
            run(&frame).passed();
        }
        for frame in behind(six.outside, six.node) {
            run(&frame).passed();
        }
    });
}

#[test]
fn the_uplink_takes_no_address_of_the_cluster_from_outside() {
    in_both_worlds(|w| {
        for h in BOTH.map(hosts) {
            for src in [h.node, h.a, h.remote] {
                let frame = arriving(MAC_UPLINK, src, 4000, h.node, 22, L4::syn());
                w.from_uplink(&frame).dropped("spoofed_node");
            }
            for src in [h.node2, h.outside] {
                w.from_uplink(&arriving(MAC_UPLINK, src, 4000, h.node, 22, L4::syn())).passed();
            }
            let tunnelled = |src| arriving(MAC_UPLINK, src, 4000, h.node, 4789, L4::udp(b"vxlan"));
            w.from_uplink(&tunnelled(h.node2)).passed();
            w.from_uplink(&tunnelled(h.outside)).dropped("tunnel_outsider");
            // Also to an address that the node has besides, where a device that another network lent takes them unjudged.
            let further = if h.node.is_ipv4() { ip("198.51.100.1") } else { ip("2001:db8:77::1") };
            let to_further = |src| arriving(MAC_UPLINK, src, 4000, further, 4789, L4::udp(b"vxlan"));
            w.from_uplink(&to_further(h.outside)).passed();
            let mut peers = peers();
            peers[0].addresses.push(further);
            w.programs.apply_peers(&peers).unwrap();
            w.from_uplink(&to_further(h.outside)).dropped("tunnel_outsider");
            w.from_uplink(&to_further(h.node2)).passed();
            // What a pod sends such an address comes in the tunnel, and is the stack's.
            w.from_tunnel(&arriving(MAC_TUNNEL, h.remote, 4000, further, 80, L4::syn()), "192.168.50.2").passed();
            w.from_tunnel(&arriving(MAC_TUNNEL, h.remote, 4000, h.outside, 80, L4::syn()), "192.168.50.2")
                .dropped("no_pod");
            // Not ours: frames for another station.
            let mut other = arriving(MAC_UPLINK, h.a, 1, h.node, 2, L4::syn());
            other.dst_mac = MAC_ROUTER;
            w.from_uplink(&other).passed();
        }
    });
}

#[test]
fn a_node_port_reaches_a_local_backend_and_the_answer_leaves_by_the_routes() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.a, 8080)]);
            w.serve(11 + family as u32, family, None, 30053, Protocol::Udp, &[SocketAddr::new(h.a, 53)]);
            for (port, to, ask, answer) in
                [(30080, 8080, L4::syn(), L4::tcp(SYN | ACK)), (30053, 53, L4::udp(b"q?"), L4::udp(b"answer"))]
            {
                let got = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, port, ask)).into_pod(w.pod_a);
                assert_eq!((got.src, got.dst), (SocketAddr::new(h.outside, 4000), SocketAddr::new(h.a, to)));
                let back = w.from_pod(&sent_by(h.a, to, h.outside, 4000, answer)).out_of(3, w.uplink);
                assert_eq!((back.src, back.dst), (SocketAddr::new(h.node, port), SocketAddr::new(h.outside, 4000)));
            }
        }
    });
}

#[test]
fn ingress_policy_sees_the_outside_clients_own_address() {
    in_both_worlds(|w| {
        let a = w.local_a();
        w.isolate(&a, 5, 0);
        let h = hosts(Family::V4);
        w.serve(1, Family::V4, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.a, 8080)]);
        w.image.cidr_classes.insert("198.51.100.9/32".parse().unwrap(), ClassId(3));
        w.image.set_classes.insert((SetId(5), ClassId(3)), LocalClass(1));
        let key = RowKey {
            set: SetId(5),
            class: LocalClass(1),
            protocol: RowProtocol::Ports(Protocol::Tcp),
            port: 8080,
            port_bits: 16,
        };
        w.image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(1) });
        w.apply_policy();
        w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::syn())).into_pod(w.pod_a);
        let stranger = arriving(MAC_UPLINK, ip("198.51.100.10"), 4000, h.node, 30080, L4::syn());
        w.from_uplink(&stranger).dropped("ingress_policy");
    });
}

#[test]
fn a_node_port_reaches_a_remote_backend_with_the_clients_address() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.remote, 8080)]);
            // This node is the entry.
            let ask = |l4| arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, l4);
            let out = w.from_uplink(&ask(L4::syn())).into_tunnel(w, ip("192.168.50.2"));
            assert_eq!((out.src, out.dst), (SocketAddr::new(h.outside, 4000), SocketAddr::new(h.remote, 8080)));
            let back = arriving(MAC_TUNNEL, h.remote, 8080, h.outside, 4000, L4::tcp(SYN | ACK));
            let back = w.from_tunnel(&back, "192.168.50.2").out_of(3, w.uplink);
            assert_eq!((back.src, back.dst), (SocketAddr::new(h.node, 30080), SocketAddr::new(h.outside, 4000)));
            w.from_uplink(&ask(L4::tcp(ACK))).into_tunnel(w, ip("192.168.50.2"));
            // This node is the backend's.
            let forwarded = arriving(MAC_TUNNEL, h.outside, 5000, h.a, 8080, L4::syn());
            let got = w.from_tunnel(&forwarded, "192.168.50.2").into_pod(w.pod_a);
            assert_eq!(got.src.ip(), h.outside);
            w.from_pod(&sent_by(h.a, 8080, h.outside, 5000, L4::tcp(SYN | ACK))).into_tunnel(w, ip("192.168.50.2"));
            // The client's next packet may come in at another node; the answer follows it.
            let moved = arriving(MAC_TUNNEL, h.outside, 5000, h.a, 8080, L4::tcp(ACK));
            w.from_tunnel(&moved, "192.168.50.3").into_pod(w.pod_a);
            w.from_pod(&sent_by(h.a, 8080, h.outside, 5000, L4::tcp(ACK))).into_tunnel(w, ip("192.168.50.3"));
        }
    });
}

#[test]
fn a_node_port_without_backends_is_refused_at_once() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[]);
            w.serve(11 + family as u32, family, None, 30080, Protocol::Udp, &[]);
            let back = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::syn()));
            let back = back.out_of(2, w.uplink);
            assert_eq!((back.src, back.dst_mac), (SocketAddr::new(h.node, 30080), MAC_ROUTER));
            assert!(matches!(back.l4, L4::Tcp { flags, .. } if flags & RST != 0));
            let back = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 30080, L4::udp(b"x")));
            assert!(matches!(back.out_of(2, w.uplink).l4, L4::Icmp { .. }));
            // Another port is the node's own business.
            w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 30081, L4::syn())).passed();
        }
    });
}

#[test]
fn a_pod_reaches_a_node_port_of_any_node() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
            for (node, port) in [(h.node, 4001), (h.node2, 4002)] {
                let got = w.from_pod(&sent_by(h.a, port, node, 30080, L4::syn())).into_pod(w.pod_b);
                assert_eq!(got.dst.port(), 8080);
                let back = w.from_pod(&sent_by(h.b, 8080, h.a, port, L4::tcp(SYN | ACK))).into_pod(w.pod_a);
                assert_eq!(back.src, SocketAddr::new(node, 30080));
            }
            w.from_pod(&sent_by(h.a, 4000, h.outside, 30080, L4::syn())).passed();
        }
    });
}

#[test]
fn an_ipv6_tunnel_endpoint_is_its_own_address_not_a_mapped_one() {
    in_both_worlds(|w| {
        let mut v6 = peers();
        v6[1].tunnel = ip("fd50::2");
        w.programs.apply_peers(&v6).unwrap();
        for h in BOTH.map(hosts) {
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::syn())).into_tunnel(w, ip("fd50::2"));
            let back = arriving(MAC_TUNNEL, h.remote, 80, h.a, 4000, L4::tcp(SYN | ACK));
            w.from_tunnel(&back, "fd50::2").into_pod(w.pod_a);
            // The node's other address is the node's too; no other's is.
            w.from_tunnel(&back, "192.168.50.2").into_pod(w.pod_a);
            for outer in ["192.168.50.3", "fd50::3", "198.51.100.2"] {
                w.from_tunnel(&back, outer).dropped("tunnel_source");
            }
            w.from_pod(&sent_by(h.a, 4000, h.remote, 80, L4::tcp(ACK))).into_tunnel(w, ip("fd50::2"));
        }
    });
}

#[test]
fn where_another_proxy_serves_the_outside_only_pods_are_translated() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let backend = SocketAddr::new(h.b, 8080);
            w.clients = Clients::Pods;
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[backend]);
            w.serve(11 + family as u32, family, None, 30080, Protocol::Tcp, &[backend]);
            w.clients = Clients::All;
            w.serve(21 + family as u32, family, Some(h.node), 8088, Protocol::Tcp, &[backend]);
            for (at, port) in [(h.service, 80), (h.node, 30080)] {
                let asked = w.from_pod(&sent_by(h.a, 4000 + port, at, port, L4::syn()));
                assert_eq!(asked.into_pod(w.pod_b).dst, backend, "a pod asks {at} port {port}");
                w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, at, port, L4::syn())).passed();
            }
            // A host port is nobody else's.
            let asked = w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 8088, L4::syn()));
            assert_eq!(asked.into_pod(w.pod_b).dst, backend);
        }
    });
}

#[test]
fn a_node_port_changes_hands_without_a_connection_noticing() {
    in_both_worlds(|w| {
        let h = hosts(Family::V4);
        let backend = SocketAddr::new(h.a, 8080);
        let serve = |w: &mut World, clients| {
            w.clients = clients;
            w.serve(1, Family::V4, None, 30080, Protocol::Tcp, &[backend]);
        };
        let from = |w: &World, sport, l4| w.from_uplink(&arriving(MAC_UPLINK, h.outside, sport, h.node, 30080, l4));
        serve(w, Clients::Pods);
        from(w, 4000, L4::syn()).passed();
        // What another proxy translated goes on by the kernel's stack; what is new is ours.
        serve(w, Clients::All);
        from(w, 4000, L4::data(b"more")).passed();
        assert_eq!(from(w, 4001, L4::syn()).into_pod(w.pod_a).dst, backend);
        let back = w.from_pod(&sent_by(h.a, 8080, h.outside, 4001, L4::tcp(SYN | ACK)));
        assert_eq!(back.frame().src, SocketAddr::new(h.node, 30080));
        // And back: ours go on as they were, what is new is the other's.
        serve(w, Clients::Pods);
        assert_eq!(from(w, 4001, L4::data(b"more")).into_pod(w.pod_a).dst, backend);
        from(w, 4002, L4::syn()).passed();
    });
}
