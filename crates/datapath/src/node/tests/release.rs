//! UDP flows whose backend is gone: sockets of pods and of the node, and translations of the veth path, with real datagrams.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tempfile::TempDir;
use towpath_model::desired::{BackendAddress, BackendId, Frontend, FrontendTarget, ServiceId, ServiceTable};
use towpath_model::{NamespacedName, Protocol, family_of};

use super::super::release::{Means, Releaser};
use super::lab::{Lab, Ns, OPEN, PROGRAMS, TestNode, TestPod, root};

/// No datagram may go to a dead address for longer than this after the change.
const BOUND: Duration = Duration::from_secs(2);
/// Longest an answer takes.
const PATIENCE: Duration = Duration::from_secs(3);
const DIAG: Means = Means { diag: true, iterator: false };
const ITERATOR: Means = Means { diag: false, iterator: true };

/// One Service's UDP port at one address: its backends by id, and those that flows may be held to besides.
struct Port<'a> {
    id: u32,
    at: &'a str,
    backends: &'a [(u32, IpAddr)],
    lingering: &'a [(u32, IpAddr)],
}

fn table(ports: &[Port<'_>]) -> ServiceTable {
    let mut table = ServiceTable::default();
    for port in ports {
        let at: SocketAddr = port.at.parse().unwrap();
        let address = Some(at.ip()).filter(|ip| !ip.is_unspecified());
        let frontend = Frontend { address, family: family_of(at.ip()), port: at.port(), protocol: Protocol::Udp };
        let of_family = |list: &[(u32, IpAddr)]| -> BTreeMap<BackendId, BackendAddress> {
            let ours = list.iter().filter(|(_, address)| family_of(*address) == frontend.family);
            ours.map(|(id, address)| {
                (BackendId(*id), BackendAddress { address: *address, port: 53, protocol: Protocol::Udp })
            })
            .collect()
        };
        let (backends, lingering) = (of_family(port.backends), of_family(port.lingering));
        let target = FrontendTarget {
            id: ServiceId(port.id),
            backends: backends.keys().copied().collect(),
            algorithm: Default::default(),
            table: Default::default(),
            affinity_seconds: None,
            sources: None,
            clients: Default::default(),
            service: NamespacedName::new("default", "names"),
            port_name: "dns".to_owned(),
        };
        table.frontends.insert(frontend, target.into());
        table.lingering.insert(frontend, lingering.keys().copied().collect());
        table.backends.extend(backends.into_iter().chain(lingering));
    }
    table
}

const V4: &str = "10.96.0.5:53";
const V6: &str = "[fd00:96::5]:53";
const NODE_PORT: &str = "0.0.0.0:30053";

/// The Service in front of one pod, of both families and with a NodePort; ids as a planner gives them: with the address.
fn in_front_of(pod: &TestPod) -> ServiceTable {
    let number = u32::from(pod.pod.name.name.bytes().map(u32::from).sum::<u32>() as u16) * 10;
    let ids: Vec<(u32, IpAddr)> = (number..).zip(pod.pod.addresses.iter().copied()).collect();
    table(&[
        Port { id: 1, at: V4, backends: &ids, lingering: &[] },
        Port { id: 2, at: V6, backends: &ids, lingering: &[] },
        Port { id: 3, at: NODE_PORT, backends: &ids, lingering: &[] },
    ])
}

/// As [`in_front_of`], without endpoints.
fn without_backends() -> ServiceTable {
    let port = |id, at| Port { id, at, backends: &[], lingering: &[] };
    table(&[port(1, V4), port(2, V6), port(3, NODE_PORT)])
}

fn apply(node: &TestNode, table: ServiceTable) -> Instant {
    node.call(move |node| node.apply_services(&table)).unwrap();
    let applied = Instant::now();
    // As an agent does every second.
    std::thread::sleep(Duration::from_millis(250));
    node.call(|node| node.sweep(Instant::now())).unwrap();
    applied
}

/// Keeps the whole test process in a node's cgroup, where its socket hooks are.
struct Joined {
    home: PathBuf,
}

impl Joined {
    fn new(node: &TestNode) -> Self {
        let own = std::fs::read_to_string("/proc/self/cgroup").unwrap();
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let home = super::super::cgroup_root().unwrap().join(own);
        std::fs::write(node.config.cgroup.as_ref().unwrap().join("cgroup.procs"), "0").unwrap();
        Self { home }
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _back = std::fs::write(self.home.join("cgroup.procs"), "0");
    }
}

/// A directory with the network namespaces of pods in it, as a container runtime keeps them.
fn places(pods: &[&TestPod]) -> (TempDir, Vec<std::os::fd::OwnedFd>) {
    let directory = tempfile::tempdir().unwrap();
    // What is no namespace is passed over.
    std::fs::write(directory.path().join("a-file"), "of somebody else").unwrap();
    nix::unistd::mkfifo(&directory.path().join("a-fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    let mut open = Vec::new();
    for pod in pods {
        let fd = pod.ns.fd();
        let target = format!("/proc/{}/fd/{}", std::process::id(), fd.as_raw_fd());
        std::os::unix::fs::symlink(target, directory.path().join(&pod.pod.name.name)).unwrap();
        open.push(fd);
    }
    (directory, open)
}

fn use_means(node: &TestNode, places: &Path, means: Means) {
    let places = vec![places.to_owned()];
    node.call(move |node| {
        let programs = node.programs.as_ref().unwrap();
        node.releaser = Some(Releaser::start_with(programs, node.facts.netns_cookie, &places, |_| means)?);
        Ok(())
    })
    .unwrap();
}

/// A server that can be asked what it heard.
struct Server(UdpSocket);

impl Server {
    fn at(ns: &Ns, address: IpAddr) -> Self {
        let socket = ns.run(|| UdpSocket::bind((address, 53)).unwrap());
        Self(socket)
    }

    /// Every word that has come, without waiting.
    fn heard(&self) -> Vec<String> {
        self.0.set_nonblocking(true).unwrap();
        let mut buffer = [0; 64];
        std::iter::from_fn(|| {
            let (n, from) = self.0.recv_from(&mut buffer).ok()?;
            let _answered = self.0.send_to(b"heard", from);
            Some(String::from_utf8_lossy(&buffer[..n]).into_owned())
        })
        .collect()
    }

    fn hears(&self, word: &str) -> bool {
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if self.heard().iter().any(|heard| heard == word) {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

/// A client that keeps its socket for ever, as a resolver does.
struct Client {
    name: String,
    socket: UdpSocket,
    to: SocketAddr,
}

impl Client {
    fn new(name: &str, ns: &Ns, to: SocketAddr) -> Self {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = ns.run(|| UdpSocket::bind((any, 0)).unwrap());
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        ns.run(|| socket.connect(to)).unwrap();
        Self { name: name.to_owned(), socket, to }
    }

    fn says(&self, word: &str) -> std::io::Result<usize> {
        self.socket.send(word.as_bytes())
    }

    /// Waits until the socket was ended, sending all the while as an application does that knows of nothing.
    fn is_ended(&self, before: Instant) -> bool {
        let mut buffer = [0; 64];
        while Instant::now() < before {
            let _may_fail = self.says("is anybody there");
            match self.socket.recv(&mut buffer) {
                Err(e) if e.kind() == ErrorKind::ConnectionAborted => return true,
                Ok(_) => {}
                Err(e) => assert!(
                    matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::ConnectionRefused),
                    "{}: {e}",
                    self.name
                ),
            }
        }
        false
    }
}

fn mapped(to: &str) -> SocketAddr {
    match to.parse().unwrap() {
        SocketAddr::V4(to) => SocketAddrV6::new(to.ip().to_ipv6_mapped(), to.port(), 0, 0).into(),
        SocketAddr::V6(to) => to.into(),
    }
}

/// Clients of every kind in a pod and on its node.
fn clients(lab: &Lab, pod: &TestPod) -> Vec<Client> {
    let to = |text: &str| -> SocketAddr { text.parse().unwrap() };
    vec![
        Client::new("pod, IPv4", &pod.ns, to(V4)),
        Client::new("pod, IPv6", &pod.ns, to(V6)),
        Client::new("pod, IPv4 in an IPv6 socket", &pod.ns, mapped(V4)),
        Client::new("pod, NodePort of another node", &pod.ns, to("192.0.2.2:30053")),
        Client::new("node, IPv4", &lab.n1.ns, to(V4)),
        Client::new("node, IPv6", &lab.n1.ns, to(V6)),
        Client::new("node, its own NodePort", &lab.n1.ns, to("192.0.2.1:30053")),
    ]
}

/// Every change that kills a backend, by both ways in which a socket can be ended.
#[test]
fn sockets_that_are_held_to_a_backend_that_is_gone_are_ended_and_no_others() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(12, OPEN));
    let (directory, _open) = places(&[&b, &a]);
    let _joined = Joined::new(&lab.n1);
    let servers = |pod: &TestPod| pod.pod.addresses.clone().into_iter().map(|at| Server::at(&pod.ns, at)).collect();
    let (of_b, of_c): (Vec<Server>, Vec<Server>) = (servers(&b), servers(&c));
    let server = |servers: &[Server], client: &Client| {
        usize::from(client.to.is_ipv6() && !client.name.contains("IPv4")).min(servers.len() - 1)
    };
    for means in [DIAG, ITERATOR] {
        use_means(&lab.n1, directory.path(), means);
        for change in ["swap", "none", "deleted"] {
            apply(&lab.n1, in_front_of(&b));
            let all = clients(&lab, &a);
            // Sockets that nobody translated: to the pod itself, and one that was translated once.
            let direct = Client::new("direct", &a.ns, SocketAddr::new(b.v4(), 53));
            let again = Client::new("first to the Service, then to the pod", &a.ns, V4.parse().unwrap());
            a.ns.run(|| again.socket.connect(SocketAddr::new(b.v4(), 53))).unwrap();
            for client in &all {
                client.says(&client.name).unwrap();
                assert!(of_b[server(&of_b, client)].hears(&client.name), "{means:?}, {change}: {}", client.name);
            }
            let changed = apply(
                &lab.n1,
                match change {
                    "swap" => in_front_of(&c),
                    "none" => without_backends(),
                    _ => ServiceTable::default(),
                },
            );
            for client in &all {
                assert!(client.is_ended(changed + BOUND), "{means:?}, {change}: {} goes on", client.name);
            }
            of_b.iter().for_each(|server| drop(server.heard()));
            for client in &all {
                assert!(client.says("to the dead").is_err(), "{change}: {}", client.name);
            }
            if change == "none" {
                let first = &all[0];
                let refused = a.ns.run(|| first.socket.connect(first.to)).unwrap_err();
                assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "nobody is there");
            }
            apply(&lab.n1, in_front_of(&c));
            for client in &all {
                let ns = if client.name.starts_with("pod") { &a.ns } else { &lab.n1.ns };
                ns.run(|| client.socket.connect(client.to)).unwrap_or_else(|e| panic!("{}: {e}", client.name));
                client.says(&client.name).unwrap();
                assert!(of_c[server(&of_c, client)].hears(&client.name), "{means:?}, {change}: {} again", client.name);
            }
            for untouched in [&direct, &again] {
                untouched.says(&untouched.name).unwrap();
                assert!(of_b[0].hears(&untouched.name), "{means:?}, {change}: {}", untouched.name);
            }
            assert!(of_b.iter().all(|server| !server.heard().contains(&"to the dead".to_owned())));
        }
        let released = lab.n1.call(|node| Ok(node.status().released)).unwrap();
        assert_eq!((released.problem, released.lost), (None, Vec::new()), "{means:?}");
        assert!(released.sockets >= 21, "{means:?}: {}", released.sockets);
    }
}

/// A pod that goes while it still serves keeps its flows; a Service that lost a pod to another does not.
#[test]
fn what_still_serves_keeps_its_flows_unless_it_serves_another() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(12, OPEN));
    let (directory, _open) = places(&[&a]);
    let _joined = Joined::new(&lab.n1);
    use_means(&lab.n1, directory.path(), DIAG);
    let (of_b, of_c) = ((21, b.v4()), (22, c.v4()));
    let at_b = Server::at(&b.ns, b.v4());
    apply(&lab.n1, table(&[Port { id: 1, at: V4, backends: &[of_b], lingering: &[] }]));
    let client = Client::new("client", &a.ns, V4.parse().unwrap());
    // It takes no new flows and serves on.
    apply(&lab.n1, table(&[Port { id: 1, at: V4, backends: &[of_c], lingering: &[of_b] }]));
    std::thread::sleep(BOUND);
    client.says("while it goes").unwrap();
    assert!(at_b.hears("while it goes"));
    // It is another Service's alone now, alive as it is.
    let changed = apply(
        &lab.n1,
        table(&[
            Port { id: 1, at: V4, backends: &[of_c], lingering: &[] },
            Port { id: 9, at: "10.96.0.9:53", backends: &[of_b], lingering: &[] },
        ]),
    );
    assert!(client.is_ended(changed + BOUND));
}

/// Without socket hooks (the test is in no cgroup of the node's) datagrams are translated at the pod's device.
#[test]
fn the_veth_path_translates_anew_when_a_backend_goes() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(12, OPEN));
    let (at_b, at_c) = (Server::at(&b.ns, b.v4()), Server::at(&c.ns, c.v4()));
    apply(&lab.n1, in_front_of(&b));
    let client = Client::new("client", &a.ns, V4.parse().unwrap());
    let outside = Client::new("outside", &lab.outside, "192.0.2.1:30053".parse().unwrap());
    for (number, (server, other, next)) in [(&at_b, &at_c, &c), (&at_c, &at_b, &b)].into_iter().enumerate() {
        for client in [&client, &outside] {
            let word = format!("{number} {}", client.name);
            client.says(&word).unwrap();
            assert!(server.hears(&word), "{word}");
        }
        let changed = apply(&lab.n1, in_front_of(next));
        // What an application says that knows of nothing goes to the new one, soon.
        for client in [&client, &outside] {
            let mut moved = false;
            while !moved && Instant::now() < changed + BOUND {
                let _may_be_refused = client.says("where am I");
                std::thread::sleep(Duration::from_millis(10));
                moved = other.heard().contains(&"where am I".to_owned());
            }
            assert!(moved, "{} stays at the dead", client.name);
        }
        drop(server.heard());
        for client in [&client, &outside] {
            client.says("after").unwrap();
            assert!(other.hears("after"), "{}", client.name);
        }
        assert!(server.heard().is_empty(), "a datagram to the dead");
    }
    // N to 0: refused, and N again.
    let changed = apply(&lab.n1, without_backends());
    let mut refused = false;
    while !refused && Instant::now() < changed + BOUND {
        let _answered = client.says("nobody");
        refused = client.socket.recv(&mut [0; 8]).is_err_and(|e| e.kind() == ErrorKind::ConnectionRefused);
    }
    assert!(refused, "the datagrams of a Service without backends are answered with port unreachable");
    drop((at_b.heard(), at_c.heard()));
    apply(&lab.n1, in_front_of(&c));
    client.says("back").or_else(|_| client.says("back")).unwrap();
    assert!(at_c.hears("back"));
    assert!(lab.n1.call(|node| Ok(node.status().released.translations)).unwrap() >= 5);
}

#[test]
fn a_pod_whose_namespace_is_not_found_is_a_problem_that_says_what_to_do() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN));
    let (directory, _open) = places(&[&b]);
    let _joined = Joined::new(&lab.n1);
    use_means(&lab.n1, directory.path(), DIAG);
    apply(&lab.n1, in_front_of(&b));
    let client = Client::new("client", &a.ns, V4.parse().unwrap());
    apply(&lab.n1, without_backends());
    let problem = |lab: &Lab| lab.n1.call(|node| Ok(node.status().problems.join(";"))).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while problem(&lab).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    let said = problem(&lab);
    assert!(said.contains("1 UDP sockets of 1 pods") && said.contains("HostToContainer"), "{said}");
    drop(client);
    apply(&lab.n1, in_front_of(&b));
    apply(&lab.n1, without_backends());
    let deadline = Instant::now() + PATIENCE;
    while !problem(&lab).is_empty() && Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(problem(&lab), "", "it is over with the socket");
}

/// Thousands of sockets that are to stay cost little, and the few that are to go are found among them.
#[test]
fn the_few_are_found_among_many() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(12, OPEN));
    let (directory, _open) = places(&[&a]);
    let _joined = Joined::new(&lab.n1);
    use_means(&lab.n1, directory.path(), DIAG);
    let (stays, goes) = ("10.96.0.6:53", V4);
    let of = |pod: &TestPod, id| [(id, pod.v4())];
    let (to_b, to_c) = (of(&b, 21), of(&c, 22));
    let port = |id, at| Port { id, at, backends: &to_c, lingering: &[] };
    apply(&lab.n1, table(&[port(1, stays), Port { backends: &to_b, ..port(2, goes) }]));
    // Descriptors are the limit here.
    let many: Vec<Client> = (0..700).map(|n| Client::new(&n.to_string(), &a.ns, stays.parse().unwrap())).collect();
    let few: Vec<Client> = (0..5).map(|n| Client::new(&n.to_string(), &a.ns, goes.parse().unwrap())).collect();
    let changed = apply(&lab.n1, table(&[port(1, stays), port(2, goes)]));
    for client in &few {
        assert!(client.is_ended(changed + BOUND), "{}", client.name);
    }
    for client in &many {
        assert!(client.socket.peer_addr().is_ok(), "{} was ended", client.name);
    }
    let flows = lab.n1.call(|node| node.service_flows()).unwrap();
    let count: u64 = flows
        .flows
        .iter()
        .filter(|(flow, _)| flow.service == (stays.parse::<SocketAddr>().unwrap().ip(), 53))
        .map(|(_, n)| n)
        .sum();
    assert_eq!(count, 700, "and each is counted");
    assert_eq!(lab.n1.call(|node| Ok(node.status().released.sockets)).unwrap(), 5);
}
