//! Events (events.k8s.io/v1) on the objects that the controller acts on.

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};

/// `note` may have 1024 characters.
const LONGEST: usize = 1000;

/// Writes Events as the controller.
#[derive(Clone)]
pub(crate) struct Events {
    client: Client,
    reporter: Reporter,
}

impl Events {
    /// As this replica.
    pub(crate) fn new(client: Client, identity: String) -> Self {
        Self { client, reporter: Reporter { controller: "towpath-controller".to_owned(), instance: Some(identity) } }
    }

    /// Writes one. That it cannot be written is no problem of its own: the log says the same.
    pub(crate) async fn write(&self, on: &ObjectReference, type_: EventType, reason: &str, action: &str, note: &str) {
        let event = Event {
            type_,
            reason: reason.to_owned(),
            note: Some(note.chars().take(LONGEST).collect()),
            action: action.to_owned(),
            secondary: None,
        };
        // A recorder counts what has the same reason as one Event, whatever the note says: each note gets its own.
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        if let Err(error) = recorder.publish(&event, on).await {
            tracing::debug!(%error, note, "event not written");
        }
    }
}
