//! What answers queries in user space: the DNS server.
//!
//! Fed by the agent over a unix socket, it answers for the cluster from memory and asks the node's resolvers for everything
//! else. It keeps its last state on disk, so that answers go on while the agent, or this process, restarts.
//!
//! ```text
//! agent ─► feed socket ─► cluster (zone) ◄─ server (UDP, TCP) ◄─ pods
//!                             │                    │
//!                     store (disk), rules          forward (cache, upstreams) ─► the node's resolvers, stub zones' servers
//! ```
#![forbid(unsafe_code)]

mod cache;
mod cluster;
mod counters;
pub mod feed;
mod forward;
mod message;
mod resolv;
mod responder;
mod rules;
mod server;
mod store;
mod upstream;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;

use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_wire::config::CarryConfig;

use cluster::Cluster;
use forward::Forwarder;
use responder::Responder;

/// The port that DNS is served on.
pub const DNS_PORT: u16 = 53;

/// Why this process cannot run.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// The feed socket could not be made.
    #[error("cannot listen on feed socket {path}: {source}; it must be in a directory that root can write")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A directory could not be made.
    #[error("cannot make directory {path}: {source}")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// There is nothing to do.
    #[error("no dnsAddresses are configured: give the addresses to answer on, as in the agent's configuration")]
    NoAddresses,
    /// A task that must not end did.
    #[error("an essential task ended: {0}")]
    TaskEnded(String),
}

/// Runs the DNS server until `shutdown`, on port [`DNS_PORT`] of the configured addresses.
///
/// Addresses that are not there yet are waited for; the agent adds them.
///
/// # Errors
/// The feed socket or a directory cannot be made, or an essential task died.
pub async fn run(config: CarryConfig, shutdown: CancellationToken) -> Result<(), CarryError> {
    run_on(config, DNS_PORT, shutdown).await
}

/// As [`run`], on another port: for tests and for looking at it beside another server.
///
/// # Errors
/// As [`run`].
pub async fn run_on(config: CarryConfig, port: u16, shutdown: CancellationToken) -> Result<(), CarryError> {
    if config.dns_addresses.is_empty() {
        return Err(CarryError::NoAddresses);
    }
    for path in [&config.run_dir, &config.state_dir] {
        std::fs::create_dir_all(path).map_err(|source| CarryError::Directory { path: path.clone(), source })?;
    }
    raise_file_limit();
    let cluster = Arc::new(Cluster::new(config.dns_addresses.clone()));
    let state_file = config.state_dir.join(store::FILE);
    if let Some(snapshot) = store::load(&state_file) {
        cluster.restore(snapshot);
    }
    let listener = feed::server::bind(&config.run_dir.join("carry.sock"))?;
    // Every task belongs to this set: it ends with it, and its end is noticed.
    let mut tasks: JoinSet<&'static str> = JoinSet::new();
    let own: Vec<SocketAddr> = config.dns_addresses.iter().map(|a| SocketAddr::new(*a, port)).collect();
    let upstreams = Arc::new(upstream::Upstreams::new(Vec::new()));
    if config.upstreams.is_empty() {
        upstreams.set(resolv::read(&config.resolv_conf, &own));
        let (path, upstreams, own, stop) =
            (config.resolv_conf.clone(), upstreams.clone(), own.clone(), shutdown.clone());
        tasks.spawn(async move {
            resolv::follow(path, own, upstreams, stop).await;
            "watching resolv.conf"
        });
    } else {
        upstreams.set(resolv::without_own(config.upstreams.clone(), &own));
    }
    let responder = Arc::new(Responder::new(Arc::clone(&cluster), Forwarder::new(Arc::clone(&cluster), upstreams)));
    let stop = shutdown.clone();
    let fed = Arc::clone(&cluster);
    tasks.spawn(async move {
        feed::server::serve(listener, fed, stop).await;
        "the feed socket"
    });
    let (stop, saved) = (shutdown.clone(), Arc::clone(&cluster));
    tasks.spawn(async move {
        store::keep(state_file, saved, stop).await;
        "saving state"
    });
    for address in own {
        let (udp, tcp) = (Arc::clone(&responder), Arc::clone(&responder));
        let (stop_udp, stop_tcp) = (shutdown.clone(), shutdown.clone());
        tasks.spawn(async move {
            server::udp::serve(address, udp, stop_udp).await;
            "DNS over UDP"
        });
        tasks.spawn(async move {
            server::tcp::serve(address, tcp, stop_tcp).await;
            "DNS over TCP"
        });
    }
    supervise(tasks, shutdown).await
}

/// Sockets are what this process is made of: as many as the hard limit allows.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Waits for shutdown; a task that ends before it ends the process, which its supervisor starts again.
async fn supervise(mut tasks: JoinSet<&'static str>, shutdown: CancellationToken) -> Result<(), CarryError> {
    while let Some(ended) = tasks.join_next().await {
        if shutdown.is_cancelled() {
            continue;
        }
        return Err(CarryError::TaskEnded(match ended {
            Ok(name) => name.to_owned(),
            Err(error) => error.to_string(),
        }));
    }
    Ok(())
}

/// Whether an upstream is one of the addresses answered on here, which would be asking oneself.
fn is_own(upstream: IpAddr, own: &[SocketAddr]) -> bool {
    own.iter().any(|a| a.ip() == upstream)
}
