//! What one Service asks for: its frontends, and the backends that each of them leads to on this node.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use towpath_model::desired::{Algorithm, BackendAddress, BackendId, Clients, Frontend, FrontendTarget, ServiceId};
use towpath_model::{
    EndpointSlice, Family, NodeName, Protocol, Service, ServiceKind, ServicePort, TrafficPolicy, family_of,
};

use super::choose::{Here, State, candidates, choose, choose_on};
use super::{Claimed, Planned, Planner, PortKey, Rank, RefusedPart, Scope, maglev};

/// Leads to one backend, whichever way clients are spread.
pub(super) fn target_of_one(id: ServiceId, backend: BackendId, key: &PortKey) -> FrontendTarget {
    FrontendTarget {
        id,
        backends: vec![backend],
        algorithm: Algorithm::default(),
        table: Arc::default(),
        affinity_seconds: None,
        clients: Clients::All,
        sources: None,
        service: key.service.clone(),
        port_name: key.port.clone(),
    }
}

impl Planner {
    /// All that a Service has in the table.
    pub(super) fn compute(&mut self, service: &Service, slices: &[&EndpointSlice], node: &NodeName) -> Planned {
        let mut planned = Planned::default();
        let no_address = matches!(service.kind, ServiceKind::Headless | ServiceKind::ExternalName(_));
        if no_address || service.for_other_proxies() {
            return planned;
        }
        planned.refused = service.misunderstood.iter().map(|what| (RefusedPart::Field, what.clone())).collect();
        for port in &service.ports {
            let wishes = self.wishes(service, port, &mut planned.refused);
            let families: BTreeSet<Family> = wishes.iter().map(|(f, _)| f.family).collect();
            for family in families {
                let here = Here { node, zone: self.zone.as_deref() };
                let found = candidates(service, port, family, slices, here, &self.config, &mut planned.refused);
                let wishes: Vec<&(Frontend, Rank)> = wishes.iter().filter(|(f, _)| f.family == family).collect();
                let going_on = self.compute_family(service, port, &found, &wishes, node, &mut planned);
                if service.external_policy == TrafficPolicy::Local {
                    self.compute_inside(service, port, &found, &wishes, &mut planned);
                    self.compute_other_nodes(service, port, (&found, &going_on), &wishes, node, &mut planned);
                }
            }
        }
        planned.complete()
    }

    /// For clients of a cluster address and of addresses outside. Which backends have connections that go on.
    fn compute_family(
        &mut self,
        service: &Service,
        port: &ServicePort,
        found: &BTreeMap<BackendAddress, State>,
        wishes: &[&(Frontend, Rank)],
        node: &NodeName,
        planned: &mut Planned,
    ) -> BTreeSet<BackendAddress> {
        // Connections to an endpoint that takes no new ones go on: TCP while it is listed at all, UDP while it serves.
        let goes_on = |(backend, state): (&BackendAddress, &State)| {
            let usable = backend.protocol != Protocol::Udp || state.serving;
            let in_use = self.backends.is_held(backend) || self.draining.contains_key(backend);
            // An earlier run had it: which of its frontends led there, nobody knows.
            let was_in_use = self.adopted.udp.contains(backend);
            (usable && (in_use || was_in_use)).then_some(*backend)
        };
        let going_on: BTreeSet<BackendAddress> = found.iter().filter_map(goes_on).collect();
        let differ = service.external_policy != service.internal_policy;
        for (scope, policy) in [(Scope::Internal, service.internal_policy), (Scope::External, service.external_policy)]
        {
            let of_scope = |rank: Rank| (rank > Rank::ClusterIp) == (scope == Scope::External);
            let frontends: Vec<Frontend> = wishes.iter().filter(|(_, r)| of_scope(*r)).map(|(f, _)| *f).collect();
            if frontends.is_empty() {
                continue;
            }
            let chosen = match policy {
                TrafficPolicy::Cluster => choose(found),
                TrafficPolicy::Local => choose_on(node, found),
            };
            let lingering = lingering(port, &going_on, &chosen);
            let key = Arc::new(PortKey {
                service: service.name.clone(),
                port: port.name.clone(),
                protocol: port.protocol,
                scope: if differ { scope } else { Scope::Internal },
            });
            let wanted = self.adopted_id(&frontends);
            let target = Arc::new(self.target(service, port, &key, wanted, &chosen));
            planned.held.extend(&target.backends);
            planned.ports.insert(key.clone(), ());
            for (frontend, rank) in wishes.iter().filter(|(_, r)| of_scope(*r)) {
                let sources = service.source_ranges.as_deref().filter(|_| *rank == Rank::LoadBalancer);
                let target = match sources {
                    Some(sources) => {
                        Arc::new(FrontendTarget { sources: Some(Arc::from(sources)), ..(*target).clone() })
                    }
                    None => target.clone(),
                };
                let claimed = Claimed { target, inside: None, lingering: lingering.clone() };
                planned.claims.insert((*frontend, (*rank, key.clone())), claimed);
            }
        }
        planned.held.extend(going_on.iter().map(|backend| self.backends.take(*backend, &self.table.backends)));
        going_on
    }

    /// Where the frontends of `key` lead; `wanted`: the id that it gets if it has none yet.
    fn target(
        &mut self,
        service: &Service,
        port: &ServicePort,
        key: &Arc<PortKey>,
        wanted: Option<ServiceId>,
        chosen: &[BackendAddress],
    ) -> FrontendTarget {
        let mut backends: Vec<BackendId> =
            chosen.iter().map(|b| self.backends.take(*b, &self.table.backends)).collect();
        let table = if service.algorithm.hashes() {
            // By address, as on every other node, where ids are others.
            let mut sorted: Vec<(&BackendAddress, BackendId)> = chosen.iter().zip(backends.iter().copied()).collect();
            sorted.sort_unstable();
            let addresses: Vec<BackendAddress> = sorted.iter().map(|(address, _)| **address).collect();
            maglev::table(&addresses).into_iter().filter_map(|index| Some(sorted.get(index)?.1)).collect()
        } else {
            Arc::default()
        };
        backends.sort_unstable();
        FrontendTarget {
            id: self.port_id(key, wanted),
            backends,
            algorithm: service.algorithm,
            table,
            affinity_seconds: service.affinity_seconds,
            clients: self.config.clients,
            sources: None,
            service: service.name.clone(),
            port_name: port.name.clone(),
        }
    }

    /// What is for outside, with a policy of `Local`, for clients of this node: all endpoints, as for a cluster address.
    fn compute_inside(
        &mut self,
        service: &Service,
        port: &ServicePort,
        found: &BTreeMap<BackendAddress, State>,
        wishes: &[&(Frontend, Rank)],
        planned: &mut Planned,
    ) {
        for (frontend, rank) in wishes.iter().filter(|(_, rank)| *rank > Rank::ClusterIp) {
            // The same as at the cluster address, and so the same id, unless that has only this node's endpoints too.
            let same = service.internal_policy == TrafficPolicy::Cluster;
            let key = Arc::new(PortKey {
                service: service.name.clone(),
                port: if same { port.name.clone() } else { format!("{} inside", port.name) },
                protocol: port.protocol,
                scope: Scope::Internal,
            });
            let chosen = choose(found);
            let wanted = self.adopted.inside.get(frontend).copied();
            let sources = service.source_ranges.as_deref().filter(|_| *rank == Rank::LoadBalancer).map(Arc::from);
            let target = FrontendTarget { sources, ..self.target(service, port, &key, wanted, &chosen) };
            planned.held.extend(&target.backends);
            planned.ports.insert(key, ());
            if let Some((_, claimed)) = planned.claims.iter_mut().find(|((claimed, _), _)| claimed == frontend) {
                claimed.inside = Some(Arc::new(target));
            }
        }
    }

    /// NodePorts with a policy of `Local` at the addresses of other nodes: who asks for one of these means that node's
    /// endpoints and not this one's, wherever the connection is translated. Nodes without endpoints need no entry: what is
    /// sent there goes there, and is refused there.
    fn compute_other_nodes(
        &mut self,
        service: &Service,
        port: &ServicePort,
        (found, going_on): (&BTreeMap<BackendAddress, State>, &BTreeSet<BackendAddress>),
        wishes: &[&(Frontend, Rank)],
        node: &NodeName,
        planned: &mut Planned,
    ) {
        let others: BTreeSet<&NodeName> =
            found.values().filter_map(|state| state.node.as_ref()).filter(|other| *other != node).collect();
        for (wish, rank) in wishes.iter().filter(|(frontend, _)| frontend.address.is_none()) {
            for other in &others {
                let answers = |a: &&IpAddr| self.config.node_port_addresses.has(**a, true);
                let of_family = |a: &&IpAddr| family_of(**a) == wish.family;
                let address = self.nodes.get(*other).into_iter().flatten().filter(answers).find(of_family);
                let (Some(address), chosen) = (address.copied(), choose_on(other, found)) else { continue };
                if chosen.is_empty() {
                    continue;
                }
                let frontend = Frontend { address: Some(address), ..*wish };
                let key = Arc::new(PortKey {
                    service: service.name.clone(),
                    port: format!("{} on {other}", port.name),
                    protocol: port.protocol,
                    scope: Scope::External,
                });
                let lingering = lingering(port, going_on, &chosen);
                let wanted = self.adopted_id(&[frontend]);
                let target = Arc::new(self.target(service, port, &key, wanted, &chosen));
                planned.held.extend(&target.backends);
                planned.ports.insert(key.clone(), ());
                planned.claims.insert((frontend, (*rank, key)), Claimed { target, inside: None, lingering });
            }
        }
    }

    /// The frontends a port asks for and may have.
    fn wishes(
        &self,
        service: &Service,
        port: &ServicePort,
        refused: &mut Vec<(RefusedPart, String)>,
    ) -> Vec<(Frontend, Rank)> {
        let at = |address: Option<IpAddr>, family: Family, number: u16| Frontend {
            address,
            family,
            port: number,
            protocol: port.protocol,
        };
        let mut wishes = Vec::new();
        let mut refuse = |reason: String| refused.push((RefusedPart::Frontend, reason));
        for ip in &service.cluster_ips {
            wishes.push((at(Some(*ip), family_of(*ip), port.port), Rank::ClusterIp));
        }
        let outside = matches!(service.kind, ServiceKind::NodePort | ServiceKind::LoadBalancer);
        if let Some(number) = port.node_port.filter(|_| outside) {
            let (low, high) = self.config.node_ports;
            if (low..=high).contains(&number) {
                let families: BTreeSet<Family> = service.cluster_ips.iter().map(|ip| family_of(*ip)).collect();
                wishes.extend(families.into_iter().map(|family| (at(None, family, number), Rank::NodePort)));
            } else {
                refuse(format!("nodePort {number} is outside {low}-{high}"));
            }
        }
        if service.kind == ServiceKind::LoadBalancer {
            for ip in &service.load_balancer_ips {
                match self.not_for_everybody(*ip) {
                    None => wishes.push((at(Some(*ip), family_of(*ip), port.port), Rank::LoadBalancer)),
                    Some(reason) => refuse(format!("load balancer address {ip}: {reason}")),
                }
            }
        }
        for ip in &service.external_ips {
            let allowed = self.config.external_cidrs.iter().any(|range| range.contains(ip));
            match self.not_for_everybody(*ip).filter(|_| allowed) {
                _ if !allowed => refuse(format!(
                    "external address {ip} is in none of the ranges that NetworkConfig allows (spec.externalCIDRs)"
                )),
                None => wishes.push((at(Some(*ip), family_of(*ip), port.port), Rank::ExternalIp)),
                Some(reason) => refuse(format!("external address {ip}: {reason}")),
            }
        }
        wishes
    }

    /// Who can write a Service or its status must not take over an address that others already answer on.
    fn not_for_everybody(&self, ip: IpAddr) -> Option<&'static str> {
        if self.nodes.values().any(|addresses| addresses.contains(&ip)) {
            return Some("the address of a node");
        }
        if self.config.cluster_dns.contains(&ip) || self.config.dns_addresses.contains(&ip) {
            return Some("the address of cluster DNS");
        }
        if self.config.service_cidrs.iter().any(|range| range.contains(&ip)) {
            return Some("in the range of Services' own addresses");
        }
        let link_local = match ip {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        if ip.is_loopback() || ip.is_multicast() || ip.is_unspecified() || link_local {
            return Some("not an address that can be reached from outside");
        }
        None
    }
}

/// UDP backends that take no new flows of a frontend and keep those that they have.
fn lingering(
    port: &ServicePort,
    going_on: &BTreeSet<BackendAddress>,
    chosen: &[BackendAddress],
) -> BTreeSet<BackendAddress> {
    if port.protocol != Protocol::Udp {
        return BTreeSet::new();
    }
    let taken: BTreeSet<BackendAddress> = chosen.iter().copied().collect();
    going_on.difference(&taken).copied().collect()
}
