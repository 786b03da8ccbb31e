//! Who is in charge of Services and cluster DNS on this node: decided by [`towpath_plan::modes`] from what the watches say, kept on
//! disk so that a restart flips nothing, and told to whoever acts on it or shows it.

use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::timeout;
use towpath_model::{NamespacedName, NodeName, World};
use towpath_plan::modes::{self, CoreDns, Dns, InCharge, KubeProxy, Modes, Proxy};
use towpath_wire::config::AgentConfig;
use tracing::{info, warn};

use crate::proxy_health::HEALTHZ_PORT;

/// kube-proxy, on the same node, answers in far less; nobody waits longer for it.
const HEALTH_PATIENCE: Duration = Duration::from_millis(100);

/// Who is in charge, and what that was decided from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct State {
    /// Who is in charge; none before the first full lists.
    pub in_charge: Option<InCharge>,
    /// kube-proxy as this node sees it.
    pub kube_proxy: KubeProxy,
    /// CoreDNS as this node sees it.
    pub core_dns: CoreDns,
    /// Addresses that this node's own server answers cluster DNS at.
    pub dns_addresses: Vec<IpAddr>,
    /// Addresses that were configured for DNS and are other Services'.
    pub taken: Vec<(IpAddr, NamespacedName)>,
}

impl State {
    /// Whether callers of kube-proxy are answered here: Services are ours, and no kube-proxy is about to want its ports.
    pub fn stands_in_for_kube_proxy(&self) -> bool {
        self.in_charge.is_some_and(|in_charge| in_charge.proxy == Proxy::Towpath) && !self.kube_proxy.here
    }

    /// Who is in charge, and how to hand over, for people.
    pub fn hints(&self) -> Vec<String> {
        let Some(in_charge) = self.in_charge else { return Vec::new() };
        let proxy = match in_charge.proxy {
            Proxy::KubeProxy => Some(
                "Services: kube-proxy serves this node's processes and the outside, Towpath the pods; to hand over: \
                 kubectl -n kube-system delete daemonset kube-proxy (or NetworkConfig spec.serviceProxy: towpath, first)"
                    .to_owned(),
            ),
            Proxy::Towpath if self.kube_proxy.here => Some(
                "Services: Towpath serves them in front of kube-proxy, which runs here too; to end it: kubectl -n kube-system \
                 delete daemonset kube-proxy; to hand back: NetworkConfig spec.serviceProxy: auto"
                    .to_owned(),
            ),
            Proxy::Others => Some(
                "Services: Towpath serves the pods only (serviceProxy: off); this node's processes and the outside are served by \
                 whoever else is installed for it"
                    .to_owned(),
            ),
            Proxy::Towpath => None,
        };
        let dns = match in_charge.dns {
            Dns::CoreDns => Some(
                "DNS: CoreDNS answers; to hand over: kubectl -n kube-system scale deployment coredns --replicas=0 (or NetworkConfig \
                 spec.dns: towpath, first)"
                    .to_owned(),
            ),
            Dns::StandIn => Some(format!(
                "DNS: CoreDNS is in charge, {} of its {} endpoints are ready; Towpath answers until one has been for {} s",
                self.core_dns.ready,
                self.core_dns.endpoints,
                modes::SETTLED.as_secs()
            )),
            Dns::Towpath if self.core_dns.endpoints > 0 => Some(
                "DNS: Towpath answers in front of the servers behind kube-system/kube-dns; to end them: kubectl -n kube-system \
                 scale deployment coredns --replicas=0; to hand back: NetworkConfig spec.dns: auto"
                    .to_owned(),
            ),
            Dns::Others => Some("DNS: Towpath does not answer (dns: off)".to_owned()),
            Dns::Towpath => None,
        };
        proxy.into_iter().chain(dns).collect()
    }

    /// What is wrong, for people.
    pub fn problems(&self) -> Vec<String> {
        let taken = self.taken.iter().map(|(address, owner)| {
            format!(
                "DNS: {address} is the address of Service {owner}, so DNS is not answered there: correct clusterDNS in the \
                 NetworkConfig, or clusterDns in the ConfigMap kube-system/towpath"
            )
        });
        let nowhere = self.in_charge.is_some_and(|in_charge| in_charge.dns.answers_here())
            && self.dns_addresses.is_empty()
            && self.taken.is_empty();
        let nowhere = nowhere.then(|| {
            "DNS: there is no Service kube-system/kube-dns, and no clusterDNS is configured: nobody answers cluster DNS \
             (towpath install --dns towpath makes the Service)"
                .to_owned()
        });
        taken.chain(nowhere).collect()
    }
}

/// What was seen at one moment.
#[derive(Debug)]
pub struct Sight {
    kube_proxy: KubeProxy,
    core_dns: CoreDns,
    free: Vec<IpAddr>,
    taken: Vec<(IpAddr, NamespacedName)>,
}

/// Follows the world and decides.
#[derive(Debug)]
pub struct Follower {
    node: NodeName,
    modes: Modes,
    file: PathBuf,
    /// What is configured of the cluster's DNS addresses.
    cluster_dns: Vec<IpAddr>,
    /// This node's own servers.
    own_dns: Vec<IpAddr>,
    state: watch::Sender<State>,
}

impl Follower {
    /// With what is configured, and what an earlier run kept.
    pub fn new(config: &AgentConfig, node: &NodeName, own_dns: &[IpAddr]) -> Self {
        let file = config.state_dir.join("in-charge.json");
        // Damage costs no more than a first look.
        let kept = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice::<InCharge>(&text).ok());
        Self {
            node: node.clone(),
            modes: Modes::new(config.service_proxy, config.dns, kept),
            file,
            cluster_dns: config.cluster_dns.clone(),
            own_dns: own_dns.to_vec(),
            state: watch::Sender::new(State::default()),
        }
    }

    /// The state, to read and to wait for.
    pub fn state(&self) -> watch::Receiver<State> {
        self.state.subscribe()
    }

    /// Whether it is time to decide again though nothing changed.
    pub fn is_due(&self, now: Duration) -> bool {
        self.modes.next_deadline().is_some_and(|at| at <= now)
    }

    /// What the world says.
    pub fn look(&self, world: &World) -> Sight {
        let (free, taken) = modes::dns_addresses(world, &self.cluster_dns);
        Sight {
            kube_proxy: modes::kube_proxy(world, &self.node),
            core_dns: modes::core_dns(world, &self.own_dns),
            free,
            taken,
        }
    }

    /// Decides; the state, and whether who is in charge or where DNS is answered is another than before.
    pub async fn decide(&mut self, sight: Sight, now: Duration) -> (State, bool) {
        let before = self.state.borrow().clone();
        let unhealthy = self.modes.wants_health(now) && is_unhealthy().await;
        let kept = self.modes.in_charge();
        let in_charge = self.modes.decide(sight.kube_proxy, sight.core_dns, unhealthy, now);
        if kept != Some(in_charge) {
            self.keep(in_charge);
        }
        if before.in_charge != Some(in_charge) {
            info!(services = in_charge.proxy.name(), dns = in_charge.dns.name(), "in charge on this node");
        }
        let answers = in_charge.dns.answers_here();
        let state = State {
            in_charge: Some(in_charge),
            kube_proxy: sight.kube_proxy,
            core_dns: sight.core_dns,
            dns_addresses: if answers { sight.free } else { Vec::new() },
            taken: if answers { sight.taken } else { Vec::new() },
        };
        let changed = before.in_charge != state.in_charge || before.dns_addresses != state.dns_addresses;
        self.state.send_if_modified(|old| std::mem::replace(old, state.clone()) != state);
        (state, changed)
    }

    fn keep(&self, in_charge: InCharge) {
        let written = serde_json::to_vec(&in_charge)
            .map_err(std::io::Error::other)
            .and_then(|text| crate::disk::write_atomically(&self.file, &text));
        if let Err(error) = written {
            warn!(file = %self.file.display(), %error, "could not note who is in charge; a restart decides afresh");
        }
    }
}

/// Whether kube-proxy on this node says that it is not in order. Where nobody answers at all, its health is not served.
async fn is_unhealthy() -> bool {
    let asked = timeout(HEALTH_PATIENCE, async {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, HEALTHZ_PORT)).await?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
        let mut start = [0u8; 12];
        stream.read_exact(&mut start).await?;
        std::io::Result::Ok(start.starts_with(b"HTTP/1.") && start.ends_with(b" 200"))
    });
    match asked.await {
        Ok(Ok(healthy)) => !healthy,
        Ok(Err(error)) => error.kind() != std::io::ErrorKind::ConnectionRefused,
        Err(_) => true,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sight(kube_proxy: KubeProxy, core_dns: CoreDns) -> Sight {
        Sight { kube_proxy, core_dns, free: vec!["10.96.0.10".parse().unwrap()], taken: Vec::new() }
    }

    fn follower(dir: &std::path::Path) -> Follower {
        let config = AgentConfig { state_dir: dir.to_owned(), ..AgentConfig::default() };
        Follower::new(&config, &NodeName::new("n1"), &[])
    }

    const PRESENT: KubeProxy = KubeProxy { here: true, ready: true, elsewhere: false };

    #[tokio::test]
    async fn a_restart_goes_on_with_what_was_kept_and_damage_is_a_first_look() {
        let dir = tempfile::tempdir().unwrap();
        let (state, changed) =
            follower(dir.path()).decide(sight(PRESENT, CoreDns { endpoints: 2, ready: 2 }), Duration::ZERO).await;
        assert_eq!(state.in_charge, Some(InCharge { proxy: Proxy::KubeProxy, dns: Dns::CoreDns }));
        assert!(changed && state.dns_addresses.is_empty());
        let absent = || sight(KubeProxy::default(), CoreDns::default());
        let (state, _) = follower(dir.path()).decide(absent(), Duration::ZERO).await;
        assert_eq!(state.in_charge, Some(InCharge { proxy: Proxy::KubeProxy, dns: Dns::StandIn }));
        assert_eq!(state.dns_addresses.len(), 1);
        std::fs::write(dir.path().join("in-charge.json"), "{").unwrap();
        let (state, _) = follower(dir.path()).decide(absent(), Duration::ZERO).await;
        assert_eq!(state.in_charge, Some(InCharge { proxy: Proxy::Towpath, dns: Dns::Towpath }));
    }

    #[tokio::test]
    async fn what_is_said_names_who_is_in_charge_and_the_way_to_hand_over() {
        let dir = tempfile::tempdir().unwrap();
        let mut follower = follower(dir.path());
        let (state, _) = follower.decide(sight(PRESENT, CoreDns { endpoints: 2, ready: 2 }), Duration::ZERO).await;
        let hints = state.hints().join("\n");
        assert!(hints.contains("delete daemonset kube-proxy") && hints.contains("scale deployment coredns"), "{hints}");
        assert!(!state.stands_in_for_kube_proxy() && state.problems().is_empty());
        let (state, changed) =
            follower.decide(sight(PRESENT, CoreDns { endpoints: 2, ready: 0 }), Duration::ZERO).await;
        assert!(changed && state.hints().join("\n").contains("0 of its 2"));
    }

    #[tokio::test]
    async fn an_address_of_another_service_is_named_with_it() {
        let dir = tempfile::tempdir().unwrap();
        let taken = vec![("10.96.0.10".parse().unwrap(), NamespacedName::new("a", "b"))];
        let none = Sight { taken, free: Vec::new(), ..sight(KubeProxy::default(), CoreDns::default()) };
        let (state, _) = follower(dir.path()).decide(none, Duration::ZERO).await;
        assert!(state.problems().join("\n").contains("Service a/b"), "{:?}", state.problems());
        assert!(state.stands_in_for_kube_proxy());
    }
}
