//! All peers, cut as coarsely as the atoms in force allow.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::Protocol;

use super::bits::{Bits, Partition};
use super::groups::Groups;
use super::program::{Atom, Within};
use super::regions::Regions;
use super::set::Seen;
use crate::view::{Holders, View, never_given};

/// What an atom matches.
enum Extent {
    Groups(Bits),
    Regions(Bits),
}

/// The atoms of a compilation, each once, with what they match.
pub(super) struct Atoms<'p> {
    numbers: HashMap<&'p Atom, usize>,
    extents: Vec<Extent>,
    /// The regions that block atoms cut.
    pub(super) regions: Regions,
    /// Regions in which pods may be that are not known yet.
    may_hold_pods: Bits,
}

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
        let inside = |address: &IpAddr| ranges.iter().any(|range| range.contains(address));
        others.extend(holders.node_addresses().map(|(address, _)| address).filter(inside).map(IpNet::from));
        Self { ranges, others }
    }
}

impl<'p> Atoms<'p> {
    /// Looks up all atoms.
    pub(super) fn of(all: impl Iterator<Item = &'p Atom>, groups: &mut Groups<'_>, pods: &PodRanges) -> Self {
        let mut numbers: HashMap<&'p Atom, usize> = HashMap::new();
        let mut list: Vec<&'p Atom> = Vec::new();
        for atom in all {
            numbers.entry(atom).or_insert_with(|| {
                list.push(atom);
                list.len() - 1
            });
        }
        let mut borders: BTreeSet<IpNet> = BTreeSet::new();
        for atom in &list {
            match atom {
                Atom::Block { cidr, except } => {
                    borders.insert(*cidr);
                    borders.extend(except);
                }
                Atom::Networks(networks) => borders.extend(networks),
                Atom::Pods { .. } | Atom::Nodes(_) => {}
            }
        }
        borders.extend(pods.ranges.iter().chain(&pods.others));
        let regions = Regions::of(&borders);
        let mut may_hold_pods = Bits::none(regions.len());
        pods.ranges.iter().for_each(|range| may_hold_pods.unite(&regions.in_block(range, &[])));
        for other in &pods.others {
            regions.in_block(other, &[]).iter().for_each(|region| may_hold_pods.remove(region));
        }
        let extents = list
            .iter()
            .map(|atom| match atom {
                Atom::Block { cidr, except } => Extent::Regions(regions.in_block(cidr, except)),
                Atom::Networks(networks) => {
                    let mut bits = Bits::none(regions.len());
                    networks.iter().for_each(|net| bits.unite(&regions.in_block(net, &[])));
                    Extent::Regions(bits)
                }
                Atom::Nodes(selector) => Extent::Groups(groups.of_nodes(selector)),
                Atom::Pods { within, pods } => {
                    let mut bits = match within {
                        Within::Namespace(name) => groups.in_namespace(name),
                        Within::Matching(selector) => groups.in_namespaces(selector).as_ref().clone(),
                    };
                    bits.intersect(&groups.with_labels(pods));
                    Extent::Groups(bits)
                }
            })
            .collect();
        Self { numbers, extents, regions, may_hold_pods }
    }

    /// The number of an atom.
    pub(super) fn number(&self, atom: &Atom) -> Option<usize> {
        self.numbers.get(atom).copied()
    }

    /// Cuts the peers: two that no atom and no named port tells apart get the same kind.
    pub(super) fn cut<'n>(&self, groups: &Groups<'_>, named: impl Iterator<Item = (&'n str, Protocol)>) -> Kinds {
        let mut by_group = Partition::new(groups.len());
        let mut by_region = Partition::new(self.regions.len());
        for extent in &self.extents {
            match extent {
                Extent::Groups(bits) => by_group.split(bits.iter()),
                Extent::Regions(bits) => by_region.split(bits.iter()),
            }
        }
        by_region.split(self.may_hold_pods.iter());
        for (name, protocol) in named {
            let mut with_number: BTreeMap<u16, Vec<usize>> = BTreeMap::new();
            for group in 0..groups.len() {
                if let Some(number) = groups.named_port(group, name, protocol) {
                    with_number.entry(number).or_default().push(group);
                }
            }
            with_number.values().for_each(|members| by_group.split(members.iter().copied()));
        }
        let mut kinds = Kinds::default();
        let mut in_group: Vec<Vec<usize>> = vec![Vec::new(); groups.len()];
        let mut in_region: Vec<Vec<usize>> = vec![Vec::new(); self.regions.len()];
        for member in &groups.members {
            let region = self.regions.find(member.address);
            let kind = kinds.kind(&by_group, Some(member.group), &by_region, region);
            kinds.of_member.push(kind);
            in_group.get_mut(member.group).into_iter().for_each(|list| list.push(kind));
            region.and_then(|r| in_region.get_mut(r)).into_iter().for_each(|list| list.push(kind));
        }
        for (region, list) in in_region.iter_mut().enumerate() {
            let kind = kinds.kind(&by_group, None, &by_region, Some(region));
            kinds.of_region.push(kind);
            list.push(kind);
        }
        let matched = self.extents.iter().map(|extent| {
            let mut bits = Bits::none(kinds.samples.len());
            let (of, within) = match extent {
                Extent::Groups(of) => (of, &in_group),
                Extent::Regions(of) => (of, &in_region),
            };
            of.iter().filter_map(|n| within.get(n)).flatten().for_each(|kind| bits.insert(*kind));
            bits
        });
        kinds.matched = matched.collect();
        kinds.unknown_pods = Bits::none(kinds.samples.len());
        for (index, (group, region)) in kinds.samples.iter().enumerate() {
            if group.is_none() && region.is_some_and(|region| self.may_hold_pods.has(region)) {
                kinds.unknown_pods.insert(index);
            }
        }
        kinds
    }
}

/// The kinds of peers: finer than classes, since it is not asked yet whether rules differ.
#[derive(Debug, Default)]
pub(super) struct Kinds {
    known: HashMap<(Option<usize>, Option<usize>), usize>,
    /// A group and a region that stand for the kind.
    pub(super) samples: Vec<(Option<usize>, Option<usize>)>,
    /// Kind of each of [`Groups::members`].
    pub(super) of_member: Vec<usize>,
    /// Kind of what is in no group in each region.
    pub(super) of_region: Vec<usize>,
    /// Kinds that each atom matches.
    matched: Vec<Bits>,
    /// Kinds of what may be a pod that is not known yet.
    pub(super) unknown_pods: Bits,
}

impl Kinds {
    /// Kinds that any of these atoms matches: to a set of them all others are strangers.
    pub(super) fn matched_by(&self, atoms: impl Iterator<Item = usize>) -> Bits {
        let mut bits = Bits::none(self.samples.len());
        atoms.filter_map(|atom| self.matched.get(atom)).for_each(|matched| bits.unite(matched));
        bits
    }

    /// All kinds.
    pub(super) fn all(&self) -> Bits {
        let mut bits = Bits::none(self.samples.len());
        bits.complement();
        bits
    }

    fn kind(
        &mut self,
        by_group: &Partition,
        group: Option<usize>,
        by_region: &Partition,
        region: Option<usize>,
    ) -> usize {
        let identity = (group.and_then(|g| by_group.class_of(g)), region.and_then(|r| by_region.class_of(r)));
        *self.known.entry(identity).or_insert_with(|| {
            self.samples.push((group, region));
            self.samples.len() - 1
        })
    }
}

/// A kind, as sets look at it.
pub(super) struct Sample<'s, 'p, 'a> {
    pub(super) atoms: &'s Atoms<'p>,
    pub(super) groups: &'s Groups<'a>,
    pub(super) group: Option<usize>,
    pub(super) region: Option<usize>,
}

impl Seen for Sample<'_, '_, '_> {
    fn matches(&self, atom: usize) -> bool {
        match self.atoms.extents.get(atom) {
            Some(Extent::Groups(bits)) => self.group.is_some_and(|g| bits.has(g)),
            Some(Extent::Regions(bits)) => self.region.is_some_and(|r| bits.has(r)),
            None => false,
        }
    }

    fn named_port(&self, name: &str, protocol: Protocol) -> Option<u16> {
        self.groups.named_port(self.group?, name, protocol)
    }

    fn may_be_pod(&self) -> bool {
        self.group.is_none() && self.region.is_some_and(|region| self.atoms.may_hold_pods.has(region))
    }
}
