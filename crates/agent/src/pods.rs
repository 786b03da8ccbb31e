//! What the CNI server asks of the rest of the agent: who a pod is, and its device.

use std::os::fd::OwnedFd;

use k8s_openapi::api::core::v1 as core;
use kube::api::Api;
use tokio::sync::{mpsc, oneshot};
use towpath_datapath::net::mac;
use towpath_datapath::net::pod::host_device;
use towpath_datapath::{Datapath, PodSurvey};
use towpath_model::chosen::{ALLOWED, CHOICE_ANNOTATION};
use towpath_model::desired::LocalPod;
use towpath_model::{NamespacedName, NodeName, Pod, Readable, World};
use towpath_wire::cni::Attachment;

use crate::cni_server::{
    AttachRequest, Attached, Choice, DetachRequest, Device, Fetched, PlumbError, PodFacts, PodIndex, PodPlumber,
};
use crate::heard;
use crate::index::{Kind, Noun};
use crate::ipam::check::KnownPod;
use crate::reconcile::Request;
use crate::{SharedIndex, read, write};

/// Pods as the CNI server needs them.
#[derive(Clone)]
pub struct Pods {
    node: NodeName,
    client: kube::Client,
    index: SharedIndex,
    datapath: Datapath,
    requests: mpsc::Sender<Request>,
}

impl Pods {
    /// Over the agent's index, its data path and its reconcile loop.
    pub fn new(
        node: NodeName,
        client: kube::Client,
        index: SharedIndex,
        datapath: Datapath,
        requests: mpsc::Sender<Request>,
    ) -> Self {
        Self { node, client, index, datapath, requests }
    }
}

fn facts(pod: &Pod, world: &World) -> PodFacts {
    PodFacts { uid: Some(pod.uid.to_string()).filter(|uid| !uid.is_empty()), choice: choice(pod, world) }
}

/// What of a pod's wishes its namespace lets it have.
fn choice(pod: &Pod, world: &World) -> Choice {
    let Some(chosen) = &pod.chosen else { return Choice::Any };
    let namespace = &pod.name.namespace;
    if !lets_choose(world, namespace) {
        return Choice::Refused(format!(
            "pod {} asks for an address or a MAC address, and its namespace does not let its pods choose; who may, allows it: \
             kubectl annotate namespace {namespace} {CHOICE_ANNOTATION}={ALLOWED}",
            pod.name
        ));
    }
    if let Some(problem) = &chosen.problem {
        return Choice::Refused(format!("pod {}: {problem}", pod.name));
    }
    if let Some(mac) = chosen.mac
        && let Some(other) = has_mac_elsewhere(world, mac, pod)
    {
        let (asker, mac) = (&pod.name, mac::text(mac));
        return Choice::Refused(format!(
            "pod {asker}: MAC address {mac} is asked for, and pod {other} on another node has it: choose another"
        ));
    }
    Choice::These { addresses: chosen.addresses.clone(), mac: chosen.mac }
}

/// One of which nothing is known does not.
fn lets_choose(world: &World, namespace: &str) -> bool {
    world.namespaces.get(namespace).is_some_and(|namespace| namespace.pods_choose)
}

/// The pod of another node that was given this MAC address. (Those of this node are known to the data path, with or without an object.)
/// Where pods are on the link of the nodes, one of two would not be reached.
fn has_mac_elsewhere<'w>(world: &'w World, mac: [u8; 6], asker: &Pod) -> Option<&'w NamespacedName> {
    let has = |other: &&Pod| {
        other.chosen.as_ref().is_some_and(|chosen| chosen.mac == Some(mac) && chosen.problem.is_none())
            && other.node != asker.node
            && other.name != asker.name
            && other.on_pod_network()
            && !other.ips.is_empty()
            && lets_choose(world, &other.name.namespace)
    };
    world.pods.values().find(has).map(|other| &other.name)
}

impl PodIndex for Pods {
    fn lookup(&self, pod: &NamespacedName) -> Option<PodFacts> {
        let index = read(&self.index);
        let world = index.world();
        world.pods.get(pod).map(|pod| facts(pod, world))
    }

    fn of_this_node(&self) -> Option<Vec<KnownPod>> {
        let index = read(&self.index);
        if !index.is_synced() || index.recalled().contains(&Kind::Pod) {
            return None;
        }
        let here = |pod: &&Pod| pod.node.as_ref() == Some(&self.node) && pod.on_pod_network();
        let pods = index.world().pods.values().filter(here);
        Some(pods.map(|pod| KnownPod { name: pod.name.clone(), addresses: pod.ips.to_vec() }).collect())
    }

    fn policies_are_recalled(&self) -> bool {
        let index = read(&self.index);
        [Kind::NetworkPolicy, Kind::ClusterNetworkPolicy, Kind::Namespace]
            .iter()
            .any(|kind| index.recalled().contains(kind))
    }

    fn pods_choose(&self, namespace: &str) -> bool {
        lets_choose(read(&self.index).world(), namespace)
    }

    async fn fetch(&self, pod: &NamespacedName) -> Fetched {
        let api: Api<Readable<core::Pod>> = Api::namespaced(self.client.clone(), &pod.namespace);
        match api.get_opt(&pod.name).await {
            Ok(Some(object)) => {
                let version = heard::version(k8s_openapi::Metadata::metadata(&object));
                match object.object().map_err(str::to_owned).and_then(|o| Pod::parse(o).map_err(|e| e.to_string())) {
                    Ok(noun) => {
                        let facts = facts(&noun, read(&self.index).world());
                        let (index, key) = (self.index.clone(), pod.clone());
                        // The planner may hold the index for some milliseconds.
                        let enter = move || write(&index).answered_with(key, noun, version);
                        let applied = tokio::task::spawn_blocking(enter).await;
                        match applied {
                            Ok(()) => Fetched::Found(facts),
                            Err(error) => Fetched::Unreachable(error.to_string()),
                        }
                    }
                    Err(error) => Fetched::Unreachable(error),
                }
            }
            Ok(None) => Fetched::Absent,
            Err(error) => Fetched::Unreachable(error.to_string()),
        }
    }
}

impl PodPlumber for Pods {
    fn device_name(&self, attachment: &Attachment) -> String {
        host_device(attachment.container_id(), attachment.ifname())
    }

    async fn attach(&self, request: AttachRequest) -> Result<Attached, PlumbError> {
        let (reply, answer) = oneshot::channel();
        let sent = self.requests.send(Request::Attach { request: Box::new(request), reply }).await;
        sent.map_err(|_| PlumbError::Again("the agent is going down".to_owned()))?;
        answer.await.unwrap_or_else(|_| Err(PlumbError::Again("the agent is going down".to_owned())))
    }

    async fn detach(&self, request: DetachRequest) -> Result<(), PlumbError> {
        let (container_id, ifname) = (request.attachment.container_id(), request.attachment.ifname());
        self.datapath.detach_pod(container_id, ifname).await.map_err(|e| PlumbError::Failed(e.to_string()))
    }

    async fn check(&self, pod: &LocalPod, ifname: &str, netns: OwnedFd) -> Result<(), PlumbError> {
        let request =
            towpath_datapath::CheckRequest { netns, container_id: pod.container_id.clone(), ifname: ifname.to_owned() };
        self.datapath.check_pod(request).await.map_err(|e| PlumbError::Mismatch(e.to_string()))
    }

    async fn survey(&self) -> Result<PodSurvey, PlumbError> {
        self.datapath.survey_pods().await.map_err(|e| PlumbError::Failed(e.to_string()))
    }

    async fn repair(&self) -> Result<Vec<String>, PlumbError> {
        let repaired = self.datapath.repair_pods().await.map_err(|e| PlumbError::Failed(e.to_string()))?;
        for problem in &repaired.problems {
            tracing::warn!(problem, "the kernel is not as it should be and could not be repaired");
        }
        Ok(repaired.changes)
    }

    async fn list(&self) -> Result<Vec<Device>, PlumbError> {
        let pods = self.datapath.list_pods().await.map_err(|e| PlumbError::Failed(e.to_string()))?;
        Ok(pods.into_iter().map(|(pod, _)| Device { name: pod.host_device, addresses: pod.addresses }).collect())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use towpath_model::chosen::{ADDRESSES_ANNOTATION, MAC_ANNOTATION};

    use super::*;

    fn pod(name: &str, node: &str, ips: &[&str], annotations: &[(&str, &str)]) -> Pod {
        let (namespace, name) = name.split_once('/').unwrap();
        let annotations: serde_json::Map<_, _> = annotations.iter().map(|(k, v)| ((*k).to_owned(), json!(v))).collect();
        let ips: Vec<_> = ips.iter().map(|ip| json!({"ip": ip})).collect();
        let object = json!({
            "metadata": {"namespace": namespace, "name": name, "annotations": annotations},
            "spec": {"nodeName": node, "containers": []},
            "status": {"phase": "Running", "podIPs": ips},
        });
        Pod::try_from(&serde_json::from_value::<core::Pod>(object).unwrap()).unwrap()
    }

    /// Namespaces `open`, whose pods may choose, and `closed`.
    fn world(pods: Vec<Pod>) -> World {
        let namespaces =
            [("open", json!({CHOICE_ANNOTATION: ALLOWED})), ("closed", json!({}))].map(|(name, annotations)| {
                let object = json!({"metadata": {"name": name, "annotations": annotations}});
                let object: core::Namespace = serde_json::from_value(object).unwrap();
                (name.to_owned(), (&object).try_into().unwrap())
            });
        let pods = pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect();
        World { namespaces: namespaces.into(), pods, ..World::default() }
    }

    fn refused(choice: Choice) -> String {
        if let Choice::Refused(why) = choice { why } else { panic!("{choice:?}") }
    }

    #[test]
    fn the_namespace_decides_and_a_pod_that_asks_for_nothing_is_not_asked() {
        let world = world(Vec::new());
        let asks = [(ADDRESSES_ANNOTATION, "10.244.1.9")];
        let got = Choice::These { addresses: vec!["10.244.1.9".parse().unwrap()], mac: None };
        assert_eq!(choice(&pod("open/a", "n1", &[], &asks), &world), got);
        assert_eq!(choice(&pod("closed/a", "n1", &[], &[]), &world), Choice::Any);
        // Nor does the pod's own word for its namespace's help.
        let itself = [asks[0], (CHOICE_ANNOTATION, ALLOWED)];
        let calicos = [("cni.projectcalico.org/ipAddrs", r#"["10.244.1.9"]"#)];
        for (name, annotations) in
            [("closed/a", &asks[..]), ("closed/a", &itself), ("closed/a", &calicos), ("new/a", &asks)]
        {
            let why = refused(choice(&pod(name, "n1", &[], annotations), &world));
            let namespace = name.split_once('/').unwrap().0;
            assert!(why.starts_with(&format!("pod {name} asks for an address")), "{why}");
            assert!(
                why.ends_with(&format!("kubectl annotate namespace {namespace} towpath.dev/pod-addresses=chosen")),
                "{why}"
            );
        }
        let why = refused(choice(&pod("open/a", "n1", &[], &[(ADDRESSES_ANNOTATION, "nonsense")]), &world));
        assert!(why.starts_with("pod open/a: annotation towpath.dev/ip-addresses:"), "{why}");
    }

    #[test]
    fn a_mac_that_a_pod_of_another_node_was_given_is_refused_and_what_a_pod_only_says_is_not_had() {
        let asks = [(MAC_ANNOTATION, "02:00:5e:10:00:01")];
        let asker = pod("open/a", "n1", &[], &asks);
        let why = |other: Pod| choice(&asker, &world(vec![asker.clone(), other]));
        let mut given = pod("open/b", "n2", &["10.244.2.2"], &asks);
        let said = refused(why(given.clone()));
        assert!(said.contains("02:00:5e:10:00:01 is asked for, and pod open/b on another node has it"), "{said}");
        for other in [
            pod("open/b", "n1", &["10.244.1.2"], &asks),
            pod("open/a", "n2", &["10.244.2.2"], &asks),
            pod("open/b", "n2", &[], &asks),
            pod("closed/b", "n2", &["10.244.2.2"], &asks),
            pod("open/b", "n2", &["10.244.2.2"], &[(MAC_ANNOTATION, "02:00:5e:10:00:02")]),
        ] {
            assert!(matches!(why(other.clone()), Choice::These { .. }), "{other:?}");
        }
        given.phase = towpath_model::Phase::Terminated;
        assert!(matches!(why(given), Choice::These { .. }), "it has ended");
    }
}
