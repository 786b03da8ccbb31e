//! What stands before a packet: at the device a virtio header and an Ethernet header, between nodes one of eight bytes.
//!
//! The Ethernet addresses of the device are made of nodes' addresses ([`udp_names`]): the kernel's programs say so where a frame goes, and are
//! told so where it came from.
//!
//! ```text
//! between nodes, in a UDP datagram:   0        version (4 bits), flags (4 bits)
//!                                     1..4     network identifier
//!                                     4..6     where what the checksum covers begins, from the first byte of the packet
//!                                     6..8     where the checksum is, from there
//!                                     8..      one IPv4 or IPv6 packet, whole
//! ```
//!
//! A checksum that its sender left to its network card is not made on the way either: the field holds the sum of the pseudo header, as the
//! kernel keeps it, the flag says so, and the receiving kernel goes on with it as with what it got from a pod of its own. On the way the packet is
//! covered by the checksum of the datagram.

use towpath_datapath::udp_names;

use super::bytes::{be16, finish_ipv4, put};

/// Bytes of the virtio header of a frame (`struct virtio_net_hdr`).
pub(crate) const VNET: usize = 10;
/// Bytes of an Ethernet header.
pub(crate) const ETHERNET: usize = 14;
/// What stands before a packet at the device.
pub(crate) const FRONT: usize = VNET + ETHERNET;
/// What stands before a packet in a datagram.
pub(crate) const HEAD: usize = 8;

const VERSION: u8 = 1 << 4;
const UNFINISHED: u8 = 1;

/// `virtio_net_hdr.flags`: the checksum is to be made.
const NEEDS_CSUM: u8 = 1;
/// `virtio_net_hdr.gso_type`.
pub(super) const GSO_NONE: u8 = 0;
pub(super) const GSO_TCPV4: u8 = 1;
pub(super) const GSO_TCPV6: u8 = 4;
pub(super) const GSO_UDP: u8 = 5;
/// Of TCP with congestion notification.
pub(super) const GSO_ECN: u8 = 0x80;

/// The mark of a packet that met congestion (RFC 3168 5).
pub(super) const CE: u8 = 3;

/// A checksum that is to be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Unfinished {
    /// Where what it covers begins, in bytes from the first of the packet.
    pub(super) start: u16,
    /// Where it is, from there.
    pub(super) offset: u16,
}

/// The virtio header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Vnet {
    pub(super) gso: u8,
    /// Bytes of all headers, from the Ethernet header on.
    pub(super) headers: u16,
    /// Payload bytes of each packet that this one is to be cut into.
    pub(super) segment: u16,
    pub(super) unfinished: Option<Unfinished>,
}

impl Vnet {
    /// None: too short, or it points before the packet.
    pub(super) fn read(frame: &[u8]) -> Option<Self> {
        let bytes: &[u8; VNET] = frame.first_chunk()?;
        let &[flags, gso, h0, h1, s0, s1, c0, c1, o0, o1] = bytes;
        let unfinished = match flags & NEEDS_CSUM {
            0 => None,
            _ => Some(Unfinished {
                start: u16::from_ne_bytes([c0, c1]).checked_sub(ETHERNET as u16)?,
                offset: u16::from_ne_bytes([o0, o1]),
            }),
        };
        let (headers, segment) = (u16::from_ne_bytes([h0, h1]), u16::from_ne_bytes([s0, s1]));
        Some(Self { gso, headers, segment, unfinished })
    }

    pub(super) fn bytes(self) -> [u8; VNET] {
        let flags = if self.unfinished.is_some() { NEEDS_CSUM } else { 0 };
        let (start, offset) = self.unfinished.map_or((0, 0), |u| (u.start.saturating_add(ETHERNET as u16), u.offset));
        let ([h0, h1], [s0, s1]) = (self.headers.to_ne_bytes(), self.segment.to_ne_bytes());
        let ([c0, c1], [o0, o1]) = (start.to_ne_bytes(), offset.to_ne_bytes());
        [flags, self.gso, h0, h1, s0, s1, c0, c1, o0, o1]
    }
}

/// The header between nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// Network identifier, 24 bits.
    pub(super) network: u32,
    pub(super) unfinished: Option<Unfinished>,
}

impl Head {
    /// The header and the packet behind it; none: another version, or too short.
    pub(super) fn read(datagram: &[u8]) -> Option<(Self, &[u8])> {
        let (&[kind, n0, n1, n2, ..], packet) = datagram.split_first_chunk::<HEAD>()?;
        if kind & 0xf0 != VERSION {
            return None;
        }
        let unfinished = match kind & UNFINISHED {
            0 => None,
            _ => Some(Unfinished { start: be16(datagram, 4)?, offset: be16(datagram, 6)? }),
        };
        Some((Self { network: u32::from_be_bytes([0, n0, n1, n2]), unfinished }, packet))
    }

    pub(super) fn bytes(self) -> [u8; HEAD] {
        let [_, n0, n1, n2] = self.network.to_be_bytes();
        let (flags, u) = match self.unfinished {
            Some(u) => (UNFINISHED, u),
            None => (0, Unfinished { start: 0, offset: 0 }),
        };
        let ([s0, s1], [o0, o1]) = (u.start.to_be_bytes(), u.offset.to_be_bytes());
        [VERSION | flags, n0, n1, n2, s0, s1, o0, o1]
    }
}

/// What the node goes by that a frame is for; `ethernet`: its Ethernet header and what follows.
pub(super) fn node_of(ethernet: &[u8]) -> Option<[u8; 6]> {
    ethernet.first_chunk::<6>().copied().filter(|mac| udp_names::is_name(*mac))
}

/// What is known of an IP packet without its options: where its transport header is, and whether it is the whole of a datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ip {
    pub(super) v6: bool,
    /// Bytes of the header.
    pub(super) length: usize,
    /// Protocol behind it.
    pub(super) protocol: u8,
    pub(super) fragment: bool,
    /// Bytes of the packet; what follows is padding of a link.
    pub(super) whole: usize,
}

impl Ip {
    /// None: no IP packet, or not the whole of one.
    pub(super) fn read(packet: &[u8]) -> Option<Self> {
        match packet.first()? >> 4 {
            4 => {
                let length = usize::from(packet.first()? & 15) * 4;
                let whole = usize::from(be16(packet, 2)?);
                let fragment = be16(packet, 6)? & 0x3fff != 0;
                let ip = Self { v6: false, length, protocol: *packet.get(9)?, fragment, whole };
                (length >= 20 && whole <= packet.len() && length <= whole).then_some(ip)
            }
            6 => {
                let whole = usize::from(be16(packet, 4)?) + 40;
                let ip = Self { v6: true, length: 40, protocol: *packet.get(6)?, fragment: false, whole };
                (whole <= packet.len()).then_some(ip)
            }
            _ => None,
        }
    }

    /// The packet's mark of congestion (RFC 3168 5).
    pub(super) fn ecn(self, packet: &[u8]) -> u8 {
        let octet =
            if self.v6 { be16(packet, 0).unwrap_or_default() >> 4 } else { be16(packet, 0).unwrap_or_default() };
        (octet & 3) as u8
    }

    /// Has the header say that the packet met congestion.
    pub(super) fn mark(self, header: &mut [u8]) -> Option<()> {
        let marked = be16(header, 0)? | if self.v6 { u16::from(CE) << 4 } else { u16::from(CE) };
        put(header, 0, marked.to_be_bytes())?;
        if self.v6 { Some(()) } else { finish_ipv4(header, self.length) }
    }

    /// Has the header say that the packet is `whole` bytes long.
    pub(super) fn write_length(self, packet: &mut [u8], whole: usize) -> Option<()> {
        let at = if self.v6 { 4 } else { 2 };
        let said = if self.v6 { whole.checked_sub(40)? } else { whole };
        put(packet, at, u16::try_from(said).ok()?.to_be_bytes())
    }
}
