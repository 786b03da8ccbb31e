//! Regions of the address space with their kinds.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::atoms::Atoms;
use super::kinds::{Kinds, RegionKind};
use super::peers::NONE;
use super::program::Atom;
use super::regions::Regions;
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

/// All regions that the blocks in force cut.
#[derive(Debug, Default)]
pub(super) struct Space {
    pub(super) regions: Regions,
    /// The [`RegionKind`] of each region.
    matched: Vec<u32>,
    /// The kind of what is in no group in each region.
    pub(super) kinds: Vec<u32>,
    /// Whether somebody must know where pods may be.
    doubted: bool,
}

impl Space {
    /// Whether it must be cut anew for somebody to know, or for nobody to ask, where pods may be.
    pub(super) fn lacks(&self, doubts: bool) -> bool {
        self.doubted != doubts
    }

    /// Cuts it anew. `pods`: where pods may be, if somebody must know; `named`: what domain names stand for, by atom.
    pub(super) fn cut(
        &mut self,
        atoms: &Atoms,
        pods: Option<&PodRanges>,
        named: &BTreeMap<u32, BTreeSet<IpAddr>>,
        kinds: &mut Kinds,
    ) {
        for kind in self.kinds.drain(..) {
            if let Some(kind) = kinds.get_mut(kind) {
                kind.regions = kind.regions.saturating_sub(1);
            }
        }
        let mut borders = atoms.borders();
        borders.extend(named.values().flatten().copied().map(IpNet::from));
        let none = PodRanges::default();
        let ranges = pods.unwrap_or(&none);
        borders.extend(ranges.ranges.iter().chain(&ranges.others));
        self.regions = Regions::of(&borders);
        let mut matched: Vec<Vec<u32>> = vec![Vec::new(); self.regions.len()];
        for (number, atom) in atoms.blocks() {
            let mut add = |region: usize| {
                if let Some(list) = matched.get_mut(region)
                    && list.last() != Some(&number)
                {
                    list.push(number);
                }
            };
            match atom {
                Atom::Block { cidr, except } => self.regions.in_block(cidr, except).iter().for_each(&mut add),
                Atom::Networks(networks) => {
                    networks.iter().flat_map(|net| self.regions.inside(net)).for_each(&mut add);
                }
                Atom::Names(_) => {
                    let addresses = named.get(&number).into_iter().flatten();
                    addresses.filter_map(|address| self.regions.find(*address)).for_each(&mut add);
                }
                Atom::Pods { .. } | Atom::Nodes(_) => {}
            }
        }
        let mut may_hold_pods = vec![false; self.regions.len()];
        let mut mark = |net: &IpNet, value: bool| {
            may_hold_pods.get_mut(self.regions.inside(net)).into_iter().flatten().for_each(|mark| *mark = value);
        };
        ranges.ranges.iter().for_each(|range| mark(range, true));
        ranges.others.iter().for_each(|other| mark(other, false));
        self.matched = matched
            .into_iter()
            .zip(may_hold_pods)
            .map(|(atoms, may_hold_pods)| kinds.regions.number(RegionKind { atoms: atoms.into(), may_hold_pods }))
            .collect();
        self.kinds = self.matched.iter().map(|matched| kinds.number(NONE, *matched)).collect();
        for kind in &self.kinds {
            if let Some(kind) = kinds.get_mut(*kind) {
                kind.regions += 1;
            }
        }
        self.doubted = pods.is_some();
    }

    /// The region of an address, and its [`RegionKind`].
    pub(super) fn find(&self, address: std::net::IpAddr) -> u32 {
        self.regions.find(address).and_then(|region| u32::try_from(region).ok()).unwrap_or(NONE)
    }

    /// What a region matches.
    pub(super) fn matched(&self, region: u32) -> u32 {
        usize::try_from(region).ok().and_then(|region| self.matched.get(region)).copied().unwrap_or(NONE)
    }

    /// The kind of what is in no group in a region.
    pub(super) fn kind(&self, region: u32) -> u32 {
        usize::try_from(region).ok().and_then(|region| self.kinds.get(region)).copied().unwrap_or(NONE)
    }
}
