//! The server of a probe pod: who I am, whom I see, bytes there and bytes back, over HTTP and UDP on one port number.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use super::{Served, answered, byte_at, http, pattern_from};

/// How long one connection may last.
const CONNECTION: Duration = Duration::from_secs(60);
/// The most that is sent on request, in bytes.
const MOST: u64 = 256 * 1024 * 1024;
/// Bytes that are written at once.
const CHUNK: usize = 64 * 1024;
/// Connections at a time; who comes on top waits in the kernel's queue. Everybody who reaches the node may ask.
const AT_ONCE: usize = 64;

/// Options of `towpath probe serve`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// TCP and UDP port.
    #[arg(long, default_value_t = 8080)]
    port: u16,
    /// Ends after so many seconds.
    #[arg(long, default_value_t = 1800)]
    seconds: u64,
}

/// Who answers.
#[derive(Debug)]
struct Identity {
    pod: String,
    node: String,
}

impl Identity {
    fn of_environment() -> Self {
        let variable = |name: &str| std::env::var(name).unwrap_or_default();
        Self { pod: variable("POD_NAME"), node: variable("NODE_NAME") }
    }

    fn says(&self, client: SocketAddr, bytes: u64) -> String {
        let served = Served {
            pod: self.pod.clone(),
            node: self.node.clone(),
            // A dual-stack socket shows IPv4 clients as mapped addresses.
            client: Some(client.ip().to_canonical()),
            bytes,
        };
        serde_json::to_string(&served).unwrap_or_default()
    }
}

/// Both families, or the one that this machine has.
const ANY: [IpAddr; 2] = [IpAddr::V6(Ipv6Addr::UNSPECIFIED), IpAddr::V4(Ipv4Addr::UNSPECIFIED)];

/// Serves until its time is over or SIGTERM.
pub(super) async fn run(options: &Options) -> Result<()> {
    let me = Arc::new(Identity::of_environment());
    let port = options.port;
    let [both, v4] = ANY;
    let tcp = match TcpListener::bind((both, port)).await {
        Ok(listener) => listener,
        Err(_) => {
            TcpListener::bind((v4, port)).await.with_context(|| format!("could not listen on TCP port {port}"))?
        }
    };
    let udp = match UdpSocket::bind((both, port)).await {
        Ok(socket) => socket,
        Err(_) => UdpSocket::bind((v4, port)).await.with_context(|| format!("could not listen on UDP port {port}"))?,
    };
    crate::print(&format!("answering on TCP and UDP port {port} for {} s", options.seconds))?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut servers = JoinSet::new();
    servers.spawn(serve_tcp(tcp, me.clone()));
    servers.spawn(serve_udp(udp, me));
    tokio::select! {
        _ = terminate.recv() => {}
        () = tokio::time::sleep(Duration::from_secs(options.seconds)) => {}
    }
    Ok(())
}

async fn serve_tcp(listener: TcpListener, me: Arc<Identity>) {
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        if connections.len() >= AT_ONCE {
            connections.join_next().await;
            continue;
        }
        let Ok((stream, client)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let me = me.clone();
        connections.spawn(async move {
            match tokio::time::timeout(CONNECTION, answer(stream, client, &me)).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => eprintln!("{client}: {error}"),
                Err(_) => eprintln!("{client}: not done within {CONNECTION:?}"),
            }
        });
    }
}

async fn answer(stream: TcpStream, client: SocketAddr, me: &Identity) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let mut request = http::read(stream).await?;
    let mut words = request.line.split(' ');
    let (method, path) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let wanted = path.strip_prefix("/bytes/").and_then(|n| n.parse::<u64>().ok()).filter(|n| *n <= MOST);
    let (status, body) = match (method, path, wanted) {
        ("GET", "/", _) => ("200 OK", me.says(client, 0).into_bytes()),
        ("GET", "/healthz", _) => ("200 OK", b"ok\n".to_vec()),
        ("GET", _, Some(length)) => return send_pattern(&mut request.rest, length).await,
        ("POST", "/bytes", _) => {
            let length = request.length.unwrap_or_default();
            let bytes = http::compare(&mut request.rest, length).await?;
            ("200 OK", me.says(client, bytes).into_bytes())
        }
        _ => ("404 Not Found", b"not here\n".to_vec()),
    };
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
    request.rest.write_all(head.as_bytes()).await?;
    request.rest.write_all(&body).await?;
    request.rest.shutdown().await
}

/// A body of that length, a chunk in memory at a time.
async fn send_pattern(to: &mut (impl AsyncWriteExt + Unpin), length: u64) -> std::io::Result<()> {
    let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    to.write_all(head.as_bytes()).await?;
    let mut sent: u64 = 0;
    while sent < length {
        let size = CHUNK.min(usize::try_from(length - sent).unwrap_or(CHUNK));
        to.write_all(&pattern_from(usize::try_from(sent).unwrap_or_default(), size)).await?;
        sent += size as u64;
    }
    to.shutdown().await
}

async fn serve_udp(socket: UdpSocket, me: Arc<Identity>) {
    let mut buffer = vec![0; 65536];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let Some(datagram) = buffer.get(..length) else { continue };
        let sent = match datagram {
            b"whoami" => socket.send_to(me.says(client, length as u64).as_bytes(), client).await,
            question if question.first() == Some(&byte_at(0)) => socket.send_to(&answered(question), client).await,
            // An answer is no question: two servers whose addresses somebody forged do not talk for ever.
            _ => continue,
        };
        if let Err(error) = sent {
            eprintln!("{client}: {error}");
        }
    }
}

/// Options as the tests beside this module give them.
#[cfg(test)]
pub(super) fn options_for_tests(port: u16) -> Options {
    Options { port, seconds: 60 }
}
