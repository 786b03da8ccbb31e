//! Datagrams to frames of the device: packets of one flow that follow each other become one large frame, which costs the kernel as little as a
//! packet. They are those that another node's kernel left to be cut, and cut again they are the same bytes. No payload is copied.
//!
//! Pure: bytes in, slices out. Nothing is believed of a datagram: what cannot be read is refused, what is not certain goes as it is.

use std::io::IoSlice;
use std::net::IpAddr;

use towpath_datapath::datagrams::Datagram;
use towpath_datapath::udp_names::mac_of;

use super::bytes::{be16, be32, change_length, finish_ipv4, put};
use super::frame::{CE, FRONT, GSO_TCPV4, GSO_TCPV6, GSO_UDP, Head, Ip, Unfinished, VNET, Vnet};
use super::split::{ACK, PSH, TOGETHER_MAX};

const TCP: u8 = 6;
const UDP: u8 = 17;
/// The largest packet.
const PACKET_MAX: usize = 0xffff;
/// Packets in one, so that a frame's pieces are fewer than the kernel takes in a write (`UIO_MAXIOV`).
const PACKETS_MAX: usize = 1000;

/// Why a datagram was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refused {
    /// It holds no packet as nodes send it.
    Malformed,
    /// It is of another network.
    OtherNetwork,
    /// It met congestion, and its packet cannot say so.
    Congested,
}

/// A packet that others may be joined to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Joinable {
    ip: Ip,
    unfinished: Unfinished,
    /// Bytes of all its headers.
    headers: usize,
}

impl Joinable {
    fn of(packet: &[u8], ip: Ip, unfinished: Option<Unfinished>) -> Option<Self> {
        let unfinished = unfinished?;
        let l4 = ip.length;
        if ip.fragment || (!ip.v6 && l4 != 20) || usize::from(unfinished.start) != l4 {
            return None;
        }
        let headers = match (ip.protocol, unfinished.offset) {
            // Nothing but data: no opening, no end, no urgency, no news of congestion.
            (TCP, 16) if *packet.get(l4 + 13)? & !PSH == ACK => l4 + usize::from(packet.get(l4 + 12)? >> 4) * 4,
            (UDP, 6) => l4 + 8,
            _ => return None,
        };
        (headers >= l4 + 8 && headers < packet.len()).then_some(Self { ip, unfinished, headers })
    }

    /// Whether these are headers of the same flow, with nothing different but what differs between packets that were cut from one.
    fn same_flow(&self, ours: &[u8], theirs: &[u8]) -> bool {
        let l4 = self.ip.length;
        let same = |from: usize, to: usize| ours.get(from..to).is_some_and(|ours| theirs.get(from..to) == Some(ours));
        let ip = if self.ip.v6 { same(0, 4) && same(6, l4) } else { same(0, 2) && same(6, 10) && same(12, l4) };
        let transport = if self.ip.protocol == UDP {
            same(l4, l4 + 4)
        } else {
            same(l4, l4 + 4) && same(l4 + 8, l4 + 13) && same(l4 + 14, l4 + 16) && same(l4 + 18, self.headers)
        };
        ip && transport
    }
}

/// The frame that is being made.
#[derive(Debug)]
struct Current {
    from: IpAddr,
    /// None: it stays alone.
    joinable: Option<Joinable>,
    /// Payload bytes of each packet but the last.
    segment: usize,
    /// Bytes of payload so far.
    payload: usize,
    packets: usize,
    /// The last one pushes (TCP).
    pushes: bool,
    /// No more can follow.
    closed: bool,
}

/// Makes frames of datagrams that live for `'a`.
#[derive(Debug)]
pub(crate) struct Joiner<'a> {
    network: u32,
    /// What this node goes by.
    own: [u8; 6],
    /// Whether the device takes UDP that is to be cut.
    udp: bool,
    current: Option<Current>,
    front: Vec<u8>,
    bodies: Vec<IoSlice<'a>>,
}

impl<'a> Joiner<'a> {
    /// For the network with this identifier, on the node with this address.
    pub(crate) fn new(network: u32, own: IpAddr, udp: bool) -> Self {
        Self { network, own: mac_of(own), udp, current: None, front: Vec::new(), bodies: Vec::new() }
    }

    /// Takes a datagram that came from a node. A frame that it does not belong to goes to `write` first, in two parts: what stands before the
    /// payload, and that.
    pub(crate) fn take(
        &mut self,
        Datagram { from, ecn, bytes }: Datagram<'a>,
        mut write: impl FnMut(&[u8], &[IoSlice<'a>]),
    ) -> Result<(), Refused> {
        let (head, packet) = Head::read(bytes).ok_or(Refused::Malformed)?;
        if head.network != self.network {
            return Err(Refused::OtherNetwork);
        }
        let ip = Ip::read(packet).ok_or(Refused::Malformed)?;
        let packet = packet.get(..ip.whole).ok_or(Refused::Malformed)?;
        if let Some(unfinished) = head.unfinished {
            let (start, field) = (usize::from(unfinished.start), usize::from(unfinished.offset));
            if start < ip.length || start + field + 2 > packet.len() {
                return Err(Refused::Malformed);
            }
        }
        // What the path said of the datagram is said of the packet (RFC 6040 4.2).
        if ecn == CE && ip.ecn(packet) != CE {
            if ip.ecn(packet) == 0 {
                return Err(Refused::Congested);
            }
            self.flush(&mut write);
            return self.begin_marked(from, head, ip, packet).ok_or(Refused::Malformed);
        }
        let joinable = Joinable::of(packet, ip, head.unfinished).filter(|j| self.udp || j.ip.protocol == TCP);
        if !joinable.is_some_and(|joinable| self.join(from, joinable, packet)) {
            self.flush(&mut write);
            self.begin(from, head, ip, joinable, packet);
        }
        Ok(())
    }

    /// Whether the packet is part of the present frame now.
    fn join(&mut self, from: IpAddr, other: Joinable, packet: &'a [u8]) -> bool {
        let Some(current) = &mut self.current else { return false };
        let Some(ours) = current.joinable else { return false };
        let Some(body) = packet.get(other.headers..) else { return false };
        let Some(first) = self.front.get(FRONT..) else { return false };
        let (tcp, l4) = (ours.ip.protocol == TCP, ours.ip.length);
        let most = if tcp { PACKETS_MAX } else { TOGETHER_MAX };
        let fits = !current.closed
            && current.from == from
            && (ours.ip.v6, ours.ip.length, ours.ip.protocol, ours.headers)
                == (other.ip.v6, other.ip.length, other.ip.protocol, other.headers)
            && body.len() <= current.segment
            && current.packets < most
            && ours.headers + current.payload + body.len() <= PACKET_MAX;
        if !fits || !ours.same_flow(first, packet) {
            return false;
        }
        // Cut again they get the numbers that they came with: those after the first's, or any where nothing is to be fragmented.
        let dont_fragment = first.get(6).is_some_and(|byte| byte & 0x40 != 0);
        let numbered = || {
            let next = be16(first, 4)?.wrapping_add(u16::try_from(current.packets).ok()?);
            (be16(packet, 4)? == next).then_some(())
        };
        let follows = || {
            let next = be32(first, l4 + 4)?.wrapping_add(u32::try_from(current.payload).ok()?);
            (be32(packet, l4 + 4)? == next).then_some(())
        };
        if (!ours.ip.v6 && !dont_fragment && numbered().is_none()) || (tcp && follows().is_none()) {
            return false;
        }
        current.pushes = tcp && packet.get(l4 + 13).is_some_and(|flags| flags & PSH != 0);
        current.closed = current.pushes || body.len() < current.segment;
        current.payload += body.len();
        current.packets += 1;
        self.bodies.push(IoSlice::new(body));
        true
    }

    /// A frame with what stands before a packet, and so many bytes of that; the rest is its body.
    fn stand(&mut self, from: IpAddr, head: Head, ip: Ip, headers: usize, packet: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        let kind: [u8; 2] = if ip.v6 { [0x86, 0xdd] } else { [8, 0] };
        self.front.clear();
        self.front.extend(Vnet { unfinished: head.unfinished, ..Vnet::default() }.bytes());
        self.front.extend(self.own.into_iter().chain(mac_of(from)).chain(kind));
        let (headers, body) = packet.split_at_checked(headers).unwrap_or((&[], packet));
        self.front.extend(headers);
        self.bodies.push(IoSlice::new(body));
        (headers, body)
    }

    /// A packet that is to say that it met congestion stays alone.
    fn begin_marked(&mut self, from: IpAddr, head: Head, ip: Ip, packet: &'a [u8]) -> Option<()> {
        let (_, body) = self.stand(from, head, ip, ip.length, packet);
        let (segment, payload) = (body.len(), body.len());
        self.current =
            Some(Current { from, joinable: None, segment, payload, packets: 1, pushes: false, closed: true });
        ip.mark(self.front.get_mut(FRONT..)?)
    }

    fn begin(&mut self, from: IpAddr, head: Head, ip: Ip, joinable: Option<Joinable>, packet: &'a [u8]) {
        let (headers, body) = self.stand(from, head, ip, joinable.map_or(0, |j| j.headers), packet);
        let flags = joinable.filter(|j| j.ip.protocol == TCP).and_then(|j| headers.get(j.ip.length + 13));
        let pushes = flags.is_some_and(|flags| flags & PSH != 0);
        let (segment, payload) = (body.len(), body.len());
        self.current = Some(Current { from, joinable, segment, payload, packets: 1, pushes, closed: pushes });
    }

    /// The last frame, if there is one, goes to `write`.
    pub(crate) fn flush(&mut self, mut write: impl FnMut(&[u8], &[IoSlice<'a>])) {
        let Some(current) = self.current.take() else { return };
        let whole = match current.joinable {
            Some(joinable) if current.packets > 1 => self.write_headers(&current, joinable),
            _ => Some(()),
        };
        // Every length was looked at when the packets were joined.
        debug_assert!(whole.is_some());
        write(&self.front, &self.bodies);
        self.front.clear();
        self.bodies.clear();
    }

    /// Has the headers be those of all packets together.
    fn write_headers(&mut self, current: &Current, joinable: Joinable) -> Option<()> {
        let Joinable { ip, unfinished, headers } = joinable;
        let (l4, tcp) = (ip.length, ip.protocol == TCP);
        let gso = match (tcp, ip.v6) {
            (true, false) => GSO_TCPV4,
            (true, true) => GSO_TCPV6,
            (false, _) => GSO_UDP,
        };
        let vnet = Vnet {
            gso,
            headers: u16::try_from(FRONT - VNET + headers).ok()?,
            segment: u16::try_from(current.segment).ok()?,
            unfinished: Some(unfinished),
        };
        put(&mut self.front, 0, vnet.bytes())?;
        let packet = self.front.get_mut(FRONT..)?;
        ip.write_length(packet, headers + current.payload)?;
        if !ip.v6 {
            finish_ipv4(packet, l4)?;
        }
        let (old, new) = (headers - l4 + current.segment, headers - l4 + current.payload);
        let new = u16::try_from(new).ok()?;
        if tcp && current.pushes {
            *packet.get_mut(l4 + 13)? |= PSH;
        }
        if !tcp {
            put(packet, l4 + 4, new.to_be_bytes())?;
        }
        change_length(packet, l4 + usize::from(unfinished.offset), u16::try_from(old).ok()?, new)
    }
}
