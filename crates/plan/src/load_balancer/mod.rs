//! Addresses of Services of type LoadBalancer: which pool gives which Service which address, who shares one, and which nodes may
//! announce it.
//!
//! Pure. [`plan`] is told everything and says what every Service's status should hold ([`Plan`]); whoever writes it may be
//! interrupted after any write, and start again with what stands then:
//!
//! - What stands in a Service's status is kept before anything new is given, and the older Service keeps what two cannot both have.
//! - What others merely say of an address (a node's status, a Service's `spec.externalIPs`) never takes it from who has it.
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
    /// Ranges of pods and Services, as whoever runs the cluster configured them: nothing in them is a load balancer's.
    pub own_ranges: Vec<IpNet>,
    /// Ranges of pods, as nodes say them: nothing in them is given, but what a Service has it keeps.
    pub node_ranges: Vec<IpNet>,
    /// Where Services may have external addresses (`NetworkConfig`, `spec.externalCIDRs`); elsewhere they mean nothing.
    pub external_ranges: Vec<IpNet>,
}

impl View {
    /// Whether Services of different namespaces may share an address: all pools that have it say so.
    pub fn is_shared_across_namespaces(&self, address: IpAddr) -> bool {
        let mut pools = self.pools.values().filter(|pool| pool.contains(address)).peekable();
        // In none that is known: what was given stays until it is clear what that pool says.
        if pools.peek().is_none() { self.some_pool_is_unclear } else { pools.all(|pool| pool.shared_across_namespaces) }
    }
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
    /// The Services whose status is to be written, with what is to be in it; those that lose something first. What lacks a mark that it
    /// is ours is written again, too.
    pub fn changes<'a>(&'a self, view: &'a View) -> Vec<(&'a NamespacedName, &'a BTreeSet<IpAddr>)> {
        let standing = |name: &NamespacedName| view.services.get(name).map(|service| &service.standing);
        let is_marked = |name: &NamespacedName| view.services.get(name).is_some_and(|service| service.is_marked);
        let is_stale = |(name, wanted): &(&NamespacedName, &BTreeSet<IpAddr>)| {
            standing(name).is_some_and(|have| have != *wanted || (!wanted.is_empty() && !is_marked(name)))
        };
        let mut changes: Vec<_> = self.addresses.iter().filter(is_stale).collect();
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

/// A Service and what it asks for.
pub type Asker<'a> = (&'a NamespacedName, &'a LoadBalancerRequest);

/// Whether two Services may have one address: the same key, the same namespace (a key can be guessed; `across_namespaces`: the address's
/// pool lets others share it, too), no port in common and, where only some nodes lead to them (external traffic policy `Local`), the
/// same pods. Whose pods are made by hand (no selector) are never known to be the same.
pub fn may_share(a: Asker<'_>, b: Asker<'_>, across_namespaces: bool) -> bool {
    let ((a_name, a), (b_name, b)) = (a, b);
    let same_key = a.sharing_key.is_some() && a.sharing_key == b.sharing_key;
    let same_namespace = a_name.namespace == b_name.namespace;
    let same_nodes = match (a.external_policy, b.external_policy) {
        (TrafficPolicy::Cluster, TrafficPolicy::Cluster) => true,
        (TrafficPolicy::Local, TrafficPolicy::Local) => {
            same_namespace && !a.selector.is_empty() && a.selector == b.selector
        }
        _ => false,
    };
    same_key && (same_namespace || across_namespaces) && same_nodes && a.ports.is_disjoint(&b.ports)
}
