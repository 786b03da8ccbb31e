//! The map `tp_slots`, and which backend is in which slot. Of the copies of backends that the slots hold nothing is kept here.

use std::collections::{HashMap, HashSet};

use libbpf_rs::Object;

use crate::abi::{Slot, SlotKey};
use crate::bpf::config::Changes;
use crate::bpf::error::{Error, Result};
use crate::bpf::map::Map;

/// No backend has this id.
const NOBODY: u32 = 0;

/// As [`crate::bpf::mirror::Mirror`], of ids.
#[derive(Debug)]
pub(super) struct Slots {
    map: Map<SlotKey, Slot>,
    held: HashMap<SlotKey, u32>,
}

impl Slots {
    /// Opens the map and reads it. Slots of nobody are deleted: what was copied from a version whose slots say nothing of what is looked
    /// for here (until version 4 they were bare ids). The lists that they are of will be written anew, and there is room for that.
    pub(super) fn open(object: &Object) -> Result<Self> {
        let map: Map<SlotKey, Slot> = Map::open(object, "tp_slots")?;
        let (held, dead): (HashMap<_, _>, HashMap<_, _>) =
            map.entries()?.into_iter().map(|(key, slot)| (key, slot.backend)).partition(|(_, id)| *id != NOBODY);
        for key in dead.keys() {
            map.delete(key)?;
        }
        Ok(Self { map, held })
    }

    /// The id of each slot's backend.
    pub(super) fn held(&self) -> &HashMap<SlotKey, u32> {
        &self.held
    }

    /// The map's name, entries and limit.
    pub(super) fn usage(&self) -> (&'static str, usize, u32) {
        (self.map.name(), self.held.len(), self.map.limit())
    }

    /// That there is no room.
    pub(super) fn full(&self) -> Error {
        Error::Full { map: self.map.name(), limit: self.map.limit() }
    }

    /// Writes slots, of which none is there yet.
    pub(super) fn put_all(&mut self, wanted: impl IntoIterator<Item = (SlotKey, Slot)>) -> Result<Changes> {
        let (keys, values): (Vec<SlotKey>, Vec<Slot>) = wanted.into_iter().unzip();
        let outcome = self.map.put_all(&keys, &values);
        let written = match &outcome {
            Ok(()) => keys.len(),
            Err((done, _)) => *done,
        };
        self.held.extend(keys.into_iter().zip(values.iter().map(|slot| slot.backend)).take(written));
        outcome.map_err(|(_, e)| e)?;
        Ok(Changes { written, removed: 0 })
    }

    /// Deletes a slot; whether it was there.
    pub(super) fn remove(&mut self, key: &SlotKey) -> Result<bool> {
        if !self.held.contains_key(key) {
            return Ok(false);
        }
        self.map.delete(key)?;
        self.held.remove(key);
        Ok(true)
    }

    /// These ids name other backends now: what is in a slot of one is nobody's any more.
    pub(super) fn disown(&mut self, renamed: &[u32]) {
        let renamed: HashSet<u32> = renamed.iter().copied().collect();
        self.held.values_mut().filter(|id| renamed.contains(id)).for_each(|id| *id = NOBODY);
    }
}
