//! The node: network namespaces, a cgroup, an agent that can be killed and started again, pods that are added as a runtime adds them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use super::listener::Listener;
use super::objects;
use super::server::ApiServer;
use crate::api::Connection;
use crate::cni::{Scratch, first_plugin};
use crate::lab::{Pod, beside, cgroup_root, resident, wait};
use crate::netns::Netns;
use crate::place::Place;
use crate::worker;

/// The `number`th node's name, address and pod range.
fn named(number: usize) -> [String; 3] {
    [format!("n{number}"), format!("192.168.77.{number}"), format!("10.244.{number}.0/24")]
}

/// Entries for Services that an agent has room for if nobody says otherwise.
const DEFAULT_ENTRIES: usize = 65_536;
/// Where the agent serves its metrics, on the node's loopback.
const METRICS: u16 = 9116;

/// See the module.
#[derive(Debug)]
pub(crate) struct Node {
    /// What the agent watches.
    pub(crate) api: ApiServer,
    name: String,
    agent: Option<Agent>,
    pods: BTreeMap<&'static str, Pod>,
    // In the order in which they go: processes of pods, cgroups, namespaces, files.
    containers: Vec<Netns>,
    cgroup: Cgroup,
    netns: Netns,
    _outside: Option<Netns>,
    scratch: Scratch,
}

/// A running agent.
#[derive(Debug)]
struct Agent(Child);

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A cgroup with children, gone when dropped, as are the processes in it by then.
#[derive(Debug)]
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Result<Self> {
        let cgroup = Self(cgroup_root()?.join(name));
        cgroup.child("system")?;
        Ok(cgroup)
    }

    fn child(&self, name: &str) -> Result<PathBuf> {
        let path = self.0.join(name);
        std::fs::create_dir_all(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // A process that was killed is in its cgroup for a moment longer.
        for _ in 0..100 {
            let children = std::fs::read_dir(&self.0).into_iter().flatten().flatten();
            for child in children.filter(|entry| entry.path().is_dir()) {
                let _ = std::fs::remove_dir(child.path());
            }
            if std::fs::remove_dir(&self.0).is_ok() || !self.0.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        eprintln!("towpath-bench: cgroup {} is not empty and stays; remove it with rmdir", self.0.display());
    }
}

impl Node {
    /// Makes a node whose agent does not run yet, and has room for so many Services of one port.
    ///
    /// # Errors
    /// Not root, or something of it cannot be made.
    pub(crate) fn new(services: usize) -> Result<Self> {
        let (netns, outside) = (Netns::new("node")?, Netns::new("outside")?);
        plug(&netns, &outside)?;
        outside.ip("addr add 192.168.77.254/24 dev eth0\nlink set eth0 up")?;
        Self::inside(netns, Some(outside), 1, &[1], services)
    }

    /// Makes two such nodes with a wire between them. Each has an API server of its own: what both are to know is told to both.
    ///
    /// # Errors
    /// As [`Node::new`].
    pub(crate) fn pair() -> Result<[Self; 2]> {
        let (one, two) = (Netns::new("node-1")?, Netns::new("node-2")?);
        plug(&one, &two)?;
        Ok([Self::inside(one, None, 1, &[1, 2], 1)?, Self::inside(two, None, 2, &[1, 2], 1)?])
    }

    /// The `number`th of these nodes, in a namespace with an `eth0`.
    fn inside(netns: Netns, outside: Option<Netns>, number: usize, all: &[usize], services: usize) -> Result<Self> {
        let scratch = Scratch::new()?;
        for directory in ["bpf", "state", "run", "cni", "cni-state"] {
            std::fs::create_dir_all(scratch.path().join(directory))?;
        }
        let [name, address, _] = named(number);
        netns.ip(&format!("addr add {address}/24 dev eth0\nlink set eth0 up\nroute add default via 192.168.77.254"))?;
        let Some(path) = netns.place().netns else { bail!("a namespace without a file") };
        let api = ApiServer::listen(&path)?;
        for [name, address, range] in all.iter().map(|number| named(*number)) {
            api.apply(objects::node(&name, &address, &range))?;
        }
        api.apply(objects::namespace())?;
        let cgroup = Cgroup::new(&scratch.name())?;
        let node = Self {
            api,
            name,
            agent: None,
            pods: BTreeMap::new(),
            containers: Vec::new(),
            cgroup,
            netns,
            _outside: outside,
            scratch,
        };
        std::fs::write(node.file("kubeconfig"), node.api.kubeconfig())?;
        std::fs::write(node.file("agent.json"), node.config(services).to_string())?;
        Ok(node)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn config(&self, services: usize) -> Value {
        let mut config = json!({
            "nodeName": self.name, "kubeconfig": self.file("kubeconfig"), "bpffs": self.file("bpf"), "cgroup": self.cgroup.0,
            "stateDir": self.file("state"), "runDir": self.file("run"), "cniConfDir": self.file("cni"),
            "cniStateDir": self.file("cni-state"), "serviceProxy": "towpath", "dns": "off",
            "metricsListen": format!("127.0.0.1:{METRICS}"),
        });
        // An entry for the port, and one for the address.
        let entries = services.saturating_mul(2).saturating_add(1024);
        if let (true, Some(config)) = (entries > DEFAULT_ENTRIES, config.as_object_mut()) {
            config.insert("limits".to_owned(), json!({"services": entries}));
        }
        config
    }

    /// Starts the agent with nothing of an earlier one in the kernel: what is pinned is so in a mount namespace of the agent's own
    /// and goes with it.
    ///
    /// # Errors
    /// It cannot be started.
    pub(crate) fn start_agent(&mut self) -> Result<()> {
        self.stop_agent();
        let _ = std::fs::remove_file(self.conflist());
        let log = File::create(self.file("agent.log"))?;
        let place =
            Place { cgroup: Some(self.cgroup.child("system")?), bpffs: Some(self.file("bpf")), ..self.netns.place() };
        let (towpath, config) =
            (beside("towpath")?.display().to_string(), self.file("agent.json").display().to_string());
        let child = worker::command(&place, &["run", "--", &towpath, "agent", "--config", &config])?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the agent")?;
        self.agent = Some(Agent(child));
        Ok(())
    }

    /// Waits until the agent serves its runtime.
    ///
    /// # Errors
    /// It does not come up in time; the end of its log is in the message.
    pub(crate) fn until_ready(&mut self) -> Result<()> {
        let conflist = self.conflist();
        let ready = wait("the agent to write its CNI configuration", || {
            if let Some(status) = self.agent.as_mut().and_then(|agent| agent.0.try_wait().ok().flatten()) {
                bail!("the agent has ended: {status}");
            }
            Ok(conflist.is_file().then_some(()))
        });
        ready.with_context(|| self.end_of_log())
    }

    /// The last lines of the agent's log, for messages.
    pub(crate) fn end_of_log(&self) -> String {
        let log = std::fs::read_to_string(self.file("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(12).collect();
        format!("the agent's log ends:\n{}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }

    /// Kills the agent. What it pinned goes with it.
    pub(crate) fn stop_agent(&mut self) {
        self.agent = None;
    }

    fn conflist(&self) -> PathBuf {
        self.file("cni").join("10-towpath.conflist")
    }

    /// Process id of the agent.
    ///
    /// # Errors
    /// None runs.
    pub(crate) fn agent(&self) -> Result<u32> {
        Ok(self.agent.as_ref().context("no agent runs")?.0.id())
    }

    /// Name of the cgroup of all processes of the node.
    pub(crate) fn cgroup_name(&self) -> String {
        self.cgroup.0.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// A pod of this name, added the first time it is asked for.
    ///
    /// # Errors
    /// The plugin refused.
    pub(crate) fn pod(&mut self, name: &'static str) -> Result<Pod> {
        if let Some(pod) = self.pods.get(name) {
            return Ok(pod.clone());
        }
        self.api.apply(objects::pod(name, &self.name))?;
        let container = Netns::new(name)?;
        let ip = self.add(name, &container)?;
        let place = Place { cgroup: Some(self.cgroup.child(&format!("pod-{name}"))?), ..container.place() };
        let pod = Pod { ip, place };
        self.containers.push(container);
        self.pods.insert(name, pod.clone());
        Ok(pod)
    }

    fn add(&self, name: &str, container: &Netns) -> Result<IpAddr> {
        let path = self.conflist();
        let list = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        let config = first_plugin(&serde_json::from_slice(&list)?)?;
        let plugin = beside("towpath-cni")?.display().to_string();
        let netns = container.place().netns.unwrap_or_default();
        let mut child = worker::command(&self.netns.place(), &["run", "--", &plugin])?
            .envs([("CNI_COMMAND", "ADD"), ("CNI_IFNAME", "eth0"), ("CNI_PATH", "/"), ("CNI_CONTAINERID", name)])
            .env("CNI_NETNS", &netns)
            .env("CNI_ARGS", objects::cni_args(name))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {plugin}"))?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends early says why itself.
            let _ = stdin.write_all(config.to_string().as_bytes());
        }
        let output = child.wait_with_output().with_context(|| format!("wait for {plugin}"))?;
        let said = String::from_utf8_lossy(&output.stdout);
        if !output.status.success() {
            bail!("ADD of pod {name}: {}; {}", said.trim(), self.end_of_log());
        }
        let result: Value = serde_json::from_str(&said).context("the result of ADD is no JSON")?;
        let address = result.pointer("/ips/0/address").and_then(Value::as_str).and_then(|text| text.split('/').next());
        address.and_then(|text| text.parse().ok()).with_context(|| format!("ADD of pod {name} gave no address: {said}"))
    }

    /// Has somebody listen to what the node drops (`towpath observe --drops`), in the node's cgroup.
    ///
    /// # Errors
    /// The agent cannot be listened to.
    pub(crate) fn listen_to_drops(&self) -> Result<Listener> {
        let place = Place { cgroup: Some(self.cgroup.child("system")?), ..Place::default() };
        Listener::start(&place, &self.file("run"), self.file("drops.log"))
    }

    /// Resident memory of the agent now, and the most it ever was, in MiB.
    ///
    /// # Errors
    /// No agent runs.
    pub(crate) fn agent_memory(&self) -> Result<(f64, f64)> {
        let pid = self.agent()?.to_string();
        let field = |name| resident(&pid, name).context("the agent has ended");
        Ok((field("VmRSS:")?, field("VmHWM:")?))
    }

    /// What the kernel counts to the BPF maps that the agent holds, in MiB, by key size, value size and limit in entries.
    ///
    /// # Errors
    /// No agent runs, or its descriptors cannot be read.
    pub(crate) fn map_memory(&self) -> Result<f64> {
        crate::lab::map_memory(&self.agent()?.to_string())
    }

    /// A value of the agent's metrics: the first line that begins with `name` and a space.
    ///
    /// # Errors
    /// They are not served, or have no such line.
    pub(crate) fn metric(&self, path: &str, name: &str) -> Result<f64> {
        let netns = self.netns.place().netns.unwrap_or_default();
        let text = get(&netns, METRICS, path)?;
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("the agent's metrics have no {name}"))
    }
}

/// A wire between the `eth0` of two namespaces.
fn plug(one: &Netns, other: &Netns) -> Result<()> {
    one.ip(&format!("link add eth0 type veth peer name eth0 netns {}", other.pid()))
}

/// The answer to a GET on the loopback of a network namespace.
fn get(netns: &Path, port: u16, path: &str) -> Result<String> {
    let file = File::open(netns).with_context(|| format!("open {}", netns.display()))?;
    let inside = std::thread::spawn(move || -> Result<TcpStream> {
        setns(file, CloneFlags::CLONE_NEWNET).context("enter the node's network namespace")?;
        TcpStream::connect((Ipv4Addr::LOCALHOST, port)).context("connect to the agent's metrics")
    });
    let Ok(stream) = inside.join() else { bail!("the thread that asks for metrics died") };
    match Connection::over(stream?)?.request("GET", path, None)? {
        (200, Value::String(text)) => Ok(text),
        (code, value) => bail!("GET {path}: {code} {value}"),
    }
}
