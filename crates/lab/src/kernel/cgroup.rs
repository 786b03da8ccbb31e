//! Cgroups of the v2 hierarchy as groups of processes: made, listed, signalled as one, removed.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Makes the cgroup and its parents.
pub(crate) fn create(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("create cgroup {}", path.display()))
}

/// Moves the calling process into the cgroup.
pub(crate) fn join(path: &Path) -> Result<()> {
    std::fs::write(path.join("cgroup.procs"), "0").with_context(|| format!("join cgroup {}", path.display()))
}

/// Process ids in this cgroup alone; none when it does not exist.
pub(crate) fn processes(path: &Path) -> Vec<i32> {
    std::fs::read_to_string(path.join("cgroup.procs"))
        .map(|text| text.lines().filter_map(|line| line.trim().parse().ok()).collect())
        .unwrap_or_default()
}

/// Whether any process lives in the cgroup or below.
pub(crate) fn is_populated(path: &Path) -> bool {
    std::fs::read_to_string(path.join("cgroup.events")).is_ok_and(|text| text.lines().any(|line| line == "populated 1"))
}

/// Kills every process in the cgroup and below, at once; no cgroup is fine.
pub(crate) fn kill(path: &Path) -> Result<()> {
    match std::fs::write(path.join("cgroup.kill"), "1") {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("kill the processes of cgroup {}", path.display())),
    }
}

/// Cgroups at and below `path`, children first.
fn tree(path: &Path, found: &mut Vec<PathBuf>) {
    if let Ok(entries) = std::fs::read_dir(path) {
        for entry in entries.flatten().filter(|e| e.file_type().is_ok_and(|t| t.is_dir())) {
            tree(&entry.path(), found);
        }
    }
    found.push(path.to_owned());
}

/// Removes the cgroup and all below, whose processes have ended; no cgroup is fine.
pub(crate) fn remove(path: &Path) -> Result<()> {
    let mut all = Vec::new();
    tree(path, &mut all);
    for cgroup in all {
        match std::fs::remove_dir(&cgroup) {
            Ok(()) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                return Err(error).with_context(|| {
                    format!("remove cgroup {} (processes {:?} are still in it)", cgroup.display(), processes(&cgroup))
                });
            }
        }
    }
    Ok(())
}

/// Kills all, waits until they are gone, removes the cgroup. Blocks the calling thread for at most `limit`.
pub(crate) fn kill_and_remove(path: &Path, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        kill(path)?;
        match remove(path) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() >= deadline => return Err(error),
            Err(_) => std::thread::sleep(Duration::from_millis(2)),
        }
        if Instant::now() >= deadline && is_populated(path) {
            bail!("processes of cgroup {} do not end", path.display());
        }
    }
}
