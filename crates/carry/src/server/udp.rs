//! DNS over UDP: a batch of datagrams at a time, answered in place where nobody else must be asked.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use socket2::Type;
use tokio::net::UdpSocket;
use tokio::time::sleep;
use tokio_util::task::TaskTracker;

use super::{Sockets, Term, opened};
use crate::message::Transport;
use crate::responder::{Now, Responder};
use crate::shares::Shares;

/// Datagrams answered before other tasks get their turn.
const BATCH: usize = 64;
/// Longer queries are malformed: a question has at most 255 bytes of name, and options of a query are few.
const LONGEST_QUERY: usize = 4096;
/// Questions that wait for upstream servers at a time.
const MAX_WAITING: usize = 2048;
/// One client alone comes to a quarter of them.
const CLIENTS_PART: usize = 3;
/// Room for bursts in the kernel.
const RECEIVE_BUFFER: usize = 1 << 20;

/// Answers on `address` until the term is over.
pub(crate) async fn serve(address: SocketAddr, sockets: Arc<Sockets>, responder: Arc<Responder>, term: Term) {
    let open = || {
        let socket = sockets.bound(address, Type::DGRAM)?;
        // The kernel's limit may be lower: then that is what it is.
        let _ = socket.set_recv_buffer_size(RECEIVE_BUFFER);
        UdpSocket::from_std(socket.into())
    };
    let Some(socket) = opened("UDP", address, &term.over, open).await else { return };
    let socket = Arc::new(socket);
    // Of this socket alone: many at one address cost the others nothing.
    let waiting = Shares::new(MAX_WAITING, CLIENTS_PART);
    loop {
        tokio::select! {
            () = term.over.cancelled() => return,
            ready = socket.readable() => match ready {
                Ok(()) => batch(&socket, &responder, &waiting, &term.under_way).await,
                Err(error) => {
                    tracing::warn!(%address, %error, "DNS over UDP: cannot wait for queries");
                    sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn batch(socket: &Arc<UdpSocket>, responder: &Arc<Responder>, waiting: &Shares<IpAddr>, under_way: &TaskTracker) {
    let mut buffer = [0u8; LONGEST_QUERY];
    for _ in 0..BATCH {
        let (length, client) = match socket.try_recv_from(&mut buffer) {
            Ok(received) => received,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => return,
            // An earlier reply that was refused, and the like: about one client, not about this socket.
            Err(_) => continue,
        };
        match responder.now(buffer.get(..length).unwrap_or_default(), Transport::Udp) {
            Now::Silence => {}
            Now::Reply(reply) => send(socket, &reply, client).await,
            Now::Later(pending) => {
                let Some(place) = waiting.take(&client.ip()) else {
                    send(socket, &responder.over_share(&pending), client).await;
                    continue;
                };
                let (socket, responder) = (Arc::clone(socket), Arc::clone(responder));
                under_way.spawn(async move {
                    let reply = responder.later(pending, client.ip()).await;
                    send(&socket, &reply, client).await;
                    drop(place);
                });
            }
        }
    }
}

async fn send(socket: &UdpSocket, reply: &[u8], client: SocketAddr) {
    if reply.is_empty() {
        return;
    }
    // The client asks again if this is lost.
    if let Err(error) = socket.send_to(reply, client).await {
        tracing::debug!(%client, %error, "DNS reply not sent");
    }
}
