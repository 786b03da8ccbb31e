//! Packets worth asking about, and their bytes.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::Value;
use towpath_model::Protocol;
use towpath_model::desired::RowProtocol;

use crate::cluster::{DNS, EXTERNAL, NODES, PLACES, RANGES, Spec, node_ips, place_ips};
use crate::random::Random;

/// What a packet carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Transport {
    /// A first segment.
    Tcp,
    /// A datagram.
    Udp,
    /// An INIT chunk.
    Sctp,
    /// An echo request, of the address family.
    Icmp,
    /// A protocol without ports (GRE, 47).
    Gre,
    /// Another one (OSPF, 89).
    Ospf,
}

impl Transport {
    /// Protocol number (IANA) in a family.
    pub fn number(self, v4: bool) -> u8 {
        match self {
            Transport::Tcp => 6,
            Transport::Udp => 17,
            Transport::Sctp => 132,
            Transport::Icmp => {
                if v4 {
                    1
                } else {
                    58
                }
            }
            Transport::Gre => 47,
            Transport::Ospf => 89,
        }
    }

    /// What rule rows call it.
    pub fn row(self) -> RowProtocol {
        match self {
            Transport::Tcp => RowProtocol::Ports(Protocol::Tcp),
            Transport::Udp => RowProtocol::Ports(Protocol::Udp),
            Transport::Sctp => RowProtocol::Ports(Protocol::Sctp),
            Transport::Icmp | Transport::Gre | Transport::Ospf => RowProtocol::Other,
        }
    }

    /// What the API calls it; any other text is a protocol without ports.
    pub fn name(self) -> &'static str {
        match self {
            Transport::Tcp => "TCP",
            Transport::Udp => "UDP",
            Transport::Sctp => "SCTP",
            Transport::Icmp => "ICMP",
            Transport::Gre => "GRE",
            Transport::Ospf => "OSPF",
        }
    }
}

/// By which hook of the first node the packet comes to be judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Way {
    /// The pod in this place sends it.
    FromPod(usize),
    /// The stack carries it to the pod in this place, from there.
    ToPod(usize, Ingress),
    /// It comes out of the tunnel, from the second node, for a pod here.
    FromTunnel,
}

/// Where a packet came in that the stack carries to a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Ingress {
    /// The node itself made it.
    Node,
    /// The device of the pod in this place.
    Place(usize),
    /// The uplink.
    Uplink,
    /// The tunnel device.
    Tunnel,
}

/// A packet that opens a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// Protocol.
    pub transport: Transport,
    /// Source port; of an echo request the identifier.
    pub source_port: u16,
    /// Destination port; 0 of what has none.
    pub port: u16,
    /// Its way; none: the node's source checks would not let it come to a judgement.
    pub way: Option<Way>,
}

impl Packet {
    /// Whether the node only passes it on, though it carries the node's own address.
    pub fn is_forwarded(&self) -> bool {
        !matches!(self.way, Some(Way::ToPod(_, Ingress::Node)))
    }

    /// The frame, with addresses of Ethernet that the hook expects. Checksums of the transport are left out: no hook looks at them.
    pub fn frame(&self, source_mac: [u8; 6], destination_mac: [u8; 6]) -> Vec<u8> {
        let v4 = self.source.is_ipv4();
        let transport = self.transport_header(v4);
        let length = u16::try_from(transport.len()).unwrap_or(u16::MAX);
        let mut frame = Vec::with_capacity(14 + 40 + transport.len());
        frame.extend(destination_mac);
        frame.extend(source_mac);
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                frame.extend([0x08, 0x00, 0x45, 0]);
                frame.extend((20 + length).to_be_bytes());
                frame.extend([0, 1, 0, 0, 64, self.transport.number(true), 0, 0]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
                frame.extend(length.to_be_bytes());
                frame.extend([self.transport.number(false), 64]);
                frame.extend(source.octets());
                frame.extend(destination.octets());
            }
            // Never asked; no hook takes it for anything.
            _ => frame.extend([0xff, 0xff]),
        }
        frame.extend(transport);
        frame
    }

    fn transport_header(&self, v4: bool) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(32);
        let ports = |bytes: &mut Vec<u8>| {
            bytes.extend(self.source_port.to_be_bytes());
            bytes.extend(self.port.to_be_bytes());
        };
        match self.transport {
            Transport::Tcp => {
                ports(&mut bytes);
                bytes.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
            }
            Transport::Udp => {
                ports(&mut bytes);
                bytes.extend([0, 12, 0, 0]);
                bytes.extend(*b"text");
            }
            Transport::Sctp => {
                ports(&mut bytes);
                // A verification tag of 0, no checksum; INIT (RFC 9260, 3.3.2).
                bytes.extend([0; 8]);
                bytes.extend([1, 0, 0, 20, 0, 0, 0, 9, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1]);
            }
            Transport::Icmp => {
                bytes.extend([if v4 { 8 } else { 128 }, 0, 0, 0]);
                bytes.extend(self.source_port.to_be_bytes());
                bytes.extend([0, 1]);
            }
            Transport::Gre | Transport::Ospf => bytes.extend([0; 8]),
        }
        bytes
    }
}

/// Every integer and every range in some objects.
fn collect(value: &Value, numbers: &mut BTreeSet<u16>, ranges: &mut BTreeSet<IpNet>) {
    match value {
        Value::Number(number) => {
            let number = number.as_i64().unwrap_or(0);
            let near = number.saturating_sub(1)..=number.saturating_add(1);
            numbers.extend(near.filter_map(|number| u16::try_from(number).ok()));
        }
        Value::String(text) => ranges.extend(text.parse::<IpNet>().ok().map(|range| range.trunc())),
        Value::Array(list) => list.iter().for_each(|value| collect(value, numbers, ranges)),
        Value::Object(fields) => fields.values().for_each(|value| collect(value, numbers, ranges)),
        Value::Null | Value::Bool(_) => {}
    }
}

/// The addresses at the edges of a range, on both sides.
fn edges(range: &IpNet) -> Vec<IpAddr> {
    let shift =
        |address: IpAddr, up: bool| match address {
            IpAddr::V4(a) => if up { a.to_bits().checked_add(1) } else { a.to_bits().checked_sub(1) }
                .map(|bits| IpAddr::V4(bits.into())),
            IpAddr::V6(a) => if up { a.to_bits().checked_add(1) } else { a.to_bits().checked_sub(1) }
                .map(|bits| IpAddr::V6(bits.into())),
        };
    let (first, last) = (range.network(), range.broadcast());
    [shift(first, false), Some(first), Some(last), shift(last, true)].into_iter().flatten().collect()
}

/// Whether an address may be an end of a packet. (Multicast and the like are nobody's; the kernel drops IPv6 addresses that embed IPv4 ones; two
/// addresses stand for a pod that talks to itself.)
fn may_speak(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(a) => {
            !(a.is_unspecified() || a.is_multicast() || a.is_loopback() || a.is_broadcast())
                && a.octets() != [169, 254, 116, 9]
        }
        IpAddr::V6(a) => {
            let [first, second, ..] = a.segments();
            let embeds = a.segments()[..4] == [0; 4];
            !(embeds || a.is_multicast() || first & 0xffc0 == 0xfe80 || (first, second) == (0xfd00, 0x7470))
        }
    }
}

/// What can be asked about a cluster.
#[derive(Clone, Debug)]
pub struct Subjects {
    /// Addresses of pods of the first node, with their places.
    pub local: Vec<(IpAddr, usize)>,
    /// Whom they may talk to.
    pub peers: Vec<IpAddr>,
    /// Ports.
    pub ports: Vec<u16>,
}

impl Subjects {
    /// Of a cluster: everybody in it, strangers, and the edges of all ranges of addresses and ports.
    pub fn of(spec: &Spec) -> Self {
        let (mut ports, mut ranges) = (BTreeSet::from([0, 1, 53, 80, 65535]), BTreeSet::new());
        for object in spec.policies.iter().chain(&spec.cluster_policies) {
            collect(&object["spec"], &mut ports, &mut ranges);
        }
        let mut texts: Vec<String> = Vec::new();
        for node in 0..NODES.len() {
            texts.extend(node_ips(node));
            texts.push(EXTERNAL[node].to_owned());
            texts.extend((0..PLACES[node]).flat_map(|place| place_ips(node, place)));
        }
        let others =
            ["198.51.100.7", "203.0.113.9", "10.0.0.77", "10.0.1.77", "2001:db8::1", "fd00::77", "fd00:0:0:1::77"];
        texts.extend(DNS.iter().chain(&others).map(|text| (*text).to_owned()));
        let named = texts.iter().filter_map(|text| text.parse::<IpAddr>().ok());
        let mut peers: BTreeSet<IpAddr> = named.collect();
        peers.extend(ranges.iter().flat_map(edges));
        Self {
            local: spec.local.iter().flat_map(|pod| pod.addresses.iter().map(|ip| (*ip, pod.place))).collect(),
            peers: peers.into_iter().filter(|address| may_speak(*address)).collect(),
            ports: ports.into_iter().collect(),
        }
    }

    /// A packet that begins or ends at a pod of the first node. None: there is no such pod.
    pub fn packet(&self, random: &mut Random) -> Option<Packet> {
        if self.local.is_empty() {
            return None;
        }
        let (own, place) = random.pick(&self.local);
        let near = random.chance(2, 5);
        let mut peer = if near { random.pick(&self.local).0 } else { random.pick(&self.peers) };
        while peer.is_ipv4() != own.is_ipv4() {
            peer = random.pick(&self.peers);
        }
        let out = random.chance(1, 2);
        let (source, destination) = if out { (own, peer) } else { (peer, own) };
        let transport = match random.below(12) {
            0..=5 => Transport::Tcp,
            6..=8 => Transport::Udp,
            9 => Transport::Sctp,
            10 => Transport::Icmp,
            // Without ports both directions of two ends are one connection: so each has its own protocol.
            _ => {
                if source < destination {
                    Transport::Gre
                } else {
                    Transport::Ospf
                }
            }
        };
        let port = if matches!(transport.row(), RowProtocol::Ports(_)) { random.pick(&self.ports) } else { 0 };
        // Few, so that a connection may be open already when the policies are others; and none that is a destination.
        let source_port = random.pick(&[20_001, 20_002, 20_003]);
        let way = if out { self.way_out(random, place, peer) } else { self.way_in(random, place, peer) };
        Some(Packet { source, destination, transport, source_port, port, way })
    }

    fn place_of(&self, address: IpAddr) -> Option<usize> {
        self.local.iter().find(|(local, _)| *local == address).map(|(_, place)| *place)
    }

    fn way_out(&self, random: &mut Random, place: usize, peer: IpAddr) -> Option<Way> {
        Some(self.place_of(peer).map_or(Way::FromPod(place), |other| Self::between(random, place, other)))
    }

    /// From the pod's device at once, or through the stack.
    fn between(random: &mut Random, from: usize, to: usize) -> Way {
        if from != to && random.chance(1, 8) { Way::ToPod(to, Ingress::Place(from)) } else { Way::FromPod(from) }
    }

    /// None: with a pod's address from where the pod cannot be.
    fn way_in(&self, random: &mut Random, place: usize, peer: IpAddr) -> Option<Way> {
        if let Some(other) = self.place_of(peer) {
            return Some(Self::between(random, other, place));
        }
        let held_by = |node: usize| {
            RANGES[node].iter().filter_map(|range| range.parse::<IpNet>().ok()).any(|range| range.contains(&peer))
        };
        let is_node = node_ips(0).iter().any(|ip| ip.parse() == Ok(peer)) || EXTERNAL[0].parse() == Ok(peer);
        if is_node {
            return Some(Way::ToPod(place, if random.chance(1, 3) { Ingress::Uplink } else { Ingress::Node }));
        }
        match (held_by(0), held_by(1)) {
            (true, _) => None,
            (false, true) if random.chance(1, 2) => Some(Way::FromTunnel),
            (false, true) => Some(Way::ToPod(place, Ingress::Tunnel)),
            (false, false) => Some(Way::ToPod(place, Ingress::Uplink)),
        }
    }
}
