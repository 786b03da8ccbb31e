//! What changed in the world since a planner last looked. A planner may always be told [`Changed::All`]: it then costs
//! time, never correctness.

use std::collections::{BTreeMap, BTreeSet};

use towpath_model::{EndpointSlice, NamespacedName, World};

/// Which Services (with their EndpointSlices) a planner must look at again.
#[derive(Clone, Copy, Debug)]
pub enum Changed<'a> {
    /// Everything: at start, after a re-list, at the slow full check, and when nodes came, went or changed address.
    All,
    /// These Services: the object or any slice that names it changed, came or went.
    Services(&'a BTreeSet<NamespacedName>),
}

/// Which pods a planner must look at again.
#[derive(Clone, Copy, Debug)]
pub enum ChangedPods<'a> {
    /// Nobody knows which.
    All,
    /// These: they changed, came or went.
    These(&'a BTreeSet<NamespacedName>),
}

impl Changed<'_> {
    /// The slices of the Services concerned.
    pub(crate) fn slices<'w>(&self, world: &'w World) -> BTreeMap<&'w NamespacedName, Vec<&'w EndpointSlice>> {
        let mut by_service: BTreeMap<&NamespacedName, Vec<&EndpointSlice>> = BTreeMap::new();
        match self {
            Changed::All => {
                for slice in world.slices.values() {
                    by_service.entry(&slice.service).or_default().push(slice);
                }
            }
            Changed::Services(names) => {
                for slice in names.iter().flat_map(|name| world.slices.of(name)) {
                    by_service.entry(&slice.service).or_default().push(slice);
                }
            }
        }
        by_service
    }
}
