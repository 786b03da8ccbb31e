//! What `towpath lab …` does. Plain blocking functions: call them before any async runtime or thread exists, because
//! [`exec`], [`outside`] and [`serve`] change the calling process itself.

mod lifecycle;
mod teardown;

use std::convert::Infallible;
use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use serde::Serialize;

use crate::kernel::cgroup;
use crate::layout::{LabName, Layout, STATE_DIR};
use crate::options::{ClusterSpec, NodeSpec, OutsideHost};
use crate::stage::{EnterSpec, enter};
use crate::supervisor;

pub use crate::supervisor::Step;
pub use lifecycle::{add_node, delete_node, down, start, stop, up};

/// What is known of a lab.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct LabStatus {
    /// Its name.
    pub name: LabName,
    /// Whether its supervisor runs.
    pub running: bool,
    /// Process id of the supervisor.
    pub supervisor: Option<i32>,
    /// URL of the API server for kubectl on this machine.
    pub api: String,
    /// Admin kubeconfig.
    pub kubeconfig: PathBuf,
    /// Directory of logs and other lasting state.
    pub state: PathBuf,
    /// Nodes.
    pub nodes: Vec<NodeSpec>,
    /// Hosts outside.
    pub outside: Vec<OutsideHost>,
}

/// The specification of an existing lab.
///
/// # Errors
///
/// No lab of that name, or its file is damaged.
pub fn spec(name: &LabName) -> Result<ClusterSpec> {
    let layout = Layout::new(name)?;
    let file = layout.cluster_file();
    let text = match std::fs::read(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            bail!("there is no lab {:?}; `towpath lab up` makes one", name.as_str())
        }
        Err(error) => return Err(error).with_context(|| format!("read {}", file.display())),
    };
    serde_json::from_slice(&text).with_context(|| {
        format!("understand {}; `towpath lab down` removes the lab whatever state it is in", file.display())
    })
}

/// What is known of one lab.
///
/// # Errors
///
/// As [`spec`].
pub fn status(name: &LabName) -> Result<LabStatus> {
    let (layout, spec) = (Layout::new(name)?, spec(name)?);
    let supervisor = cgroup::processes(&layout.supervisor_cgroup()).into_iter().min();
    Ok(LabStatus {
        name: name.clone(),
        running: supervisor.is_some(),
        supervisor,
        api: format!("https://127.0.0.1:{}", spec.api_port),
        kubeconfig: layout.kubeconfig(),
        state: layout.state().to_owned(),
        nodes: spec.nodes,
        outside: spec.outside,
    })
}

/// All labs of this machine that have state, by name.
///
/// # Errors
///
/// The state directory cannot be read.
pub fn list() -> Result<Vec<LabStatus>> {
    let entries = match std::fs::read_dir(STATE_DIR) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("read {STATE_DIR}")),
    };
    let names = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<LabName>().ok());
    let mut labs: Vec<LabStatus> = names.filter_map(|name| status(&name).ok()).collect();
    labs.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(labs)
}

/// The admin kubeconfig's path, once it is there.
///
/// # Errors
///
/// No such lab, or it has never come up.
pub fn kubeconfig(name: &LabName) -> Result<PathBuf> {
    spec(name)?;
    let path = Layout::new(name)?.kubeconfig();
    if !path.exists() {
        bail!("lab {name} has no kubeconfig yet; its log is {}", Layout::new(name)?.supervisor_log().display());
    }
    Ok(path)
}

/// Becomes the lab's supervisor (hidden `lab serve NAME`). Returns when the lab was told to stop.
///
/// # Errors
///
/// What ended the lab.
pub fn serve(name: &LabName) -> Result<()> {
    supervisor::main(&Layout::new(name)?)
}

/// Becomes `command` on a node: in its network namespace and cgroup, so that Services work as for a process of the node.
///
/// # Errors
///
/// No such lab or node, the lab is stopped, or the command cannot be run.
pub fn exec(name: &LabName, node: &str, command: &[String]) -> Result<Infallible> {
    let (layout, spec) = (Layout::new(name)?, spec(name)?);
    spec.node(node)?;
    let spec = EnterSpec {
        cgroup: Some(layout.node_system_cgroup(node)),
        netns: Some(layout.netns(node)),
        argv: command.to_vec(),
        env: Vec::new(),
    };
    become_command(name, &spec)
}

/// Becomes `command` on a host outside of the cluster: the first, or the one that has the address `from`.
///
/// # Errors
///
/// No such lab or address, the lab is stopped, or the command cannot be run.
pub fn outside(name: &LabName, from: Option<IpAddr>, command: &[String]) -> Result<Infallible> {
    let (layout, spec) = (Layout::new(name)?, spec(name)?);
    let has = |host: &&OutsideHost| match from {
        None => true,
        Some(address) => host.addresses.iter().any(|net| net.addr() == address),
    };
    let host = spec.outside.iter().find(has).with_context(|| {
        let known = spec.outside.iter().flat_map(|h| h.addresses.iter().map(|net| net.addr().to_string()));
        format!("no outside host of lab {name} has that address; there are {}", known.collect::<Vec<_>>().join(", "))
    })?;
    let enter =
        EnterSpec { cgroup: None, netns: Some(layout.netns(&host.netns)), argv: command.to_vec(), env: Vec::new() };
    become_command(name, &enter)
}

fn become_command(name: &LabName, spec: &EnterSpec) -> Result<Infallible> {
    use std::os::unix::process::CommandExt;
    require_root()?;
    if !spec.netns.as_ref().is_some_and(|path| path.exists()) {
        bail!("lab {name} is not running; `towpath lab start` brings it back");
    }
    let mut command = enter(spec)?;
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    Err(error).with_context(|| format!("run {program}"))
}

/// Everything here needs root.
pub(crate) fn require_root() -> Result<()> {
    if nix::unistd::Uid::effective().is_root() {
        return Ok(());
    }
    let program = std::env::args().collect::<Vec<_>>().join(" ");
    bail!("a lab makes network namespaces and needs root; run `sudo {program}`")
}
