//! Who there is: workloads with pods that policy cannot tell apart, and nodes, each with addresses to ask about.
//!
//! Pods of one workload whose labels differ only in keys that no selector looks at (`pod-template-hash`, a StatefulSet's pod name) are
//! one [`Endpoint`]; where policy does tell them apart, the workload has several. So has a node whose addresses are in different blocks. Pods of
//! manifests have no address yet: each is given one of the pod ranges, outside of every `ipBlock` that lies within them where there is room.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::Serialize;
use towpath_model::{Direction, Family, Labels, NamedPort, NamespacedName, Node, Phase, Pod, World, family_of};

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

/// Pods of one workload that policy cannot tell apart, or a node by addresses that policy cannot tell apart.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Who it is.
    pub who: Who,
    /// The labels of one of its pods, or of the node.
    pub labels: Labels,
    /// Its named ports, sorted.
    pub named_ports: Vec<NamedPort>,
    /// An address a family of one of its pods; or addresses of the node, those of one family all alike to policy.
    pub addresses: Vec<IpAddr>,
    /// Its pods, the one with those addresses first. None of a node.
    pub pods: Vec<NamespacedName>,
}

/// Who an endpoint is.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Who {
    /// A workload; the number tells those of its pods apart that policy tells apart.
    Workload(Workload, usize),
    /// A node, by name; the address tells those of its addresses apart that policy tells apart. None: where it is reached first.
    Node(String, Option<IpAddr>),
}

impl Endpoint {
    /// Its namespace; none of a node.
    pub fn namespace(&self) -> Option<&str> {
        match &self.who {
            Who::Workload(workload, _) => Some(&workload.namespace),
            Who::Node(..) => None,
        }
    }

    /// Its first address of a family.
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
    /// Pods that had no address and for which there was none in the pod ranges, at least of one family.
    pub unplaced: usize,
    /// Blocks that lie within the pod ranges: with them it matters which address a pod gets.
    pub inner_blocks: usize,
    /// What those blocks hold of the pod ranges and no pod has.
    pub(super) unheld: Addresses,
}

/// The pod range that Towpath is installed with.
pub const DEFAULT_POD_RANGE: &str = "10.244.0.0/16";

impl Universe {
    /// Works out who there is. Without `pod_ranges`: those of the nodes, else [`DEFAULT_POD_RANGE`].
    pub fn of(world: World, owners: &Owners, pod_ranges: &[IpNet]) -> Self {
        let mut worlds = [world];
        let ground = Ground::prepare(&mut worlds, pod_ranges);
        let [world] = worlds;
        Self::on(&ground, world, owners, |pod, _| ground.seen(pod)).0
    }

    /// As [`Universe::of`], for a world that `ground` was prepared with. Pods of one workload and one class are one endpoint; with it come
    /// the classes of the endpoints, which begin with those of pods.
    pub(super) fn on<C: Ord>(
        ground: &Ground,
        world: World,
        owners: &Owners,
        class: impl Fn(&Pod, &Workload) -> C,
    ) -> (Self, Vec<C>) {
        let (mut endpoints, classes, on_nodes) = workloads(&world, owners, class);
        endpoints.extend(world.nodes.values().flat_map(|node| of_node(node, &ground.blocks)));
        let ranges = Addresses::of_all(&ground.pod_ranges);
        let numbers = |ips: Vec<IpAddr>| Addresses(Ranges::collect(ips.into_iter().map(|ip| (number(ip), number(ip)))));
        let of_pods = numbers(world.pods.values().flat_map(|pod| &pod.ips).copied().collect());
        let of_nodes = numbers(world.nodes.values().flat_map(Node::addresses).collect());
        let universe = Self {
            outside: Addresses::all().without(&ranges).without(&of_pods).without(&of_nodes),
            unheld: Addresses::any_of(&ground.inner).and(&ranges).without(&of_pods).without(&of_nodes),
            endpoints,
            pod_ranges: ground.pod_ranges.clone(),
            on_nodes,
            placed: world.pods.keys().filter(|name| ground.placed.contains(*name)).count(),
            unplaced: world.pods.keys().filter(|name| ground.unplaced.contains(*name)).count(),
            inner_blocks: ground.inner.len(),
            world,
        };
        (universe, classes)
    }
}

/// What policy sees of a pod: two pods of a namespace with the same are one to it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Seen {
    /// Those that a selector looks at.
    labels: Vec<(String, String)>,
    named_ports: Vec<NamedPort>,
    /// The blocks within the pod ranges that hold one of its addresses.
    blocks: Vec<usize>,
    families: Vec<Family>,
}

/// What is common to worlds that are looked at together: where pods are, and what the policies of any of them can tell apart.
#[derive(Clone, Debug)]
pub(super) struct Ground {
    pod_ranges: Vec<IpNet>,
    /// The label keys that selectors look at in pods.
    keys: BTreeSet<String>,
    blocks: BTreeSet<Addresses>,
    /// Those of the blocks that hold some of the pod ranges and not all.
    inner: Vec<Addresses>,
    placed: BTreeSet<NamespacedName>,
    unplaced: BTreeSet<NamespacedName>,
}

impl Ground {
    /// Looks at the policies and gives an address to each pod that has none: the same one in every world.
    pub(super) fn prepare(worlds: &mut [World], pod_ranges: &[IpNet]) -> Self {
        let pod_ranges = match pod_ranges {
            [] => ranges_of(worlds),
            given => given.to_vec(),
        };
        let ranges = Addresses::of_all(&pod_ranges);
        let blocks: BTreeSet<Addresses> = worlds.iter().flat_map(distinct_blocks).collect();
        let cuts = |block: &&Addresses| !block.0.is_disjoint(&ranges.0) && !splits_by_family(block, &ranges);
        let inner: Vec<Addresses> = blocks.iter().filter(cuts).cloned().collect();
        let keys = worlds.iter().flat_map(keys_of).collect();
        let (placed, unplaced) = place(worlds, &ranges, &inner);
        Self { pod_ranges, keys, blocks, inner, placed, unplaced }
    }

    /// What policy sees of a pod.
    pub(super) fn seen(&self, pod: &Pod) -> Seen {
        let labels = pod.labels.iter().filter(|(key, _)| self.keys.contains(*key));
        let blocks = self.inner.iter().enumerate().filter(|(_, block)| pod.ips.iter().any(|ip| block.has(*ip)));
        Seen {
            labels: labels.map(|(key, value)| (key.clone(), value.clone())).collect(),
            named_ports: pod.named_ports.to_vec(),
            blocks: blocks.map(|(index, _)| index).collect(),
            families: pod.ips.iter().map(|ip| family_of(*ip)).collect::<BTreeSet<_>>().into_iter().collect(),
        }
    }
}

/// The nodes' pod ranges, merged where they make up a larger one; else what Towpath is installed with.
fn ranges_of(worlds: &[World]) -> Vec<IpNet> {
    let nodes = worlds.iter().flat_map(|world| world.nodes.values());
    let all: Vec<IpNet> = nodes.flat_map(|node| node.pod_cidrs.clone()).collect();
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

/// Gives an address of each family of the ranges to pods without one, a pod of one name the same in all worlds. Returns the pods that got one,
/// and those for which there was none left of some family.
fn place(
    worlds: &mut [World],
    within: &Addresses,
    inner: &[Addresses],
) -> (BTreeSet<NamespacedName>, BTreeSet<NamespacedName>) {
    let held = worlds.iter().flat_map(|world| world.pods.values()).flat_map(|pod| &pod.ips);
    let mut taken: BTreeSet<u128> = held.map(|ip| number(*ip)).collect();
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
    let waits = |pod: &&Pod| pod.ips.is_empty() && pod.on_pod_network();
    let names: BTreeSet<NamespacedName> =
        worlds.iter().flat_map(|world| world.pods.values()).filter(waits).map(|pod| pod.name.clone()).collect();
    let (mut placed, mut unplaced) = (BTreeSet::new(), BTreeSet::new());
    for name in names {
        let same = worlds.iter().filter_map(|world| world.pods.get(&name)).filter(|pod| pod.on_pod_network());
        let known = same.map(|pod| pod.ips.clone()).find(|ips| !ips.is_empty());
        let ips = known.unwrap_or_else(|| {
            let next = |source: &mut Vec<Box<dyn Iterator<Item = u128>>>| {
                source.iter_mut().flatten().find(|number| taken.insert(*number)).map(address)
            };
            let ips: Vec<IpAddr> = sources.iter_mut().filter_map(next).collect();
            if ips.len() < sources.len() {
                unplaced.insert(name.clone());
            }
            ips.into()
        });
        for pod in worlds.iter_mut().filter_map(|world| world.pods.get_mut(&name)).filter(|pod| waits(&&**pod)) {
            pod.ips.clone_from(&ips);
        }
        if !ips.is_empty() {
            placed.insert(name);
        }
    }
    (placed, unplaced)
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

/// The workload of a pod.
pub(super) fn workload_of(pod: &Pod, owners: &Owners) -> Workload {
    owners.get(&pod.name).cloned().unwrap_or_else(|| Workload {
        namespace: pod.name.namespace.clone(),
        name: pod.name.name.clone(),
        kind: "pod".to_owned(),
    })
}

/// Endpoints of pods with the class of each, and workloads on nodes' addresses.
fn workloads<C: Ord>(
    world: &World,
    owners: &Owners,
    class: impl Fn(&Pod, &Workload) -> C,
) -> (Vec<Endpoint>, Vec<C>, Vec<Workload>) {
    let mut found: BTreeMap<Workload, BTreeMap<C, Endpoint>> = BTreeMap::new();
    let mut on_nodes = BTreeSet::new();
    for pod in world.pods.values().filter(|pod| pod.phase != Phase::Terminated) {
        let workload = workload_of(pod, owners);
        if pod.host_network {
            on_nodes.insert(workload);
            continue;
        }
        let class = class(pod, &workload);
        let variants = found.entry(workload.clone()).or_default();
        let endpoint = variants.entry(class).or_insert_with(|| Endpoint {
            who: Who::Workload(workload, 0),
            labels: (*pod.labels).clone(),
            named_ports: pod.named_ports.to_vec(),
            addresses: pod.ips.to_vec(),
            pods: Vec::new(),
        });
        endpoint.pods.push(pod.name.clone());
    }
    let (mut endpoints, mut classes) = (Vec::new(), Vec::new());
    for variants in found.into_values() {
        for (index, (class, mut endpoint)) in variants.into_iter().enumerate() {
            if let Who::Workload(_, number) = &mut endpoint.who {
                *number = index;
            }
            endpoints.push(endpoint);
            classes.push(class);
        }
    }
    (endpoints, classes, on_nodes.into_iter().collect())
}

/// A node: one endpoint for its `InternalIP`s, and one for each kind of other address, as blocks tell them apart.
fn of_node(node: &Node, blocks: &BTreeSet<Addresses>) -> Vec<Endpoint> {
    let kind = |ip: IpAddr| (family_of(ip), blocks.iter().map(|block| block.has(ip)).collect::<Vec<bool>>());
    let endpoint = |which, addresses| Endpoint {
        who: Who::Node(node.name.to_string(), which),
        labels: node.labels.clone(),
        named_ports: Vec::new(),
        addresses,
        pods: Vec::new(),
    };
    let mut out: Vec<Endpoint> = Vec::new();
    if !node.internal_ips.is_empty() {
        out.push(endpoint(None, node.internal_ips.clone()));
    }
    for ip in &node.other_ips {
        let alike = out.iter_mut().find(|known| known.addresses.iter().any(|other| kind(*other) == kind(*ip)));
        match alike {
            Some(known) => known.addresses.push(*ip),
            None => {
                let which = (!out.is_empty()).then_some(*ip);
                out.push(endpoint(which, vec![*ip]));
            }
        }
    }
    out
}

/// Whether the namespaces of a clause hold one of this name and these labels.
pub(super) fn in_namespaces(set: Namespaces<'_>, name: &str, labels: &Labels) -> bool {
    match set {
        Namespaces::Named(wanted) => wanted == name,
        Namespaces::Matching(selector) => selector.matches(labels),
    }
}
