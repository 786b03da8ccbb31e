//! The file system of a container: an overlay over the image, `/proc`, `/dev`, `/sys` and the volumes.
//!
//! Everything is mounted in the container's own mount namespace and is gone with its last process. Volume targets are
//! resolved after the root has changed, so that a symbolic link in a volume cannot lead outside.

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::pivot_root;
use serde::{Deserialize, Serialize};

/// One bind mount.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct BindMount {
    /// File or directory of the machine.
    pub(crate) source: PathBuf,
    /// Relative path below `source` (`subPath`); may not lead out of it.
    pub(crate) sub_path: Option<PathBuf>,
    /// Absolute path in the container; made when absent.
    pub(crate) target: PathBuf,
    /// Whether writes are refused.
    pub(crate) read_only: bool,
}

/// The root of a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RootSpec {
    /// Image tree, never written.
    pub(crate) image: PathBuf,
    /// Empty directory on which the container's writable layer is mounted.
    pub(crate) scratch: PathBuf,
    /// Volumes, `/etc/hosts` and the like, in order.
    pub(crate) binds: Vec<BindMount>,
    /// `readOnlyRootFilesystem`.
    pub(crate) read_only: bool,
    /// Whether `/proc/sys` and the like stay writable.
    pub(crate) privileged: bool,
}

/// Makes the root and moves the calling process into it. The process must be in its new process namespace. With `tty` its
/// standard input is a terminal, which becomes `/dev/console`.
pub(crate) fn enter(root: &RootSpec, tty: bool) -> Result<()> {
    umask(Mode::from_bits_truncate(0o022));
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace")?;
    attach(None, Path::new("/"), None, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None)?;
    let merged = mount_overlay(root)?;
    mount_kernel_trees(&merged)?;
    make_devices(&merged.join("dev"))?;
    if tty {
        // The terminal is the machine's: this is the name by which programs inside find it.
        let console = merged.join("dev/console");
        std::fs::File::create(&console).with_context(|| format!("create {}", console.display()))?;
        // By its path: the descriptor belongs to the mount namespace that was left.
        let terminal = std::fs::read_link("/proc/self/fd/0").context("find the terminal's name")?;
        attach(terminal.to_str(), &console, None, MsFlags::MS_BIND, None)?;
    }
    let old = merged.join(".old-root");
    make_dir(&old)?;
    pivot_root(&merged, &old).context("change the root directory")?;
    std::env::set_current_dir("/").context("enter the new root directory")?;
    for bind in &root.binds {
        bind_volume(bind).with_context(|| format!("mount {} in the container", bind.target.display()))?;
    }
    umount2("/.old-root", MntFlags::MNT_DETACH).context("leave the machine's file system")?;
    std::fs::remove_dir("/.old-root").context("remove the old root's mount point")?;
    if !root.privileged {
        protect_proc()?;
    }
    if root.read_only {
        attach(None, Path::new("/"), None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None)?;
    }
    Ok(())
}

fn attach(source: Option<&str>, target: &Path, kind: Option<&str>, flags: MsFlags, data: Option<&str>) -> Result<()> {
    mount(source, target, kind, flags, data)
        .with_context(|| format!("mount {} at {}", kind.unwrap_or("(bind)"), target.display()))
}

fn make_dir(path: &Path) -> Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()))
}

fn mount_overlay(root: &RootSpec) -> Result<PathBuf> {
    attach(Some("tmpfs"), &root.scratch, Some("tmpfs"), MsFlags::MS_NODEV, Some("mode=0755"))?;
    let (upper, work, merged) = (root.scratch.join("upper"), root.scratch.join("work"), root.scratch.join("merged"));
    for dir in [&upper, &work, &merged] {
        std::fs::create_dir(dir).with_context(|| format!("create {}", dir.display()))?;
    }
    let options = format!("lowerdir={},upperdir={},workdir={}", root.image.display(), upper.display(), work.display());
    attach(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(&options))?;
    Ok(merged)
}

fn mount_kernel_trees(merged: &Path) -> Result<()> {
    let guarded = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    for dir in ["proc", "sys", "dev"] {
        make_dir(&merged.join(dir))?;
    }
    attach(Some("proc"), &merged.join("proc"), Some("proc"), guarded, None)?;
    attach(Some("sysfs"), &merged.join("sys"), Some("sysfs"), guarded | MsFlags::MS_RDONLY, None)?;
    attach(Some("tmpfs"), &merged.join("dev"), Some("tmpfs"), MsFlags::MS_NOSUID, Some("mode=0755,size=64k"))?;
    for dir in ["pts", "shm"] {
        make_dir(&merged.join("dev").join(dir))?;
    }
    let terminals = Some("newinstance,ptmxmode=0666,mode=0620,gid=5");
    attach(
        Some("devpts"),
        &merged.join("dev/pts"),
        Some("devpts"),
        MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
        terminals,
    )?;
    attach(Some("shm"), &merged.join("dev/shm"), Some("tmpfs"), guarded, Some("mode=1777,size=64m"))
}

fn make_devices(dev: &Path) -> Result<()> {
    let nodes = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
    let before = umask(Mode::empty());
    for (name, major, minor) in nodes {
        mknod(&dev.join(name), SFlag::S_IFCHR, Mode::from_bits_truncate(0o666), makedev(major, minor))
            .with_context(|| format!("make /dev/{name}"))?;
    }
    umask(before);
    let links = [
        ("pts/ptmx", "ptmx"),
        ("/proc/self/fd", "fd"),
        ("/proc/self/fd/0", "stdin"),
        ("/proc/self/fd/1", "stdout"),
        ("/proc/self/fd/2", "stderr"),
    ];
    for (target, name) in links {
        symlink(target, dev.join(name)).with_context(|| format!("make /dev/{name}"))?;
    }
    Ok(())
}

/// Runs after the root has changed; the machine's files are below `/.old-root`.
fn bind_volume(bind: &BindMount) -> Result<()> {
    use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat2};

    let relative = bind.source.strip_prefix("/").unwrap_or(&bind.source);
    let source = Path::new("/.old-root").join(relative);
    let base = open(&source, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open the volume {}", bind.source.display()))?;
    let base = match &bind.sub_path {
        None => base,
        Some(sub) => {
            if openat2(&base, sub, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH).is_err() {
                rustix::fs::mkdirat(&base, sub, Mode::from_raw_mode(0o755))
                    .with_context(|| format!("create subPath {}", sub.display()))?;
            }
            openat2(&base, sub, OFlags::PATH | OFlags::CLOEXEC, Mode::empty(), ResolveFlags::BENEATH)
                .with_context(|| format!("open subPath {}", sub.display()))?
        }
    };
    let is_dir = rustix::fs::fstat(&base).is_ok_and(|stat| rustix::fs::FileType::from_raw_mode(stat.st_mode).is_dir());
    if is_dir {
        make_dir(&bind.target)?;
    } else if !bind.target.exists() {
        if let Some(parent) = bind.target.parent() {
            make_dir(parent)?;
        }
        std::fs::File::create(&bind.target).with_context(|| format!("create {}", bind.target.display()))?;
    }
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&base));
    attach(Some(&path), &bind.target, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
    if bind.read_only {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        attach(None, &bind.target, None, flags, None)?;
    }
    Ok(())
}

/// The machine's kernel is shared: what would change or show it is read-only or hidden, as in every container runtime.
fn protect_proc() -> Result<()> {
    for path in ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"] {
        let at = Path::new(path);
        if at.exists() {
            attach(Some(path), at, None, MsFlags::MS_BIND | MsFlags::MS_REC, None)?;
            attach(None, at, None, MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY, None)?;
        }
    }
    for path in ["/proc/kcore", "/proc/keys", "/proc/timer_list"] {
        let at = Path::new(path);
        if at.exists() {
            attach(Some("/dev/null"), at, None, MsFlags::MS_BIND, None)?;
        }
    }
    Ok(())
}
