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
use towpath_plan::added_ranges::{self, Within};
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
    node: towpath_model::Node,
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
            Event::Apply(node) => {
                let Some((name, now)) = seen(&node) else { return };
                let wanted = now.node.added.wanted.clone();
                let before = self.nodes.insert(name, now);
                // Its pods may have addresses of what is taken from it now.
                let left = before.into_iter().flat_map(|before| before.node.added.wanted);
                self.released.extend(left.filter(|range| !wanted.contains(range)).map(|range| (range, Instant::now())));
            }
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
        self.released
            .extend(node.node.pod_cidrs.iter().chain(&node.node.added.wanted).map(|cidr| (*cidr, Instant::now())));
    }

    async fn assign(&mut self) {
        if !self.complete {
            return;
        }
        self.released.retain(|(_, at)| at.elapsed() < KEEP_RELEASED);
        let have = self.nodes.iter().map(|(name, seen)| (name.clone(), seen.node.pod_cidrs.clone())).collect();
        let mut avoid = added(self.nodes.values().map(|seen| &seen.node), &self.ranges);
        avoid.extend(self.released.iter().map(|(cidr, _)| *cidr));
        let plan = self.ranges.assign(&have, &avoid);
        for (name, cidrs) in plan.assigned {
            match self.write(&name, &cidrs).await {
                Ok(()) => {
                    tracing::info!(node = %name, ?cidrs, "node has its pod ranges");
                    self.told.remove(&name);
                    if let Some(node) = self.nodes.get_mut(&name) {
                        node.node.pod_cidrs = cidrs;
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

/// What annotations add to nodes, and nobody else is to get. A wish that agents refuse keeps nothing from anybody.
fn added<'n>(nodes: impl Iterator<Item = &'n towpath_model::Node> + Clone, ranges: &ClusterRanges) -> Vec<IpNet> {
    if nodes.clone().all(|node| node.added.wanted.is_empty()) {
        return Vec::new();
    }
    let nodes = nodes.map(|node| (node.name.clone(), node.clone())).collect();
    let within = Within::Cluster { cluster: ranges.ranges(), services: Vec::new() };
    added_ranges::settle(&nodes, &BTreeMap::new(), &within).in_force.into_values().flatten().collect()
}

/// A node as it matters here; none if it has ranges that cannot be read, so that nothing is ever written over them.
fn seen(node: &Node) -> Option<(NodeName, Seen)> {
    let name = NodeName::new(node.name_any());
    match towpath_model::Node::try_from(node) {
        Ok(parsed) => Some((
            name,
            Seen {
                node: towpath_model::Node { labels: Default::default(), ..parsed },
                reference: node.object_ref(&()),
                version: node.resource_version(),
            },
        )),
        Err(error) => {
            tracing::warn!(node = %name, %error, "node left alone");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_annotations_add_is_given_to_nobody_else_and_who_asks_for_too_much_keeps_nothing_from_anybody() {
        let node = |name: &str, assigned: &[&str], wanted: &str| {
            let object = json!({
                "metadata": {"name": name, "annotations": {"towpath.dev/pod-cidrs": wanted}},
                "spec": {"podCIDRs": assigned},
            });
            seen(&serde_json::from_value(object).unwrap()).unwrap().1.node
        };
        let ranges = ClusterRanges::new(&["10.244.0.0/16".parse().unwrap()], 24, 64).unwrap();
        let given = |nodes: &[towpath_model::Node]| {
            let have = nodes.iter().map(|node| (node.name.clone(), node.pod_cidrs.clone())).collect();
            let assigned = ranges.assign(&have, &added(nodes.iter(), &ranges)).assigned;
            assigned[&NodeName::new("new")].iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        let first = |wanted| node("n1", &["10.244.0.0/24"], wanted);
        // One that has none yet gets its own, whatever it asks for beside it.
        let new = || node("new", &[], "10.244.9.0/24");
        assert_eq!(given(&[first(""), new()]), ["10.244.1.0/24"]);
        assert_eq!(given(&[first("10.244.1.0/24,10.244.2.128/25"), new()]), ["10.244.3.0/24"]);
        assert_eq!(given(&[first("10.244.0.0/16,10.0.0.0/8,10.245.0.0/24"), new()]), ["10.244.1.0/24"]);
    }
}
