//! What the test needs in the cluster, put there and taken away: the namespace, the pods, the Services, a phase's policies.

use std::cell::Cell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Event, Namespace, Node, Pod, Service, ServiceAccount};
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use kube::{Client, ResourceExt};

use super::Options;
use super::checks::{Actor, Cast, Phase, ServiceFacts};
use super::manifests::{self, OURS, Role};
use super::report::Reporter;
use crate::install::DEFAULT_IMAGE;

/// Between two looks.
const LOOK: Duration = Duration::from_millis(200);
/// How long the default ServiceAccount of a new namespace may take.
const ACCOUNT: Duration = Duration::from_secs(30);

/// A node as the test needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NodeFacts {
    /// Its name.
    pub(super) name: String,
    /// Its internal addresses.
    pub(super) addresses: Vec<IpAddr>,
}

/// The cluster, and what the test calls its own there.
pub(super) struct Stage {
    client: Client,
    namespace: String,
    host_port: u16,
    start_timeout: Duration,
    /// The namespace may be there and is this run's.
    ours: Cell<bool>,
}

impl Stage {
    /// Nothing is made yet.
    pub(super) fn new(client: Client, options: &Options) -> Self {
        Self {
            client,
            namespace: options.namespace.clone(),
            host_port: options.host_port,
            start_timeout: Duration::from_secs(options.start_timeout),
            ours: Cell::new(false),
        }
    }

    fn namespaces(&self) -> Api<Namespace> {
        Api::all(self.client.clone())
    }

    fn pods(&self) -> Api<Pod> {
        Api::namespaced(self.client.clone(), &self.namespace)
    }

    /// Makes the namespace. One that is there is never taken over, and only one of an earlier run is replaced.
    pub(super) async fn claim_namespace(&self, replace: bool) -> Result<()> {
        let name = &self.namespace;
        let found = self.namespaces().get_opt(name).await.context("the API server cannot be asked")?;
        if let Some(found) = found {
            if found.labels().get(OURS.0).map(String::as_str) != Some(OURS.1) {
                bail!("namespace {name} is there and is none of this test's: give another one with --namespace");
            }
            let since = found.creation_timestamp().map(|t| t.0.to_string()).unwrap_or_default();
            if !replace && found.metadata.deletion_timestamp.is_none() {
                bail!(
                    "namespace {name} is there from a run that began at {since}: wait for its end, or give --replace if it is dead"
                );
            }
            self.remove(Duration::from_secs(90)).await?;
        }
        let namespace = manifests::namespace(name)?;
        // From here on: who is interrupted while the answer is on its way has made it.
        self.ours.set(true);
        let made = self.namespaces().create(&PostParams::default(), &namespace).await;
        self.ours.set(made.is_ok());
        made.with_context(|| format!("could not make namespace {name}"))?;
        Ok(())
    }

    /// Whether there is something to remove.
    pub(super) fn is_ours(&self) -> bool {
        self.ours.get()
    }

    /// Removes everything the test made, and waits until it is gone.
    pub(super) async fn remove(&self, limit: Duration) -> Result<()> {
        let begun = Instant::now();
        match self.namespaces().delete(&self.namespace, &DeleteParams::default()).await {
            Ok(_) => {}
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {}
            Err(error) => return Err(error).context("could not delete the namespace"),
        }
        while self.namespaces().get_opt(&self.namespace).await?.is_some() {
            if begun.elapsed() > limit {
                bail!("namespace {} is not gone after {} s", self.namespace, limit.as_secs());
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The nodes to try: those named, else the first that are ready and not cordoned.
    pub(super) async fn choose_nodes(&self, named: &[String], count: usize) -> Result<Vec<NodeFacts>> {
        let nodes: Api<Node> = Api::all(self.client.clone());
        let mut all = nodes.list(&ListParams::default()).await.context("could not list nodes")?.items;
        all.sort_by_key(|node| (is_cordoned(node), node.name_any()));
        let facts = |node: &Node| NodeFacts { name: node.name_any(), addresses: internal_addresses(node) };
        if !named.is_empty() {
            let find = |name: &String| {
                let found = all.iter().find(|node| node.name_any() == *name);
                found.map(facts).with_context(|| format!("there is no node {name}"))
            };
            return named.iter().map(find).collect();
        }
        let usable: Vec<NodeFacts> = all.iter().filter(|node| is_ready(node)).map(facts).take(count).collect();
        if usable.is_empty() {
            bail!("no node is ready: kubectl get nodes; then towpath status on a node that should be");
        }
        Ok(usable)
    }

    /// The image that is on every node already.
    pub(super) async fn image(&self, asked: Option<&str>) -> Result<String> {
        if let Some(image) = asked {
            return Ok(image.to_owned());
        }
        let sets: Api<DaemonSet> = Api::namespaced(self.client.clone(), "kube-system");
        let set = sets.get_opt("towpath").await.context("could not look for DaemonSet kube-system/towpath")?;
        let containers = set.and_then(|set| set.spec?.template.spec).map(|spec| spec.containers).unwrap_or_default();
        let agent = containers.into_iter().find(|container| container.name == "agent");
        Ok(agent.and_then(|container| container.image).unwrap_or_else(|| DEFAULT_IMAGE.to_owned()))
    }

    /// Makes pods and Services, and waits until all run.
    pub(super) async fn set_up(&self, nodes: &[NodeFacts], image: &str, reporter: &Reporter) -> Result<Cast> {
        self.wait_for_account().await?;
        let services: Api<Service> = Api::namespaced(self.client.clone(), &self.namespace);
        for service in manifests::services()? {
            services.create(&PostParams::default(), &service).await.context("could not make a Service")?;
        }
        let mut wanted = Vec::new();
        for (index, node) in nodes.iter().enumerate() {
            let everywhere = [Role::Server, Role::Client, Role::Host];
            let first_only = [Role::Guarded, Role::HostPort].into_iter().filter(|_| index == 0);
            wanted.extend(everywhere.into_iter().chain(first_only).map(|role| (role, index, node)));
        }
        reporter.say(&format!("starting {} pods of image {image}", wanted.len()));
        for (role, index, node) in &wanted {
            let pod = manifests::pod(*role, index + 1, node, image, self.host_port)?;
            let made = self.pods().create(&PostParams::default(), &pod).await;
            made.with_context(|| format!("could not make pod {}", pod.name_any()))?;
        }
        let mut cast = Cast::new(&self.namespace, nodes.to_vec(), self.host_port);
        let deadline = Instant::now() + self.start_timeout;
        for (role, index, node) in wanted {
            let name = format!("{}-{}", role.name(), index + 1);
            match self.wait_running(&name, deadline).await {
                Ok(ips) => cast.add(role, Actor { pod: name, node: node.name.clone(), ips }),
                // The port may be somebody's: that is one check's failure, not the end of all.
                Err(error) if role == Role::HostPort => cast.no_host_port = Some(format!("{error:#}")),
                Err(error) => return Err(error),
            }
        }
        for name in ["web", "peers", "self"] {
            let service = services.get(name).await.with_context(|| format!("could not read Service {name}"))?;
            cast.services.insert(name.to_owned(), service_facts(&service));
        }
        Ok(cast)
    }

    /// Pods are refused until their namespace has its ServiceAccount `default`.
    async fn wait_for_account(&self) -> Result<()> {
        let accounts: Api<ServiceAccount> = Api::namespaced(self.client.clone(), &self.namespace);
        let begun = Instant::now();
        while accounts.get_opt("default").await?.is_none() {
            if begun.elapsed() > ACCOUNT {
                bail!(
                    "namespace {} has no ServiceAccount `default` after {} s: does kube-controller-manager run?",
                    self.namespace,
                    ACCOUNT.as_secs()
                );
            }
            tokio::time::sleep(LOOK).await;
        }
        Ok(())
    }

    /// The addresses of a pod whose container runs.
    async fn wait_running(&self, name: &str, deadline: Instant) -> Result<Vec<IpAddr>> {
        loop {
            let pod = self.pods().get(name).await.with_context(|| format!("could not read pod {name}"))?;
            let status = pod.status.clone().unwrap_or_default();
            let ips: Vec<IpAddr> = status.pod_ips.iter().flatten().filter_map(|ip| ip.ip.parse().ok()).collect();
            let phase = status.phase.as_deref().unwrap_or("Pending");
            if phase == "Running" && !ips.is_empty() {
                return Ok(ips);
            }
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone()).unwrap_or_default();
            if matches!(phase, "Failed" | "Succeeded") || Instant::now() > deadline {
                let why = self.why_not_running(&pod).await;
                let image = if why.contains("Image") { "give --image if the nodes have another one; " } else { "" };
                bail!(
                    "pod {name} on node {node} is {phase}, not running: {why}; {image}with --keep, kubectl -n {} describe \
                     pod {name} shows more",
                    self.namespace
                );
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// What kubelet says of a pod that does not run: its containers' reason, else the last event.
    async fn why_not_running(&self, pod: &Pod) -> String {
        let status = pod.status.clone().unwrap_or_default();
        let containers = status.container_statuses.unwrap_or_default();
        let mut said: Vec<String> = status.message.into_iter().collect();
        for state in containers.into_iter().filter_map(|container| container.state) {
            if let Some(waiting) = state.waiting {
                said.push(format!("{} {}", waiting.reason.unwrap_or_default(), waiting.message.unwrap_or_default()));
            }
            if let Some(ended) = state.terminated {
                said.push(format!("ended with {}: {}", ended.exit_code, ended.message.unwrap_or_default()));
            }
        }
        let events: Api<Event> = Api::namespaced(self.client.clone(), &self.namespace);
        let of_pod = ListParams::default().fields(&format!("involvedObject.name={}", pod.name_any()));
        if let Ok(mut events) = events.list(&of_pod).await {
            events.items.retain(|event| event.type_.as_deref() == Some("Warning"));
            said.extend(events.items.pop().and_then(|event| event.message));
        }
        match said.is_empty() {
            true => "nothing is said of why; is kubelet of that node running?".to_owned(),
            false => said.join("; ").trim().to_owned(),
        }
    }

    /// Puts the policies of a phase in force, and takes those of the one before away.
    pub(super) async fn enter(&self, phase: Phase) -> Result<()> {
        let policies: Api<NetworkPolicy> = Api::namespaced(self.client.clone(), &self.namespace);
        let wanted = match phase {
            Phase::Open | Phase::Lifted => Vec::new(),
            Phase::Denied => vec![manifests::deny_ingress()?],
            Phase::Allowed => vec![manifests::deny_ingress()?, manifests::allow_first_client()?],
            Phase::Egress => vec![manifests::deny_egress()?],
        };
        let there = policies.list(&ListParams::default()).await.context("could not list policies")?.items;
        for old in there.iter().filter(|old| wanted.iter().all(|new| new.name_any() != old.name_any())) {
            policies.delete(&old.name_any(), &DeleteParams::default()).await.context("could not delete a policy")?;
        }
        for new in wanted.iter().filter(|new| there.iter().all(|old| new.name_any() != old.name_any())) {
            policies.create(&PostParams::default(), new).await.context("could not make a policy")?;
        }
        Ok(())
    }
}

fn is_ready(node: &Node) -> bool {
    let conditions = node.status.iter().flat_map(|status| status.conditions.iter().flatten());
    conditions.into_iter().any(|c| c.type_ == "Ready" && c.status == "True")
}

fn is_cordoned(node: &Node) -> bool {
    node.spec.as_ref().is_some_and(|spec| spec.unschedulable == Some(true))
}

fn internal_addresses(node: &Node) -> Vec<IpAddr> {
    let addresses = node.status.iter().flat_map(|status| status.addresses.iter().flatten());
    addresses.filter(|a| a.type_ == "InternalIP").filter_map(|a| a.address.parse().ok()).collect()
}

fn service_facts(service: &Service) -> ServiceFacts {
    let spec = service.spec.clone().unwrap_or_default();
    let node_port = |protocol: &str| {
        let ports = spec.ports.iter().flatten();
        let mut found = ports.filter(|p| p.protocol.as_deref() == Some(protocol)).filter_map(|p| p.node_port);
        found.next().and_then(|port| u16::try_from(port).ok())
    };
    ServiceFacts {
        cluster_ips: spec.cluster_ips.iter().flatten().filter_map(|ip| ip.parse().ok()).collect(),
        tcp_node_port: node_port("TCP"),
        udp_node_port: node_port("UDP"),
    }
}
