//! What is said of a Service, made of the world and of what nodes count. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use serde::Serialize;
use towpath_model::desired::Frontend;
use towpath_model::{
    EndpointSlice, NamespacedName, NodeName, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy, World,
    family_of,
};
use towpath_plan::Changed;
use towpath_plan::modes::Proxy;
use towpath_plan::services::describe::{self, Condition, DescribedBackend, Unused, Uses};
use towpath_plan::services::{Asks, Planner};

use super::announcers::Announcer;
use super::nodes::Counted;
use crate::configured::Configured;

/// Port of DNS (RFC 1035 4.2).
const DNS_PORT: u16 = 53;
/// Why clients of a node do not use its own server of DNS.
const OTHER_DNS: &str = "its node answers no cluster DNS";
/// State of the server of DNS that every node has.
const OWN_DNS: &str = "node's own DNS";

/// One Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct ServiceView {
    /// Its namespace.
    pub(super) namespace: String,
    /// Its name.
    pub(super) name: String,
    /// `ClusterIP`, `NodePort`, `LoadBalancer`, `Headless` or `ExternalName`.
    #[serde(rename = "type")]
    pub(super) kind: &'static str,
    /// Cluster addresses.
    #[serde(rename = "clusterIPs")]
    pub(super) cluster_ips: Vec<IpAddr>,
    /// Addresses of load balancers.
    #[serde(rename = "loadBalancerIPs")]
    pub(super) load_balancer_ips: Vec<IpAddr>,
    /// Who announces them, if that is Towpath's to do and was asked.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) announced: Vec<Announcer>,
    /// `spec.internalTrafficPolicy`.
    pub(super) internal_traffic_policy: &'static str,
    /// `spec.externalTrafficPolicy`.
    pub(super) external_traffic_policy: &'static str,
    /// Of ClientIP affinity; none: there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) session_affinity_seconds: Option<u32>,
    /// How a backend is chosen.
    pub(super) algorithm: &'static str,
    /// Who may use its load balancer addresses; none: everybody.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) load_balancer_source_ranges: Option<Vec<String>>,
    /// Why no node has it in its tables, if none has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) not_served: Option<String>,
    /// Its ports.
    pub(super) ports: Vec<PortView>,
    /// Addresses of `spec.externalIPs`, allowed or not.
    #[serde(rename = "externalIPs", skip_serializing_if = "Vec::is_empty")]
    pub(super) external_ips: Vec<IpAddr>,
    /// What it asks for and does not get.
    pub(super) refused: Vec<String>,
    /// Who else serves Services to nodes' own processes and to the outside, and where.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) others_serve: Vec<String>,
    /// What is assumed, because it is not known here.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) notes: Vec<String>,
    /// Nodes whose connections are counted; none: nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) counted_on: Option<Vec<String>>,
    /// What is not counted, and why.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) not_counted: Vec<String>,
}

/// One port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct PortView {
    /// Its name; empty: the only one.
    pub(super) name: String,
    /// Its protocol.
    pub(super) protocol: Protocol,
    /// Its number.
    pub(super) port: u16,
    /// Its NodePort.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node_port: Option<u16>,
    /// Where it is reached, as nodes have it: `10.96.0.1:80`, `node port 30080`.
    pub(super) frontends: Vec<String>,
    /// Its endpoints.
    pub(super) backends: Vec<BackendView>,
    /// What is odd about it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) notes: Vec<String>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct BackendView {
    /// Its address.
    pub(super) address: IpAddr,
    /// Its port.
    pub(super) port: u16,
    /// The node it is on.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) node: Option<String>,
    /// The pod behind it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) pod: Option<String>,
    /// Slices that list it; none: it is no endpoint any more.
    pub(super) slices: BTreeSet<String>,
    /// `ready`, `not ready`, `terminating`, `terminating, not serving`, `refused`; `draining`: no endpoint any more, and connections
    /// to it are open; `node's own DNS`: no endpoint, but the server that every node has.
    pub(super) state: String,
    /// By clients inside.
    pub(super) inside: UseView,
    /// By clients outside; none: it is not reached from there.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) outside: Option<UseView>,
    /// Open connections through this Service port; none: nobody was asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) connections: Option<u64>,
}

/// Whose clients use an endpoint.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct UseView {
    /// Nodes whose clients do.
    pub(super) used_by: Vec<String>,
    /// Why those of others do not, by reason.
    pub(super) unused: BTreeMap<String, Vec<String>>,
    /// Whether it is refused, or no endpoint, for everybody alike.
    #[serde(skip)]
    pub(super) everywhere: bool,
}

impl UseView {
    fn of(uses: &Uses) -> Self {
        let mut view = Self::default();
        for (node, unused) in uses {
            match unused {
                None => view.used_by.push(node.to_string()),
                Some(why) => {
                    let nodes = view.unused.entry(why.to_string()).or_default();
                    if matches!(why, Unused::Refused(_)) {
                        view.everywhere = true;
                    } else {
                        nodes.push(node.to_string());
                    }
                }
            }
        }
        view
    }

    fn nobody(why: &str) -> Self {
        Self { unused: [(why.to_owned(), Vec::new())].into(), everywhere: true, ..Self::default() }
    }
}

impl ServiceView {
    /// Whether it has addresses, and a port that leads to nothing from any node.
    pub(super) fn leads_nowhere(&self) -> bool {
        self.not_served.is_none()
            && self.ports.iter().any(|port| port.backends.iter().all(|one| one.inside.used_by.is_empty()))
    }

    /// Endpoints that somebody uses, and all.
    pub(super) fn endpoints(&self) -> (usize, usize) {
        let used = |one: &&BackendView| {
            !one.inside.used_by.is_empty() || one.outside.as_ref().is_some_and(|outside| !outside.used_by.is_empty())
        };
        let listed = |one: &&BackendView| !one.slices.is_empty() || one.state == OWN_DNS;
        let all: Vec<&BackendView> = self.ports.iter().flat_map(|port| &port.backends).filter(listed).collect();
        (all.iter().copied().filter(|one| used(one)).count(), all.len())
    }

    /// Open connections of all ports, if anybody was asked.
    pub(super) fn connections(&self) -> Option<u64> {
        let all = self.ports.iter().flat_map(|port| &port.backends);
        self.counted_on.is_some().then(|| all.filter_map(|one| one.connections).sum())
    }
}

/// Makes views of a world's Services.
pub(super) struct Views<'a> {
    world: &'a World,
    configured: Configured,
    refused: BTreeMap<NamespacedName, Vec<String>>,
    frontends: BTreeMap<NamespacedName, Vec<Frontend>>,
    counted: Option<&'a Counted>,
}

impl<'a> Views<'a> {
    pub(super) fn new(world: &'a World, configured: Configured, counted: Option<&'a Counted>) -> Self {
        // Frontends are the same on all nodes, whatever they lead to.
        let place = world.nodes.keys().next().cloned().unwrap_or_else(|| NodeName::new(""));
        let mut planner = Planner::new(configured.services_on(&place));
        planner.plan(world, &place, Changed::All, Duration::ZERO);
        let mut frontends: BTreeMap<NamespacedName, Vec<Frontend>> = BTreeMap::new();
        for (frontend, target) in &planner.table().frontends {
            frontends.entry(target.service.clone()).or_default().push(*frontend);
        }
        let mut refused: BTreeMap<NamespacedName, Vec<String>> = BTreeMap::new();
        for refusal in planner.refusals() {
            if refusal.asks == Asks::Service {
                refused.entry(refusal.name).or_default().push(refusal.reason);
            }
        }
        Self { world, configured, refused, frontends, counted }
    }

    /// What is assumed of all of them, for people.
    pub(super) fn notes(&self) -> &[String] {
        self.configured.notes()
    }

    pub(super) fn of(&self, service: &Service) -> ServiceView {
        let mut ports: Vec<PortView> = service.ports.iter().map(|port| self.port(service, port)).collect();
        let not_served = not_served(service);
        if not_served.is_some() {
            ports.iter_mut().for_each(|port| port.frontends.clear());
        }
        ServiceView {
            namespace: service.name.namespace.clone(),
            name: service.name.name.clone(),
            kind: match service.kind {
                ServiceKind::ClusterIp => "ClusterIP",
                ServiceKind::Headless => "Headless",
                ServiceKind::NodePort => "NodePort",
                ServiceKind::LoadBalancer => "LoadBalancer",
                ServiceKind::ExternalName(_) => "ExternalName",
            },
            cluster_ips: service.cluster_ips.clone(),
            load_balancer_ips: service.load_balancer_ips.clone(),
            announced: Vec::new(),
            external_ips: service.external_ips.clone(),
            internal_traffic_policy: policy(service.internal_policy),
            external_traffic_policy: policy(service.external_policy),
            session_affinity_seconds: service.affinity_seconds,
            algorithm: service.algorithm.name(),
            load_balancer_source_ranges: service
                .source_ranges
                .as_ref()
                .map(|ranges| ranges.iter().map(ToString::to_string).collect()),
            others_serve: if not_served.is_none() { self.others() } else { Vec::new() },
            notes: self.notes().to_vec(),
            not_served,
            ports,
            refused: self.refused.get(&service.name).cloned().unwrap_or_default(),
            counted_on: self.counted.map(|counted| counted.nodes.iter().cloned().collect()),
            not_counted: self.counted.map(|counted| counted.incomplete.clone()).unwrap_or_default(),
        }
    }

    fn port(&self, service: &Service, port: &ServicePort) -> PortView {
        let slices: Vec<&EndpointSlice> = self.world.slices.of(&service.name).collect();
        let described = describe::backends(service, port, &slices, &self.world.nodes, self.configured.services());
        let open = self.open(service, port);
        let mut backends: Vec<BackendView> = described.iter().map(|one| backend(one, open.as_ref())).collect();
        backends.extend(self.own_dns(service, port, open.as_ref()));
        let known: BTreeSet<(IpAddr, u16)> = backends.iter().map(|one| (one.address, one.port)).collect();
        for (at, count) in open.iter().flatten().filter(|(at, _)| !known.contains(&(at.ip(), at.port()))) {
            backends.push(draining(*at, *count));
        }
        PortView {
            name: port.name.clone(),
            protocol: port.protocol,
            port: port.port,
            node_port: port.node_port,
            frontends: self.frontends_of(service, port),
            backends,
            notes: describe::missing_ports(port, &slices),
        }
    }

    fn frontends_of(&self, service: &Service, port: &ServicePort) -> Vec<String> {
        let ours = |frontend: &&Frontend| {
            frontend.protocol == port.protocol
                && match frontend.address {
                    // A node's address with a NodePort is that NodePort where the policy is `Local`.
                    Some(ip) => frontend.port == port.port && !self.is_node(ip),
                    None => Some(frontend.port) == port.node_port,
                }
        };
        let shown = |frontend: &Frontend| match frontend.address {
            Some(ip) => SocketAddr::new(ip, frontend.port).to_string(),
            None => format!("node port {}", frontend.port),
        };
        let all = self.frontends.get(&service.name).into_iter().flatten().filter(ours);
        let mut all: Vec<&Frontend> = all.collect();
        all.sort_by_key(|frontend| frontend.address.is_none());
        let mut shown: Vec<String> = all.into_iter().map(shown).collect();
        // Both families have the NodePort.
        shown.dedup();
        shown
    }

    /// Each node's own server, where that answers at a Service's address.
    fn own_dns(
        &self,
        service: &Service,
        port: &ServicePort,
        open: Option<&BTreeMap<SocketAddr, u64>>,
    ) -> Vec<BackendView> {
        let (here, elsewhere): (Vec<&NodeName>, Vec<&NodeName>) =
            self.world.nodes.keys().partition(|node| self.configured.answers_dns(node));
        let ours = |ip: &&IpAddr| !here.is_empty() && port.port == DNS_PORT && self.configured.dns_at().contains(ip);
        let families = service.cluster_ips.iter().filter(ours).map(|ip| family_of(*ip));
        let at = families.filter_map(|family| self.configured.own_dns().iter().find(|ip| family_of(**ip) == family));
        let view = |ip: &IpAddr| BackendView {
            address: *ip,
            port: DNS_PORT,
            node: None,
            pod: None,
            slices: BTreeSet::new(),
            state: OWN_DNS.to_owned(),
            inside: UseView {
                used_by: here.iter().map(ToString::to_string).collect(),
                unused: if elsewhere.is_empty() {
                    BTreeMap::new()
                } else {
                    [(OTHER_DNS.to_owned(), elsewhere.iter().map(ToString::to_string).collect())].into()
                },
                ..UseView::default()
            },
            outside: None,
            connections: open.map(|open| open.get(&SocketAddr::new(*ip, DNS_PORT)).copied().unwrap_or(0)),
        };
        at.map(view).collect()
    }

    /// Who else serves, and on which nodes.
    fn others(&self) -> Vec<String> {
        let on = |proxy: Proxy| -> Vec<String> {
            let in_charge = |node: &&NodeName| self.configured.in_charge(node).is_some_and(|who| who.proxy == proxy);
            self.world.nodes.keys().filter(in_charge).map(ToString::to_string).collect()
        };
        [(Proxy::KubeProxy, "kube-proxy serves"), (Proxy::Others, "whoever is installed for it serves")]
            .into_iter()
            .map(|(proxy, who)| (on(proxy), who))
            .filter(|(nodes, _)| !nodes.is_empty())
            .map(|(nodes, who)| {
                format!(
                    "on {}, {who} nodes' own processes and the outside; Towpath the pods",
                    super::show::nodes(&nodes)
                )
            })
            .collect()
    }

    fn is_node(&self, ip: IpAddr) -> bool {
        self.world.nodes.values().any(|node| node.internal_ips.contains(&ip))
    }

    /// Open connections of a port by backend; none: nobody was asked.
    fn open(&self, service: &Service, port: &ServicePort) -> Option<BTreeMap<SocketAddr, u64>> {
        let addresses: BTreeSet<&IpAddr> =
            service.cluster_ips.iter().chain(&service.load_balancer_ips).chain(&service.external_ips).collect();
        let ours = |at: &SocketAddr| {
            (at.port() == port.port && addresses.contains(&at.ip()))
                || (Some(at.port()) == port.node_port && !self.is_service(at.ip()))
        };
        let named = port.protocol.to_string();
        let mut open: BTreeMap<SocketAddr, u64> = BTreeMap::new();
        for ((protocol, at, backend), count) in &self.counted?.open {
            if *protocol == named && ours(at) {
                *open.entry(*backend).or_default() += count;
            }
        }
        Some(open)
    }

    fn is_service(&self, ip: IpAddr) -> bool {
        self.world.services.values().any(|s| s.cluster_ips.contains(&ip) || s.load_balancer_ips.contains(&ip))
    }
}

fn policy(policy: TrafficPolicy) -> &'static str {
    match policy {
        TrafficPolicy::Cluster => "Cluster",
        TrafficPolicy::Local => "Local",
    }
}

fn not_served(service: &Service) -> Option<String> {
    match &service.kind {
        ServiceKind::Headless => Some("headless: DNS leads to the endpoints themselves".to_owned()),
        ServiceKind::ExternalName(name) => Some(format!("a DNS alias of {name}")),
        _ if service.for_other_proxies() => Some("its labels say that it is for another proxy".to_owned()),
        _ => None,
    }
}

fn backend(one: &DescribedBackend, open: Option<&BTreeMap<SocketAddr, u64>>) -> BackendView {
    let at = SocketAddr::new(one.backend.address, one.backend.port);
    let refused = one.condition == Condition::Refused;
    BackendView {
        address: one.backend.address,
        port: one.backend.port,
        node: one.node.as_ref().map(ToString::to_string),
        pod: one.pod.as_ref().map(ToString::to_string),
        slices: one.slices.clone(),
        state: one.condition.to_string(),
        inside: UseView::of(&one.internal),
        outside: (!one.external.is_empty() && !refused).then(|| UseView::of(&one.external)),
        connections: open.map(|open| open.get(&at).copied().unwrap_or(0)),
    }
}

/// What no slice lists any more, while connections to it are open.
fn draining(at: SocketAddr, count: u64) -> BackendView {
    BackendView {
        address: at.ip(),
        port: at.port(),
        node: None,
        pod: None,
        slices: BTreeSet::new(),
        state: "draining".to_owned(),
        inside: UseView::nobody("no endpoint any more"),
        outside: None,
        connections: Some(count),
    }
}
