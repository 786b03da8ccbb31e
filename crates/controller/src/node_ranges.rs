//! Gives nodes without pod ranges theirs: watches Nodes, asks the planner, writes `spec.podCIDRs`.

use std::collections::BTreeMap;
use std::time::Duration;

use futures::StreamExt;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::{Node, ObjectReference};
use kube::api::{Api, Patch, PatchParams};
use kube::runtime::events::EventType;
use kube::runtime::watcher::Event;
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Client, Resource, ResourceExt};
use serde_json::json;
use tokio::time::{Instant, MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;
use towpath_model::NodeName;
use towpath_plan::cluster_cidrs::ClusterRanges;

use crate::events::{Events, Note};

/// How long a deleted node's ranges are left alone: its pods may still be sending.
const KEEP_RELEASED: Duration = Duration::from_secs(120);
/// Nodes that could not be given a range, or be written to, are tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Works until told to stop.
pub(crate) async fn work(client: Client, ranges: ClusterRanges, identity: String, stop: CancellationToken) {
    let api: Api<Node> = Api::all(client.clone());
    let mut state = Nodes {
        events: Events::new(client, identity),
        api: api.clone(),
        ranges,
        nodes: BTreeMap::new(),
        listing: None,
        complete: false,
        released: Vec::new(),
        told: BTreeMap::new(),
    };
    let mut events = watcher(api, watcher::Config::default()).default_backoff().boxed();
    let mut retry = interval(RETRY);
    retry.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            _ = retry.tick() => {}
            event = events.next() => match event {
                None => return,
                Some(Ok(event)) => state.take(event),
                Some(Err(error)) => {
                    tracing::warn!(%error, "watch of nodes interrupted; listing again");
                    continue;
                }
            },
        }
        state.assign().await;
    }
}

/// A node, as far as it matters here.
#[derive(Clone)]
struct Seen {
    cidrs: Vec<IpNet>,
    reference: ObjectReference,
    version: Option<String>,
}

struct Nodes {
    api: Api<Node>,
    events: Events,
    ranges: ClusterRanges,
    nodes: BTreeMap<NodeName, Seen>,
    /// A list that is under way.
    listing: Option<BTreeMap<NodeName, Seen>>,
    /// Whether all nodes are known: before that nothing may be given out.
    complete: bool,
    released: Vec<(IpNet, Instant)>,
    /// What was said of a node, so that it is said once.
    told: BTreeMap<NodeName, String>,
}

impl Nodes {
    fn take(&mut self, event: Event<Node>) {
        match event {
            Event::Init => self.listing = Some(BTreeMap::new()),
            Event::InitApply(node) => {
                let listing = self.listing.get_or_insert_with(BTreeMap::new);
                listing.extend(seen(&node));
            }
            Event::InitDone => {
                let listed = self.listing.take().unwrap_or_default();
                let before = std::mem::replace(&mut self.nodes, listed);
                let gone: Vec<Seen> =
                    before.into_iter().filter(|(name, _)| !self.nodes.contains_key(name)).map(|(_, s)| s).collect();
                gone.iter().for_each(|node| self.release(node));
                self.complete = true;
            }
            Event::Apply(node) => self.nodes.extend(seen(&node)),
            Event::Delete(node) => {
                let name = NodeName::new(node.name_any());
                self.told.remove(&name);
                if let Some(node) = self.nodes.remove(&name) {
                    self.release(&node);
                }
            }
        }
    }

    fn release(&mut self, node: &Seen) {
        self.released.extend(node.cidrs.iter().map(|cidr| (*cidr, Instant::now())));
    }

    async fn assign(&mut self) {
        if !self.complete {
            return;
        }
        self.released.retain(|(_, at)| at.elapsed() < KEEP_RELEASED);
        let have = self.nodes.iter().map(|(name, node)| (name.clone(), node.cidrs.clone())).collect();
        let avoid: Vec<IpNet> = self.released.iter().map(|(cidr, _)| *cidr).collect();
        let plan = self.ranges.assign(&have, &avoid);
        for (name, cidrs) in plan.assigned {
            match self.write(&name, &cidrs).await {
                Ok(()) => {
                    tracing::info!(node = %name, ?cidrs, "node has its pod ranges");
                    self.told.remove(&name);
                    if let Some(node) = self.nodes.get_mut(&name) {
                        node.cidrs = cidrs;
                    }
                }
                // Somebody changed the node meanwhile: the watch brings it, and the next round sees it.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                    tracing::debug!(node = %name, "node changed meanwhile");
                }
                Err(error) => self.tell(&name, format!("its pod ranges could not be written: {error}")),
            }
        }
        for (name, reason) in plan.refused {
            self.tell(&name, reason);
        }
    }

    async fn write(&self, name: &NodeName, cidrs: &[IpNet]) -> Result<(), kube::Error> {
        let texts: Vec<String> = cidrs.iter().map(ToString::to_string).collect();
        let version = self.nodes.get(name).and_then(|node| node.version.clone());
        let patch = json!({
            "metadata": { "resourceVersion": version },
            "spec": { "podCIDR": texts.first(), "podCIDRs": texts },
        });
        self.api.patch(name.as_str(), &PatchParams::default(), &Patch::Merge(&patch)).await.map(|_| ())
    }

    /// Says what is wrong with a node, in the log and as an Event on it.
    fn tell(&mut self, name: &NodeName, reason: String) {
        if self.told.get(name) == Some(&reason) {
            return;
        }
        tracing::warn!(node = %name, reason, "node has no pod ranges");
        if let Some(node) = self.nodes.get(name) {
            let (on, type_, note) = (node.reference.clone(), EventType::Warning, reason.clone());
            let note = Note { on, type_, reason: "CIDRNotAvailable", action: "AssignPodCIDRs", note };
            if !self.events.post(note) {
                return;
            }
        }
        self.told.insert(name.clone(), reason);
    }
}

/// A node as it matters here; none if it has ranges that cannot be read, so that nothing is ever written over them.
fn seen(node: &Node) -> Option<(NodeName, Seen)> {
    let name = NodeName::new(node.name_any());
    match towpath_model::Node::try_from(node) {
        Ok(parsed) => Some((
            name,
            Seen { cidrs: parsed.pod_cidrs, reference: node.object_ref(&()), version: node.resource_version() },
        )),
        Err(error) => {
            tracing::warn!(node = %name, %error, "node left alone");
            None
        }
    }
}
