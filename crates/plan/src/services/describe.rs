//! For people: which endpoint of a Service is used by whom, and why another is not. By the same choice that makes the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use towpath_model::desired::BackendAddress;
use towpath_model::{
    EndpointSlice, Family, NamespacedName, Node, NodeName, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy,
    World, family_of,
};

use super::ServiceConfig;
use super::choose::{Here, Hint, State, candidates, choose, choose_on, forbidden};

/// Whose clients: those inside the cluster (at the cluster address), or those outside (NodePorts, load balancers).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Side {
    /// Inside.
    Internal,
    /// Outside, or at an address that is for outside.
    External,
}

/// How an endpoint is, by its slices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Condition {
    /// Takes connections.
    Ready,
    /// Does not.
    NotReady,
    /// Is going away and still answers.
    Terminating,
    /// Is going away and no longer answers.
    Ended,
    /// May not be an endpoint, or cannot be one of this Service.
    Refused,
}

impl fmt::Display for Condition {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::NotReady => "not ready",
            Self::Terminating => "terminating",
            Self::Ended => "terminating, not serving",
            Self::Refused => "refused",
        })
    }
}

/// Why an endpoint takes no new connections from a node's clients.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Unused {
    /// It is not ready.
    NotReady,
    /// It is going away, and others are ready, or it no longer answers.
    Terminating,
    /// The policy is `Local`, and it is on another node.
    OtherNode,
    /// Hints mean it for clients of other nodes.
    HintedNodes,
    /// Hints mean it for clients of other zones.
    HintedZones,
    /// It may not be one: why.
    Refused(String),
}

impl fmt::Display for Unused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotReady => "not ready",
            Self::Terminating => "terminating",
            Self::OtherNode => "on another node, and the policy is Local",
            Self::HintedNodes => "hinted for other nodes",
            Self::HintedZones => "hinted for other zones",
            Self::Refused(why) => why,
        })
    }
}

/// By node: nothing where its clients use the endpoint, else why not.
pub type Uses = BTreeMap<NodeName, Option<Unused>>;

/// One endpoint of a Service port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DescribedBackend {
    /// Address, port and protocol.
    pub backend: BackendAddress,
    /// The node it is on.
    pub node: Option<NodeName>,
    /// The pod behind it.
    pub pod: Option<NamespacedName>,
    /// The slices that list it.
    pub slices: BTreeSet<String>,
    /// How it is.
    pub condition: Condition,
    /// By clients inside.
    pub internal: Uses,
    /// By clients outside, where the Service answers there.
    pub external: Uses,
}

/// The endpoints of one Service port, by address; `nodes` are those whose clients are asked about.
pub fn backends(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    nodes: &BTreeMap<NodeName, Node>,
    config: &ServiceConfig,
) -> Vec<DescribedBackend> {
    let mut described = listed(service, port, slices, config);
    let families: BTreeSet<Family> = service.cluster_ips.iter().map(|ip| family_of(*ip)).collect();
    let outside = matches!(service.kind, ServiceKind::NodePort | ServiceKind::LoadBalancer);
    for (name, node) in nodes {
        for family in &families {
            let here = Here { node: name, zone: node.zone() };
            let found = candidates(service, port, *family, slices, here, config, &mut Vec::new());
            for (side, policy) in [(Side::Internal, service.internal_policy), (Side::External, service.external_policy)]
            {
                if side == Side::External && !outside {
                    continue;
                }
                let used: BTreeSet<BackendAddress> = chosen(policy, name, &found).into_iter().collect();
                for (backend, state) in &found {
                    let unused = (!used.contains(backend)).then(|| why(policy, name, state));
                    let Some(one) = described.get_mut(backend) else { continue };
                    one.condition = condition(state);
                    let uses = if side == Side::Internal { &mut one.internal } else { &mut one.external };
                    uses.insert(name.clone(), unused);
                }
            }
        }
    }
    described.into_values().collect()
}

fn chosen(policy: TrafficPolicy, node: &NodeName, found: &BTreeMap<BackendAddress, State>) -> Vec<BackendAddress> {
    match policy {
        TrafficPolicy::Cluster => choose(found),
        TrafficPolicy::Local => choose_on(node, found),
    }
}

/// Everything that slices list for a port, refused where it is not a candidate.
fn listed(
    service: &Service,
    port: &ServicePort,
    slices: &[&EndpointSlice],
    config: &ServiceConfig,
) -> BTreeMap<BackendAddress, DescribedBackend> {
    let families: BTreeSet<Family> = service.cluster_ips.iter().map(|ip| family_of(*ip)).collect();
    let mut all: BTreeMap<BackendAddress, DescribedBackend> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter().filter(|p| p.name == port.name && p.protocol == port.protocol && p.port != 0);
        for slice_port in ports {
            for endpoint in &slice.endpoints {
                let backend =
                    BackendAddress { address: endpoint.address, port: slice_port.port, protocol: port.protocol };
                let refused = forbidden(endpoint.address, config).map(str::to_owned).or_else(|| {
                    let other = !families.contains(&family_of(endpoint.address));
                    other.then(|| "of an address family that the Service does not have".to_owned())
                });
                let refused = refused
                    .or_else(|| slice.headless.then(|| "its slice is labelled as not for service proxies".to_owned()));
                let one = all.entry(backend).or_insert_with(|| DescribedBackend {
                    backend,
                    node: None,
                    pod: None,
                    slices: BTreeSet::new(),
                    condition: Condition::Refused,
                    internal: Uses::new(),
                    external: Uses::new(),
                });
                one.node = one.node.take().or_else(|| endpoint.node.clone());
                one.pod = one.pod.take().or_else(|| endpoint.pod.as_deref().cloned());
                one.slices.insert(slice.name.name.clone());
                if let Some(why) = refused {
                    // Under the name of no node: it is refused everywhere.
                    one.internal.insert(NodeName::new(""), Some(Unused::Refused(why)));
                }
            }
        }
    }
    all
}

fn condition(state: &State) -> Condition {
    match state {
        State { ready: true, .. } => Condition::Ready,
        State { terminating: true, serving: true, .. } => Condition::Terminating,
        State { terminating: true, .. } => Condition::Ended,
        _ => Condition::NotReady,
    }
}

fn why(policy: TrafficPolicy, node: &NodeName, state: &State) -> Unused {
    if policy == TrafficPolicy::Local && state.node.as_ref() != Some(node) {
        return Unused::OtherNode;
    }
    match condition(state) {
        Condition::Terminating | Condition::Ended => Unused::Terminating,
        Condition::NotReady | Condition::Refused => Unused::NotReady,
        Condition::Ready if state.by_node == Hint::ForOthers => Unused::HintedNodes,
        Condition::Ready => Unused::HintedZones,
    }
}

/// Service ports with a policy of `Local` that have endpoints and none that this node may use: with the side and family of each.
pub fn without_local_endpoints(world: &World, node: &NodeName) -> Vec<(NamespacedName, Side, Family)> {
    let local = |service: &&Service| {
        !service.for_other_proxies()
            && [service.internal_policy, service.external_policy].contains(&TrafficPolicy::Local)
    };
    let config = ServiceConfig::default();
    let mut without = Vec::new();
    for service in world.services.values().filter(local) {
        let name = &service.name;
        let slices: Vec<&EndpointSlice> = world.slices.of(name).collect();
        let families: BTreeSet<Family> = service.cluster_ips.iter().map(|ip| family_of(*ip)).collect();
        for port in &service.ports {
            for family in &families {
                let here = Here { node, zone: None };
                let found = candidates(service, port, *family, &slices, here, &config, &mut Vec::new());
                if choose(&found).is_empty() || !choose_on(node, &found).is_empty() {
                    continue;
                }
                if service.internal_policy == TrafficPolicy::Local {
                    without.push((name.clone(), Side::Internal, *family));
                }
                let outside = matches!(service.kind, ServiceKind::NodePort | ServiceKind::LoadBalancer);
                if outside && service.external_policy == TrafficPolicy::Local {
                    without.push((name.clone(), Side::External, *family));
                }
            }
        }
    }
    without
}

/// Slices that have endpoints and not this port of their Service: `SLICE has no port NAME/PROTOCOL`.
pub fn missing_ports(port: &ServicePort, slices: &[&EndpointSlice]) -> Vec<String> {
    let has = |slice: &&&EndpointSlice| slice.ports.iter().any(|p| p.name == port.name && p.protocol == port.protocol);
    let lacking = slices.iter().filter(|slice| !slice.endpoints.is_empty() && !has(slice));
    lacking.map(|slice| format!("EndpointSlice {} has no port {}", slice.name, port_name(port))).collect()
}

/// `http/TCP`, or `80/TCP` where the port has no name.
pub fn port_name(port: &ServicePort) -> String {
    let ServicePort { name, protocol, port, .. } = port;
    let protocol: &Protocol = protocol;
    if name.is_empty() { format!("{port}/{protocol}") } else { format!("{name}/{protocol}") }
}
