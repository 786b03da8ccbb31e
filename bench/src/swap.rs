//! How soon a Service leads where it says: a client connects again and again until it is let in, or refused.

use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

/// Between attempts: the resolution of the figure. Without a pause the client would take the CPU that the agent works on.
const AGAIN: Duration = Duration::from_micros(100);
/// How long it may take before that is a failure.
const LIMIT: Duration = Duration::from_secs(60);

/// What to wait for.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The Service.
    pub(crate) to: SocketAddr,
    /// Whether it is to answer, or to refuse.
    pub(crate) answers: bool,
    /// How long one attempt may take, in milliseconds: packets to a Service that nobody knows are lost.
    pub(crate) patience: u64,
}

/// Nanoseconds of a clock that all processes of a machine share.
///
/// # Errors
/// The kernel has none.
pub(crate) fn now() -> Result<u64> {
    let time = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(Duration::from(time).as_nanos().try_into()?)
}

/// Waits; when it began to be so.
///
/// # Errors
/// It did not come to be so.
pub(crate) fn until(request: Request) -> Result<u64> {
    let deadline = Instant::now() + LIMIT;
    while Instant::now() < deadline {
        let begun = now()?;
        let patience = Duration::from_millis(request.patience.max(1));
        if TcpStream::connect_timeout(&request.to, patience).is_ok() == request.answers {
            return Ok(begun);
        }
        std::thread::sleep(AGAIN);
    }
    bail!("{} did not come to {} within {LIMIT:?}", request.to, if request.answers { "answer" } else { "refuse" })
}
