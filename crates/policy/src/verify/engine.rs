//! Which ports are open between every two endpoints, and between each of them and every address outside.
//!
//! Endpoints that the same clauses are about share a *program*; a program is run once over all peers, and a result is looked up by
//! the clauses that match. So the cost grows with programs × peers × clauses of a program, a few nanoseconds each, and
//! sets of ports are made once for each distinct outcome.

use std::collections::{BTreeSet, HashMap};

use towpath_model::{Direction, Family, Labels, NamedPort, Selector};

use super::addresses::Addresses;
use super::clauses::{Action, Clause, Namespaces, PeerSet, PodSet, PortSet, Tiers};
use super::ports::Ports;
use super::ranges::Ranges;
use super::universe::{Endpoint, Universe, in_namespaces};

/// A set of ports in a [`Ledger`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct PortsId(u32);

/// Each distinct set of ports once, so that sets are compared and intersected by number.
#[derive(Debug)]
pub(super) struct Ledger {
    sets: Vec<Ports>,
    ids: HashMap<Ports, PortsId>,
    both: HashMap<(PortsId, PortsId), PortsId>,
}

impl Ledger {
    pub(super) const NONE: PortsId = PortsId(0);
    pub(super) const ALL: PortsId = PortsId(1);

    pub(super) fn new() -> Self {
        let mut ledger = Self { sets: Vec::new(), ids: HashMap::new(), both: HashMap::new() };
        ledger.enter(Ports::none());
        ledger.enter(Ports::all());
        ledger
    }

    pub(super) fn enter(&mut self, ports: Ports) -> PortsId {
        if let Some(id) = self.ids.get(&ports) {
            return *id;
        }
        let id = PortsId(u32::try_from(self.sets.len()).unwrap_or(u32::MAX));
        self.sets.push(ports.clone());
        self.ids.insert(ports, id);
        id
    }

    pub(super) fn get(&self, id: PortsId) -> Ports {
        self.sets.get(id.0 as usize).cloned().unwrap_or_default()
    }

    pub(super) fn and(&mut self, a: PortsId, b: PortsId) -> PortsId {
        match (a, b) {
            (Self::ALL, other) | (other, Self::ALL) => return other,
            (Self::NONE, _) | (_, Self::NONE) => return Self::NONE,
            (a, b) if a == b => return a,
            _ => {}
        }
        let key = (a.min(b), a.max(b));
        if let Some(id) = self.both.get(&key) {
            return *id;
        }
        let id = self.enter(self.get(a).and(&self.get(b)));
        self.both.insert(key, id);
        id
    }
}

/// What a clause of a program wants of a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Wanted {
    Anyone,
    Pods(usize),
    Nodes(usize),
    Block(usize),
}

#[derive(Clone, Debug)]
struct Step<'u> {
    wanted: Wanted,
    ports: PortSet<'u>,
    action: Action,
}

/// What decides over the flows of a subject in one direction. Steps are numbered through all three parts.
#[derive(Clone, Debug, Default)]
struct Program<'u> {
    admin: Vec<Step<'u>>,
    isolation: Option<Vec<Step<'u>>>,
    baseline: Vec<Step<'u>>,
}

impl<'u> Program<'u> {
    fn steps(&self) -> impl Iterator<Item = &Step<'u>> {
        self.admin.iter().chain(self.isolation.iter().flatten()).chain(&self.baseline)
    }

    /// The ports that are open to a peer that exactly these steps match. `named` are the named ports of the destination.
    fn run(&self, matched: &[u32], named: &[NamedPort]) -> Ports {
        let mut matched = matched.iter().copied().peekable();
        let mut begin = 0u32;
        let mut part = |steps: &[Step<'u>]| -> Vec<(Ports, Action)> {
            let end = begin + u32::try_from(steps.len()).unwrap_or(u32::MAX);
            let mut out = Vec::new();
            while let Some(number) = matched.next_if(|n| *n < end) {
                if let Some(step) = steps.get((number - begin) as usize) {
                    out.push((resolve(&step.ports, named), step.action));
                }
            }
            begin = end;
            out
        };
        let (mut open, mut undecided, mut passed) = (Ports::none(), Ports::all(), Ports::none());
        for (ports, action) in part(&self.admin) {
            let hit = ports.and(&undecided);
            undecided = undecided.without(&hit);
            match action {
                Action::Accept => open = open.or(&hit),
                Action::Deny => {}
                Action::Pass => passed = passed.or(&hit),
            }
        }
        undecided = undecided.or(&passed);
        if let Some(isolation) = &self.isolation {
            let admitted: Vec<Ports> = part(isolation).into_iter().map(|(ports, _)| ports).collect();
            return open.or(&Ports::any_of(&admitted).and(&undecided));
        }
        for (ports, action) in part(&self.baseline) {
            let hit = ports.and(&undecided);
            undecided = undecided.without(&hit);
            // After the last tier there is nobody to leave it to but the default.
            if action != Action::Deny {
                open = open.or(&hit);
            }
        }
        open.or(&undecided)
    }
}

fn resolve(set: &PortSet<'_>, named: &[NamedPort]) -> Ports {
    set.named.iter().fold(set.fixed.clone(), |ports, (name, protocol)| {
        let number = named.iter().find(|p| p.name == *name && p.protocol == *protocol).map(|p| p.number);
        number.map_or(ports.clone(), |n| ports.or(&Ports::of(*protocol, n, n)))
    })
}

/// What a program says to everybody.
#[derive(Clone, Debug)]
struct Outcome {
    /// By family (IPv4, IPv6) and endpoint.
    peers: [Vec<PortsId>; 2],
    /// Addresses beyond; those with nothing open are left out.
    outside: Vec<(Addresses, PortsId)>,
}

/// One direction of all endpoints.
#[derive(Debug)]
struct Table {
    /// Of each endpoint; none of a node.
    program: Vec<Option<usize>>,
    outcomes: Vec<Outcome>,
}

/// All verdicts of a universe.
#[derive(Debug)]
pub(super) struct Engine {
    egress: Table,
    ingress: Table,
}

fn slot(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

impl Engine {
    /// Judges a universe; of addresses that are no endpoint's, those `beyond`.
    pub(super) fn new(universe: &Universe, beyond: &Addresses, ledger: &mut Ledger) -> Self {
        Self {
            egress: table(universe, beyond, Direction::Egress, ledger),
            ingress: table(universe, beyond, Direction::Ingress, ledger),
        }
    }

    fn table(&self, direction: Direction) -> &Table {
        match direction {
            Direction::Egress => &self.egress,
            Direction::Ingress => &self.ingress,
        }
    }

    /// The ports that are open from an endpoint to another (by index) over a family that both have. Of an endpoint with itself: between
    /// two of its pods. A node is any node that is not the pod's own.
    pub(super) fn between(&self, from: usize, to: usize, family: Family, ledger: &mut Ledger) -> PortsId {
        let egress = self.egress.of(from, to, family);
        let ingress = self.ingress.of(to, from, family);
        ledger.and(egress, ingress)
    }

    /// The ports that are open between an endpoint and addresses beyond, to (egress) or from (ingress) there; none of a node.
    pub(super) fn outside(&self, endpoint: usize, direction: Direction) -> Option<&[(Addresses, PortsId)]> {
        let table = self.table(direction);
        let program = table.program.get(endpoint).copied().flatten()?;
        table.outcomes.get(program).map(|outcome| outcome.outside.as_slice())
    }
}

impl Table {
    fn of(&self, subject: usize, peer: usize, family: Family) -> PortsId {
        let Some(program) = self.program.get(subject).copied().flatten() else { return Ledger::ALL };
        let row = self.outcomes.get(program).and_then(|outcome| outcome.peers.get(slot(family)));
        row.and_then(|row| row.get(peer)).copied().unwrap_or(Ledger::NONE)
    }
}

/// Which endpoints each distinct selector and block matches.
struct Index<'u> {
    pods: HashMap<PodSet<'u>, usize>,
    pods_match: Vec<Vec<bool>>,
    nodes: HashMap<&'u Selector, usize>,
    nodes_match: Vec<Vec<bool>>,
    blocks: HashMap<&'u Addresses, usize>,
    /// By block: by family and endpoint.
    blocks_match: Vec<[Vec<bool>; 2]>,
}

impl<'u> Index<'u> {
    fn of(universe: &Universe, tiers: &'u Tiers<'u>) -> Self {
        let endpoints = &universe.endpoints;
        let mut index = Self {
            pods: HashMap::new(),
            pods_match: Vec::new(),
            nodes: HashMap::new(),
            nodes_match: Vec::new(),
            blocks: HashMap::new(),
            blocks_match: Vec::new(),
        };
        let namespaces: HashMap<&str, Labels> = endpoints
            .iter()
            .filter_map(Endpoint::namespace)
            .map(|name| (name, universe.world.namespace_labels(name)))
            .collect();
        let mut memo: HashMap<Namespaces<'u>, BTreeSet<&str>> = HashMap::new();
        let mut by_selector: HashMap<&Selector, Vec<bool>> = HashMap::new();
        for set in tiers.pod_sets() {
            if index.pods.contains_key(&set) {
                continue;
            }
            let within = memo.entry(set.namespaces).or_insert_with(|| {
                let inside = namespaces.iter().filter(|(name, labels)| in_namespaces(set.namespaces, name, labels));
                inside.map(|(name, _)| *name).collect()
            });
            let selected = by_selector
                .entry(set.pods)
                .or_insert_with(|| endpoints.iter().map(|e| set.pods.matches(&e.labels)).collect());
            let inside = |e: &Endpoint| e.namespace().is_some_and(|name| within.contains(name));
            let list = endpoints.iter().zip(selected.iter()).map(|(e, selected)| *selected && inside(e)).collect();
            index.pods.insert(set, index.pods_match.len());
            index.pods_match.push(list);
        }
        for clause in tiers.clauses() {
            if let PeerSet::Nodes(selector) = &clause.peer
                && !index.nodes.contains_key(selector)
            {
                index.nodes.insert(selector, index.nodes_match.len());
                let is = |e: &Endpoint| e.namespace().is_none() && selector.matches(&e.labels);
                index.nodes_match.push(endpoints.iter().map(is).collect());
            }
            let PeerSet::Addresses(block) = &clause.peer else { continue };
            if !index.blocks.contains_key(block) {
                index.blocks.insert(block, index.blocks_match.len());
                let of = |family| -> Vec<bool> {
                    endpoints.iter().map(|e| e.address(family).is_some_and(|ip| block.has(ip))).collect()
                };
                index.blocks_match.push([of(Family::V4), of(Family::V6)]);
            }
        }
        index
    }

    fn step(&self, clause: &Clause<'u>, subject: Option<&[NamedPort]>) -> Step<'u> {
        let wanted = match &clause.peer {
            PeerSet::Anyone => Wanted::Anyone,
            PeerSet::Pods(set) => Wanted::Pods(self.pods.get(set).copied().unwrap_or(usize::MAX)),
            PeerSet::Nodes(selector) => Wanted::Nodes(self.nodes.get(selector).copied().unwrap_or(usize::MAX)),
            PeerSet::Addresses(block) => Wanted::Block(self.blocks.get(block).copied().unwrap_or(usize::MAX)),
            // No address is known to be one of theirs.
            PeerSet::Names(_) => Wanted::Block(usize::MAX),
        };
        // Towards the subject, a port's name is the subject's own, whoever the peer is.
        let ports = match subject {
            Some(named) => PortSet { fixed: resolve(&clause.ports, named), named: Vec::new() },
            None => (*clause.ports).clone(),
        };
        Step { wanted, ports, action: clause.action }
    }

    fn matches(&self, wanted: Wanted, peer: usize, family: Family) -> bool {
        match wanted {
            Wanted::Anyone => true,
            Wanted::Pods(set) => self.pods_match.get(set).and_then(|list| list.get(peer)).copied().unwrap_or(false),
            Wanted::Nodes(set) => self.nodes_match.get(set).and_then(|list| list.get(peer)).copied().unwrap_or(false),
            Wanted::Block(block) => {
                let list = self.blocks_match.get(block).and_then(|lists| lists.get(slot(family)));
                list.and_then(|list| list.get(peer)).copied().unwrap_or(false)
            }
        }
    }
}

/// Which clauses are about an endpoint: what its program is known by.
#[derive(PartialEq, Eq, Hash)]
struct About<'e> {
    admin: Vec<usize>,
    namespace: &'e str,
    isolation: Vec<usize>,
    baseline: Vec<usize>,
    /// Only where a clause resolves a port's name in the subject.
    named: &'e [NamedPort],
}

fn table(universe: &Universe, beyond: &Addresses, direction: Direction, ledger: &mut Ledger) -> Table {
    let tiers = Tiers::of(&universe.world, direction);
    let index = Index::of(universe, &tiers);
    let mut known: HashMap<About<'_>, usize> = HashMap::new();
    let mut table = Table { program: Vec::new(), outcomes: Vec::new() };
    for (number, endpoint) in universe.endpoints.iter().enumerate() {
        let Some(namespace) = endpoint.namespace() else {
            table.program.push(None);
            continue;
        };
        let about = about(&tiers, &index, direction, number, endpoint, namespace);
        let program = match known.get(&about) {
            Some(program) => *program,
            None => {
                let subject = (direction == Direction::Ingress).then_some(endpoint.named_ports.as_slice());
                let program = assemble(&tiers, &index, &about, subject);
                table.outcomes.push(outcome(universe, beyond, &index, &program, ledger));
                known.insert(about, table.outcomes.len() - 1);
                table.outcomes.len() - 1
            }
        };
        table.program.push(Some(program));
    }
    table
}

fn about<'e>(
    tiers: &Tiers<'_>,
    index: &Index<'_>,
    direction: Direction,
    number: usize,
    endpoint: &'e Endpoint,
    namespace: &'e str,
) -> About<'e> {
    let matched =
        |set: &PodSet<'_>| index.pods.get(set).is_some_and(|set| index.matches(Wanted::Pods(*set), number, Family::V4));
    let ranked = |list: &[super::clauses::Ranked<'_>]| {
        list.iter().enumerate().filter(|(_, r)| matched(&r.subject)).map(|(i, _)| i).collect::<Vec<_>>()
    };
    let own = tiers.isolation.get(namespace).map(Vec::as_slice).unwrap_or_default();
    let isolation: Vec<usize> =
        own.iter().enumerate().filter(|(_, i)| i.selector.matches(&endpoint.labels)).map(|(i, _)| i).collect();
    let (admin, baseline) = (ranked(&tiers.admin), ranked(&tiers.baseline));
    let mut about = About { admin, namespace, isolation, baseline, named: &[] };
    let by_name = clauses_about(tiers, &about).any(|clause| !clause.ports.named.is_empty());
    if direction == Direction::Ingress && by_name {
        about.named = &endpoint.named_ports;
    }
    about
}

fn picked<'t, T>(list: &'t [T], chosen: &'t [usize]) -> impl Iterator<Item = &'t T> {
    chosen.iter().filter_map(|index| list.get(*index))
}

fn clauses_about<'t, 'u>(tiers: &'t Tiers<'u>, about: &'t About<'_>) -> impl Iterator<Item = &'t Clause<'u>> {
    let own = tiers.isolation.get(about.namespace).map(Vec::as_slice).unwrap_or_default();
    let isolation = picked(own, &about.isolation).flat_map(|i| &i.clauses);
    let ranked = picked(&tiers.admin, &about.admin).chain(picked(&tiers.baseline, &about.baseline));
    ranked.map(|ranked| &ranked.clause).chain(isolation)
}

fn assemble<'u>(tiers: &Tiers<'u>, index: &Index<'u>, about: &About<'_>, subject: Option<&[NamedPort]>) -> Program<'u> {
    let ranked = |list: &[super::clauses::Ranked<'u>], chosen: &[usize]| {
        picked(list, chosen).map(|ranked| index.step(&ranked.clause, subject)).collect::<Vec<_>>()
    };
    let own = tiers.isolation.get(about.namespace).map(Vec::as_slice).unwrap_or_default();
    let isolation = (!about.isolation.is_empty()).then(|| {
        picked(own, &about.isolation).flat_map(|i| &i.clauses).map(|clause| index.step(clause, subject)).collect()
    });
    Program { admin: ranked(&tiers.admin, &about.admin), isolation, baseline: ranked(&tiers.baseline, &about.baseline) }
}

fn outcome(
    universe: &Universe,
    beyond: &Addresses,
    index: &Index<'_>,
    program: &Program<'_>,
    ledger: &mut Ledger,
) -> Outcome {
    let mut memo: HashMap<(Vec<u32>, &[NamedPort]), PortsId> = HashMap::new();
    let mut row = |family: Family| -> Vec<PortsId> {
        let mut row = Vec::with_capacity(universe.endpoints.len());
        for (peer, endpoint) in universe.endpoints.iter().enumerate() {
            let (mut matched, mut by_name) = (Vec::new(), false);
            for (number, step) in (0u32..).zip(program.steps()) {
                if index.matches(step.wanted, peer, family) {
                    matched.push(number);
                    by_name |= !step.ports.named.is_empty();
                }
            }
            let named: &[NamedPort] = if by_name { &endpoint.named_ports } else { &[] };
            let id = memo.entry((matched, named)).or_insert_with_key(|key| ledger.enter(program.run(&key.0, key.1)));
            row.push(*id);
        }
        row
    };
    let used = |family| universe.endpoints.iter().any(|e| e.address(family).is_some());
    let mut peers = [Vec::new(), Vec::new()];
    for family in [Family::V4, Family::V6].into_iter().filter(|family| used(*family)) {
        if let Some(place) = peers.get_mut(slot(family)) {
            *place = row(family);
        }
    }
    Outcome { peers, outside: outside(beyond, index, program, ledger) }
}

/// The address line beyond, cut where a block of the program begins or ends, by what is open.
fn outside(
    beyond: &Addresses,
    index: &Index<'_>,
    program: &Program<'_>,
    ledger: &mut Ledger,
) -> Vec<(Addresses, PortsId)> {
    let blocks: HashMap<usize, &Addresses> = index.blocks.iter().map(|(block, number)| (*number, *block)).collect();
    let mut active: BTreeSet<u32> = BTreeSet::new();
    let mut events: Vec<(u128, u32, bool)> = Vec::new();
    for (number, step) in (0u32..).zip(program.steps()) {
        match step.wanted {
            Wanted::Anyone => {
                active.insert(number);
            }
            Wanted::Pods(_) | Wanted::Nodes(_) => {}
            Wanted::Block(block) => {
                for (first, last) in blocks.get(&block).into_iter().flat_map(|block| block.0.iter()) {
                    events.push((first, number, true));
                    events.extend(last.checked_add(1).map(|next| (next, number, false)));
                }
            }
        }
    }
    events.sort_unstable();
    let mut memo: HashMap<Vec<u32>, PortsId> = HashMap::new();
    let mut parts: HashMap<PortsId, Vec<(u128, u128)>> = HashMap::new();
    let mut begin = 0u128;
    let mut events = events.into_iter().peekable();
    loop {
        while let Some((_, number, starts)) = events.next_if(|(at, ..)| *at == begin) {
            if starts {
                active.insert(number);
            } else {
                active.remove(&number);
            }
        }
        let next = events.peek().map(|(at, ..)| *at);
        let last = next.map_or(u128::MAX, |at| at - 1);
        let key: Vec<u32> = active.iter().copied().collect();
        let id = *memo.entry(key).or_insert_with_key(|key| ledger.enter(program.run(key, &[])));
        parts.entry(id).or_default().push((begin, last));
        match next {
            Some(at) => begin = at,
            None => break,
        }
    }
    let mut out: Vec<(Addresses, PortsId)> = parts
        .into_iter()
        .filter(|(id, _)| *id != Ledger::NONE)
        .map(|(id, list)| (Addresses(Ranges::collect(list)).and(beyond), id))
        .filter(|(addresses, _)| !addresses.is_empty())
        .collect();
    out.sort();
    out
}
