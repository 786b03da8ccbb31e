//! Which cluster a command is about: a lab of this machine, or what a kubeconfig names.

use std::path::PathBuf;

use anyhow::{Context, Result};
use towpath_lab::layout::{LabName, Layout};
use towpath_wire::config::AgentConfig;

use crate::kubernetes;

/// Options that say which.
#[derive(clap::Args, Debug)]
pub(crate) struct Where {
    /// Kubeconfig; else KUBECONFIG and the usual places.
    #[arg(long)]
    pub(crate) kubeconfig: Option<PathBuf>,
    /// A lab of this machine; else, where no kubeconfig is named, the only one there is.
    #[arg(long, conflicts_with = "kubeconfig")]
    pub(crate) lab: Option<LabName>,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    pub(crate) output: crate::Output,
}

/// A cluster to ask.
pub(crate) struct Cluster {
    /// Its API server.
    pub(crate) client: kube::Client,
    /// The lab that it is, where it is one.
    pub(crate) lab: Option<LabName>,
}

impl Where {
    /// The cluster.
    ///
    /// # Errors
    /// There is none, or the kubeconfig cannot be read.
    pub(crate) async fn cluster(&self) -> Result<Cluster> {
        let lab = self.lab()?;
        let kubeconfig = match &lab {
            Some(lab) => Some(towpath_lab::commands::kubeconfig(lab)?),
            None => self.kubeconfig.clone(),
        };
        Ok(Cluster { client: kubernetes::client(kubeconfig.as_deref()).await?, lab })
    }

    /// Whether a kubeconfig or a lab is named, here or in the environment.
    pub(crate) fn is_named(&self) -> bool {
        self.lab.is_some() || self.kubeconfig.is_some() || std::env::var_os("KUBECONFIG").is_some()
    }

    /// The lab that is named, by itself or by its kubeconfig.
    pub(crate) fn named_lab(&self) -> Result<Option<LabName>> {
        if self.is_named() { self.lab() } else { Ok(None) }
    }

    /// The lab that is meant: by name, by its kubeconfig, or because there is nothing else.
    pub(crate) fn lab(&self) -> Result<Option<LabName>> {
        if self.lab.is_some() {
            return Ok(self.lab.clone());
        }
        let named = self.kubeconfig.clone().or_else(|| std::env::var_os("KUBECONFIG").map(PathBuf::from));
        // Who may not see the labs of this machine, or has none, has a cluster elsewhere.
        let labs = towpath_lab::commands::list().unwrap_or_default();
        let of = |lab: &LabName, path: &PathBuf| towpath_lab::commands::kubeconfig(lab).is_ok_and(|own| own == *path);
        Ok(match (named, labs.as_slice()) {
            (Some(path), labs) => labs.iter().find(|lab| of(&lab.name, &path)).map(|lab| lab.name.clone()),
            (None, [only]) => Some(only.name.clone()),
            (None, _) => None,
        })
    }
}

/// How the agents of a lab are configured but for what differs between nodes: as that of its first node is.
///
/// # Errors
/// There is no such lab, it has no node, or the file cannot be read.
pub(crate) fn agent_config_of_lab(lab: &LabName) -> Result<AgentConfig> {
    let (layout, spec) = (Layout::new(lab)?, towpath_lab::commands::spec(lab)?);
    let node = spec.nodes.first().with_context(|| format!("lab {:?} has no node", lab.as_str()))?;
    crate::daemon::load(Some(&layout.node_run(&node.name).join("agent.json")))
}

/// Names of a lab's nodes, and how each agent is configured as far as its sockets go.
///
/// # Errors
/// There is no such lab.
pub(crate) fn agents_of_lab(lab: &LabName) -> Result<Vec<(String, AgentConfig)>> {
    let (layout, spec) = (Layout::new(lab)?, towpath_lab::commands::spec(lab)?);
    let agents = spec.nodes.iter().map(|node| {
        let run_dir = layout.node_run(&node.name).join("towpath");
        (node.name.clone(), AgentConfig { run_dir, ..AgentConfig::default() })
    });
    Ok(agents.collect())
}
