//! What callers of kube-proxy ask a node: `:10256/healthz` and `:10249/proxyMode`, and the health check NodePorts of
//! Services whose external policy is `Local` (`plan::services::health`).

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use k8s_openapi::jiff::Timestamp;
use serde_json::json;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;
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
    going: watch::Receiver<bool>,
) -> AbortOnDropHandle<()> {
    let health = ProxyHealth { readiness, going };
    AbortOnDropHandle::new(tokio::spawn(async move {
        let mut ports = Ports::default();
        loop {
            if in_charge.borrow_and_update().stands_in_for_kube_proxy() {
                ports.open(&health);
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

/// What kube-proxy's health is made of.
#[derive(Clone, Debug)]
struct ProxyHealth {
    readiness: watch::Receiver<Readiness>,
    /// Whether the node is about to leave the cluster.
    going: watch::Receiver<bool>,
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

    fn open(&mut self, health: &ProxyHealth) {
        let mut refused = Vec::new();
        if self.healthz.is_none() {
            match serve_healthz(health) {
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

fn serve_healthz(health: &ProxyHealth) -> std::io::Result<AbortOnDropHandle<()>> {
    let (listener, health) = (listen_everywhere(HEALTHZ_PORT)?, health.clone());
    let healthz = move |path: String| std::future::ready(health.answer(&path));
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

impl ProxyHealth {
    /// As kube-proxy: healthy once Services are in the kernel. `/healthz` is also for load balancers, which are to send nothing new to
    /// a node that is going (KEP-3836); `/livez` is about this process alone.
    fn answer(&self, path: &str) -> Answer {
        let ready = *self.readiness.borrow() == Readiness::Ready;
        let eligible = !*self.going.borrow();
        let well = match path {
            "/healthz" => ready && eligible,
            "/livez" => ready,
            _ => return Answer::not_found(),
        };
        let code = if well { "200" } else { "503" };
        counts::PROXY_HEALTH.get_or_create(&counts::health_labels(path.trim_start_matches('/'), code)).inc();
        let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default().to_string();
        let body = json!({"lastUpdated": now, "currentTime": now, "nodeEligible": ready && eligible});
        Answer::json(if well { Answer::OK } else { Answer::UNAVAILABLE }, &body)
    }
}

struct Port {
    /// What is answered now.
    check: Arc<RwLock<HealthCheck>>,
    /// Where: at an address, or (none) at every address of the node. One that stays is not touched when others come or go: whoever closes a
    /// listener cannot open the like of it at once.
    listening: BTreeMap<Option<IpAddr>, AbortOnDropHandle<()>>,
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

impl At {
    fn places(&self) -> BTreeSet<Option<IpAddr>> {
        match self {
            Self::Everywhere => [None].into(),
            Self::These(addresses) => addresses.iter().copied().map(Some).collect(),
        }
    }
}

/// The health check ports that are answered at the moment.
#[derive(Default)]
pub struct HealthPorts {
    ports: BTreeMap<u16, Port>,
    /// Where nobody can listen, said once for each: somebody else does, or the address is not (yet, or any more) usable.
    refused: BTreeSet<(u16, Option<IpAddr>)>,
}

impl HealthPorts {
    /// Answers these and no others, there and nowhere else, as far as that can be.
    pub fn apply(&mut self, checks: &BTreeMap<u16, HealthCheck>, at: &At) {
        let places = at.places();
        self.ports.retain(|port, _| checks.contains_key(port));
        self.refused.retain(|(port, place)| checks.contains_key(port) && places.contains(place));
        for (port, check) in checks {
            let fresh = || Port { check: Arc::new(RwLock::new(check.clone())), listening: BTreeMap::new() };
            let open = self.ports.entry(*port).or_insert_with(fresh);
            open.check.write().unwrap_or_else(PoisonError::into_inner).clone_from(check);
            open.listening.retain(|place, _| places.contains(place));
            for place in &places {
                if open.listening.contains_key(place) {
                    continue;
                }
                match listen(*port, *place, &open.check) {
                    Ok(listening) => {
                        info!(port, address = ?place, service = %check.service, "answering a health check node port");
                        open.listening.insert(*place, listening);
                        self.refused.remove(&(*port, *place));
                    }
                    Err(error) => {
                        if self.refused.insert((*port, *place)) {
                            let address = place.map_or_else(|| "all addresses".to_owned(), |ip| ip.to_string());
                            warn!(port, address, service = %check.service, %error, "cannot listen on the health check node port; trying again");
                        }
                    }
                }
            }
        }
    }

    /// Whether somewhere nobody could listen when it was last tried.
    pub fn lacks_some(&self) -> bool {
        !self.refused.is_empty()
    }
}

fn listen(
    port: u16,
    place: Option<IpAddr>,
    check: &Arc<RwLock<HealthCheck>>,
) -> std::io::Result<AbortOnDropHandle<()>> {
    let listener = match place {
        None => listen_everywhere(port)?,
        Some(address) => listen_at((address, port).into())?,
    };
    let check = check.clone();
    let answer = move |_| std::future::ready(health(&check.read().unwrap_or_else(PoisonError::into_inner)));
    Ok(AbortOnDropHandle::new(tokio::spawn(serve(listener, answer))))
}

/// As kube-proxy: 503 tells a load balancer to send nothing here; the weight lets it send more where more endpoints are.
fn health(HealthCheck { service, local_endpoints }: &HealthCheck) -> Answer {
    let local_endpoints = *local_endpoints;
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
    use towpath_model::NamespacedName;

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
    async fn an_address_that_comes_goes_or_cannot_be_used_takes_nothing_from_the_others() {
        let (mut ports, port) = (HealthPorts::default(), free_port());
        let of = |name: &str| BTreeMap::from([(port, check(name, 1))]);
        let at = |list: &[&str]| At::These(list.iter().map(|text| text.parse().unwrap()).collect());
        ports.apply(&of("web"), &at(&["127.0.0.1"]));
        // One comes, and one that is no address of this machine; at once, as when a virtual address moves here.
        ports.apply(&of("web"), &at(&["127.0.0.1", "127.0.0.2", "192.0.2.77"]));
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200"));
        assert!(tokio::net::TcpStream::connect(("127.0.0.2", port)).await.is_ok());
        assert!(ports.lacks_some(), "it is tried again");
        ports.apply(&of("web"), &at(&["127.0.0.1"]));
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200") && !ports.lacks_some());
        // Another Service has the port from one moment to the next.
        ports.apply(&of("other"), &at(&["127.0.0.1"]));
        assert!(get(port).await.unwrap().contains("\"name\":\"other\""));
    }

    #[tokio::test]
    async fn a_port_that_somebody_else_has_is_taken_once_it_is_free() {
        let taken = std::net::TcpListener::bind("[::]:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let checks = BTreeMap::from([(port, check("web", 1))]);
        let mut ports = HealthPorts::default();
        ports.apply(&checks, &At::Everywhere);
        assert!(ports.lacks_some());
        drop(taken);
        ports.apply(&checks, &At::Everywhere);
        assert!(!ports.lacks_some());
        assert!(get(port).await.unwrap().starts_with("HTTP/1.1 200"));
    }

    #[test]
    fn kube_proxys_health_says_when_and_is_bad_until_ready() {
        let (sender, readiness) = watch::channel(Readiness::Starting("first list".to_owned()));
        let (_stays, going) = watch::channel(false);
        let health = ProxyHealth { readiness, going };
        assert_eq!(health.answer("/healthz").status, Answer::UNAVAILABLE);
        sender.send_replace(Readiness::Ready);
        let answer = health.answer("/healthz");
        assert_eq!(answer.status, Answer::OK);
        assert!(answer.body.contains("lastUpdated"), "{}", answer.body);
        assert_eq!(health.answer("/else"), Answer::not_found());
    }

    #[test]
    fn load_balancers_hear_that_the_node_is_going_and_who_asks_for_the_process_does_not() {
        let (_ready, readiness) = watch::channel(Readiness::Ready);
        let (leaves, going) = watch::channel(true);
        let health = ProxyHealth { readiness, going };
        let answer = health.answer("/healthz");
        assert_eq!(answer.status, Answer::UNAVAILABLE);
        assert!(answer.body.contains("\"nodeEligible\":false"), "{}", answer.body);
        assert_eq!(health.answer("/livez").status, Answer::OK);
        leaves.send_replace(false);
        assert_eq!(health.answer("/healthz").status, Answer::OK, "the autoscaler has changed its mind");
    }
}
