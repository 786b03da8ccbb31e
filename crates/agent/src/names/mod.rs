//! Domain names of policies: what DNS answers teach, from `towpath carry` to the reconcile loop and back.
//!
//! ```text
//! carry ─ answers ─► hear (a task) ─ Request::Learn ─► reconcile: book ─► policy ─► kernel
//!   ▲                                                                               │
//!   └── learned: the answers may leave ◄────────────────────────────────────────────┘
//! ```
//!
//! [`book`] is what was learned, with what was refused; [`journal`] keeps it over a restart of the agent.

pub mod book;
mod journal;
pub(crate) mod status;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::sleep;
use towpath_carry::feed::{Answers, FeedError};
use towpath_wire::dns::NameAnswer;
use tracing::{info, warn};

use crate::reconcile::Request;

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// After what could not be applied.
const AGAIN: Duration = Duration::from_millis(100);
/// The loop rests as long as a lesson took before it gets the next, but no longer: what is asked for meanwhile comes together.
const LONGEST_REST: Duration = Duration::from_millis(20);

/// What the loop says of a lesson: whether anything that was learned before was forgotten since the last one.
pub type Learnt = Result<bool, NotYet>;

/// The lesson is not in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotYet;

/// Answers to learn, and where to say so.
#[derive(Debug)]
pub struct Lesson {
    /// The answers.
    pub answers: Vec<NameAnswer>,
    /// The outcome; whoever asked for the names waits for it.
    pub reply: oneshot::Sender<Learnt>,
}

/// Hears of answers for the names that policies ask for, as the loop says (none: it does not know yet), until the loop is gone.
pub(crate) async fn hear(
    socket: PathBuf,
    mut wanted: watch::Receiver<Option<Vec<String>>>,
    requests: mpsc::Sender<Request>,
) {
    let (mut wait, mut told) = (BACKOFF.0, false);
    loop {
        let names = match wanted.wait_for(Option::is_some).await {
            Ok(names) => names.clone().unwrap_or_default(),
            Err(_) => return,
        };
        let asks = !names.is_empty();
        wanted.mark_unchanged();
        match Answers::follow(&socket, names).await {
            Ok(answers) => {
                if std::mem::take(&mut told) {
                    info!("what policies ask for by name is learned again");
                }
                wait = BACKOFF.0;
                match listen(answers, &mut wanted, &requests).await {
                    Ok(()) => return,
                    Err(error) => info!(%error, "the connection to what answers DNS ended; connecting again"),
                }
            }
            Err(error) if asks && !told => {
                told = true;
                warn!(%error, "names that policies ask for are not learned; trying again");
            }
            Err(_) => {}
        }
        sleep(wait).await;
        wait = (wait * 2).min(BACKOFF.1);
    }
}

/// One connection; ends well when the loop is gone.
async fn listen(
    mut answers: Answers,
    wanted: &mut watch::Receiver<Option<Vec<String>>>,
    requests: &mpsc::Sender<Request>,
) -> Result<(), FeedError> {
    loop {
        tokio::select! {
            changed = wanted.changed() => {
                if changed.is_err() {
                    return Ok(());
                }
                let names = wanted.borrow_and_update().clone().unwrap_or_default();
                answers.wants(names).await?;
            }
            next = answers.next() => {
                let (serial, said) = next?;
                let begun = Instant::now();
                let Some(forgot) = learn(said, requests).await else { return Ok(()) };
                answers.learned(serial, forgot).await?;
                sleep(begun.elapsed().min(LONGEST_REST)).await;
            }
        }
    }
}

/// Has the loop learn answers, until they are in the kernel; none: the loop is gone.
async fn learn(answers: Vec<NameAnswer>, requests: &mpsc::Sender<Request>) -> Option<bool> {
    loop {
        let (reply, outcome) = oneshot::channel();
        requests.send(Request::Learn(Lesson { answers: answers.clone(), reply })).await.ok()?;
        match outcome.await {
            Ok(Ok(forgot)) => return Some(forgot),
            // The table has them; what is missing is the kernel.
            Ok(Err(NotYet)) => sleep(AGAIN).await,
            Err(_) => return None,
        }
    }
}
