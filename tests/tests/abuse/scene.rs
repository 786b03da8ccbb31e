//! Who tries, who is tried, and where it is seen what arrived.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, socket};
use serde_json::Value;
use towpath_datapath::net::packet::{Listen, PacketSocket};
use towpath_walkthrough::cluster::Cluster;
use towpath_walkthrough::in_charge::status_of;
use towpath_walkthrough::libcni::Sandbox;
use towpath_walkthrough::place::{Place, address};

use crate::frames::{BROADCAST, Mac, VNI, VXLAN, udp, vxlan};

/// Before the number of an attempt.
const MARK: [u8; 8] = *b"\xabused\x0074";
/// A port of the victim's that its policy opens to the attacker.
pub(crate) const OPEN: u16 = 5353;
/// And one that it does not.
pub(crate) const CLOSED: u16 = 5354;
/// Where sockets of the node itself listen.
pub(crate) const NODES_OWN: u16 = 7171;
/// Each frame is sent so often.
pub(crate) const TIMES: u64 = 3;
/// By then what was sent has arrived, on one machine.
const ARRIVED: Duration = Duration::from_millis(30);

/// Nobody there.
pub(crate) fn outside(six: bool) -> IpAddr {
    if six { Ipv6Addr::new(0x2001, 0xdb8, 0x77, 0, 0, 0, 0, 9).into() } else { Ipv4Addr::new(192, 0, 2, 9).into() }
}

/// Somebody with an address of each family on a link, and the neighbour to whom all that leaves is sent.
pub(crate) struct Stand {
    pub(crate) place: Place,
    pub(crate) mac: Mac,
    pub(crate) ips: [IpAddr; 2],
    pub(crate) gateway: Mac,
}

pub(crate) fn say(place: &Place, command: &str) -> Result<String> {
    place.enter(|| {
        let said = Command::new("sh").args(["-c", command]).output()?;
        ensure!(said.status.success(), "{command} in {}: {}", place.name(), String::from_utf8_lossy(&said.stderr));
        Ok(String::from_utf8(said.stdout)?)
    })
}

pub(crate) fn mac(text: &str) -> Result<Mac> {
    let bytes: Vec<u8> = text.split(':').filter_map(|byte| u8::from_str_radix(byte, 16).ok()).collect();
    bytes.try_into().map_err(|_| anyhow::anyhow!("{text:?} is no MAC address"))
}

pub(crate) fn after<'t>(text: &'t str, word: &str) -> Result<&'t str> {
    let rest = text.split_once(&format!("{word} ")).with_context(|| format!("no {word} in {text:?}"))?.1;
    rest.split([' ', '/', '\n']).next().context("nothing")
}

impl Stand {
    pub(crate) fn new(place: Place, gateway: Option<Mac>) -> Result<Self> {
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

    pub(crate) fn ip(&self, six: bool) -> IpAddr {
        if six { self.ips[1] } else { self.ips[0] }
    }

    pub(crate) fn at(&self, six: bool, port: u16) -> SocketAddr {
        SocketAddr::new(self.ip(six), port)
    }

    pub(crate) fn sends(&self, frame: &[u8]) -> Result<()> {
        self.place.enter(|| Ok(PacketSocket::open(if_nametoindex("eth0")?, Listen::Arp)?.send(frame)?))
    }
}

/// Frames that come by on all devices of a place.
pub(crate) struct Tap(OwnedFd);

impl Tap {
    pub(crate) fn at(place: &Place) -> Result<Self> {
        place.enter(|| {
            let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
            Ok(Self(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?))
        })
    }

    /// The devices by which frames that hold `mark` came in since the last time.
    pub(crate) fn heard(&self, mark: &[u8]) -> Vec<usize> {
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
pub(crate) enum By {
    Pod,
    Neighbour,
}

/// Reasons by which an attempt may be counted; `&[]`: the kernel has nobody here who takes it (a DHCP client, another tunnel device, `ipip`).
pub(crate) type Counted = &'static [&'static str];

pub(crate) struct Scene {
    pub(crate) cluster: Cluster,
    pub(crate) attacker: Stand,
    pub(crate) victim: Stand,
    /// On the other node.
    pub(crate) other: Stand,
    pub(crate) neighbour: Stand,
    pub(crate) nodes: [Stand; 2],
    taps: Vec<(String, Tap)>,
    /// Of the link between the nodes, and its ports to them.
    link: (Tap, Vec<usize>),
    nodes_own: UdpSocket,
    pub(crate) number: std::cell::Cell<u32>,
    pub(crate) failures: std::cell::RefCell<Vec<String>>,
    _neighbour: Sandbox,
}

impl Scene {
    pub(crate) fn new(cluster: Cluster) -> Result<Self> {
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

    pub(crate) fn counted(&self, reasons: Counted) -> Result<u64> {
        let status = status_of(&self.cluster, "n1")?;
        let count = |reason: &&str| {
            status.pointer(&format!("/counters/drop.{reason}")).and_then(Value::as_u64).unwrap_or_default()
        };
        Ok(reasons.iter().map(count).sum())
    }

    /// Where frames of this mark arrived.
    pub(crate) fn arrived(&self, by: By, mark: &[u8]) -> Vec<String> {
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
    pub(crate) fn send(
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
    pub(crate) fn attempt(
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
    pub(crate) fn one(
        &self,
        what: &str,
        by: By,
        counted: Counted,
        make: impl Fn(&[u8]) -> Result<Vec<u8>>,
    ) -> Result<()> {
        self.attempt(what, by, counted, |mark| Ok(vec![make(mark)?]))
    }

    /// What is nobody's abuse arrives, so the rest would, too.
    pub(crate) fn honest_frames_arrive(&self) -> Result<()> {
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

    /// What others know of their neighbourhood and where they send.
    pub(crate) fn known(&self) -> Result<String> {
        let command =
            "ip neigh show nud permanent; ip -4 route; ip -6 route show table all | sed 's/ expires [0-9]*sec//'";
        let places = [&self.victim, &self.other, &self.nodes[0], &self.nodes[1]];
        let all: Vec<String> = places.iter().map(|stand| say(&stand.place, command)).collect::<Result<_>>()?;
        Ok(all.join("---\n"))
    }
}
