//! What the CNI server asks of the rest of the agent: who a pod is, and its device.

use std::os::fd::OwnedFd;

use k8s_openapi::api::core::v1 as core;
use kube::api::Api;
use tokio::sync::{mpsc, oneshot};
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
    if !world.namespaces.get(namespace).is_some_and(|namespace| namespace.pods_choose) {
        return Choice::Refused(format!(
            "pod {} asks for an address or a MAC address, and its namespace does not let its pods choose; who may, allows it: \
             kubectl annotate namespace {namespace} {CHOICE_ANNOTATION}={ALLOWED}",
            pod.name
        ));
    }
    match &chosen.problem {
        Some(problem) => Choice::Refused(format!("pod {}: {problem}", pod.name)),
        None => Choice::These { addresses: chosen.addresses.clone(), mac: chosen.mac },
    }
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
