//! Addresses of Services of type LoadBalancer: which pool gives which Service which address, who shares one, and which nodes may
//! announce it.
//!
//! Pure. [`plan`] is told everything and says what every Service's status should hold ([`Plan`]); whoever writes it may be
//! interrupted after any write, and start again with what stands then:
//!
//! - What stands in a Service's status is kept before anything new is given, and the older Service keeps what two cannot both have.
//! - An address that still stands in another Service's status is given to nobody who may not share it, even if that status is
//!   about to lose it: it is given in the round after. So at no moment do two Services that do not share have one address.

mod allocate;
pub mod announcers;
mod pools;
mod refusal;

#[cfg(test)]
mod property_tests;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::{AddressPool, BalancedService, Labels, LoadBalancerRequest, NamespacedName, TrafficPolicy};

pub use allocate::plan;
pub use refusal::Refusal;

/// Everything that a plan depends on.
#[derive(Clone, Debug, Default)]
pub struct View {
    /// Pools by name.
    pub pools: BTreeMap<String, AddressPool>,
    /// A pool cannot be understood, or not any more: then no address is taken back because it is in none.
    pub some_pool_is_unclear: bool,
    /// All Services, of whatever type.
    pub services: BTreeMap<NamespacedName, BalancedService>,
    /// Labels of namespaces, by name.
    pub namespaces: BTreeMap<String, Labels>,
    /// Addresses of nodes.
    pub node_addresses: BTreeSet<IpAddr>,
    /// Ranges of pods and Services: nothing in them is a load balancer's.
    pub own_ranges: Vec<IpNet>,
}

/// What should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// What the status of each Service that is ours should hold.
    pub addresses: BTreeMap<NamespacedName, BTreeSet<IpAddr>>,
    /// Who does not get all it asks for, and why.
    pub refused: BTreeMap<NamespacedName, Refusal>,
    /// Pools by name.
    pub pools: BTreeMap<String, PoolState>,
}

impl Plan {
    /// The Services whose status is to be written, with what is to be in it; those that lose something first.
    pub fn changes<'a>(&'a self, view: &'a View) -> Vec<(&'a NamespacedName, &'a BTreeSet<IpAddr>)> {
        let standing = |name: &NamespacedName| view.services.get(name).map(|service| &service.standing);
        let mut changes: Vec<_> =
            self.addresses.iter().filter(|(name, wanted)| standing(name).is_some_and(|have| have != *wanted)).collect();
        changes.sort_by_key(|(name, wanted)| standing(name).is_some_and(|have| have.is_subset(wanted)));
        changes
    }
}

/// What has become of a pool.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PoolState {
    /// Addresses in it, without those in ranges of the cluster's own.
    pub total: u128,
    /// Those that Services have.
    pub assigned: u128,
    /// Those that a Service could get.
    pub available: u128,
    /// Ranges that another pool has, too, for people.
    pub overlaps_pools: Vec<String>,
    /// Ranges and addresses that are the cluster's own and are not given, for people.
    pub overlaps_cluster: Vec<String>,
}

/// Whether two Services may have one address: the same key, no port in common and, where only some nodes lead to them (external
/// traffic policy `Local`), the same pods.
pub fn may_share(a: &LoadBalancerRequest, b: &LoadBalancerRequest) -> bool {
    let same_key = a.sharing_key.is_some() && a.sharing_key == b.sharing_key;
    let same_nodes = match (a.external_policy, b.external_policy) {
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster) => true,
        (TrafficPolicy::Local, TrafficPolicy::Local) => a.selector == b.selector,
        _ => false,
    };
    same_key && same_nodes && a.ports.is_disjoint(&b.ports)
}
