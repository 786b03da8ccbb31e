//! `towpath node uninstall`: takes everything of ours off a node, in the order in which nothing is left half-working: the
//! configuration that calls the plugin, what is in the kernel, the plugin, the state.
//!
//! It refuses while an agent runs (which would make everything again) and while pods hold addresses (their network would be gone,
//! and without the plugin the runtime could not remove them). Sysctls stay: others may rely on them by now.

use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Result, bail};
use towpath_agent::conflist;
use towpath_agent::ipam::{LeaseStore, RealDisk};
use towpath_agent::predecessor::conflists;
use towpath_wire::config::AgentConfig;

/// Options of `towpath node uninstall`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Where the container runtime looks for plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// Where it looks for CNI configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// The bpffs under which programs and maps are pinned.
    #[arg(long, default_value = "/sys/fs/bpf")]
    bpffs: PathBuf,
    /// The agent's directory of sockets.
    #[arg(long, default_value = "/run/towpath")]
    run_dir: PathBuf,
    /// The agent's directory of leases.
    #[arg(long, default_value = "/var/lib/towpath")]
    state_dir: PathBuf,
    /// Also while pods hold addresses: they lose their network, and go only when another plugin is there.
    #[arg(long)]
    force: bool,
}

/// Removes; what could not be removed is said at the end, after everything else is gone.
///
/// # Errors
/// It refuses, or something stays.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let config = AgentConfig {
        run_dir: options.run_dir.clone(),
        state_dir: options.state_dir.clone(),
        bpffs: options.bpffs.clone(),
        cni_conf_dir: options.conf_dir.clone(),
        ..AgentConfig::default()
    };
    refuse_while_in_use(&config, options.force)?;
    let mut problems: Vec<String> = Vec::new();
    let mut note = |what: &Path, result: io::Result<()>| match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => problems.push(format!("{}: {error}", what.display())),
        _ => {}
    };
    // What this network set aside comes back first: it sorts before ours, so the container runtime is never without one.
    match conflists::restore(&config.cni_conf_dir) {
        Ok(names) if names.is_empty() => {}
        Ok(names) => crate::print(&format!("put back {}", names.join(", ")))?,
        Err(error) => note(&config.cni_conf_dir, Err(error)),
    }
    let file = config.cni_conf_dir.join(conflist::FILE);
    note(&file, fs::remove_file(&file));
    let kernel = towpath_datapath::uninstall(&config.bpffs);
    let plugin = options.bin_dir.join(super::node::PLUGIN);
    note(&plugin, fs::remove_file(&plugin));
    for directory in [&config.run_dir, &config.state_dir] {
        note(directory, empty(directory));
    }
    if let Err(error) = kernel {
        problems.push(error.to_string());
    }
    if !problems.is_empty() {
        bail!("not everything could be removed from this node: {}; run this again", problems.join("; "));
    }
    crate::print("this node is clean")?;
    Ok(true)
}

fn refuse_while_in_use(config: &AgentConfig, force: bool) -> Result<()> {
    if UnixStream::connect(config.status_socket()).is_ok() {
        bail!("an agent runs on this node: delete the DaemonSet kube-system/towpath first");
    }
    if !config.state_dir.join("leases").is_dir() {
        return Ok(());
    }
    // Its lock is the agent's, too.
    let store = LeaseStore::open(&config.state_dir, &[], Arc::new(RealDisk))?;
    let holders: Vec<String> = store
        .leases()
        .into_iter()
        .map(|lease| lease.pod.map_or_else(|| lease.owner.to_string(), |pod| pod.to_string()))
        .collect();
    if !holders.is_empty() && !force {
        bail!(
            "{} pods of this node hold addresses ({}): drain the node, or delete them, first; or --force",
            holders.len(),
            holders.join(", ")
        );
    }
    Ok(())
}

/// Removes a directory, or at least what is in it: it may be where something is mounted.
fn empty(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(dir: &Path) -> AgentConfig {
        AgentConfig { run_dir: dir.join("run"), state_dir: dir.join("state"), ..AgentConfig::default() }
    }

    #[test]
    fn a_running_agent_is_not_undone() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::create_dir_all(&config.run_dir).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(config.status_socket()).unwrap();
        assert!(refuse_while_in_use(&config, true).unwrap_err().to_string().contains("DaemonSet"));
        drop(listener);
        refuse_while_in_use(&config, false).unwrap();
        let held = LeaseStore::open(&config.state_dir, &[], Arc::new(RealDisk)).unwrap();
        assert!(refuse_while_in_use(&config, false).unwrap_err().to_string().contains("another agent"));
        drop(held);
    }

    #[test]
    fn pods_that_hold_addresses_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let store =
            LeaseStore::open(&config.state_dir, &["10.244.0.0/24".parse().unwrap()], Arc::new(RealDisk)).unwrap();
        let request: towpath_wire::cni::AddRequest = towpath_wire::cni::AddRequest {
            attachment: towpath_wire::cni::Attachment::new("c1", "eth0").unwrap(),
            network: "towpath".to_owned(),
            netns: "/run/netns/x".to_owned(),
            pod: Some(towpath_wire::cni::PodIdentity {
                namespace: "shop".to_owned(),
                name: "web".to_owned(),
                uid: String::new(),
            }),
        };
        store.reserve(&request).unwrap();
        drop(store);
        let refused = refuse_while_in_use(&config, false).unwrap_err().to_string();
        assert!(refused.contains("shop/web") && refused.contains("drain"), "{refused}");
        refuse_while_in_use(&config, true).unwrap();
    }

    #[test]
    fn a_directory_goes_with_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        fs::create_dir_all(state.join("leases/released")).unwrap();
        fs::write(state.join("node.json"), "{}").unwrap();
        // What a link leads to is not ours.
        fs::create_dir(dir.path().join("other")).unwrap();
        fs::write(dir.path().join("other/file"), "").unwrap();
        std::os::unix::fs::symlink(dir.path().join("other"), state.join("link")).unwrap();
        empty(&state).unwrap();
        assert!(!state.exists() && dir.path().join("other/file").exists());
    }
}
