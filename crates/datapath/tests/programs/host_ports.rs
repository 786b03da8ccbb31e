//! Host ports: a node's own address and loopback as frontends that lead to a pod.

use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use towpath_model::desired::PodSets;
use towpath_model::{Family, Protocol};

use crate::frame::{ACK, L4, SYN};
use crate::live::Netns;
use crate::sockets::{backend, hear, in_sockets_world, tcp_server};
use crate::world::*;

#[test]
fn a_host_port_is_reached_from_outside_and_by_pods_and_answers_as_the_node() {
    in_both_worlds(|w| {
        for family in BOTH {
            let h = hosts(family);
            let node = SocketAddr::new(h.node, 80);
            w.serve(1 + family as u32, family, Some(h.node), 80, Protocol::Tcp, &[SocketAddr::new(h.a, 8080)]);
            w.serve(11 + family as u32, family, Some(h.node), 80, Protocol::Udp, &[SocketAddr::new(h.b, 53)]);
            let asked = arriving(MAC_UPLINK, h.outside, 4000, h.node, 80, L4::syn());
            let got = w.from_uplink(&asked).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.dst), (h.outside, SocketAddr::new(h.a, 8080)), "the client's own address");
            let back = w.from_pod(&sent_by(h.a, 8080, h.outside, 4000, L4::tcp(SYN | ACK))).out_of(3, w.uplink);
            assert_eq!(back.src, node);
            let asked = arriving(MAC_UPLINK, h.outside, 4000, h.node, 80, L4::udp(b"?"));
            assert_eq!(w.from_uplink(&asked).into_pod(w.pod_b).dst, SocketAddr::new(h.b, 53), "UDP has its own pod");
            // A pod of this node whose socket the hook did not see.
            let got = w.from_pod(&sent_by(h.b, 4001, h.node, 80, L4::syn())).into_pod(w.pod_a);
            assert_eq!((got.src.ip(), got.dst.port()), (h.b, 8080));
            let back = w.from_pod(&sent_by(h.a, 8080, h.b, 4001, L4::tcp(SYN | ACK))).into_pod(w.pod_b);
            assert_eq!(back.src, node);
            // Other ports, and ping, stay the node's.
            w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, h.node, 22, L4::syn())).passed();
        }
    });
}

#[test]
fn a_neighbour_or_pod_that_writes_a_loopback_address_gets_no_host_port_there() {
    in_both_worlds(|w| {
        for (family, loopback) in [(Family::V4, ip("127.0.0.1")), (Family::V6, ip("::1"))] {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(loopback), 80, Protocol::Tcp, &[SocketAddr::new(h.a, 8080)]);
            // Nor a socket of the node, on a node that routes such addresses.
            for l4 in [L4::syn(), L4::udp(b"x")] {
                w.from_uplink(&arriving(MAC_UPLINK, h.outside, 4000, loopback, 80, l4.clone())).dropped("loopback");
                w.from_uplink(&arriving(MAC_UPLINK, loopback, 4000, h.node, 80, l4.clone())).dropped("loopback");
                w.from_pod(&sent_by(h.b, 4000, loopback, 80, l4)).dropped("loopback");
            }
        }
    });
}

#[test]
fn loopback_host_ports_are_the_nodes_and_not_those_of_its_pods() {
    in_sockets_world(|w, _| {
        for (family, loopback) in [(Family::V4, "127.0.0.1"), (Family::V6, "::1")] {
            let name = SocketAddr::new(ip(loopback), 8123);
            w.serve(1 + family as u32, family, Some(name.ip()), 8123, Protocol::Tcp, &[backend(family, 8080)]);
            w.serve(11 + family as u32, family, Some(name.ip()), 8123, Protocol::Udp, &[backend(family, 5353)]);
            let server = tcp_server(backend(family, 8080), b"pod");
            assert_eq!(hear(name), (b"pod".to_vec(), name));
            server.join().unwrap();
            let server = UdpSocket::bind(backend(family, 5353)).unwrap();
            server.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
            let client = UdpSocket::bind(SocketAddr::new(name.ip(), 0)).unwrap();
            client.send_to(b"one", name).unwrap();
            let mut buffer = [0; 8];
            assert_eq!(server.recv_from(&mut buffer).unwrap().0, 3);
        }
        let netns = Netns::new();
        let mut pod = w.local_a();
        pod.netns_cookie = netns.run(crate::sockets::netns_cookie).join().unwrap();
        w.programs.set_pod(&pod, towpath_datapath::bpf::Isolation::Sets(PodSets::default())).unwrap();
        let own = netns.run(|| {
            sh("ip link set lo up");
            let own = TcpListener::bind("127.0.0.1:8123").unwrap();
            let _client = TcpStream::connect("127.0.0.1:8123").unwrap();
            own.set_nonblocking(true).unwrap();
            own.accept().is_ok()
        });
        assert!(own.join().unwrap(), "what a pod says to itself stays in the pod");
    });
}
