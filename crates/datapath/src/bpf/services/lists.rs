//! Lists of backends (`tp_slots`): a list is written whole before an entry points to it, never changed, and deleted when nothing that runs can
//! still be reading it.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use libbpf_rs::Object;
use towpath_model::desired::{BackendId, FrontendTarget};

use super::is_over;
use super::slots::Slots;
use crate::abi::{Backend, Service, Slot, SlotKey};
use crate::bpf::config::Changes;
use crate::bpf::error::{Error, Result};

/// What of the map no look-up table may take, as a part of it: there is room for plain lists when tables have all that they get.
const KEPT_FROM_TABLES: u32 = 4;

/// Every list, by its number.
#[derive(Debug)]
pub(super) struct Lists {
    slots: Slots,
    /// The list of each Service port, by its id, and how long it is: its frontends share it.
    of_port: HashMap<u32, (u32, u32)>,
    /// Lists that are look-up tables: too long to be compared each time.
    tables: HashMap<u32, Arc<[BackendId]>>,
    /// Lists that entries no longer point to, how long they are, and since when.
    old: Vec<(u32, u32, Instant)>,
    next: u32,
}

/// A list that an entry may point to.
#[derive(Debug)]
pub(super) struct List {
    /// 0: there is none.
    pub(super) number: u32,
    /// How long it is.
    pub(super) count: u32,
    /// What had to be written.
    pub(super) changes: Changes,
    /// Whether it is the look-up table that was asked for, if one was.
    pub(super) tabled: Result<()>,
}

impl List {
    fn found(number: u32, count: usize) -> Self {
        Self { number, count: count as u32, changes: Changes::default(), tabled: Ok(()) }
    }
}

/// What the programs find in a slot.
fn slot_of(id: u32, backend: &Backend) -> Slot {
    Slot { addr: backend.addr, port: backend.port, proto: backend.proto, pad: 0, backend: id }
}

/// The slots of a list, each with its backend.
fn slots_of(list: u32, wanted: &[BackendId], backends: &HashMap<u32, Backend>) -> Result<Vec<(SlotKey, Slot)>> {
    let slot = |(index, BackendId(id)): (u32, &BackendId)| {
        let backend = backends.get(id).ok_or_else(|| Error::Invalid {
            object: format!("slot {index} of a list of backends"),
            reason: "it names a backend that the table does not have",
        })?;
        Ok((SlotKey { list, index }, slot_of(*id, backend)))
    };
    (0..).zip(wanted).map(slot).collect()
}

impl Lists {
    /// `used`: the lists that entries point to, and how long they are.
    pub(super) fn open(object: &Object, used: &HashMap<u32, u32>, now: Instant) -> Result<Self> {
        let slots = Slots::open(object)?;
        // What an earlier process did not come to delete.
        let mut orphans: HashMap<u32, u32> = HashMap::new();
        for slot in slots.held().keys().filter(|slot| used.get(&slot.list).is_none_or(|count| slot.index >= *count)) {
            let count = orphans.entry(slot.list).or_default();
            *count = (*count).max(slot.index.saturating_add(1));
        }
        let lists = slots.held().keys().map(|slot| slot.list).chain(used.keys().copied());
        let next = lists.max().unwrap_or(0).wrapping_add(1).max(1);
        Ok(Self {
            slots,
            of_port: HashMap::new(),
            tables: HashMap::new(),
            old: orphans.into_iter().map(|(list, count)| (list, count, now)).collect(),
            next,
        })
    }

    /// The backends of the list that an entry points to.
    pub(super) fn backends_of(&self, service: &Service) -> Vec<u32> {
        let slot = |index| self.slots.held().get(&SlotKey { list: service.slots, index }).copied();
        (0..service.count).filter_map(slot).collect()
    }

    /// These ids have come to name other backends: no list that has one is as it should be.
    pub(super) fn disown(&mut self, renamed: &[u32]) {
        self.slots.disown(renamed);
    }

    fn is_of(&self, list: u32, count: u32, wanted: &[BackendId]) -> bool {
        let slot = |index| self.slots.held().get(&SlotKey { list, index }).copied();
        count as usize == wanted.len() && (0..count).zip(wanted).all(|(index, BackendId(id))| slot(index) == Some(*id))
    }

    /// The list of a target: that of its entry or of another entry of its Service port when it is the same, else a new one, written
    /// whole. A look-up table for which there is no room is stood in for by a plain list, in the order of `backends`' addresses,
    /// which is the same on every node.
    pub(super) fn list_for(
        &mut self,
        old: Option<&Service>,
        target: &FrontendTarget,
        backends: &HashMap<u32, Backend>,
    ) -> Result<List> {
        if target.backends.is_empty() {
            return Ok(List::found(0, 0));
        }
        if target.table.is_empty() {
            return self.list_of(old, target, &target.backends, backends, 0);
        }
        let written = self.tables.iter().find(|(_, table)| Arc::ptr_eq(table, &target.table));
        if let Some((list, _)) = written {
            return Ok(List::found(*list, target.table.len()));
        }
        match self.list_of(old, target, &target.table, backends, self.slots.usage().2 / KEPT_FROM_TABLES) {
            Ok(list) => {
                self.tables.insert(list.number, Arc::clone(&target.table));
                Ok(list)
            }
            Err(error @ Error::Full { .. }) => {
                let mut plain = target.backends.clone();
                plain.sort_unstable_by_key(|id| backends.get(&id.0).map(|at| (at.addr.ip(), at.port.get())));
                Ok(List { tabled: Err(error), ..self.list_of(old, target, &plain, backends, 0)? })
            }
            Err(error) => Err(error),
        }
    }

    fn list_of(
        &mut self,
        old: Option<&Service>,
        target: &FrontendTarget,
        wanted: &[BackendId],
        backends: &HashMap<u32, Backend>,
        keep_free: u32,
    ) -> Result<List> {
        let shared = self.of_port.get(&target.id.0).copied();
        let mut former = old.map(|old| (old.slots, old.count)).into_iter().chain(shared);
        let list = match former.find(|(list, count)| self.is_of(*list, *count, wanted)) {
            Some((list, _)) => List::found(list, wanted.len()),
            None => self.write(wanted, backends, keep_free)?,
        };
        self.of_port.insert(target.id.0, (list.number, list.count));
        Ok(list)
    }

    /// All of it, or nothing: a list that does not fit takes no room from those that do.
    fn write(&mut self, wanted: &[BackendId], backends: &HashMap<u32, Backend>, keep_free: u32) -> Result<List> {
        let (_, used, limit) = self.slots.usage();
        if used + wanted.len() + keep_free as usize > limit as usize {
            return Err(self.slots.full());
        }
        let list = self.next;
        let slots = slots_of(list, wanted, backends)?;
        self.next = self.next.wrapping_add(1).max(1);
        match self.slots.put_all(slots) {
            Ok(changes) => Ok(List { changes, ..List::found(list, wanted.len()) }),
            Err(error) => {
                // Nothing ever pointed to it.
                for index in 0..wanted.len() as u32 {
                    self.slots.remove(&SlotKey { list, index })?;
                }
                Err(error)
            }
        }
    }

    /// An entry no longer points to its list, or never came to.
    pub(super) fn retire(&mut self, service: &Service, now: Instant) {
        if service.count == 0 {
            return;
        }
        self.tables.remove(&service.slots);
        if self.of_port.get(&service.id).is_some_and(|(list, _)| *list == service.slots) {
            self.of_port.remove(&service.id);
        }
        self.old.push((service.slots, service.count, now));
    }

    /// Deletes those whose grace period is over, but for what is still pointed to; how many slots. `used` is asked only when there are
    /// such lists, and only for those: how long each is of them that entries point to.
    pub(super) fn sweep(
        &mut self,
        used: impl FnOnce(&HashSet<u32>) -> HashMap<u32, u32>,
        now: Instant,
    ) -> Result<usize> {
        let mut removed = 0;
        for (list, slots) in over(&self.old, used, now) {
            for index in slots {
                removed += usize::from(self.slots.remove(&SlotKey { list, index })?);
            }
        }
        self.old.retain(|(.., since)| !is_over(*since, now));
        Ok(removed)
    }

    pub(super) fn usage(&self) -> (&'static str, usize, u32) {
        self.slots.usage()
    }
}

/// What of the lists whose grace period is over nobody points to: their numbers, and which slots.
fn over(
    old: &[(u32, u32, Instant)],
    used: impl FnOnce(&HashSet<u32>) -> HashMap<u32, u32>,
    now: Instant,
) -> Vec<(u32, Range<u32>)> {
    let due: Vec<(u32, u32)> =
        old.iter().filter(|(.., since)| is_over(*since, now)).map(|(list, count, _)| (*list, *count)).collect();
    if due.is_empty() {
        return Vec::new();
    }
    let used = used(&due.iter().map(|(list, _)| *list).collect());
    due.into_iter().map(|(list, count)| (list, used.get(&list).copied().unwrap_or(0)..count)).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::bpf::services::GRACE;

    #[test]
    fn a_list_that_names_an_unknown_backend_is_refused_whole() {
        let known = Backend { proto: 6, ..Backend::default() };
        let backends = HashMap::from([(1, known), (2, known)]);
        let slots = slots_of(9, &[BackendId(2), BackendId(1)], &backends).unwrap();
        assert_eq!(
            slots.iter().map(|(key, slot)| (key.list, key.index, slot.backend)).collect::<Vec<_>>(),
            [(9, 0, 2), (9, 1, 1)]
        );
        let error = slots_of(9, &[BackendId(1), BackendId(3)], &backends).unwrap_err().to_string();
        assert!(error.contains("slot 1"), "{error}");
    }

    #[test]
    fn entries_are_looked_at_only_when_a_list_is_due_and_only_for_that_list() {
        let start = Instant::now();
        let old = [(7, 3, start), (8, 2, start), (9, 5, start + GRACE)];
        let nobody = |_: &HashSet<u32>| panic!("nothing is due");
        assert_eq!(over(&[], nobody, start + GRACE), []);
        assert_eq!(over(&old, nobody, start + GRACE - Duration::from_millis(1)), []);
        let used = |asked: &HashSet<u32>| {
            assert_eq!(*asked, HashSet::from([7, 8]), "9 still rests");
            HashMap::from([(8, 1)])
        };
        assert_eq!(over(&old, used, start + GRACE), [(7, 0..3), (8, 1..2)]);
    }
}
