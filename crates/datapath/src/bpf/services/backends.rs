//! Backends (`tp_backends`), by ids that name nothing else while anything may refer to them.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::time::Instant;

use libbpf_rs::Object;
use towpath_model::Protocol;
use towpath_model::desired::{BackendAddress, BackendId, FrontendTarget};

use super::is_over;
use crate::abi::{self, Addr, Be16};
use crate::bpf::config::Changes;
use crate::bpf::error::{Error, Result};
use crate::bpf::mirror::Mirror;

/// Every backend in the kernel, and those that are to be.
#[derive(Debug)]
pub(super) struct Backends {
    map: Mirror<u32, abi::Backend>,
    /// Those that the table no longer has, and since when.
    old: HashMap<u32, Instant>,
    /// Those for which there was no room.
    without_room: HashSet<u32>,
    /// Ids that name others than they did, not taken yet.
    renamed: Vec<u32>,
}

fn encode(backend: &BackendAddress) -> abi::Backend {
    abi::Backend {
        addr: Addr::new(backend.address),
        port: Be16::new(backend.port),
        proto: backend.protocol.number(),
        pad: 0,
        flags: 0,
    }
}

impl Backends {
    pub(super) fn open(object: &Object) -> Result<Self> {
        Ok(Self {
            map: Mirror::open(object, "tp_backends")?,
            old: HashMap::new(),
            without_room: HashSet::new(),
            renamed: Vec::new(),
        })
    }

    pub(super) fn held(&self) -> &HashMap<u32, abi::Backend> {
        self.map.held()
    }

    pub(super) fn usage(&self) -> (&'static str, usize, u32) {
        self.map.usage()
    }

    /// That there is no room.
    pub(super) fn full(&self) -> Error {
        self.map.full()
    }

    /// Whether the table has it, as far as this was told.
    pub(super) fn is_known(&self, BackendId(id): &BackendId) -> bool {
        self.map.held().contains_key(id) || self.without_room.contains(id)
    }

    /// Everything is told again.
    pub(super) fn begin(&mut self) {
        self.without_room.clear();
    }

    /// Writes what there is room for: all that a target leads to, or nothing of it, in the order of `targets`. The rest is missed by the
    /// Services that lead there.
    pub(super) fn write<'a>(
        &mut self,
        backends: impl Iterator<Item = (&'a BackendId, &'a BackendAddress)>,
        targets: impl Iterator<Item = &'a FrontendTarget>,
    ) -> Result<Changes> {
        let wanted: HashMap<u32, abi::Backend> = backends.map(|(id, backend)| (id.0, encode(backend))).collect();
        for (id, value) in &wanted {
            self.old.remove(id);
            self.without_room.remove(id);
            if self.map.held().get(id).is_some_and(|held| held != value) {
                self.renamed.push(*id);
            }
        }
        if self.has_room_for(wanted.keys()) {
            match self.map.put_all(wanted.iter().map(|(id, value)| (*id, *value))) {
                Err(Error::Full { .. }) => {}
                written => return written,
            }
        }
        let mut changes = Changes::default();
        for target in targets.filter(|target| !target.backends.is_empty()) {
            let all = || target.backends.iter().map(|id| &id.0).filter(|id| wanted.contains_key(id));
            if self.has_room_for(all()) {
                let values = all().filter_map(|id| Some((*id, *wanted.get(id)?)));
                changes += self.put(values.collect())?;
            }
        }
        // An id may have come to name another.
        let rest = wanted.iter().filter(|(id, _)| self.map.held().contains_key(id)).map(|(id, value)| (*id, *value));
        changes += self.put(rest.collect())?;
        self.without_room.extend(wanted.keys().filter(|id| !self.map.held().contains_key(id)));
        Ok(changes)
    }

    /// Ids that have come to name other backends since this was asked last.
    pub(super) fn take_renamed(&mut self) -> Vec<u32> {
        std::mem::take(&mut self.renamed)
    }

    fn has_room_for<'a>(&self, ids: impl Iterator<Item = &'a u32>) -> bool {
        let (_, used, limit) = self.map.usage();
        used + ids.filter(|id| !self.map.held().contains_key(id)).count() <= limit as usize
    }

    fn put(&mut self, values: Vec<(u32, abi::Backend)>) -> Result<Changes> {
        match self.map.put_all(values) {
            Err(Error::Full { .. }) => Ok(Changes::default()),
            written => written,
        }
    }

    /// The table no longer has these: they go after the grace period. Whether one is of UDP.
    pub(super) fn retire(&mut self, ids: &[u32], now: Instant) -> bool {
        let mut udp = false;
        for id in ids {
            self.without_room.remove(id);
            let Some(backend) = self.map.held().get(id) else { continue };
            if let Entry::Vacant(place) = self.old.entry(*id) {
                place.insert(now);
                udp |= backend.proto == Protocol::Udp.number();
            }
        }
        udp
    }

    /// Deletes those whose grace period is over, but for what is `needed`; how many.
    pub(super) fn sweep(&mut self, needed: &HashSet<u32>, now: Instant) -> Result<usize> {
        let over = self.old.iter().filter(|(id, since)| is_over(**since, now) && !needed.contains(id));
        let over: Vec<u32> = over.map(|(id, _)| *id).collect();
        for id in &over {
            self.map.remove(id)?;
            self.old.remove(id);
        }
        Ok(over.len())
    }
}
