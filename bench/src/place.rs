//! Where a process of the benchmark runs: network namespace, cgroup, CPU. A process enters its place before it has a thread.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, setns, unshare};
use nix::unistd::Pid;
use rustix::process::{Signal, set_parent_process_death_signal};

/// A place.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct Place {
    /// File of a network namespace to enter.
    #[arg(long)]
    pub(crate) netns: Option<PathBuf>,
    /// Make a new network namespace.
    #[arg(long, conflicts_with = "netns")]
    pub(crate) new_netns: bool,
    /// Directory of a cgroup to join.
    #[arg(long)]
    pub(crate) cgroup: Option<PathBuf>,
    /// Directory to mount a BPF file system on, in a mount namespace of the process's own: what is pinned there goes with it.
    #[arg(long)]
    pub(crate) bpffs: Option<PathBuf>,
    /// The only CPU to run on.
    #[arg(long)]
    pub(crate) cpu: Option<usize>,
}

impl Place {
    /// The same place on one CPU.
    pub(crate) fn on(&self, cpu: usize) -> Self {
        Self { cpu: Some(cpu), ..self.clone() }
    }

    /// As arguments of the hidden command.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        if let Some(path) = &self.netns {
            arguments.extend(["--netns".to_owned(), path.display().to_string()]);
        }
        if self.new_netns {
            arguments.push("--new-netns".to_owned());
        }
        if let Some(path) = &self.cgroup {
            arguments.extend(["--cgroup".to_owned(), path.display().to_string()]);
        }
        if let Some(path) = &self.bpffs {
            arguments.extend(["--bpffs".to_owned(), path.display().to_string()]);
        }
        if let Some(cpu) = self.cpu {
            arguments.extend(["--cpu".to_owned(), cpu.to_string()]);
        }
        arguments
    }

    /// Moves the calling, single-threaded process there; it dies when the process that started it does.
    ///
    /// # Errors
    /// What could not be entered.
    pub(crate) fn enter(&self) -> Result<()> {
        set_parent_process_death_signal(Some(Signal::KILL)).context("ask to die with the benchmark")?;
        if let Some(path) = &self.cgroup {
            std::fs::write(path.join("cgroup.procs"), "0")
                .with_context(|| format!("join cgroup {}", path.display()))?;
        }
        if let Some(path) = &self.netns {
            let file = File::open(path).with_context(|| format!("open network namespace {}", path.display()))?;
            setns(file, CloneFlags::CLONE_NEWNET)
                .with_context(|| format!("enter network namespace {}", path.display()))?;
        }
        if self.new_netns {
            unshare(CloneFlags::CLONE_NEWNET).context("make a network namespace (are you root?)")?;
        }
        if let Some(path) = &self.bpffs {
            mount_bpffs(path)?;
        }
        if let Some(cpu) = self.cpu {
            let mut set = CpuSet::new();
            set.set(cpu).with_context(|| format!("CPU {cpu}"))?;
            sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("run on CPU {cpu}"))?;
        }
        Ok(())
    }
}

fn mount_bpffs(path: &Path) -> Result<()> {
    let none: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("make a mount namespace (are you root?)")?;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("keep mounts to this mount namespace")?;
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none)
        .with_context(|| format!("mount a BPF file system on {}", path.display()))
}
