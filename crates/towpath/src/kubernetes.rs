//! The Kubernetes API as the command line uses it: a client from the usual kubeconfig, and the world as it is now.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use k8s_openapi::Metadata;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use kube::ResourceExt;
use kube::api::{Api, AttachParams, AttachedProcess, ListParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde::de::DeserializeOwned;
use tokio::io::AsyncReadExt;
use towpath_model::cluster_policy::object::ClusterNetworkPolicy as ClusterPolicyObject;
use towpath_model::custom::{NETWORK_CONFIG_NAME, NetworkConfig, NetworkConfigSpec, NodeNetwork};
use towpath_model::{
    ClusterNetworkPolicy, Invalid, NamespacedName, NetworkPolicy, NodeName, Readable, ServiceCidr, World,
};
use towpath_plan::added_ranges::{self, Within};
use towpath_plan::backend::Says;

/// A client for `kubeconfig`, else for what `KUBECONFIG`, `~/.kube/config` or the pod's service account say.
///
/// # Errors
/// The configuration cannot be read or names no cluster.
pub(crate) async fn client(kubeconfig: Option<&Path>) -> Result<kube::Client> {
    let config = match kubeconfig {
        Some(path) => {
            let parsed = Kubeconfig::read_from(path).with_context(|| format!("could not read {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await?
        }
        None => kube::Config::infer().await.context(
            "no cluster to talk to: set KUBECONFIG (for a lab: export KUBECONFIG=$(towpath lab kubeconfig --path))",
        )?,
    };
    Ok(kube::Client::try_from(config)?)
}

/// The namespace that the kubeconfig's context names.
pub(crate) fn default_namespace(client: &kube::Client) -> String {
    client.default_namespace().to_owned()
}

async fn parsed<K, N, Q>(client: &kube::Client, kind: &str, key: impl Fn(&N) -> Q) -> Result<BTreeMap<Q, N>>
where
    K: Metadata<Ty = ObjectMeta> + Clone + DeserializeOwned + std::fmt::Debug,
    Readable<K>: kube::Resource<DynamicType = ()>,
    N: for<'a> TryFrom<&'a K, Error = Invalid>,
    Q: Ord,
{
    listed(client, kind, &ListParams::default(), key).await
}

async fn listed<K, N, Q>(
    client: &kube::Client,
    kind: &str,
    params: &ListParams,
    key: impl Fn(&N) -> Q,
) -> Result<BTreeMap<Q, N>>
where
    K: Metadata<Ty = ObjectMeta> + Clone + DeserializeOwned + std::fmt::Debug,
    Readable<K>: kube::Resource<DynamicType = ()>,
    N: for<'a> TryFrom<&'a K, Error = Invalid>,
    Q: Ord,
{
    let api: Api<Readable<K>> = Api::all(client.clone());
    let list = api.list(params).await.with_context(|| format!("could not list {kind}"))?;
    Ok(list
        .items
        .iter()
        .filter_map(|read| N::try_from(read.object().ok()?).ok())
        .map(|noun| (key(&noun), noun))
        .collect())
}

/// The policies, read as the agent reads them: what cannot be understood admits nobody.
async fn policies(client: &kube::Client) -> Result<BTreeMap<NamespacedName, NetworkPolicy>> {
    let api: Api<Readable<networking::NetworkPolicy>> = Api::all(client.clone());
    let list = api.list(&ListParams::default()).await.context("could not list networkpolicies")?;
    let parsed = list.items.iter().filter_map(|read| match read.object() {
        Ok(object) => NetworkPolicy::fail_closed(object).ok().map(|(policy, _)| policy),
        Err(_) => {
            let meta = Metadata::metadata(read);
            Some(NetworkPolicy::deny_all(NamespacedName::new(meta.namespace.as_ref()?, meta.name.as_ref()?)))
        }
    });
    Ok(parsed.map(|policy| (policy.name.clone(), policy)).collect())
}

/// The same for those of the whole cluster; none where the kind is not installed.
async fn cluster_policies(client: &kube::Client) -> Result<BTreeMap<String, ClusterNetworkPolicy>> {
    let api: Api<Readable<ClusterPolicyObject>> = Api::all(client.clone());
    let list = match api.list(&ListParams::default()).await {
        Ok(list) => list,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(BTreeMap::new()),
        Err(error) => return Err(error).context("could not list clusternetworkpolicies.policy.networking.k8s.io"),
    };
    let parsed = list.items.iter().filter_map(|read| ClusterNetworkPolicy::fail_closed(read.object().ok()?).ok());
    Ok(parsed.map(|(policy, _)| (policy.name.clone(), policy)).collect())
}

/// Everything that decides over packets, listed once.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn world(client: &kube::Client) -> Result<World> {
    Ok(World {
        nodes: nodes(client).await?,
        namespaces: parsed::<core::Namespace, towpath_model::Namespace, _>(client, "namespaces", |n| n.name.clone())
            .await?,
        pods: parsed::<core::Pod, towpath_model::Pod, _>(client, "pods", |p| p.name.clone()).await?,
        services: parsed::<core::Service, towpath_model::Service, _>(client, "services", |s| s.name.clone()).await?,
        slices: parsed::<discovery::EndpointSlice, towpath_model::EndpointSlice, _>(client, "endpointslices", |s| {
            s.name.clone()
        })
        .await?
        .into(),
        policies: policies(client).await?,
        cluster_policies: cluster_policies(client).await?,
    })
}

/// The cluster's own configuration; none where it was not made, or its definition is not there.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn network(client: &kube::Client) -> Result<Option<NetworkConfigSpec>> {
    let network = Api::<NetworkConfig>::all(client.clone()).get_opt(NETWORK_CONFIG_NAME).await;
    let network = network.with_context(|| format!("could not read NetworkConfig {NETWORK_CONFIG_NAME}"))?;
    Ok(network.map(|network| network.spec))
}

/// What nodes say of themselves; nothing where their definition is not there.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn node_networks(client: &kube::Client) -> Result<Vec<NodeNetwork>> {
    match Api::<NodeNetwork>::all(client.clone()).list(&ListParams::default()).await {
        Ok(list) => Ok(list.items),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(Vec::new()),
        Err(error) => Err(error).context("could not list nodenetworks.towpath.dev"),
    }
}

/// Ranges of Services by their objects' names; none where the API has no such kind (Kubernetes before 1.33).
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn service_cidrs(client: &kube::Client) -> Result<Option<BTreeMap<String, ServiceCidr>>> {
    let api: Api<Readable<networking::ServiceCIDR>> = Api::all(client.clone());
    let list = match api.list(&ListParams::default()).await {
        Ok(list) => list,
        Err(kube::Error::Api(status)) if status.code == 404 => return Ok(None),
        Err(error) => return Err(error).context("could not list servicecidrs"),
    };
    let parsed = list.items.iter().filter_map(|read| {
        let object = read.object().ok()?;
        Some((object.metadata.name.clone()?, ServiceCidr::try_from(object).ok()?))
    });
    Ok(Some(parsed.collect()))
}

/// The data of a ConfigMap in `kube-system`; none where there is no such one.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn system_config_map(client: &kube::Client, name: &str) -> Result<Option<BTreeMap<String, String>>> {
    let read = Api::<core::ConfigMap>::namespaced(client.clone(), SYSTEM).get_opt(name).await;
    let object = read.with_context(|| format!("could not read ConfigMap {SYSTEM}/{name}"))?;
    Ok(object.map(|object| object.data.unwrap_or_default()))
}

/// All nodes, with the pod ranges that are in force. Of those that were added to them it is what they say they use: which of them may be is known
/// to their agents.
async fn nodes(client: &kube::Client) -> Result<BTreeMap<NodeName, towpath_model::Node>> {
    let mut nodes = parsed::<core::Node, towpath_model::Node, _>(client, "nodes", |n| n.name.clone()).await?;
    let said = node_networks(client).await.unwrap_or_default();
    let said = said.iter().map(|object| (NodeName::new(object.name_any()), Says::of(object))).collect();
    let mut settled = added_ranges::settle(&nodes, &said, &Within::Used);
    for (name, node) in &mut nodes {
        node.put_in_force(settled.in_force.remove(name).unwrap_or_default());
    }
    Ok(nodes)
}

/// What Services depend on: nodes, Services, and the slices of all of them or of one.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn services(client: &kube::Client, only: Option<&NamespacedName>) -> Result<World> {
    let slices = match only {
        Some(name) => ListParams::default().labels(&format!("kubernetes.io/service-name={}", name.name)),
        None => ListParams::default(),
    };
    let key = |slice: &towpath_model::EndpointSlice| slice.name.clone();
    Ok(World {
        nodes: nodes(client).await?,
        services: parsed::<core::Service, towpath_model::Service, _>(client, "services", |s| s.name.clone()).await?,
        slices: listed::<discovery::EndpointSlice, _, _>(client, "endpointslices", &slices, key).await?.into(),
        ..World::default()
    })
}

/// Where the agents' own objects are.
const SYSTEM: &str = "kube-system";
/// Labels of the agents' pods.
const AGENTS: &str = "app.kubernetes.io/name=towpath,app.kubernetes.io/component=node";

fn system_pods(client: &kube::Client) -> Api<core::Pod> {
    Api::namespaced(client.clone(), SYSTEM)
}

/// The agents' pods: node and name.
///
/// # Errors
/// The API server does not answer or refuses.
pub(crate) async fn agents(client: &kube::Client) -> Result<Vec<(String, String)>> {
    let pods = system_pods(client).list(&ListParams::default().labels(AGENTS)).await;
    let pods = pods.context("could not list the agents' pods in kube-system")?;
    let placed = pods.items.into_iter().map(|pod| {
        let name = pod.name_any();
        (pod.spec.and_then(|spec| spec.node_name).unwrap_or_else(|| name.clone()), name)
    });
    Ok(placed.collect())
}

/// What a command said.
pub(crate) struct Said {
    /// On standard output.
    pub(crate) out: Vec<u8>,
    /// On standard error.
    pub(crate) err: Vec<u8>,
}

/// Begins a command in an agent's container that goes on; its standard output comes, and its standard input lasts, while the answer is held.
///
/// # Errors
/// It cannot be begun.
pub(crate) async fn begin_in_agent(client: &kube::Client, pod: &str, command: &[&str]) -> Result<AttachedProcess> {
    let params = AttachParams::default().container("agent").stdin(true).stdout(true).stderr(false);
    let session = system_pods(client).exec(pod, command.iter().copied(), &params).await;
    session.with_context(|| format!("could not run a command in the agent's container of {pod}"))
}

/// Runs a command in an agent's container.
///
/// # Errors
/// It cannot be run, or the connection breaks. How it ends does not matter.
pub(crate) async fn run_in_agent(client: &kube::Client, pod: &str, command: &[&str]) -> Result<Said> {
    let params = AttachParams::default().container("agent").stdin(false).stdout(true).stderr(true);
    let session = system_pods(client).exec(pod, command.iter().copied(), &params).await;
    let mut session = session.with_context(|| format!("could not run a command in the agent's container of {pod}"))?;
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let (stdout, stderr) = (session.stdout(), session.stderr());
    let (said, complained) = futures::join!(drain(stdout, &mut out), drain(stderr, &mut err));
    said.and(complained).with_context(|| format!("the connection to {pod} broke"))?;
    Ok(Said { out, err })
}

async fn drain(stream: Option<impl tokio::io::AsyncRead + Unpin>, into: &mut Vec<u8>) -> std::io::Result<usize> {
    match stream {
        Some(mut stream) => stream.read_to_end(into).await,
        None => Ok(0),
    }
}
