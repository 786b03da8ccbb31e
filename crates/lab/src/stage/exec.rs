//! `lab stage exec`: become a command inside a running container.
//!
//! The supervisor starts this process already inside the container's process, network, host name and IPC namespaces
//! (it is born there); the mount namespace comes last, for this program's own files are not in the container.

use std::convert::Infallible;
use std::fs::File;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};

use super::process::{self, ProcessSpec};
use crate::kernel::cgroup;

/// A command in a container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct ExecSpec {
    /// The container's cgroup.
    pub(crate) cgroup: PathBuf,
    /// Process 1 of the container, as the machine numbers it.
    pub(crate) pid: u32,
    /// The command.
    pub(crate) process: ProcessSpec,
}

pub(super) fn run(spec: ExecSpec) -> Result<Infallible> {
    let mounts = File::open(format!("/proc/{}/ns/mnt", spec.pid)).context("the container is gone")?;
    cgroup::join(&spec.cgroup)?;
    nix::unistd::setsid().context("start a session")?;
    if spec.process.tty {
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).context("take the terminal")?;
    }
    setns(&mounts, CloneFlags::CLONE_NEWNS).context("enter the container's file system")?;
    process::become_user(&spec.process)?;
    Err(process::replace(process::command(&spec.process)?))
}
