//! Clients outside, and Services whose endpoints are no pods of the pod network: pods with `hostNetwork` on another node and on the node that
//! is asked, and an address outside the cluster. What is asked of another node comes from the node that was asked, by ports of its own;
//! what a node serves itself comes from the client. Nothing of it breaks when agents die.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};

const ANSWER: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(20);
/// The second host outside, which is nobody's client.
const FAR: [&str; 2] = ["203.0.113.10", "2001:db8:113::10"];
/// Source ports of the entry node.
const PORTS: std::ops::RangeInclusive<u16> = 61_000..=65_535;

const OBJECTS: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: there, labels: {app: there}}
spec:
  nodeName: n2
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{containerPort: 8088}]}]
---
apiVersion: v1
kind: Pod
metadata: {name: here, labels: {app: here}}
spec:
  nodeName: n1
  hostNetwork: true
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{containerPort: 8088}]}]
---
apiVersion: v1
kind: Service
metadata: {name: there}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: there}
  ports:
  - {name: web, port: 80, targetPort: 8088, nodePort: 30080}
  - {name: udp, port: 53, targetPort: 5353, nodePort: 30053, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: here}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: here}
  ports:
  - {name: web, port: 80, targetPort: 8088, nodePort: 30081}
  - {name: udp, port: 53, targetPort: 5353, nodePort: 30054, protocol: UDP}
---
apiVersion: v1
kind: Service
metadata: {name: local}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  externalTrafficPolicy: Local
  selector: {app: here}
  ports: [{port: 80, targetPort: 8088, nodePort: 30082}]
---
apiVersion: v1
kind: Service
metadata: {name: elsewhere}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  ports: [{name: udp, port: 53, nodePort: 30055, protocol: UDP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: elsewhere-4, labels: {kubernetes.io/service-name: elsewhere}}
addressType: IPv4
ports: [{name: udp, port: 5353, protocol: UDP}]
endpoints: [{addresses: ["203.0.113.10"]}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: elsewhere-6, labels: {kubernetes.io/service-name: elsewhere}}
addressType: IPv6
ports: [{name: udp, port: 5353, protocol: UDP}]
endpoints: [{addresses: ["2001:db8:113::10"]}]
"#;

struct Scene {
    cluster: Cluster,
    /// Of n1, which everybody asks, one a family.
    entry: Vec<IpAddr>,
    n1: Place,
    n2: Place,
    client: Place,
    far: Place,
}

fn set_up() -> Result<Scene> {
    let cluster = Cluster::up("e2e-hostnet", 2, Families::Dual)?;
    cluster.apply_text(OBJECTS)?;
    for pod in ["there", "here"] {
        cluster.wait_pod(pod)?;
    }
    let node = cluster.get("node", "n1")?;
    let addresses = node.pointer("/status/addresses").and_then(|list| list.as_array()).cloned().unwrap_or_default();
    let internal = addresses.iter().filter(|a| a.pointer("/type").is_some_and(|kind| kind == "InternalIP"));
    let entry: Vec<IpAddr> = internal
        .map(|a| address(a.pointer("/address").and_then(|ip| ip.as_str()).unwrap_or_default()))
        .collect::<Result<_>>()?;
    ensure!(entry.len() == 2, "n1 has {entry:?}");
    // Answers must come the way that the questions went.
    for filter in ["all", "default", "eth0"] {
        for node in ["n1", "n2"] {
            let said = cluster.node(node, &format!("echo 1 > /proc/sys/net/ipv4/conf/{filter}/rp_filter"))?;
            ensure!(said.ok, "rp_filter of {filter} on {node}: {}", said.all());
        }
    }
    let far = Path::new("/run/netns").join(format!("tp-{}-outside2", cluster.name()));
    let [n1, n2, client] =
        [Place::of_node(&cluster, "n1")?, Place::of_node(&cluster, "n2")?, Place::of_node(&cluster, "outside")?];
    Ok(Scene { entry, n1, n2, client, far: Place::of_netns("the host far away", &far)?, cluster })
}

/// The addresses from which a UDP server sees questions that were asked of `at` over `count` sockets at once; it answers each with
/// what it was asked, and the client sees the answer come from whom it asked.
fn exchanges(scene: &Scene, server: &Place, at: SocketAddr, count: usize, size: usize) -> Result<Vec<SocketAddr>> {
    let any = |v4: bool| -> IpAddr { if v4 { [0; 4].into() } else { [0; 16].into() } };
    let socket = server.enter(|| Ok(UdpSocket::bind((any(at.is_ipv4()), 5353))?))?;
    socket.set_read_timeout(Some(ANSWER))?;
    let clients: Vec<UdpSocket> = scene.client.enter(|| {
        (0..count)
            .map(|_| {
                let client = UdpSocket::bind((any(at.is_ipv4()), 0))?;
                client.set_read_timeout(Some(ANSWER))?;
                client.connect(at)?;
                Ok(client)
            })
            .collect()
    })?;
    let mut buffer = vec![0; 65_536];
    let mut seen = Vec::new();
    for (n, client) in (0_u8..).zip(&clients) {
        client.send(&vec![n; size]).with_context(|| format!("ask {at}"))?;
        let (length, from) = socket.recv_from(&mut buffer).with_context(|| format!("{at} asked by socket {n}"))?;
        ensure!(buffer.get(..length) == Some(&vec![n; size]), "{length} bytes of another's");
        seen.push(from);
    }
    for (from, n) in seen.iter().zip(0_u8..) {
        socket.send_to(&vec![n ^ 0xff; size], from)?;
    }
    for (n, client) in (0_u8..).zip(&clients) {
        let length = client.recv(&mut buffer).with_context(|| format!("the answer of {at} to socket {n}"))?;
        ensure!(buffer.get(..length) == Some(&vec![n ^ 0xff; size]), "socket {n} got {length} bytes of another's");
    }
    drop(socket);
    // Nobody listens any more: the clients are told, by the address that they asked.
    let client = clients.first().context("a client")?;
    wait("the refusal", PATIENCE, || {
        client.set_read_timeout(Some(Duration::from_millis(500)))?;
        client.send(b"anybody?").err().map_or_else(
            || match client.recv(&mut [0; 64]) {
                Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => Ok(()),
                other => bail!("{other:?}"),
            },
            |_refused_meanwhile| Ok(()),
        )
    })?;
    Ok(seen)
}

/// The page that the web server behind `at` gives, which names the client as the server sees it.
fn page(scene: &Scene, at: SocketAddr) -> Result<(String, SocketAddr)> {
    let said = scene.cluster.outside(&format!("curl -sS -g -m 4 http://{at}/"))?.all();
    let field = |name: &str| said.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned());
    let (Some(pod), Some(client)) = (field("pod:"), field("client:")) else { bail!("{at} says {said}") };
    Ok((pod, client.parse().with_context(|| format!("{client:?}"))?))
}

fn client_address(scene: &Scene, to: IpAddr) -> Result<IpAddr> {
    scene.client.enter(|| {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect((to, 9))?;
        Ok(socket.local_addr()?.ip())
    })
}

#[test]
fn clients_outside_reach_endpoints_that_are_no_pods() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = set_up()?;
    for entry in scene.entry.clone() {
        let own = client_address(&scene, entry)?;
        for (port, pod, seen) in [(30080, "there", entry), (30081, "here", own), (30082, "here", own)] {
            let at = SocketAddr::new(entry, port);
            let (served, client) = wait(&format!("{at} to answer"), PATIENCE, || page(&scene, at))?;
            ensure!(served == pod && client.ip() == seen, "{at}: pod {served} sees {client}, not {seen}");
            ensure!(PORTS.contains(&client.port()) == (seen == entry), "{at}: {client}");
        }
        let far = address(FAR.iter().find(|ip| ip.contains(':') != entry.is_ipv4()).context("no such address")?)?;
        for (port, server, seen) in [(30053, &scene.n2, entry), (30054, &scene.n1, own), (30055, &scene.far, entry)] {
            let at = SocketAddr::new(entry, port);
            // In one packet, and in several.
            for size in [20, 4000] {
                let clients = exchanges(&scene, server, at, 50, size).with_context(|| format!("{size} bytes"))?;
                ensure!(clients.iter().all(|client| client.ip() == seen), "{at}: {clients:?}, not {seen}");
                let ports: BTreeSet<u16> = clients.iter().map(SocketAddr::port).collect();
                ensure!(ports.len() == 50, "{at}: some have one port: {clients:?}");
                ensure!(seen != entry || ports.iter().all(|port| PORTS.contains(port)), "{at}: {ports:?}");
            }
        }
        reaches(&scene, far)?;
    }
    same_port_at_two_nodes(&scene)?;
    agents_die(&scene)?;
    scene.cluster.down()
}

/// That host is no part of the cluster, and reached by the network's ways alone.
fn reaches(scene: &Scene, far: IpAddr) -> Result<()> {
    let said = scene.cluster.node("n1", &format!("ping -c 1 -W 2 {far}"))?;
    ensure!(said.ok, "{}", said.all());
    Ok(())
}

/// One client's port for connections to two nodes, both to one endpoint, and each with its own.
fn same_port_at_two_nodes(scene: &Scene) -> Result<()> {
    let nodes = scene.cluster.nodes()?;
    let at = |node: &str| {
        let ip = nodes.iter().find(|(name, _)| name == node).map(|(_, ip)| ip.as_str()).unwrap_or_default();
        Ok::<_, anyhow::Error>(SocketAddr::new(address(ip)?, 30080))
    };
    let (one, other) = (at("n1")?, at("n2")?);
    scene.client.enter(|| {
        let mut first = Session::open_from(40_001, one, ANSWER)?;
        first.ask(ANSWER)?;
        let mut second = Session::open_from(40_001, other, ANSWER)?;
        second.ask(ANSWER)?;
        first.ask(ANSWER).map(drop)
    })
}

fn agents_die(scene: &Scene) -> Result<()> {
    let load = Load::default();
    let at = |port| scene.entry.iter().map(move |ip| SocketAddr::new(*ip, port)).collect::<Vec<_>>();
    let (there, here) = (at(30080), at(30081));
    let kept = [
        ("another node's", Load::sessions(&scene.client, &there, 50)?),
        ("the node's own", Load::sessions(&scene.client, &here, 50)?),
    ];
    std::thread::scope(|scope| {
        for (what, sessions) in kept {
            let load = &load;
            scope.spawn(move || load.keep(what, sessions, Duration::from_millis(400)));
        }
        for (what, to) in [("another node's", &there), ("the node's own", &here)] {
            let load = &load;
            scope.spawn(move || {
                scene.client.enter(|| {
                    load.open(what, to, 60);
                    Ok(())
                })
            });
        }
        let killed = (0..4).try_for_each(|n| {
            let node = if n % 2 == 0 { "n1" } else { "n2" };
            let pid = wait("an agent", PATIENCE, || machine::lab_agent(scene.cluster.name(), node))?;
            std::thread::sleep(Duration::from_millis(300 * n));
            machine::kill(pid)?;
            wait("another agent", PATIENCE, || match machine::lab_agent(scene.cluster.name(), node)? {
                same if same == pid => bail!("process {pid} is still there"),
                _ => Ok(()),
            })
        });
        std::thread::sleep(Duration::from_secs(3));
        load.ends();
        killed
    })?;
    load.judge(300, 300)
}
