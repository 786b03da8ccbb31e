//! Raw sockets for what is said about addresses on a network: ARP (RFC 826) and IPv6 neighbour discovery (RFC 4861), frame by frame.
//!
//! A socket sees what comes in at one device of the calling thread's network namespace, and nothing but its kind of frame: the kernel
//! filters before it copies, and packets of pods never wake anybody. It needs the capability NET_RAW.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, LinkAddr, MsgFlags, SockFlag, SockType, recvfrom, send, socket};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::Error;

/// What a socket hears.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listen {
    /// ARP.
    Arp,
    /// Neighbour solicitations and advertisements.
    NeighbourDiscovery,
}

/// `linux/if_ether.h`.
const ETH_P_ARP: u16 = 0x0806;
const ETH_P_IPV6: u16 = 0x86dd;
/// `linux/if_packet.h`: to this host, broadcast, multicast. Others are not for us: to another host (promiscuous devices, other VLANs), or
/// our own.
const FOR_US: [u8; 3] = [0, 1, 2];

impl Listen {
    fn protocol(self) -> u16 {
        match self {
            Self::Arp => ETH_P_ARP,
            Self::NeighbourDiscovery => ETH_P_IPV6,
        }
    }
}

const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const JUMP_EQUAL: u32 = libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K;
const RETURN: u32 = libc::BPF_RET | libc::BPF_K;

/// Classic BPF over a frame with its Ethernet header: next header ICMPv6 (58), type 135 or 136. Both must come without extension headers
/// to be believed at all: their hop limit is read at its fixed place.
const NEIGHBOUR_DISCOVERY: [libc::sock_filter; 7] = [
    instruction(LOAD_BYTE, 0, 0, 14 + 6),
    instruction(JUMP_EQUAL, 0, 4, 58),
    instruction(LOAD_BYTE, 0, 0, 14 + 40),
    instruction(JUMP_EQUAL, 1, 0, 135),
    instruction(JUMP_EQUAL, 0, 1, 136),
    instruction(RETURN, 0, 0, u32::MAX),
    instruction(RETURN, 0, 0, 0),
];

/// A socket on one device.
#[derive(Debug)]
pub struct PacketSocket {
    socket: OwnedFd,
    device: u32,
}

impl PacketSocket {
    /// Opens one, non-blocking, on a device by its index.
    ///
    /// # Errors
    /// The capability NET_RAW is missing, or there is no such device (any more).
    pub fn open(device: u32, listen: Listen) -> Result<Self, Error> {
        let what = |step: &str| format!("{step} a packet socket ({listen:?}) on device {device}");
        // Protocol 0: it hears nothing before filter and device are set.
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)
            .map_err(|error| Error::system(format!("{} (capability NET_RAW)", what("open")), error))?;
        if listen == Listen::NeighbourDiscovery {
            filter(&socket, &NEIGHBOUR_DISCOVERY)
                .map_err(|error| Error::system(what("filter what comes to"), error))?;
        }
        bind(&socket, device, listen.protocol()).map_err(|error| Error::system(what("bind"), error))?;
        Ok(Self { socket, device })
    }

    /// Lets tasks wait for what comes in. Call it in a tokio runtime.
    ///
    /// # Errors
    /// The runtime cannot watch another descriptor.
    pub fn watched(self) -> Result<AsyncFd<Self>, Error> {
        let device = self.device;
        // SAFETY: the descriptor is owned by `self`, which the AsyncFd owns: it is open until then, always the same, and closed by
        // nobody else.
        let watched = unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) };
        watched
            .map_err(|error| Error::system(format!("watch a packet socket on device {device}"), error.into_parts().1))
    }

    /// The next frame that came in for this host; none when there is none now.
    ///
    /// # Errors
    /// The device is gone or down.
    pub fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
        loop {
            match recvfrom::<LinkAddr>(self.socket.as_raw_fd(), buffer) {
                Ok((length, from)) if from.is_some_and(|from| FOR_US.contains(&from.pkttype())) => {
                    return Ok(Some(length));
                }
                Ok(_) | Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => return Ok(None),
                Err(error) => return Err(Error::system(format!("receive on device {}", self.device), error)),
            }
        }
    }

    /// Sends a frame, Ethernet header and all, out of the device.
    ///
    /// # Errors
    /// The device is gone, down, or its queue is full.
    pub fn send(&self, frame: &[u8]) -> Result<(), Error> {
        send(self.socket.as_raw_fd(), frame, MsgFlags::MSG_DONTWAIT)
            .map(drop)
            .map_err(|error| Error::system(format!("send on device {}", self.device), error))
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.socket.as_raw_fd()
    }
}

fn filter(socket: &OwnedFd, program: &[libc::sock_filter]) -> std::io::Result<()> {
    let program =
        libc::sock_fprog { len: u16::try_from(program.len()).unwrap_or_default(), filter: program.as_ptr().cast_mut() };
    // SAFETY: the descriptor is open; the kernel reads one sock_fprog, whose size is given, and `len` instructions behind its pointer,
    // which borrow from `program` until the call is over. It writes to neither.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

fn bind(socket: &OwnedFd, device: u32, protocol: u16) -> std::io::Result<()> {
    let index = i32::try_from(device).map_err(|_| std::io::Error::from_raw_os_error(libc::ENODEV))?;
    let address = libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: protocol.to_be(),
        sll_ifindex: index,
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 0,
        sll_addr: [0; 8],
    };
    // SAFETY: the descriptor is open; the kernel reads one sockaddr_ll, whose size is given, during the call.
    let result = unsafe {
        libc::bind(socket.as_raw_fd(), (&raw const address).cast(), size_of::<libc::sockaddr_ll>() as libc::socklen_t)
    };
    if result < 0 { Err(std::io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{alone, root};

    #[test]
    fn a_filter_lets_only_neighbour_discovery_through_and_the_loopback_of_a_namespace_shows_it() {
        alone(|| {
            let up = std::process::Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            let (hears, says) = (
                PacketSocket::open(1, Listen::NeighbourDiscovery).unwrap(),
                PacketSocket::open(1, Listen::Arp).unwrap(),
            );
            let frame = |kind: u8| {
                let mut frame = vec![0_u8; 14 + 40 + 24];
                frame[12..14].copy_from_slice(&ETH_P_IPV6.to_be_bytes());
                (frame[14], frame[14 + 6], frame[14 + 40]) = (0x60, 58, kind);
                frame[14 + 5] = 24;
                frame
            };
            let mut buffer = [0_u8; 256];
            // Others of the kernel's own may come first: it says hello to its own network.
            let drain = |buffer: &mut [u8]| {
                let mut kinds = Vec::new();
                while let Some(length) = hears.receive(buffer).unwrap() {
                    kinds.push((length, buffer[14 + 40]));
                }
                kinds
            };
            says.send(&frame(128)).unwrap();
            says.send(&frame(135)).unwrap();
            says.send(&frame(136)).unwrap();
            let kinds = drain(&mut buffer);
            assert_eq!(kinds, [(78, 135), (78, 136)]);
        });
    }

    #[test]
    fn a_device_that_is_not_there_is_named() {
        if root() {
            let error = PacketSocket::open(0x7fff_fff0, Listen::Arp).unwrap_err();
            assert!(error.is_absent() && error.to_string().contains("2147483632"), "{error}");
        }
    }
}
