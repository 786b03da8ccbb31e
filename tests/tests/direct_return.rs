//! Direct server return: a client outside asks one node, the endpoint is on another, and that one answers: seen on both nodes' wires.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, recv, socket};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};

const ANSWER: Duration = Duration::from_secs(3);
const PATIENCE: Duration = Duration::from_secs(20);
const EXTERNAL: &str = "203.0.113.7";

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n2
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{containerPort: 80}, {containerPort: 5353, protocol: UDP}]}]
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  externalIPs: [203.0.113.7]
  ports:
  - {name: http, port: 8080, targetPort: 80, nodePort: 30080}
  - {name: udp, port: 53, targetPort: 5353, nodePort: 30053, protocol: UDP}
"#;

fn configured(direct: bool) -> String {
    format!(
        "apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {{externalCIDRs: \
         [203.0.113.0/24], directServerReturn: {direct}}}\n"
    )
}

/// All frames that a node's devices send and receive.
struct Wire(OwnedFd);

impl Wire {
    fn tap(node: &Place) -> Result<Self> {
        node.enter(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            let tap = socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?;
            nix::sys::socket::setsockopt(&tap, nix::sys::socket::sockopt::RcvBuf, &(4 << 20))?;
            Ok(Self(tap))
        })
    }

    /// How many packets went by, since the last time, from this address and port, outside of any envelope.
    fn sent_by(&self, from: SocketAddr) -> usize {
        let mut frame = [0; 2048];
        let mut seen = 0;
        while let Ok(count) = recv(self.0.as_raw_fd(), &mut frame, nix::sys::socket::MsgFlags::empty()) {
            let frame = frame.get(..count).unwrap_or_default();
            let source = match frame.get(12..14) {
                Some([8, 0]) => bytes(frame, 26).map(|ip: [u8; 4]| IpAddr::from(ip)).zip(bytes(frame, 34)),
                Some([0x86, 0xdd]) => bytes(frame, 22).map(|ip: [u8; 16]| IpAddr::from(ip)).zip(bytes(frame, 54)),
                _ => None,
            };
            seen += usize::from(source.is_some_and(|(ip, port)| SocketAddr::new(ip, u16::from_be_bytes(port)) == from));
        }
        seen
    }
}

fn bytes<const N: usize>(frame: &[u8], at: usize) -> Option<[u8; N]> {
    frame.get(at..at + N)?.try_into().ok()
}

struct Fixture {
    cluster: Cluster,
    outside: Place,
    /// The nodes' wires: where clients come in, and where the endpoint is.
    entry: Wire,
    own: Wire,
}

impl Fixture {
    fn ask(&self, at: SocketAddr) -> Result<String> {
        self.outside.enter(|| {
            let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
            stream.set_read_timeout(Some(ANSWER))?;
            stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
            let mut said = String::new();
            stream.read_to_string(&mut said)?;
            ensure!(said.contains("pod: web\n"), "{said}");
            Ok(said)
        })
    }

    fn ask_udp(&self, at: SocketAddr) -> Result<String> {
        self.outside.enter(|| {
            let any: IpAddr = if at.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            let socket = UdpSocket::bind((any, 0))?;
            socket.connect(at)?;
            socket.set_read_timeout(Some(ANSWER))?;
            socket.send(b"whoami")?;
            let mut buffer = [0; 2048];
            let count = socket.recv(&mut buffer)?;
            // In fragments both ways, which the endpoint sends back as they are.
            let large = vec![7; 4000];
            let mut echoed = vec![0; 8000];
            let length = wait("fragments and their answer", PATIENCE, || {
                // Of IPv6 the sender is told first how large they may be.
                socket.send(&large)?;
                socket.recv(&mut echoed).with_context(|| format!("from {at}"))
            })?;
            ensure!(echoed.get(..length) == Some(large.as_slice()), "{length} bytes came back");
            Ok(String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned())
        })
    }

    /// How many packets of the Service's the entry's node and the endpoint's node sent since the last time.
    fn answers(&self, service: SocketAddr) -> (usize, usize) {
        (self.entry.sent_by(service), self.own.sent_by(service))
    }
}

#[test]
fn the_endpoints_node_answers_and_connections_outlive_the_switch_and_the_agents() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-direct", 2, Families::Dual)?;
    cluster.apply_text(&(OBJECTS.to_owned() + "---\n" + &configured(false)))?;
    cluster.wait_pod("web")?;
    let n1 = cluster.node_ip("n1")?;
    let router = format!("tp-{}-underlay", cluster.name());
    let routed = Command::new("ip").args(["-n", &router, "route", "replace", EXTERNAL, "via", &n1]).output()?;
    ensure!(routed.status.success(), "{}", String::from_utf8_lossy(&routed.stderr));
    let outside = Path::new("/run/netns").join(format!("tp-{}-outside", cluster.name()));
    let fixture = Fixture {
        outside: Place::of_netns("outside", &outside)?,
        entry: Wire::tap(&Place::of_node(&cluster, "n1")?)?,
        own: Wire::tap(&Place::of_node(&cluster, "n2")?)?,
        cluster,
    };
    let node = fixture.cluster.get("node", "n1")?;
    let addresses = node.pointer("/status/addresses").and_then(|list| list.as_array()).cloned().unwrap_or_default();
    let mut addresses = addresses.iter().filter_map(|a| a.get("address")?.as_str()?.parse::<IpAddr>().ok());
    let n1_v6 = addresses.rfind(IpAddr::is_ipv6).context("node n1 has no IPv6 address")?;
    run(&fixture, address(&n1)?, n1_v6)?;
    fixture.cluster.down()
}

fn run(fixture: &Fixture, n1: IpAddr, n1_v6: IpAddr) -> Result<()> {
    let node_port = SocketAddr::new(n1, 30080);
    let external = SocketAddr::new(address(EXTERNAL)?, 8080);
    let (udp_port, udp_external) = (SocketAddr::new(n1, 30053), SocketAddr::new(external.ip(), 53));
    wait("an answer through the tunnel", PATIENCE, || fixture.ask(external))?;
    let client = wait("an answer", PATIENCE, || fixture.ask(node_port))?;
    let (by_entry, by_own) = fixture.answers(node_port);
    ensure!(by_entry > 0 && by_own == 0, "as ever the entry node answers: {by_entry} and {by_own}");
    let mut old = fixture.outside.enter(|| Session::open(node_port, ANSWER))?;
    old.ask(ANSWER)?;

    fixture.cluster.apply_text(&configured(true))?;
    for at in [node_port, external, SocketAddr::new(n1_v6, 30080)] {
        wait(&format!("{at} to be answered by the endpoint's node"), PATIENCE, || {
            fixture.answers(at);
            let said = fixture.ask(at)?;
            let (by_entry, by_own) = fixture.answers(at);
            ensure!(by_entry == 0 && by_own > 0, "the entry sent {by_entry}, the endpoint's node {by_own}");
            ensure!(at.is_ipv6() || seen(client_of(&said)) == seen(client_of(&client)), "{said}");
            Ok(())
        })?;
    }
    for at in [udp_port, udp_external, SocketAddr::new(n1_v6, 30053)] {
        fixture.answers(at);
        fixture.ask_udp(at)?;
        let (by_entry, by_own) = fixture.answers(at);
        ensure!(by_entry == 0 && by_own > 0, "{at}: the entry sent {by_entry}, the endpoint's node {by_own}");
    }
    old.ask(ANSWER).context("a connection that began before the switch")?;
    let mut open = fixture.outside.enter(|| Session::open(node_port, ANSWER))?;
    open.ask(ANSWER)?;
    for node in ["n1", "n2"] {
        let pid = machine::lab_agent(fixture.cluster.name(), node)?;
        machine::kill(pid)?;
        open.ask(ANSWER).with_context(|| format!("while {node} has no agent"))?;
        wait("another agent", PATIENCE, || {
            ensure!(machine::lab_agent(fixture.cluster.name(), node)? != pid, "process {pid} is still there");
            Ok(())
        })?;
        fixture.answers(node_port);
        open.ask(ANSWER)?;
        fixture.ask(node_port)?;
        let (by_entry, by_own) = fixture.answers(node_port);
        ensure!(by_entry == 0 && by_own > 0, "after {node}'s agent: {by_entry} and {by_own}");
    }
    fixture.cluster.apply_text(&configured(false))?;
    wait("the entry node to answer again", PATIENCE, || {
        fixture.answers(node_port);
        fixture.ask(node_port)?;
        let (by_entry, by_own) = fixture.answers(node_port);
        ensure!(by_entry > 0 && by_own == 0, "the entry sent {by_entry}, the endpoint's node {by_own}");
        Ok(())
    })?;
    open.ask(ANSWER).context("a connection that is answered directly, after the switch")?;
    ensure!(fixture.answers(node_port).0 == 0, "it goes on as it began");
    old.ask(ANSWER).map(|_| ())
}

fn client_of(said: &str) -> &str {
    said.lines().find(|line| line.starts_with("client: ")).unwrap_or_default()
}

/// The address in a line `client: ADDRESS:PORT`.
fn seen(line: &str) -> &str {
    line.rsplit_once(':').map_or("", |(address, _)| address)
}
