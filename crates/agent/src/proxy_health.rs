//! What callers of kube-proxy ask a node: `:10256/healthz` and `:10249/proxyMode`, and the health check NodePorts of
//! Services whose external policy is `Local` (`plan::services::health`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
use towpath_model::NamespacedName;
use towpath_plan::services::health::HealthCheck;
use tracing::{info, warn};

use crate::cni_server::Readiness;
use crate::counts;
use crate::modes::State;
use crate::plain_http::{Answer, listen_at, listen_everywhere, serve};

/// kube-proxy's health, on every address: cloud load balancers ask it.
pub(crate) const HEALTHZ_PORT: u16 = 10256;
/// kube-proxy's own business, on loopback only.
const STATUS_PORT: u16 = 10249;
/// What `proxyMode` says.
const MODE: &str = "towpath";

/// Whoever has a port of ours may let go of it: it is tried again after this time.
const TRY_AGAIN: Duration = Duration::from_secs(5);

/// Answers in kube-proxy's place, while Services are ours and no kube-proxy wants its ports, until dropped.
pub fn serve_when_in_charge(
    mut in_charge: watch::Receiver<State>,
    readiness: watch::Receiver<Readiness>,
) -> AbortOnDropHandle<()> {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut ports = Ports::default();
        loop {
            if in_charge.borrow_and_update().stands_in_for_kube_proxy() {
                ports.open(&readiness);
            } else {
                ports = Ports::default();
            }
            let again = async {
                match ports.are_open() {
                    true => std::future::pending().await,
                    false => tokio::time::sleep(TRY_AGAIN).await,
                }
            };
            tokio::select! {
                changed = in_charge.changed() => if changed.is_err() { return },
                () = again => {}
            }
        }
    }))
}

/// The two ports of kube-proxy. A port that somebody else has is said once, left to him, and tried again.
#[derive(Default)]
struct Ports {
    healthz: Option<AbortOnDropHandle<()>>,
    status: Option<AbortOnDropHandle<()>>,
    complained: bool,
}

impl Ports {
    fn are_open(&self) -> bool {
        self.healthz.is_some() && self.status.is_some()
    }

    fn open(&mut self, readiness: &watch::Receiver<Readiness>) {
        let mut refused = Vec::new();
        if self.healthz.is_none() {
            match serve_healthz(readiness) {
                Ok(task) => self.healthz = Some(task),
                Err(error) => refused.push((HEALTHZ_PORT, error)),
            }
        }
        if self.status.is_none() {
            match serve_status() {
                Ok(task) => self.status = Some(task),
                Err(error) => refused.push((STATUS_PORT, error)),
            }
        }
        for (port, error) in refused.iter().filter(|_| !self.complained) {
            warn!(port, %error, "cannot answer in kube-proxy's place; does one run here that is no pod? Trying again");
        }
        self.complained = !refused.is_empty();
    }
}

fn serve_healthz(readiness: &watch::Receiver<Readiness>) -> std::io::Result<AbortOnDropHandle<()>> {
    let (listener, readiness) = (listen_everywhere(HEALTHZ_PORT)?, readiness.clone());
    let healthz = move |path: String| std::future::ready(healthz(&path, &readiness));
    Ok(AbortOnDropHandle::new(tokio::spawn(serve(listener, healthz))))
}

fn serve_status() -> std::io::Result<AbortOnDropHandle<()>> {
    let socket = std::net::TcpListener::bind(("127.0.0.1", STATUS_PORT))?;
    socket.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(socket)?;
    let mode = |path: String| {
        std::future::ready(match path.as_str() {
            "/proxyMode" => Answer::text(Answer::OK, MODE),
            "/healthz" => Answer::text(Answer::OK, "ok"),
            _ => Answer::not_found(),
        })
    };
    Ok(AbortOnDropHandle::new(tokio::spawn(serve(listener, mode))))
}
/// As kube-proxy: healthy once Services are in the kernel.
fn healthz(path: &str, readiness: &watch::Receiver<Readiness>) -> Answer {
    if !matches!(path, "/healthz" | "/livez") {
        return Answer::not_found();
    }
    let ready = *readiness.borrow() == Readiness::Ready;
    let code = if ready { "200" } else { "503" };
    counts::PROXY_HEALTH.get_or_create(&counts::health_labels(path.trim_start_matches('/'), code)).inc();
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default().to_string();
    let body = json!({"lastUpdated": now, "currentTime": now, "nodeEligible": ready});
    Answer::json(if ready { Answer::OK } else { Answer::UNAVAILABLE }, &body)
}

struct Port {
    service: NamespacedName,
    local_endpoints: Arc<AtomicUsize>,
    /// One a listener.
    _tasks: Vec<AbortOnDropHandle<()>>,
}

/// Where the ports are answered: as NodePorts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum At {
    /// At every address that the node has, whenever it has it.
    #[default]
    Everywhere,
    /// At these, now.
    These(BTreeSet<IpAddr>),
}

/// The health check ports that are answered at the moment.
#[derive(Default)]
pub struct HealthPorts {
    ports: BTreeMap<u16, Port>,
    /// Ports that could not be opened, said once.
    refused: BTreeMap<u16, NamespacedName>,
    at: At,
}

impl HealthPorts {
    /// Answers these and no others, there and nowhere else.
    pub fn apply(&mut self, checks: &BTreeMap<u16, HealthCheck>, at: &At) {
        if self.at != *at {
            self.ports.clear();
            self.at = at.clone();
        }
        let wanted = |port: &u16, service: &NamespacedName| checks.get(port).is_some_and(|c| c.service == *service);
        self.ports.retain(|port, open| wanted(port, &open.service));
        self.refused.retain(|port, service| wanted(port, service));
        for (port, check) in checks {
            if let Some(open) = self.ports.get(port) {
                open.local_endpoints.store(check.local_endpoints, Ordering::Relaxed);
                continue;
            }
            match open(*port, check, at) {
                Ok(open) => {
                    self.refused.remove(port);
                    self.ports.insert(*port, open);
                }
                Err(error) => {
                    if self.refused.insert(*port, check.service.clone()).is_none() {
                        warn!(port, service = %check.service, %error, "cannot listen on the health check node port; \
                            trying again when Services change");
                    }
                }
            }
        }
    }
}

fn open(port: u16, check: &HealthCheck, at: &At) -> std::io::Result<Port> {
    let listeners = match at {
        At::Everywhere => vec![listen_everywhere(port)?],
        At::These(addresses) => {
            addresses.iter().map(|address| listen_at((*address, port).into())).collect::<std::io::Result<_>>()?
        }
    };
    let local_endpoints = Arc::new(AtomicUsize::new(check.local_endpoints));
    let (service, count) = (check.service.clone(), local_endpoints.clone());
    let answer = move |_| std::future::ready(health(&service, count.load(Ordering::Relaxed)));
    info!(port, service = %check.service, "answering a health check node port");
    let task = |listener| AbortOnDropHandle::new(tokio::spawn(serve(listener, answer.clone())));
    let tasks = listeners.into_iter().map(task).collect();
    Ok(Port { service: check.service.clone(), local_endpoints, _tasks: tasks })
}

/// As kube-proxy: 503 tells a load balancer to send nothing here; the weight lets it send more where more endpoints are.
fn health(service: &NamespacedName, local_endpoints: usize) -> Answer {
    let status = if local_endpoints > 0 { Answer::OK } else { Answer::UNAVAILABLE };
    let body = json!({
        "service": {"namespace": service.namespace, "name": service.name},
        "localEndpoints": local_endpoints,
        "serviceProxyHealthy": true,
    });
    let headers = format!("X-Content-Type-Options: nosniff\r\nX-Load-Balancing-Endpoint-Weight: {local_endpoints}\r\n");
    Answer { headers, ..Answer::json(status, &body) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn get(port: u16) -> Option<String> {
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok()?;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: node\r\n\r\n").await.ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.ok()?;
        Some(text)
    }

    fn free_port() -> u16 {
        std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
    }

    fn check(name: &str, local_endpoints: usize) -> HealthCheck {
        HealthCheck { service: NamespacedName::new("default", name), local_endpoints }
    }

    #[tokio::test]
    async fn a_health_check_port_follows_the_local_endpoints_and_ends_with_its_service() {
        let (mut ports, port) = (HealthPorts::default(), free_port());
        ports.apply(&BTreeMap::from([(port, check("web", 2))]), &At::Everywhere);
        let answer = get(port).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.contains("\"localEndpoints\":2"), "{answer}");
        assert!(answer.contains("X-Load-Balancing-Endpoint-Weight: 2\r\n"), "{answer}");
        ports.apply(&BTreeMap::from([(port, check("web", 0))]), &At::Everywhere);
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 503"));
        ports.apply(&BTreeMap::new(), &At::Everywhere);
        tokio::task::yield_now().await;
        assert_eq!(get(port).await, None, "the port is free again");
    }

    #[tokio::test]
    async fn it_is_answered_at_the_chosen_addresses_only_and_follows_them() {
        let (mut ports, port) = (HealthPorts::default(), free_port());
        let checks = BTreeMap::from([(port, check("web", 1))]);
        let at = |list: &[&str]| At::These(list.iter().map(|text| text.parse().unwrap()).collect());
        ports.apply(&checks, &at(&["127.0.0.2", "127.0.0.3"]));
        let answers = async |address: &str| tokio::net::TcpStream::connect((address, port)).await.is_ok();
        assert!(answers("127.0.0.2").await && answers("127.0.0.3").await && !answers("127.0.0.1").await);
        ports.apply(&checks, &at(&["127.0.0.1"]));
        tokio::task::yield_now().await;
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200") && !answers("127.0.0.2").await);
        ports.apply(&checks, &at(&[]));
        tokio::task::yield_now().await;
        assert!(!answers("127.0.0.1").await);
    }

    #[tokio::test]
    async fn a_port_that_somebody_else_has_is_taken_once_it_is_free() {
        let taken = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let checks = BTreeMap::from([(port, check("web", 1))]);
        let mut ports = HealthPorts::default();
        ports.apply(&checks, &At::Everywhere);
        assert!(ports.ports.is_empty());
        drop(taken);
        ports.apply(&checks, &At::Everywhere);
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn kube_proxys_health_says_when_and_is_bad_until_ready() {
        let (sender, readiness) = watch::channel(Readiness::Starting("first list".to_owned()));
        assert_eq!(healthz("/healthz", &readiness).status, Answer::UNAVAILABLE);
        sender.send_replace(Readiness::Ready);
        let answer = healthz("/healthz", &readiness);
        assert_eq!(answer.status, Answer::OK);
        assert!(answer.body.contains("lastUpdated"), "{}", answer.body);
        assert_eq!(healthz("/else", &readiness), Answer::not_found());
    }
}
