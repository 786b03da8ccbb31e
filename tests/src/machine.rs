//! What the tests need of the machine they run on, and what a lab may not leave on it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::cluster::{lab_driver_is_forced, usable_kubectl, wait};

/// Whether end-to-end tests can run here. Says why not on standard output.
///
/// # Errors
/// They cannot, and `CI=true` says that they must.
pub fn can_run_labs() -> Result<bool> {
    let root = nix::unistd::Uid::effective().is_root();
    let missing = match (root, lab_driver_is_forced() || usable_kubectl()) {
        (false, _) => "not root",
        (true, false) => "no kubectl of 1.31 or newer",
        (true, true) => return Ok(true),
    };
    if std::env::var("CI").is_ok_and(|value| value == "true") {
        bail!("end-to-end tests must run here (CI=true), but: {missing}");
    }
    println!("skipped: {missing}");
    Ok(false)
}

/// Where the machine's cgroup v2 hierarchy is.
///
/// # Errors
/// It has none.
pub fn cgroup2() -> Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    let mut points = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ');
        let (point, kind) = (words.nth(1)?, words.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(point))
    });
    points.next().context("no cgroup2 file system is mounted")
}

/// The cgroup of a whole lab.
///
/// # Errors
/// As [`cgroup2`].
pub fn lab_cgroup(lab: &str) -> Result<PathBuf> {
    Ok(cgroup2()?.join(format!("towpath-lab-{lab}")))
}

/// The process of a node's agent.
///
/// # Errors
/// There is none at the moment.
pub fn lab_agent(lab: &str, node: &str) -> Result<i32> {
    lab_process(lab, node, "agent")
}

/// The process of a node that carries packets in user space.
///
/// # Errors
/// There is none at the moment.
pub fn lab_carry(lab: &str, node: &str) -> Result<i32> {
    lab_process(lab, node, "carry")
}

fn lab_process(lab: &str, node: &str, command: &str) -> Result<i32> {
    let system = lab_cgroup(lab)?.join("nodes").join(node).join("system");
    let mut found = processes_below(&system)
        .into_iter()
        .filter(|pid| command_line(*pid).get(1).is_some_and(|word| word == command));
    found.next().with_context(|| format!("node {node} has no process {command}"))
}

/// Waits for the agent that is started in the place of one that was killed.
///
/// # Errors
/// There is none within twenty seconds.
pub fn another_agent(lab: &str, node: &str, dead: i32) -> Result<i32> {
    wait("another agent", Duration::from_secs(20), || {
        let pid = lab_agent(lab, node)?;
        if pid == dead { bail!("process {pid} is still there") } else { Ok(pid) }
    })
}

/// Processes in a cgroup and below it.
pub fn processes_below(cgroup: &Path) -> Vec<i32> {
    let mut found: Vec<i32> = std::fs::read_to_string(cgroup.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    for entry in std::fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(processes_below(&entry.path()));
        }
    }
    found
}

/// The words of a process's command line; none when it is gone.
pub fn command_line(pid: i32) -> Vec<String> {
    let text = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    text.split(|b| *b == 0).filter(|w| !w.is_empty()).map(|w| String::from_utf8_lossy(w).into_owned()).collect()
}

/// Sends SIGKILL to one process.
///
/// # Errors
/// It is not there.
pub fn kill(pid: i32) -> Result<()> {
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)
        .with_context(|| format!("kill process {pid} ({})", command_line(pid).join(" ")))
}

/// SIGSTOP, as a machine that freezes; it goes on when the returned value is dropped.
///
/// # Errors
/// There is no such process.
pub fn freeze(pid: i32) -> Result<Frozen> {
    let process = nix::unistd::Pid::from_raw(pid);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGSTOP)
        .with_context(|| format!("stop process {pid} ({})", command_line(pid).join(" ")))?;
    Ok(Frozen(process))
}

/// A process that was stopped.
#[derive(Debug)]
pub struct Frozen(nix::unistd::Pid);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGCONT);
    }
}

/// Everything of the machine that a lab touches, as lines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Footprint(BTreeSet<String>);

impl Footprint {
    /// Looks at the machine: named network namespaces, links of this namespace, mounts, cgroups, pinned BPF objects, our
    /// processes, our directories.
    ///
    /// # Errors
    /// Something cannot be read.
    pub fn take() -> Result<Self> {
        let mut lines = BTreeSet::new();
        for (what, dir) in [
            ("network namespace", "/run/netns"),
            ("link", "/sys/class/net"),
            ("directory", "/run/towpath"),
            ("directory", "/run/towpath/lab"),
            ("directory", "/var/lib/towpath/lab"),
        ] {
            lines.extend(names(Path::new(dir)).map(|name| format!("{what} {dir}/{name}")));
        }
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
        lines.extend(mounts.lines().filter_map(|l| l.split(' ').nth(4)).map(|point| format!("mount {point}")));
        directories_below(&cgroup2()?, &mut |path| {
            lines.insert(format!("cgroup {}", path.display()));
        });
        directories_below(Path::new("/sys/fs/bpf"), &mut |path| {
            lines.insert(format!("pinned {}", path.display()));
        });
        lines.extend(names(Path::new("/sys/fs/bpf")).map(|name| format!("pinned /sys/fs/bpf/{name}")));
        for pid in names(Path::new("/proc")).filter_map(|name| name.parse::<i32>().ok()) {
            let program = std::fs::read_link(format!("/proc/{pid}/exe")).unwrap_or_default();
            let name = program.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if matches!(name, "towpath" | "towpath-cni") {
                lines.insert(format!("process {pid}: {}", command_line(pid).join(" ")));
            }
        }
        Ok(Self(lines))
    }

    /// What is there now and was not then. Other labs of the machine, which come and go as their owners please, are left out,
    /// and so is what tests of single crates make (`towpath-test-…`).
    pub fn new_since<'f>(&'f self, then: &'f Self, ours: &[&str]) -> Vec<&'f str> {
        let prefix = "directory /run/towpath/lab/";
        let others: BTreeSet<&str> = self
            .0
            .iter()
            .chain(&then.0)
            .filter_map(|line| line.strip_prefix(prefix))
            .map(|name| name.trim_end_matches(".lock"))
            .filter(|name| !ours.contains(name))
            .collect();
        let foreign = |line: &str| {
            others.iter().any(|lab| {
                let marks = [format!("tp-{lab}-"), format!("towpath-lab-{lab}"), format!("/lab/{lab}")];
                marks.iter().any(|mark| line.contains(mark))
                    || line.ends_with(&format!(" lab serve {lab}"))
                    || line.contains(&format!("--name {lab}"))
            }) || line.contains("/towpath-test-")
                || (!others.is_empty()
                    && ["/run/towpath/lab", "/run/towpath/netns-is-ours", "mount /run/netns"]
                        .iter()
                        .any(|own| line.ends_with(own)))
        };
        self.0.difference(&then.0).map(String::as_str).filter(|line| !foreign(line)).collect()
    }
}

fn names(dir: &Path) -> impl Iterator<Item = String> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

fn directories_below(dir: &Path, found: &mut dyn FnMut(&Path)) {
    for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found(&entry.path());
            directories_below(&entry.path(), found);
        }
    }
}
