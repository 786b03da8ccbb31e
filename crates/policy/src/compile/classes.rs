//! Contents made classes, with ids that survive.
//!
//! A class keeps its id as long as every set that was there before and still is sees it as before: then what a kernel holds
//! under the id stays true while the rest is written. Of several classes that could keep an id, the one with most of its former
//! members does.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use ipnet::IpNet;
use towpath_model::desired::{ClassId, LocalClass, SetId};

use super::ids::Ids;

/// How the sets see a class; sets to which it is local class 0 are left out. Sorted.
pub(super) type Content = Vec<(SetId, LocalClass)>;

/// Ids of classes, and where they were last.
#[derive(Debug)]
pub(super) struct Classes {
    pub(super) ids: Ids,
    pub(super) contents: BTreeMap<ClassId, Arc<Content>>,
    /// Classes of regions.
    pub(super) regions: HashMap<IpNet, ClassId>,
}

/// Sets that came and went with a compilation.
#[derive(Debug, Default)]
pub(super) struct Turnover {
    pub(super) came: HashSet<SetId>,
    pub(super) went: HashSet<SetId>,
}

impl Turnover {
    /// Whether none did.
    pub(super) fn is_empty(&self) -> bool {
        self.came.is_empty() && self.went.is_empty()
    }
}

/// A content as the other sets see it.
pub(super) fn remaining(content: &Content, without: &HashSet<SetId>) -> Content {
    content.iter().filter(|(set, _)| !without.contains(set)).copied().collect()
}

/// How many members of each content, by its index, were in which class.
pub(super) type Votes = BTreeMap<(usize, ClassId), usize>;

impl Classes {
    pub(super) fn new(ids: Ids) -> Self {
        Self { ids, contents: BTreeMap::new(), regions: HashMap::new() }
    }

    /// The classes of contents, each of which is there once. `olds` are the classes that they may inherit from: of those that are left out none
    /// is seen as one of them is by the sets that were there before and still are.
    pub(super) fn assign(
        &mut self,
        contents: &[Arc<Content>],
        votes: &Votes,
        turnover: &Turnover,
        olds: &BTreeSet<ClassId>,
    ) -> Vec<ClassId> {
        let mut ids = self.inherit(contents, votes, turnover, olds);
        let mut fresh: Vec<usize> = (0..contents.len()).filter(|index| !ids.contains_key(index)).collect();
        fresh.sort_unstable_by_key(|index| contents.get(*index));
        for index in fresh {
            let empty = contents.get(index).is_none_or(|content| content.is_empty());
            let id = if empty { ClassId::default() } else { ClassId(self.ids.take()) };
            ids.insert(index, id);
        }
        (0..contents.len()).map(|index| ids.get(&index).copied().unwrap_or_default()).collect()
    }

    fn inherit(
        &self,
        contents: &[Arc<Content>],
        votes: &Votes,
        turnover: &Turnover,
        olds: &BTreeSet<ClassId>,
    ) -> HashMap<usize, ClassId> {
        // Who may inherit from whom: by how the sets see it that were there before and still are.
        let mut heirs: HashMap<Content, Vec<usize>> = HashMap::new();
        for (index, content) in contents.iter().enumerate().filter(|(_, content)| !content.is_empty()) {
            heirs.entry(remaining(content, &turnover.came)).or_default().push(index);
        }
        let mut estates: HashMap<&Content, Vec<ClassId>> = HashMap::new();
        for (id, content) in olds.iter().filter_map(|id| self.contents.get_key_value(id)) {
            if let Some((seen, _)) = heirs.get_key_value(&remaining(content, &turnover.went)) {
                estates.entry(seen).or_default().push(*id);
            }
        }
        let mut ids: HashMap<usize, ClassId> = HashMap::new();
        for (seen, olds) in estates {
            let Some(heirs) = heirs.get(seen) else { continue };
            if let ([old], [heir]) = (olds.as_slice(), heirs.as_slice()) {
                ids.insert(*heir, *old);
                continue;
            }
            self.divide(&olds, heirs, contents, votes, &mut ids);
        }
        ids
    }

    /// Most members first; then who is seen just as before, though nobody stayed.
    fn divide(
        &self,
        olds: &[ClassId],
        heirs: &[usize],
        contents: &[Arc<Content>],
        votes: &Votes,
        ids: &mut HashMap<usize, ClassId>,
    ) {
        let wanted: HashSet<ClassId> = olds.iter().copied().collect();
        let mut ranked: Vec<(usize, ClassId, usize)> = Vec::new();
        for heir in heirs {
            let all = (*heir, ClassId(0))..=(*heir, ClassId(u32::MAX));
            let counted = votes.range(all).filter(|((_, old), _)| wanted.contains(old));
            ranked.extend(counted.map(|((heir, old), count)| (*count, *old, *heir)));
        }
        let content = |heir: usize| contents.get(heir);
        ranked.sort_unstable_by(|a, b| {
            b.0.cmp(&a.0).then_with(|| a.1.cmp(&b.1)).then_with(|| content(a.2).cmp(&content(b.2)))
        });
        let mut given: HashSet<ClassId> = HashSet::new();
        for (_, old, heir) in ranked {
            if !ids.contains_key(&heir) && given.insert(old) {
                ids.insert(heir, old);
            }
        }
        let seen_so: HashMap<&Content, ClassId> =
            olds.iter().filter_map(|old| Some((self.contents.get(old)?.as_ref(), *old))).collect();
        for heir in heirs {
            if !ids.contains_key(heir)
                && let Some(old) = content(*heir).and_then(|content| seen_so.get(content.as_ref()))
                && given.insert(*old)
            {
                ids.insert(*heir, *old);
            }
        }
    }
}
