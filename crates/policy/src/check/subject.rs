//! Whose policies are asked: the pods of the node, and for each kind of them the clauses that decide, in their order.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use towpath_model::desired::{PolicyImage, SetId};
use towpath_model::{
    Action, ClusterNetworkPolicy, Direction, DomainName, Labels, NamedPort, NamespacedName, NetworkPolicy, Node, Pod,
    PortMatch, Protocol, ProtocolMatch, Tier, World,
};

use super::peers::{Kind, Matcher, Peers, is_in};
use super::set_of;
use crate::names::Learned;
use crate::verify::addresses::Addresses;
use crate::verify::clauses::{Clause, PeerSet, PodSet, PortSet, clauses_of, rank};
use crate::verify::ports::Ports;
use crate::view::{Holder, Holders, PeerPod, View};

/// A policy in force on the node.
#[derive(Clone, Copy, Debug)]
enum Policy<'w> {
    Cluster(&'w ClusterNetworkPolicy),
    Namespaced(&'w NetworkPolicy),
}

/// Pods of the node that the same policies select, in one direction, with one set.
pub(super) struct Text<'w> {
    pub(super) pod: &'w Pod,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) direction: Direction,
    pub(super) set: SetId,
    /// Indices of the clauses of each policy that selects them.
    policies: Vec<usize>,
    /// What these say, once all of them are read.
    steps: Vec<Step<'w>>,
}

impl Text<'_> {
    /// Whether no policy selects them, and the image has no set for them.
    pub(super) fn is_open(&self) -> bool {
        self.policies.is_empty() && self.set == SetId::default()
    }
}

/// A policy's clauses.
struct Clauses<'w> {
    tier: Option<Tier>,
    list: Vec<Read<'w>>,
    /// Some clause takes the number of a port from the pod that is reached.
    by_name: bool,
}

/// A clause, or several that differ in nothing but addresses, between which nothing else is asked.
struct Read<'w> {
    peers: PeersOf,
    /// It is about pods, and asked of whoever may be one.
    doubtful: bool,
    ports: Arc<PortSet<'w>>,
    action: Action,
}

/// Whom a clause is about.
enum PeersOf {
    Anyone,
    /// Whom this matcher matches.
    Matched(u32),
    /// Whoever has one of these addresses.
    Addresses(Addresses),
}

/// A policy in one direction: its tier (none: a NetworkPolicy), namespace and name.
type Known<'w> = (Direction, Option<Tier>, &'w str, &'w str);

/// All policies that select a pod of the node, each once a direction.
pub(super) struct Subjects<'w> {
    world: &'w World,
    names: &'w Learned,
    interest: Interest<'w>,
    known: HashMap<Known<'w>, usize>,
    clauses: Vec<Clauses<'w>>,
    /// What clauses ask of peers.
    pub(super) matchers: Matchers<'w>,
}

/// What clauses ask of peers, each once.
#[derive(Default)]
pub(super) struct Matchers<'w> {
    numbers: HashMap<Matcher<'w>, u32>,
    pub(super) list: Vec<Matcher<'w>>,
}

impl<'w> Matchers<'w> {
    fn number(&mut self, matcher: Matcher<'w>) -> u32 {
        if let Some(number) = self.numbers.get(&matcher) {
            return *number;
        }
        let number = u32::try_from(self.list.len()).unwrap_or(u32::MAX);
        self.list.push(matcher.clone());
        self.numbers.insert(matcher, number);
        number
    }

    fn known(&self, matcher: &Matcher<'w>) -> Option<u32> {
        self.numbers.get(matcher).copied()
    }
}

/// The peers that a check is about.
pub(super) enum Interest<'w> {
    Everybody,
    /// These: clauses that match none of them are not read.
    Few(Vec<Face<'w>>),
}

/// A peer, as clauses see it.
pub(super) struct Face<'w> {
    pub(super) address: IpAddr,
    pub(super) peer: Option<PeerPod<'w>>,
    /// Labels of its namespace.
    pub(super) namespace: Labels,
    pub(super) nodes: Vec<&'w Node>,
    /// Nobody whom the cluster knows.
    pub(super) stranger: bool,
    pub(super) may_be_pod: bool,
}

impl<'w> Interest<'w> {
    /// So many peers are looked at one by one.
    const MOST: usize = 64;

    /// In these, if they are few, else in everybody.
    pub(super) fn of(view: &View<'w>, holders: &Holders<'w>, peers: &BTreeSet<IpAddr>) -> Self {
        if peers.len() > Self::MOST {
            return Self::Everybody;
        }
        let faces = peers.iter().map(|address| {
            let holder = holders.holder(*address);
            let peer = holder.and_then(|holder| holder.as_peer());
            Face {
                address: *address,
                namespace: peer.map(|peer| view.world.namespace_labels(peer.namespace)).unwrap_or_default(),
                peer,
                nodes: holders.nodes_at(*address).to_vec(),
                stranger: matches!(holder, None | Some(Holder::UnknownPod(_))),
                may_be_pod: holders.may_be_pod(view.world, *address),
            }
        });
        Self::Few(faces.collect())
    }

    /// Whether a clause may match any of them. `doubtful`: what it says of pods is asked of whoever may be one.
    fn wants(&self, set: &PeerSet<'w>, doubtful: bool, names: &Learned) -> bool {
        let Self::Few(faces) = self else { return true };
        match set {
            PeerSet::Anyone => true,
            PeerSet::Pods(set) => faces.iter().any(|face| {
                (doubtful && face.may_be_pod) || face.peer.is_some_and(|peer| is_in(set, &peer, &face.namespace))
            }),
            PeerSet::Nodes(selector) => {
                faces.iter().flat_map(|face| &face.nodes).any(|node| selector.matches(&node.labels))
            }
            PeerSet::Addresses(addresses) => faces.iter().any(|face| addresses.has(face.address)),
            PeerSet::Names(asked) => faces.iter().any(|face| face.stranger && names.stand_for(asked, face.address)),
        }
    }

    /// What names stand for, as far as these are concerned.
    fn named(&self, asked: &[DomainName], names: &Learned) -> Addresses {
        let said: BTreeSet<IpAddr> = match self {
            Self::Everybody => names.of(asked),
            Self::Few(faces) => {
                let addresses = faces.iter().map(|face| face.address);
                addresses.filter(|address| names.stand_for(asked, *address)).collect()
            }
        };
        Addresses::any_of(&said.into_iter().map(Addresses::one).collect::<Vec<_>>())
    }
}

/// What tells two pods of the node apart, as subjects.
#[derive(PartialEq, Eq, Hash)]
struct Same<'w> {
    namespace: &'w str,
    labels: &'w Labels,
    named: &'w [NamedPort],
    set: SetId,
}

/// And when it is known which policies select them.
#[derive(PartialEq, Eq, Hash)]
struct Alike<'w> {
    policies: Vec<usize>,
    named: &'w [NamedPort],
    set: SetId,
}

impl<'w> Subjects<'w> {
    pub(super) fn of(view: &View<'w>, interest: Interest<'w>) -> Self {
        let (world, names) = (view.world, view.names);
        Self { world, names, interest, known: HashMap::new(), clauses: Vec::new(), matchers: Matchers::default() }
    }

    /// The pods of the node, sorted into those that are the same to policy and have the same sets.
    pub(super) fn select(&mut self, own: &BTreeMap<IpAddr, &'w Pod>, image: &PolicyImage) -> Vec<Text<'w>> {
        let mut texts = Vec::new();
        for direction in [Direction::Ingress, Direction::Egress] {
            let mut same: HashMap<Same<'w>, Option<usize>> = HashMap::new();
            let mut alike: HashMap<Alike<'w>, usize> = HashMap::new();
            for (address, pod) in own {
                let set = set_of(image.pods.get(address).copied().unwrap_or_default(), direction);
                let seen = Same { namespace: &pod.name.namespace, labels: &pod.labels, named: &pod.named_ports, set };
                if let Some(known) = same.get(&seen) {
                    known.and_then(|text: usize| texts.get_mut(text)).into_iter().for_each(|text: &mut Text<'w>| {
                        text.addresses.push(*address);
                    });
                    continue;
                }
                let policies = self.selecting(pod, direction);
                let by_name = policies.iter().filter_map(|p| self.clauses.get(*p)).any(|clauses| clauses.by_name);
                let named: &'w [NamedPort] =
                    if by_name && direction == Direction::Ingress { &pod.named_ports } else { &[] };
                let index = *alike.entry(Alike { policies: policies.clone(), named, set }).or_insert_with(|| {
                    texts.push(Text { pod, addresses: Vec::new(), direction, set, policies, steps: Vec::new() });
                    texts.len() - 1
                });
                texts.get_mut(index).into_iter().for_each(|text| text.addresses.push(*address));
                same.insert(seen, Some(index));
            }
        }
        for text in &mut texts {
            text.steps = self.steps(&text.policies);
        }
        texts
    }

    /// What policies say, in the order in which they are asked. NetworkPolicies add up, whatever their order: all that one or another says of
    /// everybody is one step, and so are all addresses of the same ports.
    fn steps(&mut self, policies: &[usize]) -> Vec<Step<'w>> {
        let (mut steps, mut everyone) = (Vec::new(), Vec::new());
        let mut by_ports: HashMap<&Arc<PortSet<'w>>, usize> = HashMap::new();
        let mut blocks: Vec<(&Arc<PortSet<'w>>, Vec<&Addresses>)> = Vec::new();
        for clauses in policies.iter().filter_map(|index| self.clauses.get(*index)) {
            let tier = clauses.tier;
            for Read { peers, doubtful, ports, action } in &clauses.list {
                let matcher = match peers {
                    PeersOf::Anyone if tier.is_none() => {
                        everyone.push(ports);
                        continue;
                    }
                    PeersOf::Addresses(addresses) if tier.is_none() => {
                        let index = *by_ports.entry(ports).or_insert(blocks.len());
                        match blocks.get_mut(index) {
                            Some((_, all)) => all.push(addresses),
                            None => blocks.push((ports, vec![addresses])),
                        }
                        continue;
                    }
                    PeersOf::Anyone => None,
                    PeersOf::Matched(number) => Some(*number),
                    PeersOf::Addresses(addresses) => Some(self.matchers.number(Matcher::Addresses(addresses.clone()))),
                };
                steps.push(Step { tier, matcher, ports: ports.clone(), action: *action, doubtful: *doubtful });
            }
        }
        let mut accept = |matcher, ports| {
            steps.push(Step { tier: None, matcher, ports, action: Action::Accept, doubtful: false });
        };
        for (ports, all) in blocks {
            let addresses = Addresses::any_of(all);
            accept(Some(self.matchers.number(Matcher::Addresses(addresses))), ports.clone());
        }
        if !everyone.is_empty() {
            let fixed = Ports::any_of(everyone.iter().map(|ports| &ports.fixed));
            let mut named: Vec<_> = everyone.iter().flat_map(|ports| ports.named.iter().copied()).collect();
            named.sort_unstable();
            named.dedup();
            accept(None, Arc::new(PortSet { fixed, named }));
        }
        steps
    }

    /// The policies in force that select a pod and speak of a direction, in the order in which they are asked.
    fn selecting(&mut self, pod: &'w Pod, direction: Direction) -> Vec<usize> {
        let world = self.world;
        let labels = world.namespace_labels(&pod.name.namespace);
        let of_tier = |tier| {
            let policies = world.cluster_policies_of(tier).into_iter();
            policies.filter(|policy| {
                !policy.enforcement.is_audited()
                    && !policy.rules(direction).is_empty()
                    && policy.subject.pods.matches(&pod.labels)
                    && policy.subject.namespaces.matches(&labels)
            })
        };
        let namespace = &pod.name.namespace;
        let first = NamespacedName::new(namespace.clone(), String::new());
        let of_namespace = world.policies.range(first..).take_while(|(name, _)| name.namespace == *namespace);
        let isolating = of_namespace
            .map(|(_, policy)| policy)
            .filter(|policy| !policy.enforcement.is_audited())
            .filter(|policy| policy.rules(direction).is_some() && policy.pod_selector.matches(&pod.labels));
        let mut all: Vec<Policy<'w>> = of_tier(Tier::Admin).map(Policy::Cluster).collect();
        let before = all.len();
        all.extend(isolating.map(Policy::Namespaced));
        if all.len() == before {
            all.extend(of_tier(Tier::Baseline).map(Policy::Cluster));
        }
        all.into_iter().map(|policy| self.number(policy, direction)).collect()
    }

    fn number(&mut self, policy: Policy<'w>, direction: Direction) -> usize {
        let (tier, namespace, name): (_, &'w str, &'w str) = match policy {
            Policy::Cluster(policy) => (Some(policy.tier), "", &policy.name),
            Policy::Namespaced(policy) => (None, &policy.name.namespace, &policy.name.name),
        };
        let key = (direction, tier, namespace, name);
        if let Some(known) = self.known.get(&key) {
            return *known;
        }
        let wanted = |peer: &PeerSet<'w>| self.interest.wants(peer, tier.is_some(), self.names);
        let (list, by_name): (Vec<Clause<'w>>, bool) = match policy {
            Policy::Cluster(policy) => {
                let mut ranked = Vec::new();
                rank(policy, direction, &wanted, &mut ranked);
                let mut protocols = policy.rules(direction).iter().flat_map(|rule| &rule.protocols);
                let by_name = protocols.any(|protocol| matches!(protocol, ProtocolMatch::NamedPort(_)));
                (ranked.into_iter().map(|ranked| ranked.clause).collect(), by_name)
            }
            Policy::Namespaced(policy) => {
                let mut ports = policy.rules(direction).unwrap_or_default().iter().flat_map(|rule| &rule.ports);
                let by_name = ports.any(|port| matches!(port.port, PortMatch::Named(_)));
                (clauses_of(policy, direction, &wanted).unwrap_or_default(), by_name)
            }
        };
        let mut clauses: Vec<Read<'w>> = Vec::new();
        // Those of a rule follow each other, and share their ports.
        for alike in list.chunk_by(|a, b| Arc::ptr_eq(&a.ports, &b.ports) && is_block(a) && is_block(b)) {
            let Some(Clause { peer, ports, action, .. }) = alike.first() else { continue };
            let (ports, action) = (ports.clone(), *action);
            if direction == Direction::Egress {
                for (name, protocol) in &ports.named {
                    self.matchers.number(Matcher::Calls(name, *protocol));
                }
            }
            let doubtful = tier.is_some() && matches!(peer, PeerSet::Pods(_));
            let peers = match peer {
                PeerSet::Anyone => PeersOf::Anyone,
                PeerSet::Pods(set) => PeersOf::Matched(self.pods(*set, tier.is_some())),
                PeerSet::Nodes(selector) => PeersOf::Matched(self.matchers.number(Matcher::Nodes(selector))),
                PeerSet::Addresses(_) => {
                    let all = alike.iter().filter_map(|clause| match &clause.peer {
                        PeerSet::Addresses(addresses) => Some(addresses),
                        _ => None,
                    });
                    PeersOf::Addresses(Addresses::any_of(all))
                }
                PeerSet::Names(names) => {
                    let said = self.interest.named(names, self.names);
                    PeersOf::Matched(self.matchers.number(Matcher::Outside(said)))
                }
            };
            clauses.push(Read { peers, doubtful, ports, action });
        }
        let clauses = Clauses { tier, list: clauses, by_name };
        self.clauses.push(clauses);
        self.known.insert(key, self.clauses.len() - 1);
        self.clauses.len() - 1
    }

    fn pods(&mut self, set: PodSet<'w>, doubtful: bool) -> u32 {
        if doubtful {
            self.matchers.number(Matcher::MayBePod);
        }
        self.matchers.number(Matcher::Pods(set))
    }

    /// What decides over the flows of these pods.
    pub(super) fn program<'s>(&self, text: &'s Text<'w>) -> Program<'s, 'w> {
        let named = if text.direction == Direction::Ingress { Some(text.pod.named_ports.as_slice()) } else { None };
        let of = |policy: &usize| self.clauses.get(*policy);
        let mut program = Program {
            steps: &text.steps,
            by_matcher: HashMap::new(),
            everyone: Vec::new(),
            doubtful: Vec::new(),
            own: named,
            isolated: text.policies.iter().filter_map(of).any(|clauses| clauses.tier.is_none()),
            ask: Vec::new(),
        };
        let mut ask: Vec<u32> = Vec::new();
        for (number, step) in (0u32..).zip(&text.steps) {
            match step.matcher {
                Some(matcher) => {
                    program.by_matcher.entry(matcher).or_default().push(number);
                    ask.push(matcher);
                }
                None => program.everyone.push(number),
            }
            if step.doubtful {
                program.doubtful.push(number);
            }
            if named.is_none() {
                let calls = step.ports.named.iter().map(|(name, protocol)| Matcher::Calls(name, *protocol));
                ask.extend(calls.filter_map(|calls| self.matchers.known(&calls)));
            }
        }
        if !program.doubtful.is_empty() {
            ask.extend(self.matchers.known(&Matcher::MayBePod));
        }
        ask.sort_unstable();
        ask.dedup();
        program.ask = ask;
        program
    }
}

fn is_block(clause: &Clause<'_>) -> bool {
    matches!(clause.peer, PeerSet::Addresses(_))
}

/// What a program asks.
struct Step<'w> {
    /// None: a NetworkPolicy's.
    tier: Option<Tier>,
    /// None: everybody.
    matcher: Option<u32>,
    ports: Arc<PortSet<'w>>,
    action: Action,
    /// It is about pods, and asked of whoever may be one.
    doubtful: bool,
}

/// What decides over the flows of some pods in one direction.
pub(super) struct Program<'s, 'w> {
    steps: &'s [Step<'w>],
    by_matcher: HashMap<u32, Vec<u32>>,
    /// Steps about everybody.
    everyone: Vec<u32>,
    /// Steps that are asked of whoever may be a pod.
    doubtful: Vec<u32>,
    /// Ingress: the named ports of the pods themselves.
    own: Option<&'w [NamedPort]>,
    isolated: bool,
    /// Matchers that tell peers apart.
    ask: Vec<u32>,
}

/// A peer as a program sees it.
pub(super) struct Case<'k> {
    /// Steps that match it, ascending.
    matched: Vec<u32>,
    /// Named ports that steps ask of it, and what they are in it.
    named: &'k [NamedPort],
    may_be_pod: bool,
    key: Vec<u32>,
}

impl Case<'_> {
    /// Two with the same key are judged alike.
    pub(super) fn key(&self) -> Vec<u32> {
        self.key.clone()
    }

    /// How many steps match it.
    pub(super) fn len(&self) -> usize {
        self.matched.len()
    }
}

impl Program<'_, '_> {
    /// Peers that are no strangers to it.
    pub(super) fn tells_apart<'p>(&'p self, peers: &'p Peers<'_>) -> impl Iterator<Item = &'p u32> {
        self.ask.iter().flat_map(|matcher| peers.matched_by(*matcher))
    }

    /// A peer as the program sees it.
    pub(super) fn case<'k>(&self, peer: &Kind<'k>) -> Case<'k> {
        let may_be_pod = peer.may_be_pod && !self.doubtful.is_empty();
        let mut matched = self.everyone.clone();
        matched.extend(peer.matched.iter().filter_map(|matcher| self.by_matcher.get(matcher)).flatten());
        matched.sort_unstable();
        let mut key = vec![u32::from(may_be_pod)];
        key.extend(&matched);
        if self.own.is_none() {
            for step in matched.iter().filter_map(|index| self.step(*index)) {
                let numbers = step.ports.named.iter().map(|(name, protocol)| number_of(peer.named, name, *protocol));
                key.extend(numbers.map(|number| number.map_or(u32::MAX, u32::from)));
            }
        }
        Case { matched, named: peer.named, may_be_pod, key }
    }

    fn step(&self, index: u32) -> Option<&Step<'_>> {
        self.steps.get(usize::try_from(index).ok()?)
    }

    /// The ports on which a peer is allowed.
    pub(super) fn run(&self, case: &Case<'_>) -> Ports {
        let (mut open, mut undecided) = (Ports::none(), Ports::all());
        self.tier(Tier::Admin, case, &mut open, &mut undecided);
        if self.isolated {
            let admitted = case.matched.iter().filter_map(|index| self.step(*index));
            let admitted: Vec<Ports> =
                admitted.filter(|step| step.tier.is_none()).map(|step| self.ports(step, case, true)).collect();
            return open.or(&Ports::any_of(&admitted).and(&undecided));
        }
        self.tier(Tier::Baseline, case, &mut open, &mut undecided);
        open.or(&undecided)
    }

    /// Takes out of `undecided` what a tier decides.
    fn tier(&self, tier: Tier, case: &Case<'_>, open: &mut Ports, undecided: &mut Ports) {
        let (mut passed, mut passed_perhaps) = (Ports::none(), Ports::none());
        let perhaps: &[u32] = if case.may_be_pod { &self.doubtful } else { &[] };
        let mut asked: Vec<u32> = case.matched.iter().chain(perhaps).copied().collect();
        asked.sort_unstable();
        asked.dedup();
        let asked = asked.into_iter().filter_map(|index| Some((index, self.step(index)?)));
        for (index, step) in asked.filter(|(_, step)| step.tier == Some(tier)) {
            let matches = case.matched.binary_search(&index).is_ok();
            let perhaps = !matches && case.may_be_pod && step.doubtful;
            if !matches && !perhaps {
                continue;
            }
            let hit = self.ports(step, case, matches).and(undecided);
            match (step.action, matches) {
                (Action::Deny, _) => *undecided = undecided.without(&hit),
                (Action::Accept, true) => {
                    *open = open.or(&hit.without(&passed_perhaps));
                    passed = passed.or(&hit.and(&passed_perhaps));
                    *undecided = undecided.without(&hit);
                }
                (Action::Pass, true) => {
                    passed = passed.or(&hit);
                    *undecided = undecided.without(&hit);
                }
                (Action::Pass, false) => passed_perhaps = passed_perhaps.or(&hit),
                (Action::Accept, false) => {}
            }
        }
        *undecided = undecided.or(&passed);
    }

    /// The ports of a step. What somebody calls his ports of whom it is not known whether he is a pod is not known either.
    fn ports(&self, step: &Step<'_>, case: &Case<'_>, certain: bool) -> Ports {
        let named = self.own.unwrap_or(case.named);
        step.ports.named.iter().fold(step.ports.fixed.clone(), |ports, (name, protocol)| {
            if !certain && self.own.is_none() {
                return ports.or(&Ports::of_protocol(*protocol));
            }
            number_of(named, name, *protocol).map_or(ports.clone(), |n| ports.or(&Ports::of(*protocol, n, n)))
        })
    }
}

fn number_of(named: &[NamedPort], name: &str, protocol: Protocol) -> Option<u16> {
    named.iter().find(|port| port.name == name && port.protocol == protocol).map(|port| port.number)
}
