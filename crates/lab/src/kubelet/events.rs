//! Events of one kubelet: written in the background in order, repeated ones counted on one object as Kubernetes does.

use std::collections::HashMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::{Client, ResourceExt};
use serde_json::json;
use tokio::sync::mpsc;

/// Repeats of older events start a new object beyond this many remembered ones.
const REMEMBERED: usize = 4096;

/// Whether an event tells of something wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Severity {
    /// `Normal`.
    Normal,
    /// `Warning`.
    Warning,
}

struct Occurrence {
    about: ObjectReference,
    severity: Severity,
    reason: &'static str,
    message: String,
}

/// Takes events; never blocks.
#[derive(Clone)]
pub(crate) struct EventSink(mpsc::UnboundedSender<Occurrence>);

impl EventSink {
    /// A sink and the task that writes what it takes, until all sinks are gone.
    pub(crate) fn new(client: Client, node: &str) -> (Self, impl Future<Output = ()> + Send + 'static) {
        let (send, receive) = mpsc::unbounded_channel();
        (Self(send), write_all(client, node.to_owned(), receive))
    }

    /// An event about the pod, or about one container of it (`spec.containers{name}`).
    pub(crate) fn pod(
        &self,
        pod: &Pod,
        field: Option<String>,
        severity: Severity,
        reason: &'static str,
        message: String,
    ) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Pod".to_owned()),
            name: pod.metadata.name.clone(),
            namespace: pod.metadata.namespace.clone(),
            uid: pod.metadata.uid.clone(),
            resource_version: pod.metadata.resource_version.clone(),
            field_path: field,
        };
        let _ = self.0.send(Occurrence { about, severity, reason, message });
    }

    /// An event about the node.
    pub(crate) fn node(&self, node: &str, severity: Severity, reason: &'static str, message: String) {
        let about = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            uid: Some(node.to_owned()),
            ..ObjectReference::default()
        };
        let _ = self.0.send(Occurrence { about, severity, reason, message });
    }
}

type Key = (Option<String>, Option<String>, &'static str, String);

async fn write_all(client: Client, node: String, mut receive: mpsc::UnboundedReceiver<Occurrence>) {
    let mut known: HashMap<Key, (String, i32)> = HashMap::new();
    while let Some(event) = receive.recv().await {
        if known.len() > REMEMBERED {
            known.clear();
        }
        let namespace = event.about.namespace.clone().unwrap_or_else(|| "default".to_owned());
        let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
        let key = (event.about.uid.clone(), event.about.field_path.clone(), event.reason, event.message.clone());
        let now = Timestamp::now();
        if let Some((name, count)) = known.get_mut(&key) {
            *count += 1;
            let patch = json!({"count": *count, "lastTimestamp": Time(now)});
            if api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await.is_ok() {
                continue;
            }
        }
        match api.create(&PostParams::default(), &object(&event, &namespace, &node, now)).await {
            Ok(made) => {
                known.insert(key, (made.name_any(), 1));
            }
            Err(error) => tracing::debug!(%error, reason = event.reason, message = %event.message, "event not written"),
        }
    }
}

fn object(event: &Occurrence, namespace: &str, node: &str, now: Timestamp) -> Event {
    let subject = event.about.name.clone().unwrap_or_default();
    let unique = uuid::Uuid::new_v4().simple().to_string();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{subject}.{}", unique.get(..16).unwrap_or(&unique))),
            namespace: Some(namespace.to_owned()),
            ..ObjectMeta::default()
        },
        involved_object: event.about.clone(),
        type_: Some(if event.severity == Severity::Normal { "Normal" } else { "Warning" }.to_owned()),
        reason: Some(event.reason.to_owned()),
        message: Some(event.message.chars().take(1024).collect()),
        count: Some(1),
        first_timestamp: Some(Time(now)),
        last_timestamp: Some(Time(now)),
        source: Some(EventSource { component: Some("kubelet".to_owned()), host: Some(node.to_owned()) }),
        reporting_component: Some("kubelet".to_owned()),
        reporting_instance: Some(node.to_owned()),
        ..Event::default()
    }
}
