//! This process's end of the feed: applies what the agent says, for root only.

use std::sync::Arc;

use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_wire::dns::{FeedMessage, FeedReply, FeedRequest};

use super::client::FeedError;
use super::frame::Frames;
use crate::own_socket;
use crate::responder::Responder;

/// Connections at a time: one agent, its successor during an upgrade, and a few that ask for counters.
const MAX_CONNECTIONS: usize = 16;

/// Serves until shutdown.
pub(crate) async fn serve(listener: UnixListener, responder: Arc<Responder>, shutdown: CancellationToken) {
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(_) = connections.join_next(), if !connections.is_empty() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                    connections.spawn(connection(stream, Arc::clone(&responder)));
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

async fn connection(stream: UnixStream, responder: Arc<Responder>) {
    if !own_socket::is_trusted(&stream, "feed socket") {
        return;
    }
    if let Err(error) = talk(Frames::new(stream), &responder).await {
        tracing::warn!(%error, "feed socket: connection ended; answers go on from the last state");
    }
}

async fn talk(mut frames: Frames, responder: &Responder) -> Result<(), FeedError> {
    let cluster = responder.cluster();
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
            FeedRequest::FollowNames { names } => return tell_names(frames, responder, names).await,
            FeedRequest::Learned { .. } => {
                FeedReply::Refused { reason: "no answers were told on this connection".to_owned() }
            }
        };
        frames.write(&reply).await?;
    }
    Ok(())
}

/// The rest of a connection on which an agent hears of answers.
async fn tell_names(mut frames: Frames, responder: &Responder, names: Vec<String>) -> Result<(), FeedError> {
    let follower = responder.cluster().names.follow();
    follower.wants(&names);
    responder.tell_cached();
    loop {
        tokio::select! {
            request = frames.read::<FeedRequest>() => match request? {
                None => return Ok(()),
                Some(FeedRequest::Learned { serial, forgot }) => follower.learned(serial, forgot),
                Some(FeedRequest::FollowNames { names }) => {
                    follower.wants(&names);
                    responder.tell_cached();
                }
                Some(FeedRequest::Apply { .. } | FeedRequest::Counters) => {
                    let reason = "on this connection answers are told, and nothing is fed or counted".to_owned();
                    frames.write(&FeedReply::Refused { reason }).await?;
                }
            },
            (serial, answers) = follower.next() => frames.write(&FeedReply::Answers { serial, answers }).await?,
        }
    }
}
