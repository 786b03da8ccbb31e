//! The agent's watches against an API server over TLS.
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

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, PostParams};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use towpath_agent::index::Index;
use towpath_agent::watch::{Update, watch_all};
use towpath_model::NamespacedName;

use cluster::cluster;

async fn create(services: &Api<Service>, name: &str) {
    let object = json!({"metadata": {"name": name}, "spec": {"ports": [{"port": 80}]}});
    services.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
}

/// Sets a status as a Go client does whose times are zero.
async fn set_a_condition_without_time(client: &kube::Client, name: &str) {
    let path = format!("/api/v1/namespaces/default/services/{name}/status");
    let condition = json!({"type": "Odd", "status": "True", "reason": "R", "message": "", "lastTransitionTime": null});
    let patch = json!([{"op": "add", "path": "/status", "value": {"conditions": [condition], "loadBalancer": {}}}]);
    let request = http::Request::patch(&path)
        .header("content-type", "application/json-patch+json")
        .body(serde_json::to_vec(&patch).unwrap())
        .unwrap();
    let answer: Value = client.request(request).await.unwrap();
    // etcd keeps the null, this API server leaves the field out: to a reader whose type must have it both are the same.
    let kept = answer.pointer("/status/conditions/0").expect("the condition was not stored");
    assert!(kept.get("lastTransitionTime").is_none_or(Value::is_null), "this test shows nothing: {answer}");
    assert!(serde_json::from_value::<Service>(answer).is_err(), "else the type is not needed any more");
}

async fn until(index: &mut Index, updates: &mut mpsc::Receiver<Update>, what: &str, holds: impl Fn(&Index) -> bool) {
    while !holds(index) {
        let update = timeout(Duration::from_secs(10), updates.recv()).await;
        update.unwrap_or_else(|_| panic!("{what}: nothing more came")).expect("the watches ended")(index);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn one_odd_object_ends_neither_a_list_nor_a_watch() {
    let cluster = cluster().await;
    let services: Api<Service> = Api::namespaced(cluster.client.clone(), "default");
    let known = |index: &Index, name: &str| index.world().services.contains_key(&NamespacedName::new("default", name));
    create(&services, "listed").await;
    set_a_condition_without_time(&cluster.client, "listed").await;

    let (sender, mut updates) = mpsc::channel(64);
    let _watches = watch_all(&cluster.client, &sender);
    let mut index = Index::default();
    until(&mut index, &mut updates, "the first lists", Index::is_synced).await;
    assert!(known(&index, "listed"), "the odd one is a Service all the same");

    create(&services, "watched").await;
    set_a_condition_without_time(&cluster.client, "watched").await;
    create(&services, "after").await;
    until(&mut index, &mut updates, "the watch after an odd object", |index| known(index, "after")).await;
    assert!(known(&index, "watched"));
}
