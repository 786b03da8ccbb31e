//! Controllers against an API server over TLS: leaders are cut off in the midst of their work, again and again, while Services come and go.
//! At every moment that an observer sees, no two Services have one address.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test binary: a panic is how a test fails"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::Service;
use kube::api::{Api, ApiResource, DeleteParams, DynamicObject, GroupVersionKind, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tokio_util::sync::CancellationToken;
use towpath_apiserver::{ApiServer, Config};
use towpath_model::custom::{AddressPool, AddressPoolSpec};
use towpath_wire::config::ControllerConfig;

const DEFINITIONS: [&str; 3] = [
    include_str!("../../../deploy/kustomize/base/crd-addresspool.yaml"),
    include_str!("../../../deploy/kustomize/base/crd-networkconfig.yaml"),
    include_str!("../../../deploy/kustomize/base/crd-nodenetwork.yaml"),
];

struct Cluster {
    _server: ApiServer,
    directory: tempfile::TempDir,
    client: Client,
}

impl Cluster {
    async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let server = ApiServer::start(Config::new(directory.path().join("data"))).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        server.serve(listener).unwrap();
        let admin = server.client_credentials("admin", &["system:masters"]).unwrap();
        let text = server.kubeconfig(&url, &admin);
        std::fs::write(directory.path().join("kubeconfig"), &text).unwrap();
        let parsed = Kubeconfig::from_yaml(&text).unwrap();
        let config = kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.unwrap();
        let cluster = Self { _server: server, directory, client: Client::try_from(config).unwrap() };
        let kind = GroupVersionKind::gvk("apiextensions.k8s.io", "v1", "CustomResourceDefinition");
        let definitions: Api<DynamicObject> = Api::all_with(cluster.client.clone(), &ApiResource::from_gvk(&kind));
        for text in DEFINITIONS {
            let object: DynamicObject = serde_saphyr::from_str(text).unwrap();
            definitions.create(&PostParams::default(), &object).await.unwrap();
        }
        cluster
    }

    fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    /// A controller; aborting it is what SIGKILL is to a process.
    fn controller(&self, identity: &str) -> JoinHandle<()> {
        let config = ControllerConfig {
            kubeconfig: Some(self.kubeconfig()),
            identity: identity.to_owned(),
            cluster_cidrs: Vec::new(),
            ..ControllerConfig::default()
        };
        tokio::spawn(async move { towpath_controller::run(config, CancellationToken::new()).await.unwrap() })
    }

    fn services(&self) -> Api<Service> {
        Api::namespaced(self.client.clone(), "default")
    }

    async fn pool(&self, name: &str, addresses: &[&str]) {
        let addresses = addresses.iter().map(|range| (*range).to_owned()).collect();
        let pool = AddressPool::new(name, AddressPoolSpec { addresses, ..AddressPoolSpec::default() });
        Api::<AddressPool>::all(self.client.clone()).create(&PostParams::default(), &pool).await.unwrap();
    }

    async fn make(&self, name: &str) {
        let object = json!({
            "metadata": {"name": name}, "spec": {"type": "LoadBalancer", "selector": {"app": "web"}, "ports": [{"port": 80}]},
        });
        self.services().create(&PostParams::default(), &serde_json::from_value(object).unwrap()).await.unwrap();
    }

    /// Addresses of all Services by name, in one moment.
    async fn standing(&self) -> BTreeMap<String, String> {
        let list = self.services().list(&Default::default()).await.unwrap();
        list.iter().filter_map(|service| Some((service.name_any(), address(service)?))).collect()
    }
}

fn address(service: &Service) -> Option<String> {
    service.status.as_ref()?.load_balancer.as_ref()?.ingress.as_ref()?.first()?.ip.clone()
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> Result<(), String>) {
    let begun = Instant::now();
    loop {
        match holds().await {
            Ok(()) => return,
            Err(why) => assert!(begun.elapsed() < Duration::from_secs(30), "{what}: {why}"),
        }
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn leaders_that_are_cut_off_leave_no_address_with_two_owners_and_none_lost() {
    const ADDRESSES: usize = 24;
    let cluster = Cluster::start().await;
    cluster.pool("p", &["192.0.2.1-192.0.2.24"]).await;
    // Every moment there is, as whoever programs a network sees it.
    let (client, seen) = (cluster.client.clone(), CancellationToken::new());
    let stop = seen.clone();
    let observer = tokio::spawn(async move {
        let services: Api<Service> = Api::namespaced(client, "default");
        let mut looks = 0;
        while !stop.is_cancelled() {
            let list = services.list(&Default::default()).await.unwrap();
            let addresses: Vec<String> = list.iter().filter_map(address).collect();
            let distinct: BTreeSet<&String> = addresses.iter().collect();
            assert_eq!(distinct.len(), addresses.len(), "two Services have one address: {addresses:?}");
            looks += 1;
            sleep(Duration::from_millis(2)).await;
        }
        looks
    });
    let leases: Api<Lease> = Api::namespaced(cluster.client.clone(), "kube-system");
    let (mut next, mut living) = (0_usize, Vec::new());
    for round in 0..12 {
        // A new process with the name of the last one goes on with its Lease at once.
        let controller = cluster.controller("c");
        for _ in 0..6 {
            let name = format!("s{next}");
            cluster.make(&name).await;
            living.push(name);
            next += 1;
        }
        while living.len() > ADDRESSES + 4 {
            let gone = living.remove(round % living.len());
            cluster.services().delete(&gone, &DeleteParams::default()).await.unwrap();
        }
        if round % 3 == 1 {
            let plain = Patch::Merge(json!({"spec": {"type": "ClusterIP"}}));
            let name = living.remove(0);
            cluster.services().patch(&name, &PatchParams::default(), &plain).await.unwrap();
        }
        sleep(Duration::from_millis(40 * (round as u64 % 5))).await;
        controller.abort();
        let _cut_off = controller.await;
    }
    let controller = cluster.controller("c");
    eventually("every address is in use", async || {
        let standing = cluster.standing().await;
        let of_living = standing.keys().filter(|name| living.contains(name)).count();
        if of_living == ADDRESSES.min(living.len()) && standing.len() == of_living {
            return Ok(());
        }
        Err(format!("{of_living} of {} Services have one of {ADDRESSES}: {standing:?}", living.len()))
    })
    .await;
    // Who waits gets what others leave.
    let before = cluster.standing().await;
    let waiting = living.iter().find(|name| !before.contains_key(*name)).unwrap();
    let leaving = before.keys().next().unwrap();
    cluster.services().delete(leaving, &DeleteParams::default()).await.unwrap();
    eventually("one that waits gets it", async || {
        let standing = cluster.standing().await;
        standing
            .values()
            .find(|address| **address == before[leaving])
            .map(|_| ())
            .ok_or(format!("{waiting} {standing:?}"))
    })
    .await;
    eventually("the pool says so", async || {
        let pool = Api::<AddressPool>::all(cluster.client.clone()).get("p").await.unwrap();
        let status = pool.status.unwrap_or_default();
        if (status.total, status.assigned, status.available) == (24, 24, 0) {
            Ok(())
        } else {
            Err(format!("{status:?}"))
        }
    })
    .await;
    seen.cancel();
    assert!(observer.await.unwrap() > 20, "the observer looked on");
    assert!(leases.get_opt("towpath-controller").await.unwrap().is_some());
    controller.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn no_address_is_given_from_a_range_that_becomes_services_own() {
    use k8s_openapi::api::networking::v1::ServiceCIDR;
    let cluster = Cluster::start().await;
    cluster.pool("p", &["192.0.2.16/29"]).await;
    cluster.make("first").await;
    let controller = cluster.controller("c");
    eventually("it has one", async || {
        cluster.standing().await.get("first").map(|_| ()).ok_or_else(|| "none yet".to_owned())
    })
    .await;
    let range: ServiceCIDR =
        serde_json::from_value(json!({"metadata": {"name": "more"}, "spec": {"cidrs": ["192.0.2.0/24"]}})).unwrap();
    let ranges = Api::<ServiceCIDR>::all(cluster.client.clone());
    ranges.create(&PostParams::default(), &range).await.unwrap();
    let overlaps = async |wanted: &str| {
        let conditions =
            Api::<AddressPool>::all(cluster.client.clone()).get("p").await.unwrap().status.unwrap_or_default();
        let found = conditions.conditions.iter().find(|condition| condition.type_ == "Overlaps").cloned();
        match found {
            Some(found) if found.status == wanted => Ok(()),
            other => Err(format!("{other:?}")),
        }
    };
    eventually("the pool says so", async || overlaps("True").await).await;
    cluster.make("second").await;
    sleep(Duration::from_secs(1)).await;
    assert!(!cluster.standing().await.contains_key("second"), "{:?}", cluster.standing().await);
    ranges.delete("more", &DeleteParams::default()).await.unwrap();
    eventually("it is given when the range is gone", async || {
        cluster.standing().await.get("second").map(|_| ()).ok_or_else(|| "none yet".to_owned())
    })
    .await;
    controller.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_another_implementation_wrote_stays_and_a_pool_that_becomes_nonsense_takes_nothing_away() {
    let cluster = Cluster::start().await;
    cluster.make("theirs").await;
    let status = |ip: &str| Patch::Merge(json!({"status": {"loadBalancer": {"ingress": [{"ip": ip}]}}}));
    cluster.services().patch_status("theirs", &PatchParams::default(), &status("192.0.2.2")).await.unwrap();
    cluster.pool("p", &["192.0.2.1-192.0.2.3"]).await;
    cluster.make("ours").await;
    cluster.make("ours-too").await;
    let controller = cluster.controller("c");
    eventually("ours have addresses", async || {
        let standing = cluster.standing().await;
        let ours: BTreeSet<&str> =
            ["ours", "ours-too"].iter().filter_map(|name| Some(standing.get(*name)?.as_str())).collect();
        if ours == BTreeSet::from(["192.0.2.1", "192.0.2.3"]) { Ok(()) } else { Err(format!("{standing:?}")) }
    })
    .await;
    assert_eq!(cluster.standing().await["theirs"], "192.0.2.2");

    // The definition's pattern lets this pass; only who reads it knows better.
    let typo = Patch::Merge(json!({"spec": {"addresses": ["192.0.2.9-192.0.2.1"]}}));
    let pools = Api::<AddressPool>::all(cluster.client.clone());
    pools.patch("p", &PatchParams::default(), &typo).await.unwrap();
    eventually("the pool says what is wrong", async || {
        let conditions = pools.get("p").await.unwrap().status.unwrap_or_default().conditions;
        let ready = conditions.iter().find(|condition| condition.type_ == "Ready").cloned();
        match ready {
            Some(ready) if ready.status == "False" && ready.message.contains("higher address") => Ok(()),
            other => Err(format!("{other:?}")),
        }
    })
    .await;
    // A new leader never knew the pool otherwise.
    controller.abort();
    let controller = cluster.controller("c");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(cluster.standing().await.len(), 3, "a mistake takes nothing away");
    let right = Patch::Merge(json!({"spec": {"addresses": ["192.0.2.100"]}}));
    pools.patch("p", &PatchParams::default(), &right).await.unwrap();
    eventually("they move to what the pool holds now", async || {
        let standing = cluster.standing().await;
        let mut ours: Vec<Option<&String>> = ["ours", "ours-too"].map(|name| standing.get(name)).to_vec();
        ours.sort();
        if ours == [None, Some(&"192.0.2.100".to_owned())] { Ok(()) } else { Err(format!("{standing:?}")) }
    })
    .await;
    let object: Value = serde_json::to_value(cluster.services().get("theirs").await.unwrap()).unwrap();
    assert_eq!(object["status"]["loadBalancer"]["ingress"], json!([{"ip": "192.0.2.2", "ipMode": "VIP"}]), "untouched");
    controller.abort();
}
