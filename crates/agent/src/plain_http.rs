//! As much of HTTP/1.1 as scrapers and health checkers need: a request line in, one answer out, the connection closed.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{self, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

/// A request that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// A request line is short; what is longer is nobody's scraper.
const LONGEST: u64 = 1024;

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Code and reason.
    pub(crate) status: &'static str,
    /// `Content-Type`.
    pub(crate) content_type: &'static str,
    /// More header lines, each with its end of line.
    pub(crate) headers: String,
    /// The body.
    pub(crate) body: String,
}

impl Answer {
    pub(crate) const OK: &'static str = "200 OK";
    pub(crate) const UNAVAILABLE: &'static str = "503 Service Unavailable";

    pub(crate) fn text(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, content_type: "text/plain; version=0.0.4", headers: String::new(), body: body.into() }
    }

    pub(crate) fn json(status: &'static str, body: &serde_json::Value) -> Self {
        Self { status, content_type: "application/json", headers: String::new(), body: body.to_string() }
    }

    pub(crate) fn not_found() -> Self {
        Self::text("404 Not Found", "not found\n")
    }
}

/// Listens on a port of every address of the node, in both families where the node has both.
pub(crate) fn listen_everywhere(port: u16) -> std::io::Result<TcpListener> {
    let bind = |ip: IpAddr| std::net::TcpListener::bind(SocketAddr::new(ip, port));
    let socket = match bind(Ipv6Addr::UNSPECIFIED.into()) {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => bind(Ipv4Addr::UNSPECIFIED.into())?,
        bound => bound?,
    };
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

/// Answers every request on a listener, by its path, for ever; each in turn.
pub(crate) async fn serve<F: Future<Output = Answer>>(listener: TcpListener, answer: impl Fn(String) -> F) {
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let _ = tokio::time::timeout(PATIENCE, one(stream, &answer)).await;
    }
}

async fn one<F: Future<Output = Answer>>(stream: TcpStream, answer: impl Fn(String) -> F) -> io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    (&mut stream).take(LONGEST).read_line(&mut line).await?;
    let path = line.split(' ').nth(1).unwrap_or("/").split('?').next().unwrap_or("/");
    let answer = answer(path.to_owned()).await;
    let mut head = format!("HTTP/1.1 {}\r\nContent-Type: {}\r\n", answer.status, answer.content_type);
    let _ = write!(head, "{}Content-Length: {}\r\nConnection: close\r\n\r\n", answer.headers, answer.body.len());
    let stream = stream.get_mut();
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(answer.body.as_bytes()).await?;
    stream.shutdown().await
}
