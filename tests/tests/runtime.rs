//! Real container runtimes: containerd brings a container up and takes it down through the plugin, and every CNI verb answers
//! as a runtime expects.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, towpath_binary, wait};
use towpath_walkthrough::containerd::{Containerd, Owned, can_run};
use towpath_walkthrough::machine::can_run_labs;

/// The plugin that the build put beside `towpath`.
fn plugin() -> Result<PathBuf> {
    let path = towpath_binary()?.with_file_name("towpath-cni");
    ensure!(path.is_file(), "{} is not built", path.display());
    Ok(path)
}

/// The configuration that the agent of a node wrote for the runtime.
fn conflist(cluster: &Cluster, node: &str) -> Result<PathBuf> {
    let dir = Path::new("/run/towpath/lab").join(cluster.name()).join("nodes").join(node).join("cni/net.d");
    let mut entries = fs::read_dir(&dir).with_context(|| dir.display().to_string())?;
    Ok(entries.next().with_context(|| format!("{} is empty", dir.display()))??.path())
}

/// A root of busybox alone.
fn rootfs(dir: &Path) -> Result<PathBuf> {
    let root = dir.join("rootfs");
    for sub in ["bin", "proc", "sys", "dev", "etc", "tmp", "run"] {
        fs::create_dir_all(root.join(sub))?;
    }
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).context("busybox (Debian: busybox-static)")?;
    for applet in ["sh", "ip", "ping", "wget", "sleep", "grep"] {
        symlink("busybox", root.join("bin").join(applet))?;
    }
    Ok(root)
}

/// `ctr run --cni`, whose directories are fixed: `/etc/cni/net.d` and `/opt/cni/bin` of a mount namespace of its own.
fn run(containerd: &Containerd, conflist: &Path, script: &str) -> Result<String> {
    let rootfs = rootfs(containerd.dir())?;
    let copy = containerd.dir().join("10-towpath.conflist");
    fs::copy(conflist, &copy)?;
    let mounts = "set -e; mount -t tmpfs none /opt; mkdir -p /opt/cni/bin; cp \"$PLUGIN\" /opt/cni/bin/; \
                  mount -t tmpfs none /mnt; mkdir /mnt/up /mnt/work; \
                  mount -t overlay -o lowerdir=/etc,upperdir=/mnt/up,workdir=/mnt/work none /etc; \
                  mkdir -p /etc/cni/net.d; rm -f /etc/cni/net.d/*; cp \"$CONF\" /etc/cni/net.d/; exec \"$@\"";
    let mut command = Command::new("timeout");
    command.args(["60", "unshare", "--mount", "--propagation", "private", "sh", "-c", mounts, "sh"]);
    command.env("PLUGIN", plugin()?).env("CONF", copy);
    command.arg("ctr").args(containerd.ctr_options());
    command.args(["run", "--rm", "--cni", "--env", "PATH=/bin", "--rootfs"]).arg(rootfs);
    let out = command.args(["demo", "/bin/sh", "-c", script]).stdin(Stdio::null()).output()?;
    let said = format!("{}{}", String::from_utf8_lossy(&out.stdout), String::from_utf8_lossy(&out.stderr));
    ensure!(out.status.success(), "ctr run: {}\n{said}", out.status);
    Ok(said)
}

fn server(cluster: &Cluster, node: &str) -> Result<String> {
    let place = format!(r#"{{"spec":{{"nodeName":"{node}"}}}}"#);
    let overrides = format!("--overrides={place}");
    let out = cluster.try_kubectl(&["run", "web", "--image=nginx", "--port=80", &overrides])?;
    ensure!(out.status.success(), "kubectl run: {}", String::from_utf8_lossy(&out.stderr));
    Ok(cluster.wait_pod("web")?.ip)
}

fn pod_devices(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let said = cluster.node(node, "ip -o link show type veth")?;
    ensure!(said.ok, "ip link on {node}: {}", said.all());
    let name = |line: &str| line.split(": ").nth(1).map(|name| name.split('@').next().unwrap_or(name).to_owned());
    Ok(said.out.lines().filter_map(name).collect())
}

#[test]
fn containerd_runs_a_container_through_the_plugin() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    if !can_run(&["containerd", "ctr", "runc"])? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-ctr", 2, Families::Ipv4)?;
    let server = server(&cluster, "n2")?;
    let before = pod_devices(&cluster, "n1")?;
    let containerd = Containerd::start("e2e-ctr")?;
    // ctr sets the network up while the container already runs.
    let script = format!(
        "until ip route | grep -q default; do sleep 0.1; done; ip -o -4 addr show eth0; \
         ping -c 1 -W 3 {server} && wget -q -O - http://{server}/"
    );
    let said = run(&containerd, &conflist(&cluster, "n1")?, &script)?;
    let address = said.split("inet ").nth(1).and_then(|rest| rest.split('/').next()).unwrap_or_default().to_owned();
    ensure!(address.starts_with("10.244.0."), "no address of node n1's range: {said}");
    ensure!(said.contains(" 0% packet loss"), "no ping: {said}");
    ensure!(said.contains("pod: web") && said.contains(&format!("client: {address}:")), "no own address: {said}");
    wait("the container's device to go", Duration::from_secs(5), || {
        let now = pod_devices(&cluster, "n1")?;
        if now == before { Ok(()) } else { bail!("{now:?}, before {before:?}") }
    })?;
    drop(containerd);
    cluster.down()
}

/// A network namespace as a runtime makes one.
struct Sandbox {
    process: Owned,
    id: &'static str,
}

impl Sandbox {
    fn make(id: &'static str) -> Result<Self> {
        let mut command = Command::new("unshare");
        let process = command.args(["--net", "sleep", "300"]).stdin(Stdio::null()).spawn().context("unshare")?;
        let own = Self { process: Owned(process), id };
        let outside = fs::read_link("/proc/self/ns/net")?;
        wait("a network namespace", Duration::from_secs(5), || {
            if fs::read_link(own.netns())? == outside { bail!("still ours") } else { Ok(()) }
        })?;
        Ok(own)
    }

    fn netns(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.process.0.id()))
    }

    fn inside(&self, args: &[&str]) -> Result<bool> {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.netns().display())).args(args);
        Ok(command.stdin(Stdio::null()).output()?.status.success())
    }
}

/// What libcni does with a configuration list, by hand.
struct Libcni {
    plugin: PathBuf,
    list: Value,
}

impl Libcni {
    /// One call: the answer, or the plugin's error object.
    fn call(
        &self,
        verb: &str,
        sandbox: Option<&Sandbox>,
        version: &str,
        extra: &Value,
    ) -> Result<Result<Value, Value>> {
        let mut config = self.list.pointer("/plugins/0").cloned().context("a list without a plugin")?;
        let fields = config.as_object_mut().context("a plugin that is no object")?;
        fields.insert("name".to_owned(), self.list.get("name").cloned().unwrap_or_default());
        fields.insert("cniVersion".to_owned(), json!(version));
        fields.extend(extra.as_object().cloned().unwrap_or_default());
        let mut command = Command::new(&self.plugin);
        let bin = self.plugin.parent().context("a plugin without a directory")?;
        command.env_clear().env("CNI_COMMAND", verb).env("CNI_PATH", bin);
        if let Some(sandbox) = sandbox {
            command.env("CNI_CONTAINERID", sandbox.id).env("CNI_IFNAME", "eth0").env("CNI_NETNS", sandbox.netns());
        }
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("no stdin")?.write_all(config.to_string().as_bytes())?;
        let out = child.wait_with_output()?;
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        let answer = if text.trim().is_empty() {
            Value::Null
        } else {
            serde_json::from_str(&text).with_context(|| text.clone())?
        };
        Ok(if out.status.success() { Ok(answer) } else { Err(answer) })
    }

    fn succeed(&self, verb: &str, sandbox: Option<&Sandbox>, version: &str, extra: &Value) -> Result<Value> {
        self.call(verb, sandbox, version, extra)?.map_err(|error| anyhow::anyhow!("{verb} {version}: {error}"))
    }
}

fn address_of(result: &Value) -> Result<String> {
    let text =
        result.pointer("/ips/0/address").and_then(Value::as_str).with_context(|| format!("no address: {result}"))?;
    Ok(text.split('/').next().unwrap_or_default().to_owned())
}

#[test]
fn every_verb_answers_as_a_runtime_expects() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cni", 1, Families::Ipv4)?;
    let list: Value = serde_json::from_slice(&fs::read(conflist(&cluster, "n1")?)?)?;
    let cni = Libcni { plugin: plugin()?, list };
    let none = json!({});
    let answers = |address: &str| -> Result<bool> { Ok(cluster.node("n1", &format!("ping -c 1 -W 1 {address}"))?.ok) };

    let before = pod_devices(&cluster, "n1")?;

    let versions = cni.succeed("VERSION", None, "1.1.0", &none)?;
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let known = versions.get("supportedVersions").and_then(Value::as_array).cloned().unwrap_or_default();
        ensure!(known.contains(&json!(version)), "{version} is not among {versions}");
    }
    cni.succeed("STATUS", None, "1.1.0", &none)?;

    let (kept, lost) = (Sandbox::make("e2e-kept")?, Sandbox::make("e2e-lost")?);
    let result = cni.succeed("ADD", Some(&kept), "1.1.0", &none)?;
    let (kept_at, lost_at) = (address_of(&result)?, address_of(&cni.succeed("ADD", Some(&lost), "1.0.0", &none)?)?);
    ensure!(kept_at != lost_at, "two containers have the address {kept_at}");
    for address in [&kept_at, &lost_at] {
        ensure!(answers(address)?, "{address} does not answer its node");
    }

    let previous = json!({ "prevResult": result });
    cni.succeed("CHECK", Some(&kept), "1.1.0", &previous)?;
    cni.succeed(
        "GC",
        None,
        "1.1.0",
        &json!({ "cni.dev/valid-attachments": [{"containerID": kept.id, "ifname": "eth0"}] }),
    )?;
    ensure!(answers(&kept_at)?, "GC took an attachment that it was told to keep");
    wait("GC to take the other", Duration::from_secs(5), || {
        if answers(&lost_at)? { bail!("{lost_at} still answers") } else { Ok(()) }
    })?;
    ensure!(kept.inside(&["ip", "addr", "flush", "dev", "eth0", "scope", "global"])?, "cannot flush the address");
    let broken = cni.call("CHECK", Some(&kept), "1.1.0", &previous)?;
    let error = broken.err().context("CHECK is content with a container that lost its address")?;
    ensure!(error.get("code").is_some_and(Value::is_number) && error.get("msg").is_some(), "no CNI error: {error}");

    for _ in 0..2 {
        cni.succeed("DEL", Some(&kept), "1.1.0", &none)?;
        cni.succeed("DEL", Some(&lost), "1.0.0", &none)?;
    }
    // A runtime may try the same sandbox again at once; the old device is taken away behind its back.
    let again = address_of(&cni.succeed("ADD", Some(&kept), "1.1.0", &none)?)?;
    ensure!(answers(&again)?, "{again} does not answer after DEL and ADD");
    cni.succeed("DEL", Some(&kept), "1.1.0", &none)?;
    wait("the devices to go", Duration::from_secs(5), || {
        let left = pod_devices(&cluster, "n1")?;
        if left == before { Ok(()) } else { bail!("{left:?}, before {before:?}") }
    })?;
    ensure!(!kept.inside(&["ip", "link", "show", "eth0"])?, "DEL left the device inside");
    cluster.down()
}
