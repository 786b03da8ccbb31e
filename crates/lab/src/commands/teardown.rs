//! Removing what a lab made, found from its name alone. Collects errors and goes on.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};

use crate::kernel::{cgroup, mounts, ns};
use crate::layout::{Layout, RUN_DIR, STATE_DIR};

/// Tells that a lab made `/run/netns` a mount point, so that the last lab undoes it.
pub(super) const NETNS_DIR_MARK: &str = "/run/towpath/netns-is-ours";
/// How long killed processes may take to go.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// What all labs share, the directories that theirs lie in, is made and removed by one of them at a time: this waits for the others.
pub(super) fn lock_shared() -> Result<Flock<File>> {
    // It is there before the first lab and after the last.
    let above = Path::new("/run");
    let file = File::open(above).with_context(|| format!("open {}", above.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .with_context(|| format!("lock {}", above.display()))
}

/// Ends all processes, then removes cgroups, namespaces, mounts and the runtime directory.
pub(super) fn runtime(layout: &Layout) -> Vec<anyhow::Error> {
    let mut errors = Vec::new();
    if let Err(error) = cgroup::kill_and_remove(layout.cgroup(), KILL_LIMIT) {
        errors.push(error);
    }
    let names = std::fs::read_dir(ns::NETNS_DIR).into_iter().flatten().flatten();
    for entry in names.filter(|entry| entry.file_name().to_str().is_some_and(|name| layout.owns_netns(name))) {
        if let Err(error) = ns::remove(&entry.path()) {
            errors.push(error);
        }
    }
    errors.extend(mounts::remove_with_mounts(layout.run()));
    errors
}

/// Removes objects, disks, logs and credentials.
pub(super) fn state(layout: &Layout) -> Vec<anyhow::Error> {
    let mut errors: Vec<_> = mounts::remove_tree(layout.state()).err().into_iter().collect();
    let _shared = lock_shared().map_err(|error| errors.push(error));
    for dir in [Path::new(STATE_DIR), Path::new("/var/lib/towpath")] {
        // Fails while something else is in it.
        let _ = std::fs::remove_dir(dir);
    }
    errors
}

/// Removes the lock file while it is held, and what all labs share when this was the last.
pub(super) fn remove_lock(layout: &Layout, lock: Flock<File>) -> Result<()> {
    let _shared = lock_shared()?;
    let _ = std::fs::remove_file(layout.lock());
    drop(lock);
    let last = std::fs::read_dir(RUN_DIR).map_or(true, |mut entries| entries.next().is_none());
    if last && Path::new(NETNS_DIR_MARK).exists() {
        ns::release_netns_dir();
        let _ = std::fs::remove_file(NETNS_DIR_MARK);
    }
    for dir in [Path::new(RUN_DIR), Path::new("/run/towpath")] {
        let _ = std::fs::remove_dir(dir);
    }
    Ok(())
}
