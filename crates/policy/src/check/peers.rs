//! All peers, sorted into kinds that nothing in force on the node, in policies or in the image, tells apart.
//!
//! Unlike the compiler's sorting, this one knows nothing of groups and regions. An address has a *face*, what selectors see of its holder; the
//! face, the interval of the [`Line`] and the class that the image gives the address make its *spot*; and spots are of one *kind* if clauses
//! and the image see the same in them. So labels of a namespace move spots, not addresses, and a clause that is new looks at faces.
//!
//! What is left of faces, spots and kinds that nobody has stays until everything is read anew ([`Peers::size`] says how much there is).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;

use towpath_model::desired::{ClassId, PolicyImage};
use towpath_model::{Labels, NamedPort, Node, NodeName, Shared, World};

use super::effort::TooMuch;
use super::line::{Line, Moved};
use super::matchers::Matchers;
use crate::verify::addresses::{Addresses, address as at, number};
use crate::view::{Holder, Holders, PeerPod, View, never_given};

/// What selectors see of a holder.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Who {
    /// Nobody whom one could match.
    Nobody,
    Nodes(Vec<NodeName>),
    Pod {
        namespace: String,
        labels: Shared<Labels>,
        named: Shared<Vec<NamedPort>>,
    },
}

#[derive(Clone, Debug)]
struct Face {
    who: Who,
    /// Numbers of the matchers that it answers with yes, ascending.
    matched: Vec<u32>,
    spots: Vec<u32>,
}

/// The face of who is nobody.
const NOBODY: u32 = 0;

/// What an address is: who holds it, where it is, and its class.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Stand {
    face: u32,
    blocks: u32,
    class: ClassId,
    may_be_pod: bool,
}

#[derive(Clone, Debug)]
struct Spot {
    stand: Stand,
    kind: u32,
    /// Addresses, and intervals with addresses that are nobody's.
    count: u32,
}

/// An address that somebody holds whom selectors may match, or that the image has a class for.
#[derive(Clone, Copy, Debug, Default)]
struct Place {
    face: u32,
    class: Option<ClassId>,
    spot: Option<u32>,
}

/// Peers that nothing tells apart.
#[derive(Clone, Debug)]
pub(super) struct Kind {
    /// Numbers of the matchers that match it, ascending.
    pub(super) matched: Vec<u32>,
    pub(super) class: ClassId,
    /// Its named ports that some matcher asks for.
    pub(super) named: Vec<NamedPort>,
    pub(super) may_be_pod: bool,
    /// Spots.
    count: u32,
}

/// What makes two peers of one kind: matchers, what the ports that matchers ask for are, and the class.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct Same {
    matched: Vec<u32>,
    ports: Vec<u16>,
    class: ClassId,
    may_be_pod: bool,
}

/// All peers.
#[derive(Clone, Debug)]
pub(super) struct Peers {
    places: BTreeMap<u128, Place>,
    line: Line,
    faces: Vec<Face>,
    /// Faces by the hash of who they are, and those of pods by namespace.
    by_hash: HashMap<u64, Vec<u32>>,
    by_namespace: HashMap<String, Vec<u32>>,
    hashes: RandomState,
    spots: Vec<Spot>,
    stands: HashMap<Stand, u32>,
    kinds: Vec<Kind>,
    known: HashMap<Same, u32>,
    by_matcher: HashMap<u32, Vec<u32>>,
    by_class: HashMap<ClassId, Vec<u32>>,
    /// So many matchers have been asked of faces and addresses.
    asked: u32,
    /// Addresses that are to be sorted again.
    unsorted: BTreeSet<u128>,
    moved: Moved,
    /// Kinds that nobody was of when they were last asked for.
    fresh: BTreeSet<u32>,
}

fn index<T>(list: &[T], number: u32) -> Option<&T> {
    list.get(usize::try_from(number).ok()?)
}

fn index_mut<T>(list: &mut [T], number: u32) -> Option<&mut T> {
    list.get_mut(usize::try_from(number).ok()?)
}

fn next<T>(list: &[T]) -> u32 {
    u32::try_from(list.len()).unwrap_or(u32::MAX)
}

impl Peers {
    /// Nobody, on a line that is cut where pods may be of which nobody has heard, if `doubts` says that somebody asks.
    pub(super) fn nobody(world: &World, doubts: bool) -> Self {
        let pods = if doubts { where_pods_may_be(world) } else { Addresses::default() };
        let line = Line::of(&pods);
        let moved = Moved { cut: line.starts().collect(), ..Moved::default() };
        Self {
            places: BTreeMap::new(),
            line,
            faces: vec![Face { who: Who::Nobody, matched: Vec::new(), spots: Vec::new() }],
            by_hash: HashMap::new(),
            by_namespace: HashMap::new(),
            hashes: RandomState::new(),
            spots: Vec::new(),
            stands: HashMap::new(),
            kinds: Vec::new(),
            known: HashMap::new(),
            by_matcher: HashMap::new(),
            by_class: HashMap::new(),
            asked: 0,
            unsorted: BTreeSet::new(),
            moved,
            fresh: BTreeSet::new(),
        }
    }

    /// Takes in all who hold an address, or have a class, at once.
    pub(super) fn fill(&mut self, holders: &Holders<'_>, image: &PolicyImage, view: &View<'_>, matchers: &Matchers) {
        let held = holders.all().map(|(address, _)| address);
        let mut addresses: Vec<IpAddr> = held.chain(image.pod_classes.keys().copied()).collect();
        addresses.sort_unstable();
        addresses.dedup();
        let places = addresses.into_iter().filter_map(|address| {
            let face = self.face(holders.holder(address), holders.nodes_at(address), view, matchers);
            let class = image.pod_classes.get(&address).copied();
            (face != NOBODY || class.is_some()).then(|| (number(address), Place { face, class, spot: None }))
        });
        let mut places: BTreeMap<u128, Place> = places.collect();
        for (address, place) in &mut places {
            let stand = self.stand(*address, place.face, place.class);
            place.spot = stand.map(|stand| self.enter(stand, matchers));
        }
        self.places = places;
        // All of them are as they are now: what is nobody's is left.
        self.moved.cut.extend(std::mem::take(&mut self.moved.renewed));
    }

    /// Has an address held by somebody, or nobody.
    pub(super) fn hold(&mut self, address: IpAddr, holders: &Holders<'_>, view: &View<'_>, matchers: &Matchers) {
        let face = self.face(holders.holder(address), holders.nodes_at(address), view, matchers);
        self.change(number(address), |place| place.face = face);
    }

    /// Takes up the class that an image gives an address.
    pub(super) fn class(&mut self, address: IpAddr, image: &PolicyImage) {
        let class = image.pod_classes.get(&address).copied();
        self.change(number(address), |place| place.class = class);
    }

    fn change(&mut self, address: u128, change: impl FnOnce(&mut Place)) {
        let known = self.places.get(&address).copied();
        let mut place = known.unwrap_or_default();
        change(&mut place);
        if place.class.is_some() || place.face != NOBODY {
            self.places.insert(address, place);
            self.unsorted.insert(address);
            if known.is_none() {
                self.take(address);
            }
        } else if known.is_some() {
            self.places.remove(&address);
            place.spot.into_iter().for_each(|spot| self.leave(spot));
            self.give_back(address);
        }
    }

    /// An address is somebody's that was nobody's.
    fn take(&mut self, address: u128) {
        if let Some((start, interval)) = self.line.interval(address)
            && interval.free == Some(address)
        {
            let free = self.free_from(address, self.line.last(start));
            self.line.interval_mut(address).into_iter().for_each(|interval| interval.free = free);
            self.moved.cut.insert(start);
        }
    }

    /// The other way round.
    fn give_back(&mut self, address: u128) {
        if let Some((start, interval)) = self.line.interval(address)
            && interval.free.is_none_or(|free| address < free)
        {
            self.line.interval_mut(address).into_iter().for_each(|interval| interval.free = Some(address));
            self.moved.cut.insert(start);
        }
    }

    /// The first address that is nobody's from there on.
    fn free_from(&self, first: u128, last: u128) -> Option<u128> {
        let mut free = Some(first);
        for (held, _) in self.places.range(first..=last) {
            if free != Some(*held) {
                break;
            }
            free = held.checked_add(1).filter(|next| *next <= last);
        }
        free
    }

    /// Looks at the labels of a namespace again.
    pub(super) fn relabel(&mut self, namespace: &str, view: &View<'_>, matchers: &Matchers) {
        let labels = view.world.namespace_labels(namespace);
        for face in self.by_namespace.get(namespace).cloned().unwrap_or_default() {
            let Some(known) = index_mut(&mut self.faces, face) else { continue };
            let Who::Pod { namespace, labels: own, named } = &known.who else { continue };
            let matched = matchers.of_peer(&PeerPod { namespace, labels: own, named_ports: named }, &labels, 0);
            if known.matched != matched {
                known.matched = matched;
                self.move_spots(face, matchers);
            }
        }
    }

    /// Asks everybody what is asked newly.
    pub(super) fn ask(&mut self, view: &View<'_>, matchers: &Matchers) -> Result<(), TooMuch> {
        let from = std::mem::replace(&mut self.asked, matchers.len());
        if from == matchers.len() {
            return Ok(());
        }
        self.line.add_blocks(matchers.blocks(from), &mut self.moved)?;
        let mut namespaces: HashMap<&str, Labels> = HashMap::new();
        let mut changed = Vec::new();
        for (face, known) in (0u32..).zip(&mut self.faces) {
            let matched = match &known.who {
                Who::Nobody => Vec::new(),
                Who::Nodes(names) => {
                    let nodes: Vec<&Node> = names.iter().filter_map(|name| view.world.nodes.get(name)).collect();
                    matchers.of_nodes(&nodes, from)
                }
                Who::Pod { namespace, labels, named } => {
                    let of_namespace =
                        namespaces.entry(namespace).or_insert_with(|| view.world.namespace_labels(namespace));
                    matchers.of_peer(&PeerPod { namespace, labels, named_ports: named }, of_namespace, from)
                }
            };
            if !matched.is_empty() {
                known.matched.extend(matched);
                changed.push(face);
            }
        }
        changed.into_iter().for_each(|face| self.move_spots(face, matchers));
        Ok(())
    }

    /// Takes up prefixes of the image that changed.
    pub(super) fn prefixes<'n>(
        &mut self,
        changed: impl Iterator<Item = &'n ipnet::IpNet> + Clone,
        image: &PolicyImage,
    ) {
        self.line.follow(changed, image, &mut self.moved);
    }

    /// Sorts whoever is to be sorted again: the kinds that are new since.
    pub(super) fn sort(&mut self, matchers: &Matchers) -> BTreeSet<u32> {
        let moved = std::mem::take(&mut self.moved);
        for start in &moved.renewed {
            let last = self.line.last(*start);
            self.unsorted.extend(self.places.range(*start..=last).map(|(address, _)| *address));
        }
        for address in std::mem::take(&mut self.unsorted) {
            let Some(place) = self.places.get(&address).copied() else { continue };
            let Some(stand) = self.stand(address, place.face, place.class) else { continue };
            let spot = self.enter(stand, matchers);
            place.spot.into_iter().for_each(|spot| self.leave(spot));
            self.places.get_mut(&address).into_iter().for_each(|place| place.spot = Some(spot));
        }
        for start in moved.renewed.iter().chain(&moved.cut) {
            self.sort_free(*start, matchers);
        }
        let mut fresh = std::mem::take(&mut self.fresh);
        fresh.retain(|kind| self.kind(*kind).is_some());
        fresh
    }

    /// Sorts what is nobody's of an interval.
    fn sort_free(&mut self, start: u128, matchers: &Matchers) {
        let Some((_, interval)) = self.line.interval(start) else { return };
        let (free, before) = (interval.free.or_else(|| self.free_from(start, self.line.last(start))), interval.spot);
        let stand = free.and_then(|free| self.stand(free, NOBODY, None));
        let spot = stand.map(|stand| self.enter(stand, matchers));
        before.into_iter().for_each(|spot| self.leave(spot));
        self.line.interval_mut(start).into_iter().for_each(|interval| (interval.free, interval.spot) = (free, spot));
    }

    fn stand(&self, address: u128, face: u32, class: Option<ClassId>) -> Option<Stand> {
        let (_, interval) = self.line.interval(address)?;
        let class = class.unwrap_or(interval.class);
        Some(Stand { face, blocks: interval.blocks, class, may_be_pod: face == NOBODY && interval.may_be_pod })
    }

    fn face(&mut self, holder: Option<Holder<'_>>, nodes: &[&Node], view: &View<'_>, matchers: &Matchers) -> u32 {
        let peer = holder.and_then(|holder| holder.as_peer());
        let names: Vec<&NodeName> = nodes.iter().map(|node| &node.name).collect();
        let hash = match &peer {
            Some(peer) => self.hashes.hash_one((peer.namespace, peer.labels, peer.named_ports)),
            // A node of no name that is listed is an address of its own.
            None if matches!(holder, Some(Holder::Node(_))) => self.hashes.hash_one(&names),
            None => return NOBODY,
        };
        let same = |face: &&u32| match (index(&self.faces, **face).map(|face| &face.who), &peer) {
            (Some(Who::Pod { namespace, labels, named }), Some(peer)) => {
                namespace == peer.namespace && labels == peer.labels && named == peer.named_ports
            }
            (Some(Who::Nodes(known)), None) => known.iter().eq(names.iter().copied()),
            _ => false,
        };
        if let Some(known) = self.by_hash.get(&hash).and_then(|faces| faces.iter().find(same)) {
            return *known;
        }
        let face = next(&self.faces);
        let (who, matched) = match peer {
            Some(peer) => {
                let labels = view.world.namespace_labels(peer.namespace);
                let (namespace, named) = (peer.namespace.to_owned(), peer.named_ports.clone());
                self.by_namespace.entry(namespace.clone()).or_default().push(face);
                let matched = matchers.of_peer(&peer, &labels, 0);
                (Who::Pod { namespace, labels: peer.labels.clone(), named }, matched)
            }
            None => (Who::Nodes(names.into_iter().cloned().collect()), matchers.of_nodes(nodes, 0)),
        };
        // What is asked newly, everybody is asked later.
        let matched = matched.into_iter().filter(|number| *number < self.asked).collect();
        self.faces.push(Face { who, matched, spots: Vec::new() });
        self.by_hash.entry(hash).or_default().push(face);
        face
    }

    fn move_spots(&mut self, face: u32, matchers: &Matchers) {
        for spot in index(&self.faces, face).map(|face| face.spots.clone()).unwrap_or_default() {
            let Some((stand, before)) =
                index(&self.spots, spot).filter(|spot| spot.count > 0).map(|spot| (spot.stand, spot.kind))
            else {
                continue;
            };
            let kind = self.enter_kind(&stand, matchers);
            index_mut(&mut self.kinds, before).into_iter().for_each(|kind| kind.count -= 1);
            index_mut(&mut self.spots, spot).into_iter().for_each(|spot| spot.kind = kind);
        }
    }

    fn enter(&mut self, stand: Stand, matchers: &Matchers) -> u32 {
        let new = next(&self.spots);
        let spot = *self.stands.entry(stand).or_insert(new);
        if spot == new {
            self.spots.push(Spot { stand, kind: 0, count: 0 });
            index_mut(&mut self.faces, stand.face).into_iter().for_each(|face| face.spots.push(spot));
        }
        if index(&self.spots, spot).is_some_and(|spot| spot.count == 0) {
            let kind = self.enter_kind(&stand, matchers);
            index_mut(&mut self.spots, spot).into_iter().for_each(|spot| spot.kind = kind);
        }
        index_mut(&mut self.spots, spot).into_iter().for_each(|spot| spot.count += 1);
        spot
    }

    fn leave(&mut self, spot: u32) {
        let Some(left) = index_mut(&mut self.spots, spot) else { return };
        left.count -= 1;
        if left.count == 0 {
            index_mut(&mut self.kinds, left.kind).into_iter().for_each(|kind| kind.count -= 1);
        }
    }

    fn enter_kind(&mut self, stand: &Stand, matchers: &Matchers) -> u32 {
        let Some(face) = index(&self.faces, stand.face) else { return u32::MAX };
        let nobody = stand.face == NOBODY;
        let blocks = self.line.blocks(stand.blocks).iter().filter(|number| nobody || !matchers.is_outside(**number));
        let mut matched: Vec<u32> = face.matched.iter().chain(blocks).copied().collect();
        matched.extend(matchers.may_be_pod().filter(|_| stand.may_be_pod));
        matched.sort_unstable();
        let named = match &face.who {
            Who::Pod { named, .. } => named.as_slice(),
            Who::Nobody | Who::Nodes(_) => &[],
        };
        let named = matchers.called(&matched, named);
        let ports = named.iter().map(|port| port.number).collect();
        let same = Same { matched, ports, class: stand.class, may_be_pod: stand.may_be_pod };
        let new = next(&self.kinds);
        let kind = match self.known.get(&same) {
            Some(known) => *known,
            None => {
                for matcher in &same.matched {
                    self.by_matcher.entry(*matcher).or_default().push(new);
                }
                self.by_class.entry(stand.class).or_default().push(new);
                let (matched, may_be_pod) = (same.matched.clone(), same.may_be_pod);
                self.kinds.push(Kind { matched, class: stand.class, named, may_be_pod, count: 0 });
                self.known.insert(same, new);
                new
            }
        };
        if let Some(entered) = index_mut(&mut self.kinds, kind) {
            if entered.count == 0 {
                self.fresh.insert(kind);
            }
            entered.count += 1;
        }
        kind
    }

    /// A kind that somebody is of.
    pub(super) fn kind(&self, number: u32) -> Option<&Kind> {
        index(&self.kinds, number).filter(|kind| kind.count > 0)
    }

    /// The numbers of all kinds, and of some that nobody is of.
    pub(super) fn kinds(&self) -> std::ops::Range<u32> {
        0..next(&self.kinds)
    }

    /// The numbers of the kinds of a class, and of some that nobody is of.
    pub(super) fn of_class(&self, class: ClassId) -> &[u32] {
        self.by_class.get(&class).map(Vec::as_slice).unwrap_or_default()
    }

    /// The numbers of the kinds that a matcher matches, and of some that nobody is of.
    pub(super) fn matched_by(&self, matcher: u32) -> &[u32] {
        self.by_matcher.get(&matcher).map(Vec::as_slice).unwrap_or_default()
    }

    /// Somebody of a kind.
    pub(super) fn sample(&self, kind: u32) -> Option<IpAddr> {
        let is_of = |spot: Option<u32>| spot.and_then(|spot| index(&self.spots, spot)).is_some_and(|s| s.kind == kind);
        let held = self.places.iter().find(|(_, place)| is_of(place.spot)).map(|(address, _)| *address);
        let free = || {
            let intervals = self.line.starts().filter_map(|start| self.line.interval(start));
            intervals.filter(|(_, interval)| is_of(interval.spot)).find_map(|(_, interval)| interval.free)
        };
        held.or_else(free).map(at)
    }

    /// How many faces, spots, kinds and intervals there are, with those that nobody is of any more.
    pub(super) fn size(&self) -> usize {
        self.faces.len() + self.spots.len() + self.kinds.len() + self.line.len()
    }
}

/// Where pods may be of which nobody has heard: in the nodes' ranges, but not at the addresses that no pod is given.
fn where_pods_may_be(world: &World) -> Addresses {
    let ranges = world.nodes.values().flat_map(|node| &node.pod_cidrs);
    let never: Vec<Addresses> = ranges.clone().flat_map(never_given).map(Addresses::one).collect();
    Addresses::of_all(ranges).without(&Addresses::any_of(&never))
}
