//! With the programs: what held beneath them holds, and what only they do.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use towpath_model::desired::{
    Algorithm, BackendAddress, BackendId, ClassId, Frontend, FrontendTarget, LocalClass, PodSets, PolicyImage, Row,
    RowKey, RowProtocol, RuleId, ServiceId, ServiceTable, SetId, Verdict,
};
use towpath_model::{Family, NamespacedName, Protocol, family_of};

use super::lab::{FILTERS, Kind, Lab, Ns, OPEN, PROGRAMS, TestNode, TestPod, root, tcp, tcp_to, udp};
use super::scenarios;

#[test]
fn pods_reach_pods_and_nodes_by_their_own_addresses() {
    if root() {
        scenarios::pods_reach_pods_and_nodes(&Lab::new(PROGRAMS));
        scenarios::pods_reach_pods_and_nodes(&Lab::new(FILTERS));
    }
}

#[test]
fn pods_reach_each_other_over_an_ipv6_underlay() {
    if root() {
        scenarios::pods_reach_pods_and_nodes(&Lab::new(Kind { underlay_v6: true, ..PROGRAMS }));
    }
}

#[test]
fn what_leaves_the_cluster_is_masqueraded() {
    if root() {
        scenarios::outside_sees_the_node(&Lab::new(PROGRAMS));
        scenarios::outside_sees_the_node(&Lab::new(FILTERS));
    }
}

#[test]
fn a_service_address_that_no_service_has_is_refused() {
    if root() {
        scenarios::unknown_service_is_refused(&Lab::new(PROGRAMS));
        scenarios::unknown_service_is_refused(&Lab::new(FILTERS));
    }
}

#[test]
fn the_dns_address_answers_pods_and_node_but_nobody_outside() {
    if root() {
        scenarios::dns_is_local(&Lab::new(PROGRAMS));
    }
}

#[test]
fn the_short_cut_needs_no_routes_and_the_routes_need_no_short_cut() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    lab.n1.ns.sh("ip route flush proto 116; ip -6 route flush proto 116");
    for (from, to) in [(&a, &b), (&a, &c), (&c, &a)] {
        assert!(from.ns.pings(&to.v4().to_string()) && from.ns.pings(&to.v6().to_string()), "by programs alone");
    }
}

#[test]
fn a_pod_whose_labels_are_unknown_talks_to_its_node_only() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, None));
    assert!(lab.n1.ns.pings(&b.v4().to_string()), "its node's probes");
    assert!(!a.ns.pings(&b.v4().to_string()));
    assert!(!b.ns.pings(&a.v4().to_string()));
    assert!(!lab.n2.ns.pings(&b.v4().to_string()), "another node");
    lab.n1.call(move |node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
    assert!(a.ns.pings(&b.v4().to_string()) && b.ns.pings(&a.v4().to_string()), "known now");
}

/// Packets that the tunnel device has received and sent.
fn through_the_tunnel_device(ns: &Ns) -> (u64, u64) {
    ns.run(|| {
        let shown = Command::new("ip").args(["-s", "-j", "link", "show", "towpath-vx"]).output().unwrap();
        let links: serde_json::Value = serde_json::from_slice(&shown.stdout).unwrap();
        let packets = |way: &str| links[0]["stats64"][way]["packets"].as_u64().unwrap();
        (packets("rx"), packets("tx"))
    })
}

#[test]
fn megabytes_between_nodes_pass_by_the_tunnel_device() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, c) = (lab.n1.pod(10, OPEN), lab.n2.pod(10, OPEN));
    let payload: Vec<u8> = (0..8_000_000_u32).map(|n| (n ^ (n >> 8)) as u8).collect();
    for family in [Family::V4, Family::V6] {
        let target = if family == Family::V4 { c.v4() } else { c.v6() };
        let listener = c.ns.run(move || TcpListener::bind((target, 80)).unwrap());
        let before = (through_the_tunnel_device(&lab.n1.ns), through_the_tunnel_device(&lab.n2.ns));
        let mut client =
            a.ns.run(move || TcpStream::connect_timeout(&SocketAddr::new(target, 80), Duration::from_secs(3)).unwrap());
        let (mut server, _) = listener.accept().unwrap();
        for end in [&client, &server] {
            end.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        }
        // What a pod sends is too large for one packet on the wire: it travels in segments that the kernel cuts.
        let sent = payload.clone();
        let sender = std::thread::spawn(move || {
            client.write_all(&sent).unwrap();
            client.shutdown(std::net::Shutdown::Write).unwrap();
            let mut back = Vec::new();
            client.read_to_end(&mut back).unwrap();
            back
        });
        let mut arrived = Vec::new();
        server.read_to_end(&mut arrived).unwrap();
        assert!(arrived == payload, "{family:?}: {} bytes arrived", arrived.len());
        server.write_all(&arrived).unwrap();
        drop(server);
        assert!(sender.join().unwrap() == payload, "{family:?}: and back");
        let after = (through_the_tunnel_device(&lab.n1.ns), through_the_tunnel_device(&lab.n2.ns));
        assert_eq!(before, after, "{family:?}: the tunnel device of node 1, of node 2 (received, sent)");
    }
}

/// An image for pods of node 1: those in `isolated` accept TCP 80 from anybody, and nothing else.
pub(super) fn image(isolated: &[u8], open: &[u8]) -> PolicyImage {
    let set = SetId(7);
    let mut image = PolicyImage::default();
    let addresses = |host: u8| [IpAddr::from([10, 244, 1, host]), format!("fd00:244:1::{host:x}").parse().unwrap()];
    for (hosts, sets) in [(isolated, PodSets::enforced(set, SetId(0))), (open, PodSets::default())] {
        image.pods.extend(hosts.iter().flat_map(|h| addresses(*h)).map(|a| (a, sets)));
    }
    if !isolated.is_empty() {
        let key =
            RowKey { set, class: LocalClass(0), protocol: RowProtocol::Ports(Protocol::Tcp), port: 80, port_bits: 16 };
        image.rows.insert(key, Row { verdict: Verdict::Allow, rule: RuleId(1) });
        image.pod_classes.insert(addresses(99)[0], ClassId(1));
    }
    image
}

#[test]
fn a_policy_isolates_breaks_what_it_forbids_and_lifts() {
    if root() {
        a_policy_isolates(&Lab::new(PROGRAMS));
        a_policy_isolates(&Lab::new(FILTERS));
    }
}

fn a_policy_isolates(lab: &Lab) {
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    lab.n1.call(move |node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
    let (mut allowed, mut forbidden) = (Flow::open(&a, &b, 80), Flow::open(&c, &b, 81));
    assert!(allowed.works() && forbidden.works());
    lab.n1.call(move |node| node.apply_policy(&image(&[11], &[10]))).unwrap();
    assert!(allowed.works(), "an open connection that the policy allows lives on");
    assert!(!forbidden.works(), "one that it forbids does not");
    for from in [&a, &c] {
        assert!(!from.ns.pings(&b.v4().to_string()));
        let closed = SocketAddr::new(b.v4(), 8080);
        let connect = || TcpStream::connect_timeout(&closed, Duration::from_secs(1)).unwrap_err().kind();
        assert_eq!(from.ns.run(connect), ErrorKind::TimedOut, "dropped, not refused");
    }
    assert!(lab.n1.ns.pings(&b.v4().to_string()), "its own node reaches it");
    assert!(b.ns.pings(&c.v4().to_string()), "its own connections are answered");
    lab.n1.call(move |node| node.apply_policy(&image(&[], &[10, 11]))).unwrap();
    assert!(a.ns.pings(&b.v4().to_string()) && c.ns.pings(&b.v6().to_string()));
}

/// An open TCP connection.
pub(super) struct Flow {
    client: TcpStream,
    server: TcpStream,
}

impl Flow {
    pub(super) fn open(from: &TestPod, to: &TestPod, port: u16) -> Self {
        Self::between(&from.ns, &to.ns, SocketAddr::new(to.v4(), port), port)
    }

    pub(super) fn between(from: &Ns, to: &Ns, target: SocketAddr, port: u16) -> Self {
        let listener = to.run(|| TcpListener::bind(("0.0.0.0", port)).unwrap());
        let client = from.run(|| TcpStream::connect_timeout(&target, Duration::from_secs(3)).unwrap());
        let (server, _) = listener.accept().unwrap();
        for end in [&client, &server] {
            end.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
            end.set_nodelay(true).unwrap();
        }
        Self { client, server }
    }

    /// The server speaks first, the client has said nothing for long.
    pub(super) fn is_spoken_to(&mut self) -> bool {
        self.server.write_all(b"z").is_ok() && self.client.read_exact(&mut [0]).is_ok()
    }

    pub(super) fn works(&mut self) -> bool {
        let mut byte = [0];
        self.client.write_all(b"x").is_ok()
            && self.server.read_exact(&mut byte).is_ok()
            && self.server.write_all(b"y").is_ok()
            && self.client.read_exact(&mut byte).is_ok()
    }
}

/// One TCP and one UDP Service on port 8080 of a cluster address, and a NodePort, in front of `backends` on port 80.
pub(super) fn services(backends: &[IpAddr]) -> ServiceTable {
    let mut table = ServiceTable::default();
    for (number, protocol) in [(1, Protocol::Tcp), (2, Protocol::Udp)] {
        for family in [Family::V4, Family::V6] {
            let of_family: Vec<IpAddr> = backends.iter().copied().filter(|a| family_of(*a) == family).collect();
            let ids: BTreeMap<BackendId, BackendAddress> = (1_u32..)
                .zip(&of_family)
                .map(|(n, a)| (BackendId(n + 10 * number + if family == Family::V6 { 100 } else { 0 }), *a))
                .map(|(id, address)| (id, BackendAddress { address, port: 80, protocol }))
                .collect();
            let target = FrontendTarget {
                id: ServiceId(number + if family == Family::V6 { 10 } else { 0 }),
                backends: ids.keys().copied().collect(),
                algorithm: Algorithm::Random,
                table: Default::default(),
                sources: None,
                affinity_seconds: None,
                clients: Default::default(),
                service: NamespacedName::new("default", "web"),
                port_name: protocol.to_string(),
            };
            let address: IpAddr = if family == Family::V4 { "10.96.0.5" } else { "fd00:96::5" }.parse().unwrap();
            for (address, port) in [(Some(address), 8080), (None, 30080)] {
                table.frontends.insert(Frontend { address, family, port, protocol }, target.clone().into());
            }
            table.backends.extend(ids);
        }
    }
    table
}

pub(super) const CLUSTER: [&str; 2] = ["10.96.0.5:8080", "[fd00:96::5]:8080"];

#[test]
fn a_cluster_address_leads_to_local_and_remote_backends_from_pods() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    for backend in [&b, &c] {
        let table = services(&backend.pod.addresses);
        lab.n1.call(move |node| node.apply_services(&table)).unwrap();
        for (address, source) in CLUSTER.iter().zip(&a.pod.addresses) {
            let target: SocketAddr = address.parse().unwrap();
            assert_eq!(tcp_to(&a.ns, &backend.ns, 80, target).unwrap(), *source, "{target}");
        }
    }
    assert!(!a.ns.pings("10.96.0.5"), "a Service address answers no echo");
    let none = services(&[]);
    lab.n1.call(move |node| node.apply_services(&none)).unwrap();
    for address in CLUSTER {
        let started = Instant::now();
        let refused = tcp(&a.ns, &b.ns, address.parse().unwrap()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{address} without backends");
        assert!(started.elapsed() < Duration::from_secs(1), "at once");
    }
}

#[test]
fn a_node_port_answers_outside_clients_with_their_addresses_kept() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (b, c) = (lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    for backend in [&b, &c] {
        for node in [&lab.n1, &lab.n2] {
            let table = services(&backend.pod.addresses);
            node.call(move |node| node.apply_services(&table)).unwrap();
        }
        for (entry, client) in [
            ("192.0.2.1:30080", "198.51.100.9"),
            ("192.0.2.2:30080", "198.51.100.9"),
            ("[2001:db8:1::1]:30080", "2001:db8:2::9"),
        ] {
            let entry: SocketAddr = entry.parse().unwrap();
            let seen = tcp_to(&lab.outside, &backend.ns, 80, entry)
                .unwrap_or_else(|e| panic!("{entry} to {}: {e}", backend.pod.name));
            assert_eq!(seen.to_string(), client, "{entry} to {}", backend.pod.name);
        }
    }
}

#[test]
fn open_connections_survive_the_agent() {
    if !root() {
        return;
    }
    let mut lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    let policy = |node: &mut crate::node::Node| node.apply_policy(&image(&[11], &[10]));
    lab.n1.call(policy).unwrap();
    let table = services(&c.pod.addresses);
    lab.n1.call(move |node| node.apply_services(&table)).unwrap();
    let mut flows = [
        Flow::open(&a, &b, 80),
        Flow::open(&c, &b, 80),
        Flow::open(&a, &c, 80),
        Flow::between(&a.ns, &c.ns, CLUSTER[0].parse().unwrap(), 80),
    ];
    let step = |flows: &mut [Flow; 4], when: &str| {
        for (number, flow) in flows.iter_mut().enumerate() {
            assert!(flow.works(), "flow {number} {when}");
        }
        assert!(!a.ns.pings(&b.v4().to_string()), "isolated {when}");
    };
    step(&mut flows, "before");
    lab.n1.close();
    step(&mut flows, "while the agent is dead");
    lab.n1.open();
    step(&mut flows, "after it came back");
    lab.n1.apply_peers();
    lab.n1.call(policy).unwrap();
    let table = services(&c.pod.addresses);
    lab.n1.call(move |node| node.apply_services(&table)).unwrap();
    step(&mut flows, "after its first sync");
}

#[test]
fn uninstalling_leaves_no_device_and_no_pin() {
    if !root() {
        return;
    }
    let mut lab = Lab::bare(PROGRAMS);
    let (before, pinned_before) = (lab.n1.traces(), pins(&lab.n1));
    lab.n1.open();
    lab.n1.apply_peers();
    let pod = lab.n1.pod(10, OPEN);
    lab.n1.call(|node| node.uninstall()).unwrap();
    assert_eq!(lab.n1.traces(), before);
    assert_eq!(pins(&lab.n1), pinned_before);
    drop(pod);
}

/// Everything that is pinned for the node.
pub(super) fn pins(node: &TestNode) -> String {
    node.ns.sh(&format!("find {} | sort", node.config.bpffs.display()))
}

#[test]
fn a_detached_pod_leaves_no_pin() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let before = pins(&lab.n1);
    let _pod = lab.n1.pod(10, OPEN);
    assert_ne!(pins(&lab.n1), before);
    lab.n1.call(|node| node.detach_pod("container-1-10", "eth0")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(3);
    while pins(&lab.n1) != before && Instant::now() < deadline {
        lab.n1.call(|node| node.sweep(Instant::now())).unwrap();
    }
    assert_eq!(pins(&lab.n1), before);
}

#[test]
fn udp_services_answer_from_their_own_address() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, c) = (lab.n1.pod(10, OPEN), lab.n2.pod(10, OPEN));
    let table = services(&c.pod.addresses);
    lab.n1.call(move |node| node.apply_services(&table)).unwrap();
    let serving = c.ns.run(|| std::net::UdpSocket::bind("0.0.0.0:80").unwrap());
    let asking = a.ns.run(|| std::net::UdpSocket::bind("0.0.0.0:0").unwrap());
    for end in [&serving, &asking] {
        end.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    }
    // Not connected: the client sees whoever answers.
    asking.send_to(b"ping", CLUSTER[0]).unwrap();
    let mut bytes = [0; 8];
    let (_, peer) = serving.recv_from(&mut bytes).unwrap();
    assert_eq!(peer.ip(), a.v4());
    serving.send_to(b"pong", peer).unwrap();
    assert_eq!(asking.recv_from(&mut bytes).unwrap().1.to_string(), CLUSTER[0]);
    assert!(udp(&a.ns, &c.ns, SocketAddr::new(c.v4(), 81)).is_ok());
}

/// Connects with bash from a process of the node's cgroup: whom the server saw.
fn connect_from_cgroup(node: &TestNode, from: &Ns, server: &Ns, target: SocketAddr) -> Result<IpAddr, String> {
    let listener = server.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let cgroup = node.config.cgroup.clone().unwrap();
    let script = format!(
        "echo $$ > {}/cgroup.procs; exec 3<>/dev/tcp/{}/{} && head -c2 <&3",
        cgroup.display(),
        target.ip(),
        target.port()
    );
    let run = || Command::new("timeout").args(["3", "bash", "-c", &script]).output().unwrap();
    std::thread::scope(|scope| {
        let client = scope.spawn(|| from.run(run));
        listener.set_nonblocking(true).unwrap();
        let mut seen = None;
        while !client.is_finished() {
            if let Ok((mut stream, peer)) = listener.accept() {
                stream.write_all(b"ok").unwrap();
                seen = Some(peer.ip());
            }
            std::thread::yield_now();
        }
        let output = client.join().unwrap();
        let words = String::from_utf8_lossy(&output.stderr).into_owned();
        match seen {
            Some(peer) if output.stdout == b"ok" => Ok(peer),
            _ => Err(words),
        }
    })
}

#[test]
fn processes_of_the_node_and_its_pods_connect_to_services() {
    if !root() {
        return;
    }
    let lab = Lab::new(PROGRAMS);
    let (a, b, c) = (lab.n1.pod(10, OPEN), lab.n1.pod(11, OPEN), lab.n2.pod(10, OPEN));
    let (cluster, node_port) = (CLUSTER[0].parse().unwrap(), "192.0.2.1:30080".parse().unwrap());
    for backend in [&b, &c] {
        let table = services(&backend.pod.addresses);
        lab.n1.call(move |node| node.apply_services(&table)).unwrap();
        for target in [cluster, node_port] {
            let node = connect_from_cgroup(&lab.n1, &lab.n1.ns, &backend.ns, target);
            assert_eq!(node.unwrap().to_string(), "192.0.2.1", "the node to {target} at {}", backend.pod.name);
            let pod = connect_from_cgroup(&lab.n1, &a.ns, &backend.ns, target);
            assert_eq!(pod.unwrap(), a.v4(), "a pod to {target} at {}", backend.pod.name);
        }
    }
    let none = services(&[]);
    lab.n1.call(move |node| node.apply_services(&none)).unwrap();
    for ns in [&a.ns, &lab.n1.ns] {
        let refused = connect_from_cgroup(&lab.n1, ns, &c.ns, cluster).unwrap_err();
        assert!(refused.contains("Connection refused"), "{refused}");
    }
}

#[test]
fn clusters_of_one_family_work() {
    if root() {
        let kind = |family| Kind { only: Some(family), ..PROGRAMS };
        scenarios::one_family(&Lab::new(kind(Family::V4)), "198.51.100.9", "192.0.2.1");
        scenarios::one_family(&Lab::new(kind(Family::V6)), "2001:db8:2::9", "2001:db8:1::1");
    }
}

#[test]
fn addresses_that_no_pod_has_are_refused_at_once() {
    if root() {
        scenarios::dead_addresses_are_refused(&Lab::new(PROGRAMS));
    }
}
