//! kube-rs over TLS and in-process: watches, versions, conflicts, ownership, streaming, authorization.
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

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Pod, Service};
use kube::api::{Api, AttachParams, DeleteParams, ListParams, Patch, PatchParams, PostParams, WatchParams};
use kube::core::WatchEvent;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towpath_apiserver::UserInfo;

use cluster::Cluster;

fn map(name: &str, value: &str) -> ConfigMap {
    serde_json::from_value(json!({"metadata": {"name": name, "labels": {"l": value}}, "data": {"k": value}})).unwrap()
}

fn status(error: kube::Error) -> (u16, String) {
    match error {
        kube::Error::Api(status) => (status.code, status.reason.clone()),
        other => panic!("{other}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watcher_sees_initial_objects_changes_and_deletions_as_its_selector_does() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    maps.create(&PostParams::default(), &map("old", "a")).await.unwrap();
    let config = kube::runtime::watcher::Config::default().labels("l=a").streaming_lists();
    let mut events = kube::runtime::watcher(maps.clone(), config).boxed();
    let mut seen = Vec::new();
    let next = async |events: &mut futures::stream::BoxStream<'_, _>| {
        let event: Result<kube::runtime::watcher::Event<ConfigMap>, kube::runtime::watcher::Error> =
            tokio::time::timeout(Duration::from_secs(10), events.next()).await.expect("no event came").unwrap();
        use kube::runtime::watcher::Event;
        match event.unwrap() {
            Event::Init => "init".to_owned(),
            Event::InitApply(map) => format!("initial {}", map.metadata.name.unwrap()),
            Event::InitDone => "done".to_owned(),
            Event::Apply(map) => format!("apply {}", map.metadata.name.unwrap()),
            Event::Delete(map) => format!("delete {}", map.metadata.name.unwrap()),
        }
    };
    for _ in 0..2 {
        seen.push(next(&mut events).await);
    }
    maps.create(&PostParams::default(), &map("other", "b")).await.unwrap();
    maps.create(&PostParams::default(), &map("new", "a")).await.unwrap();
    seen.push(next(&mut events).await);
    // A change of the label takes the object out of the watcher's sight.
    maps.patch("old", &PatchParams::default(), &Patch::Merge(json!({"metadata": {"labels": {"l": "b"}}})))
        .await
        .unwrap();
    seen.push(next(&mut events).await);
    maps.delete("new", &DeleteParams::default()).await.unwrap();
    seen.push(next(&mut events).await);
    assert_eq!(seen, ["initial old", "done", "apply new", "delete old", "delete new"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_arrives_within_milliseconds() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    let mut events = maps.watch(&WatchParams::default(), "0").await.unwrap().boxed();
    let mut times = Vec::new();
    for number in 0..20 {
        let start = Instant::now();
        maps.create(&PostParams::default(), &map(&format!("m{number}"), "a")).await.unwrap();
        loop {
            if let Some(WatchEvent::Added(_)) = events.try_next().await.unwrap() {
                break;
            }
        }
        times.push(start.elapsed());
    }
    times.sort();
    eprintln!("create and watch: median {:?}, worst {:?}", times[10], times[19]);
    assert!(times[10] < Duration::from_millis(250), "median {:?}", times[10]);
}

#[tokio::test(flavor = "multi_thread")]
async fn old_versions_are_gone_and_writers_conflict() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    let first = maps.create(&PostParams::default(), &map("m", "a")).await.unwrap();
    let mut events = maps.watch(&WatchParams::default(), "1").await.unwrap().boxed();
    match events.try_next().await {
        Ok(Some(WatchEvent::Error(status))) => assert_eq!(status.code, 410),
        Err(kube::Error::Api(status)) => assert_eq!(status.code, 410),
        other => panic!("{other:?}"),
    }
    let mut second = first.clone();
    second.data = Some([("k".to_owned(), "b".to_owned())].into());
    maps.replace("m", &PostParams::default(), &second).await.unwrap();
    let refused = maps.replace("m", &PostParams::default(), &second).await.unwrap_err();
    assert_eq!(status(refused), (409, "Conflict".to_owned()));
    let refused = maps.create(&PostParams::default(), &first).await.unwrap_err();
    assert_eq!(status(refused).0, 500, "resourceVersion may not be set on create");
    let refused = maps.create(&PostParams::default(), &map("m", "a")).await.unwrap_err();
    assert_eq!(status(refused), (409, "AlreadyExists".to_owned()));
    assert_eq!(status(maps.get("none").await.unwrap_err()), (404, "NotFound".to_owned()));
}

/// A kind of which an update makes an object that is not there (`AllowCreateOnUpdate`): not the one that it names by its uid.
#[tokio::test(flavor = "multi_thread")]
async fn an_update_of_a_deleted_lease_conflicts_and_one_that_names_none_creates_it() {
    let cluster = Cluster::start().await;
    let leases: Api<Lease> = Api::namespaced(cluster.client().await, "default");
    let lease: Lease =
        serde_json::from_value(json!({"metadata": {"name": "l"}, "spec": {"holderIdentity": "a"}})).unwrap();
    let first = leases.create(&PostParams::default(), &lease).await.unwrap();
    leases.delete("l", &DeleteParams::default()).await.unwrap();
    let refused = leases.replace("l", &PostParams::default(), &first).await.unwrap_err();
    assert_eq!(status(refused), (409, "Conflict".to_owned()));
    assert_eq!(leases.get_opt("l").await.unwrap(), None);
    let mut anew = first.clone();
    anew.metadata.uid = None;
    let made = leases.replace("l", &PostParams::default(), &anew).await.unwrap();
    assert_ne!(made.metadata.uid, first.metadata.uid);
    // Another of that name.
    let refused = leases.replace("l", &PostParams::default(), &first).await.unwrap_err();
    assert_eq!(status(refused), (409, "Conflict".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn parallel_patches_all_arrive() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    maps.create(&PostParams::default(), &map("m", "a")).await.unwrap();
    let patches = (0..30).map(|number| {
        let maps = maps.clone();
        async move {
            let patch = json!({"data": {format!("key{number}"): "x"}});
            maps.patch("m", &PatchParams::default(), &Patch::Merge(patch)).await.map(|_| ())
        }
    });
    futures::future::try_join_all(patches).await.unwrap();
    assert_eq!(maps.get("m").await.unwrap().data.unwrap().len(), 31);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_page_through_one_consistent_state_and_are_fast() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> =
        Api::namespaced(kube::Client::new(cluster.server.loopback(UserInfo::admin()), "default"), "default");
    let create = |number: usize| {
        let maps = maps.clone();
        async move { maps.create(&PostParams::default(), &map(&format!("m{number:05}"), "a")).await.map(|_| ()) }
    };
    futures::stream::iter(0..2000).map(create).buffer_unordered(200).try_collect::<()>().await.unwrap();
    let page = maps.list(&ListParams::default().limit(500)).await.unwrap();
    assert_eq!((page.items.len(), page.metadata.remaining_item_count), (500, Some(1500)));
    maps.delete("m01999", &DeleteParams::default()).await.unwrap();
    maps.create(&PostParams::default(), &map("m00500b", "a")).await.unwrap();
    let mut token = page.metadata.continue_.clone();
    let mut names: Vec<String> = page.items.into_iter().filter_map(|item| item.metadata.name).collect();
    while let Some(next) = token.filter(|token| !token.is_empty()) {
        let page = maps.list(&ListParams::default().limit(500).continue_token(&next)).await.unwrap();
        token = page.metadata.continue_;
        names.extend(page.items.into_iter().filter_map(|item| item.metadata.name));
    }
    let expected: Vec<String> = (0..2000).map(|number| format!("m{number:05}")).collect();
    assert_eq!(names, expected, "the pages show the state of the first");
    let start = Instant::now();
    assert_eq!(maps.list(&ListParams::default()).await.unwrap().items.len(), 2000);
    eprintln!("list of 2000, parsed by the client: {:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn state_survives_a_restart() {
    let cluster = Cluster::start().await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    let made = maps.create(&PostParams::default(), &map("m", "a")).await.unwrap();
    let services: Api<Service> = Api::namespaced(cluster.client().await, "default");
    let service: Service =
        serde_json::from_value(json!({"metadata": {"name": "s"}, "spec": {"ports": [{"port": 80}]}})).unwrap();
    let service = services.create(&PostParams::default(), &service).await.unwrap();
    cluster.server.shutdown().await;
    let Cluster { server, directory, .. } = cluster;
    drop(server);
    let cluster = Cluster::start_in(directory).await;
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client().await, "default");
    let found = maps.get("m").await.unwrap();
    assert_eq!(found.metadata.uid, made.metadata.uid);
    assert_eq!(found.metadata.resource_version, made.metadata.resource_version);
    let version = |map: &ConfigMap| map.metadata.resource_version.as_ref().unwrap().parse::<u64>().unwrap();
    let new = maps.create(&PostParams::default(), &map("n", "a")).await.unwrap();
    assert!(version(&new) > version(&made));
    // The address is still taken.
    let services: Api<Service> = Api::namespaced(cluster.client().await, "default");
    let wanted = service.spec.unwrap().cluster_ip.unwrap();
    let rival: Service = serde_json::from_value(
        json!({"metadata": {"name": "r"}, "spec": {"clusterIP": wanted, "ports": [{"port": 80}]}}),
    )
    .unwrap();
    let refused = services.create(&PostParams::default(), &rival).await.unwrap_err();
    assert!(refused.to_string().contains("provided IP is already allocated"), "{refused}");
    services.delete("s", &DeleteParams::default()).await.unwrap();
    services.create(&PostParams::default(), &rival).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn finalizers_grace_periods_and_namespaces_hold_deletions() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "default");
    let mut held = map("m", "a");
    held.metadata.finalizers = Some(vec!["example.com/hold".to_owned()]);
    maps.create(&PostParams::default(), &held).await.unwrap();
    maps.delete("m", &DeleteParams::default()).await.unwrap();
    assert!(maps.get("m").await.unwrap().metadata.deletion_timestamp.is_some());
    let release = Patch::Merge(json!({"metadata": {"finalizers": null}}));
    maps.patch("m", &PatchParams::default(), &release).await.unwrap();
    assert_eq!(status(maps.get("m").await.unwrap_err()).0, 404);

    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}}),
    )
    .unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();
    pods.delete("p", &DeleteParams::default()).await.unwrap();
    assert_eq!(pods.get("p").await.unwrap().metadata.deletion_grace_period_seconds, Some(30));
    pods.delete("p", &DeleteParams::default().grace_period(0)).await.unwrap();
    assert_eq!(status(pods.get("p").await.unwrap_err()).0, 404);

    let namespaces: Api<Namespace> = Api::all(client.clone());
    let space: Namespace = serde_json::from_value(json!({"metadata": {"name": "a"}})).unwrap();
    let made = namespaces.create(&PostParams::default(), &space).await.unwrap();
    assert_eq!(made.metadata.labels.unwrap()["kubernetes.io/metadata.name"], "a");
    namespaces.delete("a", &DeleteParams::default()).await.unwrap();
    let within: Api<ConfigMap> = Api::namespaced(client.clone(), "a");
    let refused = within.create(&PostParams::default(), &map("m", "a")).await.unwrap_err();
    assert_eq!(status(refused), (403, "Forbidden".to_owned()));
    let request = http::Request::put("/api/v1/namespaces/a/finalize")
        .header("content-type", "application/json")
        .body(
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "a"}, "spec": {"finalizers": []}})
                .to_string()
                .into_bytes(),
        )
        .unwrap();
    client.request::<Value>(request).await.unwrap();
    assert_eq!(status(namespaces.get("a").await.unwrap_err()).0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn binding_assigns_a_pod_once() {
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let pods: Api<Pod> = Api::namespaced(client.clone(), "default");
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}),
    )
    .unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let bind = |node: &str| {
        let body = json!({"apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p"},
            "target": {"apiVersion": "v1", "kind": "Node", "name": node}});
        http::Request::post("/api/v1/namespaces/default/pods/p/binding")
            .header("content-type", "application/json")
            .body(body.to_string().into_bytes())
            .unwrap()
    };
    let mut events = pods.watch(&WatchParams::default().fields("spec.nodeName=n1"), "0").await.unwrap().boxed();
    client.request::<Value>(bind("n1")).await.unwrap();
    match events.try_next().await.unwrap() {
        Some(WatchEvent::Added(pod)) => assert_eq!(pod.spec.unwrap().node_name.as_deref(), Some("n1")),
        other => panic!("{other:?}"),
    }
    let refused = client.request::<Value>(bind("n2")).await.unwrap_err();
    assert_eq!(status(refused), (409, "Conflict".to_owned()));
}

#[tokio::test(flavor = "multi_thread")]
async fn exec_and_port_forward_work_from_kube_rs() {
    let cluster = Cluster::start().await;
    let pods: Api<Pod> = Api::namespaced(cluster.client().await, "default");
    let pod: Pod = serde_json::from_value(
        json!({"metadata": {"name": "p"}, "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]}}),
    )
    .unwrap();
    pods.create(&PostParams::default(), &pod).await.unwrap();
    let mut process = pods.exec("p", ["both"], &AttachParams::default()).await.unwrap();
    let (mut out, mut error) = (String::new(), String::new());
    process.stdout().unwrap().read_to_string(&mut out).await.unwrap();
    process.stderr().unwrap().read_to_string(&mut error).await.unwrap();
    assert_eq!((out.as_str(), error.as_str()), ("to stdout\n", "to stderr\n"));
    let process_status = process.take_status().unwrap();
    process.join().await.unwrap();
    assert_eq!(process_status.await.unwrap().status.as_deref(), Some("Success"));
    let mut forward = pods.portforward("p", &[80]).await.unwrap();
    let mut stream = forward.take_stream(80).unwrap();
    stream.write_all(b"hello").await.unwrap();
    let mut answer = [0; 8];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"80:hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn roles_decide_what_tokens_may_do() {
    let cluster = Cluster::start().await;
    let admin = cluster.client().await;
    let config = cluster.server.token_kubeconfig(&format!("https://{}", cluster.address), "secret-token");
    let config = kube::config::Kubeconfig::from_yaml(&config).unwrap();
    let config =
        kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await.unwrap();
    let viewer: Api<ConfigMap> = Api::namespaced(kube::Client::try_from(config).unwrap(), "default");
    assert_eq!(status(viewer.list(&ListParams::default()).await.unwrap_err()), (403, "Forbidden".to_owned()));
    let bindings: Api<k8s_openapi::api::rbac::v1::RoleBinding> = Api::namespaced(admin.clone(), "default");
    let binding = serde_json::from_value(json!({"metadata": {"name": "v"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "viewer"}]}))
    .unwrap();
    bindings.create(&PostParams::default(), &binding).await.unwrap();
    viewer.list(&ListParams::default()).await.unwrap();
    assert_eq!(status(viewer.create(&PostParams::default(), &map("m", "a")).await.unwrap_err()).0, 403);
    let node =
        kube::Client::new(cluster.server.loopback(UserInfo::new("system:node:n1", &["system:nodes"])), "default");
    let pods: Api<Pod> = Api::all(node.clone());
    pods.list(&ListParams::default().fields("spec.nodeName=n1")).await.unwrap();
    let maps: Api<ConfigMap> = Api::namespaced(node, "default");
    assert_eq!(status(maps.create(&PostParams::default(), &map("m", "a")).await.unwrap_err()).0, 403);
}

#[tokio::test(flavor = "multi_thread")]
async fn service_account_tokens_log_in_until_the_account_is_gone() {
    let cluster = Cluster::start().await;
    let admin = cluster.client().await;
    let accounts: Api<k8s_openapi::api::core::v1::ServiceAccount> = Api::namespaced(admin.clone(), "default");
    accounts
        .create(&PostParams::default(), &serde_json::from_value(json!({"metadata": {"name": "robot"}})).unwrap())
        .await
        .unwrap();
    let request = serde_json::from_value(json!({"spec": {"expirationSeconds": 600, "audiences": []}})).unwrap();
    let answer = accounts.create_token_request("robot", &PostParams::default(), &request).await.unwrap();
    let token = answer.status.unwrap().token;
    let whoami = async || {
        let config =
            cluster.server.token_kubeconfig(&format!("https://{}", cluster.address), token.as_deref().unwrap());
        let config = kube::config::Kubeconfig::from_yaml(&config).unwrap();
        let config =
            kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await.unwrap();
        let client = kube::Client::try_from(config).unwrap();
        let request = http::Request::post("/apis/authentication.k8s.io/v1/selfsubjectreviews")
            .header("content-type", "application/json")
            .body(
                json!({"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}).to_string().into_bytes(),
            )
            .unwrap();
        client.request::<Value>(request).await
    };
    let answer = whoami().await.unwrap();
    assert_eq!(answer["status"]["userInfo"]["username"], "system:serviceaccount:default:robot");
    accounts.delete("robot", &DeleteParams::default()).await.unwrap();
    assert_eq!(status(whoami().await.unwrap_err()).0, 401);
}

#[tokio::test(flavor = "multi_thread")]
async fn services_get_addresses_of_added_ranges_and_each_is_an_object() {
    use k8s_openapi::api::networking::v1::{IPAddress, ServiceCIDR};
    let cluster = Cluster::start().await;
    let client = cluster.client().await;
    let services: Api<Service> = Api::namespaced(client.clone(), "default");
    let (ranges, addresses) = (Api::<ServiceCIDR>::all(client.clone()), Api::<IPAddress>::all(client));
    let first = ranges.get("kubernetes").await.unwrap().spec.unwrap().cidrs.unwrap();
    assert_eq!(first, ["10.96.0.0/12"]);
    assert_eq!(addresses.get("10.96.0.1").await.unwrap().spec.parent_ref.name, "kubernetes");

    let make = async |name: &str, address: Option<&str>| {
        let object = json!({"metadata": {"name": name}, "spec": {"clusterIP": address, "ports": [{"port": 80}]}});
        services.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await
    };
    let refused = make("early", Some("10.200.0.7")).await.unwrap_err();
    assert!(refused.to_string().contains("10.96.0.0/12"), "{refused}");
    let more: ServiceCIDR =
        serde_json::from_value(json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.200.0.0/28"]}})).unwrap();
    ranges.create(&PostParams::default(), &more).await.unwrap();
    make("asks", Some("10.200.0.7")).await.unwrap();
    let address = addresses.get("10.200.0.7").await.unwrap();
    let parent = address.spec.parent_ref;
    let named = (parent.resource.as_str(), parent.namespace.as_deref(), parent.name.as_str());
    assert_eq!(named, ("services", Some("default"), "asks"));
    assert_eq!(address.metadata.labels.unwrap()["ipaddress.kubernetes.io/managed-by"], "ipallocator.k8s.io");

    // An address that somebody else has taken by an object of its own.
    let theirs = json!({"metadata": {"name": "10.200.0.8"},
        "spec": {"parentRef": {"group": "example.com", "resource": "things", "name": "x"}}});
    addresses.create(&PostParams::default(), &serde_json::from_value(theirs).unwrap()).await.unwrap();
    assert!(make("late", Some("10.200.0.8")).await.unwrap_err().to_string().contains("already allocated"));

    services.delete("asks", &DeleteParams::default()).await.unwrap();
    assert!(addresses.get_opt("10.200.0.7").await.unwrap().is_none());
    assert!(addresses.get_opt("10.200.0.8").await.unwrap().is_some(), "nobody's but its maker's");
    ranges.delete("more", &DeleteParams::default()).await.unwrap();
    assert!(make("again", Some("10.200.0.7")).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_first_range_is_followed_by_the_next() {
    use k8s_openapi::api::networking::v1::ServiceCIDR;
    let directory = tempfile::tempdir().unwrap();
    let mut config = towpath_apiserver::Config::new(directory.path().join("data"));
    config.service_cidrs = vec!["10.96.0.0/29".parse().unwrap()];
    let server = towpath_apiserver::ApiServer::start(config).await.unwrap();
    let client = kube::Client::new(server.loopback(UserInfo::admin()), "default");
    let services: Api<Service> = Api::default_namespaced(client.clone());
    let make = async |number: u8| {
        let object = json!({"metadata": {"name": format!("s{number}")}, "spec": {"ports": [{"port": 80}]}});
        let made = services.create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await;
        made.map(|service| service.spec.unwrap().cluster_ip.unwrap())
    };
    for number in 0..5 {
        assert!(make(number).await.unwrap().starts_with("10.96.0."));
    }
    assert!(make(5).await.unwrap_err().to_string().contains("10.96.0.0/29 is full"));
    let more: ServiceCIDR =
        serde_json::from_value(json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["10.200.0.0/29"]}})).unwrap();
    Api::<ServiceCIDR>::all(client).create(&PostParams::default(), &more).await.unwrap();
    assert!(make(6).await.unwrap().starts_with("10.200.0."));
}
