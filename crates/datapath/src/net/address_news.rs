//! Addresses that come to this node and go while it runs (a virtual one that keepalived moves, one that a person adds), as the kernel
//! tells of them: `RTNLGRP_IPV4_IFADDR` and `RTNLGRP_IPV6_IFADDR`. What is told is that something changed, not what: whoever hears it
//! looks, so nothing is lost when the kernel has more to say than is read.

use std::io;

use rtnetlink::packet_route::RouteNetlinkMessage as Message;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::error::Error;
use super::{address, netlink, uplink};

/// Multicast groups (linux/rtnetlink.h).
const GROUPS: [u32; 2] = [5, 9];
/// A message about one address has less than 200 bytes.
const RECEIVE: usize = 16 * 1024;

/// A socket that hears of addresses; it belongs to the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Ear {
    socket: Socket,
}

impl Ear {
    /// Listens in the calling thread's network namespace, from now on.
    ///
    /// # Errors
    /// The kernel gives no such socket.
    pub fn open() -> Result<Self, Error> {
        let failed = |source| Error::system("listen for changes of addresses", source);
        let mut socket = Socket::new(NETLINK_ROUTE).map_err(failed)?;
        socket.bind(&SocketAddr::new(0, 0)).map_err(failed)?;
        for group in GROUPS {
            socket.add_membership(group).map_err(failed)?;
        }
        socket.set_non_blocking(true).map_err(failed)?;
        Ok(Self { socket })
    }

    /// The same for an async caller.
    ///
    /// # Errors
    /// There is no runtime that could wait for it.
    pub fn into_news(self) -> Result<AddressNews, Error> {
        let failed = |source: io::Error| Error::system("wait for changes of addresses", source);
        // SAFETY: a `Socket` owns its descriptor, says the same one as long as it lives, and closes it when it is dropped.
        let socket = unsafe { AsyncFd::register_with_interest(self.socket, Interest::READABLE) };
        Ok(AddressNews { socket: socket.map_err(|refused| failed(refused.into()))? })
    }
}

/// What an [`Ear`] hears.
#[derive(Debug)]
pub struct AddressNews {
    socket: AsyncFd<Socket>,
}

impl AddressNews {
    /// Waits until an address of somebody else's than ours, and not only for its link, has come or gone. Safe to be dropped and called
    /// again: what was read is told, what was not stays.
    ///
    /// # Errors
    /// The socket is broken.
    pub async fn next(&mut self) -> Result<(), Error> {
        loop {
            let failed = |source| Error::system("hear of changes of addresses", source);
            let mut ready = self.socket.readable().await.map_err(failed)?;
            let mut heard = false;
            loop {
                let mut bytes = Vec::with_capacity(RECEIVE);
                match ready.get_inner().recv(&mut bytes, 0) {
                    Ok(_) => heard |= netlink::contents(&bytes).iter().any(concerns_us),
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    // There was more than the socket holds: some of it is lost.
                    Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => heard = true,
                    Err(source) => return Err(failed(source)),
                }
            }
            ready.clear_ready();
            if heard {
                return Ok(());
            }
        }
    }
}

/// Whether a message may be of an address that NodePorts answer at: most are of the link-local ones of containers' devices.
fn concerns_us(message: &Message) -> bool {
    let (Message::NewAddress(about) | Message::DelAddress(about)) = message else { return false };
    address::read(about).is_some_and(|held| !held.ours && uplink::is_global(held.address))
}
