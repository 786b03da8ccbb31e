//! Health check NodePorts: what load balancers outside ask every node about a Service whose external policy is `Local`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{NamespacedName, NodeName, World};

use crate::Changed;

/// What a node answers on one health check port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: NamespacedName,
    /// Its ready endpoints on this node; none: the load balancer is to send nothing here.
    pub local_endpoints: usize,
}

/// The health check ports of these Services on this node, by port. Of two Services with one port, which the API server does not
/// let happen, the first by name has it.
pub fn plan(world: &World, node: &NodeName, names: &BTreeSet<NamespacedName>) -> BTreeMap<u16, HealthCheck> {
    let mut checks: BTreeMap<u16, HealthCheck> = BTreeMap::new();
    for (name, service) in names.iter().filter_map(|name| Some((name, world.services.get(name)?))) {
        let Some(port) = service.health_check_port.filter(|_| !service.for_other_proxies()) else { continue };
        checks.entry(port).or_insert(HealthCheck { service: name.clone(), local_endpoints: 0 });
    }
    if checks.is_empty() {
        return checks;
    }
    let slices = Changed::Services(names).slices(world);
    for check in checks.values_mut() {
        let all = world.services.get(&check.service).is_some_and(|service| service.publish_not_ready);
        let here = slices.get(&check.service).into_iter().flatten().flat_map(|slice| &slice.endpoints);
        let ready = here.filter(|e| e.node.as_ref() == Some(node) && (e.conditions.ready || all));
        check.local_endpoints = ready.map(|e| e.address).collect::<BTreeSet<IpAddr>>().len();
    }
    checks
}
