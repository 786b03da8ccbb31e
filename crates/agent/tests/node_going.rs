//! Whether a node is about to leave, against an API server over TLS.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

mod cluster;

use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::watch;
use towpath_agent::node_going;
use towpath_model::NodeName;

use cluster::cluster;

async fn becomes(going: &mut watch::Receiver<bool>, wanted: bool, why: &str) {
    let becomes = tokio::time::timeout(Duration::from_secs(20), going.wait_for(|going| *going == wanted));
    becomes.await.unwrap_or_else(|_| panic!("{why}")).unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_goes_when_the_autoscaler_says_so_or_its_object_is_being_deleted() {
    let cluster = cluster().await;
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    let object = json!({"metadata": {"name": "n1", "finalizers": ["test/stays"]}});
    nodes.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    let patch = async |patch: Value| {
        nodes.patch("n1", &PatchParams::default(), &Patch::Merge(patch)).await.unwrap();
    };
    let tainted = |key: &str| json!({"spec": {"taints": [{"key": key, "effect": "NoSchedule"}]}});
    let mut going = node_going::watch(cluster.client.clone(), &NodeName::new("n1"));
    assert!(!*going.borrow());
    patch(tainted("ToBeDeletedByClusterAutoscaler")).await;
    becomes(&mut going, true, "the autoscaler takes it").await;
    patch(tainted("another")).await;
    becomes(&mut going, false, "the autoscaler does not").await;
    nodes.delete("n1", &DeleteParams::default()).await.unwrap();
    becomes(&mut going, true, "it is being deleted").await;
}
