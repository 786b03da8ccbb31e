//! What answers queries and carries packets in user space: the DNS server, and the backend `udp`.
//!
//! Fed by the agent over a unix socket, it answers for the cluster from memory and asks the node's resolvers for everything
//! else. It keeps its last state on disk, so that answers go on while the agent, or this process, restarts. A second process on
//! the node takes over from the first without losing a query (`handover`).
//!
//! ```text
//! agent ─► feed socket ─► cluster (zone) ◄─ server (UDP, TCP) ◄─ pods
//!                             │                    │
//!                     store (disk), rules          forward (cache, upstreams) ─► the node's resolvers, stub zones' servers
//! agent ◄─ feed socket ◄─ names ◄──────────────────┘ answers for names that policies ask for, before they leave
//!
//! agent ─► udp socket ─► queues of a device, UDP sockets ─► udp (two threads a queue) ◄─► other nodes
//! ```
#![forbid(unsafe_code)]

mod cache;
mod cluster;
mod counters;
mod descriptors;
pub mod feed;
mod forward;
mod handover;
mod message;
mod names;
mod own_socket;
mod resolv;
mod responder;
mod rules;
mod server;
mod shares;
mod store;
pub mod udp;
mod upstream;

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use towpath_wire::config::CarryConfig;

use cluster::Cluster;
use forward::Forwarder;
use responder::Responder;

/// The port that DNS is served on.
pub const DNS_PORT: u16 = 53;

/// How long queries under way may take to be finished at the end: what asking upstream takes at most.
const FINISH_WITHIN: Duration = upstream::TOTAL;

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
    /// Another process answers on this node and keeps what it answers with.
    #[error("the process that answers DNS on this node did not hand over: {0}; it answers on. If it hangs, end it")]
    HandOver(String),
    /// A task that must not end did.
    #[error("an essential task ended: {0}")]
    TaskEnded(String),
}

/// Runs the DNS server until `shutdown`, on port [`DNS_PORT`] of the configured addresses.
///
/// Addresses that are not there yet are waited for; the agent adds them. A process that answers already is asked to hand over; this
/// one hands over when it is asked.
///
/// # Errors
/// A socket or a directory cannot be made, a process that answers does not hand over, or an essential task died.
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
    let mut tasks = Tasks::new();
    let mut server = Server::new(config, port, &mut tasks, &shutdown);
    loop {
        let Some(mut successor) = server.serve(&mut tasks, &shutdown).await? else { return Ok(()) };
        tracing::info!("another process answers DNS on this node now; this one waits, in case that one dies");
        tokio::select! {
            () = shutdown.cancelled() => return Ok(()),
            () = successor.is_over() => tracing::warn!("the process that answered DNS instead is gone: answering again"),
        }
    }
}

/// Tasks by what they do. They end with the set, and that one of them ended is noticed.
type Tasks = JoinSet<&'static str>;

/// What lasts as long as the process, whether or not it is the one that answers.
struct Server {
    config: CarryConfig,
    own: Vec<SocketAddr>,
    cluster: Arc<Cluster>,
    responder: Arc<Responder>,
    sockets: Arc<server::Sockets>,
    carrier: Arc<udp::Carrier>,
    /// Held as long as the process lives, whoever answers: their end tells those that still wait to answer again.
    predecessors: Vec<handover::Duty>,
}

impl Server {
    fn new(config: CarryConfig, port: u16, tasks: &mut Tasks, shutdown: &CancellationToken) -> Self {
        let own: Vec<SocketAddr> = config.dns_addresses.iter().map(|a| SocketAddr::new(*a, port)).collect();
        let cluster = Arc::new(Cluster::new(config.dns_addresses.clone()));
        let upstreams = Arc::new(upstream::Upstreams::new(Vec::new()));
        if config.upstreams.is_empty() {
            upstreams.set(resolv::read(&config.resolv_conf, &own));
            let follow = resolv::follow(config.resolv_conf.clone(), own.clone(), upstreams.clone(), shutdown.clone());
            tasks.spawn(async move {
                follow.await;
                "watching resolv.conf"
            });
        } else {
            upstreams.set(resolv::without_own(config.upstreams.clone(), &own));
        }
        let responder = Arc::new(Responder::new(Arc::clone(&cluster), Forwarder::new(Arc::clone(&cluster), upstreams)));
        Self {
            config,
            own,
            cluster,
            responder,
            sockets: Arc::default(),
            carrier: Arc::default(),
            predecessors: Vec::new(),
        }
    }

    fn state_file(&self) -> PathBuf {
        self.config.state_dir.join(store::FILE)
    }

    /// Answers until shutdown, or until another process has taken over, which is returned. Whoever answers at the start is
    /// asked for its sockets and state.
    async fn serve(
        &mut self,
        tasks: &mut Tasks,
        shutdown: &CancellationToken,
    ) -> Result<Option<handover::Duty>, CarryError> {
        let mut predecessor = handover::ask(&self.config.handover_socket()).await?;
        match &mut predecessor {
            Some(predecessor) => {
                tracing::info!("taking over from the process that answers DNS on this node");
                self.sockets.adopt(std::mem::take(&mut predecessor.sockets), &self.own);
                predecessor.udp.take().into_iter().for_each(|share| self.carrier.take(share));
                predecessor.state.take().into_iter().for_each(|state| self.cluster.restore(state));
            }
            None => store::load(&self.state_file()).into_iter().for_each(|state| self.cluster.restore(state)),
        }
        let term = server::Term::default();
        let _ends = term.over.clone().drop_guard();
        let mut servers = self.servers(&term);
        let mut desk = self.open_desk()?;
        let successors = own_socket::bind(&self.config.handover_socket())?;
        if let Some(predecessor) = predecessor {
            self.predecessors.push(predecessor.taken().await?);
        }
        let successor = loop {
            let candidate = tokio::select! {
                () = shutdown.cancelled() => break None,
                ended = ended(tasks) => return Err(ended),
                ended = ended(&mut servers) => return Err(ended),
                ended = ended(&mut desk.tasks) => return Err(ended),
                connected = successors.accept() => connected,
            };
            match candidate {
                Ok((stream, _)) if own_socket::is_trusted(&stream, "handover") => {
                    desk.close().await;
                    match self.hand_over(stream).await {
                        Ok(successor) => break Some(successor),
                        Err(error) => tracing::warn!(%error, "a process that was to take over did not: answering on"),
                    }
                    desk = self.open_desk()?;
                }
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(%error, "handover socket: accept failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        term.over.cancel();
        // Who took over carries already: what is in hand here is finished.
        self.carrier.stop();
        desk.close().await;
        term.under_way.close();
        if timeout(FINISH_WITHIN, term.under_way.wait()).await.is_err() {
            tracing::warn!(queries = term.under_way.len(), "queries under way were given up");
        }
        Ok(successor)
    }

    /// All sockets or none: one that stayed would go on getting queries, which nobody reads.
    async fn hand_over(&self, to: UnixStream) -> Result<handover::Duty, feed::FeedError> {
        let sockets = self.sockets.all().map_err(feed::FeedError::Io)?;
        handover::offer(to, sockets, self.cluster.state(), self.carrier.share()).await
    }

    fn servers(&self, term: &server::Term) -> Tasks {
        let mut tasks = Tasks::new();
        for address in &self.own {
            let with = || (*address, Arc::clone(&self.sockets), Arc::clone(&self.responder), term.clone());
            let ((address, sockets, responder, of), tcp) = (with(), with());
            tasks.spawn(async move {
                server::udp::serve(address, sockets, responder, of).await;
                "DNS over UDP"
            });
            let (address, sockets, responder, of) = tcp;
            tasks.spawn(async move {
                server::tcp::serve(address, sockets, responder, of).await;
                "DNS over TCP"
            });
        }
        tasks
    }

    /// Lets the agent feed this process, and saves what it says.
    fn open_desk(&self) -> Result<Desk, CarryError> {
        let listener = own_socket::bind(&self.config.feed_socket())?;
        let (mut tasks, closing) = (Tasks::new(), CancellationToken::new());
        let feed = feed::server::serve(listener, Arc::clone(&self.responder), closing.clone());
        tasks.spawn(async move {
            feed.await;
            "the feed socket"
        });
        let listener = own_socket::bind(&self.config.udp_socket())?;
        let udp = udp::desk::serve(listener, Arc::clone(&self.carrier), closing.clone());
        tasks.spawn(async move {
            udp.await;
            "the socket of the backend udp"
        });
        let saving = store::keep(self.state_file(), Arc::clone(&self.cluster), closing.clone());
        tasks.spawn(async move {
            saving.await;
            "saving state"
        });
        Ok(Desk { tasks, closing })
    }
}

/// What changes the state, and keeps it.
struct Desk {
    tasks: Tasks,
    closing: CancellationToken,
}

impl Desk {
    /// From here on the state is what it is, and on disk.
    async fn close(&mut self) {
        self.closing.cancel();
        while self.tasks.join_next().await.is_some() {}
    }
}

/// Waits for a task to end, which none should; for ever where there is none.
async fn ended(tasks: &mut Tasks) -> CarryError {
    match tasks.join_next().await {
        Some(Ok(name)) => CarryError::TaskEnded(name.to_owned()),
        Some(Err(error)) => CarryError::TaskEnded(error.to_string()),
        None => std::future::pending().await,
    }
}

/// Sockets are what this process is made of: as many as the hard limit allows.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files stays as it is");
    }
}

/// Whether an upstream is one of the addresses answered on here, which would be asking oneself.
fn is_own(upstream: IpAddr, own: &[SocketAddr]) -> bool {
    own.iter().any(|a| a.ip() == upstream)
}
