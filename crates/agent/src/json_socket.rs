//! A socket that answers whoever connects with one JSON document, and then ends. Root only.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::Serialize;
use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

/// How long a reader may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Makes a socket in the place of an earlier process's, for root only.
///
/// # Errors
/// It cannot be made.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("could not replace {}", path.display()));
        }
        _ => {}
    }
    let listener = UnixListener::bind(path).with_context(|| format!("could not listen on {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// The next who connects. Where the process has no room for another, that passes.
pub(crate) async fn accept(listener: &UnixListener) -> UnixStream {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => return stream,
            Err(error) => {
                debug!(%error, "a connection was not accepted");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Serves the socket, in the place of an earlier process's, until the handle is dropped. One answer is made at a time.
///
/// # Errors
/// The socket cannot be made.
pub(crate) fn serve<T, F>(path: &Path, answer: impl Fn() -> F + Send + 'static) -> Result<AbortOnDropHandle<()>>
where
    T: Serialize + Send + Sync,
    F: Future<Output = T> + Send,
{
    let listener = listen(path)?;
    Ok(AbortOnDropHandle::new(tokio::spawn(async move {
        loop {
            let stream = accept(&listener).await;
            if let Err(error) = deliver(stream, &answer().await).await {
                debug!(%error, "an answer was not delivered");
            }
        }
    })))
}

async fn deliver(mut stream: UnixStream, answer: &impl Serialize) -> Result<()> {
    let text = serde_json::to_vec(answer)?;
    tokio::time::timeout(PATIENCE, stream.write_all(&text)).await??;
    Ok(())
}
