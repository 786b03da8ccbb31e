//! The agent's end: asks `towpath carry` to carry packets between ends that it opens when it is asked for them.

use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;
use towpath_wire::udp::{UdpCounters, UdpReply, UdpRequest, UdpWork};

use crate::descriptors;
use crate::feed::client::{FeedError, connect};
use crate::feed::frame::Frames;

/// How long an answer may take.
const WITHIN: Duration = Duration::from_secs(5);

/// The answer to [`Connection::carry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is carried.
    Carrying(UdpCounters),
    /// [`Connection::give`] the ends.
    Give,
}

/// A connection to carry; what is carried outlives it.
pub struct Connection(Frames);

impl std::fmt::Debug for Connection {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Connection").finish_non_exhaustive()
    }
}

impl Connection {
    /// Connects to `AgentConfig::carry_udp_socket`.
    ///
    /// # Errors
    /// Nobody listens.
    pub async fn open(socket: &Path) -> Result<Self, FeedError> {
        connect(socket).await.map(Self)
    }

    /// Has this carried, or hears that it is.
    ///
    /// # Errors
    /// The connection broke, or there was no answer.
    pub async fn carry(&mut self, work: &UdpWork) -> Result<Answer, FeedError> {
        self.0.write(&UdpRequest::Carry { work: work.clone() }).await?;
        match self.answer().await? {
            UdpReply::Carrying { counters } => Ok(Answer::Carrying(counters)),
            UdpReply::Give => Ok(Answer::Give),
            UdpReply::Refused { reason } => Err(FeedError::Refused(reason)),
            UdpReply::Known => Err(FeedError::Closed),
        }
    }

    /// Has these known, and no others: afterwards what is for them is sent to them.
    ///
    /// # Errors
    /// The connection broke, or there was no answer.
    pub async fn know(&mut self, nodes: impl IntoIterator<Item = Ipv6Addr>) -> Result<(), FeedError> {
        self.0.write(&UdpRequest::Nodes { nodes: nodes.into_iter().collect() }).await?;
        match self.answer().await? {
            UdpReply::Known => Ok(()),
            UdpReply::Refused { reason } => Err(FeedError::Refused(reason)),
            UdpReply::Carrying { .. } | UdpReply::Give => Err(FeedError::Closed),
        }
    }

    /// Gives as many queues, receivers and senders.
    ///
    /// # Errors
    /// The connection broke, or they are not taken.
    pub async fn give(&mut self, ends: [Vec<OwnedFd>; 3], cuts_udp: bool) -> Result<UdpCounters, FeedError> {
        let all: Vec<OwnedFd> = ends.into_iter().flatten().collect();
        descriptors::send(self.0.stream(), u8::from(cuts_udp), &all).await.map_err(FeedError::Io)?;
        match self.answer().await? {
            UdpReply::Carrying { counters } => Ok(counters),
            UdpReply::Refused { reason } => Err(FeedError::Refused(reason)),
            UdpReply::Give | UdpReply::Known => Err(FeedError::Closed),
        }
    }

    /// Waits until the other side is gone.
    pub async fn is_over(&mut self) {
        // Nothing is said that was not asked for: whatever is read, the end above all, is the end.
        let _ = self.0.read::<UdpReply>().await;
    }

    async fn answer(&mut self) -> Result<UdpReply, FeedError> {
        timeout(WITHIN, self.0.read()).await.map_err(|_| FeedError::TimedOut)??.ok_or(FeedError::Closed)
    }
}
