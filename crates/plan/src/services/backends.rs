//! Every backend that is known, once: its id, and how many ask for it.
//!
//! A node knows all endpoints of the cluster, so an entry is small, and what can be found elsewhere is not in it: addresses of those that
//! the [table](ServiceTable::backends) lists are found by their id there. An id stays with its backend and is not given to another until
//! a grace period after the backend is gone.
//!
//! [`ServiceTable::backends`]: towpath_model::desired::ServiceTable::backends

use std::collections::BTreeMap;
use std::time::Duration;

use towpath_model::desired::{BackendAddress, BackendId};

/// What the table lists.
type Listed = BTreeMap<BackendId, BackendAddress>;

#[derive(Clone, Copy, Debug)]
struct Known {
    id: BackendId,
    /// Services and pods that lead there.
    holders: u32,
}

/// See the module. Never gives out 0.
#[derive(Debug)]
pub(super) struct Backends {
    known: BTreeMap<BackendAddress, Known>,
    /// Those that have an id and are not in the table: few.
    unlisted: BTreeMap<BackendId, BackendAddress>,
    /// Those of them that nobody uses, and since when.
    retired: BTreeMap<BackendAddress, Duration>,
    next: u32,
    grace: Duration,
}

impl Backends {
    pub(super) fn new(grace: Duration) -> Self {
        Self { known: BTreeMap::new(), unlisted: BTreeMap::new(), retired: BTreeMap::new(), next: 1, grace }
    }

    /// The id of a backend that is in use from now on; one that comes back within the grace period gets its old id.
    pub(super) fn take(&mut self, backend: BackendAddress, listed: &Listed) -> BackendId {
        self.retired.remove(&backend);
        if let Some(known) = self.known.get(&backend) {
            return known.id;
        }
        let id = self.unused(listed);
        self.know(backend, id);
        id
    }

    fn know(&mut self, backend: BackendAddress, id: BackendId) {
        self.known.insert(backend, Known { id, holders: 0 });
        self.unlisted.insert(id, backend);
    }

    fn is_taken(&self, id: BackendId, listed: &Listed) -> bool {
        listed.contains_key(&id) || self.unlisted.contains_key(&id)
    }

    /// The next number nobody has: counts up, so that a number returns only after all others were used.
    fn unused(&mut self, listed: &Listed) -> BackendId {
        loop {
            let id = BackendId(self.next);
            self.next = self.next.checked_add(1).unwrap_or(1);
            if id.0 != 0 && !self.is_taken(id, listed) {
                return id;
            }
        }
    }

    /// Takes over a pair that the kernel already has, as retired now: unused unless [`Backends::take`] asks for it in time.
    pub(super) fn adopt(&mut self, backend: BackendAddress, id: BackendId, listed: &Listed, now: Duration) {
        if id.0 == 0 || self.known.contains_key(&backend) || self.is_taken(id, listed) {
            return;
        }
        self.next = self.next.max(id.0.checked_add(1).unwrap_or(1));
        self.know(backend, id);
        self.retired.insert(backend, now);
    }

    /// The id that a backend has or had within the grace period.
    pub(super) fn id(&self, backend: &BackendAddress) -> Option<BackendId> {
        self.known.get(backend).map(|known| known.id)
    }

    /// What an id names.
    pub(super) fn named(&self, id: BackendId, listed: &Listed) -> Option<BackendAddress> {
        listed.get(&id).or_else(|| self.unlisted.get(&id)).copied()
    }

    /// Whether somebody leads there.
    pub(super) fn is_held(&self, backend: &BackendAddress) -> bool {
        self.known.get(backend).is_some_and(|known| known.holders > 0)
    }

    /// One more leads there.
    pub(super) fn hold(&mut self, backend: &BackendAddress) {
        if let Some(known) = self.known.get_mut(backend) {
            known.holders = known.holders.saturating_add(1);
        }
    }

    /// One fewer; whether it was the last.
    pub(super) fn release(&mut self, backend: &BackendAddress) -> bool {
        let Some(known) = self.known.get_mut(backend).filter(|known| known.holders > 0) else { return false };
        known.holders -= 1;
        known.holders == 0
    }

    /// The table lists it now.
    pub(super) fn listed(&mut self, id: BackendId) {
        self.unlisted.remove(&id);
    }

    /// The table does not list it any more.
    pub(super) fn unlisted(&mut self, id: BackendId, backend: BackendAddress) {
        self.unlisted.insert(id, backend);
    }

    /// It is not in use any more, nor in the table.
    pub(super) fn retire(&mut self, backend: BackendAddress, now: Duration) {
        if self.known.contains_key(&backend) {
            self.retired.insert(backend, now);
        }
    }

    /// Forgets those whose grace period is over.
    pub(super) fn sweep(&mut self, now: Duration) {
        let grace = self.grace;
        let over = self.retired.iter().filter(|(_, at)| now.saturating_sub(**at) >= grace);
        for backend in over.map(|(backend, _)| *backend).collect::<Vec<_>>() {
            self.retired.remove(&backend);
            if let Some(known) = self.known.remove(&backend) {
                self.unlisted.remove(&known.id);
            }
        }
    }

    /// Makes the tree anew: the leaves of one that grew in no order are a third empty.
    pub(super) fn pack(&mut self) {
        self.known = std::mem::take(&mut self.known).into_iter().collect();
    }

    /// How many somebody leads to.
    #[cfg(test)]
    pub(super) fn count_held(&self) -> usize {
        self.known.values().filter(|known| known.holders > 0).count()
    }
}

#[cfg(test)]
mod tests {
    use towpath_model::Protocol;

    use super::*;

    const GRACE: Duration = Duration::from_secs(60);

    fn backend(n: u8) -> BackendAddress {
        BackendAddress { address: [10, 0, 0, n].into(), port: 80, protocol: Protocol::Tcp }
    }

    #[test]
    fn an_id_names_nothing_else_while_it_is_listed_or_rests() {
        let (mut backends, mut listed) = (Backends::new(GRACE), Listed::new());
        let first = backends.take(backend(1), &listed);
        assert_eq!(backends.take(backend(1), &listed), first);
        listed.insert(first, backend(1));
        backends.listed(first);
        assert!(backends.unlisted.is_empty());
        // The numbers come round.
        backends.next = first.0;
        let second = backends.take(backend(2), &listed);
        assert_ne!(second, first);
        listed.remove(&first);
        backends.unlisted(first, backend(1));
        backends.retire(backend(1), Duration::ZERO);
        backends.sweep(GRACE - Duration::from_secs(1));
        backends.next = first.0;
        assert!(![first, second].contains(&backends.take(backend(3), &listed)), "it still rests");
        assert_eq!(backends.named(first, &listed), Some(backend(1)));
        assert_eq!(backends.take(backend(1), &listed), first, "it came back in time");
        backends.retire(backend(1), GRACE);
        backends.sweep(GRACE * 2);
        assert_eq!((backends.id(&backend(1)), backends.named(first, &listed)), (None, None));
        backends.next = first.0;
        assert_eq!(backends.take(backend(4), &listed), first, "nobody has it any more");
    }

    #[test]
    fn who_lets_go_last_is_told_so() {
        let (mut backends, listed) = (Backends::new(GRACE), Listed::new());
        assert!(!backends.release(&backend(1)), "never heard of");
        backends.take(backend(1), &listed);
        assert!(!backends.is_held(&backend(1)) && !backends.release(&backend(1)));
        backends.hold(&backend(1));
        backends.hold(&backend(1));
        assert!(!backends.release(&backend(1)) && backends.is_held(&backend(1)));
        assert!(backends.release(&backend(1)) && !backends.is_held(&backend(1)));
    }

    #[test]
    fn what_the_kernel_has_is_adopted_once() {
        let (mut backends, listed) = (Backends::new(GRACE), Listed::new());
        backends.adopt(backend(1), BackendId(7), &listed, Duration::ZERO);
        backends.adopt(backend(2), BackendId(7), &listed, Duration::ZERO);
        backends.adopt(backend(3), BackendId(0), &listed, Duration::ZERO);
        assert_eq!((backends.id(&backend(2)), backends.id(&backend(3))), (None, None));
        assert_eq!(backends.take(backend(1), &listed), BackendId(7));
        assert_eq!(backends.take(backend(2), &listed), BackendId(8), "above what was there");
    }

    #[test]
    fn an_entry_is_small() {
        assert!(size_of::<BackendAddress>() + size_of::<Known>() <= 28);
    }
}
