//! DNS over TCP (RFC 7766): many queries a connection, answered as they are ready; limits and time-outs so that no client
//! takes it from the others.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, SinkExt, StreamExt};
use socket2::Type;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{Id, JoinSet};
use tokio::time::{sleep, timeout};
use tokio_util::bytes::Bytes;
use tokio_util::codec::{Framed, LengthDelimitedCodec};
use tokio_util::sync::CancellationToken;

use super::{Sockets, Term, opened};
use crate::message::Transport;
use crate::responder::{Now, Responder};

/// Connections at a time, of all clients and of one.
const MAX_CONNECTIONS: usize = 512;
const MAX_PER_CLIENT: usize = 64;
/// Queries of one connection on their way at a time; more wait unread.
const MAX_PIPELINED: usize = 16;
/// How long a connection may be idle (or a query take to arrive), and a reply take to leave.
const IDLE: Duration = Duration::from_secs(10);
const WRITE: Duration = Duration::from_secs(5);
/// How long queries are still read after the end of the term: a client that had just connected is about to ask.
const LINGER: Duration = Duration::from_millis(500);

/// Answers on `address` until the term is over. Connections then end when what was asked on them is answered.
pub(crate) async fn serve(address: SocketAddr, sockets: Arc<Sockets>, responder: Arc<Responder>, term: Term) {
    let open = || {
        let socket = sockets.bound(address, Type::STREAM)?;
        socket.listen(256)?;
        TcpListener::from_std(socket.into())
    };
    let Some(listener) = opened("TCP", address, &term.over, open).await else { return };
    let mut connections = JoinSet::new();
    let mut clients = Clients::default();
    loop {
        tokio::select! {
            () = term.over.cancelled() => {
                connections.detach_all();
                return;
            }
            Some(ended) = connections.join_next_with_id(), if !connections.is_empty() => {
                clients.left(match ended {
                    Ok((id, ())) => id,
                    Err(error) => error.id(),
                });
            }
            accepted = listener.accept() => match accepted {
                Ok((_, client)) if connections.len() >= MAX_CONNECTIONS || clients.has_enough(client.ip()) => {
                    responder.count_overload();
                }
                Ok((stream, client)) => {
                    let connection = connection(stream, client.ip(), Arc::clone(&responder), term.over.clone());
                    let task = connections.spawn(term.under_way.track_future(connection));
                    clients.came(task.id(), client.ip());
                }
                Err(error) => {
                    tracing::warn!(%address, %error, "DNS over TCP: accept failed");
                    sleep(Duration::from_millis(50)).await;
                }
            },
        }
    }
}

/// Who has how many connections.
#[derive(Default)]
struct Clients {
    of_task: HashMap<Id, IpAddr>,
    counts: HashMap<IpAddr, usize>,
}

impl Clients {
    fn has_enough(&self, client: IpAddr) -> bool {
        self.counts.get(&client).is_some_and(|count| *count >= MAX_PER_CLIENT)
    }

    fn came(&mut self, task: Id, client: IpAddr) {
        self.of_task.insert(task, client);
        *self.counts.entry(client).or_default() += 1;
    }

    fn left(&mut self, task: Id) {
        let Some(client) = self.of_task.remove(&task) else { return };
        if let Some(count) = self.counts.get_mut(&client) {
            *count -= 1;
            if *count == 0 {
                self.counts.remove(&client);
            }
        }
    }
}

async fn connection(stream: TcpStream, client: IpAddr, responder: Arc<Responder>, over: CancellationToken) {
    let codec =
        LengthDelimitedCodec::builder().length_field_length(2).max_frame_length(usize::from(u16::MAX)).new_codec();
    let mut frames = Framed::new(stream, codec);
    let mut waiting: FuturesUnordered<BoxFuture<'_, Vec<u8>>> = FuturesUnordered::new();
    let mut open = true;
    let last_queries = async {
        over.cancelled().await;
        sleep(LINGER).await;
    };
    tokio::pin!(last_queries);
    while open || !waiting.is_empty() {
        let reply = tokio::select! {
            Some(reply) = waiting.next(), if !waiting.is_empty() => reply,
            () = &mut last_queries, if open => {
                open = false;
                continue;
            }
            frame = timeout(IDLE, frames.next()), if open && waiting.len() < MAX_PIPELINED => match frame {
                Ok(Some(Ok(query))) => match responder.now(&query, Transport::Tcp) {
                    Now::Reply(reply) => reply,
                    Now::Later(pending) => {
                        waiting.push(responder.later(pending, client).boxed());
                        continue;
                    }
                    Now::Silence => continue,
                },
                // Idle, ended or broken: what is on its way is still answered.
                _ => {
                    open = false;
                    continue;
                }
            },
        };
        if reply.is_empty() {
            continue;
        }
        if !matches!(timeout(WRITE, frames.send(Bytes::from(reply))).await, Ok(Ok(()))) {
            return;
        }
    }
}
