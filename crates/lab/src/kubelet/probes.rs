//! Startup, readiness and liveness probes, and lifecycle hooks: run from the node's namespace as a real kubelet does.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container as ContainerSpec, HTTPGetAction, LifecycleHandler, Probe, TCPSocketAction};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use tokio::sync::mpsc;

use crate::kernel::ns;
use crate::runtime::container::Container;

/// Where probes of one container go.
#[derive(Clone)]
pub(crate) struct Target {
    /// The node's network namespace.
    pub(crate) node_netns: PathBuf,
    /// The pod's first address.
    pub(crate) address: IpAddr,
    /// The container's declaration, for named ports.
    pub(crate) spec: ContainerSpec,
    /// The running instance, for `exec`.
    pub(crate) container: Container,
}

/// What a probe found, told when it changes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Finding {
    /// The startup probe succeeded, or there is none.
    Started,
    /// The startup or liveness probe failed for good: the container is to be restarted.
    Dead(&'static str),
    /// The readiness probe says so.
    Ready(bool),
    /// One failed attempt, worth an event.
    Failed(&'static str, String),
}

/// Runs all probes of a container until its end; dropped with it.
pub(crate) async fn watch(target: Target, findings: mpsc::UnboundedSender<Finding>) {
    if let Some(probe) = target.spec.startup_probe.clone()
        && !until(&target, "Startup", &probe, &findings, true).await
    {
        let _ = findings.send(Finding::Dead("Startup"));
        return;
    }
    let _ = findings.send(Finding::Started);
    let liveness = async {
        match target.spec.liveness_probe.clone() {
            Some(probe) => {
                until(&target, "Liveness", &probe, &findings, false).await;
                let _ = findings.send(Finding::Dead("Liveness"));
            }
            None => std::future::pending().await,
        }
    };
    let readiness = async {
        match target.spec.readiness_probe.clone() {
            Some(probe) => readiness(&target, &probe, &findings).await,
            None => {
                let _ = findings.send(Finding::Ready(true));
                std::future::pending().await
            }
        }
    };
    tokio::join!(liveness, readiness);
}

fn seconds(value: Option<i32>, default: u64) -> Duration {
    Duration::from_secs(value.and_then(|v| u64::try_from(v).ok()).filter(|v| *v > 0).unwrap_or(default))
}

/// Time for a process to begin to listen, so that a probe without a delay does not report a failure that means nothing.
const FIRST_ATTEMPT: Duration = Duration::from_millis(60);

async fn initial_delay(probe: &Probe) {
    let delay = probe.initial_delay_seconds.and_then(|v| u64::try_from(v).ok()).unwrap_or(0);
    tokio::time::sleep(Duration::from_secs(delay).max(FIRST_ATTEMPT)).await;
}

/// Startup: true at success, false after `failureThreshold` failures in a row. Liveness: never true.
async fn until(
    target: &Target,
    kind: &'static str,
    probe: &Probe,
    findings: &mpsc::UnboundedSender<Finding>,
    ends_at_success: bool,
) -> bool {
    initial_delay(probe).await;
    let threshold = probe.failure_threshold.unwrap_or(3).max(1);
    let mut failures = 0;
    loop {
        match attempt(target, probe).await {
            Ok(()) if ends_at_success => return true,
            Ok(()) => failures = 0,
            Err(error) => {
                let _ = findings.send(Finding::Failed(kind, format!("{error:#}")));
                failures += 1;
                if failures >= threshold {
                    return false;
                }
            }
        }
        // A container that has just started is asked more often, so that the lab is quick.
        let period = seconds(probe.period_seconds, 10);
        tokio::time::sleep(if ends_at_success { period.min(Duration::from_secs(1)) } else { period }).await;
    }
}

async fn readiness(target: &Target, probe: &Probe, findings: &mpsc::UnboundedSender<Finding>) {
    initial_delay(probe).await;
    let (up, down) = (probe.success_threshold.unwrap_or(1).max(1), probe.failure_threshold.unwrap_or(3).max(1));
    let (mut successes, mut failures, mut ready) = (0, 0, None);
    loop {
        match attempt(target, probe).await {
            Ok(()) => (successes, failures) = (successes + 1, 0),
            Err(error) => {
                let _ = findings.send(Finding::Failed("Readiness", format!("{error:#}")));
                (successes, failures) = (0, failures + 1);
            }
        }
        let now = if successes >= up {
            Some(true)
        } else if failures >= down {
            Some(false)
        } else {
            ready
        };
        if let Some(value) = now.filter(|_| now != ready) {
            let _ = findings.send(Finding::Ready(value));
            ready = now;
        }
        let period = seconds(probe.period_seconds, 10);
        // Until it is ready for the first time the lab asks every fifth of a second at least.
        let wait = if ready == Some(true) { period } else { period.min(Duration::from_millis(200)) };
        tokio::time::sleep(wait).await;
    }
}

async fn attempt(target: &Target, probe: &Probe) -> Result<()> {
    let limit = seconds(probe.timeout_seconds, 1);
    let work = async {
        if let Some(exec) = &probe.exec {
            let (code, output) = target.container.run(exec.command.as_deref().unwrap_or_default()).await?;
            if code != 0 {
                bail!("{}", if output.trim().is_empty() { format!("command exited with {code}") } else { output });
            }
            Ok(())
        } else if let Some(get) = &probe.http_get {
            http_get(target, get, limit).await
        } else if let Some(tcp) = &probe.tcp_socket {
            connect_tcp(target, tcp, limit).await
        } else {
            bail!("this lab has exec, httpGet and tcpSocket probes only")
        }
    };
    match tokio::time::timeout(limit, work).await {
        Ok(result) => result,
        Err(_) => bail!("timed out after {limit:?}"),
    }
}

/// Runs a `postStart` or `preStop` handler.
pub(crate) async fn run_hook(target: &Target, handler: &LifecycleHandler, limit: Duration) -> Result<()> {
    if let Some(exec) = &handler.exec {
        let (code, output) = target.container.run(exec.command.as_deref().unwrap_or_default()).await?;
        if code != 0 {
            bail!("command exited with {code}: {output}");
        }
        return Ok(());
    }
    if let Some(get) = &handler.http_get {
        return http_get(target, get, limit).await;
    }
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0)).min(limit)).await;
        return Ok(());
    }
    bail!("this lab has exec, httpGet and sleep hooks only")
}

fn port_number(target: &Target, port: &IntOrString) -> Result<u16> {
    match port {
        IntOrString::Int(number) => u16::try_from(*number).with_context(|| format!("port {number} is out of range")),
        IntOrString::String(name) => {
            let declared = target.spec.ports.iter().flatten().find(|p| p.name.as_deref() == Some(name));
            match declared {
                Some(port) => Ok(u16::try_from(port.container_port)?),
                None => name.parse().with_context(|| format!("the container has no port named {name:?}")),
            }
        }
    }
}

fn address(target: &Target, host: Option<&String>) -> Result<IpAddr> {
    match host.filter(|h| !h.is_empty()) {
        Some(host) => host.parse().with_context(|| format!("host {host:?} is not an address")),
        None => Ok(target.address),
    }
}

/// A connection made in the node's own namespace, as the kubelet's are.
async fn connect(netns: &Path, to: SocketAddr, limit: Duration) -> Result<tokio::net::TcpStream> {
    let stream = ns::in_net(netns, move || {
        std::net::TcpStream::connect_timeout(&to, limit).with_context(|| format!("dial tcp {to}"))
    })
    .await?;
    stream.set_nonblocking(true)?;
    Ok(tokio::net::TcpStream::from_std(stream)?)
}

async fn connect_tcp(target: &Target, tcp: &TCPSocketAction, limit: Duration) -> Result<()> {
    let to = SocketAddr::new(address(target, tcp.host.as_ref())?, port_number(target, &tcp.port)?);
    connect(&target.node_netns, to, limit).await.map(drop)
}

async fn http_get(target: &Target, get: &HTTPGetAction, limit: Duration) -> Result<()> {
    if get.scheme.as_deref() == Some("HTTPS") {
        bail!("this lab's probes speak HTTP only, not HTTPS");
    }
    let to = SocketAddr::new(address(target, get.host.as_ref())?, port_number(target, &get.port)?);
    let stream = connect(&target.node_netns, to, limit).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let connection = tokio::spawn(connection);
    let path = get.path.as_deref().filter(|p| !p.is_empty()).unwrap_or("/");
    let mut request = http::Request::get(if path.starts_with('/') { path.to_owned() } else { format!("/{path}") });
    let mut has_host = false;
    for header in get.http_headers.iter().flatten() {
        has_host |= header.name.eq_ignore_ascii_case("host");
        request = request.header(&header.name, &header.value);
    }
    if !has_host {
        request = request.header(http::header::HOST, to.to_string());
    }
    let request = request.header(http::header::USER_AGENT, "kube-probe/1.36").body(Empty::<Bytes>::new())?;
    let answer = sender.send_request(request).await;
    let result = match answer {
        Ok(response) => {
            let status = response.status();
            let _ = response.into_body().collect().await;
            if status.is_success() || status.is_redirection() {
                Ok(())
            } else {
                Err(anyhow::anyhow!("HTTP probe failed with statuscode: {}", status.as_u16()))
            }
        }
        Err(error) => Err(anyhow::Error::new(error).context(format!("Get \"http://{to}{path}\""))),
    };
    connection.abort();
    result
}
