//! Frames: built whole from what a test says, and read back with every checksum checked.

use std::net::{IpAddr, SocketAddr};

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const SCTP: u8 = 132;

pub const FIN: u8 = 1;
pub const SYN: u8 = 2;
pub const RST: u8 = 4;
pub const ACK: u8 = 16;

pub type Mac = [u8; 6];

/// What is above the network header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    Tcp {
        flags: u8,
        seq: u32,
        ack: u32,
        payload: Vec<u8>,
    },
    Udp {
        payload: Vec<u8>,
        checksum: bool,
    },
    /// ICMP or ICMPv6: type, code, the four bytes after the checksum, and what follows.
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
        payload: Vec<u8>,
    },
    /// A header with verification tag 0x01020304 and what follows it. Without a checksum: 0 in its place.
    Sctp {
        payload: Vec<u8>,
        checksum: bool,
    },
    Raw {
        proto: u8,
        bytes: Vec<u8>,
    },
}

#[derive(Clone, Debug)]
pub struct Frame {
    pub src_mac: Mac,
    pub dst_mac: Mac,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub ttl: u8,
    /// IPv4 fragment: identification, offset in bytes, more to come.
    pub fragment: Option<(u16, u16, bool)>,
    pub l4: L4,
}

pub fn sum(parts: &[&[u8]]) -> u16 {
    let all: Vec<u8> = parts.concat();
    let mut total: u32 = 0;
    for pair in all.chunks(2) {
        total += u32::from(u16::from_be_bytes([pair[0], *pair.get(1).unwrap_or(&0)]));
    }
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !(total as u16)
}

/// CRC32c (RFC 9260 appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32| if crc & 1 == 1 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0, |crc: u32, byte| (0..8).fold(crc ^ u32::from(*byte), |crc, _| step(crc)))
}

fn pseudo(src: IpAddr, dst: IpAddr, proto: u8, len: usize) -> Vec<u8> {
    let mut out = Vec::new();
    match (src, dst) {
        (IpAddr::V4(s), IpAddr::V4(d)) => {
            out.extend(s.octets());
            out.extend(d.octets());
            out.extend([0, proto]);
            out.extend((len as u16).to_be_bytes());
        }
        (IpAddr::V6(s), IpAddr::V6(d)) => {
            out.extend(s.octets());
            out.extend(d.octets());
            out.extend((len as u32).to_be_bytes());
            out.extend([0, 0, 0, proto]);
        }
        _ => panic!("two families in one packet"),
    }
    out
}

impl L4 {
    pub fn syn() -> L4 {
        L4::Tcp { flags: SYN, seq: 1000, ack: 0, payload: vec![] }
    }
    pub fn tcp(flags: u8) -> L4 {
        L4::Tcp { flags, seq: 5000, ack: 7000, payload: vec![] }
    }
    pub fn data(bytes: &[u8]) -> L4 {
        L4::Tcp { flags: ACK, seq: 5000, ack: 7000, payload: bytes.to_vec() }
    }
    pub fn udp(bytes: &[u8]) -> L4 {
        L4::Udp { payload: bytes.to_vec(), checksum: true }
    }
    pub fn echo(v4: bool, request: bool, id: u16) -> L4 {
        let kind = match (v4, request) {
            (true, true) => 8,
            (true, false) => 0,
            (false, true) => 128,
            (false, false) => 129,
        };
        let [a, b] = id.to_be_bytes();
        L4::Icmp { kind, code: 0, rest: [a, b, 0, 1], payload: b"ping".to_vec() }
    }

    fn proto(&self, v4: bool) -> u8 {
        match self {
            L4::Tcp { .. } => TCP,
            L4::Udp { .. } => UDP,
            L4::Sctp { .. } => SCTP,
            L4::Icmp { .. } => {
                if v4 {
                    1
                } else {
                    58
                }
            }
            L4::Raw { proto, .. } => *proto,
        }
    }

    fn bytes(&self, src: SocketAddr, dst: SocketAddr) -> Vec<u8> {
        let ports = [src.port().to_be_bytes(), dst.port().to_be_bytes()].concat();
        let v4 = src.is_ipv4();
        let mut out = match self {
            L4::Tcp { flags, seq, ack, payload } => {
                let mut out = ports;
                out.extend(seq.to_be_bytes());
                out.extend(ack.to_be_bytes());
                out.extend([5 << 4, *flags, 0xff, 0xff, 0, 0, 0, 0]);
                out.extend(payload);
                out
            }
            L4::Udp { payload, .. } => {
                let mut out = ports;
                out.extend((8 + payload.len() as u16).to_be_bytes());
                out.extend([0, 0]);
                out.extend(payload);
                out
            }
            L4::Sctp { payload, checksum } => {
                let mut out = [ports.as_slice(), &[1, 2, 3, 4, 0, 0, 0, 0], payload].concat();
                if *checksum {
                    let crc = crc32c(&out).to_le_bytes();
                    out[8..12].copy_from_slice(&crc);
                }
                return out;
            }
            L4::Icmp { kind, code, rest, payload } => [&[*kind, *code, 0, 0], rest.as_slice(), payload].concat(),
            L4::Raw { bytes, .. } => bytes.clone(),
        };
        let head = pseudo(src.ip(), dst.ip(), self.proto(v4), out.len());
        let (at, value) = match self {
            L4::Tcp { .. } => (16, sum(&[&head, &out])),
            L4::Udp { checksum: true, .. } => (6, sum(&[&head, &out])),
            L4::Icmp { .. } if v4 => (2, sum(&[&out])),
            L4::Icmp { .. } => (2, sum(&[&head, &out])),
            _ => return out,
        };
        out[at..at + 2].copy_from_slice(&value.to_be_bytes());
        out
    }
}

impl Frame {
    /// The network packet, without its link header.
    pub fn packet(&self) -> Vec<u8> {
        let l4 = self.l4.bytes(self.src, self.dst);
        let l4 = match self.fragment {
            Some((_, offset, _)) if offset > 0 => vec![0xab; 64],
            _ => l4,
        };
        let mut out = Vec::new();
        match (self.src.ip(), self.dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => {
                let (id, offset, more) = self.fragment.unwrap_or((1, 0, false));
                let frag = (offset / 8) | if more { 0x2000 } else { 0 };
                out.extend([0x45, 0]);
                out.extend((20 + l4.len() as u16).to_be_bytes());
                out.extend(id.to_be_bytes());
                out.extend(frag.to_be_bytes());
                out.extend([self.ttl, self.l4.proto(true), 0, 0]);
                out.extend(src.octets());
                out.extend(dst.octets());
                let check = sum(&[&out]).to_be_bytes();
                out[10..12].copy_from_slice(&check);
            }
            (IpAddr::V6(src), IpAddr::V6(dst)) => {
                let extra = if self.fragment.is_some() { 8 } else { 0 };
                let proto = self.l4.proto(false);
                out.extend([0x60, 0, 0, 0]);
                out.extend((l4.len() as u16 + extra).to_be_bytes());
                out.extend([if extra > 0 { 44 } else { proto }, self.ttl]);
                out.extend(src.octets());
                out.extend(dst.octets());
                if let Some((id, offset, more)) = self.fragment {
                    out.extend([proto, 0]);
                    out.extend((offset | u16::from(more)).to_be_bytes());
                    out.extend(u32::from(id).to_be_bytes());
                }
            }
            _ => panic!("two families in one packet"),
        }
        out.extend(l4);
        out
    }

    pub fn bytes(&self) -> Vec<u8> {
        let kind: u16 = if self.src.is_ipv4() { 0x0800 } else { 0x86dd };
        [self.dst_mac.as_slice(), &self.src_mac, &kind.to_be_bytes(), &self.packet()].concat()
    }
}

/// Reads a frame (no fragments, no options); panics when a checksum is wrong.
pub fn read(bytes: &[u8]) -> Frame {
    let (link, ip) = bytes.split_at(14);
    let v4 = link[12..14] == [8, 0];
    let (src, dst, ttl, proto, l4): (IpAddr, IpAddr, u8, u8, &[u8]) = if v4 {
        let total = usize::from(u16::from_be_bytes([ip[2], ip[3]]));
        assert_eq!(total, ip.len(), "total length");
        assert_eq!(sum(&[&ip[..20]]), 0, "header checksum");
        let at = |n: usize| IpAddr::from(<[u8; 4]>::try_from(&ip[n..n + 4]).unwrap());
        (at(12), at(16), ip[8], ip[9], &ip[20..])
    } else {
        assert_eq!(usize::from(u16::from_be_bytes([ip[4], ip[5]])), ip.len() - 40, "payload length");
        let at = |n: usize| IpAddr::from(<[u8; 16]>::try_from(&ip[n..n + 16]).unwrap());
        (at(8), at(24), ip[7], ip[6], &ip[40..])
    };
    let head = pseudo(src, dst, proto, l4.len());
    let port = |n: usize| u16::from_be_bytes([l4[n], l4[n + 1]]);
    let word = |n: usize| u32::from_be_bytes(l4[n..n + 4].try_into().unwrap());
    let (ports, parsed) = match proto {
        TCP => {
            assert_eq!(sum(&[&head, l4]), 0, "TCP checksum");
            let body = l4[usize::from(l4[12] >> 4) * 4..].to_vec();
            ((port(0), port(2)), L4::Tcp { flags: l4[13], seq: word(4), ack: word(8), payload: body })
        }
        UDP => {
            let checksum = port(6) != 0;
            assert!(!checksum || sum(&[&head, l4]) == 0, "UDP checksum");
            ((port(0), port(2)), L4::Udp { payload: l4[8..].to_vec(), checksum })
        }
        SCTP => {
            let said = u32::from_le_bytes(l4[8..12].try_into().unwrap());
            let zeroed = [&l4[..8], &[0; 4], &l4[12..]].concat();
            assert!(said == 0 || said == crc32c(&zeroed), "SCTP checksum");
            ((port(0), port(2)), L4::Sctp { payload: l4[12..].to_vec(), checksum: said != 0 })
        }
        1 | 58 => {
            assert_eq!(if v4 { sum(&[l4]) } else { sum(&[&head, l4]) }, 0, "ICMP checksum");
            let rest = l4[4..8].try_into().unwrap();
            ((0, 0), L4::Icmp { kind: l4[0], code: l4[1], rest, payload: l4[8..].to_vec() })
        }
        proto => ((0, 0), L4::Raw { proto, bytes: l4.to_vec() }),
    };
    Frame {
        dst_mac: link[..6].try_into().unwrap(),
        src_mac: link[6..12].try_into().unwrap(),
        src: SocketAddr::new(src, ports.0),
        dst: SocketAddr::new(dst, ports.1),
        ttl,
        fragment: None,
        l4: parsed,
    }
}
