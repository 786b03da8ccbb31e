//! This process's end of the feed: applies what the agent says, for root only.

use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_wire::dns::{FeedMessage, FeedReply, FeedRequest};

use super::client::FeedError;
use super::frame::Frames;
use crate::cluster::Cluster;
use crate::own_socket;

/// Connections at a time: one agent, its successor during an upgrade, and a few that ask for counters.
const MAX_CONNECTIONS: usize = 16;

/// Serves until shutdown.
pub(crate) async fn serve(listener: UnixListener, cluster: Arc<Cluster>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(connection(stream, Arc::clone(&cluster)));
                }
                Ok(_) => tracing::warn!("feed socket: {MAX_CONNECTIONS} connections are open, one more was closed"),
                Err(error) => {
                    tracing::warn!(%error, "feed socket: accept failed");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            },
        }
    }
}

async fn connection(stream: UnixStream, cluster: Arc<Cluster>) {
    if !own_socket::is_trusted(&stream, "feed socket") {
        return;
    }
    if let Err(error) = talk(Frames::new(stream), &cluster).await {
        tracing::warn!(%error, "feed socket: connection ended; answers go on from the last state");
    }
}

async fn talk(mut frames: Frames, cluster: &Cluster) -> Result<(), FeedError> {
    let mut begun = false;
    while let Some(request) = frames.read::<FeedRequest>().await? {
        let reply = match request {
            FeedRequest::Counters => FeedReply::Counters { counters: cluster.counters() },
            FeedRequest::Apply { message } => {
                begun |= matches!(message, FeedMessage::Snapshot { .. });
                if begun {
                    cluster.apply(message);
                    FeedReply::Applied
                } else {
                    FeedReply::Refused { reason: "the first message of a connection must be a snapshot".to_owned() }
                }
            }
        };
        frames.write(&reply).await?;
    }
    Ok(())
}
