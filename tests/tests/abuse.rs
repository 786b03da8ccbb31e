//! What an attacker tries by writing packets himself, from a pod and from a host on the nodes' own link: to be somebody else, to be believed about the
//! neighbourhood, to put packets into the nodes' envelopes, to get past policy in pieces and behind odd headers, to break others' connections. Nothing of it
//! arrives anywhere, and what the node's programs drop is counted under its reason.
//!
//! Every frame names its attempt. It is looked for in other pods, in what nodes send, and at sockets of the node; frames of the same making that are
//! nobody's abuse arrive there.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, IpFragOffset, IpHeaders, IpNumber, Ipv4Extensions, Ipv4Header,
    Ipv4Options, Ipv6Extensions, Ipv6FragmentHeader, Ipv6Header, Ipv6RawExtHeader, PacketBuilder,
};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};
use serde_json::Value;
use towpath_datapath::net::packet::{Listen, PacketSocket};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::in_charge::status_of;
use towpath_walkthrough::libcni::Sandbox;
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

type Mac = [u8; 6];

/// Before the number of an attempt.
const MARK: [u8; 8] = *b"\xabused\x0074";
/// A port of the victim's that its policy opens to the attacker, and one that it does not.
const OPEN: u16 = 5353;
const CLOSED: u16 = 5354;
/// Where sockets of the node itself listen.
const NODES_OWN: u16 = 7171;
const VNI: [u8; 3] = [0, 0, 116];
const VXLAN: u16 = 8472;
const IPIP: IpNumber = IpNumber(4);
const IPV6_IN_IP: IpNumber = IpNumber(41);
const ALL_NODES: IpAddr = IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1));
const ALL_NODES_MAC: Mac = [0x33, 0x33, 0, 0, 0, 1];
const BROADCAST: Mac = [0xff; 6];
/// Each frame is sent so often.
const TIMES: u64 = 3;
/// By then what was sent has arrived, on one machine.
const ARRIVED: Duration = Duration::from_millis(30);
const SOON: Duration = Duration::from_secs(10);

const POLICY: &str = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {app: victim}}\n  \
                      ingress:\n  - {from: [{podSelector: {matchLabels: {app: attacker}}}], ports: [{port: 5353, protocol: UDP}]}\n  - {from: [{podSelector: \
                      {matchLabels: {app: other}}}]}\n";

/// Somebody with an address of each family on a link, and the neighbour to whom all that leaves is sent.
struct Stand {
    place: Place,
    mac: Mac,
    ips: [IpAddr; 2],
    gateway: Mac,
}

fn say(place: &Place, command: &str) -> Result<String> {
    place.enter(|| {
        let said = Command::new("sh").args(["-c", command]).output()?;
        ensure!(said.status.success(), "{command} in {}: {}", place.name(), String::from_utf8_lossy(&said.stderr));
        Ok(String::from_utf8(said.stdout)?)
    })
}

fn mac(text: &str) -> Result<Mac> {
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text:?} is no MAC address"))
}

fn after<'t>(text: &'t str, word: &str) -> Result<&'t str> {
    let rest = text.split_once(&format!("{word} ")).with_context(|| format!("no {word} in {text:?}"))?.1;
    rest.split([' ', '/', '\n']).next().context("nothing")
}

impl Stand {
    fn new(place: Place, gateway: Option<Mac>) -> Result<Self> {
        let shown = say(&place, "ip -o link show eth0")?;
        let own = |family: &str, word: &str| -> Result<IpAddr> {
            address(after(&say(&place, &format!("ip -{family} -o address show dev eth0 scope global"))?, word)?)
        };
        let ips = [own("4", "inet")?, own("6", "inet6")?];
        let gateway = match gateway {
            Some(mac) => mac,
            None => mac(after(&say(&place, "ip -4 neigh show nud permanent dev eth0")?, "lladdr")?)?,
        };
        Ok(Self { mac: mac(after(&shown, "link/ether")?)?, place, ips, gateway })
    }

    fn ip(&self, six: bool) -> IpAddr {
        if six { self.ips[1] } else { self.ips[0] }
    }

    fn at(&self, six: bool, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(six), port)
    }

    fn sends(&self, frame: &[u8]) -> Result<()> {
        self.place.enter(|| Ok(PacketSocket::open(if_nametoindex("eth0")?, Listen::Arp)?.send(frame)?))
    }
}

fn ip_headers(from: IpAddr, to: IpAddr) -> Result<IpHeaders> {
    Ok(match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let header = Ipv4Header {
                time_to_live: 64,
                source: from.octets(),
                destination: to.octets(),
                ..Ipv4Header::default()
            };
            IpHeaders::Ipv4(header, Ipv4Extensions::default())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let header =
                Ipv6Header { hop_limit: 64, source: from.octets(), destination: to.octets(), ..Ipv6Header::default() };
            IpHeaders::Ipv6(header, Ipv6Extensions::default())
        }
        _ => anyhow::bail!("{from} and {to} in one packet"),
    })
}

fn udp(macs: (Mac, Mac), from: SocketAddr, to: SocketAddr, payload: &[u8]) -> Result<Vec<u8>> {
    udp_behind(macs, ip_headers(from.ip(), to.ip())?, (from.port(), to.port()), payload)
}

fn udp_behind(macs: (Mac, Mac), headers: IpHeaders, ports: (u16, u16), payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).ip(headers).udp(ports.0, ports.1).write(&mut frame, payload)?;
    Ok(frame)
}

/// Nobody there.
fn outside(six: bool) -> IpAddr {
    if six { Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 9).into() } else { Ipv4Addr::new(192, 0, 2, 9).into() }
}

/// A packet of any protocol.
fn raw(macs: (Mac, Mac), headers: IpHeaders, protocol: IpNumber, payload: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).ip(headers).write(&mut frame, protocol, payload)?;
    Ok(frame)
}

fn vxlan(vni: [u8; 3], inner: &[u8]) -> Vec<u8> {
    [[8, 0, 0, 0].as_slice(), &vni, &[0], inner].concat()
}

fn arp_reply(macs: (Mac, Mac), claimed: IpAddr, mark: &[u8]) -> Result<Vec<u8>> {
    let IpAddr::V4(claimed) = claimed else { anyhow::bail!("{claimed} in ARP") };
    let (hardware, operation) = (ArpHardwareId::ETHERNET, ArpOperation::REPLY);
    let packet =
        ArpPacket::new(hardware, EtherType::IPV4, operation, &macs.0, &claimed.octets(), &macs.1, &claimed.octets())?;
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1).arp(packet).write(&mut frame)?;
    Ok([&frame, mark].concat())
}

/// Neighbour discovery of some type to all, with an option at its end that nobody knows.
fn discovery(source: &Stand, from: Ipv6Addr, kind: u8, body: &[u8], mark: &[u8]) -> Result<Vec<u8>> {
    let IpHeaders::Ipv6(header, rest) = ip_headers(from.into(), ALL_NODES)? else { anyhow::bail!("not IPv6") };
    let headers = IpHeaders::Ipv6(Ipv6Header { hop_limit: 255, ..header }, rest);
    let option = [[253, u8::try_from((mark.len() + 2).div_ceil(8))?].as_slice(), mark, &[0; 8]].concat();
    let option = option.get(..(mark.len() + 2).div_ceil(8) * 8).context("too short")?;
    let (word, body) = body.split_first_chunk::<4>().context("too short")?;
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(source.mac, ALL_NODES_MAC)
        .ip(headers)
        .icmpv6_raw(kind, 0, *word)
        .write(&mut frame, &[body, option].concat())?;
    Ok(frame)
}

/// An ICMP error that quotes a packet.
fn complaint(macs: (Mac, Mac), from: IpAddr, to: IpAddr, [kind, code]: [u8; 2], quoted: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    let start = PacketBuilder::ethernet2(macs.0, macs.1).ip(ip_headers(from, to)?);
    let quoted = quoted.get(14..).context("no frame")?;
    if from.is_ipv4() {
        start.icmpv4_raw(kind, code, [0, 0, 2, 88]).write(&mut frame, quoted)?;
    } else {
        start.icmpv6_raw(kind, code, [0, 0, 5, 0]).write(&mut frame, quoted)?;
    }
    Ok(frame)
}

fn tcp_reset(macs: (Mac, Mac), from: SocketAddr, to: SocketAddr, mark: &[u8]) -> Result<Vec<u8>> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(macs.0, macs.1)
        .ip(ip_headers(from.ip(), to.ip())?)
        .tcp(from.port(), to.port(), 1000, 1000)
        .rst()
        .write(&mut frame, mark)?;
    Ok(frame)
}

/// Frames that come by on all devices of a place.
struct Tap(OwnedFd);

impl Tap {
    fn at(place: &Place) -> Result<Self> {
        place.enter(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            Ok(Self(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?))
        })
    }

    /// The devices by which frames that hold `mark` came in since the last time.
    fn heard(&self, mark: &[u8]) -> Vec<usize> {
        let (mut frame, mut heard) = ([0; 4096], Vec::new());
        while let Ok((count, from)) = recvfrom::<LinkAddr>(self.0.as_raw_fd(), &mut frame) {
            let seen = frame.get(..count).is_some_and(|frame| frame.windows(mark.len()).any(|window| window == mark));
            let inward = from.as_ref().is_some_and(|from| from.pkttype() != nix::libc::PACKET_OUTGOING);
            if let (true, true, Some(from)) = (seen, inward, from) {
                heard.push(from.ifindex());
            }
        }
        heard
    }
}

/// Who tries.
#[derive(Clone, Copy, PartialEq, Eq)]
enum By {
    Pod,
    Neighbour,
}

/// Reasons by which an attempt may be counted; `&[]`: the kernel has nobody here who takes it (a DHCP client, another tunnel device, `ipip`).
type Counted = &'static [&'static str];

struct Scene {
    cluster: Cluster,
    attacker: Stand,
    victim: Stand,
    /// On the other node.
    other: Stand,
    neighbour: Stand,
    nodes: [Stand; 2],
    taps: Vec<(String, Tap)>,
    /// Of the link between the nodes, and its ports to them.
    link: (Tap, Vec<usize>),
    nodes_own: UdpSocket,
    number: std::cell::Cell<u32>,
    failures: std::cell::RefCell<Vec<String>>,
    _neighbour: Sandbox,
}

impl Scene {
    fn new(cluster: Cluster) -> Result<Self> {
        let pod = |name: &str| Stand::new(Place::of_pod(&cluster, &cluster.wait_pod(name)?)?, None);
        let (attacker, victim, other) = (pod("attacker")?, pod("victim")?, pod("other")?);
        let node = |name: &str| Stand::new(Place::of_node(&cluster, name)?, Some(BROADCAST));
        let nodes = [node("n1")?, node("n2")?];
        let path = Path::new("/run/netns").join(format!("tp-{}-underlay", cluster.name()));
        let underlay = Place::of_netns("underlay", &path)?;
        let sandbox = Sandbox::make("neighbour")?;
        say(
            &underlay,
            &format!(
                "ip link add attacks type veth peer name eth0 netns {} && ip link set attacks master nodes0 up",
                sandbox.pid()
            ),
        )?;
        let place = Place::of_netns("the neighbour", &sandbox.netns())?;
        say(
            &place,
            "ip address add 192.168.255.99/24 dev eth0 && ip address add fd00:255::99/64 dev eth0 nodad && ip link set eth0 up",
        )?;
        let neighbour = Stand::new(place, Some(nodes[0].mac))?;
        // As kube-proxy sets it: the kernel itself lets loopback addresses in (CVE-2020-8558).
        for device in ["all", "eth0"] {
            say(&nodes[0].place, &format!("echo 1 > /proc/sys/net/ipv4/conf/{device}/route_localnet"))?;
        }
        let ports = underlay.enter(|| Ok(vec![if_nametoindex("n1")? as usize, if_nametoindex("n2")? as usize]))?;
        let taps = [&victim, &other].map(|stand| Ok((stand.place.name().to_owned(), Tap::at(&stand.place)?)));
        let taps = taps.into_iter().collect::<Result<_>>()?;
        let nodes_own = nodes[0].place.enter(|| Ok(UdpSocket::bind((Ipv6Addr::UNSPECIFIED, NODES_OWN))?))?;
        nodes_own.set_nonblocking(true)?;
        let link = (Tap::at(&underlay)?, ports);
        let (number, failures) = Default::default();
        Ok(Self {
            cluster,
            attacker,
            victim,
            other,
            neighbour,
            nodes,
            taps,
            link,
            nodes_own,
            number,
            failures,
            _neighbour: sandbox,
        })
    }

    fn counted(&self, reasons: Counted) -> Result<u64> {
        let status = status_of(&self.cluster, "n1")?;
        let count = |reason: &&str| {
            status.pointer(&format!("/counters/drop.{reason}")).and_then(Value::as_u64).unwrap_or_default()
        };
        Ok(reasons.iter().map(count).sum())
    }

    /// Where frames of this mark arrived.
    fn arrived(&self, by: By, mark: &[u8]) -> Vec<String> {
        let mut at: Vec<String> =
            self.taps.iter().filter(|(_, tap)| !tap.heard(mark).is_empty()).map(|(name, _)| name.clone()).collect();
        // What a node says of a stranger's packet to that stranger quotes it.
        let sent = self.link.0.heard(mark).iter().any(|port| self.link.1.contains(port));
        if sent && by == By::Pod {
            at.push("the link between the nodes".to_owned());
        }
        let mut buffer = [0; 4096];
        while let Ok(count) = self.nodes_own.recv(&mut buffer) {
            if buffer.get(..count).is_some_and(|bytes| bytes.windows(mark.len()).any(|window| window == mark)) {
                at.push("a socket of the node".to_owned());
            }
        }
        at
    }

    /// The frames that are made for a mark, in this order, several times; where they arrived, and how often it was counted.
    fn send(
        &self,
        by: By,
        counted: Counted,
        make: impl Fn(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<(Vec<String>, u64)> {
        self.number.set(self.number.get() + 1);
        let mark = [MARK.as_slice(), &self.number.get().to_be_bytes()].concat();
        let frames = make(&mark)?;
        ensure!(
            frames.iter().any(|frame| frame.windows(mark.len()).any(|window| window == mark)),
            "no frame names the attempt"
        );
        let before = self.counted(counted)?;
        let from = if by == By::Pod { &self.attacker } else { &self.neighbour };
        for _ in 0..TIMES {
            frames.iter().try_for_each(|frame| from.sends(frame))?;
        }
        std::thread::sleep(ARRIVED);
        Ok((self.arrived(by, &mark), self.counted(counted)? - before))
    }

    /// An attempt that is to fail.
    fn attempt(
        &self,
        what: &str,
        by: By,
        counted: Counted,
        make: impl Fn(&[u8]) -> Result<Vec<Vec<u8>>>,
    ) -> Result<()> {
        let (arrived, count) = self.send(by, counted, make).with_context(|| what.to_owned())?;
        println!("{what}: counted {count} times as {counted:?}");
        let mut failures = self.failures.borrow_mut();
        if !arrived.is_empty() {
            failures.push(format!("{what}: arrived at {arrived:?}"));
        }
        if !counted.is_empty() && count < TIMES {
            failures.push(format!("{what}: counted {count} of {TIMES} times as {counted:?}"));
        }
        Ok(())
    }

    /// The same with a frame.
    fn one(&self, what: &str, by: By, counted: Counted, make: impl Fn(&[u8]) -> Result<Vec<u8>>) -> Result<()> {
        self.attempt(what, by, counted, |mark| Ok(vec![make(mark)?]))
    }

    /// What is nobody's abuse arrives, so the rest would, too.
    fn honest_frames_arrive(&self) -> Result<()> {
        let (attacker, victim, neighbour) = (&self.attacker, &self.victim, &self.neighbour);
        for six in [false, true] {
            let macs = (attacker.mac, attacker.gateway);
            let (arrived, _) = self
                .send(By::Pod, &[], |mark| Ok(vec![udp(macs, attacker.at(six, 4000), victim.at(six, OPEN), mark)?]))?;
            ensure!(arrived == ["victim"], "a datagram to an open port arrived at {arrived:?}, IPv6: {six}");
            let (arrived, _) = self.send(By::Pod, &[], |mark| {
                Ok(vec![udp(macs, attacker.at(six, 4000), SocketAddr::new(outside(six), 9), mark)?])
            })?;
            ensure!(
                arrived == ["the link between the nodes"],
                "a datagram to the outside arrived at {arrived:?}, IPv6: {six}"
            );
            let (arrived, _) = self.send(By::Neighbour, &[], |mark| {
                Ok(vec![udp(
                    (neighbour.mac, neighbour.gateway),
                    neighbour.at(six, 4000),
                    self.nodes[0].at(six, NODES_OWN),
                    mark,
                )?])
            })?;
            ensure!(
                arrived.iter().all(|at| at == "a socket of the node") && !arrived.is_empty(),
                "a datagram to the node arrived at {arrived:?}"
            );
        }
        // An envelope of the same making, by the node whose it may be: what it holds is let in by the policy.
        let (n1, n2) = (&self.nodes[0], &self.nodes[1]);
        self.number.set(self.number.get() + 1);
        let mark = [MARK.as_slice(), &self.number.get().to_be_bytes()].concat();
        let inner = udp((BROADCAST, BROADCAST), self.other.at(false, 4000), victim.at(false, CLOSED), &mark)?;
        n2.place.enter(|| {
            Ok(UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?.send_to(&vxlan(VNI, &inner), n1.at(false, VXLAN))?)
        })?;
        std::thread::sleep(ARRIVED);
        let arrived = self.arrived(By::Neighbour, &mark);
        // It answers that nobody listens there.
        ensure!(arrived.iter().any(|at| at == "victim"), "an envelope of the other node's arrived at {arrived:?}");
        Ok(())
    }

    /// A pod that gives itself other names (A1).
    fn spoofs(&self) -> Result<()> {
        let (attacker, victim, other) = (&self.attacker, &self.victim, &self.other);
        let macs = (attacker.mac, attacker.gateway);
        for six in [false, true] {
            let to = other.at(six, OPEN);
            for (what, from) in [
                ("another pod's address", victim.at(six, 4000)),
                ("its node's address", self.nodes[0].at(six, 4000)),
                ("another node's address", self.nodes[1].at(six, 4000)),
                ("an address of the outside", SocketAddr::new(outside(six), 4000)),
            ] {
                self.one(&format!("a pod with {what}, to a pod"), By::Pod, &["source_address"], |mark| {
                    udp(macs, from, to, mark)
                })?;
                let node = self.nodes[0].at(six, NODES_OWN);
                self.one(&format!("a pod with {what}, to the node"), By::Pod, &["source_address"], |mark| {
                    udp(macs, from, node, mark)
                })?;
            }
            self.one("a pod with another pod's MAC", By::Pod, &["source_mac"], |mark| {
                udp((victim.mac, macs.1), attacker.at(six, 4000), to, mark)
            })?;
            // Addresses that mean the node itself where they arrive.
            let own: IpAddr = if six { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            self.one("a pod to the node's loopback", By::Pod, &["loopback"], |mark| {
                udp(macs, attacker.at(six, 4000), SocketAddr::new(own, NODES_OWN), mark)
            })?;
            self.one("a pod with a loopback address", By::Pod, &["source_address"], |mark| {
                udp(macs, SocketAddr::new(own, 4000), self.nodes[0].at(six, NODES_OWN), mark)
            })?;
        }
        let mapped = |ip: IpAddr| match ip {
            IpAddr::V4(v4) => IpAddr::V6(v4.to_ipv6_mapped()),
            v6 => v6,
        };
        self.one("a pod with an IPv4 address in an IPv6 packet", By::Pod, &["mapped_v4"], |mark| {
            udp(
                macs,
                SocketAddr::new(mapped(victim.ip(false)), 4000),
                SocketAddr::new(mapped(other.ip(false)), OPEN),
                mark,
            )
        })?;
        Ok(())
    }

    /// One that answers for others in its neighbourhood (A1).
    fn poisons(&self) -> Result<()> {
        let (attacker, victim) = (&self.attacker, &self.victim);
        let gateway = address(after(&say(&attacker.place, "ip -4 route show default")?, "via")?)?;
        for (what, claimed) in
            [("its gateway", gateway), ("another pod", victim.ip(false)), ("its node", self.nodes[0].ip(false))]
        {
            for to in [attacker.gateway, BROADCAST] {
                self.one(&format!("ARP of a pod that says it is {what}"), By::Pod, &["arp_nd"], |mark| {
                    arp_reply((attacker.mac, to), claimed, mark)
                })?;
            }
        }
        let (IpAddr::V6(own), IpAddr::V6(theirs)) = (attacker.ip(true), victim.ip(true)) else {
            anyhow::bail!("no IPv6")
        };
        let local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0x66);
        let link_layer = |kind: u8| [[kind, 1].as_slice(), &attacker.mac].concat();
        let advertisement = [[0x60, 0, 0, 0].as_slice(), &theirs.octets(), &link_layer(2)].concat();
        let solicitation = [[0; 4].as_slice(), &own.octets(), &link_layer(1)].concat();
        let router = [[64, 0, 0x70, 0x80].as_slice(), &[0; 8], &link_layer(1)].concat();
        let redirect = [[0; 4].as_slice(), &theirs.octets(), &local.octets()].concat();
        for (what, from, kind, body, counted) in [
            ("an advertisement of another pod's address", own, 136, &advertisement, ["arp_nd"].as_slice()),
            ("the same as that pod", theirs, 136, &advertisement, &["arp_nd"]),
            ("a solicitation as another pod", theirs, 135, &solicitation, &["arp_nd"]),
            ("a router advertisement", local, 134, &router, &["arp_nd"]),
            ("a router advertisement with its own address", own, 134, &router, &["arp_nd"]),
            ("a redirect", local, 137, &redirect, &["arp_nd"]),
        ] {
            self.one(&format!("{what} of a pod"), By::Pod, counted, |mark| {
                discovery(attacker, from, kind, body, mark)
            })?;
        }
        let nobody: SocketAddr = "0.0.0.0:68".parse()?;
        let everybody: SocketAddr = "255.255.255.255:67".parse()?;
        self.one("a DHCP client in a pod", By::Pod, &["source_address"], |mark| {
            udp((attacker.mac, BROADCAST), nobody, everybody, mark)
        })?;
        self.one("a DHCP server in a pod", By::Pod, &[], |mark| {
            udp((attacker.mac, BROADCAST), attacker.at(false, 67), "255.255.255.255:68".parse()?, mark)
        })
    }

    /// Envelopes that no node wrote (A2).
    fn injects(&self) -> Result<()> {
        let (attacker, victim, other, neighbour) = (&self.attacker, &self.victim, &self.other, &self.neighbour);
        let [n1, n2] = &self.nodes;
        let out = (attacker.mac, attacker.gateway);
        let link = (neighbour.mac, neighbour.gateway);
        let inner = |six: bool, from: &Stand, mark: &[u8]| {
            udp((BROADCAST, BROADCAST), from.at(six, 4000), victim.at(six, OPEN), mark)
        };
        for six in [false, true] {
            // What a pod here would have other nodes deliver.
            self.one("an envelope of a pod, to another node", By::Pod, &["own_envelope"], |mark| {
                let held = udp((BROADCAST, BROADCAST), victim.at(six, 4000), other.at(six, OPEN), mark)?;
                udp(out, attacker.at(false, 4000), n2.at(false, VXLAN), &vxlan(VNI, &held))
            })?;
            self.one("an envelope of a pod, to its own node", By::Pod, &["own_envelope"], |mark| {
                udp(out, attacker.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, other, mark)?))
            })?;
            let protocol = if six { IPV6_IN_IP } else { IPIP };
            self.one("a packet in an IP header of a pod, to another node", By::Pod, &["own_envelope"], |mark| {
                let held = udp((BROADCAST, BROADCAST), victim.at(six, 4000), other.at(six, OPEN), mark)?;
                raw(out, ip_headers(attacker.ip(false), n2.ip(false))?, protocol, held.get(14..).context("short")?)
            })?;
            self.one("an envelope of a neighbour's", By::Neighbour, &["tunnel_outsider"], |mark| {
                udp(link, neighbour.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, other, mark)?))
            })?;
            self.one(
                "an envelope with a node's address, that holds another node's pod's packet",
                By::Neighbour,
                &["tunnel_source"],
                |mark| udp(link, n2.at(false, 4000), n1.at(false, VXLAN), &vxlan(VNI, &inner(six, attacker, mark)?)),
            )?;
            self.one("an envelope of another network's number", By::Neighbour, &[], |mark| {
                udp(link, n2.at(false, 4000), n1.at(false, VXLAN), &vxlan([0, 0, 117], &inner(six, other, mark)?))
            })?;
            self.one("a packet in an IP header of a neighbour's", By::Neighbour, &[], |mark| {
                raw(
                    link,
                    ip_headers(neighbour.ip(false), n1.ip(false))?,
                    protocol,
                    inner(six, other, mark)?.get(14..).context("short")?,
                )
            })?;
        }
        Ok(())
    }

    /// A host on the nodes' link that has the node believe that packets are of the cluster's, or its own (A3).
    fn pretends(&self) -> Result<()> {
        let (victim, other, neighbour) = (&self.victim, &self.other, &self.neighbour);
        let link = (neighbour.mac, neighbour.gateway);
        for six in [false, true] {
            let node = self.nodes[0].at(six, NODES_OWN);
            for (what, from) in [
                ("a pod's address", victim.at(six, 4000)),
                ("another node's pod's address", other.at(six, 4000)),
                ("the node's address", self.nodes[0].at(six, 4000)),
            ] {
                self.one(&format!("a neighbour with {what}, to the node"), By::Neighbour, &["spoofed_node"], |mark| {
                    udp(link, from, node, mark)
                })?;
            }
            self.one("a neighbour with a pod's address, to a pod", By::Neighbour, &["spoofed_node"], |mark| {
                udp(link, other.at(six, 4000), victim.at(six, OPEN), mark)
            })?;
            self.one(
                "a neighbour with its own address, to a pod that is closed to it",
                By::Neighbour,
                &["ingress_policy"],
                |mark| udp(link, neighbour.at(six, 4000), victim.at(six, OPEN), mark),
            )?;
            let own: IpAddr = if six { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
            self.one("a neighbour to the node's loopback", By::Neighbour, &["loopback"], |mark| {
                udp(link, neighbour.at(six, 4000), SocketAddr::new(own, NODES_OWN), mark)
            })?;
            self.one("a neighbour with a loopback address", By::Neighbour, &["loopback"], |mark| {
                udp(link, SocketAddr::new(own, 4000), node, mark)
            })?;
        }
        let local: SocketAddr = "169.254.1.1:4000".parse()?;
        self.one(
            "a neighbour with a link-local address, to a pod that is closed to it",
            By::Neighbour,
            &["ingress_policy"],
            |mark| udp(link, local, victim.at(false, OPEN), mark),
        )
    }

    /// Pieces and odd headers that may hide a closed port (A8).
    fn hides(&self) -> Result<()> {
        let (attacker, victim) = (&self.attacker, &self.victim);
        let macs = (attacker.mac, attacker.gateway);
        let fragment = |id: u16, offset: u16, more: bool| -> Result<IpHeaders> {
            let IpHeaders::Ipv4(header, rest) = ip_headers(attacker.ip(false), victim.ip(false))? else {
                anyhow::bail!("not IPv4")
            };
            let header = Ipv4Header {
                identification: id,
                more_fragments: more,
                dont_fragment: false,
                fragment_offset: IpFragOffset::try_new(offset)?,
                ..header
            };
            Ok(IpHeaders::Ipv4(header, rest))
        };
        let datagram = |port: u16, mark: &[u8]| -> Result<Vec<u8>> {
            let whole = udp(macs, attacker.at(false, 4000), victim.at(false, port), &[mark, &[0; 20]].concat())?;
            Ok(whole.get(34..).context("short")?.to_vec())
        };
        let protocol = IpNumber::UDP;
        self.attempt(
            "a first piece for a closed port after one for an open port",
            By::Pod,
            &["ingress_policy"],
            |mark| {
                let open = datagram(OPEN, b"no mark here")?;
                Ok(vec![
                    raw(macs, fragment(700, 0, true)?, protocol, open.get(..24).context("short")?)?,
                    raw(macs, fragment(700, 0, true)?, protocol, &datagram(CLOSED, mark)?)?,
                ])
            },
        )?;
        self.attempt(
            "a later piece whose first is for a closed port",
            By::Pod,
            &["ingress_policy", "fragment"],
            |mark| {
                let whole = datagram(CLOSED, b"no mark here")?;
                Ok(vec![
                    raw(macs, fragment(701, 0, true)?, protocol, whole.get(..16).context("short")?)?,
                    raw(macs, fragment(701, 2, false)?, protocol, mark)?,
                ])
            },
        )?;
        self.one("a later piece without a first", By::Pod, &["fragment"], |mark| {
            raw(macs, fragment(702, 4, false)?, protocol, mark)
        })?;
        self.one(
            "a first piece of eight bytes of TCP for a closed port",
            By::Pod,
            &["ingress_policy", "malformed"],
            |mark| {
                let ports = [4000_u16.to_be_bytes(), 81_u16.to_be_bytes()].concat();
                let frame = raw(macs, fragment(703, 0, true)?, IpNumber::TCP, &[ports.as_slice(), &[0; 4]].concat())?;
                // Behind the end of the packet, as Ethernet pads.
                Ok([frame.as_slice(), mark].concat())
            },
        )?;
        self.one("IPv4 options before a closed port", By::Pod, &["ingress_policy"], |mark| {
            let IpHeaders::Ipv4(header, rest) = ip_headers(attacker.ip(false), victim.ip(false))? else {
                anyhow::bail!("not IPv4")
            };
            // Record route (RFC 791 3.1).
            let options = Ipv4Options::from([7, 7, 4, 0, 0, 0, 0, 1]);
            udp_behind(macs, IpHeaders::Ipv4(Ipv4Header { options, ..header }, rest), (4000, CLOSED), mark)
        })?;
        let six = |change: &dyn Fn(&mut Ipv6Extensions)| -> Result<IpHeaders> {
            let IpHeaders::Ipv6(header, mut rest) = ip_headers(attacker.ip(true), victim.ip(true))? else {
                anyhow::bail!("not IPv6")
            };
            change(&mut rest);
            Ok(IpHeaders::Ipv6(header, rest))
        };
        // PadN (RFC 8200 4.2).
        let padding = Ipv6RawExtHeader::new_raw(IpNumber::UDP, &[1, 4, 0, 0, 0, 0])?;
        let all = |rest: &mut Ipv6Extensions| {
            rest.hop_by_hop_options = Some(padding.clone());
            rest.destination_options = Some(padding.clone());
        };
        let judged = &["ingress_policy", "malformed", "fragment"];
        self.one("IPv6 options before a closed port", By::Pod, judged, |mark| {
            udp_behind(macs, six(&all)?, (4000, CLOSED), mark)
        })?;
        self.one("a chain of forty IPv6 headers before a closed port", By::Pod, judged, |mark| {
            let udp = udp(macs, attacker.at(true, 4000), victim.at(true, CLOSED), mark)?;
            let chain = [60, 0, 1, 4, 0, 0, 0, 0].repeat(39);
            let last = [17, 0, 1, 4, 0, 0, 0, 0];
            raw(macs, six(&|_| ())?, IpNumber(60), &[chain.as_slice(), &last, udp.get(54..).context("short")?].concat())
        })?;
        self.attempt("an IPv6 piece that ends before the ports, and the next", By::Pod, judged, |mark| {
            let piece = |offset: u16, more: bool| -> Result<IpHeaders> {
                let header = Ipv6FragmentHeader::new(IpNumber(60), IpFragOffset::try_new(offset)?, more, 77);
                six(&move |rest| rest.fragment = Some(header.clone()))
            };
            let udp = udp(macs, attacker.at(true, 4000), victim.at(true, CLOSED), mark)?;
            Ok(vec![
                raw(macs, piece(0, true)?, IpNumber(60), &[17, 0, 1, 4, 0, 0, 0, 0])?,
                raw(macs, piece(1, false)?, IpNumber(60), udp.get(54..).context("short")?)?,
            ])
        })
    }

    /// Errors and resets about others' connections (A9).
    fn breaks(&self, client: SocketAddr) -> Result<()> {
        let (attacker, victim, other, neighbour) = (&self.attacker, &self.victim, &self.other, &self.neighbour);
        let six = client.is_ipv6();
        let server = victim.at(six, 80);
        let quoted = |mark: &[u8]| udp((BROADCAST, BROADCAST), victim.at(six, OPEN), other.at(six, 4000), mark);
        let kinds = if six { [[1, 4], [2, 0]] } else { [[3, 3], [3, 4]] };
        for kind in kinds {
            self.one("an ICMP error of a pod about others", By::Pod, &["source_address", "ingress_policy"], |mark| {
                complaint((attacker.mac, attacker.gateway), attacker.ip(six), victim.ip(six), kind, &quoted(mark)?)
            })?;
            self.one("an ICMP error of a neighbour about pods", By::Neighbour, &["ingress_policy"], |mark| {
                complaint((neighbour.mac, neighbour.gateway), neighbour.ip(six), victim.ip(six), kind, &quoted(mark)?)
            })?;
        }
        self.one("a reset of a pod as a client", By::Pod, &["source_address"], |mark| {
            tcp_reset((attacker.mac, attacker.gateway), client, server, mark)
        })?;
        self.one("a reset of a neighbour as a client", By::Neighbour, &["spoofed_node"], |mark| {
            tcp_reset((neighbour.mac, neighbour.gateway), client, server, mark)
        })
    }

    /// What others know of their neighbourhood and where they send.
    fn known(&self) -> Result<String> {
        let command =
            "ip neigh show nud permanent; ip -4 route; ip -6 route show table all | sed 's/ expires [0-9]*sec//'";
        let places = [&self.victim, &self.other, &self.nodes[0], &self.nodes[1]];
        let all: Vec<String> = places.iter().map(|stand| say(&stand.place, command)).collect::<Result<_>>()?;
        Ok(all.join("---\n"))
    }
}

#[test]
fn what_an_attacker_writes_arrives_nowhere_and_is_counted() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-abuse", 2, Families::Dual)?;
    let pods = [
        shell("attacker", "n1", "app: attacker"),
        server("victim", "n1", "app: victim"),
        shell("other", "n2", "app: other"),
    ];
    cluster.apply_text(&(pods.concat() + POLICY))?;
    let scene = Scene::new(cluster)?;
    wait("honest frames to arrive", SOON, || scene.honest_frames_arrive())?;
    wait("the policy", SOON, || {
        let (attacker, victim) = (&scene.attacker, &scene.victim);
        let denied = scene.send(By::Pod, &["ingress_policy"], |mark| {
            Ok(vec![udp((attacker.mac, attacker.gateway), attacker.at(false, 4000), victim.at(false, CLOSED), mark)?])
        })?;
        ensure!(denied.0.is_empty() && denied.1 == TIMES, "{denied:?}");
        Ok(())
    })?;
    let mut sessions = Vec::new();
    for (six, port) in [(false, 40_004), (true, 40_006)] {
        let session = scene.other.place.enter(|| Session::open_from(port, scene.victim.at(six, 80), SOON))?;
        sessions.push((session, scene.other.at(six, port)));
    }
    let known = scene.known()?;
    let begun = Instant::now();
    scene.spoofs()?;
    scene.poisons()?;
    scene.injects()?;
    scene.pretends()?;
    scene.hides()?;
    for (session, client) in &mut sessions {
        scene.breaks(*client)?;
        session.ask(SOON).context("a connection that was to be broken")?;
    }
    println!("{} attempts in {:.1} s", scene.number.get(), begun.elapsed().as_secs_f64());
    let failures = scene.failures.borrow().join("\n");
    ensure!(failures.is_empty(), "{failures}");
    let now = scene.known()?;
    ensure!(now == known, "neighbours or routes are others: {known}\nnow {now}");
    scene.honest_frames_arrive()?;
    let Scene { cluster, .. } = scene;
    cluster.down()
}
