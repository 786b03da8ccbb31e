//! Events that controllers write, as `kubectl describe` shows them.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Client, Resource};
use tracing::debug;

/// Writes an event about `object`. An event that cannot be written is no failure of what it tells.
pub(super) async fn record<K: Resource<DynamicType = ()>>(
    client: &Client,
    controller: &str,
    object: &K,
    warning: bool,
    reason: &str,
    note: String,
) {
    let recorder = Recorder::new(client.clone(), Reporter { controller: controller.to_owned(), instance: None });
    let reference: ObjectReference = object.object_ref(&());
    let event = Event {
        type_: if warning { EventType::Warning } else { EventType::Normal },
        reason: reason.to_owned(),
        note: Some(note),
        action: reason.to_owned(),
        secondary: None,
    };
    match tokio::time::timeout(Duration::from_secs(5), recorder.publish(&event, &reference)).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => debug!(%error, reason, "event not written"),
        Err(_) => debug!(reason, "event not written in 5 s"),
    }
}
