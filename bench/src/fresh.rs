//! How long a new pod's address takes to be known: a container is added as a runtime does it, and asks isolated servers on other
//! nodes from the moment ADD is answered until each has let it in.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::cni::{Container, Plugin};

/// A question that was dropped is asked again after this: the resolution of the figure.
const AGAIN: Duration = Duration::from_millis(1);
/// How long a server may keep a pod out before that is a failure.
const LIMIT: Duration = Duration::from_secs(10);

/// Containers to add, one after the other.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// The plugin.
    pub(crate) plugin: Plugin,
    /// Its configuration.
    pub(crate) config: Value,
    /// `CNI_ARGS` of each container: whose sandbox it is.
    pub(crate) pods: Vec<String>,
    /// UDP servers that echo.
    pub(crate) servers: Vec<SocketAddr>,
}

/// Runs it: milliseconds until the last server let each container in.
///
/// # Errors
/// The plugin failed, or a server did not let a container in.
pub(crate) fn block(request: Request) -> Result<Vec<f64>> {
    let mut times = Vec::with_capacity(request.pods.len());
    for (number, args) in request.pods.iter().enumerate() {
        let container = Container::new(number)?;
        request.plugin.call(&container, "ADD", &request.config, args)?;
        let answered = Instant::now();
        let servers = &request.servers;
        let until = std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                setns(container.netns(), CloneFlags::CLONE_NEWNET).context("enter the container's network")?;
                let_in(servers)
            });
            inside.join().unwrap_or_else(|_| bail!("the thread in the container died"))
        })
        .with_context(|| format!("container {number} ({args})"))?;
        times.push(until.saturating_duration_since(answered).as_secs_f64() * 1000.0);
        request.plugin.call(&container, "DEL", &request.config, args)?;
    }
    Ok(times)
}

/// Asks every server until each has answered; when the last did.
fn let_in(servers: &[SocketAddr]) -> Result<Instant> {
    let begun = Instant::now();
    let mut waiting = Vec::new();
    for server in servers {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a UDP socket")?;
        socket.connect(server).with_context(|| format!("connect to {server}"))?;
        socket.set_read_timeout(Some(AGAIN))?;
        waiting.push((server, socket));
    }
    while begun.elapsed() < LIMIT {
        for (_, socket) in &waiting {
            // Refused by an ICMP error is dropped, too.
            let _ = socket.send(b"?");
        }
        let mut error = None;
        waiting.retain(|(_, socket)| match socket.recv(&mut [0; 8]) {
            Ok(_) => false,
            Err(e)
                if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::ConnectionRefused) =>
            {
                true
            }
            Err(e) => {
                error = Some(e);
                true
            }
        });
        if let Some(error) = error {
            return Err(error).context("read an answer");
        }
        if waiting.is_empty() {
            return Ok(Instant::now());
        }
    }
    bail!(
        "{:?} did not let it in within {} s",
        waiting.iter().map(|(server, _)| server).collect::<Vec<_>>(),
        LIMIT.as_secs()
    )
}
