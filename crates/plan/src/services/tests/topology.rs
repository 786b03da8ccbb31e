//! Hints, `Local` NodePorts at other nodes' addresses, health check ports, and Services for other proxies.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use towpath_model::desired::Frontend;
use towpath_model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, Hints, NamespacedName, Node, NodeName,
    NodePortAddresses, Protocol, Service, ServiceKind, ServicePort, TargetPort, TrafficPolicy, World,
};

use crate::Changed;
use crate::services::health::{self, HealthCheck};
use crate::services::{Planner, ServiceConfig};

const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
const DRAINING: Conditions = Conditions { ready: false, serving: true, terminating: true };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn web() -> NamespacedName {
    NamespacedName::new("default", "web")
}

fn service(kind: ServiceKind) -> Service {
    let node_port = (kind != ServiceKind::ClusterIp).then_some(30080);
    Service {
        kind,
        ports: vec![ServicePort::new("", Protocol::Tcp, 80, TargetPort::Number(8080), node_port)],
        ..super::service("web", &["10.96.0.1"])
    }
}

/// An endpoint on node `n{n}` at 10.0.0.{n}, with hints.
fn endpoint(n: u8, conditions: Conditions, zones: &[&str], nodes: &[&str]) -> Endpoint {
    Endpoint {
        address: IpAddr::from([10, 0, 0, n]),
        conditions,
        hostname: None,
        node: Some(NodeName::new(format!("n{n}"))),
        pod: None,
        hints: Some(Box::new(Hints {
            zones: zones.iter().map(|z| (*z).to_owned()).collect(),
            nodes: nodes.iter().map(|n| NodeName::new(*n)).collect(),
        })),
    }
}

/// Three nodes, n1 to n3 in zones z1 to z3, at 192.168.0.1 to 3.
fn world(service: Service, endpoints: Vec<Endpoint>) -> World {
    let node = |n: u8| Node {
        name: NodeName::new(format!("n{n}")),
        labels: BTreeMap::from([("topology.kubernetes.io/zone".to_owned(), format!("z{n}"))]),
        internal_ips: vec![IpAddr::from([192, 168, 0, n])],
        other_ips: Vec::new(),
        created: 0,
        added: Default::default(),
        flannel: None,
        pod_cidrs: Vec::new(),
        ready: true,
    };
    let slice = EndpointSlice {
        name: NamespacedName::new("default", "web-1"),
        service: web(),
        endpoints,
        ports: vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 8080 }],
        headless: false,
    };
    World {
        nodes: (1..=3).map(node).map(|n| (n.name.clone(), n)).collect(),
        services: BTreeMap::from([(web(), service)]),
        slices: [(slice.name.clone(), slice)].into(),
        ..World::default()
    }
}

/// Last bytes of the backends that clients of node n1 get.
fn backends(world: &World, address: Option<&str>, port: u16) -> Option<Vec<u8>> {
    let mut planner = Planner::new(ServiceConfig::default());
    planner.plan(world, &NodeName::new("n1"), Changed::All, Duration::ZERO);
    let frontend = Frontend { address: address.map(ip), family: Family::V4, port, protocol: Protocol::Tcp };
    let target = planner.table().frontends.get(&frontend)?;
    let last = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets()[3],
        IpAddr::V6(v6) => v6.octets()[15],
    };
    Some(target.backends.iter().map(|id| last(planner.table().backends[id].address)).collect())
}

fn cluster_ip(endpoints: Vec<Endpoint>) -> Vec<u8> {
    backends(&world(service(ServiceKind::ClusterIp), endpoints), Some("10.96.0.1"), 80).unwrap()
}

#[test]
fn hints_choose_for_the_node_before_its_zone() {
    let all = |conditions| {
        vec![
            endpoint(1, conditions, &["z1"], &["n1"]),
            endpoint(2, READY, &["z1"], &["n2"]),
            endpoint(3, READY, &["z3"], &["n3"]),
        ]
    };
    assert_eq!(cluster_ip(all(READY)), [1]);
    assert_eq!(cluster_ip(all(DRAINING)), [2], "none for this node is ready: its zone");
}

#[test]
fn zone_hints_choose_only_when_every_ready_endpoint_has_one_and_one_is_ours() {
    let two = |first: &[&str], second: &[&str]| {
        cluster_ip(vec![endpoint(1, READY, first, &[]), endpoint(2, READY, second, &[])])
    };
    assert_eq!(two(&["z1"], &["z2"]), [1]);
    assert_eq!(two(&["z2"], &["z1", "z3"]), [2]);
    assert_eq!(two(&["z1"], &[]), [1, 2], "an endpoint without hints: the controller is not done");
    assert_eq!(two(&["z2"], &["z3"]), [1, 2], "nothing for this zone");
}

#[test]
fn hints_of_endpoints_that_are_not_ready_do_not_count() {
    let endpoints =
        vec![endpoint(1, DRAINING, &[], &[]), endpoint(2, READY, &["z1"], &[]), endpoint(3, READY, &["z3"], &[])];
    assert_eq!(cluster_ip(endpoints), [2]);
}

#[test]
fn without_a_zone_of_its_own_a_node_uses_all() {
    let endpoints = vec![endpoint(1, READY, &["z1"], &[]), endpoint(2, READY, &["z2"], &[])];
    let mut world = world(service(ServiceKind::ClusterIp), endpoints);
    world.nodes.get_mut(&NodeName::new("n1")).unwrap().labels.clear();
    assert_eq!(backends(&world, Some("10.96.0.1"), 80).unwrap(), [1, 2]);
}

#[test]
fn a_local_node_port_at_another_nodes_address_leads_to_that_nodes_endpoints() {
    let mut local = service(ServiceKind::NodePort);
    local.external_policy = TrafficPolicy::Local;
    let world = world(local, vec![endpoint(2, READY, &[], &[]), endpoint(3, DRAINING, &[], &[])]);
    assert_eq!(backends(&world, Some("192.168.0.2"), 30080).unwrap(), [2]);
    assert_eq!(backends(&world, Some("192.168.0.3"), 30080).unwrap(), [3], "it drains, and is that node's only one");
    assert_eq!(backends(&world, None, 30080).unwrap(), [] as [u8; 0], "outside clients of this node: it has none");
    assert_eq!(backends(&world, Some("10.96.0.1"), 80).unwrap(), [2]);
    let cluster = self::world(service(ServiceKind::NodePort), vec![endpoint(2, READY, &[], &[])]);
    assert_eq!(backends(&cluster, Some("192.168.0.2"), 30080), None, "one entry serves all nodes");
}

#[test]
fn another_nodes_address_that_is_not_chosen_has_no_local_node_ports() {
    let mut local = service(ServiceKind::NodePort);
    local.external_policy = TrafficPolicy::Local;
    let world = world(local, vec![endpoint(2, READY, &[], &[]), endpoint(3, READY, &[], &[])]);
    let chosen = NodePortAddresses::parse(&["192.168.0.2/31".to_owned()]).unwrap();
    let mut planner = Planner::new(ServiceConfig { node_port_addresses: chosen, ..ServiceConfig::default() });
    planner.plan(&world, &NodeName::new("n1"), Changed::All, Duration::ZERO);
    let at = |address: &str| Frontend {
        address: Some(ip(address)),
        family: Family::V4,
        port: 30080,
        protocol: Protocol::Tcp,
    };
    let has = |address: &str| planner.table().frontends.contains_key(&at(address));
    assert!(has("192.168.0.2") && has("192.168.0.3"));
    let mut planner =
        Planner::new(ServiceConfig { node_port_addresses: NodePortAddresses::In(Vec::new()), ..Default::default() });
    planner.plan(&world, &NodeName::new("n1"), Changed::All, Duration::ZERO);
    assert!(!planner.table().frontends.contains_key(&at("192.168.0.2")));
}

#[test]
fn clients_of_this_node_get_all_endpoints_of_a_local_node_port() {
    let mut local = service(ServiceKind::NodePort);
    local.external_policy = TrafficPolicy::Local;
    let mut planner = Planner::new(ServiceConfig::default());
    let n1 = NodeName::new("n1");
    let world = world(local, vec![endpoint(2, READY, &[], &[]), endpoint(3, READY, &[], &[])]);
    planner.plan(&world, &n1, Changed::All, Duration::ZERO);
    let any = Frontend { address: None, family: Family::V4, port: 30080, protocol: Protocol::Tcp };
    let inside = &planner.table().inside[&any];
    assert_eq!(inside.backends.len(), 2);
    assert!(inside.backends.iter().all(|id| planner.table().backends.contains_key(id)));
    assert_ne!(inside.id, planner.table().frontends[&any].id, "affinity of outside clients is another matter");

    // The same at an address for everybody: a pod is not turned away where a client from outside would not come.
    let mut balanced = service(ServiceKind::LoadBalancer);
    (balanced.external_policy, balanced.load_balancer_ips) = (TrafficPolicy::Local, vec![ip("203.0.113.7")]);
    balanced.source_ranges = Some(vec!["10.0.0.0/8".parse().unwrap()]);
    let world = self::world(balanced, vec![endpoint(2, READY, &[], &[]), endpoint(3, READY, &[], &[])]);
    planner.plan(&world, &n1, Changed::All, Duration::ZERO);
    let table = planner.table();
    let at = Frontend { address: Some(ip("203.0.113.7")), port: 80, ..any };
    assert_eq!((table.inside[&at].backends.len(), table.frontends[&at].backends.len()), (2, 0));
    assert!(table.inside[&at].sources.is_some(), "whom it is not for, it is not for from here either");
    assert!(table.inside[&any].sources.is_none());
    planner.plan(&World::default(), &n1, Changed::All, Duration::ZERO);
    assert!(planner.table().inside.is_empty());
}

#[test]
fn slices_for_dns_only_are_not_for_proxies() {
    let mut world = world(service(ServiceKind::ClusterIp), vec![endpoint(1, READY, &[], &[])]);
    let headless =
        world.slices.iter().map(|(name, slice)| (name.clone(), EndpointSlice { headless: true, ..slice.clone() }));
    world.slices = headless.collect();
    assert_eq!(backends(&world, Some("10.96.0.1"), 80).unwrap(), [] as [u8; 0]);
}

#[test]
fn services_for_other_proxies_have_no_entries() {
    for label in ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"] {
        let mut labelled = service(ServiceKind::NodePort);
        labelled.labels.insert(label.to_owned(), String::new());
        let world = world(labelled, vec![endpoint(1, READY, &[], &[])]);
        assert_eq!(backends(&world, Some("10.96.0.1"), 80), None, "{label}");
        assert_eq!(backends(&world, None, 30080), None, "{label}");
    }
}

#[test]
fn a_health_check_counts_the_ready_endpoints_of_this_node() {
    let mut balanced = service(ServiceKind::LoadBalancer);
    balanced.external_policy = TrafficPolicy::Local;
    balanced.health_check_port = Some(31000);
    let world = world(balanced, vec![endpoint(1, READY, &[], &[]), endpoint(2, DRAINING, &[], &[])]);
    let count = |node: &str| {
        health::plan(&world, &NodeName::new(node), &world.services.keys().cloned().collect())[&31000].clone()
    };
    assert_eq!(count("n1"), HealthCheck { service: web(), local_endpoints: 1 });
    assert_eq!(count("n2").local_endpoints, 0, "it only drains: nothing new is to come here");
    assert_eq!(count("n3").local_endpoints, 0);
}
