//! Pools as they can be used: without what is the cluster's own, searched in order, and with what they overlap.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{AddressPool, AddressRange, Family, family_of};

use super::{PoolState, View};

/// A pool whose free addresses are asked for one after the other. In one plan no address gets free, so the search never goes back.
#[derive(Debug)]
pub(super) struct Source<'a> {
    pub(super) pool: &'a AddressPool,
    /// Its ranges without the cluster's own.
    usable: Vec<AddressRange>,
    /// Where the search goes on: range and address; none: nothing is left.
    next: BTreeMap<Family, Option<(usize, IpAddr)>>,
}

impl<'a> Source<'a> {
    pub(super) fn new(pool: &'a AddressPool, own: &[AddressRange]) -> Self {
        let mut usable = pool.ranges.clone();
        for taken in own {
            usable = usable.into_iter().flat_map(|range| range.without(taken)).collect();
        }
        let mut source = Self { pool, usable, next: BTreeMap::new() };
        for family in [Family::V4, Family::V6] {
            let first = source.range_from(0, family);
            source.next.insert(family, first);
        }
        source
    }

    /// The first address of the next range of a family.
    fn range_from(&self, index: usize, family: Family) -> Option<(usize, IpAddr)> {
        let mut ranges = self.usable.iter().enumerate().skip(index);
        ranges.find(|(_, range)| range.family() == family).map(|(index, range)| (index, range.first()))
    }

    /// Whether it has addresses of a family at all.
    pub(super) fn has(&self, family: Family) -> bool {
        self.usable.iter().any(|range| range.family() == family)
    }

    /// Whether an address is in it and not the cluster's own.
    pub(super) fn offers(&self, address: IpAddr) -> bool {
        self.usable.iter().any(|range| range.contains(address))
    }

    /// The lowest address of the family that is not taken; asked again, it is one further.
    pub(super) fn take(&mut self, family: Family, taken: impl Fn(IpAddr) -> bool) -> Option<IpAddr> {
        loop {
            let (index, address) = (*self.next.get(&family)?)?;
            let after = self.usable.get(index).and_then(|range| range.after(address));
            let next = after.map(|next| (index, next)).or_else(|| self.range_from(index + 1, family));
            self.next.insert(family, next);
            if !taken(address) {
                return Some(address);
            }
        }
    }

    /// An address that was just taken is not needed after all: the search goes on with it.
    pub(super) fn give_back(&mut self, address: IpAddr) {
        let family = family_of(address);
        let Some(index) = self.usable.iter().position(|range| range.contains(address)) else { return };
        let next = self.next.get(&family).copied().flatten();
        if next.is_none_or(|next| (index, address) < next) {
            self.next.insert(family, Some((index, address)));
        }
    }

    /// What to say of it.
    pub(super) fn state(&self, view: &View, assigned: &BTreeSet<IpAddr>, taken: &BTreeSet<IpAddr>) -> PoolState {
        let total = self.usable.iter().fold(0_u128, |sum, range| sum.saturating_add(range.size()));
        let inside = |all: &BTreeSet<IpAddr>| all.iter().filter(|address| self.offers(**address)).count() as u128;
        let others = view.pools.values().filter(|other| other.name != self.pool.name);
        let overlaps_pools = others.flat_map(|other| {
            self.pool.ranges.iter().flat_map(move |range| {
                let theirs = other.ranges.iter().filter(move |theirs| theirs.overlaps(range));
                theirs.map(move |theirs| format!("{range} overlaps {theirs} of AddressPool {}", other.name))
            })
        });
        let own = view.own_ranges.iter().chain(&view.node_ranges).flat_map(|own| {
            let overlapping = self.pool.ranges.iter().filter(|range| range.overlaps(&AddressRange::from(*own)));
            overlapping.map(move |range| format!("{range} overlaps {own}, a range of pods or Services"))
        });
        let nodes = view.node_addresses.iter().filter(|address| self.pool.contains(**address));
        let nodes = nodes.map(|address| format!("{address} is the address of a node"));
        PoolState {
            total,
            assigned: inside(assigned),
            available: total.saturating_sub(inside(taken)),
            overlaps_pools: overlaps_pools.collect(),
            overlaps_cluster: own.chain(nodes).collect(),
        }
    }
}
