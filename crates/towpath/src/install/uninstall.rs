//! `towpath node uninstall`: takes everything of ours off a node, in the order in which nothing is left half-working: the
//! configuration that calls the plugin, what is in the kernel, the plugin, the state. Before all of it the configuration of a network
//! that was here before comes back, if it was set aside.
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
use towpath_wire::cni::DELETES_NAME;
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
    let _no_agent_starts = refuse_while_in_use(&config, options.force)?;
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
    for file in [super::node::unfinished(&plugin), plugin] {
        note(&file, fs::remove_file(&file));
    }
    for directory in [&config.run_dir, &config.state_dir] {
        empty(directory, &mut note);
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

/// The leases, locked as a running agent locks them: as long as they are held, none can start.
fn refuse_while_in_use(config: &AgentConfig, force: bool) -> Result<Option<LeaseStore>> {
    if UnixStream::connect(config.status_socket()).is_ok() {
        bail!("an agent runs on this node: delete the DaemonSet kube-system/towpath first");
    }
    if UnixStream::connect(config.carry_socket()).is_ok() {
        bail!("carry runs on this node: delete the DaemonSet kube-system/towpath-dns first");
    }
    if !config.state_dir.join("leases").is_dir() {
        return Ok(None);
    }
    let store = LeaseStore::open(&config.state_dir, &[], Arc::new(RealDisk))?;
    // What was deleted while no agent ran is queued, and nobody is left to work the queue off.
    let deletes = config.state_dir.join(DELETES_NAME);
    let holders: Vec<String> = store
        .leases()
        .into_iter()
        .filter(|lease| !deletes.join(lease.owner.delete_file()).exists())
        .map(|lease| lease.pod.map_or_else(|| lease.owner.to_string(), |pod| pod.to_string()))
        .collect();
    if !holders.is_empty() && !force {
        bail!(
            "{} pods of this node hold addresses ({}): drain the node, or delete them, first; or --force",
            holders.len(),
            holders.join(", ")
        );
    }
    Ok(Some(store))
}

/// Removes a directory, or at least what is in it: it may be where something is mounted. What stays is noted, and the rest goes.
fn empty(directory: &Path, note: &mut impl FnMut(&Path, io::Result<()>)) {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) => return note(directory, Err(error)),
    };
    for entry in entries {
        match entry.map(|entry| entry.path()) {
            Ok(path) if path.is_dir() && !path.is_symlink() => note(&path, fs::remove_dir_all(&path)),
            Ok(path) => note(&path, fs::remove_file(&path)),
            Err(error) => note(directory, Err(error)),
        }
    }
    match fs::remove_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {}
        removed => note(directory, removed),
    }
}

#[cfg(test)]
mod tests {
    use towpath_wire::cni::{AddRequest, Attachment, PodIdentity};

    use super::*;

    fn config(dir: &Path) -> AgentConfig {
        AgentConfig { run_dir: dir.join("run"), state_dir: dir.join("state"), ..AgentConfig::default() }
    }

    fn hold(config: &AgentConfig, container: &str, pod: &str) -> Attachment {
        let store =
            LeaseStore::open(&config.state_dir, &["10.244.0.0/24".parse().unwrap()], Arc::new(RealDisk)).unwrap();
        let attachment = Attachment::new(container, "eth0").unwrap();
        let request = AddRequest {
            attachment: attachment.clone(),
            network: "towpath".to_owned(),
            netns: "/run/netns/x".to_owned(),
            pod: Some(PodIdentity { namespace: "shop".to_owned(), name: pod.to_owned(), uid: String::new() }),
            bandwidth: None,
        };
        store.reserve(&request, &[]).unwrap();
        attachment
    }

    #[test]
    fn a_running_agent_is_not_undone() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        fs::create_dir_all(&config.run_dir).unwrap();
        let listener = std::os::unix::net::UnixListener::bind(config.status_socket()).unwrap();
        assert!(refuse_while_in_use(&config, true).map(drop).unwrap_err().to_string().contains("DaemonSet"));
        drop(listener);
        let listener = std::os::unix::net::UnixListener::bind(config.carry_socket()).unwrap();
        assert!(refuse_while_in_use(&config, true).map(drop).unwrap_err().to_string().contains("towpath-dns"));
        drop(listener);
        refuse_while_in_use(&config, false).unwrap();
        let held = LeaseStore::open(&config.state_dir, &[], Arc::new(RealDisk)).unwrap();
        assert!(refuse_while_in_use(&config, false).map(drop).unwrap_err().to_string().contains("another agent"));
        drop(held);
    }

    #[test]
    fn pods_that_hold_addresses_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        hold(&config, "c1", "web");
        let refused = refuse_while_in_use(&config, false).map(drop).unwrap_err().to_string();
        assert!(refused.contains("shop/web") && refused.contains("drain"), "{refused}");
        refuse_while_in_use(&config, true).unwrap();
    }

    #[test]
    fn what_was_deleted_after_the_agent_had_gone_holds_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let config = config(dir.path());
        let gone = hold(&config, "c1", "web");
        hold(&config, "c2", "db");
        fs::create_dir(config.state_dir.join(DELETES_NAME)).unwrap();
        fs::write(config.state_dir.join(DELETES_NAME).join(gone.delete_file()), "").unwrap();
        let refused = refuse_while_in_use(&config, false).map(drop).unwrap_err().to_string();
        assert!(refused.starts_with("1 pods") && refused.contains("shop/db"), "{refused}");
    }

    #[test]
    fn what_cannot_be_removed_is_noted_and_keeps_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let mut noted = Vec::new();
        empty(&dir.path().join("never"), &mut |path, result| noted.push((path.to_owned(), result.unwrap_err().kind())));
        assert_eq!(noted, [(dir.path().join("never"), io::ErrorKind::NotFound)]);
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
        empty(&state, &mut |path, result| result.unwrap_or_else(|error| panic!("{}: {error}", path.display())));
        assert!(!state.exists() && dir.path().join("other/file").exists());
    }
}
