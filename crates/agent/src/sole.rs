//! One agent a node: a lock that a second one cannot have, taken before anything else is touched.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{FlockOperation, flock};

/// How long one that is about to end is waited for.
const PATIENCE: Duration = Duration::from_secs(3);

/// The lock; dropping it, or the end of the process, gives it back.
#[derive(Debug)]
pub(crate) struct Sole(#[allow(dead_code, reason = "the lock lives as long as the file is open")] File);

impl Sole {
    /// Takes the lock of this directory of sockets.
    ///
    /// # Errors
    /// Another agent has it, or the file cannot be made.
    pub(crate) async fn take(run_dir: &Path) -> Result<Self> {
        Self::take_within(run_dir, PATIENCE).await
    }

    async fn take_within(run_dir: &Path, patience: Duration) -> Result<Self> {
        let path = run_dir.join("agent.lock");
        let file = File::create(&path).with_context(|| format!("could not open {}", path.display()))?;
        let begun = Instant::now();
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(Self(file)),
                Err(rustix::io::Errno::WOULDBLOCK) if begun.elapsed() < patience => {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                Err(rustix::io::Errno::WOULDBLOCK) => bail!(
                    "another agent runs on this node (it holds {}): is Towpath installed twice? End one of them \
                     (kubectl get daemonsets --all-namespaces)",
                    path.display()
                ),
                Err(errno) => return Err(errno).with_context(|| format!("could not lock {}", path.display())),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_one_is_refused_by_name_until_the_first_ends() {
        let dir = tempfile::tempdir().unwrap();
        let soon = Duration::from_millis(150);
        let first = Sole::take_within(dir.path(), soon).await.unwrap();
        let said = format!("{:#}", Sole::take_within(dir.path(), soon).await.unwrap_err());
        assert!(said.contains("another agent") && said.contains("agent.lock"), "{said}");
        drop(first);
        Sole::take_within(dir.path(), soon).await.unwrap();
    }
}
