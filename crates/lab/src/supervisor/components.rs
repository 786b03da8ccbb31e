//! Towpath's own processes in the lab: configuration, credentials, and keeping them running.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use towpath_apiserver::{ApiServer, UserInfo};
use towpath_wire::config::ipnet_text::Cidr;
use towpath_wire::config::{AgentConfig, CarryConfig, ControllerConfig};

use super::child::ChildSpec;
use super::{API_PORT, gateways, stage_program};
use crate::layout::Layout;
use crate::options::{CLUSTER_DOMAIN, ClusterSpec, NodeSpec};
use crate::runtime::spawn::write_private;
use crate::stage::EnterSpec;

/// Bearer tokens of components, kept with the lab: what service account tokens are in a real cluster.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Tokens {
    /// By node.
    agents: BTreeMap<String, String>,
    /// The controller's.
    controller: String,
}

impl Tokens {
    /// The lab's tokens; made at the first start.
    pub(super) fn load_or_make(layout: &Layout, spec: &ClusterSpec) -> Result<Self> {
        let file = layout.tokens();
        let mut tokens: Self = match std::fs::read(&file) {
            Ok(text) => serde_json::from_slice(&text).with_context(|| format!("understand {}", file.display()))?,
            Err(_) => Self::default(),
        };
        for node in &spec.nodes {
            tokens.agents.entry(node.name.clone()).or_insert_with(fresh_token);
        }
        if tokens.controller.is_empty() {
            tokens.controller = fresh_token();
        }
        tokens.write(layout)?;
        Ok(tokens)
    }

    /// Makes one for a node that joins.
    pub(super) fn add(&mut self, layout: &Layout, node: &str) -> Result<()> {
        self.agents.insert(node.to_owned(), fresh_token());
        self.write(layout)
    }

    /// A node's is worth nothing any more.
    pub(super) fn remove(&mut self, layout: &Layout, node: &str) -> Result<()> {
        self.agents.remove(node);
        self.write(layout)
    }

    fn write(&self, layout: &Layout) -> Result<()> {
        write_private(&layout.tokens(), &serde_json::to_vec(self)?)
    }

    /// Whom each token stands for: service accounts, the agent's bound to its node as a pod's token is.
    pub(super) fn users(&self) -> Vec<(String, UserInfo)> {
        let account = |name: &str| {
            let groups = ["system:serviceaccounts", "system:serviceaccounts:kube-system"];
            UserInfo::new(format!("system:serviceaccount:kube-system:{name}"), &groups)
        };
        let agents = self.agents.iter().map(|(node, token)| {
            let mut user = account("towpath-agent");
            user.extra.insert("authentication.kubernetes.io/node-name".to_owned(), vec![node.clone()]);
            (token.clone(), user)
        });
        agents.chain([(self.controller.clone(), account("towpath-controller"))]).collect()
    }
}

fn fresh_token() -> String {
    format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple())
}

/// Where nodes reach the API server.
pub(super) fn api_url(spec: &ClusterSpec) -> Result<String> {
    let gateway = gateways(spec).into_iter().next().context("no underlay")?;
    Ok(format!("https://{}", SocketAddr::new(gateway, API_PORT)))
}

/// Writes the configurations of a node's agent and carry. Nothing with another CNI.
pub(super) fn of_node(
    layout: &Layout,
    spec: &ClusterSpec,
    api: &ApiServer,
    tokens: &Tokens,
    node: &NodeSpec,
) -> Result<Vec<ChildSpec>> {
    if spec.cni_conf.is_some() {
        return Ok(Vec::new());
    }
    let token = tokens.agents.get(&node.name).context("a node without a token")?;
    let kubeconfig = layout.credentials().join(format!("agent-{}.kubeconfig", node.name));
    write_private(&kubeconfig, api.token_kubeconfig(&api_url(spec)?, token).as_bytes())?;
    let agent = agent_config(layout, spec, node, &kubeconfig);
    let carry = carry_config(layout, node, &agent);
    let extra = serde_json::Value::Object(spec.agent_config.clone());
    Ok(vec![
        component(layout, spec, node, "agent", merged(serde_json::to_value(&agent)?, extra))?,
        component(layout, spec, node, "carry", serde_json::to_value(&carry)?)?,
    ])
}

/// Writes the controller's configuration; it runs on this node.
pub(super) fn controller(
    layout: &Layout,
    spec: &ClusterSpec,
    api: &ApiServer,
    tokens: &Tokens,
    node: &NodeSpec,
) -> Result<ChildSpec> {
    let kubeconfig = layout.credentials().join("controller.kubeconfig");
    write_private(&kubeconfig, api.token_kubeconfig(&api_url(spec)?, &tokens.controller).as_bytes())?;
    let controller = ControllerConfig {
        kubeconfig: Some(kubeconfig),
        identity: node.name.clone(),
        // The lab gives ranges itself, as kube-controller-manager does in a kubeadm cluster.
        cluster_cidrs: Vec::new(),
        ..ControllerConfig::default()
    };
    component(layout, spec, node, "controller", serde_json::to_value(&controller)?)
}

fn merged(mut base: serde_json::Value, extra: serde_json::Value) -> serde_json::Value {
    if let (Some(base), serde_json::Value::Object(extra)) = (base.as_object_mut(), extra) {
        base.extend(extra);
    }
    base
}

fn agent_config(layout: &Layout, spec: &ClusterSpec, node: &NodeSpec, kubeconfig: &Path) -> AgentConfig {
    let text = |nets: &[ipnet::IpNet]| nets.iter().map(|net| Cidr(net.trunc().to_string())).collect();
    AgentConfig {
        node_name: node.name.clone(),
        kubeconfig: Some(kubeconfig.to_owned()),
        bpffs: layout.node_bpffs(&node.name),
        cgroup: Some(layout.node_cgroup(&node.name)),
        state_dir: layout.node_state(&node.name).join("towpath"),
        run_dir: layout.node_run(&node.name).join("towpath"),
        cni_conf_dir: layout.node_cni_conf(&node.name),
        cluster_cidrs: text(&spec.pod_cidrs),
        service_cidrs: text(&spec.service_cidrs),
        cluster_dns: spec.dns_addresses.clone(),
        cluster_domain: CLUSTER_DOMAIN.to_owned(),
        // As the manifests have it; every node has its own loopback.
        metrics_listen: Some(SocketAddr::from(([127, 0, 0, 1], 9116))),
        ..AgentConfig::default()
    }
}

fn carry_config(layout: &Layout, node: &NodeSpec, agent: &AgentConfig) -> CarryConfig {
    CarryConfig {
        run_dir: agent.run_dir.clone(),
        state_dir: layout.node_state(&node.name).join("carry"),
        dns_addresses: agent.dns_addresses.clone(),
        ..CarryConfig::default()
    }
}

/// A component in a node's network namespace and cgroup.
fn component(
    layout: &Layout,
    spec: &ClusterSpec,
    node: &NodeSpec,
    name: &str,
    config: serde_json::Value,
) -> Result<ChildSpec> {
    let file = layout.node_run(&node.name).join(format!("{name}.json"));
    write_private(&file, &serde_json::to_vec_pretty(&config)?)?;
    for dir in [
        layout.node_run(&node.name).join("towpath"),
        layout.node_state(&node.name).join("towpath"),
        layout.node_state(&node.name).join("carry"),
    ] {
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let mut argv = vec![spec.program.display().to_string()];
    argv.extend(spec.program_args.iter().cloned());
    argv.extend([name.to_owned(), "--config".to_owned(), file.display().to_string()]);
    Ok(ChildSpec {
        title: format!("{name} of {}", node.name),
        enter: EnterSpec {
            cgroup: Some(layout.node_system_cgroup(&node.name)),
            netns: Some(layout.netns(&node.name)),
            argv,
            env: Vec::new(),
        },
        stage_file: layout.node_run(&node.name).join(format!("{name}.stage.json")),
        log: layout.node_state(&node.name).join(format!("{name}.log")),
    })
}

/// Asks the cluster's DNS address from the node itself, through its socket programs, until it answers.
pub(super) async fn wait_for_dns(
    layout: &Layout,
    spec: &ClusterSpec,
    node: &NodeSpec,
    deadline: tokio::time::Instant,
) -> Result<()> {
    let program = stage_program(spec);
    for server in &spec.dns_addresses {
        loop {
            let mut argv = vec![spec.program.display().to_string()];
            argv.extend(spec.program_args.iter().cloned());
            let name = format!("kubernetes.default.svc.{CLUSTER_DOMAIN}");
            argv.extend(["lab", "stage", "lookup"].map(str::to_owned));
            argv.extend([server.to_string(), name]);
            let enter = EnterSpec {
                cgroup: Some(layout.node_system_cgroup(&node.name)),
                netns: Some(layout.netns(&node.name)),
                argv,
                env: Vec::new(),
            };
            let mut command = program.stage("enter", &enter, &layout.node_run(&node.name).join("lookup.stage.json"))?;
            let output = command.kill_on_drop(true).output().await.context("run a DNS query")?;
            if output.status.success() {
                break;
            }
            if tokio::time::Instant::now() >= deadline {
                let log = layout.node_state(&node.name).join("carry.log");
                bail!("cluster DNS ({server}) does not answer on node {}; see {}", node.name, log.display());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
    Ok(())
}
