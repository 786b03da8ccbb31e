//! Real container runtimes: containerd brings a container up and takes it down through the plugin, and every CNI verb answers
//! as a runtime expects.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::containerd::{Containerd, can_run};
use towpath_walkthrough::libcni::{Libcni, Sandbox, address_of, conflist, plugin};
use towpath_walkthrough::machine::can_run_labs;

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

#[test]
fn every_verb_answers_as_a_runtime_expects() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-cni", 1, Families::Ipv4)?;
    let cni = Libcni::of_node(&cluster, "n1")?;
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
