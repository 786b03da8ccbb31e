//! Our agent on a node of the lab, what it says, and `towpath node`.

use std::fs::File;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine;

use crate::flannel::{conf_dir, run_dir, state_dir};

pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

/// Our agent on a node that the lab gave to another network; ended when dropped.
pub(crate) struct Agent {
    child: Child,
}

impl Agent {
    pub(crate) fn config(cluster: &Cluster, node: &str, vni: u32) -> Result<PathBuf> {
        let lab = cluster.name();
        let state = state_dir(lab, node);
        let tokens: Value =
            serde_json::from_slice(&std::fs::read(format!("/var/lib/towpath/lab/{lab}/credentials/tokens.json"))?)?;
        let token = tokens.pointer(&format!("/agents/{node}")).and_then(Value::as_str).context("no token")?;
        let admin = std::fs::read_to_string(cluster.kubeconfig())?;
        let authority = admin.lines().find_map(|line| line.trim().strip_prefix("certificate-authority-data: "));
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": "https://192.168.255.1:6443",
                "certificate-authority-data": authority.context("no certificate authority")?.trim_matches('"'),
            }}],
            "users": [{"name": "c", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "c"}}],
        });
        let file = state.join("agent.kubeconfig");
        std::fs::write(&file, kubeconfig.to_string())?;
        let dual = cluster.families() == Families::Dual;
        let ranges = |v4: &'static str, v6| if dual { vec![v4, v6] } else { vec![v4] };
        let config = json!({
            "clusterCidrs": ranges("10.244.0.0/16", "fd00:10:244::/56"),
            "serviceCidrs": ranges("10.96.0.0/12", "fd00:10:96::/112"),
            "nodeName": node, "kubeconfig": file,
            "bpffs": run_dir(lab, node).join("bpf"),
            "cgroup": machine::lab_cgroup(lab)?.join("nodes").join(node),
            "stateDir": state.join("towpath"), "runDir": run_dir(lab, node).join("towpath"),
            "cniConfDir": conf_dir(lab, node), "cniStateDir": state.join("cni"),
            "vxlanVni": vni, "devices": ["eth*"],
        });
        for dir in [state.join("towpath"), run_dir(lab, node).join("towpath")] {
            std::fs::create_dir_all(dir)?;
        }
        let path = state.join("agent.json");
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }

    pub(crate) fn start(cluster: &Cluster, node: &str, vni: u32) -> Result<Self> {
        let config = Self::config(cluster, node, vni)?;
        let log = File::create(state_dir(cluster.name(), node).join("agent.log"))?;
        let child = Command::new(cluster.towpath())
            .args(["lab", "exec", "--name", cluster.name(), node, "--"])
            .arg(cluster.towpath())
            .args(["agent", "--config"])
            .arg(config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start an agent")?;
        Ok(Self { child })
    }

    pub(crate) fn stop(&mut self) -> Result<()> {
        let pid = i32::try_from(self.child.id())?;
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM)?;
        self.child.wait().map(drop).context("wait for the agent")
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    let socket = run_dir(cluster.name(), node).join("towpath/agent.sock");
    let out = Command::new(cluster.towpath())
        .args(["status", "-o", "json", "--socket"])
        .arg(socket)
        .output()
        .context("towpath status")?;
    let answers: Value = serde_json::from_slice(&out.stdout).context("towpath status gave no JSON")?;
    answers.pointer("/0/status").cloned().with_context(|| format!("no status: {answers}"))
}

pub(crate) fn log_of(cluster: &Cluster, node: &str) -> String {
    let text = std::fs::read_to_string(state_dir(cluster.name(), node).join("agent.log")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(40)).map(|line| format!("{line}\n")).collect()
}

pub(crate) fn ready(cluster: &Cluster, node: &str) -> Result<Value> {
    wait(&format!("the agent of {node} to be ready"), PATIENCE, || {
        let status = status(cluster, node)?;
        if status.pointer("/ready") == Some(&json!(true)) { Ok(status) } else { bail!("{status}") }
    })
    .with_context(|| log_of(cluster, node))
}

/// `towpath node …` on a node; whether it worked, and what it said.
pub(crate) fn node_command(cluster: &Cluster, node: &str, arguments: &[&str]) -> Result<(bool, String)> {
    let out = Command::new(cluster.towpath())
        .args(["lab", "exec", "--name", cluster.name(), node, "--"])
        .arg(cluster.towpath())
        .arg("node")
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .context("towpath node")?;
    let text = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    Ok((out.status.success(), text))
}
