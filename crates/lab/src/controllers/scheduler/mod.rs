//! The scheduler: binds pods to nodes that fit, the emptiest first.
//!
//! It keeps every pod and node in memory, fed by two watches, and decides one pod at a time, so that its own bindings count at
//! once. A pod that fits nowhere is told so (condition and event) and tried again when a node or a pod changes.

pub(super) mod fit;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use k8s_openapi::api::core::v1::{Binding, Node, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, ResourceExt};
use tracing::{debug, warn};

use super::{Context, events, is_status, pods};

type Name = (String, String);

#[derive(Default)]
struct Cluster {
    nodes: BTreeMap<String, Node>,
    pods: BTreeMap<Name, Pod>,
    /// Bound by us, not yet seen in the watch.
    assumed: BTreeMap<Name, String>,
}

enum Seen {
    Node(watcher::Event<Node>),
    Pod(watcher::Event<Pod>),
}

fn name_of(pod: &Pod) -> Name {
    (pod.namespace().unwrap_or_default(), pod.name_any())
}

pub(super) async fn run(context: Arc<Context>) {
    let client = &context.client;
    let nodes = watcher(Api::<Node>::all(client.clone()), watcher::Config::default()).default_backoff();
    let all_pods = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default()).default_backoff();
    let mut seen = futures::stream::select(
        nodes.filter_map(async |e| e.ok().map(Seen::Node)).boxed(),
        all_pods.filter_map(async |e| e.ok().map(Seen::Pod)).boxed(),
    );
    let mut cluster = Cluster::default();
    let mut synced = [false, false];
    while let Some(first) = seen.next().await {
        synced = cluster.apply(first, synced);
        // Whatever else is there already is seen before anything is decided.
        while let Some(Some(more)) = futures::FutureExt::now_or_never(seen.next()) {
            synced = cluster.apply(more, synced);
        }
        if synced == [true, true] {
            cluster.schedule(client).await;
        }
    }
}

impl Cluster {
    fn apply(&mut self, seen: Seen, mut synced: [bool; 2]) -> [bool; 2] {
        match seen {
            Seen::Node(watcher::Event::Init) => self.nodes.clear(),
            Seen::Node(watcher::Event::InitApply(node) | watcher::Event::Apply(node)) => {
                self.nodes.insert(node.name_any(), node);
            }
            Seen::Node(watcher::Event::Delete(node)) => {
                self.nodes.remove(&node.name_any());
            }
            Seen::Node(watcher::Event::InitDone) => synced = [true, synced[1]],
            Seen::Pod(watcher::Event::Init) => self.pods.clear(),
            Seen::Pod(watcher::Event::InitApply(pod) | watcher::Event::Apply(pod)) => {
                if pod.spec.as_ref().is_some_and(|s| s.node_name.is_some()) {
                    self.assumed.remove(&name_of(&pod));
                }
                self.pods.insert(name_of(&pod), pod);
            }
            Seen::Pod(watcher::Event::Delete(pod)) => {
                self.assumed.remove(&name_of(&pod));
                self.pods.remove(&name_of(&pod));
            }
            Seen::Pod(watcher::Event::InitDone) => synced = [synced[0], true],
        }
        synced
    }

    fn node_of<'a>(&'a self, name: &Name, pod: &'a Pod) -> Option<&'a str> {
        let bound = pod.spec.as_ref().and_then(|s| s.node_name.as_deref()).filter(|n| !n.is_empty());
        bound.or_else(|| self.assumed.get(name).map(String::as_str))
    }

    fn waits(&self, name: &Name, pod: &Pod) -> bool {
        self.node_of(name, pod).is_none()
            && pods::is_active(pod)
            && pod.spec.as_ref().is_some_and(|s| {
                s.scheduling_gates.as_ref().is_none_or(Vec::is_empty)
                    && s.scheduler_name.as_deref().is_none_or(|n| n == "default-scheduler" || n.is_empty())
            })
    }

    async fn schedule(&mut self, client: &Client) {
        let waiting: Vec<Name> =
            self.pods.iter().filter(|(name, pod)| self.waits(name, pod)).map(|(name, _)| name.clone()).collect();
        for name in waiting {
            let Some(pod) = self.pods.get(&name) else { continue };
            match self.choose(pod) {
                Ok(node) => match bind(client, pod, &node).await {
                    Ok(()) => {
                        let note = format!("Successfully assigned {}/{} to {node}", name.0, name.1);
                        let (client, pod) = (client.clone(), pod.clone());
                        tokio::spawn(async move {
                            events::record(&client, "default-scheduler", &pod, false, "Scheduled", note).await;
                        });
                        self.assumed.insert(name, node);
                    }
                    Err(error) if is_status(&error, 404) || is_status(&error, 409) => {
                        debug!(%error, "pod changed while it was scheduled");
                    }
                    Err(error) => {
                        warn!(%error, namespace = name.0, pod = name.1, "binding failed; trying again");
                        tokio::time::sleep(Duration::from_millis(200)).await;
                    }
                },
                Err(reason) => self.tell_unschedulable(client, pod, &reason).await,
            }
        }
    }

    /// The node with the fewest pods of the same owner, then the fewest pods, among those that fit; or why none does.
    fn choose(&self, pod: &Pod) -> Result<String, String> {
        let mut counts: BTreeMap<&str, (usize, usize)> = BTreeMap::new();
        let owner = super::owned::controller(&pod.metadata).map(|o| o.uid.as_str());
        let mut placed: Vec<(&str, &Pod)> = Vec::new();
        for (name, other) in &self.pods {
            if let Some(node) = self.node_of(name, other).filter(|_| pods::is_active(other)) {
                let count = counts.entry(node).or_default();
                let same =
                    owner.is_some() && super::owned::controller(&other.metadata).map(|o| o.uid.as_str()) == owner;
                count.0 += usize::from(same);
                count.1 += 1;
                placed.push((node, other));
            }
        }
        let mut reasons: BTreeMap<&'static str, usize> = BTreeMap::new();
        let mut best: Option<(&str, (usize, usize))> = None;
        for (name, node) in &self.nodes {
            if let Some(reason) = fit::refusal(pod, node, &self.nodes, &placed) {
                *reasons.entry(reason).or_default() += 1;
                continue;
            }
            let count = counts.get(name.as_str()).copied().unwrap_or_default();
            if best.is_none_or(|(_, least)| count < least) {
                best = Some((name, count));
            }
        }
        best.map(|(name, _)| name.to_owned()).ok_or_else(|| {
            let reasons: Vec<String> = reasons.iter().map(|(reason, n)| format!("{n} {reason}")).collect();
            format!("0/{} nodes are available: {}.", self.nodes.len(), reasons.join(", "))
        })
    }

    async fn tell_unschedulable(&self, client: &Client, pod: &Pod, reason: &str) {
        let told = pod
            .status
            .iter()
            .flat_map(|s| s.conditions.iter().flatten())
            .any(|c| c.type_ == "PodScheduled" && c.status == "False" && c.message.as_deref() == Some(reason));
        if told {
            return;
        }
        events::record(client, "default-scheduler", pod, true, "FailedScheduling", reason.to_owned()).await;
        let api: Api<Pod> = Api::namespaced(client.clone(), &pod.namespace().unwrap_or_default());
        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(k8s_openapi::jiff::Timestamp::now());
        let patch = Patch::Strategic(serde_json::json!({"status": {"conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": reason,
            "lastTransitionTime": now,
        }]}}));
        if let Err(error) = api.patch_status(&pod.name_any(), &PatchParams::default(), &patch).await {
            debug!(%error, "could not write the PodScheduled condition");
        }
    }
}

async fn bind(client: &Client, pod: &Pod, node: &str) -> Result<(), kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let binding = Binding {
        metadata: ObjectMeta {
            name: Some(pod.name_any()),
            namespace: Some(namespace.clone()),
            uid: pod.uid(),
            ..ObjectMeta::default()
        },
        target: ObjectReference {
            kind: Some("Node".to_owned()),
            name: Some(node.to_owned()),
            ..ObjectReference::default()
        },
    };
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let _: serde_json::Value =
        api.create_subresource("binding", &pod.name_any(), &PostParams::default(), &binding).await?;
    Ok(())
}
