//! The mount table of the calling process: what is mounted where, and unmounting all below a directory.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// All mount points, in the order they were mounted.
pub(crate) fn mount_points() -> Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(1)).map(|p| PathBuf::from(unescape(p))).collect())
}

/// The kernel writes space, tab, newline and backslash as octal.
fn unescape(field: &str) -> String {
    field.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Whether something is mounted exactly at `path`.
pub(crate) fn is_mount_point(path: &Path) -> Result<bool> {
    Ok(mount_points()?.iter().any(|mounted| mounted == path))
}

/// Where the cgroup v2 hierarchy is mounted.
pub(crate) fn cgroup2() -> Result<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mounts").context("read /proc/self/mounts")?;
    table
        .lines()
        .map(|line| line.split(' ').collect::<Vec<_>>())
        .find_map(|fields| match fields.as_slice() {
            [_, at, "cgroup2", ..] => Some(PathBuf::from(unescape(at))),
            _ => None,
        })
        .context("no cgroup v2 hierarchy is mounted; try `mount -t cgroup2 none /sys/fs/cgroup`")
}

/// Mounts a BPF file system of its own at `path`, unless one is there.
pub(crate) fn mount_bpffs(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))?;
    if is_mount_point(path)? {
        return Ok(());
    }
    mount(
        Some("bpf"),
        path,
        Some("bpf"),
        MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC,
        Some("mode=0700"),
    )
    .with_context(|| format!("mount a BPF file system at {}", path.display()))
}

/// Unmounts everything at or below `dir`, the last mounted first. Returns what could not be unmounted.
pub(crate) fn unmount_below(dir: &Path) -> Vec<anyhow::Error> {
    let points = match mount_points() {
        Ok(points) => points,
        Err(error) => return vec![error],
    };
    let mut errors = Vec::new();
    for point in points.iter().rev().filter(|p| p.starts_with(dir)) {
        if let Err(error) = umount2(point, MntFlags::MNT_DETACH)
            && error != nix::Error::EINVAL
        {
            errors.push(anyhow::Error::new(error).context(format!("unmount {}", point.display())));
        }
    }
    errors
}

/// Removes a directory with all in it, after what is mounted there was unmounted; none is fine. Returns what could not be removed.
pub(crate) fn remove_with_mounts(dir: &Path) -> Vec<anyhow::Error> {
    let mut errors = unmount_below(dir);
    // Never delete through a mount that stayed.
    match mount_points() {
        Ok(points) if points.iter().any(|point| point.starts_with(dir)) => {}
        _ => errors.extend(remove_tree(dir).err()),
    }
    errors
}

/// Removes a directory with all in it; none is fine.
pub(crate) fn remove_tree(path: &Path) -> Result<()> {
    match std::fs::remove_dir_all(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}
