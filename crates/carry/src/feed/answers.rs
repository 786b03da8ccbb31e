//! The agent's end of a connection on which it hears of answers before they are given.

use std::path::Path;

use towpath_wire::dns::{FeedReply, FeedRequest, NameAnswer};

use super::client::{FeedError, connect};
use super::frame::Frames;

/// Answers of `towpath carry` for names that policies ask for. Those who asked wait for [`Answers::learned`], for half a second at most.
pub struct Answers {
    frames: Frames,
}

impl std::fmt::Debug for Answers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Answers").finish_non_exhaustive()
    }
}

impl Answers {
    /// Connects to `socket` (`AgentConfig::carry_socket`), and asks for these names.
    ///
    /// # Errors
    /// Nobody listens there.
    pub async fn follow(socket: &Path, names: Vec<String>) -> Result<Self, FeedError> {
        let mut answers = Self { frames: connect(socket).await? };
        answers.wants(names).await?;
        Ok(answers)
    }

    /// Asks for these names instead.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn wants(&mut self, names: Vec<String>) -> Result<(), FeedError> {
        self.frames.write(&FeedRequest::FollowNames { names }).await
    }

    /// The next answers, with the serial to confirm them by. Can be cancelled without loss.
    ///
    /// # Errors
    /// The connection broke, or the other side does not tell.
    pub async fn next(&mut self) -> Result<(u64, Vec<NameAnswer>), FeedError> {
        match self.frames.read().await?.ok_or(FeedError::Closed)? {
            FeedReply::Answers { serial, answers } => Ok((serial, answers)),
            FeedReply::Refused { reason } => Err(FeedError::Refused(reason)),
            FeedReply::Applied | FeedReply::Counters { .. } => {
                Err(FeedError::Refused("an answer to another question".to_owned()))
            }
        }
    }

    /// Everything up to this serial is learned. `forgot`: of what was learned before, something may have been forgotten.
    ///
    /// # Errors
    /// The connection broke.
    pub async fn learned(&mut self, serial: u64, forgot: bool) -> Result<(), FeedError> {
        self.frames.write(&FeedRequest::Learned { serial, forgot }).await
    }
}
