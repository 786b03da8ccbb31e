//! Nodes of Flannel are taken over one by one, on a running cluster, and one goes back: at every step every pod reaches every other,
//! and between pods that nobody recreates not a packet is lost. Pods are made by the lab's kubelets through whatever CNI
//! configuration a node has at that moment.

#[path = "migrate/flannel.rs"]
mod flannel;
#[path = "migrate/traffic.rs"]
mod traffic;

use std::collections::BTreeMap;
use std::fs::File;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Pod, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};

use flannel::{Backend, Files, FlannelNode, conf_dir, on_node, run_dir, state_dir};
use traffic::Traffic;

const PATIENCE: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(3);

/// Our agent on a node that the lab gave to another network; ended when dropped.
struct Agent {
    child: Child,
}

impl Agent {
    fn config(cluster: &Cluster, node: &str) -> Result<PathBuf> {
        let lab = cluster.name();
        let state = state_dir(lab, node);
        let tokens: Value = serde_json::from_slice(&std::fs::read(
            format!("/var/lib/towpath/lab/{lab}/credentials/tokens.json"),
        )?)?;
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
        let config = json!({
            "nodeName": node, "kubeconfig": file,
            "bpffs": run_dir(lab, node).join("bpf"),
            "cgroup": machine::lab_cgroup(lab)?.join("nodes").join(node),
            "stateDir": state.join("towpath"), "runDir": run_dir(lab, node).join("towpath"),
            "cniConfDir": conf_dir(lab, node), "cniStateDir": state.join("cni"),
            "vxlanVni": 1,
        });
        for dir in [state.join("towpath"), run_dir(lab, node).join("towpath")] {
            std::fs::create_dir_all(dir)?;
        }
        let path = state.join("agent.json");
        std::fs::write(&path, config.to_string())?;
        Ok(path)
    }

    fn start(cluster: &Cluster, node: &str) -> Result<Self> {
        let config = Self::config(cluster, node)?;
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

    fn stop(&mut self) -> Result<()> {
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

fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    let socket = run_dir(cluster.name(), node).join("towpath/agent.sock");
    let out = Command::new(cluster.towpath())
        .args(["status", "-o", "json", "--socket"])
        .arg(socket)
        .output()
        .context("towpath status")?;
    let answers: Value = serde_json::from_slice(&out.stdout).context("towpath status gave no JSON")?;
    answers.pointer("/0/status").cloned().with_context(|| format!("no status: {answers}"))
}

fn log_of(cluster: &Cluster, node: &str) -> String {
    let text = std::fs::read_to_string(state_dir(cluster.name(), node).join("agent.log")).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.iter().skip(lines.len().saturating_sub(40)).map(|line| format!("{line}\n")).collect()
}

fn ready(cluster: &Cluster, node: &str) -> Result<Value> {
    wait(&format!("the agent of {node} to be ready"), PATIENCE, || {
        let status = status(cluster, node)?;
        if status.pointer("/ready") == Some(&json!(true)) { Ok(status) } else { bail!("{status}") }
    })
    .with_context(|| log_of(cluster, node))
}

/// A cluster of Flannel's with a pod on every node.
struct Walk {
    cluster: Cluster,
    backend: Backend,
    nodes: Vec<FlannelNode>,
    agents: BTreeMap<String, Agent>,
    pods: BTreeMap<String, Pod>,
    _files: Files,
}

impl Walk {
    fn new(name: &str, backend: Backend) -> Result<Self> {
        let towpath = towpath_walkthrough::cluster::towpath_binary()?;
        let files = Files::new(name, &towpath)?;
        let cluster = files.lab(name, 3)?;
        let nodes = flannel::start(&cluster, backend)?;
        let mut walk =
            Self { cluster, backend, nodes, agents: BTreeMap::new(), pods: BTreeMap::new(), _files: files };
        for node in ["n1", "n2", "n3"] {
            walk.run(&format!("old-{node}"), node)?;
        }
        Ok(walk)
    }

    /// A pod that serves, by whichever network the node has now.
    fn run(&mut self, name: &str, node: &str) -> Result<Pod> {
        self.cluster.apply_text(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  nodeName: {node}\n  \
             terminationGracePeriodSeconds: 0\n  containers: [{{name: web, image: nginx, ports: [{{containerPort: 80}}]}}]\n"
        ))?;
        let pod = self.cluster.wait_pod(name).with_context(|| log_of(&self.cluster, node))?;
        self.pods.insert(name.to_owned(), pod.clone());
        Ok(pod)
    }

    fn delete(&mut self, name: &str) -> Result<()> {
        let out = self.cluster.try_kubectl(&["delete", "pod", name, "--wait=true"])?;
        ensure!(out.status.success(), "delete {name}: {}", String::from_utf8_lossy(&out.stderr));
        self.pods.remove(name);
        Ok(())
    }

    fn place(&self, pod: &str) -> Result<(Place, Pod)> {
        let pod = self.pods.get(pod).with_context(|| format!("no pod {pod}"))?;
        Ok((Place::of_pod(&self.cluster, pod)?, pod.clone()))
    }

    /// Every pod asks every other, and every node asks every pod.
    fn everybody_reaches_everybody(&self, when: &str) -> Result<()> {
        let mut from = Vec::new();
        for name in self.pods.keys() {
            from.push((name.clone(), self.place(name)?.0));
        }
        for node in &self.nodes {
            from.push((node.name.clone(), Place::of_node(&self.cluster, &node.name)?));
        }
        for (name, place) in &from {
            for pod in self.pods.values().filter(|pod| pod.name != *name) {
                let to = SocketAddr::new(address(&pod.ip)?, 80);
                let answer = place.enter(|| Session::open(to, ANSWER)?.ask(ANSWER));
                answer.with_context(|| {
                    format!("{when}: {name} to {} ({}, {})\n{}", pod.name, pod.ip, pod.node, self.states())
                })?;
            }
        }
        Ok(())
    }

    fn states(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let said = self.cluster.node(&node.name, "ip -br addr; ip route; ip neigh; bridge fdb show dev flannel.1");
            text += &format!("--- {}\n{}\n", node.name, said.map(|said| said.all()).unwrap_or_default());
            if let Ok(status) = status(&self.cluster, &node.name) {
                text += &format!("{status}\n");
            }
            if self.agents.contains_key(&node.name) {
                text += &log_of(&self.cluster, &node.name);
            }
        }
        text
    }

    /// Pings and connections between all pods of these names while something is done.
    fn under_traffic<T>(&mut self, when: &str, pods: &[&str], work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let mut traffic = Traffic::default();
        for from in pods {
            let (place, _) = self.place(from)?;
            for to in pods.iter().filter(|to| to != &from) {
                traffic.between(&place, &self.place(to)?.1)?;
            }
        }
        let done = work(self);
        let lost = traffic.end();
        let done = done.with_context(|| when.to_owned())?;
        let lost = lost.with_context(|| when.to_owned())?;
        ensure!(lost.is_empty(), "{when}: {}\n{}", lost.join("\n"), self.states());
        Ok(done)
    }

    fn take_over(&mut self, node: &str) -> Result<Value> {
        let agent = Agent::start(&self.cluster, node)?;
        self.agents.insert(node.to_owned(), agent);
        ready(&self.cluster, node)
    }
}

fn conf_files(lab: &str, node: &str) -> Vec<String> {
    let entries = std::fs::read_dir(conf_dir(lab, node)).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

fn walk(name: &str, backend: Backend) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new(name, backend)?;
    walk.everybody_reaches_everybody("before")?;
    let old = ["old-n1", "old-n2", "old-n3"];
    let nodes = ["n1", "n2", "n3"];
    for (step, node) in nodes.into_iter().enumerate() {
        // 1. The agent comes; nothing that runs notices.
        let status = walk.under_traffic(&format!("taking {node} over"), &old, |walk| walk.take_over(node))?;
        ensure!(conf_files(name, node).contains(&"10-towpath.conflist".to_owned()), "no configuration of ours");
        ensure!(!conf_files(name, node).contains(&"10-flannel.conflist".to_owned()), "Flannel's is still read");
        wait("status to name the pod that is still Flannel's", PATIENCE, || {
            let left = self::status(&walk.cluster, node)?;
            let pods = left.pointer("/podsOfPredecessor").cloned().unwrap_or_default();
            if pods == json!([format!("default/old-{node}")]) { Ok(()) } else { bail!("{left}") }
        })?;
        let flannels = status.pointer("/peers").and_then(Value::as_array).into_iter().flatten();
        let flannels = flannels.filter(|peer| peer.get("network") == Some(&json!("flannel"))).count();
        ensure!(flannels <= 2 - step, "of the other nodes {flannels} are said to be Flannel's: {status}");
        walk.everybody_reaches_everybody(&format!("{node} taken over"))?;
        // 2. A new pod comes beside the old one, with an address of its own.
        let new = format!("new-{node}");
        walk.under_traffic(&format!("a new pod on {node}"), &old, |walk| walk.run(&new, node))?;
        let pods: Vec<&Pod> = walk.pods.values().collect();
        for pod in &pods {
            ensure!(pods.iter().filter(|other| other.ip == pod.ip).count() == 1, "{} is given twice", pod.ip);
        }
        walk.everybody_reaches_everybody(&format!("a new pod on {node}"))?;
    }
    Ok(())
}

#[test]
fn nodes_of_flannels_vxlan_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgvx", Backend::Vxlan)
}

#[test]
fn nodes_of_flannels_host_gw_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mggw", Backend::HostGw)
}
