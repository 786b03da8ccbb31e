//! Health check NodePorts: what load balancers outside ask every node about a Service whose external policy is `Local`.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{NamespacedName, NodeName, World};

/// What a node answers on one health check port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: NamespacedName,
    /// Its ready endpoints on this node; none: the load balancer is to send nothing here.
    pub local_endpoints: usize,
}

/// All health check ports of this node, by port. Of two Services with one port, which the API server does not let happen, the
/// first by name has it.
pub fn plan(world: &World, node: &NodeName) -> BTreeMap<u16, HealthCheck> {
    let mut checks: BTreeMap<u16, HealthCheck> = BTreeMap::new();
    for (name, service) in &world.services {
        let Some(port) = service.health_check_port.filter(|_| !service.for_other_proxies()) else { continue };
        checks.entry(port).or_insert(HealthCheck { service: name.clone(), local_endpoints: 0 });
    }
    if checks.is_empty() {
        return checks;
    }
    let mut local: BTreeMap<&NamespacedName, BTreeSet<IpAddr>> = BTreeMap::new();
    for slice in world.slices.values() {
        let all = world.services.get(&slice.service).is_some_and(|service| service.publish_not_ready);
        let ready = slice.endpoints.iter().filter(|e| e.node.as_ref() == Some(node) && (e.conditions.ready || all));
        local.entry(&slice.service).or_default().extend(ready.map(|e| e.address));
    }
    for check in checks.values_mut() {
        check.local_endpoints = local.get(&check.service).map_or(0, BTreeSet::len);
    }
    checks
}
