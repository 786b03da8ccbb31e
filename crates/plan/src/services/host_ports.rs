//! Host ports: a pod's ports that its node answers on too, as entries of the same table.
//!
//! A host port without an address is every address of the pod's node, loopback among them; with one, it must be an address of
//! that node. Every node's table has the entries for all nodes' own addresses, so that a socket anywhere in the cluster
//! talks to the pod from its first packet on; loopback entries are those of this node alone. Two pods that ask for the
//! same do not get both; a NodePort of that number comes first, because the API server gave it to a Service for good.
//!
//! Who may make a pod may write any number. What the node and the cluster live by is refused: the addresses at which the API
//! server is reached (or every agent's connection to it would go to that pod), kubelet's ports, ours, health checks of Services, and
//! addresses that another node has, too. And a pod is only where its node's ranges are.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use towpath_model::desired::{BackendAddress, Frontend, FrontendTarget};
use towpath_model::{Endpoint, Family, HostPort, NamespacedName, NodeName, Pod, Protocol, World, family_of};

use super::frontends::target_of_one;
use crate::ChangedPods;

use super::{Asks, Planned, Planner, PortKey, Rank, RefusedPart, Scope};

/// TCP ports of kubelet (API, health) and of the agent (kube-proxy's status and health, metrics).
const OF_THE_NODE: [u16; 5] = [10250, 10248, 10249, 10256, 9116];

/// What host ports may not take.
struct Reserved {
    /// Where the API servers are.
    api: BTreeSet<(IpAddr, u16)>,
    /// Health check ports of Services.
    health: BTreeSet<u16>,
    /// Which nodes say that an address is theirs.
    nodes: BTreeMap<IpAddr, BTreeSet<NodeName>>,
}

impl Reserved {
    fn of(world: &World) -> Self {
        let api = api_server();
        let reached = world.slices.of(&api).flat_map(|slice| {
            let at = |e: &Endpoint| slice.ports.iter().map(|p| (e.address, p.port)).collect::<Vec<_>>();
            slice.endpoints.iter().flat_map(at)
        });
        let health = world.services.values().filter_map(|service| service.health_check_port);
        let mut nodes: BTreeMap<IpAddr, BTreeSet<NodeName>> = BTreeMap::new();
        for node in world.nodes.values() {
            for address in &node.internal_ips {
                nodes.entry(*address).or_default().insert(node.name.clone());
            }
        }
        Self { api: reached.collect(), health: health.collect(), nodes }
    }

    /// Why a host port there may not be had.
    fn why(&self, on: &NodeName, local: bool, front: IpAddr, port: &HostPort) -> Option<&'static str> {
        // A kubelet writes its node's addresses: with another node's among them it would have that node's connections.
        let others = || self.nodes.get(&front).into_iter().flatten().any(|node| node != on);
        if !local && others() {
            return Some("is an address of another node, too");
        }
        if port.protocol != Protocol::Tcp {
            return None;
        }
        if OF_THE_NODE.contains(&port.port) || self.api.contains(&(front, port.port)) {
            return Some("answers for the node or the API server there");
        }
        self.health.contains(&port.port).then_some("answers health checks of a Service there")
    }
}

/// The Service whose endpoints are the API servers.
pub fn api_server() -> NamespacedName {
    NamespacedName::new("default", "kubernetes")
}

/// What the port names of host ports in the table begin with: no name of a Service's port has a space.
const NAME: &str = "hostPort ";

/// Which host port a target of the table is, in words (`hostPort 8088 on 192.0.2.1`); its `service` is then the pod. None: it is a
/// Service's.
pub fn host_port_of(target: &FrontendTarget) -> Option<&str> {
    Some(target.port_name.as_str()).filter(|name| asks(name) == Asks::Pod)
}

/// What asked for a port of the table that has this name.
pub fn asks(port_name: &str) -> Asks {
    if port_name.starts_with(NAME) { Asks::Pod } else { Asks::Service }
}

/// Addresses of this node's pods as CNI ADD gave them: known before the API has them in `status.podIPs`.
pub type OwnPods = BTreeMap<NamespacedName, Vec<IpAddr>>;

impl Planner {
    /// Brings the host ports of all pods up to date, of which these may be others; whether the table changed. `now` never goes back.
    pub fn plan_host_ports(
        &mut self,
        world: &World,
        pods: ChangedPods<'_>,
        node: &NodeName,
        own: &OwnPods,
        now: Duration,
    ) -> bool {
        self.follow_asking(world, pods);
        let with_ports = self.asking_pods.clone().unwrap_or_default();
        let gone: Vec<NamespacedName> =
            self.planned_pods.keys().filter(|name| !with_ports.contains(*name)).cloned().collect();
        if gone.is_empty() && with_ports.is_empty() {
            return false;
        }
        let reserved = Reserved::of(world);
        let mut changed = false;
        for name in gone.into_iter().chain(with_ports) {
            let pod = world.pods.get(&name).filter(|pod| !pod.host_ports.is_empty() && pod.on_pod_network());
            let new = pod.map(|pod| self.compute_host_ports(pod, world, &reserved, node, own)).unwrap_or_default();
            let empty = Planned::default();
            let old = self.planned_pods.get(&name).unwrap_or(&empty);
            if *old == new {
                continue;
            }
            changed = true;
            let old = self.planned_pods.remove(&name).unwrap_or_default();
            self.exchange(&old, &new, now);
            self.note_refused(Asks::Pod, &name, &new);
            if pod.is_some() {
                self.planned_pods.insert(name, new);
            }
        }
        changed
    }

    /// Keeps in mind which pods have host ports: few of many, which need not be asked each time.
    fn follow_asking(&mut self, world: &World, pods: ChangedPods<'_>) {
        let asks = |pod: &&Pod| !pod.host_ports.is_empty() && pod.on_pod_network();
        match (&mut self.asking_pods, pods) {
            (Some(asking), ChangedPods::These(names)) => {
                for name in names {
                    match world.pods.get(name).filter(asks) {
                        Some(_) => drop(asking.insert(name.clone())),
                        None => drop(asking.remove(name)),
                    }
                }
            }
            (asking, _) => *asking = Some(world.pods.values().filter(asks).map(|pod| pod.name.clone()).collect()),
        }
    }

    fn compute_host_ports(
        &mut self,
        pod: &Pod,
        world: &World,
        reserved: &Reserved,
        node: &NodeName,
        own: &OwnPods,
    ) -> Planned {
        let mut planned = Planned::default();
        let Some(on) = &pod.node else { return planned };
        let local = on == node;
        let Some(host) = world.nodes.get(on) else { return planned };
        let (node_addresses, ranges) = (host.internal_ips.as_slice(), host.pod_cidrs.as_slice());
        let addresses = if local { own_addresses(pod, own) } else { &*pod.ips };
        for port in &pod.host_ports {
            let fronts = match front_addresses(port, node_addresses, local) {
                Ok(fronts) => fronts,
                Err(address) => {
                    let number = port.port;
                    planned.refused.push((
                        RefusedPart::HostPort,
                        format!("hostPort {number}: hostIP {address} is not an address of node {on}"),
                    ));
                    continue;
                }
            };
            for front in fronts {
                if let Some(why) = reserved.why(on, local, front, port) {
                    planned.refused.push((RefusedPart::HostPort, format!("hostPort {}: {front} {why}", port.port)));
                    continue;
                }
                let of_family = |a: &&IpAddr| family_of(**a) == family_of(front);
                let Some(back) = addresses.iter().find(of_family) else { continue };
                if !ranges.iter().any(|range| range.contains(back)) {
                    let number = port.port;
                    planned.refused.push((
                        RefusedPart::HostPort,
                        format!("hostPort {number}: {back} is not in the pod ranges of node {on}"),
                    ));
                    continue;
                }
                let backend = BackendAddress { address: *back, port: port.container_port, protocol: port.protocol };
                self.claim_host_port(pod, port, front, backend, &mut planned);
            }
        }
        planned.complete()
    }

    fn claim_host_port(
        &mut self,
        pod: &Pod,
        port: &HostPort,
        front: IpAddr,
        backend: BackendAddress,
        planned: &mut Planned,
    ) {
        let frontend =
            Frontend { address: Some(front), family: family_of(front), port: port.port, protocol: port.protocol };
        let key = Arc::new(PortKey {
            service: pod.name.clone(),
            port: format!("{NAME}{} on {front}", port.port),
            protocol: port.protocol,
            scope: Scope::HostPort,
        });
        let backend = self.backends.take(backend, &self.table.backends);
        let id = self.port_id(&key, self.adopted_id(&[frontend]));
        let target = target_of_one(id, backend, &key);
        planned.ports.insert(key.clone(), ());
        planned.held.push(backend);
        planned.claims.insert((frontend, (Rank::HostPort, key)), target.into());
    }

    /// How many host ports the pods of a node have in the table, each once, on however many addresses.
    pub fn count_host_ports(&self, world: &World, node: &NodeName) -> usize {
        let here = |name: &NamespacedName| world.pods.get(name).is_some_and(|pod| pod.node.as_ref() == Some(node));
        let mut count = 0;
        for (name, planned) in self.planned_pods.iter().filter(|(name, _)| here(name)) {
            let frontends = planned.claims.keys().map(|(frontend, _)| frontend);
            let had = frontends.filter(|f| self.table.frontends.get(f).is_some_and(|target| target.service == *name));
            count += had.map(|frontend| (frontend.port, frontend.protocol)).collect::<BTreeSet<_>>().len();
        }
        count
    }

    /// The host ports that wait for what a NodePort (`frontend`) leaves, or have to make room for it.
    pub(super) fn host_ports_beside(&self, frontend: &Frontend) -> Vec<Frontend> {
        let same = |f: &Frontend| {
            f.address.is_some() && (f.family, f.port, f.protocol) == (frontend.family, frontend.port, frontend.protocol)
        };
        self.planned_pods.values().flat_map(|p| p.claims.keys()).map(|(f, _)| *f).filter(same).collect()
    }
}

/// Where a pod of this node is reached. Its lease comes first, but for a name that two sandboxes have at the moment.
fn own_addresses<'a>(pod: &'a Pod, own: &'a OwnPods) -> &'a [IpAddr] {
    match own.get(&pod.name) {
        Some(leased) => {
            let once = |family: Family| leased.iter().filter(|a| family_of(**a) == family).count() <= 1;
            if once(Family::V4) && once(Family::V6) { leased } else { &pod.ips }
        }
        None if pod.terminating => &[],
        None => &pod.ips,
    }
}

/// The addresses that a host port is answered on in this node's table; `Err`: its `hostIP` is not the node's.
fn front_addresses(port: &HostPort, node: &[IpAddr], local: bool) -> Result<Vec<IpAddr>, IpAddr> {
    let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
    let every = || node.iter().copied().chain(loopback.into_iter().filter(|_| local));
    match port.address {
        None => Ok(every().collect()),
        Some(any) if any.is_unspecified() => Ok(every().filter(|a| family_of(*a) == family_of(any)).collect()),
        Some(own) if own.is_loopback() => Ok(if local { vec![own] } else { Vec::new() }),
        Some(own) if node.contains(&own) => Ok(vec![own]),
        Some(other) => Err(other),
    }
}
