//! UDP clients that keep their socket for ever, as resolvers and senders of metrics do, and servers that remember who asked them when.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::machine;
use crate::place::Place;

/// Between two datagrams of a client.
const PACE: Duration = Duration::from_millis(10);

/// When each client was last heard.
type Heard = BTreeMap<String, Instant>;

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A server in a pod; it answers what it hears. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    heard: Arc<Mutex<Heard>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Listens in a place.
    ///
    /// # Errors
    /// The address cannot be listened on there.
    pub fn at(place: &Place, at: SocketAddr) -> Result<Self> {
        let socket = place.enter(|| UdpSocket::bind(at).with_context(|| format!("listen on {at}")))?;
        socket.set_read_timeout(Some(PACE))?;
        let (heard, over) = (Arc::<Mutex<Heard>>::default(), Arc::<AtomicBool>::default());
        let (noted, ended) = (heard.clone(), over.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; 256];
            while !ended.load(Ordering::Relaxed) {
                let Ok((count, from)) = socket.recv_from(&mut buffer) else { continue };
                let name = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
                locked(&noted).insert(name, Instant::now());
                let _who_asks_may_be_gone = socket.send_to(b"heard", from);
            }
        });
        Ok(Self { heard, over, thread: Some(thread) })
    }

    /// When it last heard of a client.
    pub fn heard(&self, client: &str) -> Option<Instant> {
        locked(&self.heard).get(client).copied()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// A client that sends its name every 10 ms over one socket, connects it again when it fails, and knows nothing else. Dropping it ends it.
#[derive(Debug)]
pub struct Client {
    /// Its name.
    pub name: String,
    to: Arc<Mutex<SocketAddr>>,
    over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Client {
    /// Begins to send from a place. `connects`: over a connected socket; else each datagram is sent to the address by itself.
    ///
    /// # Errors
    /// The place cannot be entered.
    pub fn start(place: &Place, name: &str, to: SocketAddr, connects: bool) -> Result<Self> {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let socket = place.enter(|| Ok(UdpSocket::bind((any, 0))?))?;
        socket.set_nonblocking(true)?;
        let (to, over) = (Arc::new(Mutex::new(to)), Arc::<AtomicBool>::default());
        let (aim, ended, says) = (to.clone(), over.clone(), name.to_owned());
        let run = move || {
            let mut buffer = [0; 64];
            let mut connected: Option<SocketAddr> = None;
            while !ended.load(Ordering::Relaxed) {
                let to = *locked(&aim);
                let sent = if !connects {
                    socket.send_to(says.as_bytes(), to)
                } else if connected == Some(to) {
                    socket.send(says.as_bytes())
                } else {
                    connected = socket.connect(to).is_ok().then_some(to);
                    std::thread::sleep(PACE);
                    continue;
                };
                let failed = sent.is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
                let refused = socket.recv(&mut buffer).is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
                if failed || refused {
                    connected = None;
                }
                std::thread::sleep(PACE);
            }
        };
        // A socket belongs to where it was made; its thread may stand anywhere.
        let thread = std::thread::spawn(run);
        Ok(Self { name: name.to_owned(), to, over, thread: Some(thread) })
    }

    /// Sends to another address from now on, over the same socket.
    pub fn aim(&self, to: SocketAddr) {
        *locked(&self.to) = to;
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        let _ended = self.thread.take().map(JoinHandle::join);
    }
}

/// This process in the cgroup of a lab's node, where its socket hooks are; dropping it goes back.
#[derive(Debug)]
pub struct Joined {
    directory: PathBuf,
    home: PathBuf,
}

impl Joined {
    /// Enters.
    ///
    /// # Errors
    /// The cgroup cannot be made or entered.
    pub fn node(cluster: &Cluster, node: &str) -> Result<Self> {
        let own = std::fs::read_to_string("/proc/self/cgroup").context("/proc/self/cgroup")?;
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).unwrap_or_default();
        let home = machine::cgroup2()?.join(own);
        let nodes = machine::lab_cgroup(cluster.name())?.join("nodes").join(node);
        let directory = nodes.join(format!("test-{}", std::process::id()));
        std::fs::create_dir(&directory).with_context(|| format!("make {}", directory.display()))?;
        let joined = Self { directory, home };
        std::fs::write(joined.directory.join("cgroup.procs"), "0").context("enter the node's cgroup")?;
        Ok(joined)
    }
}

impl Drop for Joined {
    fn drop(&mut self) {
        let _back = std::fs::write(self.home.join("cgroup.procs"), "0");
        let _gone = std::fs::remove_dir(&self.directory);
    }
}
