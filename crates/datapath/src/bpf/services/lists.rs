//! Lists of backends (`tp_slots`): a list is written whole before an entry points to it, never changed, and deleted when nothing that runs can
//! still be reading it.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Instant;

use libbpf_rs::Object;
use towpath_model::desired::{BackendId, FrontendTarget};

use super::is_over;
use crate::abi::{Service, SlotKey};
use crate::bpf::config::Changes;
use crate::bpf::error::Result;
use crate::bpf::mirror::Mirror;

/// Every list, by its number.
#[derive(Debug)]
pub(super) struct Lists {
    slots: Mirror<SlotKey, u32>,
    /// The list of each Service port, by its id, and how long it is: its frontends share it.
    of_port: HashMap<u32, (u32, u32)>,
    /// Lists that are look-up tables: too long to be compared each time.
    tables: HashMap<u32, Arc<[BackendId]>>,
    /// Lists that entries no longer point to, how long they are, and since when.
    old: Vec<(u32, u32, Instant)>,
    next: u32,
}

impl Lists {
    /// `used`: the lists that entries point to, and how long they are.
    pub(super) fn open(object: &Object, used: &HashMap<u32, u32>, now: Instant) -> Result<Self> {
        let slots: Mirror<SlotKey, u32> = Mirror::open(object, "tp_slots")?;
        // What an earlier process did not come to delete.
        let mut orphans: HashMap<u32, u32> = HashMap::new();
        for slot in slots.held().keys().filter(|slot| used.get(&slot.list).is_none_or(|count| slot.index >= *count)) {
            let count = orphans.entry(slot.list).or_default();
            *count = (*count).max(slot.index.saturating_add(1));
        }
        let next = slots.held().keys().map(|slot| slot.list).max().unwrap_or(0).wrapping_add(1).max(1);
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
        let slot = |index| self.slots.held().get(&SlotKey { list: service.list, index }).copied();
        (0..service.count).filter_map(slot).collect()
    }

    fn is_of(&self, list: u32, count: u32, wanted: &[BackendId]) -> bool {
        let slot = |index| self.slots.held().get(&SlotKey { list, index }).copied();
        count as usize == wanted.len() && (0..count).zip(wanted).all(|(index, BackendId(id))| slot(index) == Some(*id))
    }

    /// The list of a target: that of its entry or of another entry of its Service port when it is the same, else a new one, written
    /// whole. None is 0.
    pub(super) fn list_for(&mut self, old: Option<&Service>, target: &FrontendTarget) -> Result<(u32, Changes)> {
        let wanted = target.slots();
        if wanted.is_empty() {
            return Ok((0, Changes::default()));
        }
        let large = !target.table.is_empty();
        let written = self.tables.iter().find(|(_, table)| large && Arc::ptr_eq(table, &target.table));
        if let Some((list, _)) = written {
            return Ok((*list, Changes::default()));
        }
        let shared = self.of_port.get(&target.id.0).copied();
        let mut former = old.map(|old| (old.list, old.count)).into_iter().chain(shared);
        let (list, changes) = match former.find(|(list, count)| self.is_of(*list, *count, wanted)) {
            Some((list, _)) => (list, Changes::default()),
            None => self.write(wanted)?,
        };
        if large {
            self.tables.insert(list, Arc::clone(&target.table));
        }
        self.of_port.insert(target.id.0, (list, wanted.len() as u32));
        Ok((list, changes))
    }

    fn write(&mut self, wanted: &[BackendId]) -> Result<(u32, Changes)> {
        let list = self.next;
        self.next = self.next.wrapping_add(1).max(1);
        let slots = (0u32..).zip(wanted).map(|(index, BackendId(id))| (SlotKey { list, index }, *id));
        match self.slots.put_all(slots) {
            Ok(changes) => Ok((list, changes)),
            Err(error) => {
                self.old.push((list, wanted.len() as u32, Instant::now()));
                Err(error)
            }
        }
    }

    /// An entry no longer points to its list, or never came to.
    pub(super) fn retire(&mut self, service: &Service, now: Instant) {
        if service.count == 0 {
            return;
        }
        self.tables.remove(&service.list);
        if self.of_port.get(&service.id).is_some_and(|(list, _)| *list == service.list) {
            self.of_port.remove(&service.id);
        }
        self.old.push((service.list, service.count, now));
    }

    /// Deletes those whose grace period is over, but for what `used` still points to; how many slots.
    pub(super) fn sweep(&mut self, used: &HashMap<u32, u32>, now: Instant) -> Result<usize> {
        let mut removed = 0;
        let due: Vec<(u32, u32)> = self
            .old
            .iter()
            .filter(|(.., since)| is_over(*since, now))
            .map(|(list, count, _)| (*list, *count))
            .collect();
        for (list, count) in due {
            let first = used.get(&list).copied().unwrap_or(0);
            for index in first..count {
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
