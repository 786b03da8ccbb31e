//! Pods that take themselves, or are taken by their namespace, out of the socket hooks' hands (`towpath.dev/socket-services: disabled`):
//! what a Service is asked leaves them with the Service's own address, everything works as it does for others, and neither a change of
//! the annotation nor an agent's death breaks or betrays a connection. All sockets here are in the node's cgroup, where the hooks are.

#[path = "socket_services/tap.rs"]
mod tap;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tap::Tap;
use towpath_walkthrough::cluster::{Cluster, Families, Pod, wait};
use towpath_walkthrough::in_charge::{annotate_pod, status_text};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::udp::{Joined, Server};

const ANSWER: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(15);
const ANNOTATION: &str = "towpath.dev/socket-services";

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports:
  - {name: http, port: 8080, targetPort: 80, nodePort: 30080}
  - {name: udp, port: 53, targetPort: 5353, protocol: UDP}
---
apiVersion: v1
kind: Namespace
metadata: {name: mesh, annotations: {towpath.dev/socket-services: disabled}}
"#;

/// Ports of clients, each used once.
static PORT: AtomicU16 = AtomicU16::new(20_000);

fn port() -> u16 {
    PORT.fetch_add(1, Ordering::Relaxed)
}

/// A pod with the annotation.
fn saying(pod: &str, value: &str) -> String {
    pod.replacen("metadata: {", &format!("metadata: {{annotations: {{{ANNOTATION}: {value}}}, "), 1)
}

struct Scene {
    cluster: Cluster,
    /// The Service's addresses.
    service: Vec<IpAddr>,
    nodes: Vec<IpAddr>,
    /// Addresses of its endpoints.
    backends: BTreeSet<IpAddr>,
    _cgroup: Joined,
    _echoes: Vec<Server>,
}

impl Scene {
    fn up() -> Result<Self> {
        let cluster = Cluster::up("e2e-sockets", 2, Families::Dual)?;
        let shell = |name: &str| shell(name, "n1", "");
        cluster.apply_text(OBJECTS)?;
        cluster.apply_text(
            &[
                server("near", "n1", "app: web"),
                server("far", "n2", "app: web"),
                shell("plain"),
                saying(&shell("apart"), "disabled"),
                saying(&shell("vague"), "\"off\""),
                shell("meshed").replacen("metadata: {", "metadata: {namespace: mesh, ", 1),
                saying(&shell("joined").replacen("metadata: {", "metadata: {namespace: mesh, ", 1), "enabled"),
            ]
            .concat(),
        )?;
        let (mut backends, mut echoes) = (BTreeSet::new(), Vec::new());
        for name in ["near", "far"] {
            let pod = cluster.wait_pod(name)?;
            let place = Place::of_pod(&cluster, &pod)?;
            for ip in pod.ips {
                echoes.push(Server::at(&place, (ip, 5353).into())?);
                backends.insert(ip);
            }
        }
        let web = cluster.get("svc", "web")?;
        let ips = web.pointer("/spec/clusterIPs").and_then(|ips| ips.as_array()).cloned().unwrap_or_default();
        let service = ips.iter().map(|ip| address(ip.as_str().unwrap_or_default())).collect::<Result<_>>()?;
        let nodes = cluster.nodes()?.iter().map(|(_, ip)| address(ip)).collect::<Result<_>>()?;
        let cgroup = Joined::node(&cluster, "n1")?;
        Ok(Self { cluster, service, nodes, backends, _cgroup: cgroup, _echoes: echoes })
    }

    fn place(&self, pod: &str) -> Result<Place> {
        if !["meshed", "joined"].contains(&pod) {
            return Place::of_pod(&self.cluster, &self.cluster.wait_pod(pod)?);
        }
        wait("a pod of the mesh", PATIENCE, || {
            let out = self.cluster.try_kubectl(&["-n", "mesh", "get", "pod", pod, "-o", "json"])?.stdout;
            Place::of_pod(&self.cluster, &Pod::from_json(&serde_json::from_slice(&out)?))
        })
    }

    /// Everything that can be asked of the Service from a place, and where the packets went: to the addresses that were asked, or to the
    /// endpoints.
    fn ask(&self, from: &Place, way: Way) -> Result<()> {
        let mut tap = Tap::in_pod(from)?;
        for ip in &self.service {
            self.connects(from, &mut tap, (*ip, 8080).into(), way)?;
            self.sends(from, &mut tap, (*ip, 53).into(), way)?;
        }
        for ip in &self.nodes {
            self.connects(from, &mut tap, (*ip, 30080).into(), way)?;
        }
        Ok(())
    }

    fn judge(&self, from: &Place, asked: SocketAddr, went: &BTreeSet<SocketAddr>, way: Way) -> Result<()> {
        let as_asked = went.iter().all(|to| *to == asked);
        let translated = went.iter().all(|to| self.backends.contains(&to.ip()));
        let right = match way {
            Way::Device => as_asked,
            Way::Socket => translated,
        };
        ensure!(right && !went.is_empty(), "{}: packets to {asked} left for {went:?}, not {way:?}", from.name());
        Ok(())
    }

    fn connects(&self, from: &Place, tap: &mut Tap, to: SocketAddr, way: Way) -> Result<()> {
        let port = port();
        let mut session = from.enter(|| Session::open_from(port, to, ANSWER))?;
        ensure!(session.peer()? == to, "{}: asked {to}, believes in {}", from.name(), session.peer()?);
        let answer = session.ask(ANSWER).with_context(|| format!("{to} asked by {}", from.name()))?;
        ensure!(["near", "far"].contains(&answer.trim()), "{answer}");
        self.judge(from, to, &tap.went_from(port), way)
    }

    /// By a socket that connects, and by one that does not.
    fn sends(&self, from: &Place, tap: &mut Tap, to: SocketAddr, way: Way) -> Result<()> {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let mut buffer = [0; 64];
        for connects in [true, false] {
            let port = port();
            let socket = from.enter(|| Ok(UdpSocket::bind((any, port))?))?;
            socket.set_read_timeout(Some(ANSWER))?;
            if connects {
                socket.connect(to)?;
                ensure!(socket.peer_addr()? == to, "{}: asked {to}, believes in {}", from.name(), socket.peer_addr()?);
                socket.send(b"me")?;
            } else {
                socket.send_to(b"me", to)?;
            }
            let (_, who) = socket.recv_from(&mut buffer).with_context(|| format!("{to} asked by {}", from.name()))?;
            ensure!(who == to, "{}: asked {to}, answered by {who}", from.name());
            self.judge(from, to, &tap.went_from(port), way)?;
        }
        Ok(())
    }

    fn explain(&self, from: &str) -> Result<String> {
        let mut explain = Command::new(self.cluster.towpath());
        explain.args(["explain", from, "svc/web", "8080"]).env("KUBECONFIG", self.cluster.kubeconfig());
        Ok(String::from_utf8_lossy(&explain.output()?.stdout).into_owned())
    }
}

/// Where a connection is translated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    Socket,
    Device,
}

#[test]
fn a_pod_that_asks_for_it_has_its_sockets_left_alone_and_every_service_works() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = Scene::up()?;
    for (pod, way) in [
        ("plain", Way::Socket),
        ("apart", Way::Device),
        ("meshed", Way::Device),
        ("joined", Way::Socket),
        ("vague", Way::Socket),
    ] {
        let place = scene.place(pod)?;
        if pod == "plain" {
            wait("the Service to answer", PATIENCE, || scene.ask(&place, way))?;
        }
        // None may begin with another way than it is to go.
        scene.ask(&place, way)?;
    }
    is_told(&scene)?;
    changes_live(&scene)?;
    outlives_the_agent(&scene)?;
    is_refused_at_once(&scene)?;
    let Scene { cluster, _cgroup: cgroup, _echoes: echoes, .. } = scene;
    drop((echoes, cgroup));
    cluster.down()
}

/// By `status`, by `explain`, and where a value means nothing by an Event on the pod.
fn is_told(scene: &Scene) -> Result<()> {
    let status = status_text(&scene.cluster)?;
    let line = status.lines().find(|line| line.contains("sockets left alone")).unwrap_or_default();
    ensure!(line.starts_with("n1: ") && line.ends_with(": default/apart, mesh/meshed"), "{status}");
    ensure!(
        status.contains("Pod default/vague: annotation towpath.dev/socket-services: \"off\" means nothing"),
        "{status}"
    );
    for (from, moment) in [
        ("pod/plain", "when the socket connects"),
        ("pod/apart", "at the pod's device (pod default/apart says towpath.dev/socket-services: disabled)"),
        ("mesh/pod/meshed", "at the pod's device (namespace mesh says towpath.dev/socket-services: disabled)"),
        ("mesh/pod/joined", "when the socket connects"),
    ] {
        let said = scene.explain(from)?;
        ensure!(said.contains(moment), "{from}: {said}");
    }
    wait("an Event", Duration::from_secs(30), || {
        let events = scene.cluster.list("events", "")?;
        let about = |event: &serde_json::Value| {
            let at = |path: &str| event.pointer(path).and_then(|text| text.as_str()).unwrap_or_default().to_owned();
            let object = at("/regarding/name") + &at("/involvedObject/name");
            object == "vague" && at("/reason") == "FieldNotUnderstood"
        };
        ensure!(events.iter().any(about), "{events:?}");
        Ok(())
    })
}

/// An open connection stays what it was, and the next one is what the annotation says: both ways.
fn changes_live(scene: &Scene) -> Result<()> {
    let place = scene.place("plain")?;
    let to: SocketAddr = (*scene.service.first().context("no address")?, 8080).into();
    for (value, before, after) in [(Some("disabled"), Way::Socket, Way::Device), (None, Way::Device, Way::Socket)] {
        let mut tap = Tap::in_pod(&place)?;
        let (tcp, udp) = (port(), port());
        let mut open = place.enter(|| Session::open_from(tcp, to, ANSWER))?;
        let held = place.enter(|| Ok(UdpSocket::bind(("0.0.0.0", udp))?))?;
        held.set_read_timeout(Some(ANSWER))?;
        held.connect((to.ip(), 53))?;
        annotate_pod(&scene.cluster, "plain", ANNOTATION, value)?;
        wait("the change", PATIENCE, || scene.ask(&place, after))?;
        tap.went();
        open.ask(ANSWER).context("over the connection from before")?;
        scene.judge(&place, to, &tap.went_from(tcp), before)?;
        ensure!(open.peer()? == to, "the peer of the connection from before is {}", open.peer()?);
        held.send(b"me")?;
        held.recv(&mut [0; 64]).context("over the UDP socket from before")?;
        scene.judge(&place, (to.ip(), 53).into(), &tap.went_from(udp), before)?;
    }
    Ok(())
}

/// Connections all the time while the agent is killed and the next one comes: none fails, none goes another way.
fn outlives_the_agent(scene: &Scene) -> Result<()> {
    let place = scene.place("apart")?;
    let to: SocketAddr = (*scene.service.first().context("no address")?, 8080).into();
    let pid = machine::lab_agent(scene.cluster.name(), "n1")?;
    let mut tap = Tap::in_pod(&place)?;
    machine::kill(pid)?;
    let (killed, mut back) = (Instant::now(), None);
    // And for a moment after it is ready: the first plan is in the kernel.
    while back.is_none_or(|at: Instant| at.elapsed() < Duration::from_secs(1)) {
        ensure!(killed.elapsed() < Duration::from_secs(60), "no agent came back: {}", status_text(&scene.cluster)?);
        scene.connects(&place, &mut tap, to, Way::Device)?;
        if back.is_none() {
            let ready =
                status_text(&scene.cluster)?.lines().any(|line| line.starts_with(" n1 ") && line.contains(" yes "));
            back = (ready && machine::lab_agent(scene.cluster.name(), "n1").is_ok_and(|new| new != pid))
                .then(Instant::now);
        }
    }
    scene.ask(&scene.place("plain")?, Way::Socket)
}

/// A Service whose endpoints have all gone.
fn is_refused_at_once(scene: &Scene) -> Result<()> {
    let place = scene.place("apart")?;
    let patch = ["patch", "svc", "web", "-p", r#"{"spec":{"selector":{"app":"nobody"}}}"#];
    ensure!(scene.cluster.try_kubectl(&patch)?.status.success(), "the selector was not changed");
    for ip in &scene.service {
        wait("a refusal", PATIENCE, || {
            let refused = place.enter(|| Ok(TcpStream::connect_timeout(&(*ip, 8080).into(), ANSWER)))?;
            match refused.map_err(|error| error.kind()) {
                Err(ErrorKind::ConnectionRefused) => Ok(()),
                other => bail!("{ip}: {other:?}"),
            }
        })?;
    }
    Ok(())
}
