//! When this agent was last ready, beside its socket: by that `towpath-cni` tells an agent that is about to come back from one that is gone.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use tokio::sync::watch;
use towpath_wire::cni::READY_NAME;
use tracing::debug;

use crate::cni_server::Readiness;

/// An agent that dies was ready so long before at most.
const EVERY: Duration = Duration::from_secs(10);

/// Notes it while the agent is ready. Runs until nobody says any more whether it is.
pub(crate) async fn keep(run_dir: PathBuf, readiness: watch::Receiver<Readiness>) {
    keep_every(EVERY, run_dir, readiness).await;
}

async fn keep_every(every: Duration, run_dir: PathBuf, mut readiness: watch::Receiver<Readiness>) {
    while readiness.wait_for(|state| *state == Readiness::Ready).await.is_ok() {
        note(&run_dir, &readiness);
        tokio::time::sleep(every).await;
    }
}

/// Notes it if the agent is ready at this moment.
pub(crate) fn note(run_dir: &Path, readiness: &watch::Receiver<Readiness>) {
    if *readiness.borrow() != Readiness::Ready {
        return;
    }
    let touch = || -> io::Result<()> {
        let stamp = File::options().create(true).append(true).open(run_dir.join(READY_NAME))?;
        stamp.set_modified(SystemTime::now())
    };
    if let Err(error) = touch() {
        debug!(%error, "when this agent was last ready could not be noted: until the next is, STATUS will say that there is none");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn it_is_noted_from_the_moment_that_the_agent_is_ready_and_again_and_again() {
        let dir = tempfile::tempdir().unwrap();
        let noted = || std::fs::metadata(dir.path().join(READY_NAME)).and_then(|file| file.modified()).ok();
        let later_than = async |before: Option<SystemTime>| {
            let later = async {
                while noted() <= before {
                    tokio::time::sleep(Duration::from_millis(2)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(30), later).await.expect("it is not noted");
        };
        let (ready, readiness) = watch::channel(Readiness::Starting("waiting".to_owned()));
        note(dir.path(), &readiness);
        let _keeping = tokio::spawn(keep_every(Duration::from_millis(5), dir.path().to_owned(), readiness));
        tokio::task::yield_now().await;
        assert_eq!(noted(), None, "it never was");
        ready.send_replace(Readiness::Ready);
        later_than(None).await;
        later_than(noted()).await;
    }
}
