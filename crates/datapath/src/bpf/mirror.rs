//! A map with a copy of what it holds: only differences are written, and what could not be written is tried again.

use std::collections::HashMap;
use std::hash::Hash;

use libbpf_rs::Object;

use super::config::Changes;
use super::error::{Error, Result};
use super::map::Map;
use crate::abi::Plain;

/// A map that only user space writes, and its content.
#[derive(Debug)]
pub(crate) struct Mirror<K, V> {
    map: Map<K, V>,
    held: HashMap<K, V>,
}

impl<K, V> Mirror<K, V>
where
    K: Plain + Eq + Hash,
    V: Plain + Eq,
{
    /// Opens a map and reads it.
    pub(crate) fn open(object: &Object, name: &'static str) -> Result<Self> {
        let map = Map::open(object, name)?;
        let held = map.entries()?.into_iter().collect();
        Ok(Self { map, held })
    }

    /// What the map holds.
    pub(crate) fn held(&self) -> &HashMap<K, V> {
        &self.held
    }

    /// Its name, entries and limit.
    pub(crate) fn usage(&self) -> (&'static str, usize, u32) {
        (self.map.name(), self.held.len(), self.map.limit())
    }

    /// That there is no room.
    pub(crate) fn full(&self) -> Error {
        Error::Full { map: self.map.name(), limit: self.map.limit() }
    }

    /// Whether it has room for these entries besides those that it holds.
    pub(crate) fn has_room(&self, entries: &[(K, V)]) -> bool {
        let new = entries.iter().filter(|(key, _)| !self.held.contains_key(key)).count();
        usize::try_from(self.map.limit()).is_ok_and(|limit| self.held.len() + new <= limit)
    }

    /// Writes one entry if it differs.
    pub(crate) fn put(&mut self, key: K, value: V) -> Result<bool> {
        if self.held.get(&key) == Some(&value) {
            return Ok(false);
        }
        self.map.put(&key, &value)?;
        self.held.insert(key, value);
        Ok(true)
    }

    /// Writes the entries that differ.
    pub(crate) fn put_all(&mut self, wanted: impl IntoIterator<Item = (K, V)>) -> Result<Changes> {
        let (keys, values): (Vec<K>, Vec<V>) =
            wanted.into_iter().filter(|(key, value)| self.held.get(key) != Some(value)).unzip();
        let outcome = self.map.put_all(&keys, &values);
        let written = match &outcome {
            Ok(()) => keys.len(),
            Err((done, _)) => *done,
        };
        self.held.extend(keys.into_iter().zip(values).take(written));
        outcome.map_err(|(_, e)| e)?;
        Ok(Changes { written, removed: 0 })
    }

    /// Deletes one entry; whether it was there.
    pub(crate) fn remove(&mut self, key: &K) -> Result<bool> {
        if !self.held.contains_key(key) {
            return Ok(false);
        }
        self.map.delete(key)?;
        self.held.remove(key);
        Ok(true)
    }

    /// Deletes these entries.
    pub(crate) fn remove_all(&mut self, keys: &[K]) -> Result<Changes> {
        let mut changes = Changes::default();
        for key in keys {
            changes.removed += usize::from(self.remove(key)?);
        }
        Ok(changes)
    }

    /// Deletes what `keep` does not want.
    pub(crate) fn retain(&mut self, keep: impl Fn(&K) -> bool) -> Result<Changes> {
        let gone: Vec<K> = self.held.keys().filter(|key| !keep(key)).copied().collect();
        let mut changes = Changes::default();
        for key in gone {
            changes.removed += usize::from(self.remove(&key)?);
        }
        Ok(changes)
    }
}
