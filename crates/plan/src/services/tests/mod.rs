//! What the planner of Services promises, by theme; here, what they have in common.

mod changes;
mod choice;
mod describe;
mod host_ports;
mod lifetime;
mod ownership;
mod topology;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use towpath_model::desired::{
    Algorithm, BackendAddress, BackendId, Clients, Frontend, FrontendTarget, ServiceChanges, ServiceId, ServiceTable,
};
use towpath_model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, NamespacedName, NodeName, Protocol, Service,
    ServiceKind, ServicePort, TargetPort, TrafficPolicy, World, family_of,
};

use super::{Planner, ServiceConfig};
use crate::Changed;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn node() -> NodeName {
    NodeName::new("n1")
}

fn named(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

fn service(name: &str, cluster_ips: &[&str]) -> Service {
    Service {
        name: named(name),
        labels: Default::default(),
        kind: ServiceKind::ClusterIp,
        cluster_ips: cluster_ips.iter().map(|t| ip(t)).collect(),
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        load_balancer_class: None,
        balanced_by_us: false,
        ports: vec![ServicePort::new("http", Protocol::Tcp, 80, TargetPort::Number(8080), None)],
        has_selector: true,
        affinity_seconds: None,
        internal_policy: TrafficPolicy::Cluster,
        external_policy: TrafficPolicy::Cluster,
        algorithm: Default::default(),
        source_ranges: None,
        misunderstood: Vec::new(),
        publish_not_ready: false,
        health_check_port: None,
    }
}

const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
const UNREADY: Conditions = Conditions { ready: false, serving: false, terminating: false };
const DRAINING: Conditions = Conditions { ready: false, serving: true, terminating: true };
const DYING: Conditions = Conditions { ready: false, serving: false, terminating: true };

fn endpoint(address: &str, on: &str, conditions: Conditions) -> Endpoint {
    Endpoint {
        address: ip(address),
        conditions,
        hostname: None,
        node: Some(NodeName::new(on)),
        pod: None,
        hints: Default::default(),
    }
}

fn slice(name: &str, of: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: named(name),
        service: named(of),
        endpoints,
        ports: vec![EndpointPort { name: "http".to_owned(), protocol: Protocol::Tcp, port: 8080 }],
        headless: false,
    }
}

fn world(services: Vec<Service>, slices: Vec<EndpointSlice>) -> World {
    World {
        services: services.into_iter().map(|s| (s.name.clone(), s)).collect(),
        slices: slices.into_iter().map(|s| (s.name.clone(), s)).collect(),
        ..World::default()
    }
}

fn cluster_ip(address: &str) -> Frontend {
    Frontend { address: Some(ip(address)), family: family_of(ip(address)), port: 80, protocol: Protocol::Tcp }
}

fn node_port(port: u16, family: Family) -> Frontend {
    Frontend { address: None, family, port, protocol: Protocol::Tcp }
}

/// The addresses that a frontend leads to.
fn backends(planner: &Planner, frontend: Frontend) -> Option<Vec<String>> {
    let target: &FrontendTarget = planner.table().frontends.get(&frontend)?;
    Some(target.backends.iter().map(|id| planner.table().backends[id].address.to_string()).collect())
}

fn planned(world: &World) -> Planner {
    let mut planner = Planner::new(ServiceConfig::default());
    planner.plan(world, &node(), Changed::All, at(0));
    planner
}

fn world_of(service: Service) -> World {
    world(vec![service], vec![slice("a", "web", vec![endpoint("10.0.0.1", "n1", READY)])])
}
