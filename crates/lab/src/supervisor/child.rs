//! A child process that is kept running: started in its namespace and cgroup, restarted with back-off when it dies.

use std::path::PathBuf;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::process::Child;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::runtime::spawn::StageProgram;
use crate::stage::EnterSpec;

/// First and longest wait before a restart; a process that ran longer than the latter starts afresh.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// How long a child may take to end.
const GRACE: Duration = Duration::from_secs(3);

/// What to keep running.
#[derive(Clone, Debug)]
pub(super) struct ChildSpec {
    /// For messages: `agent of n1`.
    pub(super) title: String,
    /// Where and what.
    pub(super) enter: EnterSpec,
    /// File that the stage reads.
    pub(super) stage_file: PathBuf,
    /// Its output is appended here.
    pub(super) log: PathBuf,
}

fn start(spec: &ChildSpec, program: &StageProgram) -> Result<Child> {
    let log = std::fs::OpenOptions::new().create(true).append(true).open(&spec.log);
    let log = log.with_context(|| format!("open {}", spec.log.display()))?;
    let mut command = program.stage("enter", &spec.enter, &spec.stage_file)?;
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/").kill_on_drop(true);
    command.spawn().with_context(|| format!("start the {}", spec.title))
}

/// Runs the child until `stop`, then ends it in good order.
pub(super) async fn keep(spec: ChildSpec, program: StageProgram, stop: CancellationToken) {
    let mut wait = BACKOFF.0;
    while !stop.is_cancelled() {
        let begun = Instant::now();
        match start(&spec, &program) {
            Ok(mut child) => {
                tokio::select! {
                    status = child.wait() => {
                        let status = status.map_or_else(|error| error.to_string(), |status| status.to_string());
                        tracing::warn!(child = spec.title, status, log = %spec.log.display(), "ended and is started again");
                    }
                    () = stop.cancelled() => {
                        end(&mut child).await;
                        return;
                    }
                }
            }
            Err(error) => tracing::error!(child = spec.title, error = %format!("{error:#}"), "cannot be started"),
        }
        if begun.elapsed() > BACKOFF.1 {
            wait = BACKOFF.0;
        }
        tokio::select! {
            () = tokio::time::sleep(wait) => {}
            () = stop.cancelled() => return,
        }
        wait = (wait * 2).min(BACKOFF.1);
    }
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|pid| i32::try_from(pid).ok()) {
        let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
    }
    if tokio::time::timeout(GRACE, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}
