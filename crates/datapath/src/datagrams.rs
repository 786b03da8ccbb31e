//! UDP sockets that give and take many datagrams in one call: several to several ends (`sendmmsg`, `recvmmsg`), and several of one length
//! between the same ends as one (`UDP_SEGMENT`, `UDP_GRO`).
//!
//! Unsafe: the calls, and reading what the kernel wrote. What the kernel says of lengths is held against the buffers.

use std::io::{self, IoSlice};
use std::mem::{size_of, zeroed};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, SockFlag, SockProtocol, SockType, SockaddrLike, SockaddrStorage, bind, setsockopt, socket, sockopt,
};

use crate::net::Error;

/// Bytes that wait in a socket at most, as the kernel counts them.
const WAITING: usize = 8 << 20;
/// `IP_PMTUDISC_OMIT` of linux/in.h, `IPV6_PMTUDISC_OMIT` of linux/in6.h: nobody's word about the path is believed, and what does not fit the device is
/// cut into fragments.
const PMTUDISC_OMIT: libc::c_int = 5;
/// `UDP_GRO` of linux/udp.h.
const UDP_GRO: libc::c_int = 104;
/// `UDP_SEGMENT` of linux/udp.h.
const UDP_SEGMENT: libc::c_int = 103;
/// The largest that a read gives: datagrams of one length that came together.
const BUFFER: usize = 0x1_0000;
/// Room for the two control messages that are asked for or given (each a number of 4 bytes at most).
const CONTROL: usize = 64;
/// The bits of the TOS octet, and of the traffic class, that are marks of congestion (RFC 3168 5).
const ECN: u8 = 3;

/// What sockets of a family call the same thing: asks for, gives and brings marks of congestion, and says what becomes of the path's MTU.
struct Names {
    level: libc::c_int,
    told: libc::c_int,
    mark: libc::c_int,
    discover: libc::c_int,
}

fn names(address: IpAddr) -> Names {
    match address {
        IpAddr::V4(_) => Names {
            level: libc::IPPROTO_IP,
            told: libc::IP_RECVTOS,
            mark: libc::IP_TOS,
            discover: libc::IP_MTU_DISCOVER,
        },
        IpAddr::V6(_) => Names {
            level: libc::IPPROTO_IPV6,
            told: libc::IPV6_RECVTCLASS,
            mark: libc::IPV6_TCLASS,
            discover: libc::IPV6_MTU_DISCOVER,
        },
    }
}

/// A socket that takes datagrams at an address, beside others of the same user that do: the kernel gives each one a share of the flows.
///
/// # Errors
/// The port is taken by a socket that does not share it, or the address is not here.
pub fn receiver(at: SocketAddr) -> Result<OwnedFd, Error> {
    let said = |what: &str| format!("{what} for UDP at {at}");
    let (socket, names) = (open(at.ip()).map_err(|e| Error::system(said("open a socket"), e))?, names(at.ip()));
    setsockopt(&socket, sockopt::ReusePort, &true).map_err(|e| Error::system(said("share the socket's port"), e))?;
    enlarge(&socket);
    set(&socket, libc::SOL_UDP, UDP_GRO, 1).map_err(|e| Error::system(said("have datagrams come together"), e))?;
    set(&socket, names.level, names.told, 1).map_err(|e| Error::system(said("hear of congestion"), e))?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(at)).map_err(|e| match e {
        nix::Error::EADDRINUSE => Error::Refused(format!(
            "UDP port {} of {} is taken: find who has it with `ss -ulnp sport = :{}`, or set another spec.udp.port",
            at.port(),
            at.ip(),
            at.port()
        )),
        e => Error::system(said("bind a socket"), e),
    })?;
    Ok(socket)
}

/// A socket that sends datagrams from an address, and is given none.
///
/// # Errors
/// The address is not here.
pub fn sender(from: IpAddr) -> Result<OwnedFd, Error> {
    let said = |what: &str| format!("{what} for UDP from {from}");
    let (socket, names) = (open(from).map_err(|e| Error::system(said("open a socket"), e))?, names(from));
    enlarge(&socket);
    set(&socket, names.level, names.discover, PMTUDISC_OMIT)
        .map_err(|e| Error::system(said("let packets be fragmented"), e))?;
    bind(socket.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(from, 0)))
        .map_err(|e| Error::system(said("bind a socket"), e))?;
    Ok(socket)
}

/// Of the address' own family alone: one of IPv6 has to do with no IPv4 address.
fn open(address: IpAddr) -> nix::Result<OwnedFd> {
    let family = if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, SockProtocol::Udp)?;
    if address.is_ipv6() {
        setsockopt(&socket, sockopt::Ipv6V6Only, &true)?;
    }
    Ok(socket)
}

/// As much room as may be had: beyond the limit for all with the right to it, up to the limit without.
fn enlarge(socket: &OwnedFd) {
    for (forced, asked) in [(libc::SO_RCVBUFFORCE, libc::SO_RCVBUF), (libc::SO_SNDBUFFORCE, libc::SO_SNDBUF)] {
        let bytes = WAITING as libc::c_int;
        if set(socket, libc::SOL_SOCKET, forced, bytes)
            .or_else(|_| set(socket, libc::SOL_SOCKET, asked, bytes))
            .is_err()
        {
            tracing::warn!("a socket of the backend udp keeps the room that the kernel gives by default");
        }
    }
}

fn set(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let length = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: the socket is open, and `value` is an integer of the length that is given, which the call reads.
    match unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), length) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Datagrams to one end: all of `segment` bytes but the last, which may be shorter; at most 64, and 65,507 bytes of them.
#[derive(Debug)]
pub struct Train<'a> {
    /// Where to.
    pub to: SocketAddr,
    /// Bytes of each but the last.
    pub segment: u16,
    /// Their mark of congestion, 0 to 3 (RFC 3168 5).
    pub ecn: u8,
    /// Their bytes, in pieces.
    pub pieces: &'a [IoSlice<'a>],
}

/// Control messages.
#[repr(C, align(8))]
struct Control([u8; CONTROL]);

impl Control {
    /// Adds a message to those of `header`, whose buffer this is; `used`: bytes of those before.
    fn add<T>(
        &mut self,
        header: &mut libc::msghdr,
        used: &mut usize,
        (level, kind): (libc::c_int, libc::c_int),
        value: T,
    ) {
        let length = size_of::<T>() as u32;
        // SAFETY: the lengths are numbers; nothing is read or written.
        let (space, said) = unsafe { (libc::CMSG_SPACE(length) as usize, libc::CMSG_LEN(length)) };
        let Some(room) = self.0.get_mut(*used..*used + space) else { return };
        let message = room.as_mut_ptr().cast::<libc::cmsghdr>();
        // SAFETY: `room` is as long as a message with such a value, is aligned as one (the buffer is, and lengths of messages are multiples of that), and
        // nothing else refers to it.
        unsafe {
            (*message).cmsg_level = level;
            (*message).cmsg_type = kind;
            (*message).cmsg_len = said as _;
            libc::CMSG_DATA(message).cast::<T>().write_unaligned(value);
        }
        *used += space;
        header.msg_control = self.0.as_mut_ptr().cast();
        header.msg_controllen = *used as _;
    }
}

/// Sends trains, waiting while there is no room. How many went before one did not, which has the error.
///
/// # Errors
/// The first that did not go, with its place.
pub fn send(socket: BorrowedFd<'_>, trains: &[Train<'_>]) -> Result<(), (usize, io::Error)> {
    let ends: Vec<SockaddrStorage> = trains.iter().map(|train| SockaddrStorage::from(train.to)).collect();
    let mut controls: Vec<Control> = trains.iter().map(|_| Control([0; CONTROL])).collect();
    let mut messages: Vec<libc::mmsghdr> = Vec::with_capacity(trains.len());
    for ((train, end), control) in trains.iter().zip(&ends).zip(&mut controls) {
        // SAFETY: all zero is a value of this plain struct.
        let mut message: libc::mmsghdr = unsafe { zeroed() };
        let header = &mut message.msg_hdr;
        // The call only reads it.
        header.msg_name = end.as_ptr().cast_mut().cast();
        header.msg_namelen = end.len();
        // An IoSlice has the layout of an iovec, which the call only reads.
        header.msg_iov = train.pieces.as_ptr().cast_mut().cast();
        header.msg_iovlen = train.pieces.len() as _;
        let bytes: usize = train.pieces.iter().map(|piece| piece.len()).sum();
        let mut used = 0;
        if bytes > usize::from(train.segment) {
            control.add(header, &mut used, (libc::SOL_UDP, UDP_SEGMENT), train.segment);
        }
        if train.ecn != 0 {
            let names = names(train.to.ip());
            control.add(header, &mut used, (names.level, names.mark), libc::c_int::from(train.ecn & ECN));
        }
        messages.push(message);
    }
    let mut gone = 0;
    while let Some(rest) = messages.get_mut(gone..).filter(|rest| !rest.is_empty()) {
        let count = rest.len().min(libc::UIO_MAXIOV as usize) as libc::c_uint;
        // SAFETY: `rest` holds `count` messages, whose names, control messages and pieces live through the call.
        let sent = unsafe { libc::sendmmsg(socket.as_raw_fd(), rest.as_mut_ptr(), count, libc::MSG_NOSIGNAL) };
        match usize::try_from(sent) {
            Ok(sent) => gone += sent,
            Err(_) => match io::Error::last_os_error() {
                error if error.kind() == io::ErrorKind::Interrupted => {}
                error => return Err((gone, error)),
            },
        }
    }
    Ok(())
}

/// Whom the kernel names.
fn address_of(name: &libc::sockaddr_storage) -> IpAddr {
    let name: *const libc::sockaddr_storage = name;
    // SAFETY: the storage is as large and as aligned as any address, all of it was written (zero before the call), and any bytes are numbers.
    unsafe {
        match libc::c_int::from((*name).ss_family) {
            libc::AF_INET6 => {
                let address = (*name.cast::<libc::sockaddr_in6>()).sin6_addr.s6_addr;
                IpAddr::V6(Ipv6Addr::from(address))
            }
            _ => {
                let address = (*name.cast::<libc::sockaddr_in>()).sin_addr.s_addr;
                IpAddr::V4(Ipv4Addr::from(u32::from_be(address)))
            }
        }
    }
}

/// Room for what comes.
#[derive(Debug)]
pub struct Incoming {
    buffers: Vec<Box<[u8]>>,
    held: Vec<Held>,
}

/// Of the last read, what a buffer holds.
#[derive(Debug)]
struct Held {
    from: IpAddr,
    ecn: u8,
    /// Bytes of all.
    bytes: usize,
    /// Bytes of each datagram but the last.
    segment: usize,
}

/// One that came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Datagram<'a> {
    /// Who sent it.
    pub from: IpAddr,
    /// The mark of congestion with which it came, 0 to 3.
    pub ecn: u8,
    /// What it holds.
    pub bytes: &'a [u8],
}

impl Incoming {
    /// Room for so many reads of 64 KiB in one call.
    pub fn new(count: usize) -> Self {
        Self { buffers: (0..count).map(|_| vec![0; BUFFER].into_boxed_slice()).collect(), held: Vec::new() }
    }

    /// Takes what is there, without waiting.
    ///
    /// # Errors
    /// `WouldBlock`: nothing is.
    pub fn receive(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        self.held.clear();
        let count = self.buffers.len();
        // SAFETY: all zero is a value of these plain structs.
        let mut names: Vec<libc::sockaddr_storage> = vec![unsafe { zeroed() }; count];
        let mut controls: Vec<Control> = (0..count).map(|_| Control([0; CONTROL])).collect();
        let room = |buffer: &mut Box<[u8]>| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        let mut pieces: Vec<libc::iovec> = self.buffers.iter_mut().map(room).collect();
        let mut messages: Vec<libc::mmsghdr> = Vec::with_capacity(count);
        for ((name, control), piece) in names.iter_mut().zip(&mut controls).zip(&mut pieces) {
            // SAFETY: as above.
            let mut message: libc::mmsghdr = unsafe { zeroed() };
            message.msg_hdr.msg_name = (&raw mut *name).cast();
            message.msg_hdr.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
            message.msg_hdr.msg_iov = piece;
            message.msg_hdr.msg_iovlen = 1;
            message.msg_hdr.msg_control = control.0.as_mut_ptr().cast();
            message.msg_hdr.msg_controllen = CONTROL as _;
            messages.push(message);
        }
        // SAFETY: the messages, and the names, control messages and buffers that they point to, live through the call, each as long as it says.
        let read = unsafe {
            let (messages, count) = (messages.as_mut_ptr(), count as libc::c_uint);
            libc::recvmmsg(socket.as_raw_fd(), messages, count, libc::MSG_DONTWAIT, std::ptr::null_mut())
        };
        let read = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        for (message, name) in messages.iter().zip(&names).take(read) {
            let bytes = message.msg_len as usize;
            let whole = message.msg_hdr.msg_flags & libc::MSG_TRUNC == 0;
            let from = address_of(name);
            let (segment, ecn) = told_of(&message.msg_hdr);
            let segment = segment.filter(|segment| *segment > 0).unwrap_or(bytes);
            self.held.push(Held { from, ecn, bytes: if whole { bytes } else { 0 }, segment });
        }
        Ok(())
    }

    /// The datagrams of the last read, in order.
    pub fn datagrams(&self) -> impl Iterator<Item = Datagram<'_>> {
        self.held.iter().zip(&self.buffers).flat_map(|(held, buffer)| {
            let all = buffer.get(..held.bytes).unwrap_or_default();
            all.chunks(held.segment.max(1)).map(|bytes| Datagram { from: held.from, ecn: held.ecn, bytes })
        })
    }
}

/// The length of datagrams that came as one, and their mark of congestion: the kernel puts none together that have different ones.
fn told_of(header: &libc::msghdr) -> (Option<usize>, u8) {
    let (mut segment, mut ecn) = (None, 0);
    // SAFETY: the kernel wrote the header and the control messages that it points to, whose buffer is alive and aligned; a message is read
    // only when it is as long as what is read of it.
    unsafe {
        let mut next = libc::CMSG_FIRSTHDR(header);
        while let Some(message) = next.as_ref() {
            let holds = |bytes: usize| message.cmsg_len >= libc::CMSG_LEN(bytes as u32) as usize;
            match (message.cmsg_level, message.cmsg_type) {
                (libc::SOL_UDP, UDP_GRO) if holds(size_of::<libc::c_int>()) => {
                    segment = usize::try_from(libc::CMSG_DATA(next).cast::<libc::c_int>().read_unaligned()).ok();
                }
                (libc::IPPROTO_IP, libc::IP_TOS) if holds(1) => ecn = libc::CMSG_DATA(next).read() & ECN,
                (libc::IPPROTO_IPV6, libc::IPV6_TCLASS) if holds(size_of::<libc::c_int>()) => {
                    ecn = libc::CMSG_DATA(next).cast::<libc::c_int>().read_unaligned() as u8 & ECN;
                }
                _ => {}
            }
            next = libc::CMSG_NXTHDR(header, next);
        }
    }
    (segment, ecn)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    const LOCAL: [IpAddr; 2] = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];

    /// A socket that takes datagrams here, and where.
    fn taker(here: IpAddr) -> (OwnedFd, SocketAddr) {
        let to = receiver(SocketAddr::new(here, 0)).unwrap();
        let at: SockaddrStorage = nix::sys::socket::getsockname(to.as_raw_fd()).unwrap();
        let port = at.as_sockaddr_in().map_or_else(|| at.as_sockaddr_in6().unwrap().port(), |v4| v4.port());
        (to, SocketAddr::new(here, port))
    }

    fn received(socket: &OwnedFd, here: IpAddr, bytes: usize) -> Vec<(u8, Vec<u8>)> {
        let (mut room, mut all) = (Incoming::new(4), Vec::<(u8, Vec<u8>)>::new());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while all.iter().map(|(_, bytes)| bytes.len()).sum::<usize>() < bytes {
            assert!(std::time::Instant::now() < deadline, "only {} datagrams came", all.len());
            match room.receive(socket.as_fd()) {
                Ok(()) => all.extend(room.datagrams().map(|datagram| {
                    assert_eq!(datagram.from, here);
                    (datagram.ecn, datagram.bytes.to_vec())
                })),
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::WouldBlock),
            }
        }
        all
    }

    #[test]
    fn what_goes_as_a_train_comes_as_single_datagrams_with_their_own_bytes_and_marks() {
        for here in LOCAL {
            let (to, at) = taker(here);
            let from = sender(here).unwrap();
            let (a, b, c) = (vec![1; 600], vec![2; 600], vec![3; 250]);
            let long = [IoSlice::new(&a[..8]), IoSlice::new(&a[8..]), IoSlice::new(&b), IoSlice::new(&c)];
            let short = [IoSlice::new(b"alone")];
            let trains = [
                Train { to: at, segment: 600, ecn: 2, pieces: &long },
                Train { to: at, segment: 5, ecn: 0, pieces: &short },
                Train { to: at, segment: 5, ecn: 3, pieces: &short },
            ];
            send(from.as_fd(), &trains).unwrap();
            let alone = b"alone".to_vec();
            assert_eq!(received(&to, here, 1460), [(2, a), (2, b), (2, c), (0, alone.clone()), (3, alone)]);
        }
    }

    #[test]
    fn a_train_that_cannot_go_is_named_and_what_stood_before_it_went() {
        for (here, most) in LOCAL.into_iter().zip([65_507, 65_527]) {
            let (to, at) = taker(here);
            let from = sender(here).unwrap();
            let (fine, long) = ([IoSlice::new(b"fine")], vec![0; most + 1]);
            let long = [IoSlice::new(&long)];
            let trains = [
                Train { to: at, segment: 4, ecn: 0, pieces: &fine },
                Train { to: at, segment: u16::MAX, ecn: 0, pieces: &long },
            ];
            let (place, error) = send(from.as_fd(), &trains).unwrap_err();
            assert_eq!((place, error.raw_os_error()), (1, Some(libc::EMSGSIZE)));
            assert_eq!(received(&to, here, 4), [(0, b"fine".to_vec())]);
        }
    }

    #[test]
    fn a_socket_of_ipv6_takes_the_port_of_no_ipv4_address() {
        let (_six, at) = taker(IpAddr::V6(Ipv6Addr::UNSPECIFIED));
        let other = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, at.port()));
        assert!(other.is_ok(), "{other:?}");
    }
}
