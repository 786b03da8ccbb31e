//! Who may use the Services that are for some clients only (`tp_source_ranges`).

use std::collections::{HashMap, HashSet};

use ipnet::IpNet;
use libbpf_rs::Object;
use towpath_model::desired::FrontendTarget;

use crate::abi::{CidrKey, ServiceKey, SourceKey};
use crate::bpf::config::Changes;
use crate::bpf::error::Result;
use crate::bpf::mirror::Mirror;

/// The ranges of all entries. Two entries of one Service port share what they have in common.
#[derive(Debug)]
pub(super) struct Sources {
    map: Mirror<SourceKey, u32>,
    of_entry: HashMap<ServiceKey, Vec<SourceKey>>,
    /// How many entries refer to each.
    refs: HashMap<SourceKey, u32>,
}

fn key(service: u32, range: IpNet) -> SourceKey {
    let CidrKey { prefixlen, family, addr } = CidrKey::new(range);
    SourceKey { prefixlen: prefixlen + u32::BITS, service, family, addr }
}

impl Sources {
    pub(super) fn open(object: &Object) -> Result<Self> {
        Ok(Self { map: Mirror::open(object, "tp_source_ranges")?, of_entry: HashMap::new(), refs: HashMap::new() })
    }

    /// From here on nothing is referred to; what is in the kernel stays until [`Sources::drop_unreferred`].
    pub(super) fn forget(&mut self) {
        self.of_entry.clear();
        self.refs.clear();
    }

    /// Lets a target's clients in, before the entry says that it is for them only. What the entry let in before, it still does: to be
    /// taken back by [`Sources::drop_former`] when the entry is written. When not all fit, those that do are let in.
    pub(super) fn admit(&mut self, entry: ServiceKey, target: &FrontendTarget) -> (Vec<SourceKey>, Result<Changes>) {
        let ranges = target.sources.iter().flat_map(|ranges| ranges.iter());
        let keys: Vec<SourceKey> = ranges.map(|range| key(target.id.0, *range)).collect();
        let written = self.map.put_all(keys.iter().map(|key| (*key, 1)));
        for key in &keys {
            *self.refs.entry(*key).or_default() += 1;
        }
        let former = if keys.is_empty() { self.of_entry.remove(&entry) } else { self.of_entry.insert(entry, keys) };
        (former.unwrap_or_default(), written)
    }

    /// The entry was not written: whoever it let in before is not to be forgotten. Who it would have let in is let in, too, where it is
    /// for some clients only.
    pub(super) fn keep(&mut self, entry: ServiceKey, former: Vec<SourceKey>) {
        if former.is_empty() {
            return;
        }
        let all = self.of_entry.entry(entry).or_default();
        for key in former {
            match all.contains(&key) {
                // Counted twice now.
                true => drop(self.refs.entry(key).and_modify(|refs| *refs = refs.saturating_sub(1))),
                false => all.push(key),
            }
        }
    }

    /// Lets nobody in any more by an entry that is gone.
    pub(super) fn remove(&mut self, entry: &ServiceKey) -> Result<Changes> {
        let former = self.of_entry.remove(entry).unwrap_or_default();
        self.drop_former(former)
    }

    pub(super) fn drop_former(&mut self, former: Vec<SourceKey>) -> Result<Changes> {
        let mut changes = Changes::default();
        for key in former {
            let refs = self.refs.entry(key).or_default();
            *refs = refs.saturating_sub(1);
            if *refs == 0 {
                self.refs.remove(&key);
                changes.removed += usize::from(self.map.remove(&key)?);
            }
        }
        Ok(changes)
    }

    /// Removes what no entry refers to, but for those of `as_they_were`: an earlier process left it.
    pub(super) fn drop_unreferred(&mut self, as_they_were: &HashSet<u32>) -> Result<Changes> {
        let refs = &self.refs;
        self.map.retain(|key| refs.contains_key(key) || as_they_were.contains(&key.service))
    }
}
