use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use towpath_model::desired::Frontend;
use towpath_model::{
    HostPort, NamespacedName, Node, NodeName, Phase, Pod, Protocol, Service, ServiceKind, ServicePort, TargetPort,
    World,
};

use crate::services::{OwnPods, Planner, ServiceConfig};
use crate::{Changed, ChangedPods};

const START: Duration = Duration::ZERO;

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn named(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

fn port(address: Option<&str>, port: u16, protocol: Protocol) -> HostPort {
    HostPort { address: address.map(ip), port, protocol, container_port: 8080 }
}

fn pod(name: &str, on: &str, ips: &[&str], host_ports: Vec<HostPort>) -> Pod {
    Pod {
        name: named(name),
        uid: format!("uid-{name}").as_str().into(),
        labels: Default::default(),
        daemon_set: None,
        node: Some(NodeName::new(on)),
        ips: ips.iter().map(|t| ip(t)).collect(),
        named_ports: Default::default(),
        host_ports: host_ports.into(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: false,
        socket_services: Default::default(),
        chosen: None,
        bandwidth: None,
    }
}

fn node(name: &str, ips: &[&str]) -> Node {
    Node {
        name: NodeName::new(name),
        labels: Default::default(),
        internal_ips: ips.iter().map(|t| ip(t)).collect(),
        other_ips: Vec::new(),
        created: 0,
        added: Default::default(),
        flannel: None,
        pod_cidrs: ["10.244.0.0/16", "fd00:1::/64"].map(|range| range.parse().unwrap()).to_vec(),
        ready: true,
    }
}

fn world(pods: Vec<Pod>) -> World {
    let nodes = [node("n1", &["192.168.0.1", "fd00:9::1"]), node("n2", &["192.168.0.2"])];
    World {
        nodes: nodes.into_iter().map(|n| (n.name.clone(), n)).collect(),
        pods: pods.into_iter().map(|p| (p.name.clone(), p)).collect(),
        ..World::default()
    }
}

fn node_port_service(number: u16) -> Service {
    Service {
        kind: ServiceKind::NodePort,
        ports: vec![ServicePort::new("", Protocol::Tcp, 80, TargetPort::Number(80), Some(number))],
        ..super::service("web", &["10.96.0.1"])
    }
}

/// The table of node `on`, as `address:port/protocol -> backend:port`.
fn table(planner: &Planner) -> Vec<String> {
    let table = planner.table();
    let line = |(front, id): (&Frontend, _)| {
        let address = front.address.map_or_else(|| "any".to_owned(), |a| a.to_string());
        let back = table.backends[id];
        format!("{address} {}/{} -> {} {}", front.port, front.protocol, back.address, back.port)
    };
    table.frontends.iter().flat_map(|(f, t)| t.backends.iter().map(move |b| (f, b))).map(line).collect()
}

fn planned(world: &World, on: &str) -> Planner {
    let mut planner = Planner::new(ServiceConfig::default());
    planner.plan_host_ports(world, ChangedPods::All, &NodeName::new(on), &OwnPods::new(), START);
    planner.plan(world, &NodeName::new(on), Changed::All, START);
    planner
}

#[test]
fn a_host_port_is_on_every_address_of_its_node_and_on_loopback_there_only() {
    let web = pod("web", "n1", &["10.244.0.5", "fd00:1::5"], vec![port(None, 80, Protocol::Tcp)]);
    let world = world(vec![web]);
    assert_eq!(
        table(&planned(&world, "n1")),
        [
            "127.0.0.1 80/TCP -> 10.244.0.5 8080",
            "192.168.0.1 80/TCP -> 10.244.0.5 8080",
            "::1 80/TCP -> fd00:1::5 8080",
            "fd00:9::1 80/TCP -> fd00:1::5 8080",
        ]
    );
    assert_eq!(
        table(&planned(&world, "n2")),
        ["192.168.0.1 80/TCP -> 10.244.0.5 8080", "fd00:9::1 80/TCP -> fd00:1::5 8080"],
        "pods of other nodes reach it at its node's addresses, never at their own node's loopback"
    );
}

#[test]
fn no_pod_takes_what_the_node_and_the_cluster_live_by() {
    use towpath_model::{Conditions, Endpoint, EndpointPort, EndpointSlice};
    let numbers = [6443, 10250, 10248, 10249, 10256, 9116];
    let greedy = numbers.iter().map(|number| port(None, *number, Protocol::Tcp)).collect();
    let mut world = world(vec![pod("greedy", "n1", &["10.244.0.5"], greedy)]);
    let api = Endpoint {
        address: ip("192.168.0.1"),
        conditions: Conditions { ready: true, serving: true, terminating: false },
        hostname: None,
        node: None,
        pod: None,
        hints: Default::default(),
    };
    let slice = EndpointSlice {
        name: NamespacedName::new("default", "kubernetes"),
        service: crate::services::api_server(),
        endpoints: vec![api],
        ports: vec![EndpointPort { name: "https".to_owned(), protocol: Protocol::Tcp, port: 6443 }],
        headless: false,
    };
    world.slices.insert(slice.name.clone(), slice);
    for on in ["n1", "n2"] {
        let planner = planned(&world, on);
        let taken: Vec<String> =
            table(&planner).into_iter().filter(|line| !line.starts_with("127.0.0.1 6443/")).collect();
        assert_eq!(taken, Vec::<String>::new(), "on {on}");
        assert!(planner.refusals().iter().any(|r| r.reason.contains("hostPort 6443")), "{:?}", planner.refusals());
    }
    // Where no API server is, its number is one like any other; and so are these in another protocol.
    let free = vec![port(Some("192.168.0.2"), 6443, Protocol::Tcp), port(Some("192.168.0.2"), 10250, Protocol::Udp)];
    world.pods.extend([pod("modest", "n2", &["10.244.1.5"], free)].map(|p| (p.name.clone(), p)));
    let expected = ["192.168.0.2 6443/TCP -> 10.244.1.5 8080", "192.168.0.2 10250/UDP -> 10.244.1.5 8080"];
    assert_eq!(table(&planned(&world, "n2")), expected);
}

#[test]
fn no_pod_takes_what_another_node_has_or_leads_out_of_its_own_ranges() {
    let mut world = world(vec![
        pod("liar", "n2", &["10.244.1.5"], vec![port(Some("192.168.0.1"), 8088, Protocol::Tcp)]),
        pod("elsewhere", "n2", &["203.0.113.7"], vec![port(None, 8089, Protocol::Tcp)]),
        pod("checked", "n2", &["10.244.1.6"], vec![port(None, 32100, Protocol::Tcp)]),
    ]);
    world.nodes.get_mut(&NodeName::new("n2")).unwrap().internal_ips.push(ip("192.168.0.1"));
    let mut service = node_port_service(30080);
    service.health_check_port = Some(32100);
    world.services.insert(service.name.clone(), service);
    let planner = planned(&world, "n1");
    assert_eq!(table(&planner), Vec::<String>::new());
    for why in ["192.168.0.1 is an address of another node", "203.0.113.7 is not in the pod ranges", "health checks"] {
        assert!(planner.refusals().iter().any(|r| r.reason.contains(why)), "{why}: {:?}", planner.refusals());
    }
}

#[test]
fn one_number_serves_several_pods_that_differ_in_address_or_protocol() {
    let world = world(vec![
        pod("a", "n1", &["10.244.0.1"], vec![port(Some("127.0.0.1"), 54323, Protocol::Tcp)]),
        pod("b", "n1", &["10.244.0.2"], vec![port(Some("192.168.0.1"), 54323, Protocol::Tcp)]),
        pod("c", "n1", &["10.244.0.3"], vec![port(Some("192.168.0.1"), 54323, Protocol::Udp)]),
    ]);
    let planner = planned(&world, "n1");
    assert_eq!(
        table(&planner),
        [
            "127.0.0.1 54323/TCP -> 10.244.0.1 8080",
            "192.168.0.1 54323/TCP -> 10.244.0.2 8080",
            "192.168.0.1 54323/UDP -> 10.244.0.3 8080",
        ]
    );
    assert!(planner.refusals().is_empty());
}

#[test]
fn the_unspecified_address_is_every_address_of_its_family() {
    let world = world(vec![pod("a", "n1", &["10.244.0.1", "fd00:1::1"], vec![port(Some("::"), 53, Protocol::Udp)])]);
    assert_eq!(table(&planned(&world, "n1")), ["::1 53/UDP -> fd00:1::1 8080", "fd00:9::1 53/UDP -> fd00:1::1 8080"]);
}

#[test]
fn an_address_that_is_not_the_nodes_is_refused() {
    for foreign in ["8.8.8.8", "192.168.0.2", "10.96.0.1"] {
        let planner =
            planned(&world(vec![pod("a", "n1", &["10.244.0.1"], vec![port(Some(foreign), 53, Protocol::Udp)])]), "n1");
        assert!(table(&planner).is_empty(), "a pod must not take over {foreign}");
        let refusal = &planner.refusals()[0];
        assert_eq!(refusal.object(), "Pod default/a");
        assert!(refusal.reason.contains(foreign) && refusal.reason.contains("node n1"), "{refusal:?}");
    }
}

#[test]
fn of_two_pods_the_one_that_has_it_keeps_it_until_it_is_gone() {
    let first = pod("z", "n1", &["10.244.0.1"], vec![port(Some("192.168.0.1"), 80, Protocol::Tcp)]);
    let second = pod("a", "n1", &["10.244.0.2"], vec![port(Some("192.168.0.1"), 80, Protocol::Tcp)]);
    let mut planner = planned(&world(vec![first.clone()]), "n1");
    let n1 = NodeName::new("n1");
    planner.plan_host_ports(
        &world(vec![first, second.clone()]),
        ChangedPods::These(&[named("a")].into()),
        &n1,
        &OwnPods::new(),
        START,
    );
    assert_eq!(table(&planner), ["192.168.0.1 80/TCP -> 10.244.0.1 8080"]);
    let refusal = &planner.refusals()[0];
    assert_eq!(refusal.object(), "Pod default/a");
    assert!(refusal.reason.contains("already belongs to Pod default/z"), "{refusal:?}");
    planner.plan_host_ports(
        &world(vec![second]),
        ChangedPods::These(&[named("z")].into()),
        &n1,
        &OwnPods::new(),
        START,
    );
    assert_eq!(table(&planner), ["192.168.0.1 80/TCP -> 10.244.0.2 8080"]);
    assert!(planner.refusals().is_empty());
}

#[test]
fn a_host_port_makes_room_for_a_node_port_and_comes_back_after_it() {
    let mut world = world(vec![pod("a", "n1", &["10.244.0.1"], vec![port(None, 30080, Protocol::Tcp)])]);
    let mut planner = planned(&world, "n2");
    let n2 = NodeName::new("n2");
    assert_eq!(table(&planner), ["192.168.0.1 30080/TCP -> 10.244.0.1 8080"]);
    world.services.insert(named("web"), node_port_service(30080));
    planner.plan(&world, &n2, Changed::All, START);
    assert!(table(&planner).is_empty(), "the Service has no endpoints, and the pod must not get its clients");
    let refusal = planner.refusals().into_iter().find(|r| r.object() == "Pod default/a").unwrap();
    assert!(refusal.reason.contains("already belongs to Service default/web"), "{refusal:?}");
    world.services.clear();
    planner.plan(&world, &n2, Changed::All, START);
    assert_eq!(table(&planner), ["192.168.0.1 30080/TCP -> 10.244.0.1 8080"]);
}

#[test]
fn a_lease_is_known_before_the_api_has_the_address_and_two_of_one_name_are_not_guessed_between() {
    let mut world = world(vec![pod("a", "n1", &[], vec![port(Some("192.168.0.1"), 80, Protocol::Tcp)])]);
    let n1 = NodeName::new("n1");
    let mut planner = planned(&world, "n1");
    assert!(table(&planner).is_empty());
    let none = BTreeSet::new();
    let leased =
        |addresses: &[&str]| BTreeMap::from([(named("a"), addresses.iter().map(|t| ip(t)).collect::<Vec<_>>())]);
    assert!(planner.plan_host_ports(&world, ChangedPods::These(&none), &n1, &leased(&["10.244.0.7"]), START));
    assert_eq!(table(&planner), ["192.168.0.1 80/TCP -> 10.244.0.7 8080"]);
    assert!(
        !planner.plan_host_ports(&world, ChangedPods::These(&none), &n1, &leased(&["10.244.0.7"]), START),
        "nothing new, nothing written"
    );
    planner.plan_host_ports(&world, ChangedPods::These(&none), &n1, &leased(&["10.244.0.7", "10.244.0.8"]), START);
    assert!(table(&planner).is_empty(), "two sandboxes have the pod's name");
    world.pods.get_mut(&named("a")).unwrap().ips = vec![ip("10.244.0.8")].into();
    planner.plan_host_ports(
        &world,
        ChangedPods::These(&[named("a")].into()),
        &n1,
        &leased(&["10.244.0.7", "10.244.0.8"]),
        START,
    );
    assert_eq!(table(&planner), ["192.168.0.1 80/TCP -> 10.244.0.8 8080"]);
}

#[test]
fn a_pod_that_ended_answers_no_more() {
    let mut world = world(vec![pod("a", "n1", &["10.244.0.1"], vec![port(None, 80, Protocol::Udp)])]);
    let n1 = NodeName::new("n1");
    let mut planner = planned(&world, "n1");
    assert_eq!(table(&planner).len(), 2);
    world.pods.get_mut(&named("a")).unwrap().phase = Phase::Terminated;
    assert!(planner.plan_host_ports(&world, ChangedPods::These(&[named("a")].into()), &n1, &OwnPods::new(), START));
    assert!(table(&planner).is_empty());
    assert!(planner.table().backends.is_empty(), "a UDP backend does not linger");
}

#[test]
fn a_restarted_planner_gives_a_host_port_the_id_it_has_in_the_kernel() {
    let world = world(vec![pod("a", "n1", &["10.244.0.1"], vec![port(Some("127.0.0.1"), 80, Protocol::Tcp)])]);
    let before = planned(&world, "n1");
    let (frontend, target) = before.table().frontends.iter().next().unwrap();
    let mut after = Planner::new(ServiceConfig::default());
    let other = towpath_model::desired::ServiceId(target.id.0 + 40);
    after.adopt(before.table().backends.iter().map(|(i, b)| (*i, *b)), [(*frontend, other)], [], START);
    after.plan_host_ports(&world, ChangedPods::All, &NodeName::new("n1"), &OwnPods::new(), START);
    after.plan(&world, &NodeName::new("n1"), Changed::All, START);
    assert_eq!(after.table().frontends[frontend].id, other);
    assert_eq!(after.table().frontends[frontend].backends, target.backends);
}
