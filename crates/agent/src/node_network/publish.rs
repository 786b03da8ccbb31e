//! This node's own `NodeNetwork`: written when something in it changed, at once and in one piece, however many ADDs came together.
//!
//! What is written follows from the leases, the index and the agent's readiness at that moment, so a write that failed is made up for by the next.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, OwnerReference, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use towpath_model::custom::{BackendName, GivenAddress, NodeNetwork, NodeNetworkSpec, NodeNetworkStatus};
use towpath_model::{NamespacedName, NodeName, World};
use towpath_plan::backend::ready_for;
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::cni_server::Readiness;
use crate::counts;
use crate::ipam::{Lease, LeaseStore};
use crate::modes::State;
use crate::{SharedIndex, read};

/// Field manager of what is written (server-side apply).
const MANAGER: &str = "towpath-agent";
/// ADDs that come within it share a write.
const WINDOW: Duration = Duration::from_millis(2);
/// Entries that have done their work go, and an object that somebody else deleted comes back, within this time.
const RECHECK: Duration = Duration::from_secs(30);
/// Where the kind is not installed, it is looked for again after this time.
const ABSENT: Duration = Duration::from_secs(60);

/// Who may not write asks again so seldom.
const FORBIDDEN: Duration = Duration::from_secs(300);
/// As many entries as the definition allows; a node has far fewer pods that nobody else has heard of.
const ENTRIES_MAX: usize = 2048;
/// What is noted of it for the status.
const NOTE: &str = "NodeNetwork";

/// When to look again.
enum Next {
    /// When something changed, or after [`RECHECK`].
    OnChange,
    /// Whatever changes, not before.
    NotBefore(Instant),
}

/// What does not change while the agent runs.
#[derive(Clone, Debug)]
pub struct Facts {
    /// This node.
    pub node: NodeName,
    /// What it offers.
    pub spec: NodeNetworkSpec,
    /// Backend that it sends by.
    pub backend: BackendName,
    /// Whether its kernel takes packets out of IP headers.
    pub takes_ipip: bool,
}

/// Keeps the object as it should be, until it is dropped.
pub struct Publisher {
    client: kube::Client,
    facts: Facts,
    leases: Arc<LeaseStore>,
    index: SharedIndex,
    readiness: watch::Receiver<Readiness>,
    in_charge: watch::Receiver<State>,
    generation: watch::Receiver<Option<i64>>,
    written: Option<NodeNetworkStatus>,
    condition: Option<Condition>,
    backoff: Backoff,
    complained: String,
}

impl Publisher {
    /// Over what it reads; `generation` is that of the `NetworkConfig` in force.
    pub fn new(
        client: kube::Client,
        facts: Facts,
        leases: Arc<LeaseStore>,
        index: SharedIndex,
        readiness: watch::Receiver<Readiness>,
        in_charge: watch::Receiver<State>,
        generation: watch::Receiver<Option<i64>>,
    ) -> Self {
        Self {
            client,
            facts,
            leases,
            index,
            readiness,
            in_charge,
            generation,
            written: None,
            condition: None,
            backoff: Backoff::default(),
            complained: String::new(),
        }
    }

    /// Runs for ever.
    pub async fn run(mut self) {
        let mut leases = self.leases.subscribe();
        loop {
            match self.bring_up_to_date().await {
                Next::NotBefore(at) => sleep_until(at).await,
                Next::OnChange => {
                    tokio::select! {
                        changed = leases.changed() => if changed.is_err() { return },
                        changed = self.readiness.changed() => if changed.is_err() { return },
                        changed = self.in_charge.changed() => if changed.is_err() { return },
                        changed = self.generation.changed() => if changed.is_err() { return },
                        () = sleep(RECHECK) => continue,
                    }
                    sleep(WINDOW).await;
                }
            }
        }
    }

    /// Writes if there is something to write.
    async fn bring_up_to_date(&mut self) -> Next {
        let wanted = self.wanted();
        let there = read(&self.index).given().contains_key(&self.facts.node);
        if self.written.as_ref() == Some(&wanted) && there {
            return Next::OnChange;
        }
        let error = match self.write(&wanted).await {
            Ok(()) => {
                if !self.complained.is_empty() {
                    info!("this node's NodeNetwork is written again");
                    self.complained.clear();
                }
                counts::note(NOTE, None);
                self.written = Some(wanted);
                self.backoff.worked();
                return Next::OnChange;
            }
            Err(error) => error,
        };
        let was_there = self.written.take().is_some();
        let delay = match &error {
            // Somebody deleted it: it is made again at once.
            kube::Error::Api(status) if status.code == 404 && was_there => Duration::ZERO,
            kube::Error::Api(status) if status.code == 404 => {
                counts::note(
                    NOTE,
                    Some(
                        "the API server does not know the kind NodeNetwork: apply Towpath's manifests (towpath install); until \
                         then peers learn of this node's new pods by their status, seconds late"
                            .to_owned(),
                    ),
                );
                debug!(%status, "NodeNetwork is not installed: peers know this node's pods by their status");
                return Next::NotBefore(Instant::now() + ABSENT);
            }
            kube::Error::Api(status) if status.code == 403 => FORBIDDEN,
            _ => self.backoff.failed(),
        };
        let text = error.to_string();
        if self.complained != text {
            warn!(
                error = text,
                "could not write this node's NodeNetwork; peers learn of new pods by their status until then"
            );
            counts::note(NOTE, Some(format!("this node's NodeNetwork cannot be written: {text}")));
            self.complained = text;
        }
        Next::NotBefore(Instant::now() + delay)
    }

    fn wanted(&mut self) -> NodeNetworkStatus {
        let leases = self.leases.leases();
        let pods = unreported(&leases, read(&self.index).world());
        let condition = self.ready_condition();
        let in_charge = self.in_charge.borrow_and_update().in_charge;
        // Until the kernel holds what this run wants it goes on as the run before: what that one said of itself still holds, but that it
        // takes what this one will not.
        let own = self.facts.backend;
        let (backend, receive_ready) = match &*self.readiness.borrow() {
            Readiness::Ready => (Some(own), ready_for(own, self.facts.takes_ipip)),
            Readiness::Starting(_) => {
                let before = read(&self.index).backends().get(&self.facts.node).cloned().unwrap_or_default();
                (before.sends, before.receives.intersection(&ready_for(own, self.facts.takes_ipip)).copied().collect())
            }
        };
        let receive_ready = receive_ready.into_iter().collect();
        NodeNetworkStatus {
            service_proxy: in_charge.map(|who| who.proxy.name().to_owned()),
            dns: in_charge.map(|who| who.dns.name().to_owned()),
            backend,
            receive_ready,
            network_config_generation: *self.generation.borrow_and_update(),
            agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            pods,
            conditions: vec![condition],
        }
    }

    /// The `Ready` condition; its time is that of the last change from or to true.
    fn ready_condition(&mut self) -> Condition {
        let (status, reason, message) = match &*self.readiness.borrow_and_update() {
            Readiness::Ready => ("True", "Synced", "the first full sync is in the kernel".to_owned()),
            Readiness::Starting(why) => ("False", "Starting", why.clone()),
        };
        let before = self.condition.take().filter(|before| before.status == status);
        let condition = Condition {
            type_: "Ready".to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: before.map_or_else(|| Time(Timestamp::now()), |before| before.last_transition_time),
            observed_generation: None,
        };
        self.condition = Some(condition.clone());
        condition
    }

    async fn write(&self, status: &NodeNetworkStatus) -> Result<(), kube::Error> {
        let api: Api<NodeNetwork> = Api::all(self.client.clone());
        let name = self.facts.node.as_str();
        let parameters = PatchParams::apply(MANAGER).force();
        let mut object = NodeNetwork::new(name, self.facts.spec.clone());
        if self.written.is_none() {
            object.metadata.owner_references = self.owner().await?.map(|owner| vec![owner]);
            api.patch(name, &parameters, &Patch::Apply(&object)).await?;
            object.metadata.owner_references = None;
        }
        let value = serde_json::json!({
            "apiVersion": object.api_version, "kind": object.kind, "metadata": {"name": name}, "status": status,
        });
        api.patch_status(name, &parameters, &Patch::Apply(&value)).await.map(drop)
    }

    /// The node's own object, with which this one goes.
    async fn owner(&self) -> Result<Option<OwnerReference>, kube::Error> {
        let api: Api<core::Node> = Api::all(self.client.clone());
        let node = api.get_metadata_opt(self.facts.node.as_str()).await?;
        Ok(node.and_then(|node| node.metadata.uid).map(|uid| OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: self.facts.node.as_str().to_owned(),
            uid,
            ..OwnerReference::default()
        }))
    }
}

/// Pods that hold an address which their status does not say yet, each with the addresses of the lease of its present life.
fn unreported(leases: &[Lease], world: &World) -> Vec<GivenAddress> {
    let mut given: BTreeMap<NamespacedName, GivenAddress> = BTreeMap::new();
    for lease in leases {
        let Some(name) = &lease.pod else { continue };
        let pod = world.pods.get(name);
        let former = pod.is_some_and(|pod| pod.uid.is_other_than(&lease.uid.as_str().into()));
        if former || pod.is_some_and(|pod| lease.addresses.iter().all(|address| pod.ips.contains(address))) {
            continue;
        }
        let entry = GivenAddress {
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            uid: lease.uid.clone(),
            ips: lease.addresses.iter().map(ToString::to_string).collect(),
        };
        given.insert(name.clone(), entry);
    }
    given.into_values().take(ENTRIES_MAX).collect()
}

#[cfg(test)]
mod tests {
    use towpath_model::Pod;
    use towpath_wire::cni::Attachment;

    use super::*;

    fn lease(container: &str, pod: Option<&str>, uid: &str, ip: &str) -> Lease {
        Lease {
            owner: Attachment::new(container, "eth0").unwrap(),
            network: "towpath".to_owned(),
            pod: pod.map(|name| NamespacedName::new("a", name)),
            uid: uid.to_owned(),
            netns: String::new(),
            addresses: vec![ip.parse().unwrap()],
            attached: None,
        }
    }

    fn world(pods: &[(&str, &str, &str)]) -> World {
        let mut world = World::default();
        for (name, uid, ip) in pods {
            let ips: Vec<_> =
                Some(*ip).filter(|ip| !ip.is_empty()).map(|ip| serde_json::json!({"ip": ip})).into_iter().collect();
            let object = serde_json::json!({
                "metadata": {"namespace": "a", "name": name, "uid": uid},
                "spec": {"nodeName": "n1", "containers": []}, "status": {"podIPs": ips},
            });
            let pod = Pod::try_from(&serde_json::from_value::<core::Pod>(object).unwrap()).unwrap();
            world.pods.insert(pod.name.clone(), pod);
        }
        world
    }

    fn names(given: &[GivenAddress]) -> Vec<(&str, &str)> {
        given.iter().map(|g| (g.name.as_str(), g.ips[0].as_str())).collect()
    }

    #[test]
    fn what_the_status_says_is_not_said_again() {
        let leases = [lease("c1", Some("new"), "u1", "10.244.1.2"), lease("c2", Some("old"), "u2", "10.244.1.3")];
        let world = world(&[("new", "u1", ""), ("old", "u2", "10.244.1.3")]);
        assert_eq!(names(&unreported(&leases, &world)), [("new", "10.244.1.2")]);
    }

    #[test]
    fn a_pod_that_the_watch_has_not_brought_yet_is_said() {
        let leases = [lease("c1", Some("unheard"), "u1", "10.244.1.2"), lease("c2", None, "", "10.244.1.4")];
        assert_eq!(names(&unreported(&leases, &World::default())), [("unheard", "10.244.1.2")]);
    }

    #[test]
    fn of_two_sandboxes_of_one_name_the_present_life_counts() {
        let leases = [lease("c1", Some("web"), "now", "10.244.1.2"), lease("c2", Some("web"), "before", "10.244.1.3")];
        assert_eq!(names(&unreported(&leases, &world(&[("web", "now", "")]))), [("web", "10.244.1.2")]);
    }
}
