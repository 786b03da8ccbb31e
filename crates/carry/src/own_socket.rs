//! Unix sockets that only this program's own processes use: root's, or those of whoever runs all of them in a test.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tokio::net::{UnixListener, UnixStream};

use crate::CarryError;

/// Binds a socket, in place of one that another process left or still has, with access for its owner only.
pub(crate) fn bind(path: &Path) -> Result<UnixListener, CarryError> {
    let error = |source| CarryError::Socket { path: path.to_owned(), source };
    // Bound under another name, closed to others, then moved: nobody ever finds it open or absent.
    let fresh = path.with_extension("sock.new");
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(error(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(error)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(error)?;
    std::fs::rename(&fresh, path).map_err(error)?;
    Ok(listener)
}

/// Whether root or this process's own user is at the other end: the mode of the socket keeps others out, and the kernel's word
/// does so again. `what` is for the log.
pub(crate) fn is_trusted(stream: &UnixStream, what: &str) -> bool {
    let allowed = [0, rustix::process::geteuid().as_raw()];
    match stream.peer_cred() {
        Ok(peer) if allowed.contains(&peer.uid()) => true,
        Ok(peer) => {
            tracing::warn!(uid = peer.uid(), "{what}: refused a connection that is not root's");
            false
        }
        Err(error) => {
            tracing::warn!(%error, "{what}: cannot tell who connected");
            false
        }
    }
}
