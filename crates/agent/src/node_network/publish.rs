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
use towpath_model::custom::{BackendName, GivenAddress, NodeNetwork, NodeNetworkSpec, NodeNetworkStatus, PeerBehind};
use towpath_model::{NamespacedName, NodeName, World};
use towpath_plan::backend::{Able, ready_for};
use tracing::{debug, info, warn};

use crate::backoff::Backoff;
use crate::cni_server::Readiness;
use crate::counts;
use crate::ipam::{Lease, LeaseStore};
use crate::modes::State;
use crate::paths::Paths;
use crate::reconcile::Progress;
use crate::udp::Carried;
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
/// As many nodes that are behind as the definition allows.
const BEHIND_MAX: usize = 64;
/// As many are named in a condition.
const NAMED_MAX: usize = 10;
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
    /// Whether its uplink bears MAC addresses of pods.
    pub bears_macs: bool,
}

/// What it is made of, as others keep it.
pub struct Sources {
    /// Whether the agent is ready.
    pub readiness: watch::Receiver<Readiness>,
    /// Who is in charge of Services and DNS.
    pub in_charge: watch::Receiver<State>,
    /// Generation of the `NetworkConfig` in force.
    pub generation: watch::Receiver<Option<i64>>,
    /// How far the node is with its backend.
    pub progress: watch::Receiver<Option<Progress>>,
    /// Which paths carry less than they have to.
    pub paths: watch::Receiver<Paths>,
    /// Whether packets are carried by way of user space.
    pub carried: watch::Receiver<Carried>,
}

/// Keeps the object as it should be, until it is dropped.
pub struct Publisher {
    client: kube::Client,
    facts: Facts,
    leases: Arc<LeaseStore>,
    index: SharedIndex,
    sources: Sources,
    written: Option<NodeNetworkStatus>,
    /// As they were last, by type.
    conditions: BTreeMap<&'static str, Condition>,
    backoff: Backoff,
    complained: String,
}

impl Publisher {
    /// Over what it reads.
    pub fn new(
        client: kube::Client,
        facts: Facts,
        leases: Arc<LeaseStore>,
        index: SharedIndex,
        sources: Sources,
    ) -> Self {
        Self {
            client,
            facts,
            leases,
            index,
            sources,
            written: None,
            conditions: BTreeMap::new(),
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
                        changed = self.sources.readiness.changed() => if changed.is_err() { return },
                        changed = self.sources.in_charge.changed() => if changed.is_err() { return },
                        changed = self.sources.generation.changed() => if changed.is_err() { return },
                        changed = self.sources.progress.changed() => if changed.is_err() { return },
                        changed = self.sources.paths.changed() => if changed.is_err() { return },
                        changed = self.sources.carried.changed() => if changed.is_err() { return },
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
        let readiness = self.sources.readiness.borrow_and_update().clone();
        // Until it is ready, it is as the run before left it.
        let progress = self.sources.progress.borrow_and_update().clone().filter(|_| readiness == Readiness::Ready);
        let paths = self.sources.paths.borrow_and_update().clone();
        let conditions = [ready(&readiness), settled(&readiness, progress.as_ref()), paths_fit(paths.as_deref())];
        let conditions = conditions.map(|said| self.condition(said)).to_vec();
        let in_charge = self.sources.in_charge.borrow_and_update().in_charge;
        // Until the kernel holds what this run wants it goes on as the run before: what that one said of itself still holds, but that it
        // takes what this one will not.
        let own = self.facts.backend;
        let carried = self.sources.carried.borrow_and_update().clone();
        let takes = |udp| ready_for(own, Able { ipip: self.facts.takes_ipip, udp, macs: self.facts.bears_macs });
        let (backend, receive_ready) = match &readiness {
            Readiness::Ready => (Some(own), takes(carried.is_yes())),
            Readiness::Starting(_) => {
                let before = read(&self.index).backends().get(&self.facts.node).cloned().unwrap_or_default();
                (before.sends, before.receives.intersection(&takes(carried.may_be())).copied().collect())
            }
        };
        let receive_ready = receive_ready.into_iter().collect();
        NodeNetworkStatus {
            service_proxy: in_charge.map(|who| who.proxy.name().to_owned()),
            dns: in_charge.map(|who| who.dns.name().to_owned()),
            backend,
            receive_ready,
            pod_mtu: progress.as_ref().map(|progress| progress.pod_mtu),
            peers_behind: progress.iter().flat_map(behind).collect(),
            peers_behind_count: progress.map(|progress| u32::try_from(progress.behind.len()).unwrap_or(u32::MAX)),
            network_config_generation: *self.sources.generation.borrow_and_update(),
            agent_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            pods,
            conditions,
        }
    }

    /// A condition; its time is that of the last change of its status.
    fn condition(&mut self, Said { kind, status, reason, message }: Said) -> Condition {
        let before = self.conditions.get(kind).filter(|before| before.status == status);
        let condition = Condition {
            type_: kind.to_owned(),
            status: status.to_owned(),
            reason: reason.to_owned(),
            message,
            last_transition_time: before
                .map_or_else(|| Time(Timestamp::now()), |before| before.last_transition_time.clone()),
            observed_generation: None,
        };
        self.conditions.insert(kind, condition.clone());
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

/// What a condition says.
struct Said {
    kind: &'static str,
    status: &'static str,
    reason: &'static str,
    message: String,
}

fn ready(readiness: &Readiness) -> Said {
    let (status, reason, message) = match readiness {
        Readiness::Ready => ("True", "Synced", "the first full sync is in the kernel".to_owned()),
        Readiness::Starting(why) => ("False", "Starting", why.clone()),
    };
    Said { kind: "Ready", status, reason, message }
}

/// Whether nothing more of a change of backend is to come: who is behind is so for a reason that does not pass, and pods have the MTU that fits.
fn settled(readiness: &Readiness, progress: Option<&Progress>) -> Said {
    let (status, reason, message) = match (readiness, progress) {
        (Readiness::Starting(_), _) => ("False", "Starting", "the agent is starting".to_owned()),
        (Readiness::Ready, None) => ("False", "Starting", "the agent has just started".to_owned()),
        (Readiness::Ready, Some(progress)) => {
            let Progress { backend, peers, behind, pod_mtu, mtu_waits } = progress;
            let mut message = format!(
                "packets to {} of {peers} nodes go by {}",
                peers.saturating_sub(behind.len()),
                backend.as_str()
            );
            for one in behind.iter().take(NAMED_MAX) {
                message.push_str(&format!("; to {} by {}: it {}", one.node, one.by.as_str(), one.why.in_words()));
            }
            if behind.len() > NAMED_MAX {
                message.push_str(&format!("; and {} more", behind.len() - NAMED_MAX));
            }
            message.push_str(&format!("; pods have MTU {pod_mtu}"));
            if *mtu_waits {
                message.push_str(", and more soon");
            }
            let passes = behind.iter().any(|one| one.why.passes()) || *mtu_waits;
            match (passes, behind.is_empty()) {
                (true, _) => ("False", "Changing", message),
                (false, true) => ("True", "AllNodes", message),
                (false, false) => ("True", "NotAllNodes", message),
            }
        }
    };
    Said { kind: "Settled", status, reason, message }
}

/// Whether what pods may send fits the paths to the other nodes.
fn paths_fit(paths: Option<&[crate::paths::SmallPath]>) -> Said {
    let (status, reason, message) = match paths {
        None => ("Unknown", "NotTried", "the paths to the other nodes were not tried yet".to_owned()),
        Some([]) => ("True", "Tried", "no path to a node that answers echoes carries less than it has to".to_owned()),
        Some(small) => {
            let mut words: Vec<String> = small.iter().take(NAMED_MAX).map(|path| path.in_words()).collect();
            words.extend((small.len() > NAMED_MAX).then(|| format!("and {} more", small.len() - NAMED_MAX)));
            ("False", "TooSmall", words.join("; "))
        }
    };
    Said { kind: "PathsFit", status, reason, message }
}

fn behind(progress: &Progress) -> impl Iterator<Item = PeerBehind> + '_ {
    progress.behind.iter().take(BEHIND_MAX).map(|one| PeerBehind {
        node: one.node.to_string(),
        backend: one.by.as_str().to_owned(),
        reason: one.why.reason().to_owned(),
    })
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
    fn it_is_settled_when_what_is_left_does_not_pass() {
        use towpath_plan::backend::{Behind, Why};
        let behind = |why| Behind { node: NodeName::new("n2"), by: BackendName::Vxlan, why };
        let says = |behind: Vec<Behind>, mtu_waits| {
            let progress = Progress { backend: BackendName::HostGw, peers: 3, behind, pod_mtu: 1450, mtu_waits };
            settled(&Readiness::Ready, Some(&progress))
        };
        let outcome = |said: Said| (said.status, said.reason);
        assert_eq!(outcome(says(vec![], false)), ("True", "AllNodes"));
        assert_eq!(outcome(says(vec![], true)), ("False", "Changing"), "pods are to have more");
        assert_eq!(outcome(says(vec![behind(Why::BeyondRouter)], false)), ("True", "NotAllNodes"));
        assert_eq!(outcome(says(vec![behind(Why::BeyondRouter), behind(Why::NotReady)], false)), ("False", "Changing"));
        assert_eq!(outcome(settled(&Readiness::Starting(String::new()), None)), ("False", "Starting"));
        let said = says(vec![behind(Why::BeyondRouter); 12], false).message;
        assert!(said.contains("n2 by vxlan: it is beyond a router") && said.contains("and 2 more"), "{said}");
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
