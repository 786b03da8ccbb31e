//! A pod's sandbox: its network, host name and IPC namespaces, each pinned to a file. No process holds them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::spawn::{Namespaces, ProcessNamespace};
use crate::kernel::{ns, sysctl};

/// The namespaces that the containers of one pod share.
#[derive(Clone, Debug)]
pub(crate) struct Sandbox {
    /// Identifier towards CNI plugins: 64 hexadecimal digits.
    pub(crate) id: String,
    /// The network namespace: the pod's own, or the node's for `hostNetwork`.
    pub(crate) netns: PathBuf,
    uts: PathBuf,
    ipc: PathBuf,
    own_network: bool,
}

/// What a sandbox is made of.
pub(crate) struct SandboxSpec {
    /// The pod's runtime directory.
    pub(crate) dir: PathBuf,
    /// Where to pin the network namespace, or none for the node's own.
    pub(crate) netns: Option<PathBuf>,
    /// The node's network namespace.
    pub(crate) node_netns: PathBuf,
    /// Host name.
    pub(crate) hostname: String,
    /// `securityContext.sysctls` of the pod.
    pub(crate) sysctls: Vec<(String, String)>,
}

impl Sandbox {
    /// Makes the namespaces.
    pub(crate) async fn create(spec: SandboxSpec) -> Result<Self> {
        std::fs::create_dir_all(spec.dir.join("ns")).with_context(|| format!("create {}", spec.dir.display()))?;
        let (uts, ipc) = (spec.dir.join("ns/uts"), spec.dir.join("ns/ipc"));
        let pins = ns::Pins { net: spec.netns.clone(), uts: Some(uts.clone()), ipc: Some(ipc.clone()) };
        let own_network = spec.netns.is_some();
        let (hostname, sysctls) = (spec.hostname, spec.sysctls);
        ns::create(pins, move || {
            nix::unistd::sethostname(&hostname).with_context(|| format!("set the host name {hostname}"))?;
            if own_network {
                // As containerd does: unprivileged users may ping and listen below 1024.
                sysctl::try_set_net("ipv4/ip_unprivileged_port_start", "0");
                sysctl::try_set_net("ipv4/ping_group_range", "0 2147483647");
                for (name, value) in &sysctls {
                    let path = name.strip_prefix("net.").context("only net.* sysctls are namespaced here")?;
                    sysctl::set_net(&path.replace('.', "/"), value)?;
                }
            }
            Ok(())
        })
        .await?;
        let id = format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple());
        Ok(Self { id, netns: spec.netns.unwrap_or(spec.node_netns), uts, ipc, own_network })
    }

    /// Namespaces for a container of this pod.
    pub(crate) fn namespaces(&self, pid: ProcessNamespace) -> Namespaces {
        Namespaces { net: Some(self.netns.clone()), uts: Some(self.uts.clone()), ipc: Some(self.ipc.clone()), pid }
    }

    /// Removes the pins; the namespaces go with their last user.
    pub(crate) fn remove(&self) -> Result<()> {
        let net = if self.own_network { ns::remove(&self.netns) } else { Ok(()) };
        let others: Vec<Result<()>> = [&self.uts, &self.ipc].into_iter().map(|pin: &PathBuf| ns::remove(pin)).collect();
        others.into_iter().fold(net, Result::and)
    }
}

/// The pin of a pod's network namespace: `tp-<lab>-p-` and eight hexadecimal digits.
pub(crate) fn netns_name(layout: &crate::layout::Layout) -> PathBuf {
    loop {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let path = layout.netns(&format!("p-{}", id.get(..8).unwrap_or("00000000")));
        if !Path::exists(&path) {
            return path;
        }
    }
}
