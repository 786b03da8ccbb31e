//! What the agent writes on its node's object, against an API server over TLS.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

mod cluster;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use towpath_agent::node_ready::{STARTUP_TAINT, announce};
use towpath_model::NodeName;

use cluster::cluster;

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_node_loses_the_startup_taint_and_nothing_else() {
    let cluster = cluster().await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let taint = |key: &str, effect: &str| json!({"key": key, "effect": effect});
    let taints = [taint("a", "NoSchedule"), taint(STARTUP_TAINT, "NoSchedule"), taint(STARTUP_TAINT, "NoExecute")];
    let object = json!({"metadata": {"name": "n1"}, "spec": {"taints": taints}});
    nodes.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    let others = json!({"status": {"conditions": [
        {"type": "Ready", "status": "True", "reason": "KubeletReady"},
        {"type": "NetworkUnavailable", "status": "True", "reason": "NoRouteCreated"},
    ]}});
    nodes.patch_status("n1", &PatchParams::default(), &Patch::Merge(others)).await.unwrap();

    announce(&cluster.client, &NodeName::new("n1")).await.unwrap();

    let node = nodes.get("n1").await.unwrap();
    let keys: Vec<String> = node.spec.unwrap().taints.unwrap_or_default().into_iter().map(|t| t.key).collect();
    assert_eq!(keys, ["a"]);
    let conditions = node.status.unwrap().conditions.unwrap();
    let status = |kind: &str| conditions.iter().find(|c| c.type_ == kind).map(|c| c.status.clone());
    assert_eq!(status("NetworkUnavailable").as_deref(), Some("False"));
    assert_eq!(status("Ready").as_deref(), Some("True"), "kubelet's condition is kubelet's");
    assert_eq!(conditions.len(), 2);
    // Saying it again changes nothing more.
    announce(&cluster.client, &NodeName::new("n1")).await.unwrap();
}
