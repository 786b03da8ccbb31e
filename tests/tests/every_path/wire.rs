//! Packets of the matrix, made and read byte by byte: every piece of one says which case it is of.

use std::net::{IpAddr, SocketAddr};

/// IP protocol numbers.
pub(crate) const ICMP: u8 = 1;
pub(crate) const TCP: u8 = 6;
pub(crate) const UDP: u8 = 17;
pub(crate) const ICMP6: u8 = 58;
pub(crate) const SCTP: u8 = 132;
/// A socket that sends whole packets, headers and all (`IPPROTO_RAW`).
pub(crate) const PACKETS: u8 = 255;

/// Before each case's number.
const MARK: [u8; 4] = [0xe7, 0x54, 0x50, 0x7e];
/// A small one, and one that no link here takes in one piece.
pub(crate) const SMALL: usize = 32;
pub(crate) const LARGE: usize = 3200;
/// So far into a frame the first mark is at the latest: Ethernet, IPv6, extension headers, SCTP with its INIT.
const MARKED_BY: usize = 160;
/// What the forged complaint says that the path takes. IPv6 allows no less than 1280.
pub(crate) const PATH_MTU: u16 = 1300;

/// `size` bytes that name the case every eight bytes, as fragments begin at multiples of eight. `size` is one, too.
pub(crate) fn payload(case: u32, size: usize) -> Vec<u8> {
    [MARK, case.to_be_bytes()].concat().repeat(size / 8)
}

/// The case that bytes name.
pub(crate) fn case_of(bytes: &[u8]) -> Option<u32> {
    let searched = bytes.get(..bytes.len().min(MARKED_BY)).unwrap_or_default();
    let at = searched.windows(4).position(|four| four == MARK)?;
    Some(u32::from_be_bytes(bytes.get(at + 4..at + 8)?.try_into().ok()?))
}

/// Where a frame came from, and what says whose it is.
pub(crate) struct Frame {
    pub(crate) from: IpAddr,
    /// Source port, of TCP and SCTP that are no later fragments.
    pub(crate) port: Option<u16>,
    /// The case that is named in it.
    pub(crate) case: Option<u32>,
}

/// Reads a frame with its Ethernet header. None: neither IPv4 nor IPv6.
pub(crate) fn read(frame: &[u8]) -> Option<Frame> {
    let packet = frame.get(14..)?;
    let (from, protocol, rest): (IpAddr, u8, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let from: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
            let later = u16::from_be_bytes([*packet.get(6)?, *packet.get(7)?]) & 0x1fff != 0;
            let header = usize::from(packet.first()? & 0xf) * 4;
            (from.into(), if later { 0 } else { *packet.get(9)? }, packet.get(header..)?)
        }
        [0x86, 0xdd] => {
            let from: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
            (from.into(), *packet.get(6)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let port = matches!(protocol, TCP | SCTP).then(|| rest.first_chunk().map(|bytes| u16::from_be_bytes(*bytes)));
    Some(Frame { from, port: port.flatten(), case: case_of(packet) })
}

/// The sum of the Internet's checksum (RFC 1071).
fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes = parts.concat();
    let (pairs, odd) = bytes.as_chunks::<2>();
    let mut sum: u64 = pairs.iter().map(|pair| u64::from(u16::from_be_bytes(*pair))).sum();
    sum += odd.first().map_or(0, |last| u64::from(*last) << 8);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An echo request (RFC 792, RFC 4443); the kernel does the sum of ICMPv6.
pub(crate) fn echo_request(v4: bool, case: u32, size: usize) -> Vec<u8> {
    let [_, _, hi, lo] = case.to_be_bytes();
    let mut bytes = [[if v4 { 8 } else { 128 }, 0, 0, 0, 0x74, 0x70, hi, lo].as_slice(), &payload(case, size)].concat();
    if v4 {
        let sum = checksum(&[&bytes]);
        bytes.splice(2..4, sum);
    }
    bytes
}

/// The case whose echo request is answered by what an ICMP socket got, which for IPv4 has its network header before it.
pub(crate) fn echo_reply(v4: bool, bytes: &[u8]) -> Option<u32> {
    let message = if v4 { bytes.get(usize::from(bytes.first()? & 0xf) * 4..)? } else { bytes };
    let replies = *message.first()? == if v4 { 0 } else { 129 };
    if replies { case_of(message) } else { None }
}

/// What an endpoint may complain of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Complaint {
    /// RFC 1191, RFC 8201.
    TooBig,
    PortUnreachable,
}

/// An ICMP error of the server's about a UDP datagram that the client sent, or did not send: it quotes one that names the case.
pub(crate) fn complaint(what: Complaint, client: SocketAddr, server: SocketAddr, case: u32) -> Option<Vec<u8>> {
    let quoted = udp(client, server, case, &[]).ok()?;
    let [m0, m1] = if what == Complaint::TooBig { PATH_MTU.to_be_bytes() } else { [0; 2] };
    let v4 = client.is_ipv4();
    let [kind, code] = match (what, v4) {
        (Complaint::TooBig, true) => [3, 4],
        (Complaint::PortUnreachable, true) => [3, 3],
        (Complaint::TooBig, false) => [2, 0],
        (Complaint::PortUnreachable, false) => [1, 4],
    };
    let mut bytes = [[kind, code, 0, 0, 0, 0, m0, m1].as_slice(), &quoted].concat();
    if v4 {
        // The kernel does the sum of ICMPv6.
        let sum = checksum(&[&bytes]);
        bytes.splice(2..4, sum);
    }
    Some(bytes)
}

/// Four bytes of IPv4 options that say nothing (RFC 791 3.1), and eight of an IPv6 header with destination options that do not, either (RFC 8200 4.6).
const NO_OPERATION: [u8; 4] = [1; 4];
const PADDING: [u8; 8] = [UDP, 0, 1, 4, 0, 0, 0, 0];
const DESTINATION_OPTIONS: u8 = 60;

/// A whole packet with a small UDP datagram, and something odd in its network header.
pub(crate) fn with_options(from: SocketAddr, to: SocketAddr, case: u32) -> Option<Vec<u8>> {
    udp(from, to, case, if from.is_ipv4() { &NO_OPERATION } else { &PADDING }).ok()
}

fn udp(from: SocketAddr, to: SocketAddr, case: u32, odd: &[u8]) -> Result<Vec<u8>, std::num::TryFromIntError> {
    let length = u16::try_from(8 + SMALL)?.to_be_bytes();
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    let data = payload(case, SMALL);
    let (addresses, v4) = match (from.ip(), to.ip()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => ([from.octets(), to.octets()].concat(), true),
        (from, to) => ([mapped(from), mapped(to)].concat(), false),
    };
    let sum = checksum(&[&addresses, &[0, UDP], &length, &ports, &length, &[0; 2], &data]);
    // 0 would say that there is none.
    let sum = if sum == [0; 2] { [0xff; 2] } else { sum };
    let datagram = [ports.as_slice(), &length, &sum, &data].concat();
    let rest = u16::try_from(odd.len() + datagram.len())?;
    if v4 {
        let version = 0x45 + u8::try_from(odd.len() / 4)?;
        let [t0, t1] = (20 + rest).to_be_bytes();
        let start = [version, 0, t0, t1, 0x74, 0x70, 0x40, 0, 60, UDP];
        let sum = checksum(&[&start, &[0; 2], &addresses, odd]);
        return Ok([start.as_slice(), &sum, &addresses, odd, &datagram].concat());
    }
    let [l0, l1] = rest.to_be_bytes();
    let next = if odd.is_empty() { UDP } else { DESTINATION_OPTIONS };
    Ok([[0x60, 0, 0, 0, l0, l1, next, 60].as_slice(), &addresses, odd, &datagram].concat())
}

fn mapped(ip: IpAddr) -> [u8; 16] {
    match ip {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// What an SCTP packet says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Chunk {
    Init = 1,
    InitAck = 2,
}

/// One that came.
pub(crate) struct Association {
    pub(crate) chunk: Chunk,
    pub(crate) from: u16,
    pub(crate) to: u16,
    pub(crate) case: u32,
}

/// An SCTP packet with INIT or INIT ACK (RFC 9260 3.3.2), whose tag is the case's and which ends in a padding parameter (RFC 4820) of `size` bytes.
pub(crate) fn sctp(chunk: Chunk, from: u16, to: u16, case: u32, size: usize) -> Vec<u8> {
    let parameter = u16::try_from(4 + size).unwrap_or(u16::MAX).to_be_bytes();
    let length = u16::try_from(24 + size).unwrap_or(u16::MAX).to_be_bytes();
    let tag = if chunk == Chunk::Init { 0 } else { case | 1 << 31 };
    let mut bytes = [
        &from.to_be_bytes(),
        &to.to_be_bytes(),
        tag.to_be_bytes().as_slice(),
        &[0; 4],
        &[chunk as u8, 0],
        &length,
        &(case | 1 << 31).to_be_bytes(),
        &[0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 1],
        &[0x80, 0x05],
        &parameter,
        &payload(case, size),
    ]
    .concat();
    let sum = crc32c(&bytes).to_le_bytes();
    bytes.splice(8..12, sum);
    bytes
}

/// Reads what an SCTP socket got, which for IPv4 has its network header before it. None: it is not of this matrix, or its checksum is wrong.
pub(crate) fn association(v4: bool, bytes: &[u8]) -> Option<Association> {
    let packet = if v4 { bytes.get(usize::from(bytes.first()? & 0xf) * 4..)? } else { bytes };
    let chunk = match packet.get(12)? {
        1 => Chunk::Init,
        2 => Chunk::InitAck,
        _ => return None,
    };
    let word = |at: usize| Some(u16::from_be_bytes([*packet.get(at)?, *packet.get(at + 1)?]));
    let (from, to, case) = (word(0)?, word(2)?, case_of(packet)?);
    let whole = sctp(chunk, from, to, case, packet.len().checked_sub(36)?) == packet;
    whole.then_some(Association { chunk, from, to, case })
}

fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}
