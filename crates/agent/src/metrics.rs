//! `/metrics` in the Prometheus text format, `/healthz` and `/readyz`.

use std::net::SocketAddr;
use std::sync::PoisonError;

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

/// Serves until the handle is dropped.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(
    listen: SocketAddr,
    datapath: Datapath,
    report: SharedReport,
    readiness: watch::Receiver<Readiness>,
) -> Result<AbortOnDropHandle<()>> {
    let socket = std::net::TcpListener::bind(listen).with_context(|| format!("could not serve metrics on {listen}"))?;
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from_std(socket)?;
    let answer = move |path: String| {
        let (datapath, report, readiness) = (datapath.clone(), report.clone(), readiness.clone());
        async move { answer(&path, &datapath, &report, &readiness).await }
    };
    Ok(AbortOnDropHandle::new(tokio::spawn(plain_http::serve(listener, answer))))
}

async fn answer(
    path: &str,
    datapath: &Datapath,
    report: &SharedReport,
    readiness: &watch::Receiver<Readiness>,
) -> Answer {
    match path {
        "/metrics" => match text(datapath, report, readiness).await {
            Ok(text) => Answer::text(Answer::OK, text),
            Err(error) => Answer::text("500 Internal Server Error", format!("{error:#}\n")),
        },
        "/healthz" => Answer::text(Answer::OK, "ok\n"),
        "/readyz" => match &*readiness.borrow() {
            Readiness::Ready => Answer::text(Answer::OK, "ok\n"),
            Readiness::Starting(why) => Answer::text(Answer::UNAVAILABLE, format!("{why}\n")),
        },
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
