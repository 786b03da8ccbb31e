//! Kinds of peers merged to classes, with ids that survive.
//!
//! A class keeps its id as long as every set that was there before and still is sees it as before: then what a kernel holds
//! under the id stays true while the rest is written. Of several classes that could keep an id, the one with most of its former
//! members does.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::desired::{ClassId, LocalClass, SetId};

use super::ids::Ids;

/// How the sets see a class; sets to which it is local class 0 are left out. Sorted.
pub(super) type Content = Vec<(SetId, LocalClass)>;

/// Ids of classes, and where they were last.
#[derive(Debug)]
pub(super) struct Classes {
    pub(super) ids: Ids,
    contents: BTreeMap<ClassId, Content>,
    sets: HashSet<SetId>,
    addresses: HashMap<IpAddr, ClassId>,
    regions: HashMap<IpNet, ClassId>,
}

/// The peers of a compilation with their kinds.
pub(super) struct Members<'m> {
    pub(super) addresses: &'m [(IpAddr, usize)],
    pub(super) regions: &'m [(IpNet, usize)],
}

impl Classes {
    pub(super) fn new(ids: Ids) -> Self {
        Self {
            ids,
            contents: BTreeMap::new(),
            sets: HashSet::new(),
            addresses: HashMap::new(),
            regions: HashMap::new(),
        }
    }

    /// The class of each kind. `contents` is by kind, `sets` are all sets of the compilation.
    pub(super) fn assign(
        &mut self,
        contents: &[Content],
        sets: HashSet<SetId>,
        members: &Members<'_>,
        now: Duration,
    ) -> Vec<ClassId> {
        let mut known: HashMap<&Content, usize> = HashMap::new();
        let mut distinct: Vec<&Content> = Vec::new();
        let of_kind: Vec<usize> = contents
            .iter()
            .map(|content| {
                *known.entry(content).or_insert_with(|| {
                    distinct.push(content);
                    distinct.len() - 1
                })
            })
            .collect();
        let mut ids = self.inherit(&distinct, &of_kind, &sets, members);
        let mut next: BTreeMap<ClassId, Content> = BTreeMap::new();
        for (index, content) in distinct.iter().enumerate() {
            if content.is_empty() {
                continue;
            }
            let id = *ids.entry(index).or_insert_with(|| ClassId(self.ids.take()));
            next.insert(id, (*content).clone());
        }
        for gone in self.contents.keys().filter(|id| !next.contains_key(id)) {
            self.ids.release(gone.0, now);
        }
        self.contents = next;
        self.sets = sets;
        let result: Vec<ClassId> = of_kind.iter().map(|class| ids.get(class).copied().unwrap_or_default()).collect();
        let class_of = |kind: usize| result.get(kind).copied().unwrap_or_default();
        self.addresses = members.addresses.iter().map(|(ip, kind)| (*ip, class_of(*kind))).collect();
        self.regions = members.regions.iter().map(|(net, kind)| (*net, class_of(*kind))).collect();
        result
    }

    /// How the sets see each class in use.
    pub(super) fn contents(&self) -> impl Iterator<Item = (ClassId, &Content)> {
        self.contents.iter().map(|(id, content)| (*id, content))
    }

    fn inherit(
        &self,
        distinct: &[&Content],
        of_kind: &[usize],
        sets: &HashSet<SetId>,
        members: &Members<'_>,
    ) -> HashMap<usize, ClassId> {
        let mut votes: HashMap<(usize, ClassId), usize> = HashMap::new();
        let mut vote = |kind: usize, old: Option<&ClassId>| {
            if let (Some(class), Some(old)) = (of_kind.get(kind), old) {
                *votes.entry((*class, *old)).or_default() += 1;
            }
        };
        members.addresses.iter().for_each(|(ip, kind)| vote(*kind, self.addresses.get(ip)));
        members.regions.iter().for_each(|(net, kind)| vote(*kind, self.regions.get(net)));
        let mut ranked: Vec<_> = votes.into_iter().map(|((class, old), count)| (count, old, class)).collect();
        ranked.sort_unstable_by(|a, b| b.0.cmp(&a.0).then_with(|| (a.1, a.2).cmp(&(b.1, b.2))));
        let mut ids: HashMap<usize, ClassId> = HashMap::new();
        let mut given: HashSet<ClassId> = HashSet::new();
        for (_, old, class) in ranked {
            let (Some(before), Some(after)) = (self.contents.get(&old), distinct.get(class)) else { continue };
            if after.is_empty() || ids.contains_key(&class) || given.contains(&old) {
                continue;
            }
            let kept = before.iter().filter(|(set, _)| sets.contains(set));
            let had = after.iter().filter(|(set, _)| self.sets.contains(set));
            if kept.eq(had) {
                ids.insert(class, old);
                given.insert(old);
            }
        }
        ids
    }
}
