//! A lab of Towpath: brought up (and taken down again), its pods, their places, its agents.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde_json::{Value, json};

use crate::api::{Api, Kind};
use crate::interrupt;
use crate::noise::{Noise, Own, Snapshot};
use crate::place::Place;

/// Kubernetes namespace of everything that the benchmark makes.
pub(crate) const NAMESPACE: &str = "towpath-bench";
/// Name of the benchmark's own lab.
const OWN: &str = "bench";
/// Nodes of it.
const NODES: usize = 3;
/// Where labs pin their network namespaces.
const NETNS_DIR: &str = "/run/netns";
/// Longest wait for anything of the lab.
const LIMIT: Duration = Duration::from_secs(60);
/// Longest wait for many pods.
const MANY_LIMIT: Duration = Duration::from_secs(300);

/// A lab.
#[derive(Debug)]
pub(crate) struct Lab {
    name: String,
    towpath: PathBuf,
    kubeconfig: PathBuf,
    owned: bool,
    /// Its objects, in the benchmark's namespace.
    pub(crate) api: Api,
    /// How long each `lab up` took, in seconds.
    pub(crate) ups: Vec<f64>,
    /// What else the machine did meanwhile.
    pub(crate) noise: Noise,
    pods: BTreeMap<&'static str, Pod>,
}

/// A pod that sleeps.
#[derive(Clone, Debug)]
pub(crate) struct Pod {
    /// Its address.
    pub(crate) ip: IpAddr,
    /// Where its processes run.
    pub(crate) place: Place,
}

/// Takes an unfinished lab down.
struct Unfinished<'a>(Option<(&'a Path, &'a str)>);

impl Drop for Unfinished<'_> {
    fn drop(&mut self) {
        if let Some((towpath, name)) = self.0 {
            let _ = towpath_lab(towpath, &["down", "--name", name]);
        }
    }
}

impl Lab {
    /// Brings the benchmark's own lab up `times` times and leaves the last one.
    ///
    /// # Errors
    /// `towpath lab up` failed.
    pub(crate) fn up(times: usize) -> Result<Self> {
        Self::bring_up(OWN, NODES, times)
    }

    /// Brings a lab of two nodes up whose pods send to each other's node by this backend.
    ///
    /// # Errors
    /// `towpath lab up` failed, or a node cannot send so here.
    pub(crate) fn with_backend(backend: &str) -> Result<Self> {
        let lab = Self::bring_up(&format!("{OWN}-{backend}"), 2, 1)?;
        let config = json!({
            "apiVersion": "towpath.dev/v1alpha1",
            "kind": "NetworkConfig",
            "metadata": {"name": "default"},
            "spec": {"backend": backend},
        });
        let mut apply = Command::new(&lab.towpath);
        apply.args(["lab", "apply", "--name", &lab.name, "-f", "-"]);
        crate::api::feed(apply, &config.to_string())?;
        wait(&format!("the nodes of lab {} to send by {backend}", lab.name), || {
            let nodes = lab.agents_say()?;
            let sends = |node: &Value| {
                let peers = node.get("peers").and_then(Value::as_array);
                peers.is_some_and(|peers| {
                    !peers.is_empty() && peers.iter().all(|peer| text(peer, "/backend") == backend)
                })
            };
            Ok((nodes.len() == 2 && nodes.iter().all(sends)).then_some(()))
        })?;
        Ok(lab)
    }

    /// Brings a lab of many nodes up, once.
    ///
    /// # Errors
    /// `towpath lab up` failed.
    pub(crate) fn large(nodes: usize) -> Result<Self> {
        Self::bring_up(&format!("{OWN}-large"), nodes, 1)
    }

    /// Makes so many pods that sleep, as many on each of the first `nodes` nodes, and waits until all are ready.
    ///
    /// # Errors
    /// They are not in time.
    pub(crate) fn fill(&mut self, nodes: usize, pods: usize) -> Result<()> {
        let pods: Vec<Value> =
            (0..pods).map(|n| manifest(&format!("many-{n}"), &format!("n{}", n % nodes.max(1) + 1))).collect();
        self.api.create(&pods)?;
        let until = Instant::now() + MANY_LIMIT;
        loop {
            interrupt::check()?;
            let ready = self.api.list(Kind::Pod)?.iter().filter(|pod| is_ready(pod)).count();
            if ready >= pods.len() {
                return Ok(());
            }
            if Instant::now() >= until {
                bail!("waited {} s: {ready} of {} pods are ready", MANY_LIMIT.as_secs(), pods.len());
            }
            // Seldom: each question costs what many events do.
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// Memory of what Towpath runs on each node, in MiB: what of it is shared is counted in parts (`Pss`).
    ///
    /// # Errors
    /// The lab's cgroup cannot be read.
    pub(crate) fn node_memory(&self) -> Result<Vec<f64>> {
        let nodes = self.cgroup()?.join("nodes");
        let mut found = Vec::new();
        for node in std::fs::read_dir(&nodes).with_context(|| format!("read {}", nodes.display()))?.flatten() {
            let procs = std::fs::read_to_string(node.path().join("system/cgroup.procs")).unwrap_or_default();
            let memory: f64 = procs.lines().filter_map(proportional).sum();
            if memory > 0.0 {
                found.push(memory);
            }
        }
        Ok(found)
    }

    /// What each agent says of itself (`towpath status`); nothing of one that is about to start anew.
    fn agents_say(&self) -> Result<Vec<Value>> {
        let mut command = Command::new(&self.towpath);
        let output =
            command.args(["status", "--lab", &self.name, "-o", "json"]).output().context("run towpath status")?;
        let answers: Vec<Value> = serde_json::from_slice(&output.stdout).context("towpath status gave no JSON")?;
        Ok(answers.into_iter().filter_map(|mut answer| Some(answer.get_mut("status")?.take())).collect())
    }

    /// MTU of pods' devices in bytes, as the nodes say.
    ///
    /// # Errors
    /// They say nothing.
    pub(crate) fn pod_mtu(&self) -> Result<u64> {
        let says = self.agents_say()?;
        says.iter().find_map(|node| node.get("podMtu")?.as_u64()).context("no node says the MTU of its pods")
    }

    fn bring_up(name: &str, nodes: usize, times: usize) -> Result<Self> {
        let towpath = beside("towpath")?;
        let mut unfinished = Unfinished(Some((&towpath, name)));
        let (mut ups, mut noise) = (Vec::new(), Noise::default());
        let own = Own { pids: [std::process::id()].into(), cgroup: Some(cgroup_name(name)) };
        for _ in 0..times.max(1) {
            interrupt::check()?;
            // Also what a killed run left.
            towpath_lab(&towpath, &["down", "--name", name])?;
            crate::report::progress("towpath lab up");
            let before = Snapshot::take()?;
            let started = Instant::now();
            towpath_lab(&towpath, &["up", "--name", name, "--nodes", &nodes.to_string()])?;
            ups.push(started.elapsed().as_secs_f64());
            noise = noise.worst(before.until(&Snapshot::take()?, &own));
        }
        let (kubeconfig, api) = open(&towpath, name)?;
        unfinished.0 = None;
        drop(unfinished);
        let mut lab =
            Self { name: name.to_owned(), towpath, kubeconfig, owned: true, api, ups, noise, pods: BTreeMap::new() };
        lab.prepare()?;
        Ok(lab)
    }

    /// Uses a lab that is up.
    ///
    /// # Errors
    /// There is none of that name.
    pub(crate) fn existing(name: &str) -> Result<Self> {
        let towpath = beside("towpath")?;
        let (kubeconfig, api) = open(&towpath, name)?;
        let mut lab = Self {
            name: name.to_owned(),
            towpath,
            kubeconfig,
            owned: false,
            api,
            ups: Vec::new(),
            noise: Noise::default(),
            pods: BTreeMap::new(),
        };
        lab.prepare()?;
        Ok(lab)
    }

    fn prepare(&mut self) -> Result<()> {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}});
        // One of an earlier run may be on its way out; and pods are refused until their service account is there.
        wait(&format!("namespace {NAMESPACE} with its default service account"), || {
            match self.api.get(Kind::Namespace, NAMESPACE)? {
                None => self.api.create(std::slice::from_ref(&namespace)).map(|()| None),
                Some(leaving) if leaving.pointer("/metadata/deletionTimestamp").is_some() => Ok(None),
                Some(_) => self.api.get(Kind::ServiceAccount, "default"),
            }
        })?;
        Ok(())
    }

    /// Name of its cgroup.
    pub(crate) fn cgroup_name(&self) -> String {
        cgroup_name(&self.name)
    }

    fn cgroup(&self) -> Result<PathBuf> {
        Ok(cgroup_root()?.join(self.cgroup_name()))
    }

    /// Runtime directory of a node.
    pub(crate) fn node_run(&self, node: &str) -> PathBuf {
        Path::new("/run/towpath/lab").join(&self.name).join("nodes").join(node)
    }

    /// Network namespace of a node.
    pub(crate) fn node_netns(&self, node: &str) -> PathBuf {
        Path::new(NETNS_DIR).join(format!("tp-{}-{node}", self.name))
    }

    /// The place of a node's own processes, and its address.
    ///
    /// # Errors
    /// The lab has no such node.
    pub(crate) fn node(&self, node: &str) -> Result<(Place, IpAddr)> {
        let status: Value = serde_json::from_str(&towpath_lab(&self.towpath, &["status", "--name", &self.name])?)
            .context("towpath lab status gave no JSON")?;
        let nodes = status.get("nodes").and_then(Value::as_array).context("towpath lab status names no nodes")?;
        let found = nodes.iter().find(|known| known.get("name").and_then(Value::as_str) == Some(node));
        let address = found.and_then(|node| text(node, "/addresses/0").split('/').next()?.parse().ok());
        let address = address.with_context(|| format!("lab {} has no node {node} with an address", self.name))?;
        let cgroup = Some(self.cgroup()?.join("nodes").join(node).join("system"));
        Ok((Place { netns: Some(self.node_netns(node)), cgroup, ..Place::default() }, address))
    }

    /// A pod that sleeps, called `name`, on `node`: made the first time it is asked for.
    ///
    /// # Errors
    /// It does not run in time.
    pub(crate) fn pod(&mut self, name: &'static str, node: &str) -> Result<Pod> {
        if let Some(pod) = self.pods.get(name) {
            return Ok(pod.clone());
        }
        self.api.create(&[manifest(name, node)])?;
        let (ip, uid) = wait(&format!("pod {name} to be ready"), || {
            let pod = self.api.get(Kind::Pod, name)?.context("the pod is not there")?;
            Ok(is_ready(&pod).then(|| (text(&pod, "/status/podIP"), text(&pod, "/metadata/uid"))))
        })?;
        let pods = self.cgroup()?.join("nodes").join(node).join("pods");
        // A pod can be ready a moment before its process has entered everything.
        let (cgroup, netns) = wait(&format!("a process of pod {name} in {}/{uid}", pods.display()), || {
            Ok(populated(&pods.join(&uid)).and_then(|(cgroup, pid)| Some((cgroup, self.pod_netns(pid)?))))
        })?;
        let place = Place { netns: Some(netns), cgroup: Some(cgroup), ..Place::default() };
        let pod = Pod { ip: ip.parse().with_context(|| format!("the address {ip:?} of pod {name}"))?, place };
        self.pods.insert(name, pod.clone());
        Ok(pod)
    }

    /// The pinned namespace of a pod that a process is in; none while it is in no pod's.
    fn pod_netns(&self, pid: u32) -> Option<PathBuf> {
        let own = std::fs::metadata(format!("/proc/{pid}/ns/net")).ok()?.ino();
        let prefix = format!("tp-{}-p-", self.name);
        let pins = std::fs::read_dir(NETNS_DIR).ok()?.flatten();
        let mut pins = pins.filter(|pin| pin.file_name().to_string_lossy().starts_with(&prefix));
        pins.find(|pin| pin.metadata().is_ok_and(|pin| pin.ino() == own)).map(|pin| pin.path())
    }

    /// Seconds from the start of `kubectl apply` until a pod is seen Running, and how many of them the command itself ran.
    ///
    /// # Errors
    /// It does not run in time.
    pub(crate) fn time_pod(&mut self, name: &str, node: &str) -> Result<(f64, f64)> {
        let command = if crate::api::has_kubectl() {
            let mut command = Command::new("kubectl");
            command.env("KUBECONFIG", &self.kubeconfig).args(["apply", "-n", NAMESPACE, "-f", "-"]);
            command
        } else {
            let mut command = Command::new(&self.towpath);
            command.args(["lab", "apply", "--name", &self.name, "-n", NAMESPACE, "-f", "-"]);
            command
        };
        let started = Instant::now();
        crate::api::feed(command, &manifest(name, node).to_string())?;
        let applied = started.elapsed().as_secs_f64();
        wait(&format!("pod {name} to run"), || {
            let pod = self.api.get(Kind::Pod, name)?;
            Ok(pod.filter(|pod| text(pod, "/status/phase") == "Running"))
        })?;
        let running = started.elapsed().as_secs_f64();
        self.api.delete(Kind::Pod, &[name.to_owned()])?;
        Ok((running, applied))
    }

    /// Process ids of the agents.
    fn agents(&self) -> Result<Vec<String>> {
        let all = self.node_processes()?.into_iter().map(|pid| pid.to_string());
        let found: Vec<String> = all.filter(|pid| is_agent(pid)).collect();
        if found.is_empty() {
            bail!("no `towpath agent` runs in lab {}", self.name);
        }
        Ok(found)
    }

    /// Everything of Towpath that runs on its nodes.
    ///
    /// # Errors
    /// The lab's cgroup cannot be read.
    pub(crate) fn node_processes(&self) -> Result<Vec<u32>> {
        let nodes = self.cgroup()?.join("nodes");
        let mut found = Vec::new();
        for node in std::fs::read_dir(&nodes).with_context(|| format!("read {}", nodes.display()))?.flatten() {
            let procs = std::fs::read_to_string(node.path().join("system/cgroup.procs")).unwrap_or_default();
            found.extend(procs.lines().filter_map(|pid| pid.parse::<u32>().ok()));
        }
        Ok(found)
    }

    /// Resident memory of each agent, in MiB.
    ///
    /// # Errors
    /// No agent runs.
    pub(crate) fn agent_memory(&self) -> Result<Vec<f64>> {
        Ok(self.agents()?.iter().filter_map(|pid| resident(pid, "VmRSS:")).collect())
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.owned {
            if let Err(error) = towpath_lab(&self.towpath, &["down", "--name", &self.name]) {
                eprintln!("towpath-bench: {error:#}; run `towpath lab down --name {}`", self.name);
            }
            return;
        }
        if let Err(error) = self.api.delete(Kind::Namespace, &[NAMESPACE.to_owned()]) {
            eprintln!("towpath-bench: {error:#}; run `kubectl delete namespace {NAMESPACE}`");
        }
    }
}

/// What the kernel counts to all BPF maps that a process holds, in MiB.
///
/// # Errors
/// Its descriptors cannot be read.
pub(crate) fn map_memory(pid: &str) -> Result<f64> {
    let directory = format!("/proc/{pid}/fdinfo");
    let mut maps: BTreeMap<u64, u64> = BTreeMap::new();
    for entry in std::fs::read_dir(&directory).with_context(|| format!("read {directory}"))?.flatten() {
        let info = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
            line.and_then(|value| value.trim().parse::<u64>().ok())
        };
        if let (Some(id), Some(bytes)) = (field("map_id"), field("memlock")) {
            maps.insert(id, bytes);
        }
    }
    Ok(maps.values().sum::<u64>() as f64 / 1_048_576.0)
}

/// Where the cgroup v2 hierarchy is mounted.
///
/// # Errors
/// It is not.
pub(crate) fn cgroup_root() -> Result<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    let mut lines = table.lines().map(|line| line.split(' '));
    let root = lines.find_map(|mut fields| {
        let at = fields.nth(1)?;
        (fields.next()? == "cgroup2").then(|| PathBuf::from(at))
    });
    root.context("no cgroup v2 hierarchy is mounted")
}

fn cgroup_name(lab: &str) -> String {
    format!("towpath-lab-{lab}")
}

fn open(towpath: &Path, name: &str) -> Result<(PathBuf, Api)> {
    let path = towpath_lab(towpath, &["kubeconfig", "--name", name, "--path"])?;
    let kubeconfig = PathBuf::from(path.trim());
    let api = Api::open(towpath, name, &kubeconfig, NAMESPACE)?;
    Ok((kubeconfig, api))
}

fn manifest(name: &str, node: &str) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {"app": name}},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "sleep", "image": "busybox", "command": ["sleep", "86400"]}],
        },
    })
}

fn is_ready(pod: &Value) -> bool {
    let conditions = pod.pointer("/status/conditions").and_then(Value::as_array);
    conditions.is_some_and(|all| {
        all.iter().any(|c| c.get("type") == Some(&json!("Ready")) && c.get("status") == Some(&json!("True")))
    })
}

fn text(object: &Value, pointer: &str) -> String {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default().to_owned()
}

/// The first cgroup at or below a directory that has a process, and the process.
fn populated(dir: &Path) -> Option<(PathBuf, u32)> {
    let procs = std::fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    if let Some(pid) = procs.lines().find_map(|line| line.parse().ok()) {
        return Some((dir.to_owned(), pid));
    }
    let entries = std::fs::read_dir(dir).ok()?.flatten();
    entries.filter(|entry| entry.path().is_dir()).find_map(|entry| populated(&entry.path()))
}

fn is_agent(pid: &str) -> bool {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    line.split(|byte| *byte == 0).nth(1) == Some(b"agent")
}

/// A size in the status of a process (`VmRSS:`, `VmHWM:`), in MiB.
pub(crate) fn resident(pid: &str, field: &str) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// The memory of a process in MiB, with its part of what it shares (`proc_pid_smaps(5)`).
fn proportional(pid: &str) -> Option<f64> {
    let rollup = std::fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).ok()?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"))?;
    Some(line.split_whitespace().next()?.parse::<f64>().ok()? / 1024.0)
}

/// A binary that the build put beside this one.
///
/// # Errors
/// It is not there.
pub(crate) fn beside(name: &str) -> Result<PathBuf> {
    if let Some(towpath) = std::env::var_os("TOWPATH") {
        let path = PathBuf::from(towpath).with_file_name(name);
        return if path.is_file() {
            Ok(path)
        } else {
            Err(anyhow!("TOWPATH is set, but there is no {}", path.display()))
        };
    }
    let own = std::env::current_exe().context("no path of the running program")?;
    let mut dirs = own.ancestors().skip(1).take(3);
    dirs.find_map(|dir| Some(dir.join(name)).filter(|path| path.is_file())).ok_or_else(|| {
        anyhow!("no {name} beside {}: run `cargo build --profile bench-lab --bins` first", own.display())
    })
}

fn towpath_lab(towpath: &Path, args: &[&str]) -> Result<String> {
    let output = Command::new(towpath)
        .arg("lab")
        .args(args)
        // Ctrl-C is the benchmark's to handle: what takes a lab down must not be ended by it.
        .process_group(0)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start {}", towpath.display()))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("towpath lab {}: {}: {}", args.join(" "), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Asks every 5 ms until there is an answer.
///
/// # Errors
/// There is none in time, asking failed, or the user interrupted.
pub(crate) fn wait<T>(what: &str, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + LIMIT;
    loop {
        interrupt::check()?;
        if let Some(answer) = ask()? {
            return Ok(answer);
        }
        if Instant::now() > deadline {
            bail!("waited {} s for {what}", LIMIT.as_secs());
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}
