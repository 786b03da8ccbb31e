//! What the API server knows that concerns the network, and what Towpath's own containers logged.

use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, ListParams, LogParams};
use kube::{Client, ResourceExt};
use serde_json::{Value, json};

use super::{Collection, node};
use crate::kubernetes;

/// Files and the paths they come from. No Secrets, and of ConfigMaps only Towpath's.
const OBJECTS: [(&str, &str); 22] = [
    ("cluster/version.json", "/version"),
    ("cluster/nodes.json", "/api/v1/nodes"),
    ("cluster/namespaces.json", "/api/v1/namespaces"),
    ("cluster/services.json", "/api/v1/services"),
    ("cluster/endpointslices.json", "/apis/discovery.k8s.io/v1/endpointslices"),
    ("cluster/networkpolicies.json", "/apis/networking.k8s.io/v1/networkpolicies"),
    ("cluster/clusternetworkpolicies.json", "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies"),
    ("cluster/servicecidrs.json", "/apis/networking.k8s.io/v1/servicecidrs"),
    ("cluster/events-kube-system.json", "/api/v1/namespaces/kube-system/events"),
    // Events of objects without a namespace, nodes among them.
    ("cluster/events-nodes.json", "/api/v1/namespaces/default/events?fieldSelector=involvedObject.kind%3DNode"),
    ("towpath/addresspools.json", "/apis/towpath.dev/v1alpha1/addresspools"),
    ("towpath/networkconfigs.json", "/apis/towpath.dev/v1alpha1/networkconfigs"),
    ("towpath/nodenetworks.json", "/apis/towpath.dev/v1alpha1/nodenetworks"),
    (
        "towpath/crd-addresspools.json",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/addresspools.towpath.dev",
    ),
    (
        "towpath/crd-networkconfigs.json",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/networkconfigs.towpath.dev",
    ),
    (
        "towpath/crd-nodenetworks.json",
        "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/nodenetworks.towpath.dev",
    ),
    ("towpath/daemonset.json", "/apis/apps/v1/namespaces/kube-system/daemonsets/towpath"),
    ("towpath/daemonset-dns.json", "/apis/apps/v1/namespaces/kube-system/daemonsets/towpath-dns"),
    ("towpath/deployment.json", "/apis/apps/v1/namespaces/kube-system/deployments/towpath-controller"),
    ("towpath/configmap.json", "/api/v1/namespaces/kube-system/configmaps/towpath"),
    ("towpath/lease.json", "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/towpath-controller"),
    ("towpath/pods.json", "/api/v1/namespaces/kube-system/pods?labelSelector=app.kubernetes.io%2Fname%3Dtowpath"),
];

/// Longest wait for one answer: a node that is gone holds up nothing else.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// Labels of our pods.
const OURS: &str = "app.kubernetes.io/name=towpath";
/// The most that is taken of one log, in bytes.
const LARGEST_LOG: i64 = 8 * 1024 * 1024;

/// Objects and logs.
///
/// # Errors
/// The API server cannot be asked at all.
pub(super) async fn collect(client: &Client, log_lines: i64, all: &mut Collection) -> Result<()> {
    get(client, "/version").await.context("the API server cannot be asked")?;
    for (file, path) in OBJECTS {
        all.json(file, get(client, path).await);
    }
    all.json("cluster/pods.json", pods(client).await);
    let api: Api<Pod> = Api::namespaced(client.clone(), "kube-system");
    match api.list(&ListParams::default().labels(OURS)).await {
        Ok(ours) => {
            for pod in ours {
                logs(&api, &pod, log_lines, all).await;
            }
        }
        Err(error) => all.text("logs", Err::<&str, _>(error.into())),
    }
    Ok(())
}

async fn get(client: &Client, path: &str) -> Result<Value> {
    let request = http::Request::get(path).body(Vec::new())?;
    let answer = tokio::time::timeout(PATIENCE, client.request::<Value>(request)).await;
    answer.map_err(anyhow::Error::from).and_then(|answer| Ok(answer?)).with_context(|| format!("GET {path}"))
}

/// Every pod, without what it runs: names, labels, addresses, ports, and how it is.
async fn pods(client: &Client) -> Result<Value> {
    let list = get(client, "/api/v1/pods").await?;
    let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(items.iter().map(network_part).collect())
}

/// What a network needs to know of a pod.
pub(super) fn network_part(pod: &Value) -> Value {
    let at = |pointer: &str| pod.pointer(pointer).cloned().unwrap_or_default();
    let containers = at("/spec/containers");
    let ports: Vec<Value> = containers
        .as_array()
        .into_iter()
        .flatten()
        .map(|container| json!({"name": container.get("name"), "ports": container.get("ports")}))
        .collect();
    json!({
        "name": at("/metadata/name"), "namespace": at("/metadata/namespace"), "labels": at("/metadata/labels"),
        "node": at("/spec/nodeName"), "hostNetwork": at("/spec/hostNetwork"), "containers": ports,
        "phase": at("/status/phase"), "podIPs": at("/status/podIPs"), "hostIPs": at("/status/hostIPs"),
        "conditions": at("/status/conditions"), "deletionTimestamp": at("/metadata/deletionTimestamp"),
    })
}

async fn logs(api: &Api<Pod>, pod: &Pod, lines: i64, all: &mut Collection) {
    let name = pod.name_any();
    let spec = pod.spec.clone().unwrap_or_default();
    let restarted = |container: &str| {
        let statuses = pod.status.iter().flat_map(|status| status.container_statuses.iter().flatten());
        statuses.into_iter().any(|status| status.name == container && status.restart_count > 0)
    };
    for container in spec.init_containers.into_iter().flatten().chain(spec.containers) {
        let previous = restarted(&container.name).then_some(true);
        for previous in std::iter::once(false).chain(previous) {
            let params = LogParams {
                container: Some(container.name.clone()),
                previous,
                tail_lines: Some(lines),
                limit_bytes: Some(LARGEST_LOG),
                timestamps: true,
                ..LogParams::default()
            };
            let which = if previous { "-previous" } else { "" };
            let said = tokio::time::timeout(PATIENCE, api.logs(&name, &params)).await;
            let said = said.map_err(anyhow::Error::from).and_then(|said| Ok(said?));
            let path = format!("logs/{name}/{}{which}.log", container.name);
            all.text(&path, said.with_context(|| format!("logs of {name}, container {}", container.name)));
        }
    }
}

/// What each node's agent sees of its node, by a command in its container.
pub(super) async fn nodes(client: &Client, all: &mut Collection) {
    let agents = match kubernetes::agents(client).await {
        Ok(agents) => agents,
        Err(error) => return all.text("nodes", Err::<&str, _>(error)),
    };
    if agents.is_empty() {
        let why = "kube-system has no pods of the DaemonSet towpath; on a node: towpath sysdump --this-node";
        return all.text("nodes", Err::<&str, _>(anyhow::anyhow!(why)));
    }
    let asked = agents.into_iter().map(|(name, agent)| async move {
        let facts = tokio::time::timeout(PATIENCE, facts(client, &agent)).await;
        let late = |_| Err(anyhow::anyhow!("the node did not answer within {} s", PATIENCE.as_secs()));
        (name, facts.unwrap_or_else(late))
    });
    for (name, facts) in futures::future::join_all(asked).await {
        node::take(&format!("nodes/{name}"), facts, all);
    }
}

async fn facts(client: &Client, agent: &str) -> Result<Collection> {
    let said = kubernetes::run_in_agent(client, agent, &["/usr/bin/towpath", "sysdump", "--node-facts"]).await?;
    node::facts(&said.out, &said.err)
}
