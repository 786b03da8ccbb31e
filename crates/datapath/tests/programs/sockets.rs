//! The socket hooks, which the kernel cannot test-run: real sockets in a cgroup and network namespace made for the test.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use towpath_model::desired::*;
use towpath_model::{Family, Protocol};

use crate::live::Netns;
use crate::world::*;

const PATIENCE: Duration = Duration::from_secs(5);
/// A process is in one cgroup at a time.
static ONE_CGROUP: Mutex<()> = Mutex::new(());

/// A cgroup that this process is in until it is dropped.
struct Cgroup {
    dir: PathBuf,
    home: PathBuf,
}

impl Cgroup {
    fn enter() -> Cgroup {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let root = mounts
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&"cgroup2"))
            .map(|fields| PathBuf::from(fields[1]))
            .expect("cgroup v2 is not mounted");
        let own = fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let cgroup = Cgroup { dir: root.join(format!("towpath-test-{}", std::process::id())), home: root.join(own) };
        fs::create_dir(&cgroup.dir).unwrap();
        fs::write(cgroup.dir.join("cgroup.procs"), "0").unwrap();
        cgroup
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.home.join("cgroup.procs"), "0");
        let _ = fs::remove_dir(&self.dir);
    }
}

pub fn netns_cookie() -> u64 {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    let (mut cookie, mut len) = (0u64, 8 as libc::socklen_t);
    // SAFETY: the option is eight bytes, which is what the pointers say.
    let ret = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    assert_eq!(ret, 0);
    cookie
}

/// Gives a namespace's own loopback the backends' addresses.
pub fn backends_on_lo() -> String {
    let addresses = "ip link set lo up; ip addr add 10.7.0.1/32 dev lo; ip addr add fd07::1/128 dev lo nodad";
    format!("set -e; {addresses}; {}", until_taken("fd07::1"))
}

/// The test's node has its backends on addresses of its own loopback.
pub fn in_sockets_world(test: impl FnOnce(&mut World, &Path) + Send + 'static) {
    if !may_run() {
        return;
    }
    let guard = ONE_CGROUP.lock().unwrap_or_else(PoisonError::into_inner);
    in_world(|w| {
        sh(&backends_on_lo());
        let config =
            towpath_datapath::bpf::NodeConfig { netns_cookie: netns_cookie(), ..node_config(w.tunnel, w.uplink) };
        w.programs.apply_node(&config).unwrap();
        let cgroup = Cgroup::enter();
        w.programs.attach_cgroup(&cgroup.dir).unwrap();
        test(w, &cgroup.dir);
        w.programs.detach_cgroup().unwrap();
    });
    drop(guard);
}

pub fn backend(family: Family, port: u16) -> SocketAddr {
    SocketAddr::new(if family == Family::V4 { ip("10.7.0.1") } else { ip("fd07::1") }, port)
}

/// Names as a client writes them: v4, v6, and v4 in an IPv6 socket.
fn spellings(service: [IpAddr; 2], port: u16) -> Vec<(Family, SocketAddr)> {
    let mapped = |ip: IpAddr| match ip {
        IpAddr::V4(v4) => SocketAddr::V6(SocketAddrV6::new(v4.to_ipv6_mapped(), port, 0, 0)),
        IpAddr::V6(_) => panic!("IPv4"),
    };
    vec![
        (Family::V4, SocketAddr::new(service[0], port)),
        (Family::V6, SocketAddr::new(service[1], port)),
        (Family::V4, mapped(service[0])),
    ]
}

pub fn tcp_server(at: SocketAddr, says: &'static [u8]) -> thread::JoinHandle<()> {
    let listener = TcpListener::bind(at).unwrap();
    thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(says).unwrap();
    })
}

pub fn hear(to: SocketAddr) -> (Vec<u8>, SocketAddr) {
    let mut stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let peer = stream.peer_addr().unwrap();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    (got, peer)
}

#[test]
fn tcp_connects_to_a_backend_and_believes_in_the_service() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            w.serve(
                1 + family as u32,
                family,
                Some(hosts(family).service),
                80,
                Protocol::Tcp,
                &[backend(family, 8080)],
            );
        }
        for (family, name) in spellings(BOTH.map(|f| hosts(f).service), 80) {
            let server = tcp_server(backend(family, 8080), b"hello");
            assert_eq!(hear(name), (b"hello".to_vec(), name));
            server.join().unwrap();
        }
    });
}

/// A UDP socket that can send to this spelling.
fn udp_for(name: SocketAddr) -> UdpSocket {
    let any = if name.is_ipv4() { IpAddr::from(Ipv4Addr::UNSPECIFIED) } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind((any, 0)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn udp_sockets_hear_the_service_answer_connected_or_not() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            w.serve(
                1 + family as u32,
                family,
                Some(hosts(family).service),
                53,
                Protocol::Udp,
                &[backend(family, 5353)],
            );
        }
        for (family, name) in spellings(BOTH.map(|f| hosts(f).service), 53) {
            let server = UdpSocket::bind(backend(family, 5353)).unwrap();
            let answering = thread::spawn(move || {
                let mut buffer = [0; 64];
                for _ in 0..2 {
                    let (n, from) = server.recv_from(&mut buffer).unwrap();
                    server.send_to(&buffer[..n], from).unwrap();
                }
            });
            let mut buffer = [0; 64];
            let unconnected = udp_for(name);
            unconnected.send_to(b"one", name).unwrap();
            let (n, from) = unconnected.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..n], from), (b"one".as_slice(), name), "unconnected");
            let connected = udp_for(name);
            connected.connect(name).unwrap();
            assert_eq!(connected.peer_addr().unwrap(), name);
            connected.send(b"two").unwrap();
            let (n, from) = connected.recv_from(&mut buffer).unwrap();
            assert_eq!((&buffer[..n], from), (b"two".as_slice(), name), "connected");
            answering.join().unwrap();
        }
    });
}

#[test]
fn a_service_without_backends_refuses_in_the_call() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            w.serve(1 + family as u32, family, Some(hosts(family).service), 80, Protocol::Tcp, &[]);
            w.serve(11 + family as u32, family, Some(hosts(family).service), 80, Protocol::Udp, &[]);
        }
        for (_, name) in spellings(BOTH.map(|f| hosts(f).service), 80) {
            assert_eq!(TcpStream::connect(name).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{name}");
            assert_eq!(udp_for(name).connect(name).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{name}");
            assert_eq!(udp_for(name).send_to(b"x", name).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{name}");
        }
    });
}

#[test]
fn a_node_port_answers_on_every_nodes_address_and_on_loopback() {
    in_sockets_world(|w, _| {
        for family in BOTH {
            w.serve(1 + family as u32, family, None, 30080, Protocol::Tcp, &[backend(family, 8080)]);
        }
        for family in BOTH {
            let h = hosts(family);
            let loopback = if family == Family::V4 { ip("127.0.0.1") } else { ip("::1") };
            for node in [h.node, h.node2, loopback] {
                let server = tcp_server(backend(family, 8080), b"backend");
                let name = SocketAddr::new(node, 30080);
                assert_eq!(hear(name), (b"backend".to_vec(), name));
                server.join().unwrap();
            }
        }
        // A number that is no Service's is whoever's listens there.
        let server = tcp_server("127.0.0.1:30081".parse().unwrap(), b"loopback");
        assert_eq!(hear("127.0.0.1:30081".parse().unwrap()).0, b"loopback");
        server.join().unwrap();
    });
}

#[test]
fn a_pod_is_translated_and_a_stranger_in_the_cgroup_is_not() {
    in_sockets_world(|w, _| {
        let h = hosts(Family::V4);
        let backends: Vec<SocketAddr> = (0..8).map(|n| backend(Family::V4, 8080 + n)).collect();
        w.serve(1, Family::V4, Some(h.service), 80, Protocol::Tcp, &backends);
        w.table
            .frontends
            .values_mut()
            .map(std::sync::Arc::make_mut)
            .for_each(|target| target.affinity_seconds = Some(60));
        w.apply_services();
        let name = SocketAddr::new(h.service, 80);
        let attempt = move || {
            // Nothing listens: a translated connection is refused by the loopback, an untranslated one finds no route.
            sh("ip link set lo up; ip addr replace 10.7.0.1/32 dev lo");
            TcpStream::connect(name).unwrap_err().kind()
        };
        let netns = Netns::new();
        assert_eq!(netns.run(attempt).join().unwrap(), ErrorKind::NetworkUnreachable);
        let mut pod = w.local_a();
        pod.netns_cookie = netns.run(netns_cookie).join().unwrap();
        w.programs.set_pod(&pod, towpath_datapath::bpf::Isolation::HostOnly).unwrap();
        assert_eq!(netns.run(attempt).join().unwrap(), ErrorKind::ConnectionRefused);
        // Affinity knows the pod by its address, as the veth path does: that frame goes to the same backend.
        let of_socket = netns.run(move || {
            let listeners: Vec<TcpListener> = backends.iter().map(|at| TcpListener::bind(at).unwrap()).collect();
            listeners.iter().for_each(|listener| listener.set_nonblocking(true).unwrap());
            let _streams: Vec<TcpStream> = (0..5).map(|_| TcpStream::connect(name).unwrap()).collect();
            let hit = |l: &TcpListener| (0..5).filter(|_| l.accept().is_ok()).count();
            listeners
                .iter()
                .map(|l| (l.local_addr().unwrap().port(), hit(l)))
                .filter(|(_, n)| *n > 0)
                .collect::<Vec<_>>()
        });
        let of_socket = of_socket.join().unwrap();
        assert_eq!(of_socket.len(), 1, "{of_socket:?}");
        assert_eq!(of_socket[0].1, 5);
        w.programs.set_pod(&pod, towpath_datapath::bpf::Isolation::Sets(PodSets::default())).unwrap();
        let frame = w.from_pod(&sent_by(h.a, 4000, h.service, 80, crate::frame::L4::syn()));
        assert_eq!(frame.passed().frame().dst.port(), of_socket[0].0);
    });
}

#[test]
fn links_to_the_cgroup_are_replaced_in_place() {
    in_sockets_world(|w, dir| {
        let family = Family::V4;
        w.serve(1, family, Some(hosts(family).service), 80, Protocol::Tcp, &[]);
        w.programs.attach_cgroup(dir).unwrap();
        assert_eq!(TcpStream::connect((hosts(family).service, 80)).unwrap_err().kind(), ErrorKind::ConnectionRefused);
        w.programs.detach_cgroup().unwrap();
        w.programs.detach_cgroup().unwrap();
        // Without links nothing is translated.
        sh("ip route del default");
        assert_eq!(TcpStream::connect((hosts(family).service, 80)).unwrap_err().kind(), ErrorKind::NetworkUnreachable);
    });
}

#[test]
fn what_a_socket_believes_is_not_forgotten_for_others() {
    in_sockets_world(|w, _| {
        let family = Family::V4;
        let name = SocketAddr::new(hosts(family).service, 53);
        w.serve(1, family, Some(name.ip()), 53, Protocol::Udp, &[backend(family, 5353)]);
        let server = UdpSocket::bind(backend(family, 5353)).unwrap();
        let (connected, unconnected) = (udp_for(name), udp_for(name));
        connected.connect(name).unwrap();
        unconnected.send_to(b"question", name).unwrap();
        let mut buffer = [0; 16];
        let (_, asker) = server.recv_from(&mut buffer).unwrap();
        // More sockets than any table of all would have room for.
        for _ in 0..70_000 {
            udp_for(name).connect(name).unwrap();
        }
        server.send_to(b"answer", asker).unwrap();
        assert_eq!(unconnected.recv_from(&mut buffer).unwrap(), (6, name));
        assert_eq!(connected.peer_addr().unwrap(), name);
    });
}

#[test]
fn one_socket_hears_the_services_answer_from_each_of_many_backends() {
    in_sockets_world(|w, _| {
        let family = Family::V4;
        let name = SocketAddr::new(hosts(family).service, 53);
        let backends: Vec<SocketAddr> = (0..30).map(|n| backend(family, 5300 + n)).collect();
        let servers: Vec<UdpSocket> = backends.iter().map(|at| UdpSocket::bind(at).unwrap()).collect();
        w.serve(1, family, Some(name.ip()), 53, Protocol::Udp, &backends);
        let asking = udp_for(name);
        for _ in 0..500 {
            asking.send_to(b"question", name).unwrap();
        }
        let mut buffer = [0; 16];
        for server in &servers {
            server.set_nonblocking(true).unwrap();
            let (_, asker) = server.recv_from(&mut buffer).expect("500 questions reach each of 30");
            server.send_to(b"answer", asker).unwrap();
            assert_eq!(asking.recv_from(&mut buffer).unwrap(), (6, name));
        }
    });
}

#[test]
fn where_another_proxy_serves_the_node_its_sockets_are_left_alone_and_its_pods_are_not() {
    in_sockets_world(|w, _| {
        let service = SocketAddr::new(hosts(Family::V4).service, 80);
        let at = backend(Family::V4, 8080);
        w.clients = Clients::Pods;
        w.serve(1, Family::V4, Some(service.ip()), 80, Protocol::Tcp, &[at]);
        // Nothing listens there, and the address is nobody's: without translation there is no connection.
        assert!(TcpStream::connect_timeout(&service, Duration::from_millis(200)).is_err());
        let cookie = netns_cookie();
        let pod = LocalPod { netns_cookie: cookie, ..w.local_a() };
        w.programs.set_pod(&pod, towpath_datapath::bpf::Isolation::Sets(PodSets::default())).unwrap();
        let server = tcp_server(at, b"hello");
        assert_eq!(hear(service), (b"hello".to_vec(), service));
        server.join().unwrap();
    });
}
