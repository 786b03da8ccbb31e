//! The Node object: registration, conditions, heartbeats.
//!
//! The node is Ready when its CNI configuration is there and its plugins say so, as with containerd.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference, Time};
use kube::api::{Api, Patch, PatchParams, PostParams};
use serde_json::json;
use tokio::sync::watch;

use super::NodeContext;
use super::events::Severity;

/// Version of the kubelet that this one stands in for.
pub(crate) const KUBELET_VERSION: &str = "v1.36.0";
/// How long a Lease holds without renewal.
const LEASE_SECONDS: i32 = 40;
/// Heartbeat period.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// How often the CNI directory is looked at, before and after the first configuration.
const NETWORK_CHECK: (Duration, Duration) = (Duration::from_millis(10), Duration::from_secs(5));

/// The machine's memory in bytes.
pub(crate) fn memory_bytes() -> u64 {
    let text = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib =
        text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse().ok());
    kib.unwrap_or(0_u64) * 1024
}

fn capacity() -> BTreeMap<String, Quantity> {
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    BTreeMap::from([
        ("cpu".to_owned(), Quantity(cpus.to_string())),
        ("memory".to_owned(), Quantity(format!("{}Ki", memory_bytes() / 1024))),
        ("ephemeral-storage".to_owned(), Quantity("10Gi".to_owned())),
        ("pods".to_owned(), Quantity("250".to_owned())),
    ])
}

fn read_trimmed(path: &str) -> String {
    std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default()
}

/// Made once a node and kept in its state directory.
fn machine_id(context: &NodeContext) -> String {
    let file = context.layout.node_state(&context.node.name).join("machine-id");
    std::fs::read_to_string(&file).unwrap_or_else(|_| {
        let fresh = uuid::Uuid::new_v4().simple().to_string();
        let _ = std::fs::write(&file, &fresh);
        fresh
    })
}

fn machine(context: &NodeContext) -> NodeSystemInfo {
    let machine_id = machine_id(context);
    let os = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let pretty = os.lines().find_map(|line| line.strip_prefix("PRETTY_NAME=")).map(|v| v.trim_matches('"').to_owned());
    NodeSystemInfo {
        architecture: match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        }
        .to_owned(),
        boot_id: read_trimmed("/proc/sys/kernel/random/boot_id"),
        container_runtime_version: format!("towpath-lab://{}", env!("CARGO_PKG_VERSION")),
        kernel_version: read_trimmed("/proc/sys/kernel/osrelease"),
        kube_proxy_version: String::new(),
        kubelet_version: KUBELET_VERSION.to_owned(),
        machine_id: machine_id.clone(),
        operating_system: "linux".to_owned(),
        os_image: pretty.unwrap_or_else(|| "Linux".to_owned()),
        system_uuid: machine_id,
        ..NodeSystemInfo::default()
    }
}

fn conditions(network: &Result<(), String>, before: &[NodeCondition]) -> Vec<NodeCondition> {
    let now = Timestamp::now();
    let pressure =
        |kind: &str, reason: &str, message: &str| (kind.to_owned(), false, reason.to_owned(), message.to_owned());
    let ready = match network {
        Ok(()) => ("Ready".to_owned(), true, "KubeletReady".to_owned(), "kubelet is posting ready status".to_owned()),
        Err(why) => (
            "Ready".to_owned(),
            false,
            "KubeletNotReady".to_owned(),
            format!(
                "container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:Network \
                 plugin returns error: {why}"
            ),
        ),
    };
    [
        pressure("MemoryPressure", "KubeletHasSufficientMemory", "kubelet has sufficient memory available"),
        pressure("DiskPressure", "KubeletHasNoDiskPressure", "kubelet has no disk pressure"),
        pressure("PIDPressure", "KubeletHasSufficientPID", "kubelet has sufficient PID available"),
        ready,
    ]
    .into_iter()
    .map(|(type_, yes, reason, message)| {
        let status = if yes { "True" } else { "False" }.to_owned();
        let old = before.iter().find(|c| c.type_ == type_ && c.status == status);
        NodeCondition {
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: old.and_then(|c| c.last_transition_time.clone()).or(Some(Time(now))),
            type_,
            status,
            reason: Some(reason),
            message: Some(message),
        }
    })
    .collect()
}

fn status(context: &NodeContext, network: &Result<(), String>, before: &[NodeCondition]) -> NodeStatus {
    let mut addresses: Vec<NodeAddress> = context
        .node
        .addresses
        .iter()
        .map(|net| NodeAddress { address: net.addr().to_string(), type_: "InternalIP".to_owned() })
        .collect();
    addresses.push(NodeAddress { address: context.node.name.clone(), type_: "Hostname".to_owned() });
    NodeStatus {
        addresses: Some(addresses),
        allocatable: Some(capacity()),
        capacity: Some(capacity()),
        conditions: Some(conditions(network, before)),
        daemon_endpoints: Some(NodeDaemonEndpoints::default()),
        node_info: Some(machine(context)),
        ..NodeStatus::default()
    }
}

/// Creates the Node object, or adopts the one of an earlier run.
pub(crate) async fn register(context: &NodeContext) -> Result<Node> {
    let api: Api<Node> = Api::all(context.client.clone());
    let name = &context.node.name;
    let labels = [
        ("kubernetes.io/hostname", name.as_str()),
        ("kubernetes.io/os", "linux"),
        ("kubernetes.io/arch", if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }),
        ("beta.kubernetes.io/os", "linux"),
    ];
    let node = Node {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            labels: Some(labels.into_iter().map(|(k, v)| (k.to_owned(), v.to_owned())).collect()),
            ..ObjectMeta::default()
        },
        spec: Some(NodeSpec {
            pod_cidr: context.node.pod_cidrs.first().map(ToString::to_string),
            pod_cidrs: Some(context.node.pod_cidrs.iter().map(ToString::to_string).collect()),
            provider_id: Some(format!("towpath-lab://{}/{name}", context.spec.name)),
            ..NodeSpec::default()
        }),
        status: Some(status(context, &Err("cni plugin not initialized".to_owned()), &[])),
    };
    let made = match api.create(&PostParams::default(), &node).await {
        Ok(made) => made,
        Err(kube::Error::Api(error)) if error.code == 409 => api.get(name).await.context("read the Node object")?,
        Err(error) => return Err(error).with_context(|| format!("register node {name}")),
    };
    context.events.node(name, Severity::Normal, "Starting", "Starting kubelet.".to_owned());
    Ok(made)
}

/// Keeps the Node's conditions and Lease fresh; tells `ready` of changes.
pub(crate) async fn heartbeat(context: Arc<NodeContext>, registered: Node, ready: watch::Sender<bool>) {
    let mut before = registered.status.and_then(|s| s.conditions).unwrap_or_default();
    let mut last: Option<Result<(), String>> = None;
    let mut posted = tokio::time::Instant::now();
    let mut uid = registered.metadata.uid;
    renew_lease(&context, uid.as_deref()).await;
    loop {
        let network = network_state(&context).await;
        let changed = last.as_ref() != Some(&network);
        if changed || posted.elapsed() >= HEARTBEAT {
            let fresh = status(&context, &network, &before);
            match post(&context, &fresh).await {
                Ok(()) => {
                    if changed && network.is_ok() {
                        let message = format!("Node {} status is now: NodeReady", context.node.name);
                        context.events.node(&context.node.name, Severity::Normal, "NodeReady", message);
                    }
                    before = fresh.conditions.unwrap_or_default();
                    let _ = ready.send(network.is_ok());
                    last = Some(network);
                    posted = tokio::time::Instant::now();
                    renew_lease(&context, uid.as_deref()).await;
                }
                Err(error) => {
                    tracing::warn!(node = %context.node.name, error = %format!("{error:#}"), "node status not posted");
                    if let Some(kube::Error::Api(e)) = error.downcast_ref()
                        && e.code == 404
                        && let Ok(again) = register(&context).await
                    {
                        uid = again.metadata.uid;
                    }
                    tokio::time::sleep(Duration::from_millis(500)).await;
                }
            }
        }
        let is_ready = matches!(last, Some(Ok(())));
        tokio::time::sleep(if is_ready { NETWORK_CHECK.1 } else { NETWORK_CHECK.0 }).await;
    }
}

async fn network_state(context: &NodeContext) -> Result<(), String> {
    match context.cni.load() {
        Ok(Some(list)) => context.cni.status(&list).await.map_err(|error| format!("{error:#}")),
        Ok(None) => Err("cni plugin not initialized".to_owned()),
        Err(error) => Err(format!("{error:#}")),
    }
}

async fn post(context: &NodeContext, status: &NodeStatus) -> Result<()> {
    let api: Api<Node> = Api::all(context.client.clone());
    let mut patch = json!({"status": status});
    // Addresses merge by type, and a node has two of type InternalIP: the list is replaced whole, as the kubelet does it.
    if let Some(addresses) = patch.pointer_mut("/status/addresses").and_then(serde_json::Value::as_array_mut) {
        addresses.push(json!({"$patch": "replace"}));
    }
    api.patch_status(&context.node.name, &PatchParams::default(), &Patch::Strategic(patch)).await?;
    Ok(())
}

async fn renew_lease(context: &NodeContext, uid: Option<&str>) {
    let api: Api<Lease> = Api::namespaced(context.client.clone(), "kube-node-lease");
    let name = &context.node.name;
    let now = MicroTime(Timestamp::now());
    let patch = json!({"spec": {"renewTime": now}});
    let Err(error) = api.patch(name, &PatchParams::default(), &Patch::Merge(patch)).await else { return };
    if !matches!(&error, kube::Error::Api(e) if e.code == 404) {
        tracing::debug!(node = %name, %error, "lease not renewed");
        return;
    }
    let owner = uid.map(|uid| OwnerReference {
        api_version: "v1".to_owned(),
        kind: "Node".to_owned(),
        name: name.clone(),
        uid: uid.to_owned(),
        ..OwnerReference::default()
    });
    let lease = Lease {
        metadata: ObjectMeta {
            name: Some(name.clone()),
            namespace: Some("kube-node-lease".to_owned()),
            owner_references: owner.map(|o| vec![o]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.clone()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    };
    if let Err(error) = api.create(&PostParams::default(), &lease).await {
        tracing::debug!(node = %name, %error, "lease not created");
    }
}
