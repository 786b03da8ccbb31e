//! One echo (RFC 792, RFC 4443 §4.1) as a whole packet of a given size that nobody may cut, and whether it is answered. It needs the capability NET_RAW.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrStorage, connect, recv, send, setsockopt,
    socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};
use rustix::net::sockopt::{Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover};

/// How long it waits for the answer.
const PATIENCE: Duration = Duration::from_millis(400);
const HEADER: usize = 8;
/// Type of the request and of its answer.
const ECHO_V4: (u8, u8) = (8, 0);
const ECHO_V6: (u8, u8) = (128, 129);

static NUMBER: AtomicU16 = AtomicU16::new(1);

/// Whether an echo in an IP packet of `size` bytes is answered by `to` in time. What is too large for the device, or is said to be so by a router, is not.
pub(super) fn is_answered(to: IpAddr, size: u32) -> io::Result<bool> {
    let (family, protocol, kinds, header) = match to {
        IpAddr::V4(_) => (AddressFamily::Inet, SockProtocol::Icmp, ECHO_V4, 20),
        IpAddr::V6(_) => (AddressFamily::Inet6, SockProtocol::IcmpV6, ECHO_V6, 40),
    };
    let socket = socket(family, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
    // In one piece, and whatever the kernel has heard of the path: that is what is to be found out.
    match to {
        IpAddr::V4(_) => set_ip_mtu_discover(socket.as_fd(), Ipv4PathMtuDiscovery::PROBE)?,
        IpAddr::V6(_) => set_ipv6_mtu_discover(socket.as_fd(), Ipv6PathMtuDiscovery::PROBE)?,
    }
    let patience = TimeVal::milliseconds(i64::try_from(PATIENCE.as_millis()).unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::ReceiveTimeout, &patience)?;
    // It then hears this node only.
    connect(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(to, 0)))?;
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let length = usize::try_from(size).unwrap_or(usize::MAX).saturating_sub(header).max(HEADER);
    let request = request(kinds.0, number, length);
    match send(socket.as_raw_fd(), &request, MsgFlags::empty()) {
        Err(nix::errno::Errno::EMSGSIZE) => return Ok(false),
        sent => sent?,
    };
    let deadline = Instant::now() + PATIENCE;
    let mut buffer = vec![0; length + 60];
    while Instant::now() < deadline {
        match recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()) {
            Ok(count) => {
                let received = buffer.get(..count).unwrap_or_default();
                let message = if to.is_ipv4() { behind_header(received) } else { received };
                if is_answer(message, kinds.1, number, length) {
                    return Ok(true);
                }
            }
            Err(nix::errno::Errno::EINTR) => {}
            // Too late, too large for a router, or the node is away: the next try says.
            Err(_) => return Ok(false),
        }
    }
    Ok(false)
}

/// The message, with a checksum (which the kernel writes itself over IPv6).
fn request(kind: u8, number: u16, length: usize) -> Vec<u8> {
    let [high, low] = number.to_be_bytes();
    let mut message = vec![kind, 0, 0, 0, 0x74, 0x70, high, low];
    message.resize(length, 0);
    let sum = message.chunks(2).fold(0_u32, |sum, pair| {
        let word = pair.iter().zip([8, 0]).map(|(byte, shift)| u32::from(*byte) << shift).sum::<u32>();
        sum + word
    });
    let folded = (sum & 0xffff) + (sum >> 16);
    let checksum = !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(u16::MAX);
    message.splice(2..4, checksum.to_be_bytes());
    message
}

/// A raw IPv4 socket gives the header, too.
fn behind_header(packet: &[u8]) -> &[u8] {
    let words = packet.first().map_or(0, |first| usize::from(first & 0x0f));
    packet.get(words * 4..).unwrap_or_default()
}

fn is_answer(message: &[u8], kind: u8, number: u16, length: usize) -> bool {
    let [high, low] = number.to_be_bytes();
    message.len() == length
        && message.first() == Some(&kind)
        && message.get(4..HEADER) == Some([0x74, 0x70, high, low].as_slice())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_known_by_its_number_and_length() {
        let asked = request(8, 0x0102, 64);
        assert_eq!(asked.len(), 64);
        let words = asked.chunks(2).map(|pair| u32::from(u16::from_be_bytes([pair[0], pair[1]]))).sum::<u32>();
        assert_eq!((words & 0xffff) + (words >> 16), 0xffff, "the checksum is right");
        let mut answer = asked.clone();
        answer[0] = 0;
        let packet = [&[0x46; 1], [0; 23].as_slice(), &answer].concat();
        assert!(is_answer(behind_header(&packet), 0, 0x0102, 64));
        assert!(!is_answer(behind_header(&packet), 0, 0x0103, 64), "another's");
        assert!(!is_answer(behind_header(&packet[..80]), 0, 0x0102, 64), "not all of it came back");
        assert!(!is_answer(&asked, 0, 0x0102, 64), "our own, heard on the loopback device");
        assert!(behind_header(&[]).is_empty() && behind_header(&[0x4f]).is_empty());
    }
}
