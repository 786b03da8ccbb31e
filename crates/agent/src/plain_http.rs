//! As much of HTTP/1.1 as scrapers and health checkers need: a request line in, one answer out, the connection closed.

use std::collections::VecDeque;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{self, AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::task::AbortOnDropHandle;

/// A request that takes longer is given up.
const PATIENCE: Duration = Duration::from_secs(5);
/// Connections that are served at once.
const AT_ONCE: usize = 64;
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
    asynchronous(match bind(Ipv6Addr::UNSPECIFIED.into()) {
        Err(error) if error.kind() != std::io::ErrorKind::AddrInUse => bind(Ipv4Addr::UNSPECIFIED.into())?,
        bound => bound?,
    })
}

/// Listens on a port of one address.
pub(crate) fn listen_at(at: SocketAddr) -> std::io::Result<TcpListener> {
    asynchronous(std::net::TcpListener::bind(at)?)
}

fn asynchronous(socket: std::net::TcpListener) -> std::io::Result<TcpListener> {
    socket.set_nonblocking(true)?;
    TcpListener::from_std(socket)
}

/// Answers every request on a listener, by its path, for ever. Who connects and says nothing is given up after [`PATIENCE`], and
/// before that when [`AT_ONCE`] others have come after him: nobody keeps others from being answered.
pub(crate) async fn serve<F>(listener: TcpListener, answer: impl Fn(String) -> F + Clone + Send + 'static)
where
    F: Future<Output = Answer> + Send + 'static,
{
    let mut open: VecDeque<AbortOnDropHandle<()>> = VecDeque::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        open.retain(|connection| !connection.is_finished());
        if open.len() >= AT_ONCE {
            drop(open.pop_front());
        }
        let answer = answer.clone();
        open.push_back(AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = tokio::time::timeout(PATIENCE, one(stream, answer)).await;
        })));
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn ask(port: u16) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", port)).await.unwrap();
        stream.write_all(b"GET /x HTTP/1.1\r\n\r\n").await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    }

    #[tokio::test]
    async fn who_says_nothing_keeps_nobody_waiting_and_many_of_them_neither() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let _serving =
            AbortOnDropHandle::new(tokio::spawn(serve(listener, |path| async move { Answer::text(Answer::OK, path) })));
        let mut silent = Vec::new();
        for _ in 0..AT_ONCE + 8 {
            silent.push(TcpStream::connect(("127.0.0.1", port)).await.unwrap());
        }
        let answered = tokio::time::timeout(PATIENCE / 2, ask(port)).await;
        assert!(answered.unwrap().ends_with("/x"), "while {} say nothing", silent.len());
    }
}
