//! The agent's end of the feed: takes planned messages, keeps `towpath carry` up to date with them across restarts of
//! either side, and says whether it is.
//!
//! One task owns the connection and the state; dropping the [`Client`] ends it.

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};
use towpath_plan::dns::Records;
use towpath_wire::dns::{DnsCounters, FeedMessage, FeedReply, FeedRequest};

use super::frame::Frames;

/// First and longest wait between attempts to connect.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// How long the other side may take for one message.
const REPLY_WITHIN: Duration = Duration::from_secs(30);
/// More changes than this waiting: a snapshot is sent instead.
const MAX_WAITING: usize = 1000;

/// What goes wrong on the feed socket.
#[derive(Debug, thiserror::Error)]
pub enum FeedError {
    /// Nobody listens.
    #[error("cannot connect to {socket}: {source}; is `towpath carry` running on this node?")]
    Connect {
        /// The socket.
        socket: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Io(#[source] std::io::Error),
    /// A message could not be read.
    #[error("a message of the feed could not be read: {0}; agent and carry may be of different versions")]
    Json(#[source] serde_json::Error),
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Closed,
    /// No reply in time.
    #[error("no reply within {} s", REPLY_WITHIN.as_secs())]
    TimedOut,
    /// The other side refused a message.
    #[error("the other side refused a message: {0}")]
    Refused(String),
}

/// Whether queries are answered from what was sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Status {
    /// No connection; carry, if it runs, answers from the last state it had. Holds the reason, for people.
    Disconnected(String),
    /// Connected, and something sent is not applied yet (or nothing was sent yet).
    Syncing,
    /// All that was sent is applied.
    Synced,
}

/// Feeds `towpath carry`.
#[derive(Debug)]
pub struct Client {
    messages: mpsc::UnboundedSender<Vec<FeedMessage>>,
    status: watch::Receiver<Status>,
    /// Batches sent that the task has not taken.
    untaken: Arc<AtomicU64>,
    task: JoinHandle<()>,
}

impl Drop for Client {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Client {
    /// Starts feeding over `socket` (`AgentConfig::carry_socket`), connecting and reconnecting as needed. Must be called
    /// within a tokio runtime.
    pub fn start(socket: impl Into<PathBuf>) -> Self {
        let (messages, inbox) = mpsc::unbounded_channel();
        let (report, status) = watch::channel(Status::Disconnected("not connected yet".to_owned()));
        let untaken = Arc::new(AtomicU64::new(0));
        let feeder = Feeder {
            socket: socket.into(),
            inbox,
            report,
            untaken: Arc::clone(&untaken),
            records: None,
            waiting: VecDeque::new(),
        };
        Self { messages, status, untaken, task: tokio::spawn(feeder.run()) }
    }

    /// Sends what `towpath_plan::dns::FeedPlanner::plan` returned, in order; the first message ever must be the snapshot.
    /// Never waits.
    pub fn send(&self, messages: Vec<FeedMessage>) {
        if !messages.is_empty() {
            self.untaken.fetch_add(1, Ordering::SeqCst);
            // The task ends only with this value: there is nobody to tell.
            let _ = self.messages.send(messages);
        }
    }

    /// Where things stand; the receiver can also wait for changes.
    pub fn status(&self) -> watch::Receiver<Status> {
        self.status.clone()
    }

    /// Whether all that was sent is applied.
    pub fn is_synced(&self) -> bool {
        self.untaken.load(Ordering::SeqCst) == 0 && *self.status.borrow() == Status::Synced
    }
}

/// What an agent's carry has counted, asked over a connection of its own.
///
/// # Errors
/// Nobody listens, or does not answer.
pub async fn counters(socket: &Path) -> Result<DnsCounters, FeedError> {
    let mut frames = connect(socket).await?;
    match exchange(&mut frames, &FeedRequest::Counters).await? {
        FeedReply::Counters { counters } => Ok(counters),
        FeedReply::Refused { reason } => Err(FeedError::Refused(reason)),
        FeedReply::Applied | FeedReply::Answers { .. } => {
            Err(FeedError::Refused("an answer to another question".to_owned()))
        }
    }
}

/// Whether the process that answers on this node is one of this PID namespace, so of this container. It opens the feed once it
/// answers; the kernel names a process of another namespace 0 (`pid_namespaces(7)`).
///
/// # Errors
/// None answers.
pub async fn is_of_this_pid_namespace(socket: &Path) -> Result<bool, FeedError> {
    let connected = UnixStream::connect(socket).await.and_then(|stream| stream.peer_cred());
    let peer = connected.map_err(|source| FeedError::Connect { socket: socket.to_owned(), source })?;
    Ok(peer.pid().is_some_and(|pid| pid != 0))
}

pub(crate) async fn connect(socket: &Path) -> Result<Frames, FeedError> {
    let stream =
        UnixStream::connect(socket).await.map_err(|source| FeedError::Connect { socket: socket.to_owned(), source })?;
    Ok(Frames::new(stream))
}

async fn exchange(frames: &mut Frames, request: &FeedRequest) -> Result<FeedReply, FeedError> {
    let both = async {
        frames.write(request).await?;
        frames.read().await?.ok_or(FeedError::Closed)
    };
    timeout(REPLY_WITHIN, both).await.map_err(|_| FeedError::TimedOut)?
}

struct Feeder {
    socket: PathBuf,
    inbox: mpsc::UnboundedReceiver<Vec<FeedMessage>>,
    report: watch::Sender<Status>,
    untaken: Arc<AtomicU64>,
    /// All that was sent so far, to start a new connection with.
    records: Option<Records>,
    waiting: VecDeque<FeedMessage>,
}

impl Feeder {
    async fn run(mut self) {
        let mut wait = BACKOFF.0;
        let mut told = String::new();
        loop {
            let error = match connect(&self.socket).await {
                Ok(frames) => {
                    wait = BACKOFF.0;
                    match self.feed(frames).await {
                        Ok(()) => return,
                        Err(error) => error,
                    }
                }
                Err(error) => error,
            };
            let reason = error.to_string();
            if told != reason {
                tracing::warn!(%reason, "DNS feed: will try again");
                told.clone_from(&reason);
            }
            self.report.send_replace(Status::Disconnected(reason));
            self.waiting.clear();
            if !self.collect_for(wait).await {
                return;
            }
            wait = (wait * 2).min(BACKOFF.1);
        }
    }

    /// Takes messages while there is no connection. False when nobody can send any more.
    async fn collect_for(&mut self, wait: Duration) -> bool {
        let pause = sleep(wait);
        tokio::pin!(pause);
        loop {
            tokio::select! {
                () = &mut pause => return true,
                messages = self.inbox.recv() => match messages {
                    None => return false,
                    Some(messages) => {
                        self.take(messages);
                        // A connection begins with all that was sent: until then none of it is kept twice.
                        self.waiting.clear();
                    }
                },
            }
        }
    }

    fn take(&mut self, messages: Vec<FeedMessage>) {
        self.report.send_if_modified(|status| {
            let was_synced = *status == Status::Synced;
            if was_synced {
                *status = Status::Syncing;
            }
            was_synced
        });
        self.untaken.fetch_sub(1, Ordering::SeqCst);
        for message in messages {
            match &mut self.records {
                Some(records) => records.apply(message.clone()),
                None if matches!(message, FeedMessage::Snapshot { .. }) => {
                    let mut records = Records::default();
                    records.apply(message.clone());
                    self.records = Some(records);
                }
                // Changes to nothing: a caller's mistake that must not reach the other side as the whole truth.
                None => {
                    tracing::error!("DNS feed: a change was sent before the first snapshot; it is left out");
                    continue;
                }
            }
            self.waiting.push_back(message);
        }
        if self.waiting.len() > MAX_WAITING {
            self.restart_queue();
        }
    }

    fn restart_queue(&mut self) {
        self.waiting.clear();
        self.waiting.extend(self.records.as_ref().map(Records::snapshot));
    }

    /// Feeds one connection until it breaks; ends well only when the [`Client`] is gone.
    async fn feed(&mut self, mut frames: Frames) -> Result<(), FeedError> {
        self.restart_queue();
        loop {
            while let Ok(messages) = self.inbox.try_recv() {
                self.take(messages);
            }
            let Some(message) = self.waiting.pop_front() else {
                let status = if self.records.is_some() { Status::Synced } else { Status::Syncing };
                self.report.send_if_modified(|old| std::mem::replace(old, status.clone()) != status);
                tokio::select! {
                    // Nothing is asked, so anything read, the end above all, means that the connection is no good.
                    read = frames.read::<FeedReply>() => return Err(read.err().unwrap_or(FeedError::Closed)),
                    messages = self.inbox.recv() => match messages {
                        None => return Ok(()),
                        Some(messages) => self.take(messages),
                    },
                }
                continue;
            };
            self.report.send_if_modified(|old| std::mem::replace(old, Status::Syncing) != Status::Syncing);
            match exchange(&mut frames, &FeedRequest::Apply { message }).await? {
                FeedReply::Applied => {}
                FeedReply::Refused { reason } => return Err(FeedError::Refused(reason)),
                FeedReply::Counters { .. } | FeedReply::Answers { .. } => return Err(FeedError::Closed),
            }
        }
    }
}
