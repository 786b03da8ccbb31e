//! Fragments that the network between the nodes brings in another order: the kernel puts the datagram together, policy judges it, the pod gets it.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;

const ANSWER: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(15);
const CLIENT_PORT: u16 = 40_000;
/// As the agents have them unless told otherwise.
const VNI: u8 = 116;
const VXLAN_PORT: u16 = 8472;
/// Bytes of UDP in the first fragment, a multiple of eight.
const FIRST: usize = 512;

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Pod
metadata: {name: web, labels: {app: web}}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: web, image: nginx, ports: [{containerPort: 5353, protocol: UDP}, {containerPort: 5354, protocol: UDP}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: one-port}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: client}}}], ports: [{port: 5353, protocol: UDP}]}]
"#;

/// A UDP datagram (without a checksum) as two IPv4 packets, each in a frame behind a VXLAN header.
fn fragments(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), id: u16, payload: &[u8]) -> Result<[Vec<u8>; 2]> {
    let length = u16::try_from(8 + payload.len())?;
    let datagram =
        [&from.1.to_be_bytes(), &to.1.to_be_bytes(), &length.to_be_bytes(), [0; 2].as_slice(), payload].concat();
    let (first, later) = datagram.split_at_checked(FIRST).context("too short")?;
    let packet = |part: &[u8], offset: u16| -> Result<Vec<u8>> {
        let total = u16::try_from(20 + part.len())?;
        let [t0, t1] = total.to_be_bytes();
        let [i0, i1] = id.to_be_bytes();
        let [f0, f1] = offset.to_be_bytes();
        let mut header =
            [[0x45, 0, t0, t1, i0, i1, f0, f1, 64, 17, 0, 0].as_slice(), &from.0.octets(), &to.0.octets()].concat();
        let sum: u32 = header.as_chunks().0.iter().map(|pair: &[u8; 2]| u32::from(u16::from_be_bytes(*pair))).sum();
        let check = !u16::try_from((sum & 0xffff) + (sum >> 16))?;
        header.splice(10..12, check.to_be_bytes());
        let frame = [2, 0x74, 0, 0, 0, 1, 2, 0x74, 0, 0, 0, 2, 8, 0];
        Ok([[8, 0, 0, 0, 0, 0, VNI, 0].as_slice(), &frame, &header, part].concat())
    };
    Ok([packet(first, 0x2000)?, packet(later, u16::try_from(FIRST / 8)?)?])
}

fn v4(ip: &str) -> Result<Ipv4Addr> {
    match address(ip)? {
        IpAddr::V4(v4) => Ok(v4),
        IpAddr::V6(v6) => bail!("{v6} is no IPv4 address"),
    }
}

#[test]
fn a_datagram_whose_later_fragment_comes_first_arrives_whole_and_is_judged() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-frag", 2, Families::Ipv4)?;
    cluster.apply_text(&(OBJECTS.to_owned() + &shell("client", "n2", "app: client")))?;
    let (web, client) = (cluster.wait_pod("web")?, cluster.wait_pod("client")?);
    let n1 = cluster.node_ip("n1")?;
    let n1 = SocketAddr::new(address(&n1)?, VXLAN_PORT);
    let (server, asker) = (v4(&web.ip)?, v4(&client.ip)?);
    // The network between the nodes, as far as n1 can tell.
    let underlay = Place::of_node(&cluster, "n2")?.enter(|| Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let socket = Place::of_pod(&cluster, &client)?.enter(|| Ok(UdpSocket::bind(("0.0.0.0", CLIENT_PORT))?))?;
    socket.set_read_timeout(Some(ANSWER))?;
    let mut id = 0x4000;
    let mut ask = |port: u16, in_order: bool| -> Result<usize> {
        id += 1;
        let payload: Vec<u8> = (0..1000_usize).map(|n| (n % 251) as u8).collect();
        let [first, later] = fragments((asker, CLIENT_PORT), (server, port), id, &payload)?;
        for packet in if in_order { [first, later] } else { [later, first] } {
            underlay.send_to(&packet, n1)?;
        }
        let mut answer = [0; 2000];
        let (count, from) = socket.recv_from(&mut answer).context("the answer")?;
        ensure!(from == SocketAddr::from((server, port)), "from {from}");
        ensure!(answer.get(..count) == Some(payload.as_slice()), "{count} bytes came back");
        Ok(count)
    };
    wait("a datagram in order", PATIENCE, || ask(5353, true))?;
    wait("a datagram whose later fragment comes first", PATIENCE, || ask(5353, false))?;
    for in_order in [true, false] {
        ensure!(ask(5354, in_order).is_err(), "policy lets nobody in at that port, in order or not: {in_order}");
    }
    cluster.down()
}
