//! `towpath node migrate`: what Flannel or Canal has left on this node, what comes next, and, with `--clean`, taking it away.
//!
//! Taking over itself is the agent's ([`towpath_agent::predecessor`]); nothing here is needed for it. `--clean` is for when the last pod of
//! the network before is gone, and refuses before. After it the way back is Flannel's own pod, which makes everything again.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use towpath_agent::predecessor::conflists;
use towpath_agent::predecessor::host_local::{HostLocal, HostLocalLease};
use towpath_datapath::predecessor::{CalicoDevice, Leftovers, clean, survey};
use towpath_wire::config::AgentConfig;
use towpath_wire::status::AgentStatus;

/// How long the agent may take to put its own tunnel device in the place of Flannel's.
const PATIENCE: Duration = Duration::from_secs(15);

/// Options of `towpath node migrate`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// The agent's configuration file.
    #[arg(long)]
    config: Option<PathBuf>,
    /// Only says what is there and what comes next; the default.
    #[arg(long, conflicts_with = "clean")]
    check: bool,
    /// Removes what the network before has left, when its last pod is gone and its own pods do not run here any more.
    #[arg(long)]
    clean: bool,
    /// With --clean: also while containers that Kubernetes does not know hold its addresses; they lose their network.
    #[arg(long, requires = "clean")]
    force: bool,
}

/// Everything that was found.
struct Found {
    status: Result<AgentStatus>,
    active: Vec<String>,
    aside: Vec<String>,
    leases: Vec<HostLocalLease>,
    kernel: Leftovers,
}

/// Looks, and with `--clean` removes; whether nothing is left to do here.
///
/// # Errors
/// Something cannot be read, or it refuses, or something stays.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let config: AgentConfig = crate::daemon::load(options.config.as_deref())?;
    let ranges = ranges(&config)?;
    let found = look(&config, &ranges)?;
    crate::print(&describe(&found))?;
    if !options.clean {
        return Ok(found.kernel.is_empty() && found.active.is_empty() && found.leases.is_empty());
    }
    if let Some(reason) = refusal(&found, options.force) {
        bail!("{reason}");
    }
    remove(&config, &ranges, &found)?;
    crate::print("what the network before left on this node is gone")?;
    Ok(true)
}

fn ranges(config: &AgentConfig) -> Result<Vec<IpNet>> {
    config.cluster_cidrs.iter().map(|c| c.0.parse().with_context(|| format!("clusterCidrs: {:?}", c.0))).collect()
}

fn look(config: &AgentConfig, ranges: &[IpNet]) -> Result<Found> {
    let directory = &config.cni_conf_dir;
    let shown = directory.display();
    let status = crate::status::ask(&config.status_socket());
    let kernel = survey(ranges).context("could not look at this node's network")?;
    let flannel_here = || !kernel.tunnels.is_empty() || status.as_ref().is_ok_and(|status| status.flannel_here);
    Ok(Found {
        active: conflists::active(directory, flannel_here).with_context(|| format!("could not read {shown}"))?,
        aside: conflists::aside(directory).with_context(|| format!("could not read {shown}"))?,
        leases: HostLocal::new(&config.cni_state_dir)
            .leases()
            .with_context(|| format!("could not read the leases below {}", config.cni_state_dir.display()))?
            .into_iter()
            .filter(|lease| is_of(lease, ranges))
            .collect(),
        status,
        kernel,
    })
}

/// Whether a lease is of a pod's address; other networks of the machine have leases beside it.
fn is_of(lease: &HostLocalLease, ranges: &[IpNet]) -> bool {
    ranges.iter().any(|range| range.contains(&lease.address))
}

fn describe(found: &Found) -> String {
    let list = |items: &[String]| if items.is_empty() { "none".to_owned() } else { items.join(", ") };
    let outlived = found.leases.iter().filter(|lease| lease.outlived).count();
    let lines = [
        (
            "agent",
            match &found.status {
                Ok(status) if status.ready => "ready: new pods of this node are its".to_owned(),
                Ok(status) => format!("not ready yet: {}", status.problems.join("; ")),
                Err(error) => format!("{error:#}"),
            },
        ),
        ("CNI configurations that the runtime reads", list(&found.active)),
        ("CNI configurations set aside", list(&found.aside)),
        (
            "pods of the network before",
            found
                .status
                .as_ref()
                .map_or_else(|_| "not known without the agent".to_owned(), |status| list(&status.pods_of_predecessor)),
        ),
        (
            "leases of the network before",
            format!("{}, of containers from before the last boot {outlived}", found.leases.len()),
        ),
    ];
    let mut text: Vec<String> = lines.iter().map(|(what, value)| format!("{what}: {value}")).collect();
    match in_the_kernel(found) {
        kernel if kernel.is_empty() => text.push("devices, routes and rules: none".to_owned()),
        kernel => text.extend(kernel),
    }
    text.push(format!("next: {}", next(found)));
    text.join("\n")
}

/// What is in the kernel, a line a kind.
fn in_the_kernel(found: &Found) -> Vec<String> {
    let kernel = &found.kernel;
    let mut devices = kernel.tunnels.clone();
    devices.extend(kernel.bridge.iter().map(|(name, ports)| format!("{name} with {ports} devices on it")));
    devices.extend(kernel.calico_devices.iter().map(|device| whose(found, device)));
    let routes = kernel.routes.iter().map(ToString::to_string).collect();
    let chains = match (kernel.chains.len(), kernel.jumps) {
        (0, 0) => Vec::new(),
        (chains, jumps) => vec![format!("{chains}, and {jumps} rules that lead to them")],
    };
    let lines: [(&str, Vec<String>); 4] = [
        ("devices", devices),
        ("routes over other nodes", routes),
        ("nftables tables", kernel.tables.clone()),
        ("chains", chains),
    ];
    let there = lines.into_iter().filter(|(_, items)| !items.is_empty());
    there.map(|(what, items)| format!("{what}: {}", items.join(", "))).collect()
}

/// A device of Calico's, with the pod or the container behind it.
fn whose(found: &Found, device: &CalicoDevice) -> String {
    let name = &device.name;
    let Some(address) = device.addresses.first() else {
        return format!("{name} of a container that nothing leads to any more");
    };
    let pods = found.status.as_ref().ok().map(|status| &status.addresses_of_predecessor);
    if let Some(pod) = device.addresses.iter().find_map(|address| pods?.get(address)) {
        return format!("{name} of {pod} ({address})");
    }
    match found.leases.iter().find(|lease| device.addresses.contains(&lease.address)) {
        Some(lease) => format!("{name} of container {} ({address})", lease.container),
        None => format!("{name} of a container without a lease ({address})"),
    }
}

/// What is to be done.
fn next(found: &Found) -> String {
    match &found.status {
        Err(_) => "have the DaemonSet towpath run on this node".to_owned(),
        Ok(status) if !status.ready => {
            "wait until the agent is ready; nothing of the network before is touched until then".to_owned()
        }
        Ok(status) if !status.pods_of_predecessor.is_empty() => {
            format!(
                "recreate {} pods, then see that Flannel's own pod does not run here any more",
                status.pods_of_predecessor.len()
            )
        }
        Ok(_) if found.kernel.is_empty() && found.leases.is_empty() => "nothing: this node is taken over".to_owned(),
        Ok(_) => "when Flannel's own pod does not run here any more: towpath node migrate --clean".to_owned(),
    }
}

/// Why it is not the time to clean.
fn refusal(found: &Found, force: bool) -> Option<String> {
    let status = match &found.status {
        Ok(status) if status.ready => status,
        _ => return Some("the agent of this node is not ready: without it there would be no network here".to_owned()),
    };
    if !status.pods_of_predecessor.is_empty() {
        return Some(format!(
            "pods of this node would lose their network: recreate {}",
            status.pods_of_predecessor.join(", ")
        ));
    }
    if !found.active.is_empty() {
        return Some(format!(
            "the container runtime still reads {}: the agent sets it aside within a second",
            found.active.join(", ")
        ));
    }
    let calico = &found.kernel.calico_devices;
    let ports = found.kernel.bridge.as_ref().map_or(0, |(_, ports)| *ports) + calico.len();
    if ports > 0 && !force {
        let by_calico = |lease: &HostLocalLease| calico.iter().any(|device| device.addresses.contains(&lease.address));
        let held: BTreeSet<String> = found
            .leases
            .iter()
            .filter(|lease| !lease.outlived && !by_calico(lease))
            .map(|lease| format!("{} ({})", lease.address, lease.container))
            .chain(calico.iter().map(|device| whose(found, device)))
            .collect();
        let held: Vec<String> = held.into_iter().collect();
        return Some(format!(
            "{ports} containers that Kubernetes does not know are still connected ({}): remove them, or --force, which takes \
             their network away",
            held.join(", ")
        ));
    }
    None
}

fn remove(config: &AgentConfig, ranges: &[IpNet], found: &Found) -> Result<()> {
    clean(ranges, &found.kernel.calico_devices)
        .context("not everything could be removed from this node's network; run this again")?;
    HostLocal::new(&config.cni_state_dir)
        .remove(|lease| is_of(lease, ranges))
        .with_context(|| format!("could not remove leases below {}", config.cni_state_dir.display()))?;
    let directory = &config.cni_conf_dir;
    conflists::forget(directory)
        .with_context(|| format!("could not remove what was set aside in {}", directory.display()))?;
    if !found.kernel.tunnels.is_empty() {
        have_the_tunnel_replaced(config, &found.kernel.tunnels)?;
    }
    let left = look(config, ranges)?;
    if !left.kernel.is_empty() {
        bail!(
            "there again: {}. Flannel's or Canal's own pod still runs on this node; have it stop first, and run this again",
            in_the_kernel(&left).join("; ")
        );
    }
    Ok(())
}

/// The agent puts its own tunnel device in the place of these.
fn have_the_tunnel_replaced(config: &AgentConfig, tunnels: &[String]) -> Result<()> {
    // Its own device takes the place of Flannel's at once: between them there is nothing.
    let note = config.take_tunnel_note();
    fs::write(&note, "").with_context(|| format!("could not write {}", note.display()))?;
    let deadline = Instant::now() + PATIENCE;
    while note.exists() {
        if Instant::now() > deadline {
            // Left behind it would be done at a time when nobody expects it.
            let _ = fs::remove_file(&note);
            bail!("the agent did not replace {}: see its log, and run this again", tunnels.join(", "));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found() -> Found {
        let status = AgentStatus { ready: true, ..AgentStatus::default() };
        Found {
            status: Ok(status),
            active: Vec::new(),
            aside: Vec::new(),
            leases: Vec::new(),
            kernel: Leftovers::default(),
        }
    }

    #[test]
    fn nothing_is_taken_away_under_a_pod_or_without_a_network_in_its_place() {
        assert_eq!(refusal(&found(), false), None);
        let status = AgentStatus { ready: true, pods_of_predecessor: vec!["a/b".to_owned()], ..AgentStatus::default() };
        let with_pod = Found { status: Ok(status), ..found() };
        assert!(refusal(&with_pod, true).unwrap().contains("a/b"), "not even by force");
        let starting = Found { status: Ok(AgentStatus::default()), ..found() };
        assert!(refusal(&starting, true).unwrap().contains("not ready"));
        assert!(refusal(&Found { status: Err(anyhow::anyhow!("no agent")), ..found() }, true).is_some());
        let read = Found { active: vec!["10-flannel.conflist".to_owned()], ..found() };
        assert!(refusal(&read, true).unwrap().contains("10-flannel"));
        let kernel = Leftovers { bridge: Some(("cni0".to_owned(), 1)), ..Leftovers::default() };
        let strangers = Found { kernel, ..found() };
        assert!(refusal(&strangers, false).unwrap().contains("--force"));
        assert_eq!(refusal(&strangers, true), None);
    }

    #[test]
    fn a_device_of_calicos_is_named_with_who_is_behind_it() {
        let device = |name: &str, address: &str| CalicoDevice {
            name: name.to_owned(),
            addresses: address.parse().into_iter().collect(),
        };
        let devices = vec![
            device("cali1", "10.244.1.2"),
            device("cali2", "10.244.1.3"),
            device("cali3", "10.244.1.4"),
            device("cali4", ""),
        ];
        let lease = HostLocalLease {
            address: "10.244.1.3".parse().unwrap(),
            container: "c0ffee".to_owned(),
            ifname: "eth0".to_owned(),
            file: PathBuf::new(),
            outlived: false,
        };
        let mut found = Found {
            kernel: Leftovers { calico_devices: devices, ..Leftovers::default() },
            leases: vec![lease],
            ..found()
        };
        let refused = refusal(&found, false).unwrap();
        for said in [
            "4 containers",
            "cali1 of a container without a lease (10.244.1.2)",
            "cali2 of container c0ffee (10.244.1.3)",
            "cali4 of a container that nothing leads to",
        ] {
            assert!(refused.contains(said), "{said}: {refused}");
        }
        assert_eq!(refused.matches("c0ffee").count(), 1, "its lease is not another container: {refused}");
        let held = [("10.244.1.2".parse().unwrap(), "a/b".to_owned())].into();
        found.status = Ok(AgentStatus { ready: true, addresses_of_predecessor: held, ..AgentStatus::default() });
        assert!(describe(&found).contains("cali1 of a/b (10.244.1.2)"), "{}", describe(&found));
    }

    #[test]
    fn each_state_says_what_comes_next() {
        assert!(next(&found()).contains("taken over"));
        let kernel = Leftovers { tunnels: vec!["flannel.1".to_owned()], ..Leftovers::default() };
        assert!(next(&Found { kernel, ..found() }).contains("--clean"));
        assert!(next(&Found { status: Err(anyhow::anyhow!("x")), ..found() }).contains("DaemonSet"));
    }
}
