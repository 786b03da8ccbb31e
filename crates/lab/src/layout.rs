//! Where everything of a lab is, derived from its name alone.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

use crate::kernel::{mounts, ns};

/// Directory of all labs' runtime state (sockets, mounts, container roots); gone with the lab and with a reboot.
pub const RUN_DIR: &str = "/run/towpath/lab";
/// Directory of all labs' lasting state (API objects, node disks, logs).
pub const STATE_DIR: &str = "/var/lib/towpath/lab";

/// A lab's name: 1 to 20 of `a-z`, `0-9` and `-`, as it becomes part of namespace and cgroup names.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabName(String);

impl LabName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for LabName {
    fn default() -> Self {
        Self("lab".to_owned())
    }
}

impl fmt::Display for LabName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for LabName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let good = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
        if text.is_empty() || text.len() > 20 || !text.chars().all(good) {
            bail!("lab name {text:?} is not 1 to 20 characters of a-z, 0-9 and '-'");
        }
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LabName {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<LabName> for String {
    fn from(name: LabName) -> Self {
        name.0
    }
}

/// All paths of one lab.
#[derive(Clone, Debug)]
pub struct Layout {
    name: LabName,
    run: PathBuf,
    state: PathBuf,
    cgroup: PathBuf,
}

impl Layout {
    /// Paths of the lab called `name`; fails only when the machine has no cgroup v2 hierarchy.
    pub fn new(name: &LabName) -> Result<Self> {
        Ok(Self {
            name: name.clone(),
            run: Path::new(RUN_DIR).join(name.as_str()),
            state: Path::new(STATE_DIR).join(name.as_str()),
            cgroup: mounts::cgroup2()?.join(format!("towpath-lab-{name}")),
        })
    }

    /// The lab's name.
    pub fn name(&self) -> &LabName {
        &self.name
    }

    /// Runtime directory.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// State directory.
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Lock that commands which change one lab take: `up`, `down`, `stop`, `start`, `node`.
    pub fn lock(&self) -> PathBuf {
        Path::new(RUN_DIR).join(format!("{}.lock", self.name))
    }

    /// The persisted [`crate::options::ClusterSpec`].
    pub fn cluster_file(&self) -> PathBuf {
        self.state.join("cluster.json")
    }

    /// Admin kubeconfig.
    pub fn kubeconfig(&self) -> PathBuf {
        self.state.join("kubeconfig")
    }

    /// Certificates, tokens and the kubeconfigs of components.
    pub fn credentials(&self) -> PathBuf {
        self.state.join("credentials")
    }

    /// Bearer tokens of components.
    pub(crate) fn tokens(&self) -> PathBuf {
        self.credentials().join("tokens.json")
    }

    /// Where the running supervisor is asked for changes.
    pub(crate) fn control_socket(&self) -> PathBuf {
        self.run.join("control.sock")
    }

    /// Data of the API server.
    pub fn api_data(&self) -> PathBuf {
        self.state.join("apiserver")
    }

    /// Log of the supervisor.
    pub fn supervisor_log(&self) -> PathBuf {
        self.state.join("supervisor.log")
    }

    /// Prepared image trees.
    pub(crate) fn images(&self) -> PathBuf {
        self.state.join("images")
    }

    /// Cgroup of everything.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// Cgroup of the supervisor.
    pub fn supervisor_cgroup(&self) -> PathBuf {
        self.cgroup.join("supervisor")
    }

    /// Cgroup of one node: what the agent attaches its socket programs to.
    pub fn node_cgroup(&self, node: &str) -> PathBuf {
        self.cgroup.join("nodes").join(node)
    }

    /// Cgroup of a node's own processes (agent, carry, `lab exec`).
    pub fn node_system_cgroup(&self, node: &str) -> PathBuf {
        self.node_cgroup(node).join("system")
    }

    /// Cgroup of one pod.
    pub(crate) fn pod_cgroup(&self, node: &str, uid: &str) -> PathBuf {
        self.node_cgroup(node).join("pods").join(uid)
    }

    /// Runtime directory of a node.
    pub fn node_run(&self, node: &str) -> PathBuf {
        self.run.join("nodes").join(node)
    }

    /// State directory of a node: leases and logs.
    pub fn node_state(&self, node: &str) -> PathBuf {
        self.state.join("nodes").join(node)
    }

    /// BPF file system of a node.
    pub fn node_bpffs(&self, node: &str) -> PathBuf {
        self.node_run(node).join("bpf")
    }

    /// CNI configuration directory of a node.
    pub fn node_cni_conf(&self, node: &str) -> PathBuf {
        self.node_run(node).join("cni/net.d")
    }

    /// Runtime directory of a pod.
    pub(crate) fn pod_run(&self, uid: &str) -> PathBuf {
        self.run.join("pods").join(uid)
    }

    /// Directory of a pod's container logs.
    pub(crate) fn pod_logs(&self, node: &str, namespace: &str, pod: &str, uid: &str) -> PathBuf {
        self.node_state(node).join("pods").join(format!("{namespace}_{pod}_{uid}"))
    }

    /// The only directory of the machine that `hostPath` volumes of a node see.
    pub(crate) fn node_host_dir(&self, node: &str) -> PathBuf {
        self.node_state(node).join("host")
    }

    /// Network namespace `tp-<lab>-<which>`: `underlay`, `outside`, or a node's name.
    pub fn netns(&self, which: &str) -> PathBuf {
        Path::new(ns::NETNS_DIR).join(format!("tp-{}-{which}", self.name))
    }

    /// Whether a name in `/run/netns` is one of this lab's, and not of another lab whose name begins alike.
    pub(crate) fn owns_netns(&self, file_name: &str) -> bool {
        let Some(which) = file_name.strip_prefix(&format!("tp-{}-", self.name)) else { return false };
        let digits = |text: &str| text.chars().all(|c| c.is_ascii_digit());
        which == "underlay"
            || which.strip_prefix("outside").is_some_and(digits)
            || which.strip_prefix('n').is_some_and(|n| !n.is_empty() && digits(n))
            || which
                .strip_prefix("p-")
                .is_some_and(|p| p.len() == 8 && p.chars().all(|c| c.is_ascii_digit() || ('a'..='f').contains(&c)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_could_escape_a_path_are_refused() {
        for bad in ["", "../x", "UPPER", "a b", "a/b", "abcdefghijklmnopqrstu"] {
            assert!(bad.parse::<LabName>().is_err(), "{bad:?} was accepted");
        }
        assert!("my-lab-2".parse::<LabName>().is_ok());
    }

    #[test]
    fn a_lab_does_not_claim_namespaces_of_a_lab_whose_name_begins_alike() {
        let lab = |name: &str| Layout::new(&name.parse().unwrap()).unwrap();
        assert!(lab("a").owns_netns("tp-a-underlay"));
        assert!(lab("a").owns_netns("tp-a-n12"));
        assert!(lab("a").owns_netns("tp-a-outside2"));
        assert!(lab("a").owns_netns("tp-a-p-0123abcd"));
        assert!(!lab("a").owns_netns("tp-a-b-underlay"));
        assert!(!lab("a").owns_netns("tp-a-p-n1"));
        assert!(!lab("a").owns_netns("tp-a-n1-p-0123abcd"));
        assert!(!lab("a").owns_netns("tp-ab-n1"));
    }
}
