//! Who is in charge of Services and of cluster DNS on a node, where another program (kube-proxy, CoreDNS) may be.
//!
//! What is fixed (`towpath`, `off`) holds at once. With `auto` the other program stays in charge where it is seen:
//!
//! - **kube-proxy**, by its pod on this very node. A pod that is there in whatever state keeps it in charge: its rules stay in the
//!   kernel while it restarts, is rolled or is pulled. Only when there has been no such pod on the node for [`GONE`] is it gone for
//!   good (a DaemonSet makes the next pod within a second or two of the last one's end, also on a node that cannot run it yet), and
//!   Towpath takes over. It gets the node back when its pod has been ready for [`SETTLED`] and does not call itself unhealthy.
//!   At a first start, a node without the pod in a cluster that has such pods is given [`GONE`], too: it may just have joined.
//! - **CoreDNS**, by the endpoints of `kube-system/kube-dns`. While none of them is ready this node's own server stands in at once,
//!   because nobody else would answer; it gives the address back when one has been ready for [`SETTLED`].
//!
//! Neither change breaks a connection or loses an answer (the data path keeps what is open where it was translated), so the
//! delays only keep the answer to "who is in charge?" from flapping. Pure: time is an argument, any monotonic count.

use std::net::IpAddr;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use towpath_model::custom::NodeNetworkStatus;
use towpath_model::desired::Clients;
use towpath_model::{NamespacedName, NodeName, Phase, Pod, World};
use towpath_wire::config::Duty;

/// The other program has not been seen for so long: it is gone for good.
pub const GONE: Duration = Duration::from_secs(30);
/// The other program has been ready for so long: it has done its first full sync.
pub const SETTLED: Duration = Duration::from_secs(10);

/// Namespace of kube-proxy, CoreDNS and their Service.
const SYSTEM: &str = "kube-system";
/// Name of kube-proxy's DaemonSet, and its label's value.
const KUBE_PROXY: &str = "kube-proxy";

/// Who serves the node's own processes and the outside.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Towpath.
    Towpath,
    /// kube-proxy.
    KubeProxy,
    /// Whoever else: Towpath was told not to (`off`).
    Others,
}

impl Proxy {
    /// Whose connections Towpath's frontends are for.
    pub fn clients(self) -> Clients {
        match self {
            Self::Towpath => Clients::All,
            Self::KubeProxy | Self::Others => Clients::Pods,
        }
    }

    /// Its name for people and in `NodeNetwork`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Towpath => "towpath",
            Self::KubeProxy => "kube-proxy",
            Self::Others => "others",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Towpath, Self::KubeProxy, Self::Others].into_iter().find(|one| one.name() == name)
    }
}

/// Who answers cluster DNS.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Dns {
    /// Towpath.
    Towpath,
    /// The endpoints of `kube-system/kube-dns`.
    CoreDns,
    /// They are in charge, but none is ready: Towpath answers meanwhile.
    StandIn,
    /// Whoever else: Towpath was told not to (`off`).
    Others,
}

impl Dns {
    /// Whether this node's own server answers.
    pub fn answers_here(self) -> bool {
        matches!(self, Self::Towpath | Self::StandIn)
    }

    /// Its name for people and in `NodeNetwork`.
    pub fn name(self) -> &'static str {
        match self {
            Self::Towpath => "towpath",
            Self::CoreDns => "coredns",
            Self::StandIn => "stand-in",
            Self::Others => "others",
        }
    }

    fn named(name: &str) -> Option<Self> {
        [Self::Towpath, Self::CoreDns, Self::StandIn, Self::Others].into_iter().find(|one| one.name() == name)
    }
}

/// Who is in charge on a node. What is kept across restarts of the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct InCharge {
    /// Of Services.
    pub proxy: Proxy,
    /// Of cluster DNS.
    pub dns: Dns,
}

impl InCharge {
    /// What a node's `NodeNetwork` says of it; none: not yet, or in words of another version.
    pub fn said(status: &NodeNetworkStatus) -> Option<Self> {
        Some(Self { proxy: Proxy::named(status.service_proxy.as_ref()?)?, dns: Dns::named(status.dns.as_ref()?)? })
    }

    /// What an agent decides at a first look, of which nothing is known but what is configured and what the API has.
    pub fn at_first_look(service_proxy: Duty, dns: Duty, seen: KubeProxy, servers: CoreDns) -> Self {
        Modes::new(service_proxy, dns, None).decide(seen, servers, false, Duration::ZERO)
    }
}

/// kube-proxy as a node sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KubeProxy {
    /// A pod of it is bound to this node, in whatever state.
    pub here: bool,
    /// That pod is ready, and not being deleted.
    pub ready: bool,
    /// Another node has one.
    pub elsewhere: bool,
}

/// CoreDNS as a node sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CoreDns {
    /// Endpoints of `kube-system/kube-dns` that are not Towpath's own servers.
    pub endpoints: usize,
    /// Those that are ready.
    pub ready: usize,
}

/// The Service whose addresses kubelets give to pods for DNS.
pub fn dns_service() -> NamespacedName {
    NamespacedName::new(SYSTEM, "kube-dns")
}

/// Whether a pod is kube-proxy: kubeadm's DaemonSet, anything of that DaemonSet, or a static pod. Who may make pods in `kube-system`
/// may do worse things.
fn is_kube_proxy(pod: &Pod) -> bool {
    let labelled = |key: &str| pod.labels.get(key).is_some_and(|value| value == KUBE_PROXY);
    let owned = pod.daemon_set.as_deref() == Some(KUBE_PROXY);
    pod.phase != Phase::Terminated && (owned || labelled("k8s-app") || labelled("component"))
}

/// kube-proxy as `node` sees it.
pub fn kube_proxy(world: &World, node: &NodeName) -> KubeProxy {
    let mut seen = KubeProxy::default();
    let system = world.pods.range(NamespacedName::new(SYSTEM, "")..).map(|(_, pod)| pod);
    for pod in system.take_while(|pod| pod.name.namespace == SYSTEM).filter(|pod| is_kube_proxy(pod)) {
        if pod.node.as_ref() == Some(node) {
            seen.here = true;
            seen.ready |= pod.ready && !pod.terminating;
        } else {
            seen.elsewhere |= pod.node.is_some();
        }
    }
    seen
}

/// CoreDNS, or whatever else is behind `kube-system/kube-dns`. `own`: addresses of Towpath's servers.
pub fn core_dns(world: &World, own: &[IpAddr]) -> CoreDns {
    let service = dns_service();
    let mut seen = CoreDns::default();
    let slices = world.slices.range(NamespacedName::new(SYSTEM, "")..).map(|(_, slice)| slice);
    for slice in slices.take_while(|slice| slice.name.namespace == SYSTEM).filter(|slice| slice.service == service) {
        for endpoint in slice.endpoints.iter().filter(|endpoint| !own.contains(&endpoint.address)) {
            seen.endpoints += 1;
            seen.ready += usize::from(endpoint.conditions.ready && !endpoint.conditions.terminating);
        }
    }
    seen
}

/// The addresses that DNS is to be answered at (`wanted`; none: those of `kube-system/kube-dns`), but for those that another Service
/// has: they come second, with that Service. It stays whose it is.
pub fn dns_addresses(world: &World, wanted: &[IpAddr]) -> (Vec<IpAddr>, Vec<(IpAddr, NamespacedName)>) {
    let service = dns_service();
    let of_service = || world.services.get(&service).map(|s| s.cluster_ips.clone()).unwrap_or_default();
    let wanted = if wanted.is_empty() { of_service() } else { wanted.to_vec() };
    let mut taken = Vec::new();
    let free = wanted.into_iter().filter(|address| {
        let owner = world.services.values().find(|s| s.name != service && s.cluster_ips.contains(address));
        taken.extend(owner.map(|owner| (*address, owner.name.clone())));
        owner.is_none()
    });
    let free = free.collect();
    (free, taken)
}

/// Since when something has been so without a break.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Since(Option<Duration>);

impl Since {
    /// Notes whether it is so now; for how long it has been.
    fn note(&mut self, so: bool, now: Duration) -> Option<Duration> {
        self.0 = if so { Some(self.0.unwrap_or(now)) } else { None };
        self.0.map(|since| now.saturating_sub(since))
    }

    fn until(&self, time: Duration) -> Option<Duration> {
        self.0.map(|since| since.saturating_add(time))
    }
}

/// Decides, and remembers what a decision needs.
#[derive(Clone, Debug)]
pub struct Modes {
    service_proxy: Duty,
    dns: Duty,
    /// None before the first look when nothing was kept.
    now: Option<InCharge>,
    kube_proxy_gone: Since,
    kube_proxy_ready: Since,
    core_dns_gone: Since,
    core_dns_ready: Since,
}

impl Modes {
    /// With what is wanted, and who was in charge when this node's agent last ran.
    pub fn new(service_proxy: Duty, dns: Duty, kept: Option<InCharge>) -> Self {
        Self {
            service_proxy,
            dns,
            now: kept,
            kube_proxy_gone: Since::default(),
            kube_proxy_ready: Since::default(),
            core_dns_gone: Since::default(),
            core_dns_ready: Since::default(),
        }
    }

    /// Who is in charge as last decided.
    pub fn in_charge(&self) -> Option<InCharge> {
        self.now
    }

    /// Whether only kube-proxy's own word on its health is missing before it gets Services back.
    pub fn wants_health(&self, now: Duration) -> bool {
        self.service_proxy == Duty::Auto
            && self.now.is_some_and(|in_charge| in_charge.proxy == Proxy::Towpath)
            && self.kube_proxy_ready.until(SETTLED).is_some_and(|at| at <= now)
    }

    /// Decides anew. `unhealthy`: kube-proxy on this node says of itself that it is not in order.
    pub fn decide(&mut self, proxy: KubeProxy, dns: CoreDns, unhealthy: bool, now: Duration) -> InCharge {
        let decided = InCharge { proxy: self.decide_proxy(proxy, unhealthy, now), dns: self.decide_dns(dns, now) };
        self.now = Some(decided);
        decided
    }

    fn decide_proxy(&mut self, seen: KubeProxy, unhealthy: bool, now: Duration) -> Proxy {
        let gone = self.kube_proxy_gone.note(!seen.here, now);
        let ready = self.kube_proxy_ready.note(seen.here && seen.ready, now);
        match self.service_proxy {
            Duty::Towpath => return Proxy::Towpath,
            Duty::Off => return Proxy::Others,
            Duty::Auto => {}
        }
        let before = match self.now.map(|in_charge| in_charge.proxy) {
            Some(Proxy::Towpath) => Proxy::Towpath,
            Some(Proxy::KubeProxy) => Proxy::KubeProxy,
            // Nothing was decided by looking yet.
            Some(Proxy::Others) | None if seen.here || seen.elsewhere => Proxy::KubeProxy,
            Some(Proxy::Others) | None => Proxy::Towpath,
        };
        match before {
            Proxy::Towpath if ready.is_some_and(|time| time >= SETTLED) && !unhealthy => Proxy::KubeProxy,
            Proxy::KubeProxy if gone.is_some_and(|time| time >= GONE) => Proxy::Towpath,
            before => before,
        }
    }

    fn decide_dns(&mut self, seen: CoreDns, now: Duration) -> Dns {
        let gone = self.core_dns_gone.note(seen.endpoints == 0, now);
        let ready = self.core_dns_ready.note(seen.ready > 0, now);
        match self.dns {
            Duty::Towpath => return Dns::Towpath,
            Duty::Off => return Dns::Others,
            Duty::Auto => {}
        }
        let Some(ready) = ready else {
            let was_theirs = matches!(self.now.map(|in_charge| in_charge.dns), Some(Dns::CoreDns | Dns::StandIn));
            let stays_theirs = seen.endpoints > 0 || (was_theirs && gone.is_some_and(|time| time < GONE));
            return if stays_theirs { Dns::StandIn } else { Dns::Towpath };
        };
        match self.now.map(|in_charge| in_charge.dns) {
            Some(Dns::Towpath | Dns::StandIn) if ready < SETTLED => Dns::StandIn,
            _ => Dns::CoreDns,
        }
    }

    /// When to decide again though nothing is seen to change.
    pub fn next_deadline(&self) -> Option<Duration> {
        let in_charge = self.now?;
        let proxy = match (self.service_proxy, in_charge.proxy) {
            (Duty::Auto, Proxy::KubeProxy) => self.kube_proxy_gone.until(GONE),
            (Duty::Auto, Proxy::Towpath) => self.kube_proxy_ready.until(SETTLED),
            _ => None,
        };
        let dns = match (self.dns, in_charge.dns) {
            (Duty::Auto, Dns::StandIn) => {
                self.core_dns_ready.until(SETTLED).into_iter().chain(self.core_dns_gone.until(GONE)).min()
            }
            _ => None,
        };
        proxy.into_iter().chain(dns).min()
    }
}

#[cfg(test)]
mod tests;
