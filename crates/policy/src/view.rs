//! What policy looks at: the world, plus what only the node knows; and who holds which address.
//!
//! An address has one holder. The order of trust: the node-local DNS addresses, primary addresses of nodes, what the agent itself
//! gave out ([`View::pod_ips`]), what pod statuses claim, and last what else nodes call theirs (`ExternalIP`); among pod statuses, a pod whose node owns the address's range comes
//! before one whose node does not, then a pod that stays before one that terminates, then the first by name.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::LazyLock;

use ipnet::IpNet;
use towpath_model::{Labels, NamedPort, NamespacedName, Node, NodeName, Pod, Protocol, Shared, World};

use crate::names::{Learned, NOTHING_LEARNED};

/// Everything a compilation or an evaluation reads.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    /// The cluster.
    pub world: &'a World,
    /// Node-local addresses that DNS listens on.
    pub dns: &'a [IpAddr],
    /// Addresses that were given at ADD. They replace what the pod's status says, because kubelet reports later.
    pub pod_ips: &'a BTreeMap<NamespacedName, Vec<IpAddr>>,
    /// What domain names stand for on this node.
    pub names: &'a Learned,
}

static NO_POD_IPS: BTreeMap<NamespacedName, Vec<IpAddr>> = BTreeMap::new();

impl<'a> View<'a> {
    /// A view of nothing but the API's objects: what a laptop has. Domain names stand for nobody.
    pub fn of(world: &'a World) -> Self {
        Self { world, dns: &[], pod_ips: &NO_POD_IPS, names: &NOTHING_LEARNED }
    }

    /// The addresses of a pod on the pod network; none for other pods.
    pub fn addresses_of(&self, pod: &'a Pod) -> &'a [IpAddr] {
        if !pod.on_pod_network() {
            return &[];
        }
        self.pod_ips.get(&pod.name).filter(|ips| !ips.is_empty()).map_or(&*pod.ips, Vec::as_slice)
    }
}

/// Namespace that the DNS addresses count to.
pub const DNS_NAMESPACE: &str = "kube-system";

static DNS_LABELS: LazyLock<Shared<Labels>> =
    LazyLock::new(|| Labels::from([("k8s-app".to_owned(), "kube-dns".to_owned())]).into());

static DNS_PORTS: LazyLock<Shared<Vec<NamedPort>>> = LazyLock::new(|| {
    Shared::from(vec![
        NamedPort { name: "dns".to_owned(), protocol: Protocol::Udp, number: 53 },
        NamedPort { name: "dns-tcp".to_owned(), protocol: Protocol::Tcp, number: 53 },
    ])
});

/// Who holds an address.
#[derive(Clone, Copy, Debug)]
pub enum Holder<'a> {
    /// A pod on the pod network.
    Pod(&'a Pod),
    /// The node's own DNS.
    Dns,
    /// A node.
    Node(&'a NodeName),
    /// A pod of this node that the API has not told us of yet.
    UnknownPod(&'a NamespacedName),
}

/// What selectors and named ports see of a peer.
#[derive(Clone, Copy, Debug)]
pub struct PeerPod<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its labels.
    pub labels: &'a Shared<Labels>,
    /// Its named ports, sorted.
    pub named_ports: &'a Shared<Vec<NamedPort>>,
}

impl<'a> PeerPod<'a> {
    /// The number that a named port has in it.
    pub fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.named_ports.iter().find(|p| p.name == name && p.protocol == protocol).map(|p| p.number)
    }
}

impl<'a> Holder<'a> {
    /// The holder as selectors see it; none: it is only an address to them.
    pub fn as_peer(&self) -> Option<PeerPod<'a>> {
        match self {
            Holder::Pod(pod) => {
                Some(PeerPod { namespace: &pod.name.namespace, labels: &pod.labels, named_ports: &pod.named_ports })
            }
            Holder::Dns => Some(PeerPod { namespace: DNS_NAMESPACE, labels: &DNS_LABELS, named_ports: &DNS_PORTS }),
            Holder::Node(_) | Holder::UnknownPod(_) => None,
        }
    }
}

/// All held addresses of a view.
#[derive(Clone, Debug, Default)]
pub struct Holders<'a> {
    by_address: HashMap<IpAddr, Holder<'a>>,
    /// All nodes that list an address, for the addresses that nodes hold.
    nodes: HashMap<IpAddr, Vec<&'a Node>>,
}

/// Whether `challenger` is the likelier holder of `address` than `holder`, both by their status only.
pub(crate) fn likelier(world: &World, address: IpAddr, challenger: &Pod, holder: &Pod) -> bool {
    let in_range = |pod: &Pod| {
        let node = pod.node.as_ref().and_then(|name| world.nodes.get(name));
        node.is_some_and(|n| n.pod_cidrs.iter().any(|cidr| cidr.contains(&address)))
    };
    (in_range(challenger), !challenger.terminating) > (in_range(holder), !holder.terminating)
}

impl<'a> Holders<'a> {
    /// Works out who holds what.
    pub fn of(view: &View<'a>) -> Self {
        Self::among(view, |_| true, view.world.pods.values())
    }

    /// Works out who holds these addresses. `claimants` are the pods whose status says one of them, or more pods, in the order of their names.
    pub(crate) fn among(
        view: &View<'a>,
        asked: impl Fn(IpAddr) -> bool,
        claimants: impl Iterator<Item = &'a Pod>,
    ) -> Self {
        let world = view.world;
        let mut by_address: HashMap<IpAddr, Holder<'a>> = HashMap::new();
        by_address.extend(view.dns.iter().filter(|ip| asked(**ip)).map(|ip| (*ip, Holder::Dns)));
        for node in world.nodes.values() {
            for ip in node.internal_ips.iter().filter(|ip| asked(**ip)) {
                by_address.entry(*ip).or_insert(Holder::Node(&node.name));
            }
        }
        for (name, ips) in view.pod_ips {
            let holder = match world.pods.get(name) {
                Some(pod) if pod.on_pod_network() => Holder::Pod(pod),
                // Its own lease says it is on the pod network: a record that denies it is of an earlier pod of this name.
                _ => Holder::UnknownPod(name),
            };
            for ip in ips.iter().filter(|ip| asked(**ip)) {
                by_address.entry(*ip).or_insert(holder);
            }
        }
        for pod in claimants.filter(|pod| pod.on_pod_network()) {
            if view.pod_ips.get(&pod.name).is_some_and(|ips| !ips.is_empty()) {
                continue;
            }
            for ip in pod.ips.iter().filter(|ip| asked(**ip)) {
                match by_address.get_mut(ip) {
                    None => {
                        by_address.insert(*ip, Holder::Pod(pod));
                    }
                    Some(held) => {
                        if let Holder::Pod(holder) = *held
                            && !view.pod_ips.get(&holder.name).is_some_and(|ips| ips.contains(ip))
                            && likelier(world, *ip, pod, holder)
                        {
                            *held = Holder::Pod(pod);
                        }
                    }
                }
            }
        }
        let mut nodes: HashMap<IpAddr, Vec<&'a Node>> = HashMap::new();
        for node in world.nodes.values() {
            for ip in node.addresses().filter(|ip| asked(*ip)) {
                if let Holder::Node(_) = by_address.entry(ip).or_insert(Holder::Node(&node.name)) {
                    nodes.entry(ip).or_default().push(node);
                }
            }
        }
        Self { by_address, nodes }
    }

    /// Whether an address may be that of a pod which is not known yet: nobody holds it, or a pod of which the API has not told us, and it is
    /// in the range of a node and none of the addresses there that no pod is given (network, gateway, broadcast).
    pub fn may_be_pod(&self, world: &World, address: IpAddr) -> bool {
        let unknown = matches!(self.holder(address), None | Some(Holder::UnknownPod(_)));
        unknown
            && world.nodes.values().flat_map(|node| &node.pod_cidrs).any(|range| range.contains(&address))
            && !world.nodes.values().flat_map(|node| &node.pod_cidrs).any(|range| never_given(range).contains(&address))
    }

    /// The nodes that list an address, if a node holds it.
    pub fn nodes_at(&self, address: IpAddr) -> &[&'a Node] {
        self.nodes.get(&address).map(Vec::as_slice).unwrap_or_default()
    }

    /// All addresses that nodes hold, in no order, with the nodes that list them.
    pub fn node_addresses(&self) -> impl Iterator<Item = (IpAddr, &[&'a Node])> + '_ {
        self.nodes.iter().map(|(ip, nodes)| (*ip, nodes.as_slice()))
    }

    /// Who holds an address; none: it is outside the cluster.
    pub fn holder(&self, address: IpAddr) -> Option<Holder<'a>> {
        self.by_address.get(&address).copied()
    }

    /// All held addresses, in no order.
    pub fn all(&self) -> impl Iterator<Item = (IpAddr, Holder<'a>)> + '_ {
        self.by_address.iter().map(|(ip, holder)| (*ip, *holder))
    }

    /// All addresses that selectors can match, in no order.
    pub fn peers(&self) -> impl Iterator<Item = (IpAddr, Holder<'a>, PeerPod<'a>)> + '_ {
        self.by_address.iter().filter_map(|(ip, holder)| Some((*ip, *holder, holder.as_peer()?)))
    }
}

/// The addresses of a pod range that no pod is given: its network, its first host (the node's own there), and of IPv4 its broadcast
/// address.
pub(crate) fn never_given(range: &IpNet) -> Vec<IpAddr> {
    let network = range.network();
    let gateway = match network {
        IpAddr::V4(a) => a.to_bits().checked_add(1).map(|bits| IpAddr::V4(Ipv4Addr::from_bits(bits))),
        IpAddr::V6(a) => a.to_bits().checked_add(1).map(|bits| IpAddr::V6(Ipv6Addr::from_bits(bits))),
    };
    let broadcast = network.is_ipv4().then(|| range.broadcast());
    [Some(network), gateway, broadcast].into_iter().flatten().filter(|address| range.contains(address)).collect()
}
