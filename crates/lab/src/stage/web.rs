//! The built-in server that stands in for web-server images.
//!
//! HTTP on each TCP port: the answer names the pod, its node and namespace and the client's address, in plain text, or as
//! JSON for clients that ask for `application/json`. `/clientip`, `/hostname` and `/healthz` answer with that alone.
//! On each UDP port datagrams are sent back unchanged, but `whoami` is answered like an HTTP request.
//!
//! Told to end, it goes on serving for [`LINGER`] while load balancers learn of it, then finishes what is under way: who has connected until then is
//! answered.

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use http::{Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;

/// How long the server accepts connections after SIGTERM: what kube-proxy-like programs need to stop sending new ones.
const LINGER: Duration = Duration::from_millis(1000);
/// How long requests under way may take after that.
const FINISH: Duration = Duration::from_secs(5);

/// What to serve and what to say.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct WebSpec {
    /// TCP ports for HTTP.
    pub(crate) http: Vec<u16>,
    /// UDP ports for the echo.
    pub(crate) udp: Vec<u16>,
    /// Fixed text to answer instead (`-text=` of http-echo).
    pub(crate) text: Option<String>,
    /// Pod name.
    pub(crate) pod: String,
    /// Namespace.
    pub(crate) namespace: String,
    /// Node name.
    pub(crate) node: String,
}

impl WebSpec {
    fn describe(&self, client: SocketAddr, local: SocketAddr) -> String {
        format!(
            "pod: {}\nnamespace: {}\nnode: {}\nclient: {}\nserver: {}\n",
            self.pod,
            self.namespace,
            self.node,
            plain(client),
            plain(local)
        )
    }

    fn describe_json(&self, client: SocketAddr, local: SocketAddr) -> String {
        let (client, local) = (plain(client), plain(local));
        format!(
            "{}\n",
            serde_json::json!({
                "pod": self.pod, "namespace": self.namespace, "node": self.node,
                "client": client.to_string(), "clientIP": client.ip().to_string(), "server": local.to_string(),
            })
        )
    }
}

/// IPv4 clients of a dual-stack socket appear as mapped addresses.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn any_addresses() -> [IpAddr; 2] {
    [Ipv6Addr::UNSPECIFIED.into(), Ipv4Addr::UNSPECIFIED.into()]
}

async fn listen_tcp(port: u16) -> Result<TcpListener> {
    let mut last = None;
    for address in any_addresses() {
        match TcpListener::bind((address, port)).await {
            Ok(listener) => return Ok(listener),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("no address family")?).with_context(|| format!("listen on TCP port {port}"))
}

async fn listen_udp(port: u16) -> Result<UdpSocket> {
    let mut last = None;
    for address in any_addresses() {
        match UdpSocket::bind((address, port)).await {
            Ok(socket) => return Ok(socket),
            Err(error) => last = Some(error),
        }
    }
    Err(last.context("no address family")?).with_context(|| format!("listen on UDP port {port}"))
}

/// Serves until SIGTERM, then ends in good order. Returns the exit code.
pub(super) async fn serve(spec: &WebSpec) -> Result<i32> {
    let mut terminate = signal(SignalKind::terminate())?;
    let spec = Arc::new(spec.clone());
    let (stop, stopping) = watch::channel(false);
    let mut listeners = JoinSet::new();
    let (alive, mut all_done) = tokio::sync::mpsc::channel::<Infallible>(1);
    for port in &spec.http {
        listeners.spawn(serve_http(listen_tcp(*port).await?, spec.clone(), stopping.clone(), alive.clone()));
    }
    for port in &spec.udp {
        listeners.spawn(serve_udp(listen_udp(*port).await?, spec.clone()));
    }
    drop(alive);
    println!("serving HTTP on TCP ports {:?}, echo on UDP ports {:?}", spec.http, spec.udp);
    terminate.recv().await;
    println!("told to end; serving for {LINGER:?} more");
    let _ = stop.send(true);
    tokio::time::sleep(LINGER).await;
    listeners.shutdown().await;
    let _ = tokio::time::timeout(FINISH, all_done.recv()).await;
    Ok(0)
}

async fn serve_http(
    listener: TcpListener,
    spec: Arc<WebSpec>,
    stopping: watch::Receiver<bool>,
    alive: tokio::sync::mpsc::Sender<Infallible>,
) {
    loop {
        let Ok((stream, client)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let _ = stream.set_nodelay(true);
        let Ok(local) = stream.local_addr() else { continue };
        let (spec, stopping, alive) = (spec.clone(), stopping.clone(), alive.clone());
        tokio::spawn(async move {
            let _alive = alive;
            serve_connection(stream, stopping, |request| answer(&spec, request, client, local)).await;
        });
    }
}

/// A connection that comes before the end of the lingering gets an answer to its first request, if it asks within [`LINGER`] of being told to end.
async fn serve_connection(
    stream: TcpStream,
    mut stopping: watch::Receiver<bool>,
    answer: impl Fn(&Request<Incoming>) -> Response<Full<Bytes>>,
) {
    let first_request = Notify::new();
    let service = hyper::service::service_fn(|request| {
        first_request.notify_one();
        std::future::ready(Ok::<_, Infallible>(answer(&request)))
    });
    let late = *stopping.borrow();
    let mut http = hyper::server::conn::http1::Builder::new();
    let connection = http.keep_alive(!late).serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    if !late {
        tokio::select! {
            _ = connection.as_mut() => return,
            _ = stopping.wait_for(|stop| *stop) => {}
        }
        // Its request may be on its way, and hyper closes a connection that is told to end before anything was read from it.
        tokio::select! {
            _ = connection.as_mut() => return,
            () = first_request.notified() => {}
            () = tokio::time::sleep(LINGER) => {}
        }
        connection.as_mut().graceful_shutdown();
    }
    let _ = connection.await;
}

fn answer(spec: &WebSpec, request: &Request<Incoming>, client: SocketAddr, local: SocketAddr) -> Response<Full<Bytes>> {
    println!("{} {} from {}", request.method(), request.uri(), plain(client));
    let wants_json = request.headers().get(header::ACCEPT).is_some_and(|value| value == "application/json");
    let (kind, text) = match (request.uri().path(), &spec.text) {
        ("/healthz", _) => ("text/plain", "ok\n".to_owned()),
        ("/hostname", _) => ("text/plain", format!("{}\n", spec.pod)),
        ("/clientip", _) => ("text/plain", format!("{}\n", plain(client))),
        (_, Some(text)) => ("text/plain", format!("{text}\n")),
        _ if wants_json => ("application/json", spec.describe_json(client, local)),
        _ => ("text/plain", spec.describe(client, local)),
    };
    let mut response = Response::new(Full::new(Bytes::from(text)));
    *response.status_mut() = StatusCode::OK;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

async fn serve_udp(socket: UdpSocket, spec: Arc<WebSpec>) {
    let mut buffer = vec![0; 65536];
    loop {
        let Ok((length, client)) = socket.recv_from(&mut buffer).await else { continue };
        let Some(datagram) = buffer.get(..length) else { continue };
        println!("{length} bytes by UDP from {}", plain(client));
        let sent = if datagram.trim_ascii() == b"whoami" {
            let local = socket.local_addr().unwrap_or(client);
            socket.send_to(spec.describe(client, local).as_bytes(), client).await
        } else {
            socket.send_to(datagram, client).await
        };
        if let Err(error) = sent {
            println!("cannot answer {}: {error}", plain(client));
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn connect(to: SocketAddr) -> Result<TcpStream> {
        Ok(TcpStream::connect(to).await?)
    }

    /// What a client is answered to one request; it ends where the server ends the connection.
    async fn ask(client: &mut TcpStream) -> Result<String> {
        client.write_all(b"GET /hostname HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        let mut text = String::new();
        client.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test]
    async fn who_has_connected_when_the_server_is_told_to_end_is_answered() -> Result<()> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let at = listener.local_addr()?;
        let (stop, stopping) = watch::channel(false);
        let (alive, _all_done) = tokio::sync::mpsc::channel(1);
        let spec = Arc::new(WebSpec { pod: "a-pod".to_owned(), ..WebSpec::default() });
        let server = tokio::spawn(serve_http(listener, spec, stopping, alive));
        let (mut early, mut asked) = (connect(at).await?, connect(at).await?);
        asked.write_all(b"GET /hostname HTTP/1.1\r\nHost: x\r\n\r\n").await?;
        let mut first = [0; 12];
        asked.read_exact(&mut first).await?;
        // Both connections have been taken, as the later one has.
        stop.send(true)?;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let mut late = connect(at).await?;
        for client in [&mut early, &mut late] {
            let text = ask(client).await?;
            assert!(text.starts_with("HTTP/1.1 200") && text.contains("a-pod"), "{text:?}");
        }
        let mut rest = String::new();
        // The one that had its answer and asks nothing more is let go.
        tokio::time::timeout(LINGER / 2, asked.read_to_string(&mut rest)).await??;
        assert!(rest.contains("a-pod"), "{rest:?}");
        server.abort();
        Ok(())
    }
}
