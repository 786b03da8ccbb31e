//! Regions of the address space with their kinds, and in them the points that domain names stand for.
//!
//! Blocks cut the space; that is done anew when others are asked for. A name's address cuts nothing: it is a point in a region, which comes and
//! goes alone.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Range;

use ipnet::IpNet;
use towpath_model::desired::SetId;

use super::atoms::Atoms;
use super::budget::{Budget, TooLarge};
use super::kinds::{Kinds, RegionKind};
use super::peers::NONE;
use super::program::Atom;
use super::regions::Regions;
use super::set::Set;
use crate::view::{Holders, View, never_given};

/// Where pods may be that are not known yet.
#[derive(Debug, Default)]
pub(super) struct PodRanges {
    /// These ranges,
    ranges: Vec<IpNet>,
    /// but not these addresses in them.
    others: BTreeSet<IpNet>,
}

impl PodRanges {
    /// The pod ranges of all nodes.
    pub(super) fn of(view: &View<'_>, holders: &Holders<'_>) -> Self {
        let all: Vec<IpNet> = view.world.nodes.values().flat_map(|node| node.pod_cidrs.iter().copied()).collect();
        let mut others: BTreeSet<IpNet> = all.iter().flat_map(never_given).map(IpNet::from).collect();
        let ranges = IpNet::aggregate(&all);
        let inside = |address: &std::net::IpAddr| ranges.iter().any(|range| range.contains(address));
        others.extend(holders.node_addresses().map(|(address, _)| address).filter(inside).map(IpNet::from));
        Self { ranges, others }
    }
}

/// In a place: what follows is the number of a point, not of a region.
const POINT: u32 = 1 << 31;

/// All regions that the blocks in force cut, and the points that names stand for.
#[derive(Debug, Default)]
pub(super) struct Space {
    regions: Regions,
    /// The [`RegionKind`] of each region.
    matched: Vec<u32>,
    /// The kind of what is in no group in each region.
    kinds: Vec<u32>,
    points: BTreeMap<IpAddr, Point>,
    /// What points match, and their kinds, by number.
    places: Vec<(u32, u32)>,
    free: Vec<u32>,
    /// Whether somebody must know where pods may be.
    doubted: bool,
}

/// An address that names stand for.
#[derive(Debug)]
struct Point {
    /// The atoms of these names, sorted.
    named: Vec<u32>,
    /// The region that it is in,
    region: Option<usize>,
    /// and what that matches without the names.
    beneath: u32,
    /// Its number; none: it is all of its region, which matches what it does.
    number: Option<u32>,
}

impl Space {
    /// Whether it must be cut anew for somebody to know, or for nobody to ask, where pods may be.
    pub(super) fn lacks(&self, doubts: bool) -> bool {
        self.doubted != doubts
    }

    /// Cuts it anew. `pods`: where pods may be, if somebody must know; `named`: what names stand for.
    ///
    /// # Errors
    /// More sets or ports speak of the same regions than there is budget for.
    pub(super) fn cut(
        &mut self,
        atoms: &Atoms,
        sets: &BTreeMap<SetId, Set>,
        pods: Option<&PodRanges>,
        named: BTreeMap<IpAddr, Vec<u32>>,
        kinds: &mut Kinds,
        budget: &mut Budget,
    ) -> Result<(), TooLarge> {
        self.kinds.iter().for_each(|kind| kinds.region_left(*kind));
        let numbers = self.points.values().filter_map(|point| point.number);
        numbers.for_each(|number| kinds.region_left(self.kind(POINT | number)));
        let mut borders = atoms.borders();
        let none = PodRanges::default();
        let ranges = pods.unwrap_or(&none);
        borders.extend(ranges.ranges.iter().chain(&ranges.others));
        *self = Self { regions: Regions::of(&borders), doubted: pods.is_some(), ..Self::default() };
        let may_hold_pods = self.may_hold_pods(ranges);
        let mut changes = self.deciding(atoms, sets).into_iter().peekable();
        let mut here: BTreeMap<u32, usize> = BTreeMap::new();
        let mut last: Option<(bool, u32)> = None;
        for (region, may_hold_pods) in may_hold_pods.into_iter().enumerate() {
            let mut same = last.is_some_and(|(held_pods, _)| held_pods == may_hold_pods);
            while let Some((_, begins, atom)) = changes.next_if(|(at, ..)| *at <= region) {
                same = false;
                let sets = here.entry(atom).or_default();
                *sets = if begins { *sets + 1 } else { sets.saturating_sub(1) };
                if *sets == 0 {
                    here.remove(&atom);
                }
            }
            let matched = match last {
                Some((_, matched)) if same => matched,
                _ => {
                    budget.spend(here.len())?;
                    let atoms = here.keys().copied().collect();
                    kinds.regions.number(RegionKind { atoms, may_hold_pods })
                }
            };
            last = Some((may_hold_pods, matched));
            let kind = kinds.number(NONE, matched);
            kinds.region_came(kind);
            self.matched.push(matched);
            self.kinds.push(kind);
        }
        for (address, named) in named {
            self.name(address, named, kinds);
        }
        Ok(())
    }

    /// Where atoms begin (true) and cease to decide something for some set: regions ascending.
    fn deciding(&self, atoms: &Atoms, sets: &BTreeMap<SetId, Set>) -> Vec<(usize, bool, u32)> {
        let mut cover: Vec<Vec<Range<usize>>> = vec![Vec::new(); atoms.bound()];
        for (number, atom) in atoms.blocks() {
            let of_atom = match atom {
                Atom::Block { cidr, except } => self.regions.in_block(cidr, except),
                Atom::Networks(networks) => self.regions.in_any(networks),
                Atom::Names(_) | Atom::Pods { .. } | Atom::Nodes(_) => Vec::new(),
            };
            if let Some(place) = usize::try_from(number).ok().and_then(|number| cover.get_mut(number)) {
                *place = of_atom;
            }
        }
        let of = |atom: u32| {
            let of_atom = usize::try_from(atom).ok().and_then(|atom| cover.get(atom));
            of_atom.map(Vec::as_slice).unwrap_or_default()
        };
        let mut changes: Vec<(usize, bool, u32)> = Vec::new();
        for set in sets.values() {
            set.decide_where(of, |atom, range| changes.extend([(range.start, true, atom), (range.end, false, atom)]));
        }
        changes.sort_unstable_by_key(|(at, ..)| *at);
        changes
    }

    fn may_hold_pods(&self, ranges: &PodRanges) -> Vec<bool> {
        let mut may_hold_pods = vec![false; self.regions.len()];
        let mut mark = |net: &IpNet, value: bool| {
            may_hold_pods.get_mut(self.regions.inside(net)).into_iter().flatten().for_each(|mark| *mark = value);
        };
        ranges.ranges.iter().for_each(|range| mark(range, true));
        ranges.others.iter().for_each(|other| mark(other, false));
        may_hold_pods
    }

    /// The atoms (sorted) of all names that stand for an address are these; whether they were others.
    pub(super) fn name(&mut self, address: IpAddr, named: Vec<u32>, kinds: &mut Kinds) -> bool {
        let before = self.points.remove(&address);
        if before.as_ref().map_or(&[][..], |point| &point.named) == named {
            self.points.extend(before.map(|point| (address, point)));
            return false;
        }
        if let Some(point) = before {
            self.unname(&point, kinds);
        }
        if named.is_empty() {
            return true;
        }
        let region = self.regions.find(address);
        let beneath = region.and_then(|region| self.matched.get(region)).copied().unwrap_or(NONE);
        let RegionKind { atoms, may_hold_pods } = kinds.regions.get(beneath).cloned().unwrap_or_default();
        let mut atoms = atoms.into_vec();
        atoms.extend(&named);
        atoms.sort_unstable();
        let matched = kinds.regions.number(RegionKind { atoms: atoms.into(), may_hold_pods });
        let kind = kinds.number(NONE, matched);
        kinds.region_came(kind);
        let whole =
            region.filter(|region| self.regions.get(*region).is_some_and(|(net, _)| net == IpNet::from(address)));
        let number = match whole {
            Some(region) => {
                self.set(region, matched, kind, kinds);
                None
            }
            None => Some(self.add((matched, kind))),
        };
        self.points.insert(address, Point { named, region, beneath, number });
        true
    }

    /// No name stands for a point any more.
    fn unname(&mut self, point: &Point, kinds: &mut Kinds) {
        match (point.number, point.region) {
            (Some(number), _) => {
                kinds.region_left(self.kind(POINT | number));
                self.free.push(number);
            }
            (None, Some(region)) => {
                let kind = kinds.number(NONE, point.beneath);
                kinds.region_came(kind);
                self.set(region, point.beneath, kind, kinds);
            }
            (None, None) => {}
        }
    }

    /// A region matches this from now on.
    fn set(&mut self, region: usize, matched: u32, kind: u32, kinds: &mut Kinds) {
        self.matched.get_mut(region).into_iter().for_each(|place| *place = matched);
        if let Some(place) = self.kinds.get_mut(region) {
            kinds.region_left(std::mem::replace(place, kind));
        }
    }

    fn add(&mut self, place: (u32, u32)) -> u32 {
        if let Some(number) = self.free.pop()
            && let Some(free) = usize::try_from(number).ok().and_then(|number| self.places.get_mut(number))
        {
            *free = place;
            return number;
        }
        self.places.push(place);
        u32::try_from(self.places.len() - 1).unwrap_or(NONE)
    }

    /// All addresses that names stand for.
    pub(super) fn named(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.points.keys().copied()
    }

    /// The place of an address: of its point, or of its region.
    pub(super) fn find(&self, address: IpAddr) -> u32 {
        if let Some(number) = self.points.get(&address).and_then(|point| point.number) {
            return POINT | number;
        }
        self.regions.find(address).and_then(|region| u32::try_from(region).ok()).unwrap_or(NONE)
    }

    fn point(&self, place: u32) -> Option<(u32, u32)> {
        let number = (place != NONE && place & POINT != 0).then_some(place & !POINT)?;
        self.places.get(usize::try_from(number).ok()?).copied()
    }

    /// What a place matches.
    pub(super) fn matched(&self, place: u32) -> u32 {
        let of_region = || usize::try_from(place).ok().and_then(|region| self.matched.get(region)).copied();
        self.point(place).map(|(matched, _)| matched).or_else(of_region).unwrap_or(NONE)
    }

    /// The kind of what is in no group in a place.
    pub(super) fn kind(&self, place: u32) -> u32 {
        let of_region = || usize::try_from(place).ok().and_then(|region| self.kinds.get(region)).copied();
        self.point(place).map(|(_, kind)| kind).or_else(of_region).unwrap_or(NONE)
    }

    fn of_region(&self, region: Option<usize>) -> u32 {
        region.and_then(|region| self.kinds.get(region)).copied().unwrap_or(NONE)
    }

    /// All regions and points: their prefixes, their kinds, and the kind of what is around them. What is around comes first.
    pub(super) fn iter(&self) -> impl Iterator<Item = (IpNet, u32, u32)> + '_ {
        let regions = self.regions.iter().zip(&self.kinds);
        let regions = regions.map(|((net, parent), kind)| (net, *kind, self.of_region(parent)));
        let points = self.points.iter().filter_map(|(address, point)| {
            Some((IpNet::from(*address), self.kind(POINT | point.number?), self.of_region(point.region)))
        });
        regions.chain(points)
    }

    /// The kind of the point or region that is this address alone, and the kind of what is around it.
    pub(super) fn at(&self, address: IpAddr) -> Option<(u32, u32)> {
        if let Some(point) = self.points.get(&address)
            && let Some(number) = point.number
        {
            return Some((self.kind(POINT | number), self.of_region(point.region)));
        }
        let region = self.regions.find(address)?;
        let (net, parent) = self.regions.get(region)?;
        (net == IpNet::from(address)).then(|| (self.of_region(Some(region)), self.of_region(parent)))
    }
}
