//! The world to the DNS feed: a snapshot first, then what differs, a Service at a time.

use std::collections::BTreeSet;
use std::net::IpAddr;

use towpath_model::{Endpoint, EndpointSlice, NamespacedName, Phase, Pod, Protocol, Service, ServiceKind, World};
use towpath_wire::dns::{DnsAnswer, DnsEndpoint, DnsPod, DnsPort, DnsRules, DnsService, FeedMessage, Shared};

use super::records::Records;
use crate::{Changed, ChangedPods};

/// Remembers what was fed and says what to feed next.
#[derive(Debug)]
pub struct FeedPlanner {
    domain: String,
    rules: Option<DnsRules>,
    fed: Option<Records>,
}

impl FeedPlanner {
    /// A planner for a cluster domain such as `cluster.local`.
    pub fn new(domain: impl Into<String>) -> Self {
        Self { domain: domain.into(), rules: None, fed: None }
    }

    /// The cluster's domain.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// What to send so that the other side knows these rules; empty when it does, or before the first snapshot, which then has them.
    pub fn configure(&mut self, rules: DnsRules) -> Vec<FeedMessage> {
        let message = FeedMessage::Rules { rules: rules.clone() };
        let news = self.fed.as_mut().is_some_and(|fed| {
            let news = fed.rules() != Some(&rules);
            fed.apply(message.clone());
            news
        });
        self.rules = Some(rules);
        if news { vec![message] } else { Vec::new() }
    }

    /// What to send so that the other side knows this world: first a snapshot (whatever else is said), then the
    /// differences among the Services concerned and, if pods or namespaces changed too, among those. Empty when nothing differs.
    pub fn plan(&mut self, world: &World, changed: Changed<'_>, places: Option<ChangedPods<'_>>) -> Vec<FeedMessage> {
        let Some(fed) = &mut self.fed else {
            let snapshot = snapshot(world, &self.domain, self.rules.clone());
            let mut records = Records::default();
            records.apply(snapshot.clone());
            self.fed = Some(records);
            return vec![snapshot];
        };
        let mut messages = Vec::new();
        let places = if matches!(changed, Changed::All) { Some(ChangedPods::All) } else { places };
        if let Some(pods) = places {
            messages.extend(place_changes(world, fed, pods));
        }
        messages.extend(service_changes(world, changed, fed));
        for message in &messages {
            fed.apply(message.clone());
        }
        messages
    }
}

fn snapshot(world: &World, domain: &str, rules: Option<DnsRules>) -> FeedMessage {
    let slices = Changed::All.slices(world);
    let services = world
        .services
        .values()
        .filter_map(|service| dns_service(service, slices.get(&service.name).map(Vec::as_slice).unwrap_or_default()))
        .map(Shared::from);
    FeedMessage::Snapshot {
        domain: domain.to_owned(),
        services: services.collect(),
        namespaces: world.namespaces.keys().cloned().collect(),
        pods: all_pods(world).flat_map(|(namespace, addresses)| dns_pods(namespace, addresses)).collect(),
        rules,
    }
}

fn place_changes(world: &World, fed: &Records, pods: ChangedPods<'_>) -> Vec<FeedMessage> {
    let mut messages = Vec::new();
    let namespaces: BTreeSet<String> = world.namespaces.keys().cloned().collect();
    if namespaces != *fed.namespaces() {
        messages.push(FeedMessage::Namespaces { namespaces: namespaces.into_iter().collect() });
    }
    let (mut set, mut remove) = (Vec::new(), Vec::new());
    let none = BTreeSet::new();
    let mut compare = |namespace: &str, addresses: &[IpAddr]| {
        let known = fed.pods().get(namespace).unwrap_or(&none);
        if !known.iter().eq(addresses) {
            let gone = known.iter().filter(|address| addresses.binary_search(address).is_err());
            remove.extend(dns_pods(namespace, gone.copied()));
            set.extend(dns_pods(namespace, addresses.iter().filter(|address| !known.contains(*address)).copied()));
        }
    };
    match pods {
        ChangedPods::All => {
            let there: BTreeSet<&str> = all_pods(world)
                .map(|(namespace, addresses)| {
                    compare(namespace, &addresses);
                    namespace
                })
                .collect();
            fed.pods()
                .keys()
                .filter(|namespace| !there.contains(namespace.as_str()))
                .for_each(|gone| compare(gone, &[]));
        }
        ChangedPods::These(names) => {
            let namespaces: BTreeSet<&str> = names.iter().map(|name| name.namespace.as_str()).collect();
            namespaces.into_iter().for_each(|namespace| compare(namespace, &addresses_in(world, namespace)));
        }
    }
    if !set.is_empty() || !remove.is_empty() {
        messages.push(FeedMessage::Pods { set, remove });
    }
    messages
}

fn service_changes(world: &World, changed: Changed<'_>, fed: &Records) -> Vec<FeedMessage> {
    let slices = changed.slices(world);
    let names: BTreeSet<(String, String)> = match changed {
        Changed::Services(names) => names.iter().map(|n| (n.namespace.clone(), n.name.clone())).collect(),
        Changed::All => world
            .services
            .keys()
            .map(|n| (n.namespace.clone(), n.name.clone()))
            .chain(fed.services().map(|s| (s.namespace.clone(), s.name.clone())))
            .collect(),
    };
    let mut messages = Vec::new();
    for (namespace, name) in names {
        let key = NamespacedName::new(&namespace, &name);
        let of_service = slices.get(&key).map(Vec::as_slice).unwrap_or_default();
        let new = world.services.get(&key).and_then(|service| dns_service(service, of_service));
        match (new, fed.service(&namespace, &name)) {
            (Some(new), old) if old != Some(&new) => messages.push(FeedMessage::Set { service: new.into() }),
            (None, Some(_)) => messages.push(FeedMessage::Remove { namespace, name }),
            _ => {}
        }
    }
    messages
}

/// Pods that have a name by address, all that have not ended: by namespace, their addresses sorted, each once.
fn all_pods(world: &World) -> impl Iterator<Item = (&str, Vec<IpAddr>)> {
    let mut pods = world.pods.values().filter(|pod| pod.phase != Phase::Terminated).peekable();
    std::iter::from_fn(move || {
        // Pods of a namespace come one after the other.
        let namespace = pods.peek()?.name.namespace.as_str();
        Some((namespace, sorted(std::iter::from_fn(|| pods.next_if(|pod| pod.name.namespace == namespace)))))
    })
}

/// The same of one namespace.
fn addresses_in(world: &World, namespace: &str) -> Vec<IpAddr> {
    let from = world.pods.range(NamespacedName::new(namespace, "")..);
    let pods = from.map(|(_, pod)| pod).take_while(|pod| pod.name.namespace == namespace);
    sorted(pods.filter(|pod| pod.phase != Phase::Terminated))
}

fn sorted<'a>(pods: impl Iterator<Item = &'a Pod>) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = pods.flat_map(|pod| pod.ips.iter().copied()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

fn dns_pods(namespace: &str, addresses: impl IntoIterator<Item = IpAddr>) -> impl Iterator<Item = DnsPod> {
    addresses.into_iter().map(move |address| DnsPod { namespace: namespace.to_owned(), address })
}

/// What DNS says of a Service; none while it has no address yet.
fn dns_service(service: &Service, slices: &[&EndpointSlice]) -> Option<DnsService> {
    let answer = match &service.kind {
        ServiceKind::ExternalName(target) => {
            DnsAnswer::Alias { target: target.trim_end_matches('.').to_ascii_lowercase() }
        }
        ServiceKind::Headless => DnsAnswer::Endpoints { endpoints: endpoints(service, slices, |_| true) },
        ServiceKind::ClusterIp | ServiceKind::NodePort | ServiceKind::LoadBalancer => {
            if service.cluster_ips.is_empty() {
                return None;
            }
            DnsAnswer::ClusterIps {
                addresses: service.cluster_ips.clone(),
                ports: service.ports.iter().map(|p| dns_port(&p.name, p.protocol, p.port)).collect(),
                endpoints: endpoints(service, slices, |endpoint| endpoint.hostname.is_some()),
            }
        }
    };
    Some(DnsService { namespace: service.name.namespace.clone(), name: service.name.name.clone(), answer })
}

/// The endpoints of a Service that have a name and are ready (or not, with `publishNotReadyAddresses`), in a stable order.
fn endpoints(service: &Service, slices: &[&EndpointSlice], has_name: impl Fn(&Endpoint) -> bool) -> Vec<DnsEndpoint> {
    let mut endpoints: Vec<DnsEndpoint> = Vec::new();
    for slice in slices {
        let ports: Vec<DnsPort> = slice.ports.iter().map(|p| dns_port(&p.name, p.protocol, p.port)).collect();
        for endpoint in &slice.endpoints {
            if has_name(endpoint) && (endpoint.conditions.ready || service.publish_not_ready) {
                endpoints.push(DnsEndpoint {
                    address: endpoint.address,
                    hostname: endpoint.hostname.as_ref().map(|h| h.to_ascii_lowercase()),
                    ports: ports.clone(),
                });
            }
        }
    }
    endpoints.sort_by(|a, b| (a.address, &a.hostname).cmp(&(b.address, &b.hostname)));
    endpoints.dedup();
    endpoints
}

fn dns_port(name: &str, protocol: Protocol, port: u16) -> DnsPort {
    DnsPort { name: name.to_ascii_lowercase(), protocol: protocol.to_string().to_ascii_lowercase(), port }
}
