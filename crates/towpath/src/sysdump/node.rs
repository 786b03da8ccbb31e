//! What can be seen on a node: what its agent says, devices, addresses and routes, nftables, pins, CNI configurations, the kernel.

use std::fmt::Write;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use towpath_datapath::net::{address, link, mac, netlink::Netlink, nft};
use towpath_lab::layout::{LabName, Layout};
use towpath_wire::config::AgentConfig;

use super::Collection;

/// Where the DaemonSet mounts the configuration.
const CONFIG: &str = "/etc/towpath/agent.yaml";
/// Files of `/proc/net` that are of the network namespace.
const PROC_NET: [&str; 13] = [
    "dev",
    "route",
    "ipv6_route",
    "fib_trie",
    "arp",
    "if_inet6",
    "snmp",
    "snmp6",
    "netstat",
    "sockstat",
    "sockstat6",
    "softnet_stat",
    "stat/nf_conntrack",
];
/// Settings of the kernel that have kept packets from going on before.
const SYSCTLS: [&str; 12] = [
    "net/ipv4/ip_forward",
    "net/ipv4/conf/all/rp_filter",
    "net/ipv4/conf/default/rp_filter",
    "net/ipv6/conf/all/forwarding",
    "net/ipv6/conf/all/disable_ipv6",
    "net/ipv4/ip_local_port_range",
    "net/ipv4/ip_local_reserved_ports",
    "net/netfilter/nf_conntrack_max",
    "net/netfilter/nf_conntrack_count",
    "net/core/bpf_jit_enable",
    "kernel/unprivileged_bpf_disabled",
    "fs/file-max",
];
/// How long an agent may take to answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// The most that is taken of a file, in bytes.
const LARGEST: usize = 2 * 1024 * 1024;

/// Everything of the node that this runs on.
///
/// # Errors
/// The configuration is named and cannot be read.
pub(super) async fn collect(config: Option<&Path>) -> Result<Collection> {
    let usual = Path::new(CONFIG);
    let path = config.or_else(|| usual.exists().then_some(usual));
    let config: AgentConfig = crate::daemon::load(path)?;
    let mut all = Collection::default();
    all.json("agent/config.json", Ok(&config));
    all.json("agent/status.json", crate::status::ask(&config.status_socket()));
    all.text("agent/metrics.txt", metrics(&config).await);
    let counted = towpath_carry::feed::counters(&config.carry_socket()).await;
    all.json("carry/counters.json", counted.map_err(anyhow::Error::from));
    all.text("state/files.txt", listing(&config.state_dir));
    all.text("bpf/pins.txt", pins(&config.bpffs));
    all.text("bpf/features.txt", Ok(features()));
    cni_configurations(&config, &mut all);
    kernel(&mut all);
    all.text("net/devices.txt", devices());
    all.json("net/nftables.json", nft::whole_ruleset().map_err(anyhow::Error::from));
    for name in PROC_NET {
        all.text(&format!("net/{}.txt", name.replace('/', "-")), read(&Path::new("/proc/net").join(name)));
    }
    Ok(all)
}

/// Every node of a lab: this program once more, in each.
///
/// # Errors
/// There is no such lab.
pub(super) fn of_lab(lab: &LabName, all: &mut Collection) -> Result<()> {
    let (spec, layout) = (towpath_lab::commands::spec(lab)?, Layout::new(lab)?);
    let program = std::env::current_exe().context("could not find this program's own file")?;
    for node in &spec.nodes {
        let directory = layout.node_run(&node.name);
        let mut command = Command::new(&program);
        command.args(["lab", "exec", "--name", lab.as_str(), &node.name, "--"]).arg(&program);
        command.args(["sysdump", "--node-facts", "--config"]).arg(directory.join("agent.json"));
        let output = command.output().with_context(|| format!("could not run a command on node {}", node.name));
        take(&format!("nodes/{}", node.name), output.and_then(|output| facts(&output.stdout, &output.stderr)), all);
        for daemon in ["agent", "carry"] {
            let log = layout.node_state(&node.name).join(format!("{daemon}.log"));
            all.text(&format!("logs/{}/{daemon}.log", node.name), read(&log));
        }
    }
    Ok(())
}

/// What `sysdump --node-facts` said on a node.
pub(super) fn facts(out: &[u8], err: &[u8]) -> Result<Collection> {
    serde_json::from_slice(out)
        .with_context(|| format!("its answer is not understood; it said {}", String::from_utf8_lossy(err).trim()))
}

/// A node's facts, or why there are none.
pub(super) fn take(directory: &str, facts: Result<Collection>, all: &mut Collection) {
    match facts {
        Ok(facts) => all.below(directory, facts),
        Err(error) => all.text(directory, Err::<&str, _>(error)),
    }
}

/// The end of a file.
fn read(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).with_context(|| format!("could not read {}", path.display()))?;
    let end = bytes.get(bytes.len().saturating_sub(LARGEST)..).unwrap_or_default();
    Ok(String::from_utf8_lossy(end).into_owned())
}

async fn metrics(config: &AgentConfig) -> Result<String> {
    let Some(listen) = config.metrics_listen else { bail!("metricsListen is not set") };
    let ask = async {
        let mut stream = TcpStream::connect(listen).await?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: agent\r\n\r\n").await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        io::Result::Ok(text)
    };
    let said = tokio::time::timeout(PATIENCE, ask).await;
    said.with_context(|| format!("no answer from {listen}"))?.with_context(|| format!("could not ask {listen}"))
}

/// Names and sizes, not contents.
fn listing(directory: &Path) -> Result<String> {
    let mut text = String::new();
    walk(directory, &mut |path, size| {
        let _ = writeln!(text, "{size:>12} {}", path.display());
    })
    .with_context(|| format!("could not list {}", directory.display()))?;
    Ok(text)
}

/// What is pinned, ours only.
fn pins(bpffs: &Path) -> Result<String> {
    let mut text = String::new();
    let entries = std::fs::read_dir(bpffs).with_context(|| format!("could not list {}", bpffs.display()))?;
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("towpath")) {
        walk(&entry.path(), &mut |path, _| {
            let _ = writeln!(text, "{}", path.display());
        })?;
    }
    Ok(text)
}

/// Depth first, sorted; at most eight directories deep.
fn walk(directory: &Path, found: &mut dyn FnMut(&Path, u64)) -> io::Result<()> {
    fn below(path: &Path, depth: u8, found: &mut dyn FnMut(&Path, u64)) -> io::Result<()> {
        let mut entries: Vec<PathBuf> = std::fs::read_dir(path)?.flatten().map(|entry| entry.path()).collect();
        entries.sort();
        for entry in entries {
            // Links are not followed.
            let Ok(metadata) = entry.symlink_metadata() else { continue };
            found(&entry, metadata.len());
            if metadata.is_dir() && depth > 0 {
                below(&entry, depth - 1, found)?;
            }
        }
        Ok(())
    }
    below(directory, 8, found)
}

fn features() -> String {
    let mut text = String::new();
    for (feature, there) in towpath_datapath::bpf::needed_features() {
        let there = if there { "yes" } else { "NO " };
        let _ = writeln!(text, "{there} {} (Linux {}): {}", feature.name, feature.since, feature.purpose);
    }
    text
}

/// All of them, since which one the runtime takes is often the question.
fn cni_configurations(config: &AgentConfig, all: &mut Collection) {
    let directory = &config.cni_conf_dir;
    let entries = match std::fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => {
            return all
                .text("cni", Err::<&str, _>(anyhow::Error::from(error).context(directory.display().to_string())));
        }
    };
    for path in entries.flatten().map(|entry| entry.path()) {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        // Networks keep their kubeconfigs beside; those are not taken.
        if ![".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end)) {
            all.text(
                &format!("cni/{name}"),
                Err::<&str, _>(anyhow::anyhow!("there, and no CNI configuration by its name: not taken")),
            );
            continue;
        }
        let text = read(&path);
        let path = format!("cni/{name}");
        match text.map(|text| serde_json::from_str::<serde_json::Value>(&text).map_err(|_| text)) {
            Ok(Ok(value)) => all.json(&path, Ok(value)),
            Ok(Err(text)) => all.text(&path, Ok(text)),
            Err(error) => all.text(&path, Err::<&str, _>(error)),
        }
    }
}

fn kernel(all: &mut Collection) {
    let of = |path: &str| std::fs::read_to_string(path).unwrap_or_else(|error| format!("({error})\n"));
    let mut text = format!("version: {}", of("/proc/version"));
    let has_btf = Path::new("/sys/kernel/btf/vmlinux").exists();
    let _ = writeln!(text, "BTF: {}", if has_btf { "yes" } else { "no" });
    for name in SYSCTLS {
        let _ = write!(text, "{name}: {}", of(&format!("/proc/sys/{name}")));
    }
    let mounts = of("/proc/self/mounts");
    for line in mounts.lines().filter(|line| [" bpf ", " cgroup2 ", " cgroup "].iter().any(|kind| line.contains(kind)))
    {
        let _ = writeln!(text, "mount: {line}");
    }
    let _ = write!(text, "memory:\n{}load: {}", of("/proc/meminfo"), of("/proc/loadavg"));
    all.text("kernel.txt", Ok(text));
}

/// Devices and addresses as the kernel says them of this network namespace.
fn devices() -> Result<String> {
    let mut netlink = Netlink::open()?;
    let (links, addresses) = (link::list(&mut netlink)?, address::list(&mut netlink)?);
    let mut text = String::new();
    for device in links {
        let hardware = device.mac.map(mac::text).unwrap_or_default();
        let (up, kind) = (if device.up { "up" } else { "down" }, device.kind);
        let _ = writeln!(text, "{} {} {up} mtu {} {hardware} {kind:?}", device.index, device.name, device.mtu);
        for held in addresses.iter().filter(|held| held.device == device.index) {
            let ours = if held.ours { " (ours)" } else { "" };
            let _ = writeln!(text, "    {}/{}{ours}", held.address, held.prefix_len);
        }
    }
    Ok(text)
}
