//! Pods that the socket hooks are to leave alone: real sockets in a pod's namespace whose owner changes his mind.
//!
//! The pod has its backends on addresses of its own loopback and no route elsewhere, so what a hook translates arrives, and what it leaves
//! alone finds no way.

use std::io::{ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::time::Duration;

use towpath_datapath::abi::Load;
use towpath_datapath::bpf::Isolation;
use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::live::Netns;
use crate::sockets::{backend, backends_on_lo, in_sockets_world, netns_cookie};
use crate::world::*;

const PATIENCE: Duration = Duration::from_secs(5);

/// A pod in a namespace of its own, and Services for it: TCP 80, UDP 53.
fn pod(w: &mut World) -> (Netns, LocalPod) {
    for family in BOTH {
        let service = Some(hosts(family).service);
        w.serve(1 + family as u32, family, service, 80, Protocol::Tcp, &[backend(family, 8080)]);
        w.serve(11 + family as u32, family, service, 53, Protocol::Udp, &[backend(family, 5353)]);
    }
    w.table.frontends.values_mut().for_each(|target| Arc::make_mut(target).algorithm = Algorithm::LeastConnections);
    w.apply_services();
    let netns = Netns::new();
    netns.sh(backends_on_lo());
    let pod = LocalPod { netns_cookie: netns.run(netns_cookie).join().unwrap(), ..w.local_a() };
    w.programs.set_pod(&pod, Isolation::Sets(PodSets::default())).unwrap();
    (netns, pod)
}

/// What becomes of each way to ask the Service: connect by TCP, by UDP, send without connecting.
fn attempts(netns: &Netns, family: Family) -> [Option<ErrorKind>; 3] {
    let service = hosts(family).service;
    let ask = move || {
        let udp = || UdpSocket::bind((backend(family, 0).ip(), 0)).unwrap();
        [
            TcpStream::connect((service, 80)).err(),
            udp().connect((service, 53)).err(),
            udp().send_to(b"x", (service, 53)).err(),
        ]
        .map(|error| error.map(|error| error.kind()))
    };
    netns.run(ask).join().unwrap()
}

/// Sockets that are counted to backends.
fn counted(w: &World) -> u32 {
    w.entries::<u32, Load>("tp_loads").iter().map(|(_, load)| load.sockets).sum()
}

const NO_WAY: [Option<ErrorKind>; 3] = [Some(ErrorKind::NetworkUnreachable); 3];
/// Nobody listens for TCP; UDP has somewhere to go.
const TRANSLATED: [Option<ErrorKind>; 3] = [Some(ErrorKind::ConnectionRefused), None, None];

#[test]
fn sockets_of_a_pod_that_is_taken_out_are_nobodys_until_it_is_put_back() {
    in_sockets_world(|w, _| {
        let (netns, pod) = pod(w);
        let all = |expected| BOTH.into_iter().for_each(|family| assert_eq!(attempts(&netns, family), expected));
        all(TRANSLATED);
        assert!(w.programs.set_translated_at(&pod, TranslatedAt::Device).unwrap());
        assert!(!w.programs.set_translated_at(&pod, TranslatedAt::Device).unwrap(), "it is already");
        all(NO_WAY);
        // What a restart and each full check do.
        w.programs.adopt_pod(&pod).unwrap();
        all(NO_WAY);
        assert!(w.programs.set_translated_at(&pod, TranslatedAt::Sockets).unwrap());
        all(TRANSLATED);
        w.programs.adopt_pod(&pod).unwrap();
        all(TRANSLATED);
        // From the first packet on.
        w.programs.remove_pod(&pod).unwrap();
        w.programs.enter_pod(&pod, Isolation::HostOnly, TranslatedAt::Device).unwrap();
        all(NO_WAY);
    });
}

#[test]
fn what_was_translated_before_goes_on_and_believes_in_the_service() {
    in_sockets_world(|w, _| {
        let (netns, pod) = pod(w);
        for family in BOTH {
            w.programs.set_translated_at(&pod, TranslatedAt::Sockets).unwrap();
            let service = hosts(family).service;
            let (tcp, udp): (SocketAddr, SocketAddr) = ((service, 80).into(), (service, 53).into());
            let begin = move || {
                let listener = TcpListener::bind(backend(family, 8080)).unwrap();
                let server = UdpSocket::bind(backend(family, 5353)).unwrap();
                let stream = TcpStream::connect(tcp).unwrap();
                let (accepted, _) = listener.accept().unwrap();
                let [connected, unconnected] =
                    [0, 0].map(|port| UdpSocket::bind((backend(family, 0).ip(), port)).unwrap());
                connected.connect(udp).unwrap();
                unconnected.send_to(b"one", udp).unwrap();
                let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
                (stream, accepted, server, connected, unconnected, from)
            };
            let (mut stream, mut accepted, server, connected, unconnected, from) = netns.run(begin).join().unwrap();
            w.programs.set_translated_at(&pod, TranslatedAt::Device).unwrap();
            for socket in [&server, &connected, &unconnected] {
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
            }
            assert_eq!(stream.peer_addr().unwrap(), tcp);
            stream.write_all(b"question").unwrap();
            let mut buffer = [0; 64];
            assert_eq!(accepted.read(&mut buffer).unwrap(), 8);
            assert_eq!(connected.peer_addr().unwrap(), udp);
            connected.send(b"two").unwrap();
            let (_, asker) = server.recv_from(&mut buffer).unwrap();
            server.send_to(b"answer", asker).unwrap();
            assert_eq!(connected.recv_from(&mut buffer).unwrap(), (6, udp));
            server.send_to(b"late answer", from).unwrap();
            assert_eq!(unconnected.recv_from(&mut buffer).unwrap(), (11, udp), "asked before, answered after");
            // The next datagram of the same socket is left alone.
            assert_eq!(unconnected.send_to(b"x", udp).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
            // And a socket that connects anew forgets what it was translated to, and is not counted to it any more.
            assert_eq!(counted(w), 2);
            connected.connect(backend(family, 5353)).unwrap();
            assert_eq!(connected.peer_addr().unwrap(), backend(family, 5353));
            assert_eq!(counted(w), 1);
            drop((stream, accepted));
            assert_eq!(counted(w), 0);
        }
    });
}
