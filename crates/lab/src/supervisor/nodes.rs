//! The nodes: a kubelet, an agent and a carry each. They start with the lab; one is added as a machine that joins a running cluster, and deleted as one
//! that is switched off for good.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod, Service};
use kube::api::{DeleteParams, ListParams};
use kube::runtime::reflector::Store;
use kube::{Api, Client, ResourceExt};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_apiserver::{ApiServer, UserInfo};

use super::child::{self, ChildSpec};
use super::components::{self, Tokens};
use super::stage_program;
use crate::kernel::{cgroup, mounts, ns};
use crate::kubelet::events::EventSink;
use crate::kubelet::{self, NodeContext, Registry};
use crate::layout::Layout;
use crate::options::{ClusterSpec, NodeSpec};
use crate::runtime::cni::Cni;
use crate::runtime::spawn::write_private;
use crate::topology;

/// How long killed processes may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// Processes that are kept running, until all of them are told to end.
struct Children {
    stop: CancellationToken,
    kept: JoinSet<()>,
}

impl Children {
    fn start(specs: Vec<ChildSpec>, spec: &ClusterSpec) -> Self {
        let (stop, mut kept) = (CancellationToken::new(), JoinSet::new());
        for child in specs {
            kept.spawn(child::keep(child, stage_program(spec), stop.clone()));
        }
        Self { stop, kept }
    }

    async fn end(mut self) {
        self.stop.cancel();
        while self.kept.join_next().await.is_some() {}
    }
}

/// A node that runs.
struct Running {
    /// Tells its kubelet to end.
    stop: CancellationToken,
    /// It has.
    ended: CancellationToken,
    children: Children,
}

/// A node that was started, and whether it is Ready.
pub(super) type Starting = (NodeSpec, watch::Receiver<bool>);

/// All nodes of the lab, and what starting one takes.
pub(super) struct Nodes {
    layout: Layout,
    spec: ClusterSpec,
    api: ApiServer,
    admin: Client,
    tokens: Tokens,
    services: Store<Service>,
    registry: Registry,
    running: BTreeMap<String, Running>,
    /// And its node.
    controller: Option<(String, Children)>,
}

impl Nodes {
    pub(super) fn new(
        layout: Layout,
        spec: ClusterSpec,
        api: ApiServer,
        admin: Client,
        tokens: Tokens,
        services: Store<Service>,
        registry: Registry,
    ) -> Self {
        Self { layout, spec, api, admin, tokens, services, registry, running: BTreeMap::new(), controller: None }
    }

    /// As it is now.
    pub(super) fn spec(&self) -> &ClusterSpec {
        &self.spec
    }

    /// Starts all nodes of the specification, whose namespaces are there, and the controller.
    pub(super) fn start_all(&mut self, essential: &mut JoinSet<Result<()>>) -> Result<Vec<Starting>> {
        let nodes = self.spec.nodes.clone();
        let starting = nodes.into_iter().map(|node| self.start(node, essential)).collect::<Result<_>>()?;
        self.start_controller()?;
        Ok(starting)
    }

    /// Makes one more node and starts it.
    pub(super) async fn add(&mut self, essential: &mut JoinSet<Result<()>>) -> Result<Starting> {
        let node = self.spec.next_node()?;
        // What a deletion that failed in the middle left behind.
        self.switch_off(&node.name).await?;
        topology::add_node(&self.layout, &self.spec, &node).await?;
        prepare(&self.layout, &self.spec, &node)?;
        self.tokens.add(&self.layout, &node.name)?;
        self.api.set_tokens(&self.tokens.users());
        self.spec.nodes.push(node.clone());
        self.write_spec()?;
        self.start(node, essential)
    }

    /// Switches a node off and takes it, and the pods that were on it, out of the cluster: what an administrator does of whom it will not come back.
    pub(super) async fn delete(&mut self, name: &str) -> Result<NodeSpec> {
        let node = self.spec.node(name)?.clone();
        ensure!(
            self.spec.nodes.len() > 1,
            "{name} is the last node of lab {lab}; `towpath lab down --name {lab}` removes the lab",
            lab = self.spec.name
        );
        self.switch_off(name).await?;
        self.forget(name).await.with_context(|| format!("take node {name} out of the cluster"))?;
        self.spec.nodes.retain(|other| other.name != name);
        self.tokens.remove(&self.layout, name)?;
        self.api.set_tokens(&self.tokens.users());
        self.write_spec()?;
        // Its disk: who comes by this name is a new machine.
        mounts::remove_tree(&self.layout.node_state(name))?;
        if let Some((_, controller)) = self.controller.take_if(|(at, _)| at == name) {
            controller.end().await;
            self.start_controller()?;
        }
        Ok(node)
    }

    /// Ends all processes in good order. Kubelets have ended.
    pub(super) async fn shut_down(self) {
        let all =
            self.running.into_values().map(|node| node.children).chain(self.controller.map(|(_, children)| children));
        futures::future::join_all(all.map(Children::end)).await;
    }

    /// Starts kubelet, agent and carry.
    fn start(&mut self, node: NodeSpec, essential: &mut JoinSet<Result<()>>) -> Result<Starting> {
        let children = components::of_node(&self.layout, &self.spec, &self.api, &self.tokens, &node)?;
        let children = Children::start(children, &self.spec);
        let (ready, became_ready) = watch::channel(false);
        let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
        let (told, done, name) = (stop.clone(), ended.clone().drop_guard(), node.name.clone());
        let (context, events) = self.context(&node)?;
        essential.spawn(async move {
            let _done = done;
            let events = async {
                events.await;
                std::future::pending().await
            };
            tokio::select! {
                ended = kubelet::run(context, ready) => ended.and_then(|()| bail!("the kubelet of node {name} ended")),
                never = events => never,
                () = told.cancelled() => Ok(()),
            }
        });
        self.running.insert(node.name.clone(), Running { stop, ended, children });
        Ok((node, became_ready))
    }

    /// Starts Towpath's controller on the first node, where Towpath is the network.
    fn start_controller(&mut self) -> Result<()> {
        let first = self.spec.nodes.first().context("a lab without nodes")?;
        if self.spec.cni_conf.is_none() {
            let child = components::controller(&self.layout, &self.spec, &self.api, &self.tokens, first)?;
            self.controller = Some((first.name.clone(), Children::start(vec![child], &self.spec)));
        }
        Ok(())
    }

    /// What the node's kubelet works with, and the writing of its events.
    fn context(&self, node: &NodeSpec) -> Result<(Arc<NodeContext>, impl Future<Output = ()> + Send + 'static)> {
        let (layout, spec) = (&self.layout, &self.spec);
        let (name, groups) = (format!("system:node:{}", node.name), ["system:nodes"]);
        let client = Client::new(self.api.loopback(UserInfo::new(name.clone(), &groups)), "default");
        let (events, writing) = EventSink::new(client.clone(), &node.name);
        let credentials = self.api.client_credentials(&name, &groups)?;
        let file = layout.credentials().join(format!("kubelet-{}.kubeconfig", node.name));
        write_private(&file, self.api.kubeconfig(&components::api_url(spec)?, &credentials).as_bytes())?;
        let context = NodeContext {
            layout: layout.clone(),
            spec: Arc::new(spec.clone()),
            node: node.clone(),
            client,
            stage: stage_program(spec),
            image_root: layout.images(),
            cni: Cni {
                conf_dir: layout.node_cni_conf(&node.name),
                bin_dirs: spec.cni_bin_dirs.clone(),
                node_netns: layout.netns(&node.name),
            },
            events,
            services: self.services.clone(),
            registry: self.registry.clone(),
        };
        Ok((Arc::new(context), writing))
    }

    /// Kills all processes of a node at once, as who pulls its plug, and removes its namespaces, links and runtime directories. One that is off
    /// already is fine.
    async fn switch_off(&mut self, name: &str) -> Result<()> {
        let processes = self.layout.node_cgroup(name);
        // By their uids.
        let pods: Vec<String> = std::fs::read_dir(processes.join("pods"))
            .map(|entries| entries.flatten().filter_map(|entry| entry.file_name().into_string().ok()).collect())
            .unwrap_or_default();
        let kill = {
            let processes = processes.clone();
            tokio::task::spawn_blocking(move || cgroup::kill(&processes))
        };
        if let Some(node) = self.running.remove(name) {
            node.stop.cancel();
            node.children.stop.cancel();
            kill.await??;
            node.ended.cancelled().await;
            node.children.end().await;
        } else {
            kill.await??;
        }
        topology::remove_node(&self.layout, name).await?;
        let own = self.layout.netns(name);
        let pins: Vec<_> = pods.iter().filter_map(|uid| self.registry.take(uid)).map(|pod| pod.netns).collect();
        let dirs: Vec<_> =
            pods.iter().map(|uid| self.layout.pod_run(uid)).chain([self.layout.node_run(name)]).collect();
        tokio::task::spawn_blocking(move || {
            cgroup::kill_and_remove(&processes, KILL_LIMIT)?;
            pins.iter().filter(|pin| **pin != own).try_for_each(|pin| ns::remove(pin))?;
            dirs.iter().flat_map(|dir| mounts::remove_with_mounts(dir)).next().map_or(Ok(()), Err)
        })
        .await?
    }

    /// Deletes a node's objects and, as Kubernetes' pod garbage collector does, the pods that are bound to it.
    async fn forget(&self, name: &str) -> Result<()> {
        let now = DeleteParams::default().grace_period(0);
        let nodes: Api<Node> = Api::all(self.admin.clone());
        gone_is_fine(nodes.delete(name, &DeleteParams::default()).await.map(drop))?;
        let leases: Api<Lease> = Api::namespaced(self.admin.clone(), "kube-node-lease");
        gone_is_fine(leases.delete(name, &DeleteParams::default()).await.map(drop))?;
        let bound = ListParams::default().fields(&format!("spec.nodeName={name}"));
        for pod in Api::<Pod>::all(self.admin.clone()).list(&bound).await.context("list its pods")? {
            let pods: Api<Pod> = Api::namespaced(self.admin.clone(), &pod.namespace().unwrap_or_default());
            gone_is_fine(pods.delete(&pod.name_any(), &now).await.map(drop))?;
        }
        Ok(())
    }

    /// So that `lab start` brings back the nodes that are there now.
    fn write_spec(&self) -> Result<()> {
        let file = self.layout.cluster_file();
        let fresh = file.with_extension("new");
        std::fs::write(&fresh, serde_json::to_vec_pretty(&self.spec)?)
            .and_then(|()| std::fs::rename(&fresh, &file))
            .with_context(|| format!("write {}", file.display()))
    }
}

fn gone_is_fine(result: kube::Result<()>) -> Result<()> {
    match result {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other?),
    }
}

/// Makes a node's directories, cgroup and BPF file system.
pub(super) fn prepare(layout: &Layout, spec: &ClusterSpec, node: &NodeSpec) -> Result<()> {
    for dir in [layout.node_cni_conf(&node.name), layout.node_host_dir(&node.name)] {
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    cgroup::create(&layout.node_system_cgroup(&node.name))?;
    mounts::mount_bpffs(&layout.node_bpffs(&node.name))?;
    if let Some(template) = &spec.cni_conf {
        let text = fill_cni_conf(template, layout, node)?;
        let file = layout.node_cni_conf(&node.name).join("10-given.conflist");
        std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
    }
    Ok(())
}

/// Replaces the placeholders that [`crate::options::UpOptions::cni_conf`] documents.
fn fill_cni_conf(template: &str, layout: &Layout, node: &NodeSpec) -> Result<String> {
    let cidrs: Vec<String> = node.pod_cidrs.iter().map(ToString::to_string).collect();
    Ok(template
        .replace("$NODE", &node.name)
        .replace("$POD_CIDRS", &serde_json::to_string(&cidrs)?)
        .replace("$POD_CIDR", cidrs.first().map_or("", String::as_str))
        .replace("$STATE", &layout.node_state(&node.name).display().to_string()))
}
