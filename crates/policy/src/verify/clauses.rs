//! All policies of a world as one form: tiers of clauses, each "who is subject, which peer, which ports, what then".
//!
//! Everything in this directory reads policies only from here, so a question that is answered for pods that exist
//! ([`super::engine`]) and one for all possible pods ([`super::prove`]) look at the same clauses. Nothing here is shared with
//! the evaluator: that both agree is what the tests check.

use std::collections::BTreeMap;
use std::sync::Arc;

pub(crate) use towpath_model::Action;
use towpath_model::{
    ClusterNetworkPolicy, ClusterPeer, Direction, DomainName, NetworkPolicy, Peer, PolicyPort, PortMatch, Protocol,
    ProtocolMatch, Selector, Subject, Tier, World,
};

use super::addresses::Addresses;
use super::ports::Ports;

/// Namespaces that a clause speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Namespaces<'a> {
    /// One, by name.
    Named(&'a str),
    /// Those with matching labels.
    Matching(&'a Selector),
}

/// Pods that a clause speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct PodSet<'a> {
    pub(crate) namespaces: Namespaces<'a>,
    pub(crate) pods: &'a Selector,
}

/// Peers that a clause speaks of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum PeerSet<'a> {
    /// Everybody.
    Anyone,
    /// Pods.
    Pods(PodSet<'a>),
    /// Nodes, at any of their addresses.
    Nodes(&'a Selector),
    /// Whoever has one of these addresses.
    Addresses(Addresses),
    /// Who these names stand for: addresses outside, of which only nodes know which. Egress and `Accept` only.
    Names(&'a [DomainName]),
}

/// Ports that a clause speaks of.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct PortSet<'a> {
    /// By number.
    pub(crate) fixed: Ports,
    /// By the name that the destination pod gives them.
    pub(crate) named: Vec<(&'a str, Protocol)>,
}

/// Where a clause was written.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Source {
    /// Kind and name of the policy.
    pub(crate) policy: String,
    /// Field path: `spec.ingress[0].from[1]`.
    pub(crate) path: String,
}

/// One peer of one rule, with all ports of the rule.
#[derive(Clone, Debug)]
pub(crate) struct Clause<'a> {
    pub(crate) peer: PeerSet<'a>,
    /// All clauses of a rule share them.
    pub(crate) ports: Arc<PortSet<'a>>,
    pub(crate) action: Action,
    pub(crate) source: Source,
}

/// A policy that isolates the pods it selects and admits what its clauses say.
#[derive(Clone, Debug)]
pub(crate) struct Isolation<'a> {
    pub(crate) policy: &'a NetworkPolicy,
    pub(crate) selector: &'a Selector,
    pub(crate) clauses: Vec<Clause<'a>>,
}

/// A clause of a tier: the first that matches decides.
#[derive(Clone, Debug)]
pub(crate) struct Ranked<'a> {
    pub(crate) subject: PodSet<'a>,
    pub(crate) clause: Clause<'a>,
}

/// The policies of one direction, in the order in which they are asked.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tiers<'a> {
    /// First.
    pub(crate) admin: Vec<Ranked<'a>>,
    /// Then, by namespace: if any selects the pod, they decide.
    pub(crate) isolation: BTreeMap<&'a str, Vec<Isolation<'a>>>,
    /// Last; then everything is allowed.
    pub(crate) baseline: Vec<Ranked<'a>>,
}

impl<'a> Tiers<'a> {
    /// Of all policies of a world that are enforced.
    pub(crate) fn of(world: &'a World, direction: Direction) -> Self {
        let mut tiers = Self::default();
        for policy in world.policies.values().filter(|policy| !policy.enforcement.is_audited()) {
            if let Some(clauses) = clauses_of(policy, direction, &|_| true) {
                let isolation = Isolation { policy, selector: &policy.pod_selector, clauses };
                tiers.isolation.entry(&policy.name.namespace).or_default().push(isolation);
            }
        }
        for (tier, list) in [(Tier::Admin, &mut tiers.admin), (Tier::Baseline, &mut tiers.baseline)] {
            let policies = world.cluster_policies_of(tier).into_iter();
            for policy in policies.filter(|policy| !policy.enforcement.is_audited()) {
                rank(policy, direction, &|_| true, list);
            }
        }
        tiers
    }

    /// Every clause.
    pub(crate) fn clauses(&self) -> impl Iterator<Item = &Clause<'a>> {
        let isolation = self.isolation.values().flatten().flat_map(|i| &i.clauses);
        self.ranked().map(|ranked| &ranked.clause).chain(isolation)
    }

    /// Every clause of the tiers around NetworkPolicy.
    pub(crate) fn ranked(&self) -> impl Iterator<Item = &Ranked<'a>> {
        self.admin.iter().chain(&self.baseline)
    }

    /// Every selector of pods, with the namespaces it looks in.
    pub(crate) fn pod_sets(&self) -> impl Iterator<Item = PodSet<'a>> + '_ {
        let peers = self.clauses().filter_map(|clause| match &clause.peer {
            PeerSet::Pods(set) => Some(*set),
            PeerSet::Anyone | PeerSet::Nodes(_) | PeerSet::Addresses(_) | PeerSet::Names(_) => None,
        });
        let isolated = self.isolation.iter().flat_map(|(namespace, list)| {
            list.iter().map(|i| PodSet { namespaces: Namespaces::Named(namespace), pods: i.selector })
        });
        peers.chain(isolated).chain(self.ranked().map(|ranked| ranked.subject))
    }
}

/// Which clauses are asked for, by their peers.
pub(crate) type Wanted<'w, 'a> = &'w dyn Fn(&PeerSet<'a>) -> bool;

/// The clauses of a ClusterNetworkPolicy about peers that are wanted, in their order.
pub(crate) fn rank<'a>(
    policy: &'a ClusterNetworkPolicy,
    direction: Direction,
    wanted: Wanted<'_, 'a>,
    list: &mut Vec<Ranked<'a>>,
) {
    let (rules, below) = match direction {
        Direction::Ingress => ("ingress", "from"),
        Direction::Egress => ("egress", "to"),
    };
    let pods =
        |subject: &'a Subject| PodSet { namespaces: Namespaces::Matching(&subject.namespaces), pods: &subject.pods };
    for (index, rule) in policy.rules(direction).iter().enumerate() {
        let peers = rule.peers.iter().map(|peer| match peer {
            ClusterPeer::Everybody => PeerSet::Anyone,
            ClusterPeer::Pods(subject) => PeerSet::Pods(pods(subject)),
            ClusterPeer::Nodes(selector) => PeerSet::Nodes(selector),
            ClusterPeer::Networks(networks) => PeerSet::Addresses(Addresses::of_all(networks)),
            ClusterPeer::DomainNames(names) => PeerSet::Names(names),
        });
        let peers: Vec<_> = peers.enumerate().filter(|(_, peer)| wanted(peer)).collect();
        if peers.is_empty() {
            continue;
        }
        let ports = Arc::new(protocols_of(&rule.protocols));
        for (number, peer) in peers {
            let source = Source {
                policy: format!("ClusterNetworkPolicy {}", policy.name),
                path: format!("spec.{rules}[{index}].{below}[{number}]"),
            };
            let clause = Clause { peer, ports: ports.clone(), action: rule.action, source };
            list.push(Ranked { subject: pods(&policy.subject), clause });
        }
    }
}

fn protocols_of(list: &[ProtocolMatch]) -> PortSet<'_> {
    if list.is_empty() {
        return PortSet { fixed: Ports::all(), named: Vec::new() };
    }
    let numbered = list.iter().filter_map(|entry| match entry {
        ProtocolMatch::Ports(ports) => Some(ports),
        ProtocolMatch::NamedPort(_) => None,
    });
    let mut set = ports_of_each(numbered);
    for entry in list {
        if let ProtocolMatch::NamedPort(name) = entry {
            set.named.extend(Protocol::ALL.map(|protocol| (name.as_str(), protocol)));
        }
    }
    set.named.sort_unstable();
    set.named.dedup();
    set
}

/// The clauses of a NetworkPolicy about peers that are wanted; none if it does not speak of the direction.
pub(crate) fn clauses_of<'a>(
    policy: &'a NetworkPolicy,
    direction: Direction,
    wanted: Wanted<'_, 'a>,
) -> Option<Vec<Clause<'a>>> {
    let (list, below) = match direction {
        Direction::Ingress => ("ingress", "from"),
        Direction::Egress => ("egress", "to"),
    };
    let mut clauses = Vec::new();
    for (index, rule) in policy.rules(direction)?.iter().enumerate() {
        let peers = rule.peers.iter().map(|peer| match peer {
            Peer::IpBlock { cidr, except } => PeerSet::Addresses(Addresses::of_block(cidr, except)),
            Peer::Pods { namespaces, pods } => PeerSet::Pods(PodSet {
                namespaces: match namespaces {
                    None => Namespaces::Named(&policy.name.namespace),
                    Some(selector) => Namespaces::Matching(selector),
                },
                pods,
            }),
        });
        let everyone = rule.peers.is_empty().then_some(PeerSet::Anyone);
        let everyone = everyone.map(|peer| (format!("spec.{list}[{index}]"), peer));
        let some = peers.enumerate().filter(|(_, peer)| wanted(peer));
        let some = some.map(|(number, peer)| (format!("spec.{list}[{index}].{below}[{number}]"), peer));
        let mut ports = None;
        for (path, peer) in everyone.into_iter().chain(some) {
            let ports = ports.get_or_insert_with(|| Arc::new(ports_of(&rule.ports))).clone();
            let source = Source { policy: format!("NetworkPolicy {}", policy.name), path };
            clauses.push(Clause { peer, ports, action: Action::Accept, source });
        }
    }
    Some(clauses)
}

fn ports_of(list: &[PolicyPort]) -> PortSet<'_> {
    match list {
        [] => PortSet { fixed: Ports::all(), named: Vec::new() },
        some => ports_of_each(some.iter()),
    }
}

fn ports_of_each<'a>(list: impl Iterator<Item = &'a PolicyPort>) -> PortSet<'a> {
    let mut set = PortSet::default();
    let mut numbers = Vec::new();
    for entry in list {
        match &entry.port {
            PortMatch::Any => numbers.push(Ports::of_protocol(entry.protocol)),
            PortMatch::Range(first, last) => numbers.push(Ports::of(entry.protocol, *first, *last)),
            PortMatch::Named(name) => set.named.push((name, entry.protocol)),
        }
    }
    set.fixed = Ports::any_of(&numbers);
    set.named.sort_unstable();
    set.named.dedup();
    set
}
