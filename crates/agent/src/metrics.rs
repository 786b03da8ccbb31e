//! `/metrics` in the Prometheus text format, `/healthz` and `/readyz`: the latter two from the first moment of the process on.

use std::net::SocketAddr;
use std::sync::{Arc, OnceLock, PoisonError};

use anyhow::{Context, Result};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;

use crate::cni_server::Readiness;
use crate::plain_http::{self, Answer};
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
    let answer = move |path: String| {
        let (shared, readiness) = (shared.clone(), readiness.clone());
        async move { answer(&path, shared.get(), &readiness).await }
    };
    let task = tokio::spawn(plain_http::serve(listener, answer));
    Ok(Health { sources, _task: AbortOnDropHandle::new(task) })
}

async fn answer(path: &str, sources: Option<&Sources>, readiness: &watch::Receiver<Readiness>) -> Answer {
    let starting = match &*readiness.borrow() {
        Readiness::Ready => None,
        Readiness::Starting(why) => Some(format!("{why}\n")),
    };
    match (path, starting, sources) {
        ("/metrics", _, Some(sources)) => match text(&sources.datapath, &sources.report, readiness).await {
            Ok(text) => Answer::text(Answer::OK, text),
            Err(error) => Answer::text("500 Internal Server Error", format!("{error:#}\n")),
        },
        ("/healthz", _, _) | ("/readyz", None, _) => Answer::text(Answer::OK, "ok\n"),
        ("/metrics", why, None) | ("/readyz", why, _) => Answer::text(Answer::UNAVAILABLE, why.unwrap_or_default()),
        _ => Answer::not_found(),
    }
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
    let drops = Family::<Vec<(String, String)>, Counter>::default();
    for (name, count) in &status.counters {
        let (family, label, value) = match name.strip_prefix("drop.") {
            Some(reason) => (&drops, "reason", reason),
            None => (&packets, "path", name.as_str()),
        };
        family.get_or_create(&vec![(label.to_owned(), value.to_owned())]).inc_by(*count);
    }
    registry.register("packets", "Packets that went on, by the way they took", packets);
    registry.register("drop_packets", "Packets dropped, by reason", drops);
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
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpStream;

    use super::*;

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
