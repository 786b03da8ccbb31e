//! Namespaces pinned as files: made, entered by a thread of its own, removed.
//!
//! Network namespaces live in `/run/netns`, where `ip netns` shows them.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};

use super::mounts;

/// Where `ip netns` keeps its namespaces.
pub(crate) const NETNS_DIR: &str = "/run/netns";

/// Runs `work` in a thread of its own and waits for it without blocking the async runtime.
///
/// The thread may change its namespaces: it ends with `work`.
pub(crate) async fn in_thread<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let (done, result) = tokio::sync::oneshot::channel();
    let runtime = tokio::runtime::Handle::current();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let _entered = runtime.enter();
            let _ = done.send(work());
        })
        .context("start a helper thread")?;
    result.await.map_err(|_| anyhow!("a helper thread ({name}) died without an answer"))?
}

/// Enters the network namespace pinned at `path`, for the calling thread.
pub(crate) fn enter_net(path: &Path) -> Result<()> {
    enter(path, CloneFlags::CLONE_NEWNET)
}

/// Enters the namespace of one kind pinned at `path`, for the calling thread.
pub(crate) fn enter(path: &Path, kind: CloneFlags) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open namespace {}", path.display()))?;
    setns(&file, kind).with_context(|| format!("enter namespace {}", path.display()))
}

/// Runs `work` inside the network namespace at `path`.
pub(crate) async fn in_net<T: Send + 'static>(
    path: &Path,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = path.to_owned();
    in_thread("netns", move || {
        enter_net(&path)?;
        work()
    })
    .await
}

/// Opens a file that pins a namespace, as a target for `move to this namespace` requests.
pub(crate) fn open(path: &Path) -> Result<File> {
    File::open(path).with_context(|| format!("open namespace {}", path.display()))
}

/// Namespaces to make for one sandbox and where to pin each.
#[derive(Clone, Debug, Default)]
pub(crate) struct Pins {
    /// Network namespace; none keeps the caller's.
    pub(crate) net: Option<PathBuf>,
    /// Host name namespace.
    pub(crate) uts: Option<PathBuf>,
    /// System V and POSIX queue namespace.
    pub(crate) ipc: Option<PathBuf>,
}

/// Makes the namespaces that `pins` asks for, runs `setup` inside them, and pins them.
///
/// Fails if a pin exists already; on failure no pin of this call stays.
pub(crate) async fn create(pins: Pins, setup: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    in_thread("new-namespaces", move || {
        let wanted = [
            (&pins.net, CloneFlags::CLONE_NEWNET, "net"),
            (&pins.uts, CloneFlags::CLONE_NEWUTS, "uts"),
            (&pins.ipc, CloneFlags::CLONE_NEWIPC, "ipc"),
        ];
        let flags = wanted.iter().filter(|w| w.0.is_some()).fold(CloneFlags::empty(), |all, w| all | w.1);
        unshare(flags).context("make namespaces")?;
        setup()?;
        let mut made: Vec<&Path> = Vec::new();
        for (pin, _, kind) in &wanted {
            let Some(pin) = pin else { continue };
            if let Err(error) = pin_current(kind, pin) {
                for done in made {
                    let _ = remove(done);
                }
                return Err(error);
            }
            made.push(pin);
        }
        Ok(())
    })
    .await
}

/// Bind-mounts the calling thread's namespace of one kind on a new file.
fn pin_current(kind: &str, pin: &Path) -> Result<()> {
    File::options()
        .write(true)
        .create_new(true)
        .open(pin)
        .with_context(|| format!("create the pin {}", pin.display()))?;
    let own = PathBuf::from("/proc/thread-self/ns").join(kind);
    mount(Some(&own), pin, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .inspect_err(|_| {
            let _ = std::fs::remove_file(pin);
        })
        .with_context(|| format!("pin a {kind} namespace at {}", pin.display()))
}

/// Removes a pinned namespace; not there is fine.
pub(crate) fn remove(pin: &Path) -> Result<()> {
    match umount2(pin, MntFlags::MNT_DETACH) {
        Ok(()) | Err(nix::Error::EINVAL | nix::Error::ENOENT) => {}
        Err(error) => return Err(error).with_context(|| format!("unmount {}", pin.display())),
    }
    match std::fs::remove_file(pin) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error).with_context(|| format!("remove {}", pin.display())),
    }
}

/// Makes `/run/netns` a shared mount point as `ip netns` does, so that pins made by either are seen by both and removed
/// wholly. Returns whether this call made it one.
pub(crate) fn prepare_netns_dir() -> Result<bool> {
    let dir = Path::new(NETNS_DIR);
    std::fs::create_dir_all(dir).with_context(|| format!("create {NETNS_DIR}"))?;
    if mounts::is_mount_point(dir)? {
        return Ok(false);
    }
    mount(Some(dir), dir, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("bind {NETNS_DIR} on itself"))?;
    mount(None::<&str>, dir, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("make {NETNS_DIR} shared"))?;
    Ok(true)
}

/// Undoes [`prepare_netns_dir`] when nothing is left in it. A namespace that someone else made keeps it busy.
pub(crate) fn release_netns_dir() {
    let empty = std::fs::read_dir(NETNS_DIR).is_ok_and(|mut entries| entries.next().is_none());
    if empty {
        let _ = umount2(NETNS_DIR, MntFlags::empty());
        let _ = std::fs::remove_dir(NETNS_DIR);
    }
}
