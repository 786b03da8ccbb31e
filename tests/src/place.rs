//! Sockets of the test itself, opened where a pod or a node stands: what hundreds of connections at once need.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::cluster::{Cluster, Pod};
use crate::machine;

/// The network namespace of a pod or a node.
#[derive(Debug)]
pub struct Place {
    name: String,
    netns: File,
}

impl Place {
    /// Where a running pod stands.
    ///
    /// # Errors
    /// It has no process.
    pub fn of_pod(cluster: &Cluster, pod: &Pod) -> Result<Self> {
        let cgroup = machine::lab_cgroup(cluster.name())?.join("nodes").join(&pod.node).join("pods").join(&pod.uid);
        let pid = machine::processes_below(&cgroup);
        let pid = pid.first().with_context(|| format!("pod {} has no process in {}", pod.name, cgroup.display()))?;
        let path = format!("/proc/{pid}/ns/net");
        let netns = File::open(&path).with_context(|| path.clone())?;
        Ok(Self { name: pod.name.clone(), netns })
    }

    /// Where a node stands.
    ///
    /// # Errors
    /// The lab has no such node.
    pub fn of_node(cluster: &Cluster, node: &str) -> Result<Self> {
        let path = Path::new("/run/netns").join(format!("tp-{}-{node}", cluster.name()));
        let netns = File::open(&path).with_context(|| path.display().to_string())?;
        Ok(Self { name: node.to_owned(), netns })
    }

    /// A network namespace by its path.
    ///
    /// # Errors
    /// It cannot be opened.
    pub fn of_netns(name: &str, path: &Path) -> Result<Self> {
        let netns = File::open(path).with_context(|| path.display().to_string())?;
        Ok(Self { name: name.to_owned(), netns })
    }

    /// Whose place it is.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Does `work` in a thread that stands there; its sockets stay there.
    ///
    /// # Errors
    /// The namespace cannot be entered, or what `work` says.
    pub fn enter<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                nix::sched::setns(&self.netns, nix::sched::CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("enter the network namespace of {}", self.name))?;
                work()
            });
            inside.join().map_err(|_| anyhow!("the thread in {} panicked", self.name))?
        })
    }
}

/// An HTTP connection that stays open.
#[derive(Debug)]
pub struct Session(TcpStream);

impl Session {
    /// Connects from where the calling thread stands.
    ///
    /// # Errors
    /// Refused, or nothing within `limit`.
    pub fn open(to: SocketAddr, limit: Duration) -> Result<Self> {
        let stream = TcpStream::connect_timeout(&to, limit).with_context(|| format!("connect to {to}"))?;
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// As [`Session::open`] from a port of one's own choice, which other connections from there may have to other addresses.
    ///
    /// # Errors
    /// As [`Session::open`], or the port is another's.
    pub fn open_from(port: u16, to: SocketAddr, limit: Duration) -> Result<Self> {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrStorage, bind, connect, setsockopt, socket, sockopt,
        };
        let (family, any) = match to {
            SocketAddr::V4(_) => (AddressFamily::Inet, SocketAddr::from(([0, 0, 0, 0], port))),
            SocketAddr::V6(_) => (AddressFamily::Inet6, SocketAddr::from(([0_u16; 8], port))),
        };
        let socket = socket(family, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        setsockopt(&socket, sockopt::ReuseAddr, &true)?;
        // It ends with a reset: else whoever closes first keeps the port for a minute (TIME_WAIT).
        setsockopt(&socket, sockopt::Linger, &nix::libc::linger { l_onoff: 1, l_linger: 0 })?;
        setsockopt(&socket, sockopt::SendTimeout, &TimeVal::milliseconds(limit.as_millis().try_into()?))?;
        bind(socket.as_raw_fd(), &SockaddrStorage::from(any)).with_context(|| format!("take port {port}"))?;
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to))
            .with_context(|| format!("connect to {to} from port {port}"))?;
        let stream = TcpStream::from(socket);
        stream.set_nodelay(true)?;
        Ok(Self(stream))
    }

    /// Whom it believes to talk to.
    ///
    /// # Errors
    /// It is not connected any more.
    pub fn peer(&self) -> Result<SocketAddr> {
        Ok(self.0.peer_addr()?)
    }

    /// One request and its answer over the open connection.
    ///
    /// # Errors
    /// The connection broke, or nothing within `limit`.
    pub fn ask(&mut self, limit: Duration) -> Result<String> {
        self.0.set_read_timeout(Some(limit))?;
        self.0.set_write_timeout(Some(limit))?;
        self.0.write_all(b"GET /hostname HTTP/1.1\r\nHost: test\r\n\r\n").context("send a request")?;
        let mut answer = Vec::new();
        let mut piece = [0_u8; 2048];
        loop {
            let count = self.0.read(&mut piece).context("read the answer")?;
            if count == 0 {
                bail!("the server closed the connection");
            }
            answer.extend_from_slice(piece.get(..count).unwrap_or_default());
            let text = String::from_utf8_lossy(&answer);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let length = head.lines().filter_map(|l| l.split_once(": "));
                let mut length = length.filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                let length: usize = length.next().and_then(|(_, n)| n.trim().parse().ok()).context("no length")?;
                if body.len() >= length {
                    return Ok(body.to_owned());
                }
            }
        }
    }
}

/// An address from a pod's status.
///
/// # Errors
/// It is none.
pub fn address(text: &str) -> Result<IpAddr> {
    text.parse().with_context(|| format!("{text:?} is no address"))
}
