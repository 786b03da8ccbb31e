//! The sockets that clients reach: UDP and TCP on each DNS address.

pub(crate) mod tcp;
pub(crate) mod udp;

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

/// Between attempts to open a socket.
const RETRY: Duration = Duration::from_millis(500);

/// A socket bound to `address`, also if the address is not on any device yet (the agent adds it), and beside a
/// predecessor or successor of this process.
fn bound(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM { Protocol::UDP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(address), kind.nonblocking(), Some(protocol))?;
    if address.is_ipv4() {
        socket.set_freebind_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?;
    }
    socket.set_reuse_port(true)?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&address.into())?;
    Ok(socket)
}

/// Opens a socket, trying until it works; none at shutdown.
async fn opened<T>(
    what: &str,
    address: SocketAddr,
    shutdown: &CancellationToken,
    open: impl Fn() -> io::Result<T>,
) -> Option<T> {
    let mut told = false;
    loop {
        match open() {
            Ok(socket) => {
                tracing::info!(%address, "answering DNS over {what}");
                return Some(socket);
            }
            Err(error) if !told => {
                told = true;
                tracing::warn!(%address, %error, "cannot answer DNS over {what} yet: will try again");
            }
            Err(_) => {}
        }
        tokio::select! {
            () = sleep(RETRY) => {}
            () = shutdown.cancelled() => return None,
        }
    }
}
