//! Where the agent says between what packets are to be carried, and gives the ends; for root only.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use towpath_wire::udp::{UdpReply, UdpRequest, UdpWork};

use super::{Carrier, Ends};
use crate::descriptors;
use crate::feed::FeedError;
use crate::feed::frame::Frames;
use crate::own_socket;

/// Connections at a time: one agent, and its successor.
const MAX_CONNECTIONS: usize = 4;
/// How long an agent may take to give what it has said that it has.
const WITHIN: Duration = Duration::from_secs(5);

/// Serves until shutdown. What is carried goes on.
pub(crate) async fn serve(listener: UnixListener, carrier: Arc<Carrier>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(connection(stream, Arc::clone(&carrier)));
                }
                Ok(_) => tracing::warn!("udp socket: {MAX_CONNECTIONS} connections are open, one more was closed"),
                Err(error) => {
                    tracing::warn!(%error, "udp socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn connection(stream: UnixStream, carrier: Arc<Carrier>) {
    if !own_socket::is_trusted(&stream, "udp socket") {
        return;
    }
    if let Err(error) = talk(Frames::new(stream), &carrier).await {
        tracing::warn!(%error, "udp socket: connection ended; packets are carried as before");
    }
}

async fn talk(mut frames: Frames, carrier: &Carrier) -> Result<(), FeedError> {
    while let Some(request) = frames.read().await? {
        let reply = match request {
            UdpRequest::Nodes { nodes } => {
                carrier.know(nodes);
                UdpReply::Known
            }
            UdpRequest::Carry { work } => match carrier.carries(&work) {
                Some(counters) => UdpReply::Carrying { counters },
                None => take(&mut frames, carrier, work).await?,
            },
        };
        frames.write(&reply).await?;
    }
    Ok(())
}

async fn take(frames: &mut Frames, carrier: &Carrier, work: UdpWork) -> Result<UdpReply, FeedError> {
    frames.write(&UdpReply::Give).await?;
    let given = timeout(WITHIN, descriptors::receive(frames.stream())).await;
    let (cuts_udp, given) = given.map_err(|_| FeedError::TimedOut)?.map_err(FeedError::Io)?;
    let Some(ends) = Ends::of(given, cuts_udp == 1) else {
        return Ok(UdpReply::Refused {
            reason: "what was given are not as many queues, receivers and senders".to_owned(),
        });
    };
    Ok(match carrier.start(work.clone(), ends) {
        Ok(()) => UdpReply::Carrying { counters: carrier.carries(&work).unwrap_or_default() },
        Err(error) => UdpReply::Refused { reason: format!("threads could not be started: {error}") },
    })
}
