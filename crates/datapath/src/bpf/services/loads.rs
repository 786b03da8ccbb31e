//! Open connections of the backends that are chosen by them (`tp_loads`); the programs count.

use std::collections::{HashMap, HashSet};

use libbpf_rs::Object;
use towpath_model::desired::{Algorithm, FrontendTarget};

use crate::abi::{Load, Nat, Tuple};
use crate::bpf::error::{Error, Result};
use crate::bpf::map::Map;

/// Which backends have a count.
#[derive(Debug)]
pub(super) struct Loads {
    map: Map<u32, Load>,
    translations: Map<Tuple, Nat>,
    counted: HashSet<u32>,
}

impl Loads {
    pub(super) fn open(object: &Object) -> Result<Self> {
        let map: Map<u32, Load> = Map::open(object, "tp_loads")?;
        let counted = map.entries()?.into_iter().map(|(id, _)| id).collect();
        Ok(Self { map, translations: Map::open(object, "tp_nat")?, counted })
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
        let mut flows: HashMap<u32, u32> = HashMap::new();
        for (_, translation) in self.translations.entries()? {
            *flows.entry(translation.backend).or_default() += 1;
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

    /// A backend's count goes with the backend.
    pub(super) fn forget(&mut self, backend: u32) -> Result<()> {
        if self.counted.remove(&backend) {
            self.map.delete(&backend)?;
        }
        Ok(())
    }
}
