//! Ids that stay with their key and are not given to another until a grace period after the key is gone.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Ids by key. Never gives out 0.
#[derive(Debug)]
pub(super) struct Ids<K> {
    of: BTreeMap<K, u32>,
    taken: BTreeSet<u32>,
    retired: BTreeMap<K, Duration>,
    next: u32,
    grace: Duration,
}

impl<K: Ord + Clone> Ids<K> {
    pub(super) fn new(grace: Duration) -> Self {
        Self { of: BTreeMap::new(), taken: BTreeSet::new(), retired: BTreeMap::new(), next: 1, grace }
    }

    /// The id of a key that is in use from now on; a key that comes back within the grace period gets its old id, one without an id
    /// `wanted` when nobody has it.
    pub(super) fn take(&mut self, key: &K, wanted: Option<u32>) -> u32 {
        self.retired.remove(key);
        if let Some(id) = self.of.get(key) {
            return *id;
        }
        let id = wanted.filter(|id| *id != 0 && !self.taken.contains(id)).unwrap_or_else(|| self.unused());
        self.of.insert(key.clone(), id);
        self.taken.insert(id);
        id
    }

    /// The next number nobody has: counts up, so that a number returns only after all others were used.
    fn unused(&mut self) -> u32 {
        loop {
            let id = self.next;
            self.next = self.next.checked_add(1).unwrap_or(1);
            if id != 0 && !self.taken.contains(&id) {
                return id;
            }
        }
    }

    /// The key is not in use any more.
    pub(super) fn retire(&mut self, key: &K, now: Duration) {
        if self.of.contains_key(key) {
            self.retired.insert(key.clone(), now);
        }
    }

    /// Keeps a number from being given to anyone but by [`Ids::take`] asking for it.
    pub(super) fn start_above(&mut self, id: u32) {
        self.next = self.next.max(id.checked_add(1).unwrap_or(1));
    }

    /// Forgets keys whose grace period is over.
    pub(super) fn sweep(&mut self, now: Duration) {
        let grace = self.grace;
        let over: Vec<K> =
            self.retired.iter().filter(|(_, at)| now.saturating_sub(**at) >= grace).map(|(k, _)| k.clone()).collect();
        for key in over {
            self.retired.remove(&key);
            if let Some(id) = self.of.remove(&key) {
                self.taken.remove(&id);
            }
        }
    }
}
