//! One process after another answers on the same sockets, so that none of the queries is lost in between.
//!
//! ```text
//! successor                          predecessor
//!     ├─ connects to carry-handover.sock ──►│ closes the feed: its state changes no more
//!     │◄── DNS sockets (SCM_RIGHTS), state, ┤ still answers
//!     │    queues and sockets of `udp`      │ and carries
//!     │ answers, carries, opens the feed    │
//!     ├─ "taken" ──────────────────────────►│ reads no more queries, finishes those under way
//!     │      the connection stays open      │ waits, and takes everything back if it breaks
//! ```
//!
//! The sockets are the same ones, queue and all: a query that waits in the kernel is read by whoever reads next. A successor that
//! dies gives its predecessor everything back by dying, as long as there is one.

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use socket2::Socket;
use tokio::net::UnixStream;
use tokio::time::timeout;
use towpath_wire::dns::FeedMessage;
use towpath_wire::udp::UdpWork;

use crate::CarryError;
use crate::descriptors;
use crate::feed::FeedError;
use crate::feed::frame::Frames;
use crate::own_socket;
use crate::udp::{Ends, Share};

/// How long either side waits for the other: a large state is made ready meanwhile.
const WITHIN: Duration = Duration::from_secs(15);

/// The first frame, after the sockets.
#[derive(Debug, Serialize, Deserialize)]
struct Handed {
    /// What was fed, if anything was. A successor of another version may know less than it says.
    state: Option<serde_json::Value>,
    /// Between what it carries packets (`udp`), if it does: the last of the descriptors. One of a version that knows nothing of it takes none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    udp: Option<HandedWork>,
}

/// What goes with the descriptors of the backend `udp`.
#[derive(Debug, Serialize, Deserialize)]
struct HandedWork {
    work: UdpWork,
    /// The nodes at IPv6 addresses that are known.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    nodes: Vec<Ipv6Addr>,
    cuts_udp: bool,
    descriptors: usize,
}

/// The second frame, the other way.
#[derive(Debug, Serialize, Deserialize)]
enum Taken {
    /// The successor answers.
    Taken,
}

/// A process that answered so far and has handed over what it answers with.
pub(crate) struct Predecessor {
    /// Its DNS sockets.
    pub(crate) sockets: Vec<Socket>,
    /// What it answered from.
    pub(crate) state: Option<FeedMessage>,
    /// Between what it carries packets.
    pub(crate) udp: Option<Share>,
    frames: Frames,
}

/// What is held while another process answers, on either side of the connection.
pub(crate) struct Duty(Frames);

impl Duty {
    /// Waits until the other side is gone.
    pub(crate) async fn is_over(&mut self) {
        // Nothing more is ever said: whatever is read, the end above all, is the end.
        let _ = self.0.read::<Taken>().await;
    }
}

/// Asks whoever answers on this node for its sockets and state; none where nobody does.
pub(crate) async fn ask(socket: &Path) -> Result<Option<Predecessor>, CarryError> {
    use std::io::ErrorKind::{ConnectionRefused, NotFound};
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(error) if matches!(error.kind(), NotFound | ConnectionRefused) => return Ok(None),
        Err(source) => return Err(CarryError::Socket { path: socket.to_owned(), source }),
    };
    if !own_socket::is_trusted(&stream, "handover") {
        return Err(CarryError::HandOver("it is not root's process".to_owned()));
    }
    let took = timeout(WITHIN, async {
        let (_, mut descriptors) = descriptors::receive(&stream).await.map_err(FeedError::Io)?;
        let mut frames = Frames::new(stream);
        let handed: Handed = frames.read().await?.ok_or(FeedError::Closed)?;
        let udp = handed.udp.and_then(|udp| {
            let first = descriptors.len().checked_sub(udp.descriptors)?;
            let ends = Ends::of(descriptors.split_off(first), udp.cuts_udp)?;
            Some(Share { work: udp.work, nodes: udp.nodes, ends })
        });
        let sockets = descriptors.into_iter().map(Socket::from).collect();
        Ok::<_, FeedError>(Predecessor { sockets, state: handed.state.and_then(known), udp, frames })
    });
    match took.await {
        Ok(Ok(predecessor)) => Ok(Some(predecessor)),
        Ok(Err(error)) => Err(CarryError::HandOver(error.to_string())),
        Err(_) => Err(CarryError::HandOver(format!("it did not within {} s", WITHIN.as_secs()))),
    }
}

fn known(state: serde_json::Value) -> Option<FeedMessage> {
    serde_json::from_value(state)
        .inspect_err(|error| {
            tracing::warn!(%error, "the predecessor's state is of another version: cluster names wait for the agent");
        })
        .ok()
}

impl Predecessor {
    /// Says that this process answers now.
    pub(crate) async fn taken(mut self) -> Result<Duty, CarryError> {
        let said = self.frames.write(&Taken::Taken).await;
        said.map_err(|error| CarryError::HandOver(error.to_string()))?;
        Ok(Duty(self.frames))
    }
}

/// Gives sockets and state to whoever connected; done when the other side says that it answers.
pub(crate) async fn offer(
    stream: UnixStream,
    sockets: Vec<Socket>,
    state: Option<FeedMessage>,
    udp: Option<Share>,
) -> Result<Duty, FeedError> {
    let offered = timeout(WITHIN, async {
        let mut all: Vec<OwnedFd> = sockets.into_iter().map(OwnedFd::from).collect();
        let udp = udp.map(|Share { work, nodes, ends }| {
            let (cuts_udp, before) = (ends.cuts_udp, all.len());
            all.extend(ends.into_descriptors());
            HandedWork { work, nodes, cuts_udp, descriptors: all.len() - before }
        });
        descriptors::send(&stream, 0, &all).await.map_err(FeedError::Io)?;
        let mut frames = Frames::new(stream);
        let state = state.map(serde_json::to_value).transpose().map_err(FeedError::Json)?;
        frames.write(&Handed { state, udp }).await?;
        let Taken::Taken = frames.read().await?.ok_or(FeedError::Closed)?;
        Ok(Duty(frames))
    });
    offered.await.unwrap_or(Err(FeedError::TimedOut))
}
