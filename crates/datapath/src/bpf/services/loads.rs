//! Open connections of the backends that are chosen by them (`tp_loads`); the programs count.

use std::collections::{HashMap, HashSet};
use std::time::{Duration, Instant};

use libbpf_rs::Object;
use towpath_model::desired::{Algorithm, FrontendTarget};

use crate::abi::{Load, Nat, SnatWay, Tuple};
use crate::bpf::error::{Error, Result};
use crate::bpf::map::Map;

/// Which backends have a count.
#[derive(Debug)]
pub(super) struct Loads {
    map: Map<u32, Load>,
    /// Whether programs look into the map at all.
    kept: Map<u32, u32>,
    translations: Map<Tuple, Nat>,
    asked: Map<Tuple, SnatWay>,
    counted: HashSet<u32>,
    /// Backends that are gone, and since when. Sockets that were counted to one take themselves off when they close, and the id is
    /// kept from others for a while: if the backend comes back, it has its count.
    gone: HashMap<u32, Instant>,
}

/// For longer than any id is kept for a backend that is gone.
const KEEP: Duration = Duration::from_secs(300);

impl Loads {
    pub(super) fn open(object: &Object, now: Instant) -> Result<Self> {
        let map: Map<u32, Load> = Map::open(object, "tp_loads")?;
        let counted: HashSet<u32> = map.entries()?.into_iter().map(|(id, _)| id).collect();
        // Until the table says that they are there.
        let gone = counted.iter().map(|id| (*id, now)).collect();
        let kept: Map<u32, u32> = Map::open(object, "tp_loads_kept")?;
        if !counted.is_empty() {
            kept.put(&0, &1)?;
        }
        let (translations, asked) = (Map::open(object, "tp_nat")?, Map::open(object, "tp_snat_asked")?);
        Ok(Self { map, kept, translations, asked, counted, gone })
    }

    /// Has the connections of these targets' backends counted where they are chosen by them, from what is open by translation now; those
    /// that sockets made before are not known.
    pub(super) fn count<'a>(&mut self, targets: impl Iterator<Item = &'a FrontendTarget>) -> Result<()> {
        let least = targets.filter(|target| target.algorithm == Algorithm::LeastConnections);
        let wanted: HashSet<u32> = least.flat_map(|target| target.backends.iter().map(|id| id.0)).collect();
        let new: Vec<u32> = wanted.difference(&self.counted).copied().collect();
        if new.is_empty() {
            return Ok(());
        }
        // Before the translations are read: what is entered from now on is counted by whoever enters it.
        self.kept.put(&0, &1)?;
        let mut flows: HashMap<u32, u32> = HashMap::new();
        let pods = self.translations.entries()?.into_iter().map(|(_, translation)| translation.backend);
        let others = self.asked.entries()?.into_iter().map(|(_, way)| way.backend_id);
        for backend in pods.chain(others) {
            *flows.entry(backend).or_default() += 1;
        }
        for id in new {
            match self.map.put(&id, &Load { flows: flows.get(&id).copied().unwrap_or(0), sockets: 0 }) {
                Ok(()) => drop(self.counted.insert(id)),
                // Without a count it counts as idle: chosen more often than it should, and no less reachable.
                Err(Error::Full { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A backend is in the table.
    pub(super) fn remember(&mut self, backend: u32) {
        self.gone.remove(&backend);
    }

    /// A backend's count goes with the backend, a while after it.
    pub(super) fn forget(&mut self, backend: u32, now: Instant) {
        if self.counted.contains(&backend) {
            self.gone.entry(backend).or_insert(now);
        }
    }

    pub(super) fn sweep(&mut self, now: Instant) -> Result<usize> {
        let over = |since: &Instant| now.saturating_duration_since(*since) >= KEEP;
        let over: Vec<u32> = self.gone.iter().filter(|(_, since)| over(since)).map(|(id, _)| *id).collect();
        for id in &over {
            self.map.delete(id)?;
            self.counted.remove(id);
            self.gone.remove(id);
        }
        if !over.is_empty() && self.counted.is_empty() {
            self.kept.put(&0, &0)?;
        }
        Ok(over.len())
    }
}
