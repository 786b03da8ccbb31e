//! The CNI server: answers `towpath-cni` over a root-only unix socket.
//!
//! Promises: an ADD is answered only when the pod's isolation is in the kernel and its lease is on disk; DEL succeeds whatever
//! is missing, and what it could not remove is queued and tried again; requests for one attachment run one after the other,
//! those for different ones side by side. Peers that are not root are turned away.
//!
//! ```text
//! accept ─┬─ connection ─ ADD/DEL/CHECK/GC/STATUS ─► PodIndex, LeaseStore, PodPlumber
//!         └─ sweep: queued DELs, leases and devices compared        (all owned by CniServer: dropped with it)
//! ```

mod addresses;
mod connection;
mod convergence;
mod operations;
mod ports;
mod queue;
mod turns;

pub use operations::{Answer, Operations, Settings};
pub use ports::{
    AttachRequest, Attached, Choice, DetachRequest, Device, Fetched, Isolation, PlumbError, PodFacts, PodIndex,
    PodPlumber, Readiness,
};

use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;
use towpath_wire::config::AgentConfig;

use crate::ipam::{LeaseError, LeaseStore};

#[cfg(test)]
mod tests;

/// Requests in work at once; more wait in the socket's backlog.
const CONCURRENT: usize = 128;

/// Where the server listens and how long it waits.
#[derive(Clone, Debug)]
pub struct CniServerConfig {
    /// The socket.
    pub socket: PathBuf,
    /// How long things may take.
    pub settings: Settings,
    /// How often queued DELs and stray devices are looked for.
    pub sweep_every: Duration,
}

impl CniServerConfig {
    /// As the agent's configuration says, with the default times.
    pub fn new(config: &AgentConfig) -> Self {
        Self {
            socket: config.cni_socket(),
            settings: Settings::new(config.state_dir.join(towpath_wire::cni::DELETES_NAME)),
            sweep_every: Duration::from_secs(10),
        }
    }
}

/// Why the server could not start.
#[derive(Debug, thiserror::Error)]
pub enum CniServerError {
    /// The socket.
    #[error("CNI server: cannot {operation} {path}: {source}")]
    Socket {
        /// What was tried.
        operation: &'static str,
        /// On which path.
        path: PathBuf,
        /// What came of it.
        source: io::Error,
    },
    /// The leases.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The devices.
    #[error("CNI server: cannot list the pod devices of this node: {0}")]
    Devices(PlumbError),
}

/// The running server. Dropping it cancels every request; [`CniServer::drain`] lets them end first.
#[derive(Debug)]
pub struct CniServer {
    stop: CancellationToken,
    task: Option<JoinHandle<()>>,
}

impl CniServer {
    /// Compares leases with devices, works off queued DELs, then listens.
    pub async fn start<I: PodIndex, P: PodPlumber>(
        config: CniServerConfig,
        index: Arc<I>,
        plumber: Arc<P>,
        leases: Arc<LeaseStore>,
        readiness: watch::Receiver<Readiness>,
    ) -> Result<Self, CniServerError> {
        let operations = Arc::new(Operations::new(config.settings, index, plumber, leases, readiness));
        operations.reconcile().await?;
        operations.drain_queue().await;
        let listener = listen(&config.socket)?;
        let stop = CancellationToken::new();
        let task = tokio::spawn(serve(listener, operations, config.sweep_every, stop.clone()));
        Ok(Self { stop, task: Some(task) })
    }

    /// Takes no more requests and waits for those in work, at most so long.
    pub async fn drain(mut self, at_most: Duration) {
        self.stop.cancel();
        if let Some(task) = &mut self.task
            && tokio::time::timeout(at_most, task).await.is_err()
        {
            tracing::warn!("CNI requests still in work were cancelled; the next start cleans up after them");
        }
    }

    /// Completes when the server ends, which it does only when it is stopped or its task died.
    pub async fn ended(&mut self) {
        if let Some(task) = &mut self.task {
            let _ = task.await;
            self.task = None;
        }
    }
}

impl Drop for CniServer {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Binds beside the path and renames onto it, so that the socket is never there with other permissions, nor missing while a
/// successor takes over.
fn listen(socket: &Path) -> Result<UnixListener, CniServerError> {
    let failed = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| CniServerError::Socket { operation, path, source }
    };
    if let Some(dir) = socket.parent() {
        std::fs::create_dir_all(dir).map_err(failed("make", dir))?;
    }
    let fresh = socket.with_extension("new");
    match std::fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed("remove", &fresh)(error)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(failed("bind", &fresh))?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed("protect", &fresh))?;
    std::fs::rename(&fresh, socket).map_err(failed("rename onto", socket))?;
    Ok(listener)
}

async fn serve<I: PodIndex, P: PodPlumber>(
    listener: UnixListener,
    operations: Arc<Operations<I, P>>,
    sweep_every: Duration,
    stop: CancellationToken,
) {
    let mut requests = JoinSet::new();
    let slots = Arc::new(Semaphore::new(CONCURRENT));
    let mut sweeps = tokio::time::interval(sweep_every);
    sweeps.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut sweep: JoinSet<()> = JoinSet::new();
    loop {
        tokio::select! {
            () = stop.cancelled() => break,
            _ = sweeps.tick(), if sweep.is_empty() => {
                let operations = operations.clone();
                sweep.spawn(async move { operations.sweep().await });
            }
            Some(_) = sweep.join_next() => {}
            Some(_) = requests.join_next() => {}
            accepted = accept(&listener, &slots) => match accepted {
                Ok((stream, slot)) => {
                    let operations = operations.clone();
                    requests.spawn(async move {
                        connection::serve(stream, operations).await;
                        drop(slot);
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a CNI request");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            },
        }
    }
    drop(listener);
    while requests.join_next().await.is_some() {}
}

async fn accept(
    listener: &UnixListener,
    slots: &Arc<Semaphore>,
) -> io::Result<(tokio::net::UnixStream, tokio::sync::OwnedSemaphorePermit)> {
    let slot = slots.clone().acquire_owned().await.map_err(io::Error::other)?;
    Ok((listener.accept().await?.0, slot))
}
