//! Who there is: workloads with pods that policy cannot tell apart, and nodes, each with addresses to ask about.
//!
//! Pods of one workload whose labels differ only in keys that no selector looks at (`pod-template-hash`, a StatefulSet's pod name) are
//! one [`Endpoint`]; where policy does tell them apart, the workload has several. Pods of manifests have no address yet: each
//! endpoint is given one of the pod ranges, outside of every `ipBlock` that lies within them where there is room.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;
use towpath_model::{Direction, Family, Labels, NamedPort, NamespacedName, Phase, World, family_of};

use super::addresses::{Addresses, address, number};
use super::clauses::{Namespaces, PeerSet, Tiers};
use super::ranges::Ranges;

/// What owns pods: a Deployment, a StatefulSet …, or a pod by itself.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize)]
pub struct Workload {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its kind, as `kubectl` writes it in lower case: `deployment`.
    pub kind: String,
}

impl fmt::Display for Workload {
    /// `shop/deployment/web`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.namespace, self.kind, self.name)
    }
}

/// Which workload a pod belongs to. A pod that is not in it is a workload by itself.
pub type Owners = BTreeMap<NamespacedName, Workload>;

/// Pods of one workload that policy cannot tell apart, or a node.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Who it is.
    pub who: Who,
    /// The labels of one of its pods, or of the node.
    pub labels: Labels,
    /// Its named ports, sorted.
    pub named_ports: Vec<NamedPort>,
    /// An address a family, of one of its pods or of the node.
    pub addresses: Vec<IpAddr>,
    /// Its pods, the one with those addresses first. None of a node.
    pub pods: Vec<NamespacedName>,
}

/// Who an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Who {
    /// A workload; the number tells those of its pods apart that policy tells apart.
    Workload(Workload, usize),
    /// A node, by name.
    Node(String),
}

impl Endpoint {
    /// Its namespace; none of a node.
    pub fn namespace(&self) -> Option<&str> {
        match &self.who {
            Who::Workload(workload, _) => Some(&workload.namespace),
            Who::Node(_) => None,
        }
    }

    /// Its address of a family.
    pub fn address(&self, family: Family) -> Option<IpAddr> {
        self.addresses.iter().copied().find(|ip| family_of(*ip) == family)
    }
}

/// Everybody, and the world to ask the evaluator about them.
#[derive(Clone, Debug)]
pub struct Universe {
    /// As given, with an address for every pod.
    pub world: World,
    /// Workloads by name, then nodes.
    pub endpoints: Vec<Endpoint>,
    /// Where pods have their addresses.
    pub pod_ranges: Vec<IpNet>,
    /// What is outside: in no pod's range, and no address of a node.
    pub outside: Addresses,
    /// Workloads on their nodes' addresses, which NetworkPolicy does not apply to.
    pub on_nodes: Vec<Workload>,
    /// Pods that had no address and were given one.
    pub placed: usize,
    /// Blocks that lie within the pod ranges: with them it matters which address a pod gets.
    pub inner_blocks: usize,
}

/// The pod range that Towpath is installed with.
pub const DEFAULT_POD_RANGE: &str = "10.244.0.0/16";

impl Universe {
    /// Works out who there is. Without `pod_ranges`: those of the nodes, else [`DEFAULT_POD_RANGE`].
    pub fn of(mut world: World, owners: &Owners, pod_ranges: &[IpNet]) -> Self {
        let pod_ranges = match pod_ranges {
            [] => ranges_of(&world),
            given => given.to_vec(),
        };
        let ranges = Addresses::of_all(&pod_ranges);
        let cuts = |block: &Addresses| !block.0.is_disjoint(&ranges.0) && !splits_by_family(block, &ranges);
        let inner: Vec<Addresses> = distinct_blocks(&world).into_iter().filter(cuts).collect();
        let placed = place(&mut world, &pod_ranges, &inner);
        let (mut endpoints, on_nodes) = workloads(&world, owners, &inner);
        endpoints.extend(world.nodes.values().filter(|node| !node.internal_ips.is_empty()).map(|node| Endpoint {
            who: Who::Node(node.name.to_string()),
            labels: node.labels.clone(),
            named_ports: Vec::new(),
            addresses: node.internal_ips.clone(),
            pods: Vec::new(),
        }));
        let of_nodes = world.nodes.values().flat_map(towpath_model::Node::addresses);
        let outside = Addresses::all().without(&ranges);
        let held: Vec<IpAddr> = world.pods.values().flat_map(|pod| &pod.ips).copied().chain(of_nodes).collect();
        let held = Addresses(Ranges::collect(held.into_iter().map(|ip| (number(ip), number(ip)))));
        let inner_blocks = inner.len();
        Self { outside: outside.without(&held), world, endpoints, pod_ranges, on_nodes, placed, inner_blocks }
    }
}

/// The nodes' pod ranges, merged where they make up a larger one; else what Towpath is installed with.
pub fn ranges_of(world: &World) -> Vec<IpNet> {
    let all: Vec<IpNet> = world.nodes.values().flat_map(|node| node.pod_cidrs.clone()).collect();
    if all.is_empty() {
        return DEFAULT_POD_RANGE.parse().into_iter().collect();
    }
    Addresses::of_all(&all).prefixes()
}

/// Whether a block holds all or nothing of the ranges of each family: then every pod is the same to it.
fn splits_by_family(block: &Addresses, ranges: &Addresses) -> bool {
    [Family::V4, Family::V6].into_iter().all(|family| {
        let own = ranges.and(&Addresses::of_family(family));
        own.0.is_disjoint(&block.0) || own.0.is_within(&block.0)
    })
}

fn distinct_blocks(world: &World) -> BTreeSet<Addresses> {
    let mut blocks = BTreeSet::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for clause in Tiers::of(world, direction).clauses() {
            if let PeerSet::Addresses(block) = &clause.peer {
                blocks.insert(block.clone());
            }
        }
    }
    blocks
}

/// Gives an address of each family of the ranges to pods without one. Returns how many pods.
fn place(world: &mut World, ranges: &[IpNet], inner: &[Addresses]) -> usize {
    let within = Addresses::of_all(ranges);
    let mut taken: BTreeSet<u128> = world.pods.values().flat_map(|pod| &pod.ips).map(|ip| number(*ip)).collect();
    let blocked = Ranges::collect(inner.iter().flat_map(|block| block.0.iter()));
    let mut sources: Vec<Vec<Box<dyn Iterator<Item = u128>>>> = Vec::new();
    for family in [Family::V4, Family::V6] {
        let own = within.and(&Addresses::of_family(family));
        if own.is_empty() {
            continue;
        }
        // The network's own address first of all ranges is nobody's.
        let own = own.0.without(&Ranges::collect(own.0.iter().map(|(first, _)| (first, first))));
        let free: Vec<(u128, u128)> = own.without(&blocked).iter().collect();
        let rest: Vec<(u128, u128)> = own.and(&blocked).iter().collect();
        let numbers = |list: Vec<(u128, u128)>| -> Box<dyn Iterator<Item = u128>> {
            Box::new(list.into_iter().flat_map(|(first, last)| first..=last))
        };
        sources.push(vec![numbers(free), numbers(rest)]);
    }
    let mut placed = 0;
    for pod in world.pods.values_mut().filter(|pod| pod.ips.is_empty() && !pod.host_network) {
        for source in &mut sources {
            let next = source.iter_mut().flatten().find(|number| taken.insert(*number));
            pod.ips.extend(next.map(address));
        }
        placed += usize::from(!pod.ips.is_empty());
    }
    placed
}

/// The label keys that selectors look at in pods.
fn keys_of(world: &World) -> BTreeSet<String> {
    let mut keys = BTreeSet::new();
    for direction in [Direction::Ingress, Direction::Egress] {
        for set in Tiers::of(world, direction).pod_sets() {
            keys.extend(set.pods.requirements().map(|r| r.key().to_owned()));
        }
    }
    keys
}

/// What policy sees of a pod: two pods of a namespace with the same are one to it.
type Seen = (Vec<(String, String)>, Vec<NamedPort>, Vec<usize>);

fn workloads(world: &World, owners: &Owners, inner: &[Addresses]) -> (Vec<Endpoint>, Vec<Workload>) {
    let keys = keys_of(world);
    let mut found: BTreeMap<Workload, BTreeMap<Seen, Endpoint>> = BTreeMap::new();
    let mut on_nodes = BTreeSet::new();
    for pod in world.pods.values().filter(|pod| pod.phase != Phase::Terminated) {
        let workload = owners.get(&pod.name).cloned().unwrap_or_else(|| Workload {
            namespace: pod.name.namespace.clone(),
            name: pod.name.name.clone(),
            kind: "pod".to_owned(),
        });
        if pod.host_network {
            on_nodes.insert(workload);
            continue;
        }
        let labels = pod.labels.iter().filter(|(key, _)| keys.contains(*key));
        let labels = labels.map(|(key, value)| (key.clone(), value.clone())).collect();
        let blocks = inner.iter().enumerate().filter(|(_, block)| pod.ips.iter().any(|ip| block.has(*ip)));
        let seen = (labels, pod.named_ports.clone(), blocks.map(|(index, _)| index).collect());
        let variants = found.entry(workload.clone()).or_default();
        let endpoint = variants.entry(seen).or_insert_with(|| Endpoint {
            who: Who::Workload(workload, 0),
            labels: pod.labels.clone(),
            named_ports: pod.named_ports.clone(),
            addresses: pod.ips.clone(),
            pods: Vec::new(),
        });
        endpoint.pods.push(pod.name.clone());
    }
    let endpoints = found.into_values().flat_map(|variants| {
        variants.into_values().enumerate().map(|(index, mut endpoint)| {
            if let Who::Workload(_, number) = &mut endpoint.who {
                *number = index;
            }
            endpoint
        })
    });
    (endpoints.collect(), on_nodes.into_iter().collect())
}

/// Whether the namespaces of a clause hold one of this name and these labels.
pub(super) fn in_namespaces(set: Namespaces<'_>, name: &str, labels: &Labels) -> bool {
    match set {
        Namespaces::Named(wanted) => wanted == name,
        Namespaces::Matching(selector) => selector.matches(labels),
    }
}
