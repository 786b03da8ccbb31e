//! Who reaches whom on which ports; and what a change newly allows and newly denies.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;
use towpath_model::{Direction, Family};

use super::addresses::Addresses;
use super::engine::{Engine, Ledger, PortsId};
use super::ports::Ports;
use super::rows::{Cell, Names, Party, Row, merge};
use super::universe::{Universe, Who};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// The table of a universe.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Reach {
    /// Who reaches whom. What is in no row is closed.
    pub rows: Vec<Row>,
    /// Workloads that were asked about.
    pub workloads: usize,
    /// Workloads on their nodes' addresses: NetworkPolicy does not apply to them, and they are not in the rows.
    pub on_nodes: Vec<String>,
    /// Pods without an address that were given one of the pod range.
    pub placed: usize,
    /// Blocks within the pod range: which of them a pod is in depends on the address it gets.
    pub inner_blocks: usize,
}

/// The verdicts of a universe, to be asked one by one.
#[derive(Debug)]
pub struct Matrix {
    engine: Engine,
    ledger: Ledger,
}

impl Matrix {
    /// Judges everything.
    pub fn of(universe: &Universe) -> Self {
        let mut ledger = Ledger::new();
        Self { engine: Engine::new(universe, &mut ledger), ledger }
    }

    /// The ports that are open from one of [`Universe::endpoints`] to another, by index, over a family that both have. From an endpoint to
    /// itself: between two of its pods.
    pub fn between(&mut self, from: usize, to: usize, family: Family) -> Ports {
        let id = self.engine.between(from, to, family, &mut self.ledger);
        self.ledger.get(id)
    }

    /// The ports that are open from an endpoint to addresses outside (egress) or from there to it (ingress). Addresses that are in
    /// no entry: none. A node has no entries.
    pub fn outside(&self, endpoint: usize, direction: Direction) -> Vec<(Addresses, Ports)> {
        let list = self.engine.outside(endpoint, direction).unwrap_or_default();
        list.iter().map(|(addresses, id)| (addresses.clone(), self.ledger.get(*id))).collect()
    }
}

/// The table of who reaches whom; with a namespace, only rows that begin or end in it.
pub fn reach(universe: &Universe, namespace: Option<&str>) -> Reach {
    let mut ledger = Ledger::new();
    let engine = Engine::new(universe, &mut ledger);
    let names = Names::of(universe);
    let count = universe.endpoints.len();
    let inside = |index: usize| namespace.is_none() || names.namespace(index) == namespace;
    let mut cells = Vec::new();
    for from in 0..count {
        for to in (0..count).filter(|to| inside(from) || inside(*to)) {
            let by_family = families(universe, from, to).into_iter();
            let found: Vec<_> = by_family.map(|f| (f, engine.between(from, to, f, &mut ledger))).collect();
            push(&mut cells, (from, to), &found, Ledger::NONE);
        }
        for direction in [Direction::Egress, Direction::Ingress] {
            for (addresses, ports) in engine.outside(from, direction).filter(|_| inside(from)).into_iter().flatten() {
                cells.push(at_outside(from, direction, addresses.clone(), *ports));
            }
        }
    }
    let is_workload = |e: &&super::universe::Endpoint| matches!(e.who, Who::Workload(_, 0));
    Reach {
        rows: merge(cells, &names, &ledger),
        workloads: universe.endpoints.iter().filter(is_workload).count(),
        on_nodes: universe.on_nodes.iter().map(ToString::to_string).collect(),
        placed: universe.placed,
        inner_blocks: universe.inner_blocks,
    }
}

/// Families over which two endpoints are judged. Two nodes: none, for no policy is between them; nor is any between a pod and itself.
pub(super) fn families(universe: &Universe, from: usize, to: usize) -> Vec<Family> {
    let (Some(a), Some(b)) = (universe.endpoints.get(from), universe.endpoints.get(to)) else { return Vec::new() };
    let alone = from == to && a.pods.len() < 2;
    if alone || (a.namespace().is_none() && b.namespace().is_none()) {
        return Vec::new();
    }
    FAMILIES.into_iter().filter(|f| a.address(*f).is_some() && b.address(*f).is_some()).collect()
}

/// One cell where the families agree, else one each; none for `nothing`.
fn push(cells: &mut Vec<Cell>, (from, to): (usize, usize), found: &[(Family, PortsId)], nothing: PortsId) {
    let cell = |family, ports| Cell { from: Party::Endpoint(from), to: Party::Endpoint(to), family, ports };
    match found {
        [] => {}
        [(_, ports), rest @ ..] if rest.iter().all(|(_, other)| other == ports) => {
            if *ports != nothing {
                cells.push(cell(None, *ports));
            }
        }
        several => {
            let open = several.iter().filter(|(_, ports)| *ports != nothing);
            cells.extend(open.map(|(family, ports)| cell(Some(*family), *ports)));
        }
    }
}

fn at_outside(endpoint: usize, direction: Direction, addresses: Addresses, ports: PortsId) -> Cell {
    let (own, other) = (Party::Endpoint(endpoint), Party::Outside(addresses));
    match direction {
        Direction::Egress => Cell { from: own, to: other, family: None, ports },
        Direction::Ingress => Cell { from: other, to: own, family: None, ports },
    }
}

/// What a change does.
#[derive(Clone, Debug, Serialize)]
pub struct Difference {
    /// Open after it and not before.
    pub allowed: Vec<Row>,
    /// Open before it and not after.
    pub denied: Vec<Row>,
    /// Workloads and nodes that are there after it only; they are in no row.
    pub added: Vec<String>,
    /// Workloads and nodes that are there before it only; they are in no row.
    pub removed: Vec<String>,
}

impl Difference {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.allowed.is_empty() && self.denied.is_empty() && self.added.is_empty() && self.removed.is_empty()
    }
}

/// What was open and is open: two sets of ports, compared once.
type Compared = BTreeMap<(PortsId, PortsId), (PortsId, PortsId)>;

/// What `after` allows that `before` does not, and the other way round.
pub fn diff(before: &Universe, after: &Universe) -> Difference {
    let mut ledger = Ledger::new();
    let old = Engine::new(before, &mut ledger);
    let new = Engine::new(after, &mut ledger);
    let index_of = |universe: &Universe| -> BTreeMap<Who, usize> {
        universe.endpoints.iter().enumerate().map(|(i, e)| (e.who.clone(), i)).collect()
    };
    let (was, is) = (index_of(before), index_of(after));
    let both: Vec<(usize, usize)> = is.iter().filter_map(|(who, new)| Some((*was.get(who)?, *new))).collect();
    let mut memo = Compared::new();
    let (mut allowed, mut denied) = (Vec::new(), Vec::new());
    for (from_old, from_new) in &both {
        for (to_old, to_new) in &both {
            let (mut more, mut less) = (Vec::new(), Vec::new());
            let common = families(before, *from_old, *to_old);
            for family in families(after, *from_new, *to_new).into_iter().filter(|f| common.contains(f)) {
                let a = old.between(*from_old, *to_old, family, &mut ledger);
                let b = new.between(*from_new, *to_new, family, &mut ledger);
                let (opened, closed) = compare(&mut memo, &mut ledger, a, b);
                more.push((family, opened));
                less.push((family, closed));
            }
            push(&mut allowed, (*from_new, *to_new), &more, Ledger::NONE);
            push(&mut denied, (*from_new, *to_new), &less, Ledger::NONE);
        }
        for direction in [Direction::Egress, Direction::Ingress] {
            let parts = (old.outside(*from_old, direction), new.outside(*from_new, direction));
            if let (Some(a), Some(b)) = parts {
                let common = before.outside.and(&after.outside);
                for (addresses, a, b) in crossed(a, b, &common) {
                    let (opened, closed) = compare(&mut memo, &mut ledger, a, b);
                    for (cells, ports) in [(&mut allowed, opened), (&mut denied, closed)] {
                        if ports != Ledger::NONE {
                            cells.push(at_outside(*from_new, direction, addresses.clone(), ports));
                        }
                    }
                }
            }
        }
    }
    let (old_names, names) = (Names::of(before), Names::of(after));
    let gone = |of: &BTreeMap<Who, usize>, other: &BTreeMap<Who, usize>, names: &Names| -> BTreeSet<String> {
        of.iter().filter(|(who, _)| !other.contains_key(who)).map(|(_, i)| names.endpoint(*i).to_owned()).collect()
    };
    Difference {
        added: gone(&is, &was, &names).into_iter().collect(),
        removed: gone(&was, &is, &old_names).into_iter().collect(),
        allowed: merge(united(allowed), &names, &ledger),
        denied: merge(united(denied), &names, &ledger),
    }
}

fn compare(memo: &mut Compared, ledger: &mut Ledger, a: PortsId, b: PortsId) -> (PortsId, PortsId) {
    if a == b {
        return (Ledger::NONE, Ledger::NONE);
    }
    *memo.entry((a, b)).or_insert_with(|| {
        let (old, new) = (ledger.get(a), ledger.get(b));
        (ledger.enter(new.without(&old)), ledger.enter(old.without(&new)))
    })
}

/// Two partitions of the addresses outside laid over each other: where they say different things.
fn crossed(
    a: &[(Addresses, PortsId)],
    b: &[(Addresses, PortsId)],
    outside: &Addresses,
) -> Vec<(Addresses, PortsId, PortsId)> {
    if a == b {
        return Vec::new();
    }
    let closed = |list: &[(Addresses, PortsId)]| {
        let open = Addresses::any_of(list.iter().map(|(addresses, _)| addresses));
        let mut all: Vec<(Addresses, PortsId)> = list.to_vec();
        all.push((outside.without(&open), Ledger::NONE));
        all
    };
    let (a, b) = (closed(a), closed(b));
    let mut out = Vec::new();
    for (x, old) in &a {
        for (y, new) in b.iter().filter(|(_, new)| new != old) {
            let part = x.and(y).and(outside);
            if !part.is_empty() {
                out.push((part, *old, *new));
            }
        }
    }
    out
}

/// Outside parts of one endpoint that come to the same ports, as one.
fn united(cells: Vec<Cell>) -> Vec<Cell> {
    let mut out = Vec::new();
    let mut parts: BTreeMap<(bool, usize, PortsId), Addresses> = BTreeMap::new();
    for cell in cells {
        match (cell.from, cell.to) {
            (Party::Endpoint(from), Party::Outside(addresses)) => {
                let part = parts.entry((true, from, cell.ports)).or_default();
                *part = part.or(&addresses);
            }
            (Party::Outside(addresses), Party::Endpoint(to)) => {
                let part = parts.entry((false, to, cell.ports)).or_default();
                *part = part.or(&addresses);
            }
            (from, to) => out.push(Cell { from, to, ..cell }),
        }
    }
    out.extend(parts.into_iter().map(|((egress, endpoint, ports), addresses)| {
        let direction = if egress { Direction::Egress } else { Direction::Ingress };
        at_outside(endpoint, direction, addresses, ports)
    }));
    out
}
