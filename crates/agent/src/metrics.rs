//! `/metrics` in the Prometheus text format, `/healthz` and `/readyz`: the latter two from the first moment of the process on.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;

use crate::cni_server::Readiness;
use crate::reconcile::SharedReport;

/// The server; dropping it ends it.
#[derive(Debug)]
pub struct Health {
    sources: Arc<OnceLock<Sources>>,
    _task: AbortOnDropHandle<()>,
}

/// What metrics are made of.
#[derive(Debug)]
struct Sources {
    datapath: Datapath,
    report: SharedReport,
}

impl Health {
    /// From here on there are metrics.
    pub fn count(&self, datapath: Datapath, report: SharedReport) {
        let _once = self.sources.set(Sources { datapath, report });
    }
}

/// Serves health at once, and metrics when there are some ([`Health::count`]).
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(listen: SocketAddr, readiness: watch::Receiver<Readiness>) -> Result<Health> {
    let socket = std::net::TcpListener::bind(listen).with_context(|| {
        format!(
            "could not serve metrics on {listen}: if another agent runs on this node, end it; else change metricsListen"
        )
    })?;
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from_std(socket)?;
    let sources: Arc<OnceLock<Sources>> = Arc::default();
    let shared = sources.clone();
    let task = tokio::spawn(async move {
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let answer = answer(stream, shared.get(), &readiness);
            let _ = tokio::time::timeout(Duration::from_secs(5), answer).await;
        }
    });
    Ok(Health { sources, _task: AbortOnDropHandle::new(task) })
}

async fn answer(stream: TcpStream, sources: Option<&Sources>, readiness: &watch::Receiver<Readiness>) -> Result<()> {
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    // A request line is short; what is longer is nobody's scraper.
    tokio::io::AsyncReadExt::take(&mut stream, 1024).read_line(&mut line).await?;
    let path = line.split(' ').nth(1).unwrap_or("/");
    let starting = match &*readiness.borrow() {
        Readiness::Ready => None,
        Readiness::Starting(why) => Some(format!("{why}\n")),
    };
    let (code, body) = match (path, starting, sources) {
        ("/metrics", _, Some(sources)) => ("200 OK", text(&sources.datapath, &sources.report, readiness).await?),
        ("/healthz", _, _) | ("/readyz", None, _) => ("200 OK", "ok\n".to_owned()),
        ("/metrics", why, None) | ("/readyz", why, _) => ("503 Service Unavailable", why.unwrap_or_default()),
        _ => ("404 Not Found", "not found\n".to_owned()),
    };
    let mut head = String::new();
    write!(
        head,
        "HTTP/1.1 {code}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    )?;
    let stream = stream.get_mut();
    stream.write_all(head.as_bytes()).await?;
    stream.write_all(body.as_bytes()).await?;
    Ok(())
}

async fn text(datapath: &Datapath, report: &SharedReport, readiness: &watch::Receiver<Readiness>) -> Result<String> {
    let status = crate::status::collect("", datapath, report, readiness).await;
    let mut registry = Registry::with_prefix("towpath");
    let mut gauge = |name: &str, help: &str, value: u32| {
        let gauge = Gauge::<i64>::default();
        gauge.set(i64::from(value));
        registry.register(name, help, gauge);
    };
    gauge("ready", "Whether the first full sync is in the kernel", u32::from(status.ready));
    gauge("pods", "Pods of this node that have a device", status.pods);
    gauge("peers", "Other nodes that can be reached", u32::try_from(status.peers.len()).unwrap_or(u32::MAX));
    gauge("service_frontends", "Service addresses and node ports in the kernel", status.frontends);
    gauge("service_backends", "Service backends in the kernel", status.backends);
    gauge("policies", "Policies that isolate a pod of this node", status.policies);
    gauge("policy_classes", "Address classes in the kernel", status.classes);
    gauge("policy_rules", "Rule rows in the kernel", status.rules);
    gauge("connections", "Tracked connections", status.connections);
    let packets = Family::<Vec<(String, String)>, Counter>::default();
    for (reason, count) in &status.counters {
        packets.get_or_create(&vec![("reason".to_owned(), reason.clone())]).inc_by(*count);
    }
    registry.register("packets", "Packets by what became of them", packets);
    let (plans, failed) = {
        let report = report.read().unwrap_or_else(PoisonError::into_inner);
        (report.plans, report.failed)
    };
    for (name, help, value) in [
        ("plans", "How often something was planned", plans),
        ("failed_applies", "How often something could not be applied", failed),
    ] {
        let counter = Counter::<u64>::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    }
    let mut out = String::new();
    encode(&mut out, &registry)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt;

    async fn ask(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\n\r\n").as_bytes()).await.unwrap();
        let mut said = String::new();
        stream.read_to_string(&mut said).await.unwrap();
        said
    }

    #[tokio::test]
    async fn who_waits_is_alive_and_says_what_for() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let (ready, readiness) = watch::channel(Readiness::Starting("waiting for a friend".to_owned()));
        let _health = serve(free, readiness).unwrap();
        assert!(ask(free, "/healthz").await.starts_with("HTTP/1.1 200"));
        let waiting = ask(free, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503") && waiting.contains("waiting for a friend"), "{waiting}");
        assert!(ask(free, "/metrics").await.starts_with("HTTP/1.1 503"));
        ready.send_replace(Readiness::Ready);
        assert!(ask(free, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(serve(free, ready.subscribe()).unwrap_err().to_string().contains("another agent"));
    }
}
