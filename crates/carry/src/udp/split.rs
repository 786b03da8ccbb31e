//! Frames of the device to datagrams: what a pod's kernel left to be cut is cut here, each packet a datagram, and datagrams of one length to
//! one node are gathered, so that the kernel takes them as one (UDP_SEGMENT). No payload is copied.
//!
//! Pure: bytes in, slices out.

use std::io::IoSlice;
use std::ops::Range;

use super::bytes::{be16, be32, change_length, finish_ipv4, put};
use super::frame::{
    ETHERNET, FRONT, GSO_ECN, GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP, HEAD, Head, Ip, Unfinished, VNET, Vnet, node_of,
};

/// The largest frame: a packet of 64 KiB and what stands before it.
pub(crate) const FRAME_MAX: usize = FRONT + 0x1_0000;
/// Bytes of frames that are gathered at most.
const ARENA: usize = 4 * FRAME_MAX;
/// Frames that are gathered at most.
const FRAMES_MAX: usize = 64;
/// Into as many packets a frame is cut at most: 64 KiB at the smallest segment that Linux' TCP sends (48 bytes) are 1,366.
const SEGMENTS_MAX: usize = 2048;
/// Datagrams that the kernel takes as one (`UDP_MAX_SEGMENTS` of Linux before 6.9), and their bytes: of an IPv4 packet.
pub(super) const TOGETHER_MAX: usize = 64;
const BYTES_MAX: usize = 0xffff - 20 - 8;

/// Why a frame was not sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unsent {
    /// It is for no node.
    NoNode,
    /// It cannot be read or cut.
    Unreadable,
}

/// One datagram: headers that were written, and a piece of a frame.
#[derive(Clone, Debug)]
struct Datagram {
    /// What the node goes by ([`towpath_datapath::udp_names`]).
    to: [u8; 6],
    /// Of the packet, and so of the datagram (RFC 6040 4.1).
    ecn: u8,
    head: Range<usize>,
    body: Range<usize>,
}

impl Datagram {
    fn len(&self) -> usize {
        self.head.len() + self.body.len()
    }
}

/// Datagrams to one node that the kernel can take as one: all of `segment` bytes, the last perhaps shorter.
#[derive(Debug)]
pub(crate) struct Train<'a> {
    /// What the node goes by.
    pub(crate) to: [u8; 6],
    /// Bytes of each datagram but the last.
    pub(crate) segment: usize,
    /// Their mark of congestion.
    pub(crate) ecn: u8,
    /// Two pieces a datagram.
    pub(crate) pieces: Vec<IoSlice<'a>>,
}

/// Gathers frames and cuts them.
#[derive(Debug)]
pub(crate) struct Outbox {
    network: u32,
    frames: Vec<u8>,
    used: usize,
    count: usize,
    heads: Vec<u8>,
    datagrams: Vec<Datagram>,
}

impl Outbox {
    /// For the network with this identifier.
    pub(crate) fn new(network: u32) -> Self {
        let frames = vec![0; ARENA];
        Self { network, frames, used: 0, count: 0, heads: Vec::new(), datagrams: Vec::new() }
    }

    /// Where the next frame is to be read; none: it is full.
    pub(crate) fn room(&mut self) -> Option<&mut [u8]> {
        let room = self.frames.get_mut(self.used..self.used + FRAME_MAX)?;
        (self.count < FRAMES_MAX).then_some(room)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.datagrams.is_empty()
    }

    /// Takes the frame of `length` bytes that was read there.
    pub(crate) fn take(&mut self, length: usize) -> Result<(), Unsent> {
        let at = self.used..self.used + length;
        let frame = self.frames.get(at.clone()).ok_or(Unsent::Unreadable)?;
        let vnet = Vnet::read(frame).ok_or(Unsent::Unreadable)?;
        let to = frame.get(VNET..).and_then(node_of).ok_or(Unsent::NoNode)?;
        let packet = frame.get(FRONT..).ok_or(Unsent::Unreadable)?;
        let ip = Ip::read(packet).ok_or(Unsent::Unreadable)?;
        let packet = packet.get(..ip.whole).ok_or(Unsent::Unreadable)?;
        let body = at.start + FRONT..at.start + FRONT + ip.whole;
        let before = self.heads.len();
        let cut = match vnet.gso & !GSO_ECN {
            GSO_NONE if packet.len() + HEAD <= BYTES_MAX => {
                let head = Head { network: self.network, unfinished: vnet.unfinished };
                self.heads.extend(head.bytes());
                self.datagrams.push(Datagram { to, ecn: ip.ecn(packet), head: before..before + HEAD, body });
                Some(())
            }
            GSO_TCPV4 | GSO_TCPV6 | GSO_UDP => {
                let cutter = Cutter { network: self.network, to, packet, at: body.start, ip };
                cutter.cut(&vnet, &mut self.heads, &mut self.datagrams)
            }
            _ => None,
        };
        cut.ok_or(Unsent::Unreadable)?;
        self.used += length.next_multiple_of(8);
        self.count += 1;
        Ok(())
    }

    /// What is to be sent, in order.
    pub(crate) fn trains(&self) -> Vec<Train<'_>> {
        let mut trains: Vec<Train<'_>> = Vec::new();
        let (mut bytes, mut open) = (0, false);
        for datagram in &self.datagrams {
            let (Some(head), Some(body)) =
                (self.heads.get(datagram.head.clone()), self.frames.get(datagram.body.clone()))
            else {
                continue;
            };
            let length = datagram.len();
            let pieces = [IoSlice::new(head), IoSlice::new(body)];
            match trains.last_mut() {
                Some(train)
                    if open
                        && (train.to, train.ecn) == (datagram.to, datagram.ecn)
                        && length <= train.segment
                        && train.pieces.len() < 2 * TOGETHER_MAX
                        && bytes + length <= BYTES_MAX =>
                {
                    open = length == train.segment;
                    bytes += length;
                    train.pieces.extend(pieces);
                }
                _ => {
                    (bytes, open) = (length, true);
                    let (to, ecn) = (datagram.to, datagram.ecn);
                    trains.push(Train { to, segment: length, ecn, pieces: pieces.to_vec() });
                }
            }
        }
        trains
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        (self.used, self.count) = (0, 0);
        self.heads.clear();
        self.datagrams.clear();
    }
}

/// A packet that is to be cut.
struct Cutter<'a> {
    network: u32,
    to: [u8; 6],
    packet: &'a [u8],
    /// Where it begins among the frames.
    at: usize,
    ip: Ip,
}

impl Cutter<'_> {
    /// As the kernel does it (`tcp_gso_segment`, `__udp_gso_segment`, `inet_gso_segment`). On failure nothing is added.
    fn cut(&self, vnet: &Vnet, heads: &mut Vec<u8>, datagrams: &mut Vec<Datagram>) -> Option<()> {
        let udp = vnet.gso == GSO_UDP;
        let unfinished = vnet.unfinished?;
        let l4 = usize::from(unfinished.start);
        let headers = if udp { l4 + 8 } else { l4 + usize::from(self.packet.get(l4 + 12)? >> 4) * 4 };
        let (field, shortest) = if udp { (6, 8) } else { (16, 20) };
        let segment = usize::from(vnet.segment);
        let payload = self.packet.len().checked_sub(headers)?;
        if usize::from(unfinished.offset) != field || headers < l4 + shortest || l4 < self.ip.length || segment == 0 {
            return None;
        }
        let count = payload.div_ceil(segment).max(1);
        if count > SEGMENTS_MAX || HEAD + headers + segment.min(payload) > BYTES_MAX {
            return None;
        }
        let (heads_before, datagrams_before) = (heads.len(), datagrams.len());
        for number in 0..count {
            let from = headers + number * segment;
            let to = (from + segment).min(self.packet.len());
            let start = heads.len();
            heads.extend(Head { network: self.network, unfinished: Some(unfinished) }.bytes());
            heads.extend(self.packet.get(..headers)?);
            let last = number + 1 == count;
            if self.write(heads.get_mut(start + HEAD..)?, udp, unfinished, number, segment, to - from, last).is_none() {
                heads.truncate(heads_before);
                datagrams.truncate(datagrams_before);
                return None;
            }
            datagrams.push(Datagram {
                to: self.to,
                ecn: self.ip.ecn(self.packet),
                head: start..start + HEAD + headers,
                body: self.at + from..self.at + to,
            });
        }
        Some(())
    }

    /// Has the headers be those of packet `number`, which has `length` bytes of payload.
    #[allow(clippy::too_many_arguments, reason = "one packet's place among its siblings; a struct would be as long")]
    fn write(
        &self,
        headers: &mut [u8],
        udp: bool,
        unfinished: Unfinished,
        number: usize,
        segment: usize,
        length: usize,
        last: bool,
    ) -> Option<()> {
        let l4 = usize::from(unfinished.start);
        let whole = headers.len() + length;
        self.ip.write_length(headers, whole)?;
        if !self.ip.v6 {
            let id = be16(headers, 4)?.wrapping_add(u16::try_from(number).ok()?);
            put(headers, 4, id.to_be_bytes())?;
            finish_ipv4(headers, self.ip.length)?;
        }
        if udp {
            put(headers, l4 + 4, u16::try_from(whole - l4).ok()?.to_be_bytes())?;
        } else {
            let sequence = be32(headers, l4 + 4)?.wrapping_add(u32::try_from(number * segment).ok()?);
            put(headers, l4 + 4, sequence.to_be_bytes())?;
            let flags = headers.get_mut(l4 + 13)?;
            if !last {
                *flags &= !(FIN | PSH);
            }
            if number > 0 {
                *flags &= !CWR;
            }
        }
        let (old, new) = (self.packet.len() - l4, whole - l4);
        let check = l4 + usize::from(unfinished.offset);
        change_length(headers, check, u16::try_from(old).ok()?, u16::try_from(new).ok()?)
    }
}

pub(super) const FIN: u8 = 0x01;
pub(super) const PSH: u8 = 0x08;
pub(super) const ACK: u8 = 0x10;
const CWR: u8 = 0x80;

const _: () = assert!(VNET + ETHERNET == FRONT);
