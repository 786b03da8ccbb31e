//! IPv4 packets that are made by hand.

use std::net::Ipv4Addr;

/// A packet with this transport header and payload, in which the checksum is at `checksum_at` and zero yet.
pub(crate) fn packet(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, transport: &[u8], checksum_at: usize) -> Vec<u8> {
    let length = (transport.len() as u16).to_be_bytes();
    let [high, low] = (20 + transport.len() as u16).to_be_bytes();
    let mut ip = vec![0x45, 0, high, low, 0, 0, 0x40, 0, 64, protocol, 0, 0];
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = checksum(&ip);
    put(&mut ip, 10, sum);
    let pseudo = [&from.octets()[..], &to.octets(), &[0, protocol], &length, transport].concat();
    let mut transport = transport.to_vec();
    put(&mut transport, checksum_at, checksum(&pseudo));
    [ip, transport].concat()
}

fn put(bytes: &mut [u8], at: usize, sum: [u8; 2]) {
    if let Some(field) = bytes.get_mut(at..at + 2) {
        field.copy_from_slice(&sum);
    }
}

/// The Internet checksum (RFC 1071) of an even number of bytes.
pub(crate) fn checksum(bytes: &[u8]) -> [u8; 2] {
    let pairs = bytes.as_chunks::<2>().0.iter();
    let mut sum: u32 = pairs.map(|pair| u32::from(u16::from_be_bytes(*pair))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}
