//! The last state on disk: a snapshot of the feed, replaced whole. A file that cannot be read is set aside and named; nothing
//! is invented from it.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use towpath_wire::dns::FeedMessage;

use crate::cluster::Cluster;

/// Name of the file in the state directory.
pub(crate) const FILE: &str = "dns-state.json";

/// How long changes gather before they are written: a rolling update is hundreds of them.
const GATHER: Duration = Duration::from_millis(500);

/// The state that was saved last, if there is one that can be read.
pub(crate) fn load(path: &Path) -> Option<FeedMessage> {
    let bytes = match std::fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return None,
        Err(error) => {
            tracing::error!(path = %path.display(), %error, "saved DNS state cannot be read: waiting for the agent");
            return None;
        }
    };
    match serde_json::from_slice::<FeedMessage>(&bytes) {
        Ok(snapshot @ FeedMessage::Snapshot { .. }) => Some(snapshot),
        other => {
            let reason = other.err().map_or_else(|| "it is no snapshot".to_owned(), |e| e.to_string());
            let aside = path.with_extension("json.damaged");
            tracing::error!(path = %path.display(), reason, aside = %aside.display(),
                "saved DNS state is damaged: set aside; cluster names are not answered until the agent feeds them");
            if let Err(error) = std::fs::rename(path, &aside) {
                tracing::error!(%error, "and it could not be set aside");
            }
            None
        }
    }
}

/// Saves whenever something was fed, and once more at shutdown.
pub(crate) async fn keep(path: PathBuf, cluster: Arc<Cluster>, shutdown: CancellationToken) {
    loop {
        let last = tokio::select! {
            biased; // What came just before the end is saved too.
            () = cluster.changed() => {
                tokio::select! {
                    () = sleep(GATHER) => false,
                    () = shutdown.cancelled() => true,
                }
            }
            () = shutdown.cancelled() => return,
        };
        let (snapshot, to) = (cluster.snapshot(), path.clone());
        let saved = tokio::task::spawn_blocking(move || save(&to, &snapshot)).await;
        match saved {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(path = %path.display(), %error, "DNS state could not be saved"),
            Err(error) => tracing::error!(%error, "saving DNS state failed"),
        }
        if last {
            return;
        }
    }
}

/// Writes, syncs and renames, so that the file is at any moment either the old state or the new.
fn save(path: &Path, snapshot: &FeedMessage) -> std::io::Result<()> {
    let fresh = path.with_extension("json.new");
    let mut file = File::create(&fresh)?;
    file.write_all(&serde_json::to_vec(snapshot)?)?;
    file.sync_all()?;
    std::fs::rename(&fresh, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}
