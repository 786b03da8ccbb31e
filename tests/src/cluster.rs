//! A lab cluster, driven as a user drives it: `kubectl`, a shell on a node, a shell on a host outside.
//!
//! On a machine without a `kubectl` of 1.31 or newer the same requests go through `towpath lab …`, which speaks to the same API.

use std::net::IpAddr;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;

use crate::lab_driver;
use crate::log::Log;
use crate::machine;

/// Makes names of files that hold manifests unlike each other.
static APPLIED: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);

/// Address families of a lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Families {
    /// IPv4 only.
    Ipv4,
    /// IPv6 only.
    Ipv6,
    /// Both, IPv4 first.
    Dual,
}

impl Families {
    fn flag(self) -> &'static str {
        match self {
            Families::Ipv4 => "ipv4",
            Families::Ipv6 => "ipv6",
            Families::Dual => "dual",
        }
    }
}

/// Who speaks to the API server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// The real `kubectl`.
    Kubectl,
    /// `towpath lab apply|get|exec|…`.
    Lab,
}

/// Whether there is a `kubectl` of 1.31 or newer (older ones speak SPDY only for exec).
pub fn usable_kubectl() -> bool {
    let Ok(output) = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output() else { return false };
    let Ok(version) = serde_json::from_slice::<Value>(&output.stdout) else { return false };
    let part = |field: &str| {
        let text = version.pointer(&format!("/clientVersion/{field}")).and_then(Value::as_str).unwrap_or("");
        text.trim_end_matches(|c: char| !c.is_ascii_digit()).parse::<u32>().unwrap_or(0)
    };
    (part("major"), part("minor")) >= (1, 31)
}

/// Whether `TOWPATH_DRIVER=lab` asks for the way without a kubectl, whatever the machine has.
pub fn lab_driver_is_forced() -> bool {
    std::env::var_os("TOWPATH_DRIVER").is_some_and(|driver| driver == "lab")
}

/// A lab cluster. Dropping it takes the lab down.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    towpath: PathBuf,
    kubeconfig: PathBuf,
    driver: Driver,
    families: Families,
    keep: bool,
    hooked: bool,
    /// While it is open nobody else has a lab of this name.
    _sole: UnixListener,
}

/// Has a name of a lab to itself: who takes a lab of it down first, as every test does, ends another's.
fn sole(name: &str) -> Result<UnixListener> {
    let address = SocketAddr::from_abstract_name(format!("towpath-walkthrough/{name}"))?;
    UnixListener::bind_addr(&address)
        .with_context(|| format!("somebody else has a lab {name} now: two tests need labs of two names"))
}

impl Cluster {
    /// Brings up a lab of `nodes` nodes.
    ///
    /// # Errors
    /// `towpath lab up` failed; its output is in the message. Or another test has a lab of this name.
    pub fn up(name: &str, nodes: u32, families: Families) -> Result<Self> {
        Self::up_with(name, nodes, families, &[])
    }

    /// As [`Cluster::up`], with more options of `towpath lab up`.
    ///
    /// # Errors
    /// As [`Cluster::up`].
    pub fn up_with(name: &str, nodes: u32, families: Families, options: &[&str]) -> Result<Self> {
        let towpath = towpath_binary()?;
        let driver = if usable_kubectl() && !lab_driver_is_forced() { Driver::Kubectl } else { Driver::Lab };
        let mut cluster = Self {
            name: name.to_owned(),
            towpath,
            kubeconfig: PathBuf::new(),
            driver,
            families,
            keep: false,
            hooked: true,
            _sole: sole(name)?,
        };
        // What an earlier run that was killed may have left.
        let _ = cluster.lab(&["down"]);
        let nodes = nodes.to_string();
        let mut up = vec!["up", "--nodes", &nodes, "--ip-family", families.flag()];
        up.extend(options);
        checked(cluster.lab_command(&up), "towpath lab up")?;
        let path = checked(cluster.lab_command(&["kubeconfig", "--path"]), "towpath lab kubeconfig")?;
        cluster.kubeconfig = PathBuf::from(path.trim());
        Ok(cluster)
    }

    /// Leaves the lab up when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }

    /// From now on commands in pods run outside of the pods' cgroups, where no socket hook is: their connections are translated at the pods'
    /// devices, as a sandboxed runtime's are.
    pub fn without_socket_hooks(&mut self) {
        self.hooked = false;
    }

    /// Whether commands in pods have socket hooks.
    pub fn has_socket_hooks(&self) -> bool {
        self.hooked
    }

    /// The lab's name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its address families.
    pub fn families(&self) -> Families {
        self.families
    }

    /// Who speaks to the API server.
    pub fn driver(&self) -> Driver {
        self.driver
    }

    /// Where its kubeconfig is.
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// The `towpath` binary in use.
    pub fn towpath(&self) -> &Path {
        &self.towpath
    }

    fn lab_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.towpath);
        command.arg("lab").args(args.iter().take(1)).args(["--name", &self.name]).args(args.iter().skip(1));
        command
    }

    fn lab(&self, args: &[&str]) -> Result<Output> {
        run(self.lab_command(args))
    }

    /// `kubectl ARGS`, whatever its exit code.
    ///
    /// # Errors
    /// It could not be started.
    pub fn try_kubectl(&self, args: &[&str]) -> Result<Output> {
        match self.driver {
            Driver::Kubectl => {
                let mut command = Command::new("kubectl");
                command.env("KUBECONFIG", &self.kubeconfig).args(args);
                run(command)
            }
            Driver::Lab => self.lab(args),
        }
    }

    /// `kubectl ARGS`, shown; its output.
    ///
    /// # Errors
    /// It failed; what it said is in the message.
    pub fn kubectl(&self, log: &Log, args: &[&str]) -> Result<String> {
        let shown = shell_words(args);
        let tool = if self.driver == Driver::Kubectl { "kubectl" } else { "towpath lab" };
        log.command(&format!("{tool} {shown}"));
        if self.driver == Driver::Lab
            && let Some(manifest) = lab_driver::manifest(self, args)?
        {
            self.apply_text(&manifest.to_string())?;
            return Ok(String::new());
        }
        text(self.try_kubectl(args)?, &format!("{tool} {shown}"))
    }

    /// Applies a file of `examples/`.
    ///
    /// # Errors
    /// As [`Cluster::kubectl`].
    pub fn apply(&self, log: &Log, file: &str) -> Result<()> {
        let path = examples()?.join(file);
        let path = path.to_str().context("the examples directory has a name that is no text")?;
        log.command(&format!("kubectl apply -f examples/{file}"));
        text(self.try_kubectl(&["apply", "-f", path])?, &format!("apply -f {file}"))?;
        Ok(())
    }

    /// Applies manifests given as text.
    ///
    /// # Errors
    /// As [`Cluster::kubectl`].
    pub fn apply_text(&self, manifests: &str) -> Result<()> {
        let number = APPLIED.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let file = std::env::temp_dir().join(format!("towpath-{}-{}-{number}.yaml", self.name, std::process::id()));
        std::fs::write(&file, manifests).with_context(|| format!("write {}", file.display()))?;
        let applied = self.try_kubectl(&["apply", "-f", &file.to_string_lossy()]);
        let _ = std::fs::remove_file(&file);
        text(applied?, "apply").map(|_| ())
    }

    /// An object as JSON.
    ///
    /// # Errors
    /// It is not there, or the answer is no JSON.
    pub fn get(&self, kind: &str, name: &str) -> Result<Value> {
        let out = text(self.try_kubectl(&["get", kind, name, "-o", "json"])?, &format!("get {kind} {name}"))?;
        serde_json::from_str(&out).with_context(|| format!("get {kind} {name} -o json gave no JSON"))
    }

    /// All objects of a kind that a label selector selects, as JSON.
    ///
    /// # Errors
    /// As [`Cluster::get`].
    pub fn list(&self, kind: &str, selector: &str) -> Result<Vec<Value>> {
        let out = text(self.try_kubectl(&["get", kind, "-l", selector, "-o", "json"])?, &format!("get {kind}"))?;
        let value: Value = serde_json::from_str(&out).with_context(|| format!("get {kind} -o json gave no JSON"))?;
        Ok(value.get("items").and_then(Value::as_array).cloned().unwrap_or_default())
    }

    /// A shell command in a pod's (first) container, whatever its outcome.
    ///
    /// # Errors
    /// It could not be started.
    pub fn exec(&self, pod: &str, script: &str) -> Result<Said> {
        if !self.hooked {
            return self.exec_unhooked(pod, script);
        }
        Ok(Said::from(self.try_kubectl(&["exec", pod, "--", "sh", "-c", script])?))
    }

    /// In the namespaces of the pod's process, and in the cgroup of this one.
    fn exec_unhooked(&self, pod: &str, script: &str) -> Result<Said> {
        let pod = Pod::from_json(&self.get("pod", pod)?);
        let cgroup = machine::lab_cgroup(&self.name)?.join("nodes").join(&pod.node).join("pods").join(&pod.uid);
        let has_shell = |pid: &i32| Path::new(&format!("/proc/{pid}/root/bin/busybox")).exists();
        let pid = machine::processes_below(&cgroup).into_iter().find(has_shell);
        let pid =
            pid.with_context(|| format!("pod {} has no process with a shell in {}", pod.name, cgroup.display()))?;
        let mut command = Command::new("nsenter");
        command.args(["-t", &pid.to_string(), "-m", "-n", "-p", "-u", "-r", "--", "/bin/busybox", "sh", "-c", script]);
        command.env_clear().env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
        Ok(Said::from(run(command)?))
    }

    /// The same in a container by name.
    ///
    /// # Errors
    /// It could not be started.
    pub fn exec_in(&self, pod: &str, container: &str, script: &str) -> Result<Said> {
        Ok(Said::from(self.try_kubectl(&["exec", pod, "-c", container, "--", "sh", "-c", script])?))
    }

    /// A shell command on a node.
    ///
    /// # Errors
    /// It could not be started.
    pub fn node(&self, node: &str, script: &str) -> Result<Said> {
        Ok(Said::from(self.lab(&["exec", node, "--", "sh", "-c", script])?))
    }

    /// A shell command on the first host outside.
    ///
    /// # Errors
    /// It could not be started.
    pub fn outside(&self, script: &str) -> Result<Said> {
        Ok(Said::from(self.lab(&["outside", "--", "sh", "-c", script])?))
    }

    /// A shell command on the host outside that has this address.
    ///
    /// # Errors
    /// It could not be started.
    pub fn outside_from(&self, address: &str, script: &str) -> Result<Said> {
        Ok(Said::from(self.lab(&["outside", "--from", address, "--", "sh", "-c", script])?))
    }

    /// Waits until pods that a selector selects are ready.
    ///
    /// # Errors
    /// They are not in time; what they are instead is in the message.
    pub fn wait_ready(&self, selector: &str, count: usize) -> Result<Vec<Pod>> {
        wait(&format!("{count} pods {selector} ready"), Duration::from_secs(30), || {
            let pods: Vec<Pod> = self.list("pods", selector)?.iter().map(Pod::from_json).collect();
            let ready = pods.iter().filter(|p| p.ready && !p.terminating).count();
            if ready == count && pods.len() == count { Ok(pods) } else { bail!("{ready} of {count} ready: {pods:?}") }
        })
    }

    /// A pod that is ready, by name.
    ///
    /// # Errors
    /// It is not in time.
    pub fn wait_pod(&self, name: &str) -> Result<Pod> {
        wait(&format!("pod {name} ready"), Duration::from_secs(30), || {
            let pod = Pod::from_json(&self.get("pod", name)?);
            if pod.ready { Ok(pod) } else { bail!("{pod:?}") }
        })
    }

    /// Names of the nodes.
    ///
    /// # Errors
    /// As [`Cluster::get`].
    pub fn nodes(&self) -> Result<Vec<(String, String)>> {
        let out = text(self.try_kubectl(&["get", "nodes", "-o", "json"])?, "get nodes")?;
        let value: Value = serde_json::from_str(&out)?;
        let items = value.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        Ok(items
            .iter()
            .map(|n| {
                let addresses = n.pointer("/status/addresses").and_then(Value::as_array).cloned().unwrap_or_default();
                let ip = addresses
                    .iter()
                    .find(|a| a.get("type").and_then(Value::as_str) == Some("InternalIP"))
                    .map(|a| field(a, "/address"))
                    .unwrap_or_default();
                (field(n, "/metadata/name"), ip)
            })
            .collect())
    }

    /// The address of a node, as its object names it.
    ///
    /// # Errors
    /// As [`Cluster::nodes`], or there is no such node.
    pub fn node_ip(&self, node: &str) -> Result<String> {
        let all = self.nodes()?.into_iter();
        all.filter(|(name, _)| name == node).map(|(_, ip)| ip).next().with_context(|| format!("no node {node}"))
    }

    /// A machine joins, and is ready.
    ///
    /// # Errors
    /// `towpath lab node add` failed.
    pub fn add_node(&self) -> Result<()> {
        checked(self.node_command(&["add"]), "towpath lab node add").map(drop)
    }

    /// A machine is switched off for good.
    ///
    /// # Errors
    /// `towpath lab node delete` failed.
    pub fn delete_node(&self, node: &str) -> Result<()> {
        checked(self.node_command(&["delete", node]), "towpath lab node delete").map(drop)
    }

    fn node_command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.towpath);
        command.args(["lab", "node"]).args(args).args(["--name", &self.name]);
        command
    }

    /// Takes the lab down.
    ///
    /// # Errors
    /// `towpath lab down` failed, or one of the lab's processes panicked.
    pub fn down(mut self) -> Result<()> {
        let logs = logs(&self.state());
        let panics: Vec<&str> =
            logs.iter().flat_map(|(_, log)| log.lines()).filter(|line| line.contains("panicked at")).collect();
        ensure!(panics.is_empty(), "lab {}: {panics:#?}", self.name);
        self.keep = true;
        checked(self.lab_command(&["down"]), "towpath lab down").map(|_| ())
    }

    /// Where the lab's logs are.
    fn state(&self) -> PathBuf {
        Path::new("/var/lib/towpath/lab").join(&self.name)
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.keep {
            // Nobody took it down in good order, so something failed: what its processes complained of goes with it.
            eprintln!("lab {}: {}", self.name, complaints(&self.state()));
            let _ = self.lab(&["down"]);
        }
    }
}

/// All logs of a lab, but for those of its pods.
fn logs(directory: &Path) -> Vec<(PathBuf, String)> {
    let mut all = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) && entry.file_name() != "pods" {
            all.extend(logs(&path));
        } else if path.extension().is_some_and(|end| end == "log") {
            let log = std::fs::read(&path).unwrap_or_default();
            all.push((path, String::from_utf8_lossy(&log).into_owned()));
        }
    }
    all
}

/// The last warnings, errors and panics in each log.
fn complaints(directory: &Path) -> String {
    const LAST: usize = 15;
    let mut said = String::new();
    for (path, log) in logs(directory) {
        let all: Vec<&str> = log.lines().filter(|line| !line.contains(" INFO ")).collect();
        for line in all.iter().skip(all.len().saturating_sub(LAST)) {
            said += &format!("\n{}: {line}", path.display());
        }
    }
    said
}

/// What the rows need of a pod.
#[derive(Clone, Debug)]
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its address.
    pub ip: String,
    /// All its addresses, that one first.
    pub ips: Vec<IpAddr>,
    /// Its node.
    pub node: String,
    /// Whether it is ready.
    pub ready: bool,
    /// Whether it is being deleted.
    pub terminating: bool,
}

impl Pod {
    /// From an object as the API shows it.
    pub fn from_json(pod: &Value) -> Self {
        let conditions = pod.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let ips = pod.pointer("/status/podIPs").and_then(Value::as_array).into_iter().flatten();
        Self {
            name: field(pod, "/metadata/name"),
            uid: field(pod, "/metadata/uid"),
            ip: field(pod, "/status/podIP"),
            ips: ips.filter_map(|ip| field(ip, "/ip").parse().ok()).collect(),
            node: field(pod, "/spec/nodeName"),
            ready: conditions.iter().any(|c| field(c, "/type") == "Ready" && field(c, "/status") == "True"),
            terminating: pod.pointer("/metadata/deletionTimestamp").is_some(),
        }
    }
}

/// A text field of an object; empty when it is not there.
pub fn field(value: &Value, pointer: &str) -> String {
    match value.pointer(pointer) {
        Some(Value::String(text)) => text.clone(),
        Some(Value::Null) | None => String::new(),
        Some(other) => other.to_string(),
    }
}

/// What a command said.
#[derive(Clone, Debug)]
pub struct Said {
    /// Whether it ended with 0.
    pub ok: bool,
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Said {
    /// Both outputs, for a failure's message.
    pub fn all(&self) -> String {
        format!("{}{}", self.out, self.err)
    }
}

impl From<Output> for Said {
    fn from(output: Output) -> Self {
        Self {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).into_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }
}

/// An address as it stands in a URL.
pub fn host(address: &str) -> String {
    if address.contains(':') { format!("[{address}]") } else { address.to_owned() }
}

/// Polls until `probe` succeeds or the time is over.
///
/// # Errors
/// The last reason why it did not.
pub fn wait<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<T>) -> Result<T> {
    let started = Instant::now();
    loop {
        match probe() {
            Ok(value) => return Ok(value),
            Err(error) if started.elapsed() > limit => {
                return Err(error.context(format!("waited {:.1} s for {what}", limit.as_secs_f64())));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}

fn run(mut command: Command) -> Result<Output> {
    command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("could not start {}", command.get_program().to_string_lossy()))
}

fn text(output: Output, what: &str) -> Result<String> {
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    Err(anyhow!(
        "{what}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    ))
}

fn checked(command: Command, what: &str) -> Result<String> {
    text(run(command)?, what)
}

fn shell_words(args: &[&str]) -> String {
    let quote = |a: &&str| {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_=./:,@%+{}\"".contains(c);
        if !a.is_empty() && a.chars().all(plain) { (*a).to_owned() } else { format!("'{a}'") }
    };
    args.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// The binary that the build put beside this one.
///
/// # Errors
/// It is not built.
pub fn towpath_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("TOWPATH") {
        return Ok(PathBuf::from(path));
    }
    let own = std::env::current_exe().context("no path of the running program")?;
    own.ancestors()
        .skip(1)
        .take(3)
        .map(|dir| dir.join("towpath"))
        .find(|path| path.is_file())
        .ok_or_else(|| anyhow!("no towpath binary beside {}: run `cargo build --bins` first", own.display()))
}

fn examples() -> Result<PathBuf> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    path.canonicalize().with_context(|| format!("{} is missing", path.display()))
}

/// Text of a template of `examples/`.
///
/// # Errors
/// It cannot be read.
pub fn template(file: &str) -> Result<String> {
    let path = examples()?.join(file);
    std::fs::read_to_string(&path).with_context(|| path.display().to_string())
}
