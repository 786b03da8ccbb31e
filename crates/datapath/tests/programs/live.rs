//! Real packets between real namespaces: what single frames cannot show (segmentation offload, partial checksums,
//! redirection into a pod).

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::thread;
use std::time::{Duration, Instant};

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::world::*;

const PATIENCE: Duration = Duration::from_secs(10);

/// A network namespace that lives as long as this.
pub struct Netns(File);

impl Netns {
    pub fn new() -> Netns {
        let make = || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            File::open("/proc/thread-self/ns/net").unwrap()
        };
        Netns(thread::spawn(make).join().unwrap())
    }

    /// Runs something inside, on a thread of its own.
    pub fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> thread::JoinHandle<T> {
        let namespace = self.0.try_clone().unwrap();
        thread::spawn(move || {
            nix::sched::setns(namespace.as_fd(), nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    pub fn sh(&self, line: String) {
        self.run(move || sh(&line)).join().unwrap();
    }

    fn path(&self) -> String {
        use std::os::fd::AsRawFd;
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Moves the pod's end of a veth into a namespace of its own, as an attached pod has it.
fn plumb(host: &str, inner: &str, mac: &str, v4: &str, v6: &str) -> Netns {
    let pod = Netns::new();
    sh(&format!("ip link set {inner} netns {}", pod.path()));
    pod.sh(format!(
        "set -e; ip link set lo up
        ip link set {inner} address {mac} up
        ip addr add {v4}/32 dev {inner}; ip addr add {v6}/128 dev {inner} nodad
        ip route add 169.254.1.1 dev {inner} scope link; ip route add default via 169.254.1.1 dev {inner}
        ip neigh add 169.254.1.1 lladdr 02:74:70:00:00:01 dev {inner} nud permanent
        ip -6 neigh add fe80::1 lladdr 02:74:70:00:00:01 dev {inner} nud permanent
        ip -6 route add default via fe80::1 dev {inner}
        {}",
        until_taken(v6)
    ));
    sh(&format!(
        "set -e; ip route add {v4}/32 dev {host}; ip -6 route add {v6}/128 dev {host}
        ip neigh add {v4} lladdr {mac} dev {host} nud permanent; ip -6 neigh add {v6} lladdr {mac} dev {host} nud permanent"
    ));
    pod
}

fn in_live_world(test: impl FnOnce(&mut World, Netns, Netns) + Send + 'static) {
    in_world(|w| {
        for pod in [w.pod_a, w.pod_b] {
            w.attach(pod);
        }
        let a = plumb("tpa", "pa", "02:00:00:00:00:0a", "10.1.0.10", "fd01::10");
        let b = plumb("tpb", "pb", "02:00:00:00:00:0b", "10.1.0.11", "fd01::11");
        test(w, a, b);
    });
}

/// A server in a namespace that sends everything back, for one connection.
fn echo_once(netns: &Netns, at: SocketAddr) -> thread::JoinHandle<SocketAddr> {
    let (ready, started) = std::sync::mpsc::channel();
    let server = netns.run(move || {
        let listener = TcpListener::bind(at).unwrap();
        ready.send(()).unwrap();
        let (mut stream, client) = listener.accept().unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut writer = stream.try_clone().unwrap();
        let mut buffer = vec![0; 1 << 16];
        loop {
            match stream.read(&mut buffer).unwrap() {
                0 => return client,
                n => writer.write_all(&buffer[..n]).unwrap(),
            }
        }
    });
    started.recv().unwrap();
    server
}

fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|n| (n * 31 + n / 251) as u8).collect()
}

/// Sends much and gets the same back; what the client sees as its peer.
fn exchange(netns: &Netns, to: SocketAddr, len: usize) -> thread::JoinHandle<()> {
    netns.run(move || {
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let sent = pattern(len);
        let mut writer = stream.try_clone().unwrap();
        let copy = sent.clone();
        let sender = thread::spawn(move || {
            writer.write_all(&copy).unwrap();
            writer.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let mut got = Vec::new();
        stream.read_to_end(&mut got).unwrap();
        sender.join().unwrap();
        assert!(got == sent, "{} bytes of {} came back right", got.len(), sent.len());
    })
}

#[test]
fn megabytes_pass_between_pods_and_through_a_service() {
    in_live_world(|w, a, b| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[SocketAddr::new(h.b, 8080)]);
            for target in [SocketAddr::new(h.b, 8080), SocketAddr::new(h.service, 80)] {
                let server = echo_once(&b, SocketAddr::new(h.b, 8080));
                exchange(&a, target, 4 << 20).join().unwrap();
                assert_eq!(server.join().unwrap().ip(), h.a);
            }
        }
        let counts = w.programs.counters().unwrap();
        let of = |name| counts.iter().find(|c| c.reason.name() == name).unwrap();
        assert!(of("local_delivery").bytes > 16 << 20);
        assert!(of("service_translated").packets > 0);
        assert_eq!(of("internal").packets, 0);
    });
}

#[test]
fn the_node_reaches_a_pod_and_a_pod_its_node_through_the_stack() {
    in_live_world(|w, a, _b| {
        let a_pod = w.local_a();
        w.isolate(&a_pod, 5, 0);
        w.apply_policy();
        for family in BOTH {
            let h = hosts(family);
            let server = echo_once(&a, SocketAddr::new(h.a, 8080));
            let mut stream = TcpStream::connect_timeout(&SocketAddr::new(h.a, 8080), PATIENCE).unwrap();
            stream.write_all(b"probe").unwrap();
            stream.shutdown(std::net::Shutdown::Write).unwrap();
            let mut got = Vec::new();
            stream.read_to_end(&mut got).unwrap();
            assert_eq!(got, b"probe");
            server.join().unwrap();
            let listener = TcpListener::bind(SocketAddr::new(h.node, 9000)).unwrap();
            let client = a.run(move || TcpStream::connect_timeout(&SocketAddr::new(h.node, 9000), PATIENCE).is_ok());
            assert_eq!(listener.accept().unwrap().1.ip(), h.a);
            assert!(client.join().unwrap());
        }
    });
}

#[test]
fn a_service_without_backends_refuses_real_sockets_at_once() {
    in_live_world(|w, a, _b| {
        for family in BOTH {
            let h = hosts(family);
            w.serve(1 + family as u32, family, Some(h.service), 80, Protocol::Tcp, &[]);
            w.serve(11 + family as u32, family, Some(h.service), 53, Protocol::Udp, &[]);
            let tcp = SocketAddr::new(h.service, 80);
            let began = Instant::now();
            let error = a.run(move || TcpStream::connect_timeout(&tcp, PATIENCE).unwrap_err()).join().unwrap();
            assert_eq!(error.kind(), ErrorKind::ConnectionRefused, "TCP {family:?}");
            let udp = SocketAddr::new(h.service, 53);
            let error = a.run(move || {
                let socket = UdpSocket::bind((if udp.is_ipv4() { "0.0.0.0" } else { "::" }, 0)).unwrap();
                socket.set_read_timeout(Some(PATIENCE)).unwrap();
                socket.connect(udp).unwrap();
                socket.send(b"anyone?").unwrap();
                socket.recv(&mut [0; 64]).unwrap_err()
            });
            assert_eq!(error.join().unwrap().kind(), ErrorKind::ConnectionRefused, "UDP {family:?}");
            assert!(began.elapsed() < Duration::from_secs(2));
        }
    });
}

#[test]
fn a_datagram_in_fragments_reaches_the_pod() {
    in_live_world(|_w, a, b| {
        let h = hosts(Family::V4);
        let (ready, started) = std::sync::mpsc::channel();
        let server = b.run(move || {
            let socket = UdpSocket::bind(SocketAddr::new(h.b, 53)).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            ready.send(()).unwrap();
            let mut buffer = vec![0; 9000];
            let (n, _) = socket.recv_from(&mut buffer).unwrap();
            buffer[..n].to_vec()
        });
        started.recv().unwrap();
        a.run(move || {
            let socket = UdpSocket::bind(SocketAddr::new(h.a, 0)).unwrap();
            socket.send_to(&pattern(4000), SocketAddr::new(h.b, 53)).unwrap();
        })
        .join()
        .unwrap();
        assert!(server.join().unwrap() == pattern(4000));
    });
}

#[test]
fn isolating_a_server_breaks_only_the_connections_that_the_policy_forbids() {
    in_live_world(|w, a, b| {
        let h = hosts(Family::V4);
        let open = |port: u16| -> (TcpStream, TcpStream) {
            let (ready, started) = std::sync::mpsc::channel();
            let server = b.run(move || {
                let listener = TcpListener::bind(SocketAddr::new(h.b, port)).unwrap();
                ready.send(()).unwrap();
                listener.accept().unwrap().0
            });
            started.recv().unwrap();
            let client = a.run(move || TcpStream::connect_timeout(&SocketAddr::new(h.b, port), PATIENCE).unwrap());
            (client.join().unwrap(), server.join().unwrap())
        };
        let (mut kept_client, mut kept) = open(80);
        let (mut cut_client, cut) = open(81);
        let b_pod = w.local_b();
        w.isolate(&b_pod, 5, 5);
        w.allow(5, IpAddr::from([10, 1, 0, 10]), RowProtocol::Ports(Protocol::Tcp), 80, 42);
        w.apply_policy();
        let mut buffer = [0; 16];
        // The server speaks first: a reply, although its egress set allows nothing.
        kept.write_all(b"still here").unwrap();
        kept_client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(kept_client.read(&mut buffer).unwrap(), 10);
        kept_client.write_all(b"me too").unwrap();
        kept.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(kept.read(&mut buffer).unwrap(), 6);
        cut_client.write_all(b"gone").unwrap();
        let mut cut = cut;
        cut.set_read_timeout(Some(Duration::from_millis(600))).unwrap();
        assert_eq!(cut.read(&mut buffer).unwrap_err().kind(), ErrorKind::WouldBlock);
    });
}
