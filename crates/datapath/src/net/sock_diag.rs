//! Ending a socket of somebody else's through `NETLINK_SOCK_DIAG` (`SOCK_DESTROY`): its owner's next call fails with `ECONNABORTED`.
//!
//! Acts in the network namespace of the thread that opened it, on the one socket that has the cookie: what is not it, or is connected
//! elsewhere by now, is left alone. Needs `CONFIG_INET_DIAG_DESTROY`, which [`works_here`] finds out by ending a socket of its own.

use std::io;
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::os::fd::AsRawFd;

use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_SOCK_DIAG};

use super::error::Error;

/// `SOCK_DESTROY` (linux/sock_diag.h).
const DESTROY: u16 = 21;
/// `NLM_F_REQUEST | NLM_F_ACK`.
const FLAGS: u16 = 0x5;
const NLMSG_ERROR: u16 = 2;
/// `struct nlmsghdr` and `struct inet_diag_req_v2`, in bytes.
const HEADER: usize = 16;
const REQUEST: usize = 56;

/// A connected UDP socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connected {
    /// `SO_COOKIE`.
    pub cookie: u64,
    /// Whether it is an `AF_INET6` socket.
    pub v6: bool,
    /// Its own address and port.
    pub local: (IpAddr, u16),
    /// Whom it is connected to.
    pub remote: (IpAddr, u16),
    /// Device that it is bound to; 0: none.
    pub ifindex: u32,
}

/// An open socket of the kind.
#[derive(Debug)]
pub struct SockDiag {
    socket: Socket,
}

impl SockDiag {
    /// Opens one in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no such sockets.
    pub fn open() -> Result<Self, Error> {
        let failed = |source| Error::system("open a netlink socket for sockets (NETLINK_SOCK_DIAG)", source);
        let mut socket = Socket::new(NETLINK_SOCK_DIAG).map_err(failed)?;
        socket.bind_auto().map_err(failed)?;
        socket.connect(&SocketAddr::new(0, 0)).map_err(failed)?;
        Ok(Self { socket })
    }

    /// Ends a UDP socket.
    ///
    /// # Errors
    /// There is no such socket (any more), or the kernel cannot end any.
    pub fn end(&self, target: &Connected) -> Result<(), Error> {
        let operation = || format!("end the UDP socket {:?} connected to {:?}", target.local, target.remote);
        let failed = |source| Error::system(operation(), source);
        self.socket.send(&message(target), 0).map_err(failed)?;
        let (answer, _) = self.socket.recv_from_full().map_err(failed)?;
        let number = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map(i32::from_ne_bytes);
        let kind = answer.get(4..6).and_then(|bytes| bytes.try_into().ok()).map(u16::from_ne_bytes);
        match (kind, number(HEADER)) {
            (Some(NLMSG_ERROR), Some(0)) => Ok(()),
            (Some(NLMSG_ERROR), Some(error)) => Err(failed(io::Error::from_raw_os_error(error.saturating_neg()))),
            _ => Err(Error::Answer { operation: operation(), reason: "no acknowledgement".to_owned() }),
        }
    }
}

fn octets(address: IpAddr, v6: bool) -> [u8; 16] {
    match address {
        IpAddr::V6(address) => address.octets(),
        IpAddr::V4(address) if v6 => address.to_ipv6_mapped().octets(),
        IpAddr::V4(address) => {
            let [a, b, c, d] = address.octets();
            Ipv6Addr::from([a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).octets()
        }
    }
}

/// `struct inet_diag_req_v2` (linux/inet_diag.h) behind its header.
fn message(target: &Connected) -> Vec<u8> {
    let family = if target.v6 { libc::AF_INET6 } else { libc::AF_INET } as u8;
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes.extend(DESTROY.to_ne_bytes());
    bytes.extend(FLAGS.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([family, libc::IPPROTO_UDP as u8, 0, 0]);
    // In every state.
    bytes.extend(u32::MAX.to_ne_bytes());
    bytes.extend(target.local.1.to_be_bytes());
    bytes.extend(target.remote.1.to_be_bytes());
    bytes.extend(octets(target.local.0, target.v6));
    bytes.extend(octets(target.remote.0, target.v6));
    bytes.extend(target.ifindex.to_ne_bytes());
    bytes.extend((target.cookie as u32).to_ne_bytes());
    bytes.extend(((target.cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// Whether this kernel ends sockets so, found out on one of ours: on loopback, and no packet is sent.
///
/// # Errors
/// It does not, and why.
pub fn works_here() -> Result<(), Error> {
    let failed = |source| Error::system("make a UDP socket to try its end", source);
    let own = UdpSocket::bind("127.0.0.1:0").map_err(failed)?;
    // Connected to itself: whatever serves this node, there is nothing to translate.
    own.connect(own.local_addr().map_err(failed)?).map_err(failed)?;
    let (local, remote) = (own.local_addr().map_err(failed)?, own.peer_addr().map_err(failed)?);
    let end = |at: std::net::SocketAddr| (at.ip(), at.port());
    let cookie = cookie_of(&own)?;
    let target = Connected { cookie, v6: false, local: end(local), remote: end(remote), ifindex: 0 };
    SockDiag::open()?.end(&target)
}

/// A socket's `SO_COOKIE`.
fn cookie_of(socket: &UdpSocket) -> Result<u64, Error> {
    let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
    // SAFETY: the descriptor is open for the whole call, and the kernel writes at most `length` bytes to `cookie`, whose size it is.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(Error::system("read a socket's cookie", io::Error::last_os_error()));
    }
    Ok(cookie)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::root;

    #[test]
    fn the_socket_with_the_cookie_ends_and_no_other() {
        if !root() {
            return;
        }
        works_here().unwrap();
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let own = UdpSocket::bind("127.0.0.1:0").unwrap();
        own.connect(server.local_addr().unwrap()).unwrap();
        let end = |at: std::net::SocketAddr| (at.ip(), at.port());
        let cookie = cookie_of(&own).unwrap();
        let (local, remote) = (end(own.local_addr().unwrap()), end(server.local_addr().unwrap()));
        let target = Connected { cookie, v6: false, local, remote, ifindex: 0 };
        let diag = SockDiag::open().unwrap();
        diag.end(&Connected { cookie: cookie + 1, ..target }).unwrap_err();
        diag.end(&Connected { remote: (remote.0, remote.1 ^ 1), ..target }).unwrap_err();
        own.send(b"still there").unwrap();
        diag.end(&target).unwrap();
        // What was to be read, if anything, is gone with the connection; the first call says so.
        let error = own.recv(&mut [0; 8]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{error}");
        assert!(diag.end(&target).unwrap_err().is_absent());
    }
}
