//! What a change newly allows and newly denies.
//!
//! Both sides of a [`Change`] are looked at with the same eyes: pods are told apart wherever the policies of either side do, and a pod
//! that has no address has the same one on both. So what is paired is the same pods.

use std::collections::{BTreeMap, BTreeSet};

use ipnet::IpNet;
use serde::Serialize;
use towpath_model::{Direction, NamespacedName, World};

use super::addresses::Addresses;
use super::engine::{Engine, Ledger, PortsId};
use super::reach::{at_outside, families, push};
use super::rows::{Cell, Names, Party, Row, merge};
use super::universe::{Ground, Owners, Seen, Universe, Who, Workload, workload_of};

/// Two universes, one before and one after a change, of which it is known who in the one is whom in the other.
#[derive(Clone, Debug)]
pub struct Change {
    before: Universe,
    after: Universe,
    /// Endpoints of both, by index.
    pairs: Vec<(usize, usize)>,
}

/// What the policies of both sides see of a pod before and after. A pod that is on one side only counts to those of its workload that look
/// like it there; else the other side is none.
type Class = (Option<Seen>, Option<Seen>);

impl Change {
    /// Works out who there is on both sides. Without `pod_ranges`: those of the nodes of either, else
    /// [`DEFAULT_POD_RANGE`](super::universe::DEFAULT_POD_RANGE).
    pub fn of(before: (World, &Owners), after: (World, &Owners), pod_ranges: &[IpNet]) -> Self {
        let ((was, was_owners), (is, is_owners)) = (before, after);
        let mut worlds = [was, is];
        let ground = Ground::prepare(&mut worlds, pod_ranges);
        let [was, is] = worlds;
        let (old, new) = (looks(&ground, &was, was_owners), looks(&ground, &is, is_owners));
        let old_class = classes(&old, &new, |own, other| (own, other));
        let new_class = classes(&new, &old, |own, other| (other, own));
        let (before, before_classes) =
            Universe::on(&ground, was, was_owners, |pod, _| old_class.get(&pod.name).cloned());
        let (after, after_classes) = Universe::on(&ground, is, is_owners, |pod, _| new_class.get(&pod.name).cloned());
        let pairs = pairs((&before, &before_classes), (&after, &after_classes));
        Self { before, after, pairs }
    }

    /// Before it.
    pub fn before(&self) -> &Universe {
        &self.before
    }

    /// After it.
    pub fn after(&self) -> &Universe {
        &self.after
    }
}

/// The workload of every pod that has an address of its own, and what policy sees of it.
type Looks = BTreeMap<NamespacedName, (Workload, Seen)>;

fn looks(ground: &Ground, world: &World, owners: &Owners) -> Looks {
    let pods = world.pods.values().filter(|pod| pod.on_pod_network());
    pods.map(|pod| (pod.name.clone(), (workload_of(pod, owners), ground.seen(pod)))).collect()
}

/// The classes of the pods of one side.
fn classes(
    own: &Looks,
    other: &Looks,
    class: impl Fn(Option<Seen>, Option<Seen>) -> Class,
) -> BTreeMap<NamespacedName, Class> {
    let mut out = BTreeMap::new();
    let mut shared: BTreeMap<&(Workload, Seen), Class> = BTreeMap::new();
    for (name, look) in own {
        if let Some((_, there)) = other.get(name).filter(|(workload, _)| *workload == look.0) {
            let both = class(Some(look.1.clone()), Some(there.clone()));
            shared.entry(look).or_insert_with(|| both.clone());
            out.insert(name.clone(), both);
        }
    }
    for (name, look) in own {
        let alike = || shared.get(look).cloned().unwrap_or_else(|| class(Some(look.1.clone()), None));
        out.entry(name.clone()).or_insert_with(alike);
    }
    out
}

/// Who of one side is whom of the other: workloads by class, then by looks, then what is the only one left of its workload on each side;
/// nodes by name.
fn pairs(
    (before, before_classes): (&Universe, &[Option<Class>]),
    (after, after_classes): (&Universe, &[Option<Class>]),
) -> Vec<(usize, usize)> {
    type Sides = BTreeMap<Workload, BTreeMap<Class, usize>>;
    let by_workload = |universe: &Universe, classes: &[Option<Class>]| -> Sides {
        let mut sides = Sides::new();
        for (index, (endpoint, class)) in universe.endpoints.iter().zip(classes).enumerate() {
            if let (Who::Workload(workload, _), Some(class)) = (&endpoint.who, class) {
                sides.entry(workload.clone()).or_default().insert(class.clone(), index);
            }
        }
        sides
    };
    let nodes = |universe: &Universe| -> BTreeMap<Who, usize> {
        let all = universe.endpoints.iter().enumerate();
        all.filter(|(_, e)| matches!(e.who, Who::Node(..))).map(|(index, e)| (e.who.clone(), index)).collect()
    };
    let mut out = Vec::new();
    let (olds, mut news) = (by_workload(before, before_classes), by_workload(after, after_classes));
    for (workload, mut old) in olds {
        let Some(new) = news.get_mut(&workload) else { continue };
        old.retain(|class, index| match new.remove(class) {
            Some(other) => {
                out.push((*index, other));
                false
            }
            None => true,
        });
        old.retain(|(seen, _), index| match new.remove(&(None, seen.clone())) {
            Some(other) => {
                out.push((*index, other));
                false
            }
            None => true,
        });
        if let (1, 1, Some(index), Some(other)) = (old.len(), new.len(), old.values().next(), new.values().next()) {
            out.push((*index, *other));
        }
    }
    let there = nodes(after);
    out.extend(nodes(before).into_iter().filter_map(|(who, index)| Some((index, *there.get(&who)?))));
    out.sort_unstable();
    out
}

/// What a change does.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Difference {
    /// Open after it and not before.
    pub allowed: Vec<Row>,
    /// Open before it and not after.
    pub denied: Vec<Row>,
    /// Workloads and nodes that are there after it only; they are in no row.
    pub added: Vec<String>,
    /// Workloads and nodes that are there before it only; they are in no row.
    pub removed: Vec<String>,
    /// Addresses of the pod ranges that no pod has, about which the blocks of the two sides say different things: whom that concerns depends
    /// on which pod gets them, and is in no row.
    pub unassigned: Vec<IpNet>,
    /// Pods without an address that were given one of the pod range, on the side where they are more.
    pub placed: usize,
    /// Blocks within the pod range, of either side.
    pub inner_blocks: usize,
}

impl Difference {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.allowed.is_empty()
            && self.denied.is_empty()
            && self.added.is_empty()
            && self.removed.is_empty()
            && self.unassigned.is_empty()
    }
}

/// What was open and is open: two sets of ports, compared once.
type Compared = BTreeMap<(PortsId, PortsId), (PortsId, PortsId)>;

/// What is after a change allowed that was not before, and the other way round.
pub fn diff(change: &Change) -> Difference {
    let (before, after) = (&change.before, &change.after);
    let unheld = before.unheld.and(&after.unheld);
    let outside = before.outside.and(&after.outside);
    let mut ledger = Ledger::new();
    let old = Engine::new(before, &outside.or(&unheld), &mut ledger);
    let new = Engine::new(after, &outside.or(&unheld), &mut ledger);
    let mut memo = Compared::new();
    let (mut allowed, mut denied, mut unassigned) = (Vec::new(), Vec::new(), Addresses::default());
    for (from_old, from_new) in &change.pairs {
        for (to_old, to_new) in &change.pairs {
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
            let (Some(a), Some(b)) = parts else { continue };
            for (addresses, _, _) in crossed(a, b, &unheld) {
                unassigned = unassigned.or(&addresses);
            }
            for (addresses, a, b) in crossed(a, b, &outside) {
                let (opened, closed) = compare(&mut memo, &mut ledger, a, b);
                for (cells, ports) in [(&mut allowed, opened), (&mut denied, closed)] {
                    if ports != Ledger::NONE {
                        cells.push(at_outside(*from_new, direction, addresses.clone(), ports));
                    }
                }
            }
        }
    }
    let (old_names, names) = (Names::of(before), Names::of(after));
    let left = |universe: &Universe, paired: BTreeSet<usize>, names: &Names| -> Vec<String> {
        let unpaired = (0..universe.endpoints.len()).filter(|index| !paired.contains(index));
        unpaired.map(|index| names.endpoint(index).to_owned()).collect::<BTreeSet<_>>().into_iter().collect()
    };
    Difference {
        added: left(after, change.pairs.iter().map(|(_, new)| *new).collect(), &names),
        removed: left(before, change.pairs.iter().map(|(old, _)| *old).collect(), &old_names),
        allowed: merge(united(allowed), &names, &ledger),
        denied: merge(united(denied), &names, &ledger),
        unassigned: unassigned.prefixes(),
        placed: before.placed.max(after.placed),
        inner_blocks: after.inner_blocks,
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
