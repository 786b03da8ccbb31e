//! The sockets that clients reach: UDP and TCP on each DNS address.

pub(crate) mod tcp;
pub(crate) mod udp;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// Between attempts to open a socket.
const RETRY: Duration = Duration::from_millis(500);

/// What the servers of one term have in common.
#[derive(Clone, Debug, Default)]
pub(crate) struct Term {
    /// No more queries are read once it is cancelled.
    pub(crate) over: CancellationToken,
    /// Queries under way; they are finished after the end.
    pub(crate) under_way: TaskTracker,
}

/// Every socket that is open. They outlive a term, so that the next one, or another process, reads from the same queues.
#[derive(Debug, Default)]
pub(crate) struct Sockets(Mutex<BTreeMap<(SocketAddr, bool), Socket>>);

impl Sockets {
    /// Takes those of another process that are for one of `own`; the rest are closed.
    pub(crate) fn adopt(&self, handed: Vec<Socket>, own: &[SocketAddr]) {
        for socket in handed {
            let address = socket.local_addr().ok().and_then(|address| address.as_socket());
            let stream = socket.r#type().is_ok_and(|kind| kind == Type::STREAM);
            match address.filter(|address| own.contains(address)) {
                Some(address) => drop(self.open().insert((address, stream), socket)),
                None => {
                    tracing::info!(?address, "a socket that was handed over is for no address of this configuration")
                }
            }
        }
    }

    /// All of them, to be handed over.
    pub(crate) fn all(&self) -> io::Result<Vec<Socket>> {
        self.open().values().map(Socket::try_clone).collect()
    }

    fn open(&self) -> std::sync::MutexGuard<'_, BTreeMap<(SocketAddr, bool), Socket>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The socket bound to `address`: the one that is open, or a new one.
    fn bound(&self, address: SocketAddr, kind: Type) -> io::Result<Socket> {
        let key = (address, kind == Type::STREAM);
        if let Some(open) = self.open().get(&key) {
            return open.try_clone();
        }
        let socket = bound(address, kind)?;
        let clone = socket.try_clone()?;
        self.open().insert(key, socket);
        Ok(clone)
    }
}

/// A socket bound to `address`, also if the address is not on any device yet (the agent adds it), and beside one of a process
/// that could not be asked for its own.
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

/// Opens a socket, trying until it works; none at the end of the term.
async fn opened<T>(
    what: &str,
    address: SocketAddr,
    over: &CancellationToken,
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
            () = over.cancelled() => return None,
        }
    }
}
