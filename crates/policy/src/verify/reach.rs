//! Who reaches whom on which ports.

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
        Self { engine: Engine::new(universe, &universe.outside, &mut ledger), ledger }
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
    let engine = Engine::new(universe, &universe.outside, &mut ledger);
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
pub(super) fn push(cells: &mut Vec<Cell>, (from, to): (usize, usize), found: &[(Family, PortsId)], nothing: PortsId) {
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

pub(super) fn at_outside(endpoint: usize, direction: Direction, addresses: Addresses, ports: PortsId) -> Cell {
    let (own, other) = (Party::Endpoint(endpoint), Party::Outside(addresses));
    match direction {
        Direction::Egress => Cell { from: own, to: other, family: None, ports },
        Direction::Ingress => Cell { from: other, to: own, family: None, ports },
    }
}
