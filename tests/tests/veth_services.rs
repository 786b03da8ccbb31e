//! Services for sockets that no socket hook sees (the test's own: those of a sandboxed runtime are like them): a pod that reaches
//! itself, and SCTP, of which some kernels have no sockets at all, in raw packets.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::socket::SockaddrStorage;
use socket2::{Domain, Protocol, Socket, Type};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(15);
const SCTP: i32 = 132;
const TARGET: u16 = 7132;

const SERVICES: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: self}
spec:
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{name: http, port: 8080, targetPort: 80}, {name: udp, port: 53, targetPort: 5353, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: sctp}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: far}
  ports: [{port: 80, targetPort: 7132, nodePort: 30132, protocol: SCTP}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: web-is-alone}
spec: {podSelector: {matchLabels: {app: web}}, policyTypes: [Ingress, Egress]}
"#;

fn cluster_addresses(cluster: &Cluster, service: &str) -> Result<Vec<IpAddr>> {
    let service = cluster.get("svc", service)?;
    let addresses = service.pointer("/spec/clusterIPs").and_then(|ips| ips.as_array()).cloned().unwrap_or_default();
    addresses.iter().map(|ip| address(ip.as_str().unwrap_or_default())).collect()
}

#[test]
fn without_socket_hooks_a_pod_reaches_itself_and_sctp_reaches_another_port() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-veth", 2, Families::Dual)?;
    cluster.apply_text(
        &(server("web", "n1", "app: web")
            + &shell("client", "n1", "")
            + &shell("near", "n1", "app: near")
            + &shell("far", "n2", "app: far")
            + SERVICES),
    )?;
    let web = Place::of_pod(&cluster, &cluster.wait_pod("web")?)?;
    for ip in cluster_addresses(&cluster, "self")? {
        reaches_itself(&web, ip)?;
    }
    associates(&cluster)?;
    cluster.down()
}

/// Although a policy lets nobody in and the pod out to nobody: to itself it may.
fn reaches_itself(web: &Place, service: IpAddr) -> Result<()> {
    let seen = if service.is_ipv4() { "client: 169.254.116.9:" } else { "client: [fd00:7470::9]:" };
    let said = wait("the pod to reach itself", PATIENCE, || web.enter(|| page((service, 8080).into())))?;
    ensure!(said.contains("pod: web\n") && said.contains(seen), "{said}");
    web.enter(|| {
        let any: IpAddr = if service.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let client = UdpSocket::bind((any, 0))?;
        client.connect((service, 53))?;
        client.set_read_timeout(Some(ANSWER))?;
        let mut buffer = [0; 8192];
        // Nobody listens: the pod complains to itself of what it asked the Service.
        client.send(b"anybody?")?;
        let refused = client.recv(&mut buffer).map_err(|error| error.kind());
        ensure!(refused == Err(ErrorKind::ConnectionRefused), "{refused:?}");
        let server = UdpSocket::bind((any, 5353))?;
        server.set_read_timeout(Some(ANSWER))?;
        // In one packet, and in several.
        for size in [10, 6000] {
            client.send(&vec![7; size]).context("ask")?;
            let (count, from) = server.recv_from(&mut buffer).context("be asked by itself")?;
            let stands_in: IpAddr = address(if any.is_ipv4() { "169.254.116.9" } else { "fd00:7470::9" })?;
            ensure!((count, from.ip()) == (size, stands_in), "{count} bytes from {from}");
            server.send_to(&vec![8; size], from)?;
            ensure!(client.recv(&mut buffer).context("the Service's answer")? == size);
        }
        Ok(())
    })
}

fn page(at: SocketAddr) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&at, ANSWER)?;
    stream.set_read_timeout(Some(ANSWER))?;
    stream.write_all(b"GET / HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said)
}

/// A packet of SCTP (RFC 9260 3) with its CRC32c.
fn packet(from: u16, to: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = [&from.to_be_bytes(), &to.to_be_bytes(), [1, 2, 3, 4].as_slice(), &[0; 4], payload].concat();
    let crc = crc32c(&bytes).to_le_bytes();
    bytes.splice(8..12, crc);
    bytes
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

fn raw(place: &Place, v4: bool) -> Result<Socket> {
    place.enter(|| {
        let socket = Socket::new(if v4 { Domain::IPV4 } else { Domain::IPV6 }, Type::RAW, Some(Protocol::from(SCTP)))?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        Ok(socket)
    })
}

/// A packet that came: from whom, to which port, and its payload.
struct Came {
    from: SocketAddr,
    payload: Vec<u8>,
}

/// The next packet for this port, whose checksum is right.
fn receive(socket: &Socket, v4: bool, port: u16) -> Result<Came> {
    let until = Instant::now() + ANSWER;
    while Instant::now() < until {
        let mut buffer = [0; 4096];
        let received = nix::sys::socket::recvfrom::<SockaddrStorage>(socket.as_raw_fd(), &mut buffer);
        let Ok((count, Some(from))) = received else { continue };
        let from: IpAddr = match (from.as_sockaddr_in(), from.as_sockaddr_in6()) {
            (Some(from), _) => from.ip().into(),
            (_, Some(from)) => from.ip().into(),
            _ => bail!("a packet from {from}"),
        };
        // IPv4's raw sockets give the network header too.
        let bytes = buffer.get(if v4 { 20 } else { 0 }..count).context("a short packet")?;
        let [s0, s1, d0, d1, _, _, _, _, c0, c1, c2, c3, payload @ ..] = bytes else { bail!("too short: {bytes:?}") };
        let (sport, dport) = (u16::from_be_bytes([*s0, *s1]), u16::from_be_bytes([*d0, *d1]));
        if dport != port {
            continue;
        }
        ensure!(packet(sport, dport, payload) == bytes, "checksum {c0:x} {c1:x} {c2:x} {c3:x}");
        return Ok(Came { from: (from, sport).into(), payload: payload.to_vec() });
    }
    bail!("nothing for port {port} within {ANSWER:?}")
}

/// A question to a Service, which the server gets at its own port, and the answer, which comes from the Service.
fn exchange(client: &Place, port: u16, server: &Place, to: SocketAddr) -> Result<IpAddr> {
    let v4 = to.is_ipv4();
    let (asking, serving) = (raw(client, v4)?, raw(server, v4)?);
    let send = |socket: &Socket, to: IpAddr, bytes: &[u8]| socket.send_to(bytes, &SocketAddr::new(to, 0).into());
    send(&asking, to.ip(), &packet(port, to.port(), b"an INIT of an odd length")).context("ask")?;
    let question = receive(&serving, v4, TARGET).with_context(|| format!("{to} asked by {}", client.name()))?;
    ensure!(question.from.port() == port && question.payload == b"an INIT of an odd length", "{}", question.from);
    send(&serving, question.from.ip(), &packet(TARGET, port, b"INIT ACK")).context("answer")?;
    let answer = receive(&asking, v4, port).with_context(|| format!("the answer of {to} to {}", client.name()))?;
    ensure!(answer.from == to && answer.payload == b"INIT ACK", "answered by {}", answer.from);
    Ok(question.from.ip())
}

/// From a pod to an endpoint on another node and to one on its own, by the Service's address; from outside by a node's.
fn associates(cluster: &Cluster) -> Result<()> {
    let client = cluster.wait_pod("client")?;
    let outside = Path::new("/run/netns").join(format!("tp-{}-outside", cluster.name()));
    let (asks, stranger) = (Place::of_pod(cluster, &client)?, Place::of_netns("outside", &outside)?);
    let far = Place::of_pod(cluster, &cluster.wait_pod("far")?)?;
    let services = cluster_addresses(cluster, "sctp")?;
    let mut port = 40_000..;
    let mut next = || port.next().unwrap_or_default();
    for ip in &services {
        let seen = wait("SCTP to another node", PATIENCE, || exchange(&asks, next(), &far, (*ip, 80).into()))?;
        ensure!(!ip.is_ipv4() || seen.to_string() == client.ip, "the client's address is not kept: {seen}");
    }
    let node = cluster.node_ip("n1")?;
    exchange(&stranger, next(), &far, (address(&node)?, 30132).into())?;
    let near = Place::of_pod(cluster, &cluster.wait_pod("near")?)?;
    cluster.apply_text(&SERVICES.replace("app: far", "app: near"))?;
    for ip in services {
        wait("SCTP on the same node", PATIENCE, || exchange(&asks, next(), &near, (ip, 80).into()))?;
    }
    exchange(&stranger, next(), &near, (address(&node)?, 30132).into()).map(|_| ())
}
