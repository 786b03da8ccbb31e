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

use std::time::{Duration, Instant};

use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, DeleteParams, PostParams};
use serde_json::{Value, json};
use tokio::sync::mpsc;
use tokio::time::timeout;
use towpath_agent::index::Index;
use towpath_agent::watch::{Update, watch_all};
use towpath_model::NamespacedName;

use cluster::cluster;
use cluster::faults::{Fault, Faults};

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

/// Watches that meet these faults, from the start until everything is listed.
async fn through(cluster: &cluster::Cluster, faults: &Faults) -> (Index, mpsc::Receiver<Update>, impl Sized) {
    let (sender, mut updates) = mpsc::channel(64);
    let watches = watch_all(&cluster.client_with(faults), &sender);
    let mut index = Index::default();
    until(&mut index, &mut updates, "the first lists", Index::is_synced).await;
    (index, updates, watches)
}

fn names(index: &Index) -> Vec<&str> {
    index.world().services.keys().map(|key| key.name.as_str()).filter(|name| *name != "kubernetes").collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_before_a_410_is_listed_again_and_what_is_gone_goes() {
    for (what, fault) in [
        ("an event of the watch", Fault::Instead(
            Duration::from_secs(1),
            r#"{"type":"ERROR","object":{"kind":"Status","apiVersion":"v1","status":"Failure","message":"too old resource version","reason":"Expired","code":410}}"#.to_owned() + "\n",
        )),
        ("the answer to the watch", Fault::Status(410, None)),
    ] {
        let cluster = cluster().await;
        let services: Api<Service> = Api::namespaced(cluster.client.clone(), "default");
        create(&services, "kept").await;
        create(&services, "gone").await;
        let faults = Faults::default();
        // The watch that would have brought these two changes sees neither.
        faults.add("services", true, 1, fault);
        let (mut index, mut updates, _watches) = through(&cluster, &faults).await;
        services.delete("gone", &DeleteParams::default()).await.unwrap();
        create(&services, "new").await;
        until(&mut index, &mut updates, what, |index| names(index) == ["kept", "new"]).await;
        assert!(faults.lists("services") >= 2, "{what}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_goes_on_throttling_is_asked_again_after_pauses() {
    let cluster = cluster().await;
    let services: Api<Service> = Api::namespaced(cluster.client.clone(), "default");
    create(&services, "there").await;
    let faults = Faults::default();
    // What the client library's own patience, which heeds Retry-After, has already given up on.
    faults.add("services", false, 2, Fault::Status(429, Some(1)));
    let begun = Instant::now();
    let (index, ..) = through(&cluster, &faults).await;
    assert_eq!(names(&index), ["there"]);
    assert!(begun.elapsed() >= Duration::from_millis(700), "asked again after {:?}", begun.elapsed());
    assert_eq!(faults.lists("services"), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_breaks_off_counts_as_none_and_a_slow_one_is_waited_for() {
    let cluster = cluster().await;
    let services: Api<Service> = Api::namespaced(cluster.client.clone(), "default");
    for name in ["a", "b", "c"] {
        create(&services, name).await;
    }
    let faults = Faults::default();
    faults.add("services", false, 2, Fault::Cut(900));
    faults.add("services", false, 1, Fault::Late(Duration::from_secs(2)));
    let (sender, mut updates) = mpsc::channel(64);
    let _watches = watch_all(&cluster.client_with(&faults), &sender);
    let mut index = Index::default();
    until(&mut index, &mut updates, "all other kinds", |index| index.missing().len() == 1).await;
    assert_eq!(names(&index), Vec::<&str>::new(), "half a list");
    until(&mut index, &mut updates, "the list in the end", Index::is_synced).await;
    assert_eq!(names(&index), ["a", "b", "c"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_only_fails_is_not_asked_without_a_pause() {
    let cluster = cluster().await;
    let faults = Faults::default();
    faults.add("services", false, usize::MAX, Fault::Status(500, None));
    faults.add("pods", false, usize::MAX, Fault::Cut(10));
    let (sender, mut updates) = mpsc::channel(64);
    let _watches = watch_all(&cluster.client_with(&faults), &sender);
    let mut index = Index::default();
    let _ = timeout(Duration::from_secs(9), until(&mut index, &mut updates, "never", |_| false)).await;
    for resource in ["services", "pods"] {
        let asked = faults.lists(resource);
        // Half a second, one, two, four, eight: less often each time.
        assert!((3..=6).contains(&asked), "{resource} were listed {asked} times in 9 s");
    }
    assert_eq!(index.missing().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_of_services_are_followed_and_a_server_without_the_kind_is_known_as_such() {
    use k8s_openapi::api::networking::v1::ServiceCIDR;
    use towpath_agent::index::ServiceCidrs;
    let cluster = cluster().await;
    let faults = Faults::default();
    faults.add("servicecidrs", false, 1, Fault::Status(404, None));
    let (mut index, mut updates, _watches) = through(&cluster, &faults).await;
    until(&mut index, &mut updates, "404", |index| *index.service_cidrs() == ServiceCidrs::NotServed).await;
    let has = |index: &Index, names: &[&str]| match index.service_cidrs() {
        ServiceCidrs::Listed(all) => all.keys().eq(names),
        ServiceCidrs::Unknown | ServiceCidrs::NotServed => false,
    };
    until(&mut index, &mut updates, "the kind after an upgrade", |index| has(index, &["kubernetes"])).await;
    let ranges = Api::<ServiceCIDR>::all(cluster.client.clone());
    let more = json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.222.0.0/16"]}});
    ranges.create(&PostParams::default(), &serde_json::from_value(more).unwrap()).await.unwrap();
    until(&mut index, &mut updates, "one that is added", |index| has(index, &["kubernetes", "more"])).await;
    ranges.delete("more", &DeleteParams::default()).await.unwrap();
    until(&mut index, &mut updates, "one that is gone", |index| has(index, &["kubernetes"])).await;
}
