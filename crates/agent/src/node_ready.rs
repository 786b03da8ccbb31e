//! What this node's object says of its network: the condition `NetworkUnavailable`, and the startup taint.
//!
//! Who wants no pod on a node before its network works registers the node with the taint [`STARTUP_TAINT`] (kubelet's
//! `--register-with-taints`); it is taken away once, when the agent is ready, and never put back: a node whose agent restarts
//! goes on as before. The condition is what schedulers of cloud providers wait for; no other field of the node is touched.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Node, Taint};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use towpath_model::{NodeName, Readable};
use tracing::{info, warn};

use crate::backoff::Backoff;
use crate::cni_server::Readiness;

/// The taint's key; its effect is the operator's choice.
pub const STARTUP_TAINT: &str = "towpath.dev/agent-not-ready";
/// The node condition that says whether there is a pod network, and why it is false when we have said so.
const CONDITION: &str = "NetworkUnavailable";
const REASON: &str = "TowpathIsUp";
/// After a conflict the node is read again.
const AGAIN: Duration = Duration::from_millis(100);
/// Who may not write its node asks again so seldom.
const FORBIDDEN_AGAIN: Duration = Duration::from_secs(300);

/// Waits until this node's network is ready and then says so, until the API server has taken it.
pub async fn announce_when_ready(client: kube::Client, node: NodeName, mut readiness: watch::Receiver<Readiness>) {
    if readiness.wait_for(|state| *state == Readiness::Ready).await.is_err() {
        return;
    }
    let mut backoff = Backoff::default();
    loop {
        let delay = match announce(&client, &node).await {
            Ok(()) => return,
            Err(kube::Error::Api(status)) if status.code == 403 => {
                warn!(%node, reason = status.message, "may not say on the node's object that its network is ready; give \
                    the agent's role get and patch of nodes, and patch of nodes/status");
                FORBIDDEN_AGAIN
            }
            Err(error) => {
                warn!(%node, %error, "could not say on the node's object that its network is ready; trying again");
                backoff.failed()
            }
        };
        tokio::time::sleep(delay).await;
    }
}

/// Takes the startup taint away and sets the condition; one does not wait for the other.
///
/// # Errors
/// The API server does not answer, or refuses one of them.
pub async fn announce(client: &kube::Client, node: &NodeName) -> Result<(), kube::Error> {
    let nodes: Api<Readable<Node>> = Api::all(client.clone());
    let untainted = untaint(&nodes, node).await;
    set_condition(&nodes, node).await.and(untainted)
}

async fn untaint(nodes: &Api<Readable<Node>>, node: &NodeName) -> Result<(), kube::Error> {
    while let Some(patch) = without_startup_taint(&read(nodes, node).await?) {
        match nodes.patch(node.as_str(), &PatchParams::default(), &Patch::Merge(patch)).await {
            Ok(_) => info!(%node, taint = STARTUP_TAINT, "the node's network is ready: startup taint removed"),
            Err(kube::Error::Api(status)) if status.code == 409 => tokio::time::sleep(AGAIN).await,
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

async fn set_condition(nodes: &Api<Readable<Node>>, node: &NodeName) -> Result<(), kube::Error> {
    if is_said(&read(nodes, node).await?) {
        return Ok(());
    }
    let now = k8s_openapi::jiff::Timestamp::now().to_string();
    // A strategic merge keeps every other condition: the list is merged by type.
    let condition = json!({
        "type": CONDITION, "status": "False", "reason": REASON,
        "message": "Towpath carries this node's pod network", "lastHeartbeatTime": now, "lastTransitionTime": now,
    });
    let status = json!({"status": {"conditions": [condition]}});
    nodes.patch_status(node.as_str(), &PatchParams::default(), &Patch::Strategic(status)).await.map(drop)
}

/// The node; one that does not fit its type is an error like any other, and is read again.
async fn read(nodes: &Api<Readable<Node>>, node: &NodeName) -> Result<Node, kube::Error> {
    let object = nodes.get(node.as_str()).await?.into_object();
    object.map_err(|reason| kube::Error::SerdeError(serde::de::Error::custom(reason)))
}

/// Whether an earlier start said so: the time of the transition is then that one's.
fn is_said(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == CONDITION && c.status == "False" && c.reason.as_deref() == Some(REASON))
}

/// The patch that takes the startup taint away, if the node has it. It holds for the node as it was read and no other: the
/// list of taints can only be replaced as a whole.
fn without_startup_taint(node: &Node) -> Option<Value> {
    let taints: &Vec<Taint> = node.spec.as_ref()?.taints.as_ref()?;
    let others: Vec<&Taint> = taints.iter().filter(|taint| taint.key != STARTUP_TAINT).collect();
    (others.len() < taints.len()).then(|| {
        let version = &node.metadata.resource_version;
        json!({"metadata": {"resourceVersion": version}, "spec": {"taints": others}})
    })
}
