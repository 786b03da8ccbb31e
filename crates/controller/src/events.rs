//! Events (events.k8s.io/v1) on the objects that the controller acts on.
//!
//! They are written aside, one after the other and so many a second at most: an API server that answers late, or a new leader that has
//! much to say, keeps nobody from his address.

use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;

/// `note` may have 1024 characters.
const LONGEST: usize = 1000;
/// So many wait to be written.
const WAITING: usize = 256;
/// Between two of them.
const PACE: Duration = Duration::from_millis(50);
/// One write.
const WRITE: Duration = Duration::from_secs(5);

/// What is to be said, and of what.
#[derive(Clone, Debug)]
pub(crate) struct Note {
    pub(crate) on: ObjectReference,
    pub(crate) type_: EventType,
    pub(crate) reason: &'static str,
    pub(crate) action: &'static str,
    pub(crate) note: String,
}

/// Writes Events as the controller. With the last handle what waits is dropped.
#[derive(Clone, Debug)]
pub(crate) struct Events {
    waiting: mpsc::Sender<Note>,
    _writing: Arc<AbortOnDropHandle<()>>,
}

impl Events {
    /// As this replica.
    pub(crate) fn new(client: Client, identity: String) -> Self {
        let reporter = Reporter { controller: "towpath-controller".to_owned(), instance: Some(identity) };
        let (waiting, mut notes) = mpsc::channel::<Note>(WAITING);
        let writing = tokio::spawn(async move {
            let mut pace = interval(PACE);
            pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
            while let Some(note) = notes.recv().await {
                pace.tick().await;
                write(&client, &reporter, note).await;
            }
        });
        Self { waiting, _writing: Arc::new(AbortOnDropHandle::new(writing)) }
    }

    /// Has it written soon; false: too much waits already, and it is to be said later.
    pub(crate) fn post(&self, note: Note) -> bool {
        self.waiting.try_send(note).is_ok()
    }
}

/// That it cannot be written is no problem of its own: the log says the same.
async fn write(client: &Client, reporter: &Reporter, note: Note) {
    let event = Event {
        type_: note.type_,
        reason: note.reason.to_owned(),
        note: Some(note.note.chars().take(LONGEST).collect()),
        action: note.action.to_owned(),
        secondary: None,
    };
    // A recorder counts what has the same reason as one Event, whatever the note says: each note gets its own.
    let recorder = Recorder::new(client.clone(), reporter.clone());
    match timeout(WRITE, recorder.publish(&event, &note.on)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, note = note.note, "event not written"),
        Err(_) => tracing::debug!(note = note.note, "event not written in time"),
    }
}
