//! One process after another answers on the same sockets, so that none of the queries is lost in between.
//!
//! ```text
//! successor                          predecessor
//!     ├─ connects to carry-handover.sock ──►│ closes the feed: its state changes no more
//!     │◄── DNS sockets (SCM_RIGHTS), state ─┤ still answers
//!     │ answers, opens the feed             │
//!     ├─ "taken" ──────────────────────────►│ reads no more queries, finishes those under way
//!     │      the connection stays open      │ waits, and takes everything back if it breaks
//! ```
//!
//! The sockets are the same ones, queue and all: a query that waits in the kernel is read by whoever reads next. A successor that
//! dies gives its predecessor everything back by dying, as long as there is one.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::{Deserialize, Serialize};
use socket2::Socket;
use tokio::io::Interest;
use tokio::net::UnixStream;
use tokio::time::timeout;
use towpath_wire::dns::FeedMessage;

use crate::CarryError;
use crate::feed::FeedError;
use crate::feed::frame::Frames;
use crate::own_socket;

/// How long either side waits for the other: a large state is made ready meanwhile.
const WITHIN: Duration = Duration::from_secs(15);
/// More sockets than this are not handed over: one a transport and address are few, and the kernel's limit is 253.
const MAX_SOCKETS: usize = 64;

/// The first frame, after the sockets.
#[derive(Debug, Serialize, Deserialize)]
struct Handed {
    /// What was fed, if anything was. A successor of another version may know less than it says.
    state: Option<serde_json::Value>,
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
        let sockets = receive_sockets(&stream).await.map_err(FeedError::Io)?;
        let mut frames = Frames::new(stream);
        let handed: Handed = frames.read().await?.ok_or(FeedError::Closed)?;
        Ok::<_, FeedError>(Predecessor { sockets, state: handed.state.and_then(known), frames })
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
) -> Result<Duty, FeedError> {
    let offered = timeout(WITHIN, async {
        send_sockets(&stream, &sockets).await.map_err(FeedError::Io)?;
        let mut frames = Frames::new(stream);
        let state = state.map(serde_json::to_value).transpose().map_err(FeedError::Json)?;
        frames.write(&Handed { state }).await?;
        let Taken::Taken = frames.read().await?.ok_or(FeedError::Closed)?;
        Ok(Duty(frames))
    });
    offered.await.unwrap_or(Err(FeedError::TimedOut))
}

async fn send_sockets(stream: &UnixStream, sockets: &[Socket]) -> std::io::Result<()> {
    let fds: Vec<_> = sockets.iter().take(MAX_SOCKETS).map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    stream
        .async_io(Interest::WRITABLE, || {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() {
                control.push(SendAncillaryMessage::ScmRights(&fds));
            }
            // One byte to go with them: a message without any is no message.
            Ok(rustix::net::sendmsg(stream, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?)
        })
        .await
        .map(|_| ())
}

async fn receive_sockets(stream: &UnixStream) -> std::io::Result<Vec<Socket>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_SOCKETS))];
    stream
        .async_io(Interest::READABLE, || {
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let mut byte = [0u8];
            let message =
                rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
            if message.bytes == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let fds = control.drain().flat_map(|message| match message {
                RecvAncillaryMessage::ScmRights(fds) => fds.collect::<Vec<OwnedFd>>(),
                _ => Vec::new(),
            });
            Ok(fds.map(Socket::from).collect())
        })
        .await
}
