//! `/metrics` in the text format of OpenMetrics, `/healthz` and `/readyz`: the latter two from the first moment of the process on.
//!
//! `/readyz` also fails while the container runtime takes another network's configuration before ours: pods would not get this
//! network, however ready it is. `/healthz` fails when the agent hangs, so that kubelet starts it anew ([`crate::pulse`]). What the metrics are is in [`exposition`].

mod exposition;
mod kube_proxy;

use std::net::SocketAddr;
use std::sync::PoisonError;

use anyhow::{Context, Result};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use tracing::error;

use crate::cni_server::Readiness;
use crate::plain_http::{self, Answer};
use crate::pulse;
use crate::status::{SharedSources, Sources};

/// Media type of the text format of OpenMetrics 1.0, which Prometheus understands since 2.5.
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// The server; dropping it ends it.
#[derive(Debug)]
pub struct Health {
    _task: AbortOnDropHandle<()>,
}

/// Serves health at once, and metrics when there are some.
///
/// # Errors
/// The address cannot be listened on.
pub fn serve(listen: SocketAddr, readiness: watch::Receiver<Readiness>, sources: SharedSources) -> Result<Health> {
    let socket = std::net::TcpListener::bind(listen).with_context(|| {
        format!(
            "could not serve metrics on {listen}: if another agent runs on this node, end it; else change metricsListen"
        )
    })?;
    socket.set_nonblocking(true)?;
    let listener = TcpListener::from_std(socket)?;
    let answer = move |path: String| {
        let (sources, readiness) = (sources.clone(), readiness.clone());
        async move { answer(&path, sources.get(), &readiness).await }
    };
    let task = tokio::spawn(plain_http::serve(listener, answer));
    Ok(Health { _task: AbortOnDropHandle::new(task) })
}

async fn answer(path: &str, sources: Option<&Sources>, readiness: &watch::Receiver<Readiness>) -> Answer {
    let starting = match &*readiness.borrow() {
        Readiness::Ready => sources.and_then(preferred),
        Readiness::Starting(why) => Some(format!("{why}\n")),
    };
    match (path, starting, sources) {
        ("/metrics", _, Some(sources)) => match exposition::text(sources, readiness).await {
            Ok(text) => Answer { content_type: OPENMETRICS, ..Answer::text(Answer::OK, text) },
            Err(error) => Answer::text("500 Internal Server Error", format!("{error:#}\n")),
        },
        ("/healthz", _, Some(sources))
            if let Some(what) = pulse::hangs(sources.pulse.age(), sources.datapath.busy_for()) =>
        {
            error!("{what}: this agent is to be started anew");
            Answer::text(Answer::UNAVAILABLE, format!("{what}\n"))
        }
        ("/healthz", _, _) | ("/readyz", None, _) => Answer::text(Answer::OK, "ok\n"),
        ("/metrics", why, None) | ("/readyz", why, _) => Answer::text(Answer::UNAVAILABLE, why.unwrap_or_default()),
        _ => Answer::not_found(),
    }
}

/// Another network's configuration that the container runtime takes before ours.
fn preferred(sources: &Sources) -> Option<String> {
    let report = sources.report.read().unwrap_or_else(PoisonError::into_inner);
    let name = report.preferred.first()?;
    Some(format!("the container runtime takes CNI configuration {name} before ours: remove it\n"))
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
        let _health = serve(free, readiness, SharedSources::default()).unwrap();
        assert!(ask(free, "/healthz").await.starts_with("HTTP/1.1 200"));
        let waiting = ask(free, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503") && waiting.contains("waiting for a friend"), "{waiting}");
        assert!(ask(free, "/metrics").await.starts_with("HTTP/1.1 503"));
        ready.send_replace(Readiness::Ready);
        assert!(ask(free, "/readyz").await.starts_with("HTTP/1.1 200"));
        assert!(
            serve(free, ready.subscribe(), SharedSources::default()).unwrap_err().to_string().contains("another agent")
        );
    }
}
