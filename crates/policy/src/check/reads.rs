//! The policies that select a pod of the node, as they were read last: each once a direction, as the clauses it has.
//!
//! A number stands for what was read, for good: whoever refers to it refers to these clauses. A policy that is read again and says the same
//! keeps its number.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use towpath_model::{
    Action, ClusterNetworkPolicy, Direction, NamespacedName, NetworkPolicy, PortMatch, Protocol, ProtocolMatch, Tier,
};

use super::matchers::{Matcher, Matchers};
use crate::names::Learned;
use crate::verify::addresses::Addresses;
use crate::verify::clauses::{Clause, PeerSet, PortSet, clauses_of, rank};
use crate::verify::ports::Ports;

/// A policy in force on the node.
#[derive(Clone, Copy, Debug)]
pub(super) enum Policy<'w> {
    Cluster(&'w ClusterNetworkPolicy),
    Namespaced(&'w NetworkPolicy),
}

impl Policy<'_> {
    fn name(&self) -> NamespacedName {
        match self {
            Policy::Cluster(policy) => NamespacedName::new("", &policy.name),
            Policy::Namespaced(policy) => policy.name.clone(),
        }
    }
}

/// Ports that a clause speaks of.
#[derive(Debug, PartialEq, Eq, Hash)]
pub(super) struct Doors {
    pub(super) fixed: Ports,
    /// By the name that the pod gives them which is reached.
    pub(super) named: Vec<(String, Protocol)>,
}

impl Doors {
    fn of(ports: &PortSet<'_>) -> Self {
        let named = ports.named.iter().map(|(name, protocol)| ((*name).to_owned(), *protocol));
        Self { fixed: ports.fixed.clone(), named: named.collect() }
    }

    /// All of several.
    pub(super) fn any_of(all: &[Arc<Self>]) -> Self {
        let named: BTreeSet<&(String, Protocol)> = all.iter().flat_map(|ports| &ports.named).collect();
        Self { fixed: Ports::any_of(all.iter().map(|ports| &ports.fixed)), named: named.into_iter().cloned().collect() }
    }

    fn is(&self, ports: &PortSet<'_>) -> bool {
        let named = self.named.iter().map(|(name, protocol)| (name.as_str(), *protocol));
        self.fixed == ports.fixed && named.eq(ports.named.iter().copied())
    }
}

/// Whom a clause is about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum About {
    Everybody,
    /// Whom this matcher matches.
    Matched(u32),
    /// Whoever has one of these addresses. Which matcher asks that is seen when it is known what else is asked.
    Addresses(Arc<Addresses>),
}

/// A clause.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Said {
    pub(super) about: About,
    pub(super) ports: Arc<Doors>,
    pub(super) action: Action,
    /// It is about pods, and asked of whoever may be one.
    pub(super) doubtful: bool,
}

/// What a policy says in one direction.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Read {
    /// None: a NetworkPolicy's.
    pub(super) tier: Option<Tier>,
    pub(super) clauses: Vec<Said>,
    /// Some clause takes the number of a port from the pod that is reached.
    pub(super) by_name: bool,
    /// Numbers of the matchers that tell peers apart, ascending; but for those of addresses.
    pub(super) ask: Vec<u32>,
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Reads {
    next: u32,
    list: HashMap<u32, Kept>,
    current: HashMap<Key, u32>,
    /// Those of policies that may have changed.
    stale: HashSet<Key>,
    /// Those with domain names, and what these stood for.
    by_domain: HashSet<Key>,
    learned: Learned,
    /// Those that nobody used at some moment.
    unused: BTreeSet<u32>,
}

#[derive(Clone, Debug)]
struct Kept {
    read: Read,
    key: Key,
    /// So many use it.
    users: usize,
}

type Key = (Direction, NamespacedName);

impl Reads {
    /// Has a policy read again when it is asked for. A ClusterNetworkPolicy has no namespace.
    pub(super) fn forget(&mut self, policy: &NamespacedName) {
        self.stale.extend([Direction::Ingress, Direction::Egress].map(|direction| (direction, policy.clone())));
    }

    /// Has all ClusterNetworkPolicies read again.
    pub(super) fn forget_cluster(&mut self) {
        self.stale.extend(self.current.keys().filter(|(_, name)| name.namespace.is_empty()).cloned());
    }

    /// Takes up what domain names stand for: whether some policy here has any, and they stand for others.
    pub(super) fn learn(&mut self, learned: &Learned) -> bool {
        // Mostly nothing was learned, and a table that goes on says so at once.
        if learned.since(self.learned.mark()).is_some_and(|concerned| concerned.is_empty()) || self.learned == *learned
        {
            return false;
        }
        self.learned = learned.clone();
        self.stale.extend(self.by_domain.iter().cloned());
        !self.by_domain.is_empty()
    }

    pub(super) fn get(&self, number: u32) -> Option<&Read> {
        self.list.get(&number).map(|kept| &kept.read)
    }

    /// The number of what a policy says.
    pub(super) fn number(&mut self, policy: Policy<'_>, direction: Direction, matchers: &mut Matchers) -> u32 {
        let key = (direction, policy.name());
        let known = self.current.get(&key).copied();
        let stale = self.stale.remove(&key);
        if let Some(known) = known.filter(|_| !stale) {
            return known;
        }
        let (read, has_domains) = read(policy, direction, &self.learned, matchers);
        if let Some(known) = known.filter(|known| self.get(*known) == Some(&read)) {
            return known;
        }
        match has_domains {
            true => self.by_domain.insert(key.clone()),
            false => self.by_domain.remove(&key),
        };
        let number = self.next;
        self.next += 1;
        self.list.insert(number, Kept { read, key: key.clone(), users: 0 });
        self.unused.insert(number);
        self.current.insert(key, number);
        number
    }

    /// Somebody uses it.
    pub(super) fn enter(&mut self, number: u32) {
        self.list.get_mut(&number).into_iter().for_each(|kept| kept.users += 1);
    }

    /// And no longer.
    pub(super) fn leave(&mut self, number: u32) {
        if let Some(kept) = self.list.get_mut(&number) {
            kept.users -= 1;
            if kept.users == 0 {
                self.unused.insert(number);
            }
        }
    }

    /// Leaves what is in use, once everybody who may ask for what was forgotten has.
    pub(super) fn sweep(&mut self) {
        self.stale.clear();
        for number in std::mem::take(&mut self.unused) {
            let Some(kept) = self.list.get(&number).filter(|kept| kept.users == 0) else { continue };
            if self.current.get(&kept.key) == Some(&number) {
                self.current.remove(&kept.key);
                self.by_domain.remove(&kept.key);
            }
            self.list.remove(&number);
        }
    }
}

/// Reads a policy; and whether it has domain names.
fn read(policy: Policy<'_>, direction: Direction, learned: &Learned, matchers: &mut Matchers) -> (Read, bool) {
    let everybody = |_: &PeerSet<'_>| true;
    let (tier, list, by_name): (Option<Tier>, Vec<Clause<'_>>, bool) = match policy {
        Policy::Cluster(policy) => {
            let mut ranked = Vec::new();
            rank(policy, direction, &everybody, &mut ranked);
            let mut protocols = policy.rules(direction).iter().flat_map(|rule| &rule.protocols);
            let by_name = protocols.any(|protocol| matches!(protocol, ProtocolMatch::NamedPort(_)));
            (Some(policy.tier), ranked.into_iter().map(|ranked| ranked.clause).collect(), by_name)
        }
        Policy::Namespaced(policy) => {
            let mut ports = policy.rules(direction).unwrap_or_default().iter().flat_map(|rule| &rule.ports);
            let by_name = ports.any(|port| matches!(port.port, PortMatch::Named(_)));
            (None, clauses_of(policy, direction, &everybody).unwrap_or_default(), by_name)
        }
    };
    let has_domains = list.iter().any(|clause| matches!(clause.peer, PeerSet::Names(_)));
    let mut clauses: Vec<Said> = Vec::with_capacity(list.len());
    let mut ask = Vec::new();
    for (clause, addresses) in without_repeats(tier, &list) {
        let mut matched = |matcher| {
            let number = matchers.number(matcher);
            ask.push(number);
            About::Matched(number)
        };
        let about = match &clause.peer {
            PeerSet::Anyone => About::Everybody,
            PeerSet::Pods(set) => matched(Matcher::pods(set)),
            PeerSet::Nodes(selector) => matched(Matcher::Nodes((*selector).clone())),
            PeerSet::Addresses(_) => About::Addresses(Arc::new(Addresses::any_of(addresses))),
            PeerSet::Names(names) => {
                let said: Vec<Addresses> = learned.of(names).into_iter().map(Addresses::one).collect();
                matched(Matcher::Outside(Addresses::any_of(&said)))
            }
        };
        let doubtful = tier.is_some() && matches!(clause.peer, PeerSet::Pods(_));
        ask.extend(doubtful.then(|| matchers.number(Matcher::MayBePod)));
        if direction == Direction::Egress {
            let calls = clause.ports.named.iter().map(|(name, protocol)| Matcher::Calls((*name).to_owned(), *protocol));
            ask.extend(calls.map(|calls| matchers.number(calls)));
        }
        let before = clauses.last().map(|before| &before.ports).filter(|ports| ports.is(&clause.ports)).cloned();
        let ports = before.unwrap_or_else(|| Arc::new(Doors::of(&clause.ports)));
        clauses.push(Said { about, ports, action: clause.action, doubtful });
    }
    ask.sort_unstable();
    ask.dedup();
    (Read { tier, clauses, by_name, ask }, has_domains)
}

/// Clauses, those that differ in nothing but addresses as one: the first of them, with the addresses of all. A NetworkPolicy's add up in
/// whatever order; between a ClusterNetworkPolicy's nothing else may be asked.
fn without_repeats<'c, 'w>(tier: Option<Tier>, list: &'c [Clause<'w>]) -> Vec<(&'c Clause<'w>, Vec<&'c Addresses>)> {
    let mut all: Vec<(&Clause<'w>, Vec<&Addresses>)> = Vec::new();
    let mut by_ports: HashMap<&PortSet<'w>, usize> = HashMap::new();
    for clause in list {
        let PeerSet::Addresses(addresses) = &clause.peer else {
            all.push((clause, Vec::new()));
            continue;
        };
        if tier.is_some() {
            let last = all.len().checked_sub(1);
            by_ports.retain(|_, index| Some(*index) == last);
        }
        let key: &PortSet<'w> = &clause.ports;
        let same = by_ports.get(key).and_then(|index| all.get_mut(*index));
        match same.filter(|(first, _)| first.action == clause.action) {
            Some((_, known)) => known.push(addresses),
            None => {
                by_ports.insert(key, all.len());
                all.push((clause, vec![addresses]));
            }
        }
    }
    all
}
