//! `lab stage init`: process 1 of a container.
//!
//! It makes the container's root, then runs the workload as its child, passes signals on to it, reaps what the workload
//! leaves behind, and ends with its exit code (128 plus the signal's number when a signal ended it). A web image's
//! built-in server runs in this process itself.

use std::convert::Infallible;
use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};

use super::process::{self, ProcessSpec};
use super::root::{self, RootSpec};
use super::web::{self, WebSpec};
use crate::kernel::cgroup;

/// What the container runs.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Workload {
    /// The command of [`InitSpec::process`].
    Command,
    /// The built-in web server.
    Web(WebSpec),
    /// Nothing, until it is told to end.
    Pause,
}

/// A container.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct InitSpec {
    /// Cgroup of the container.
    pub(crate) cgroup: PathBuf,
    /// File system.
    pub(crate) root: RootSpec,
    /// User, capabilities, environment and (unless a server runs) command.
    pub(crate) process: ProcessSpec,
    /// What to run.
    pub(crate) workload: Workload,
}

pub(super) fn run(spec: InitSpec) -> Result<Infallible> {
    cgroup::join(&spec.cgroup)?;
    root::enter(&spec.root, spec.process.tty)?;
    if spec.process.tty {
        nix::unistd::setsid().context("start a session")?;
        rustix::process::ioctl_tiocsctty(rustix::stdio::stdin()).context("take the terminal")?;
    }
    std::fs::create_dir_all(&spec.process.cwd).with_context(|| format!("create {}", spec.process.cwd))?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    for (name, own) in [(0, rustix::stdio::stdin()), (1, rustix::stdio::stdout()), (2, rustix::stdio::stderr())] {
        // So that the workload can open /dev/stdout and the like, which are pipes or a terminal of ours.
        rustix::fs::fchown(own, Some(rustix::fs::Uid::from_raw(spec.process.uid)), None)
            .or_else(|error| {
                if error == rustix::io::Errno::ROFS || error == rustix::io::Errno::PERM { Ok(()) } else { Err(error) }
            })
            .with_context(|| format!("give standard stream {name} to user {}", spec.process.uid))?;
    }
    // Process 1 needs no more rights than the workload: it signals processes of its own user.
    process::become_user(&spec.process)?;
    let code = match &spec.workload {
        Workload::Command => runtime.block_on(supervise(&spec.process))?,
        Workload::Web(server) => runtime.block_on(web::serve(server))?,
        Workload::Pause => runtime.block_on(async {
            signal(SignalKind::terminate())?.recv().await;
            anyhow::Ok(0)
        })?,
    };
    std::process::exit(code)
}

/// Signals that process 1 passes on to the workload.
const FORWARDED: [Signal; 7] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGHUP,
    Signal::SIGQUIT,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
    Signal::SIGWINCH,
];

async fn supervise(spec: &ProcessSpec) -> Result<i32> {
    let mut children = signal(SignalKind::child())?;
    let (forward, mut forwarded) = tokio::sync::mpsc::unbounded_channel();
    for which in FORWARDED {
        let mut stream = signal(SignalKind::from_raw(which as i32))?;
        let forward = forward.clone();
        tokio::spawn(async move {
            while stream.recv().await.is_some() {
                let _ = forward.send(which);
            }
        });
    }
    let child = spawn(spec)?;
    loop {
        tokio::select! {
            Some(which) = forwarded.recv() => { let _ = kill(child, which); }
            _ = children.recv() => if let Some(code) = reap(child)? { return Ok(code) },
        }
    }
}

fn spawn(spec: &ProcessSpec) -> Result<Pid> {
    let mut command = process::command(spec)?;
    let child = command.spawn().map_err(|error| {
        let program = spec.argv.first().cloned().unwrap_or_default();
        let text = if error.kind() == std::io::ErrorKind::NotFound {
            format!("exec: {program:?}: executable file not found in $PATH")
        } else {
            format!("exec: {program:?}")
        };
        anyhow::Error::new(error).context(text)
    })?;
    Ok(Pid::from_raw(i32::try_from(child.id())?))
}

/// Collects every ended child; the workload's exit code when it is among them.
fn reap(workload: Pid) -> Result<Option<i32>> {
    loop {
        let (pid, code) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::Exited(pid, code)) => (pid, code),
            Ok(WaitStatus::Signaled(pid, which, _)) => (pid, 128 + which as i32),
            Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return Ok(None),
            Ok(_) | Err(Errno::EINTR) => continue,
            Err(error) => return Err(error).context("wait for the workload"),
        };
        if pid == workload {
            return Ok(Some(code));
        }
    }
}
