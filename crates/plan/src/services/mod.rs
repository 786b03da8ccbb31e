//! Services, EndpointSlices and pods' host ports to the table a node's kernel should hold: frontends, the backends that take new
//! connections, and those that only drain.
//!
//! Incremental by Service. Ids stay with what they name ([`BackendId`] with address, port and protocol; [`ServiceId`] with
//! Service, port and traffic policy) and are not given to another within the grace period. Pure: time is an argument,
//! any monotonic count since a fixed start.

mod backends;
mod choose;
mod cluster_dns;
pub mod describe;
mod few;
mod frontends;
pub mod health;
mod host_ports;
mod ids;
mod maglev;
mod refusal;

#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::desired::{
    BackendAddress, BackendId, Clients, Frontend, FrontendTarget, ServiceChanges, ServiceId, ServiceTable,
};
use towpath_model::{EndpointSlice, NamespacedName, NodeName, NodePortAddresses, Protocol, Service, World};

use crate::Changed;
use backends::Backends;
use few::Few;
use ids::Ids;

pub use refusal::{Asks, Refusal, RefusedPart};

pub use host_ports::{OwnPods, api_server, asks, host_port_of};

/// Facts of the cluster that Services depend on.
#[derive(Clone, Debug)]
pub struct ServiceConfig {
    /// Lowest and highest NodePort; others are refused.
    pub node_ports: (u16, u16),
    /// At which of a node's addresses they answer.
    pub node_port_addresses: NodePortAddresses,
    /// Cluster DNS Service addresses, at most one a family: port 53 there always leads to `dns_addresses`.
    pub cluster_dns: Vec<IpAddr>,
    /// Node-local addresses that DNS listens on, at most one a family.
    pub dns_addresses: Vec<IpAddr>,
    /// Ranges of Service addresses: no endpoint may be in them.
    pub service_cidrs: Vec<IpNet>,
    /// Ranges that `spec.externalIPs` may name addresses in: whoever may write a Service could otherwise take over any address
    /// (CVE-2020-8554).
    pub external_cidrs: Vec<IpNet>,
    /// Whose connections Services' frontends are for; those of host ports and cluster DNS are for all.
    pub clients: Clients,
    /// How long an unused id is kept from others, and how long TCP and SCTP backends that vanished stay listed.
    pub grace: Duration,
}

impl Default for ServiceConfig {
    /// No DNS, the API's default NodePort range, a minute of grace.
    fn default() -> Self {
        Self {
            node_ports: (30000, 32767),
            node_port_addresses: NodePortAddresses::All,
            cluster_dns: Vec::new(),
            dns_addresses: Vec::new(),
            service_cidrs: Vec::new(),
            external_cidrs: Vec::new(),
            clients: Clients::All,
            grace: Duration::from_secs(60),
        }
    }
}

/// Which clients a Service port's id is for: when the policies for inside and outside differ, affinity must too.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Scope {
    Internal,
    External,
    /// A pod's host port; [`PortKey::service`] is the pod.
    HostPort,
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct PortKey {
    service: NamespacedName,
    port: String,
    protocol: Protocol,
    scope: Scope,
}

impl PortKey {
    fn asks(&self) -> Asks {
        if self.scope == Scope::HostPort { Asks::Pod } else { Asks::Service }
    }

    /// Kind and name, for people.
    fn object(&self) -> String {
        format!("{} {}", self.asks().kind(), self.service)
    }
}

/// Who wins when two ask for one frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    ClusterDns,
    ClusterIp,
    NodePort,
    LoadBalancer,
    ExternalIp,
    HostPort,
}

type Claim = (Rank, Arc<PortKey>);

/// What whoever claims a frontend has there, if it gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Claimed {
    target: Arc<FrontendTarget>,
    /// Where this node's own clients are led, if elsewhere: see [`ServiceTable::inside`].
    inside: Option<Arc<FrontendTarget>>,
    /// UDP backends that serve and take no new flows.
    lingering: BTreeSet<BackendAddress>,
}

impl From<FrontendTarget> for Claimed {
    fn from(target: FrontendTarget) -> Self {
        Self { target: Arc::new(target), inside: None, lingering: BTreeSet::new() }
    }
}

/// What one Service, or one pod with host ports, has in the table.
#[derive(Debug, Default, PartialEq, Eq)]
struct Planned {
    claims: Few<(Frontend, Claim), Claimed>,
    ports: Few<Arc<PortKey>, ()>,
    /// Backends that it leads to, each once, by id.
    held: Vec<BackendId>,
    refused: Vec<(RefusedPart, String)>,
}

impl Planned {
    /// All is there: kept for as long as nothing changes.
    fn complete(mut self) -> Self {
        self.held.sort_unstable();
        self.held.dedup();
        self.held.shrink_to_fit();
        self
    }
}

/// What an earlier run left in the kernel, until the first plan.
#[derive(Debug, Default)]
struct Adopted {
    frontends: BTreeMap<Frontend, ServiceId>,
    inside: BTreeMap<Frontend, ServiceId>,
    /// UDP backends: flows to them may go on.
    udp: BTreeSet<BackendAddress>,
}

/// What of the table was touched since [`Planner::take_changes`].
#[derive(Debug, Default)]
struct Touched {
    frontends: BTreeSet<Frontend>,
    inside: BTreeSet<Frontend>,
    lingering: BTreeSet<Frontend>,
    backends: BTreeSet<BackendId>,
}

/// Makes and keeps the [`ServiceTable`].
#[derive(Debug)]
pub struct Planner {
    config: ServiceConfig,
    planned: BTreeMap<NamespacedName, Planned>,
    planned_pods: BTreeMap<NamespacedName, Planned>,
    /// Pods with host ports; none: nobody has looked.
    asking_pods: Option<BTreeSet<NamespacedName>>,
    claims: BTreeMap<Frontend, Few<Claim, Claimed>>,
    /// Frontends that more than one asks for, or that give way to a NodePort.
    contested: BTreeSet<Frontend>,
    /// Services and pods that ask for what they do not get.
    refused: BTreeSet<(Asks, NamespacedName)>,
    /// Services that a load balancer asks nodes about.
    health_checked: BTreeSet<NamespacedName>,
    draining: BTreeMap<BackendAddress, Duration>,
    backends: Backends,
    ports: Ids<Arc<PortKey>>,
    adopted: Adopted,
    nodes: BTreeMap<NodeName, Vec<IpAddr>>,
    zone: Option<String>,
    table: ServiceTable,
    touched: Touched,
}

impl Planner {
    /// A planner that knows of nothing yet.
    pub fn new(config: ServiceConfig) -> Self {
        Self {
            backends: Backends::new(config.grace),
            ports: Ids::new(config.grace),
            config,
            planned: BTreeMap::new(),
            planned_pods: BTreeMap::new(),
            asking_pods: None,
            contested: BTreeSet::new(),
            refused: BTreeSet::new(),
            health_checked: BTreeSet::new(),
            claims: BTreeMap::new(),
            draining: BTreeMap::new(),
            adopted: Adopted::default(),
            nodes: BTreeMap::new(),
            zone: None,
            table: ServiceTable::default(),
            touched: Touched::default(),
        }
    }

    /// Takes over the ids that the kernel already has (of [`ServiceTable::backends`], `frontends` and `inside`), once, before the
    /// first plan: connections and affinity refer to them across a restart of the agent. TCP and SCTP backends among them drain for
    /// the grace period even if no Service lists them now; UDP flows to one that still serves go on.
    pub fn adopt(
        &mut self,
        backends: impl IntoIterator<Item = (BackendId, BackendAddress)>,
        frontends: impl IntoIterator<Item = (Frontend, ServiceId)>,
        inside: impl IntoIterator<Item = (Frontend, ServiceId)>,
        now: Duration,
    ) {
        for (id, backend) in backends {
            self.backends.adopt(backend, id, &self.table.backends, now);
            self.drain(backend, now);
            if backend.protocol == Protocol::Udp {
                self.adopted.udp.insert(backend);
            }
        }
        self.adopted.frontends.extend(frontends);
        self.adopted.inside.extend(inside);
        for id in self.adopted.frontends.values().chain(self.adopted.inside.values()) {
            self.ports.start_above(id.0);
        }
    }

    /// Brings the table up to date with what changed. `now` never goes back. The first call must be [`Changed::All`], and after
    /// the first [`Planner::plan_host_ports`], so that host ports keep the ids that they have in the kernel.
    pub fn plan(&mut self, world: &World, node: &NodeName, changed: Changed<'_>, now: Duration) -> &ServiceTable {
        self.sweep(now);
        let slices = changed.slices(world);
        let none: Vec<&EndpointSlice> = Vec::new();
        let names: BTreeSet<NamespacedName> = match changed {
            Changed::Services(names) => names.clone(),
            Changed::All => {
                self.nodes = world.nodes.iter().map(|(name, n)| (name.clone(), n.internal_ips.clone())).collect();
                self.zone = world.nodes.get(node).and_then(|n| n.zone()).map(str::to_owned);
                world.services.keys().chain(self.planned.keys()).cloned().collect()
            }
        };
        for name in names {
            let service = world.services.get(&name);
            let slices = slices.get(&name).unwrap_or(&none);
            self.replan(&name, service, slices, node, now);
        }
        if matches!(changed, Changed::All) {
            self.claim_cluster_dns();
            self.adopted = Adopted::default();
            if self.touched.backends.len() * 2 > self.table.backends.len() {
                // Most of it grew just now, in no order.
                self.backends.pack();
                self.table.backends = std::mem::take(&mut self.table.backends).into_iter().collect();
            }
        }
        &self.table
    }

    /// From now on Services are for these clients, whether this is another than before. What is planned is as before until
    /// [`Planner::plan`] is told [`Changed::All`].
    pub fn serve(&mut self, clients: Clients) -> bool {
        std::mem::replace(&mut self.config.clients, clients) != clients
    }

    /// From now on these are the ranges of Service addresses; whether they are others than before. What is planned is as before until
    /// [`Planner::plan`] is told [`Changed::All`].
    pub fn follow_service_ranges(&mut self, ranges: &[IpNet]) -> bool {
        let other = self.config.service_cidrs != ranges;
        self.config.service_cidrs = ranges.to_vec();
        other
    }

    /// Whose connections Services' frontends are for.
    pub fn clients(&self) -> Clients {
        self.config.clients
    }

    /// The table as last planned.
    pub fn table(&self) -> &ServiceTable {
        &self.table
    }

    /// Services that have a health check port, as planned: what [`health::plan`] is about.
    pub fn health_checked(&self) -> &BTreeSet<NamespacedName> {
        &self.health_checked
    }

    /// What became different in the table since this was last asked.
    pub fn take_changes(&mut self) -> ServiceChanges {
        let touched = std::mem::take(&mut self.touched);
        let table = &self.table;
        ServiceChanges {
            frontends: touched.frontends.into_iter().map(|f| (f, table.frontends.get(&f).cloned())).collect(),
            inside: touched.inside.into_iter().map(|f| (f, table.inside.get(&f).cloned())).collect(),
            lingering: touched.lingering.into_iter().map(|f| (f, table.lingering.get(&f).cloned())).collect(),
            backends: touched.backends.into_iter().map(|id| (id, table.backends.get(&id).copied())).collect(),
        }
    }

    /// Forgets what became different: the table is taken whole.
    pub fn forget_changes(&mut self) {
        self.touched = Touched::default();
    }

    /// When [`Planner::plan`] has something to do even if nothing changes: the next backend has drained.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.draining.values().min().copied()
    }

    /// What Services and pods ask for and do not get.
    pub fn refusals(&self) -> Vec<Refusal> {
        let own = self.refused.iter().flat_map(|(asks, name)| {
            let planned = match asks {
                Asks::Service => self.planned.get(name),
                Asks::Pod => self.planned_pods.get(name),
                // They have no frontends.
                Asks::NetworkPolicy | Asks::ClusterNetworkPolicy => None,
            };
            let reasons: BTreeSet<&(RefusedPart, String)> = planned.into_iter().flat_map(|p| &p.refused).collect();
            let refusal = |(part, reason): &(RefusedPart, String)| Refusal {
                asks: *asks,
                name: name.clone(),
                part: *part,
                reason: reason.clone(),
            };
            reasons.into_iter().map(refusal).collect::<Vec<_>>()
        });
        let contested =
            self.contested.iter().filter_map(|f| Some((f, self.claims.get(f)?))).flat_map(|(frontend, claims)| {
                let owner = self.owner(frontend);
                claims.keys().filter_map(move |(_, loser)| {
                    let owner = owner.filter(|owner| owner.object() != loser.object())?;
                    let reason = format!("{} already belongs to {}", show(frontend), owner.object());
                    let (asks, name) = (loser.asks(), loser.service.clone());
                    let part = if asks == Asks::Pod { RefusedPart::HostPort } else { RefusedPart::Frontend };
                    Some(Refusal { asks, name, part, reason })
                })
            });
        own.chain(contested).collect()
    }

    /// Who has a frontend; of a host port that a NodePort leaves no room for, the NodePort's Service.
    fn owner(&self, frontend: &Frontend) -> Option<&PortKey> {
        let any = Frontend { address: None, ..*frontend };
        let of = |frontend: &Frontend| {
            let id = self.table.frontends.get(frontend)?.id;
            let claim = self.claims.get(frontend)?.iter().find(|(_, claimed)| claimed.target.id == id);
            claim.map(|((_, key), _)| &**key)
        };
        of(frontend).or_else(|| of(&any))
    }

    fn sweep(&mut self, now: Duration) {
        let over: Vec<BackendAddress> =
            self.draining.iter().filter(|(_, until)| **until <= now).map(|(b, _)| *b).collect();
        for backend in over {
            self.draining.remove(&backend);
            if let Some(id) = self.backends.id(&backend) {
                self.unlist(id);
            }
            // Its grace starts only now: until here the table still named it.
            self.backends.retire(backend, now);
        }
        self.backends.sweep(now);
        self.ports.sweep(now);
    }

    fn replan(
        &mut self,
        name: &NamespacedName,
        service: Option<&Service>,
        slices: &[&EndpointSlice],
        node: &NodeName,
        now: Duration,
    ) {
        let new = service.map(|s| self.compute(s, slices, node)).unwrap_or_default();
        let old = if service.is_some() {
            self.planned.insert(name.clone(), Planned::default())
        } else {
            self.planned.remove(name)
        }
        .unwrap_or_default();
        self.exchange(&old, &new, now);
        self.note_refused(Asks::Service, name, &new);
        if service.is_some_and(|service| service.health_check_port.is_some()) {
            self.health_checked.insert(name.clone());
        } else {
            self.health_checked.remove(name);
        }
        if service.is_some() {
            self.planned.insert(name.clone(), new);
        }
    }

    fn note_refused(&mut self, asks: Asks, name: &NamespacedName, planned: &Planned) {
        if planned.refused.is_empty() {
            self.refused.remove(&(asks, name.clone()));
        } else {
            self.refused.insert((asks, name.clone()));
        }
    }

    /// Puts what somebody has now in the place of what it had.
    fn exchange(&mut self, old: &Planned, new: &Planned, now: Duration) {
        for id in &new.held {
            if let Some(backend) = self.backends.named(*id, &self.table.backends) {
                self.hold(backend);
            }
        }
        for id in &old.held {
            self.release(*id, now);
        }
        for key in old.ports.keys().filter(|key| !new.ports.contains_key(key)) {
            self.ports.retire(key, now);
        }
        let touched: BTreeSet<Frontend> = old.claims.keys().chain(new.claims.keys()).map(|(f, _)| *f).collect();
        for (frontend, claim) in old.claims.keys() {
            if let Some(claims) = self.claims.get_mut(frontend) {
                claims.remove(claim);
            }
        }
        for ((frontend, claim), claimed) in new.claims.iter() {
            self.claims.entry(*frontend).or_default().insert(claim.clone(), claimed.clone());
        }
        for frontend in touched {
            self.settle(frontend);
            if frontend.address.is_none() {
                self.host_ports_beside(&frontend).into_iter().for_each(|beside| self.settle(beside));
            }
        }
    }

    /// Gives a frontend to whoever has the best claim; among equals, who has it keeps it.
    fn settle(&mut self, frontend: Frontend) {
        if self.claims.get(&frontend).is_some_and(Few::is_empty) {
            self.claims.remove(&frontend);
        }
        // A NodePort is every address of the node: host ports of its number are nobody's, whatever was there first.
        let node_port = frontend.address.is_some() && self.claims.contains_key(&Frontend { address: None, ..frontend });
        let open: Vec<(Rank, &Claimed)> = self
            .claims
            .get(&frontend)
            .into_iter()
            .flat_map(Few::iter)
            .map(|((rank, _), claimed)| (*rank, claimed))
            .filter(|(rank, _)| *rank != Rank::HostPort || !node_port)
            .collect();
        let asked_for = self.claims.get(&frontend).map_or(0, Few::len);
        let held_back = open.len() < asked_for;
        let current = self.table.frontends.get(&frontend).map(|target| target.id);
        let best = open.first();
        let keeps = open
            .iter()
            .find(|(rank, claimed)| Some(claimed.target.id) == current && best.is_some_and(|(r, _)| r == rank));
        let owner = keeps.or(best).map(|(_, claimed)| *claimed);
        let lingering = owner.into_iter().flat_map(|claimed| &claimed.lingering);
        let lingering = lingering.filter_map(|backend| self.backends.id(backend));
        let lingering = Some(lingering.collect::<BTreeSet<BackendId>>()).filter(|ids| !ids.is_empty());
        let (target, inside) =
            (owner.map(|claimed| &claimed.target), owner.and_then(|claimed| claimed.inside.as_ref()));
        let (table, touched) = (&mut self.table, &mut self.touched);
        exchange(&mut table.frontends, frontend, target, &mut touched.frontends);
        exchange(&mut table.inside, frontend, inside, &mut touched.inside);
        exchange(&mut table.lingering, frontend, lingering.as_ref(), &mut touched.lingering);
        if asked_for > 1 || held_back {
            self.contested.insert(frontend);
        } else {
            self.contested.remove(&frontend);
        }
    }

    /// Puts a backend into the table.
    fn list(&mut self, id: BackendId, backend: BackendAddress) {
        self.backends.listed(id);
        if self.table.backends.insert(id, backend) != Some(backend) {
            self.touched.backends.insert(id);
        }
    }

    fn unlist(&mut self, id: BackendId) {
        if let Some(backend) = self.table.backends.remove(&id) {
            self.backends.unlisted(id, backend);
            self.touched.backends.insert(id);
        }
    }

    fn hold(&mut self, backend: BackendAddress) -> BackendId {
        let id = self.backends.take(backend, &self.table.backends);
        self.backends.hold(&backend);
        self.draining.remove(&backend);
        self.list(id, backend);
        id
    }

    fn release(&mut self, id: BackendId, now: Duration) {
        if let Some(backend) = self.backends.named(id, &self.table.backends)
            && self.backends.release(&backend)
        {
            self.drain(backend, now);
        }
    }

    /// A backend that nobody lists: open TCP and SCTP connections may live on; a UDP socket pinned to it must be released
    /// at once, or it talks to nobody for ever.
    fn drain(&mut self, backend: BackendAddress, now: Duration) {
        let Some(id) = self.backends.id(&backend) else { return };
        if backend.protocol == Protocol::Udp {
            self.unlist(id);
            self.backends.retire(backend, now);
        } else {
            self.list(id, backend);
            self.backends.take(backend, &self.table.backends);
            self.draining.insert(backend, now.saturating_add(self.config.grace));
        }
    }

    /// The id that one of these frontends has in the kernel since an earlier run.
    fn adopted_id(&self, frontends: &[Frontend]) -> Option<ServiceId> {
        frontends.iter().find_map(|frontend| self.adopted.frontends.get(frontend)).copied()
    }

    fn port_id(&mut self, key: &Arc<PortKey>, wanted: Option<ServiceId>) -> ServiceId {
        ServiceId(self.ports.take(key, wanted.map(|id| id.0)))
    }
}

/// Puts what somebody has now at a frontend in the place of what was there, and notes a difference.
fn exchange<V: Clone + PartialEq>(
    map: &mut BTreeMap<Frontend, V>,
    frontend: Frontend,
    new: Option<&V>,
    touched: &mut BTreeSet<Frontend>,
) {
    if let (Some(held), Some(new)) = (map.get_mut(&frontend), new)
        && held == new
    {
        // As it was; but one copy is shared with who asks for it.
        held.clone_from(new);
        return;
    }
    if new.is_none() && !map.contains_key(&frontend) {
        return;
    }
    touched.insert(frontend);
    match new {
        Some(new) => drop(map.insert(frontend, new.clone())),
        None => drop(map.remove(&frontend)),
    }
}

fn show(frontend: &Frontend) -> String {
    match frontend.address {
        Some(address) => format!("{} port {}/{}", address, frontend.port, frontend.protocol),
        None => format!("node port {}/{}", frontend.port, frontend.protocol),
    }
}
