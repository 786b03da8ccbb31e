use std::collections::BTreeSet;
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

#[test]
fn slices_are_merged_and_endpoints_in_two_of_them_counted_once() {
    let first = slice("a", "web", vec![endpoint("10.0.0.1", "n1", READY), endpoint("10.0.0.2", "n2", UNREADY)]);
    let second = slice("b", "web", vec![endpoint("10.0.0.2", "n2", READY), endpoint("10.0.0.3", "n2", READY)]);
    let other = slice("c", "else", vec![endpoint("10.0.0.9", "n2", READY)]);
    let planner = planned(&world(vec![service("web", &["10.96.0.1"])], vec![first, second, other]));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1", "10.0.0.2", "10.0.0.3"]);
}

#[test]
fn a_service_without_endpoints_has_a_frontend_that_refuses() {
    let planner = planned(&world(vec![service("web", &["10.96.0.1"])], vec![]));
    assert!(backends(&planner, cluster_ip("10.96.0.1")).unwrap().is_empty());
}

#[test]
fn terminating_endpoints_serve_only_when_no_ready_one_is_left() {
    let mixed = |first| {
        let endpoints = vec![
            endpoint("10.0.0.1", "n1", first),
            endpoint("10.0.0.2", "n1", DRAINING),
            endpoint("10.0.0.3", "n1", DYING),
        ];
        planned(&world(vec![service("web", &["10.96.0.1"])], vec![slice("a", "web", endpoints)]))
    };
    assert_eq!(backends(&mixed(READY), cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1"]);
    assert_eq!(backends(&mixed(UNREADY), cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.2"]);
}

#[test]
fn local_policies_use_this_nodes_endpoints_with_the_same_fallback() {
    let mut web = service("web", &["10.96.0.1"]);
    web.kind = ServiceKind::NodePort;
    web.external_policy = TrafficPolicy::Local;
    web.ports[0].node_port = Some(30080);
    let local = |conditions| {
        let endpoints = vec![endpoint("10.0.0.1", "n1", conditions), endpoint("10.0.0.2", "n2", READY)];
        planned(&world(vec![web.clone()], vec![slice("a", "web", endpoints)]))
    };
    let planner = local(READY);
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1", "10.0.0.2"]);
    assert_eq!(backends(&planner, node_port(30080, Family::V4)).unwrap(), ["10.0.0.1"]);
    let ids: BTreeSet<ServiceId> = planner.table().frontends.values().map(|t| t.id).collect();
    assert_eq!(ids.len(), 2, "affinity of outside clients must not lead them to inside backends");
    assert_eq!(backends(&local(DRAINING), node_port(30080, Family::V4)).unwrap(), ["10.0.0.1"]);
    assert!(backends(&local(UNREADY), node_port(30080, Family::V4)).unwrap().is_empty());
}

#[test]
fn publish_not_ready_addresses_takes_all() {
    let mut web = service("web", &["10.96.0.1"]);
    web.publish_not_ready = true;
    let planner = planned(&world(vec![web], vec![slice("a", "web", vec![endpoint("10.0.0.1", "n1", UNREADY)])]));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1"]);
}

#[test]
fn each_family_leads_to_backends_of_its_own() {
    let mut web = service("web", &["10.96.0.1", "fd00:96::1"]);
    web.kind = ServiceKind::NodePort;
    web.ports[0].node_port = Some(30080);
    let slices = vec![
        slice("four", "web", vec![endpoint("10.0.0.1", "n1", READY)]),
        slice("six", "web", vec![endpoint("fd00::1", "n1", READY)]),
    ];
    let planner = planned(&world(vec![web], slices));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1"]);
    assert_eq!(backends(&planner, cluster_ip("fd00:96::1")).unwrap(), ["fd00::1"]);
    assert_eq!(backends(&planner, node_port(30080, Family::V4)).unwrap(), ["10.0.0.1"]);
    assert_eq!(backends(&planner, node_port(30080, Family::V6)).unwrap(), ["fd00::1"]);
}

#[test]
fn ports_are_matched_by_name_and_protocol() {
    let mut web = service("web", &["10.96.0.1"]);
    web.ports.push(ServicePort::new("dns", Protocol::Udp, 80, TargetPort::Name("dns".to_owned()), None));
    let mut endpoints = slice("a", "web", vec![endpoint("10.0.0.1", "n1", READY)]);
    endpoints.ports.push(EndpointPort { name: "dns".to_owned(), protocol: Protocol::Udp, port: 5353 });
    endpoints.ports.push(EndpointPort { name: "http".to_owned(), protocol: Protocol::Udp, port: 1 });
    let planner = planned(&world(vec![web], vec![endpoints]));
    let udp = Frontend { protocol: Protocol::Udp, ..cluster_ip("10.96.0.1") };
    let target = &planner.table().frontends[&udp];
    let all: Vec<BackendAddress> = target.backends.iter().map(|id| planner.table().backends[id]).collect();
    assert_eq!(all, [BackendAddress { address: ip("10.0.0.1"), port: 5353, protocol: Protocol::Udp }]);
}

#[test]
fn headless_and_external_name_services_have_no_frontends() {
    let mut headless = service("headless", &[]);
    headless.kind = ServiceKind::Headless;
    let mut alias = service("alias", &[]);
    alias.kind = ServiceKind::ExternalName("example.com".to_owned());
    let slices = vec![slice("a", "headless", vec![endpoint("10.0.0.1", "n1", READY)])];
    assert!(planned(&world(vec![headless, alias], slices)).table().frontends.is_empty());
}

#[test]
fn external_ips_are_not_taken_and_node_ports_only_in_their_range() {
    let mut web = service("web", &["10.96.0.1"]);
    web.kind = ServiceKind::NodePort;
    web.external_ips = vec![ip("8.8.8.8")];
    web.ports[0].node_port = Some(22);
    let planner = planned(&world(vec![web], vec![]));
    assert_eq!(planner.table().frontends.len(), 1);
    let reasons: Vec<String> = planner.refusals().into_iter().map(|refusal| refusal.reason).collect();
    assert!(reasons.iter().any(|reason| reason.contains("nodePort 22 is outside 30000-32767")), "{reasons:?}");
}

#[test]
fn endpoints_that_only_the_node_may_reach_are_refused() {
    let config = ServiceConfig {
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        dns_addresses: vec![ip("10.200.0.10")],
        ..ServiceConfig::default()
    };
    let bad = ["127.0.0.1", "169.254.169.254", "10.96.7.7", "10.200.0.10", "224.0.0.1", "0.0.0.0"];
    let mut endpoints: Vec<Endpoint> = bad.iter().map(|a| endpoint(a, "n1", READY)).collect();
    endpoints.push(endpoint("10.0.0.1", "n1", READY));
    let mut planner = Planner::new(config);
    planner.plan(
        &world(vec![service("web", &["10.96.0.1"])], vec![slice("a", "web", endpoints)]),
        &node(),
        Changed::All,
        at(0),
    );
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1"]);
    assert_eq!(planner.refusals().len(), bad.len(), "{:?}", planner.refusals());
}

#[test]
fn load_balancer_addresses_do_not_take_over_what_others_answer_on() {
    let mut lb = service("lb", &["10.96.0.2"]);
    lb.kind = ServiceKind::LoadBalancer;
    lb.load_balancer_ips = vec![ip("10.96.0.1"), ip("192.168.0.1"), ip("203.0.113.7"), ip("127.0.0.1")];
    let mut world = world(vec![lb, service("web", &["10.96.0.1"])], vec![]);
    world.nodes.insert(
        node(),
        towpath_model::Node {
            name: node(),
            labels: Default::default(),
            internal_ips: vec![ip("192.168.0.1")],
            flannel: None,
            pod_cidrs: vec![],
            ready: true,
        },
    );
    let planner = planned(&world);
    assert_eq!(planner.table().frontends[&cluster_ip("10.96.0.1")].service, named("web"));
    assert_eq!(planner.table().frontends[&cluster_ip("203.0.113.7")].service, named("lb"));
    assert!(!planner.table().frontends.contains_key(&cluster_ip("192.168.0.1")));
    let reasons: Vec<String> = planner.refusals().into_iter().map(|r| r.reason).collect();
    assert_eq!(reasons.len(), 3, "{reasons:?}");
    assert!(reasons.iter().any(|r| r.contains("already belongs to Service default/web")), "{reasons:?}");
}

#[test]
fn who_has_a_frontend_keeps_it_and_its_end_lets_the_next_in() {
    let lb = |name: &str| {
        let mut lb = service(name, &[]);
        lb.kind = ServiceKind::LoadBalancer;
        lb.load_balancer_ips = vec![ip("203.0.113.7")];
        lb
    };
    let mut planner = planned(&world(vec![lb("second")], vec![]));
    let both = world(vec![lb("first"), lb("second")], vec![]);
    planner.plan(&both, &node(), Changed::Services(&BTreeSet::from([named("first")])), at(1));
    assert_eq!(planner.table().frontends[&cluster_ip("203.0.113.7")].service, named("second"));
    let one = world(vec![lb("first")], vec![]);
    planner.plan(&one, &node(), Changed::Services(&BTreeSet::from([named("second")])), at(2));
    assert_eq!(planner.table().frontends[&cluster_ip("203.0.113.7")].service, named("first"));
}

#[test]
fn cluster_dns_leads_to_this_nodes_server_with_and_without_the_service() {
    let config = ServiceConfig {
        cluster_dns: vec![ip("10.96.0.10")],
        dns_addresses: vec![ip("fd00:7470::a"), ip("169.254.116.10")],
        ..ServiceConfig::default()
    };
    let mut dns = service("kube-dns", &["10.96.0.10"]);
    dns.name = NamespacedName::new("kube-system", "kube-dns");
    dns.ports = vec![
        ServicePort::new("dns", Protocol::Udp, 53, TargetPort::Number(53), None),
        ServicePort::new("metrics", Protocol::Tcp, 9153, TargetPort::Number(9153), None),
    ];
    for world in [World::default(), world(vec![dns], vec![])] {
        let mut planner = Planner::new(config.clone());
        planner.plan(&world, &node(), Changed::All, at(0));
        planner.plan(&world, &node(), Changed::All, at(500));
        for protocol in [Protocol::Udp, Protocol::Tcp] {
            let front = Frontend { address: Some(ip("10.96.0.10")), family: Family::V4, port: 53, protocol };
            let target = &planner.table().frontends[&front];
            assert_eq!(target.service, NamespacedName::new("kube-system", "kube-dns"));
            let all: Vec<BackendAddress> = target.backends.iter().map(|id| planner.table().backends[id]).collect();
            assert_eq!(all, [BackendAddress { address: ip("169.254.116.10"), port: 53, protocol }]);
        }
    }
}

#[test]
fn cluster_dns_changes_hands_and_is_never_without_an_answer() {
    let config = ServiceConfig { dns_addresses: vec![ip("169.254.116.10")], ..ServiceConfig::default() };
    let mut dns = service("kube-dns", &["10.96.0.10"]);
    dns.name = NamespacedName::new("kube-system", "kube-dns");
    dns.ports = vec![ServicePort::new("dns", Protocol::Udp, 53, TargetPort::Number(53), None)];
    let mut behind = slice("kube-dns-x", "kube-dns", vec![endpoint("10.0.0.5", "n1", READY)]);
    behind.name = NamespacedName::new("kube-system", "kube-dns-x");
    behind.service = dns.name.clone();
    behind.ports = vec![EndpointPort { name: "dns".to_owned(), protocol: Protocol::Udp, port: 53 }];
    let (world, address) = (world(vec![dns], vec![behind]), [ip("10.96.0.10")]);
    let front = Frontend { address: Some(ip("10.96.0.10")), family: Family::V4, port: 53, protocol: Protocol::Udp };
    let mut planner = Planner::new(config);
    planner.plan(&world, &node(), Changed::All, at(0));
    let theirs = planner.table().clone();
    assert_eq!(backends(&planner, front).unwrap(), ["10.0.0.5"]);
    assert!(planner.answer_dns_at(&address, at(1)) && !planner.answer_dns_at(&address, at(1)));
    planner.plan(&world, &node(), Changed::All, at(1));
    assert_eq!(backends(&planner, front).unwrap(), ["169.254.116.10"]);
    let still = planner.table().backends.values().any(|backend| backend.address == ip("10.0.0.5"));
    assert!(still, "sockets that were led to CoreDNS go on talking to it");
    assert!(planner.answer_dns_at(&[], at(2)));
    assert_eq!(backends(&planner, front).unwrap(), ["10.0.0.5"], "at once, before anything is planned again");
    planner.plan(&world, &node(), Changed::All, at(200));
    assert_eq!(*planner.table(), theirs, "nothing of ours is left");
}

#[test]
fn another_proxy_takes_all_clients_but_pods_of_services_and_none_of_cluster_dns() {
    let config = ServiceConfig { dns_addresses: vec![ip("169.254.116.10")], ..ServiceConfig::default() };
    let mut web = service("web", &["10.96.0.1"]);
    web.kind = ServiceKind::NodePort;
    web.ports[0].node_port = Some(30080);
    let world = world(vec![web], vec![slice("a", "web", vec![endpoint("10.0.0.1", "n1", READY)])]);
    let mut planner = Planner::new(config);
    planner.answer_dns_at(&[ip("10.96.0.10")], at(0));
    planner.plan(&world, &node(), Changed::All, at(0));
    let ids = |planner: &Planner| -> Vec<_> { planner.table().frontends.values().map(|t| t.id).collect() };
    let before = ids(&planner);
    assert!(planner.table().frontends.values().all(|target| target.clients == Clients::All));
    assert!(planner.serve(Clients::Pods) && !planner.serve(Clients::Pods));
    planner.plan(&world, &node(), Changed::All, at(1));
    for (frontend, target) in &planner.table().frontends {
        let expected = if frontend.port == 53 { Clients::All } else { Clients::Pods };
        assert_eq!(target.clients, expected, "{frontend:?}");
    }
    assert_eq!(ids(&planner), before, "affinity and open connections refer to them");
}

#[test]
fn a_tcp_backend_that_vanishes_drains_and_keeps_its_id_from_others() {
    let with = |addresses: &[&str]| {
        let endpoints = addresses.iter().map(|a| endpoint(a, "n1", READY)).collect();
        world(vec![service("web", &["10.96.0.1"])], vec![slice("a", "web", endpoints)])
    };
    let web = BTreeSet::from([named("web")]);
    let mut planner = planned(&with(&["10.0.0.1"]));
    let first = *planner.table().backends.keys().next().unwrap();
    planner.plan(&with(&["10.0.0.2"]), &node(), Changed::Services(&web), at(10));
    assert!(planner.table().backends.contains_key(&first), "open connections still refer to it");
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.2"]);
    assert_eq!(planner.next_deadline(), Some(at(70)));
    planner.plan(&with(&["10.0.0.2"]), &node(), Changed::Services(&BTreeSet::new()), at(70));
    assert!(!planner.table().backends.contains_key(&first));
    assert_eq!(planner.next_deadline(), None);
    // Within the grace after that, the same backend gets its id back and no other does.
    planner.plan(&with(&["10.0.0.1", "10.0.0.3"]), &node(), Changed::Services(&web), at(100));
    assert_eq!(planner.table().backends[&first].address, ip("10.0.0.1"));
}

#[test]
fn a_udp_backend_that_vanishes_goes_at_once() {
    let mut web = service("web", &["10.96.0.1"]);
    web.ports[0].protocol = Protocol::Udp;
    let with = |conditions: Option<Conditions>| {
        let mut endpoints = slice("a", "web", conditions.map(|c| endpoint("10.0.0.1", "n1", c)).into_iter().collect());
        endpoints.ports[0].protocol = Protocol::Udp;
        world(vec![web.clone()], vec![endpoints])
    };
    let changed = BTreeSet::from([named("web")]);
    let mut planner = planned(&with(Some(READY)));
    planner.plan(&with(Some(DRAINING)), &node(), Changed::Services(&changed), at(1));
    assert_eq!(planner.table().backends.len(), 1, "it still serves");
    planner.plan(&with(Some(DYING)), &node(), Changed::Services(&changed), at(2));
    assert_eq!(planner.table().backends.len(), 0, "a socket pinned to it must be released");
    planner.plan(&with(Some(READY)), &node(), Changed::Services(&changed), at(3));
    planner.plan(&with(None), &node(), Changed::Services(&changed), at(4));
    assert_eq!(planner.table().backends.len(), 0);
}

#[test]
fn a_tcp_backend_that_is_not_ready_for_a_while_stays_for_its_connections() {
    let with = |conditions| {
        let endpoints = vec![endpoint("10.0.0.1", "n1", conditions), endpoint("10.0.0.2", "n1", READY)];
        world(vec![service("web", &["10.96.0.1"])], vec![slice("a", "web", endpoints)])
    };
    let web = BTreeSet::from([named("web")]);
    let mut planner = planned(&with(READY));
    planner.plan(&with(UNREADY), &node(), Changed::Services(&web), at(1));
    planner.plan(&with(UNREADY), &node(), Changed::All, at(1000));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.2"]);
    assert_eq!(planner.table().backends.len(), 2);
}

#[test]
fn ids_survive_a_restart_of_the_agent() {
    let endpoints = vec![endpoint("10.0.0.1", "n1", READY), endpoint("10.0.0.2", "n1", READY)];
    let before = world(vec![service("web", &["10.96.0.1"])], vec![slice("a", "web", endpoints.clone())]);
    let old = Planner::new(ServiceConfig::default());
    let mut old = {
        let mut old = old;
        // So that a fresh planner would number otherwise.
        let extra = world(
            vec![service("aaa", &["10.96.0.9"])],
            vec![slice("x", "aaa", vec![endpoint("10.0.0.9", "n1", READY)])],
        );
        old.plan(&extra, &node(), Changed::All, at(0));
        old
    };
    old.plan(&before, &node(), Changed::All, at(1));
    let table = old.table().clone();
    let mut new = Planner::new(ServiceConfig::default());
    new.adopt(table.backends.iter().map(|(id, b)| (*id, *b)), table.frontends.iter().map(|(f, t)| (*f, t.id)), at(0));
    new.plan(&before, &node(), Changed::All, at(0));
    assert_eq!(new.table().frontends, table.frontends);
    assert_eq!(new.table().backends, table.backends, "those that drain included");
}

// ---- incremental equals whole -----------------------------------------------------------------------------------------

fn conditions() -> impl Strategy<Value = Conditions> {
    prop_oneof![Just(READY), Just(UNREADY), Just(DRAINING), Just(DYING)]
}

fn some_slices() -> impl Strategy<Value = Vec<EndpointSlice>> {
    let endpoint = (1u8..6, 1u8..3, conditions())
        .prop_map(|(host, on, conditions)| endpoint(&format!("10.0.0.{host}"), &format!("n{on}"), conditions));
    let slice = (0u8..4, 0u8..3, prop::collection::vec(endpoint, 0..4), any::<bool>()).prop_map(
        |(name, of, endpoints, udp)| {
            let mut slice = slice(&format!("s{name}"), &format!("web{of}"), endpoints);
            if udp {
                slice.ports[0].protocol = Protocol::Udp;
            }
            slice
        },
    );
    prop::collection::vec(slice, 0..4)
}

fn some_services() -> impl Strategy<Value = Vec<Service>> {
    let policy = || prop_oneof![Just(TrafficPolicy::Cluster), Just(TrafficPolicy::Local)];
    let one = (0u8..3, 0u8..3, policy(), policy(), any::<bool>(), 0u16..3).prop_map(
        |(name, address, inner, outer, udp, port)| {
            let mut one = service(&format!("web{name}"), &[&format!("10.96.0.{address}")]);
            one.kind = ServiceKind::LoadBalancer;
            one.load_balancer_ips = vec![ip("203.0.113.7")];
            one.internal_policy = inner;
            one.external_policy = outer;
            one.ports[0].node_port = Some(30000 + port);
            if udp {
                one.ports[0].protocol = Protocol::Udp;
            }
            one
        },
    );
    prop::collection::vec(one, 0..4)
}

/// Frontends as addresses, with contested ones left out: who keeps those depends on history, as it should.
fn shape(planner: &Planner) -> Vec<(Frontend, NamespacedName, Vec<BackendAddress>)> {
    planner
        .table()
        .frontends
        .iter()
        .filter(|(frontend, _)| planner.claims.get(frontend).is_none_or(|claims| claims.len() == 1))
        .map(|(frontend, target)| {
            let mut all: Vec<BackendAddress> = target.backends.iter().map(|id| planner.table().backends[id]).collect();
            all.sort();
            (*frontend, target.service.clone(), all)
        })
        .collect()
}

fn follow(table: &mut ServiceTable, changes: ServiceChanges) {
    fn each<K: Ord, V>(map: &mut std::collections::BTreeMap<K, V>, changes: std::collections::BTreeMap<K, Option<V>>) {
        for (key, value) in changes {
            match value {
                Some(value) => drop(map.insert(key, value)),
                None => drop(map.remove(&key)),
            }
        }
    }
    each(&mut table.frontends, changes.frontends);
    each(&mut table.inside, changes.inside);
    each(&mut table.lingering, changes.lingering);
    each(&mut table.backends, changes.backends);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn any_sequence_of_changes_ends_where_planning_from_scratch_does(
        worlds in prop::collection::vec((some_services(), some_slices(), 0u64..50), 1..6)
    ) {
        let mut planner = Planner::new(ServiceConfig::default());
        let mut owner: std::collections::BTreeMap<BackendId, BackendAddress> = Default::default();
        let mut now = 0;
        let mut before = World::default();
        let mut replica = ServiceTable::default();
        planner.plan(&before, &node(), Changed::All, at(now));
        for (services, slices, pause) in worlds {
            now += pause;
            let next = world(services, slices);
            let names: BTreeSet<NamespacedName> = next.services.keys().chain(before.services.keys()).cloned()
                .chain(next.slices.values().chain(before.slices.values()).map(|s| s.service.clone()))
                .collect();
            planner.plan(&next, &node(), Changed::Services(&names), at(now));
            let fresh = planned(&next);
            prop_assert_eq!(shape(&planner), shape(&fresh));
            follow(&mut replica, planner.take_changes());
            prop_assert_eq!(&replica, planner.table(), "who follows the changes has the table");
            prop_assert!(planner.take_changes().is_empty());
            let said = |planner: &Planner| planner.refusals().into_iter().map(|r| (r.object(), r.reason)).collect::<BTreeSet<_>>();
            let (told, anew) = (said(&planner), said(&fresh));
            // Who has a frontend that two ask for is a matter of who was first.
            let plain = |all: BTreeSet<(String, String)>| all.into_iter().filter(|(_, why)| !why.contains("already belongs")).collect::<Vec<_>>();
            prop_assert_eq!(told.len(), anew.len());
            prop_assert_eq!(plain(told), plain(anew));
            let table = planner.table();
            for target in table.frontends.values() {
                prop_assert!(target.backends.iter().all(|id| id.0 != 0 && table.backends.contains_key(id)));
                prop_assert!(target.backends.is_sorted());
            }
            let distinct: BTreeSet<&BackendAddress> = table.backends.values().collect();
            prop_assert_eq!(distinct.len(), table.backends.len(), "one id a backend");
            for (id, backend) in &table.backends {
                if let Some(had) = owner.insert(*id, *backend) {
                    prop_assert_eq!(had, *backend, "an id was given to another backend");
                }
            }
            before = next;
        }
        // Everything goes, and after the grace nothing is left.
        planner.plan(&World::default(), &node(), Changed::All, at(now + 1));
        planner.plan(&World::default(), &node(), Changed::All, at(now + 62));
        prop_assert!(planner.table().frontends.is_empty() && planner.table().backends.is_empty());
        prop_assert!(planner.claims.is_empty() && planner.holders.is_empty() && planner.draining.is_empty());
    }
}

#[test]
fn algorithms_that_hash_have_the_same_table_on_every_node_whatever_ids_backends_have_there() {
    let endpoints = || {
        vec![endpoint("10.0.0.1", "n1", READY), endpoint("10.0.0.2", "n2", READY), endpoint("10.0.0.3", "n3", READY)]
    };
    let hashed = Service { algorithm: Algorithm::Maglev, ..service("web", &["10.96.0.1"]) };
    let addresses = |planner: &Planner| -> Vec<IpAddr> {
        let target = &planner.table().frontends[&cluster_ip("10.96.0.1")];
        assert_eq!(target.slots(), &*target.table);
        target.slots().iter().map(|id| planner.table().backends[id].address).collect()
    };
    let one = planned(&world(vec![hashed.clone()], vec![slice("a", "web", endpoints())]));
    // Another Service took the first ids here, and the endpoints came one by one.
    let mut other = Planner::new(ServiceConfig::default());
    let first = slice("b", "else", vec![endpoint("10.0.0.3", "n1", READY), endpoint("10.0.0.9", "n1", READY)]);
    let mut world = world(vec![service("else", &["10.96.0.2"]), hashed], vec![first]);
    other.plan(&world, &node(), Changed::All, at(0));
    for count in 1..=3 {
        let come = slice("a", "web", endpoints().into_iter().rev().take(count).collect());
        world.slices.insert(come.name.clone(), come);
        other.plan(&world, &node(), Changed::All, at(1));
    }
    assert_eq!(addresses(&one), addresses(&other));
    let places = addresses(&one).iter().filter(|address| **address == ip("10.0.0.2")).count();
    assert!(places.abs_diff(addresses(&one).len() / 3) <= 1);
    // Nothing is made for those that do not hash.
    let plain = planned(&world_of(service("web", &["10.96.0.1"])));
    assert!(plain.table().frontends[&cluster_ip("10.96.0.1")].table.is_empty());
}

fn world_of(service: Service) -> World {
    world(vec![service], vec![slice("a", "web", vec![endpoint("10.0.0.1", "n1", READY)])])
}

#[test]
fn source_ranges_are_for_load_balancer_addresses_only_and_what_is_not_understood_is_refused_by_name() {
    let ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let mut balanced = service("web", &["10.96.0.1"]);
    balanced.kind = ServiceKind::LoadBalancer;
    balanced.load_balancer_ips = vec![ip("198.51.100.1")];
    balanced.ports[0].node_port = Some(30080);
    balanced.source_ranges = Some(ranges.clone());
    balanced.misunderstood = vec!["such a thing".to_owned()];
    let planner = planned(&world_of(balanced));
    let sources = |frontend| planner.table().frontends[&frontend].sources.clone();
    assert_eq!(sources(cluster_ip("198.51.100.1")).as_deref(), Some(ranges.as_slice()));
    assert_eq!((sources(cluster_ip("10.96.0.1")), sources(node_port(30080, Family::V4))), (None, None));
    let refusals = planner.refusals();
    assert_eq!((refusals.len(), refusals[0].reason.as_str()), (1, "such a thing"));
}

#[test]
fn external_addresses_are_served_in_the_ranges_that_are_allowed_and_nowhere_else() {
    let mut web = service("web", &["10.96.0.1"]);
    web.external_ips = ["203.0.113.7", "198.51.100.1", "10.96.0.77", "203.0.113.8"].map(ip).to_vec();
    web.source_ranges = Some(Vec::new());
    let mut world = world_of(web);
    let of_node = towpath_model::Node {
        name: node(),
        labels: Default::default(),
        internal_ips: vec![ip("203.0.113.8")],
        flannel: None,
        pod_cidrs: Vec::new(),
        ready: true,
    };
    world.nodes.insert(node(), of_node);
    let plain = planned(&world);
    assert_eq!(backends(&plain, cluster_ip("203.0.113.7")), None);
    assert_eq!(plain.refusals().len(), 4, "{:?}", plain.refusals());
    let mut planner = Planner::new(ServiceConfig {
        external_cidrs: vec!["203.0.113.0/24".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
        service_cidrs: vec!["10.96.0.0/16".parse().unwrap()],
        ..ServiceConfig::default()
    });
    planner.plan(&world, &node(), Changed::All, at(0));
    assert_eq!(backends(&planner, cluster_ip("203.0.113.7")).unwrap(), ["10.0.0.1"]);
    assert_eq!(planner.table().frontends[&cluster_ip("203.0.113.7")].sources, None);
    let reasons: Vec<String> = planner.refusals().into_iter().map(|refusal| refusal.reason).collect();
    for words in [
        "198.51.100.1 is in none of the ranges",
        "10.96.0.77: in the range of Services",
        "203.0.113.8: the address of a node",
    ] {
        assert!(reasons.iter().any(|reason| reason.contains(words)), "{words}: {reasons:?}");
    }
    assert_eq!(reasons.len(), 3);
}

#[test]
fn a_udp_backend_lingers_while_it_serves_and_not_where_only_another_service_has_it() {
    let udp = |name: &str, address: &str| {
        let port = ServicePort::new("dns", Protocol::Udp, 53, TargetPort::Number(53), None);
        Service { ports: vec![port], ..service(name, &[address]) }
    };
    let slice_of = |of: &str, endpoints| EndpointSlice {
        ports: vec![EndpointPort { name: "dns".to_owned(), protocol: Protocol::Udp, port: 53 }],
        ..slice(of, of, endpoints)
    };
    let at_53 = |address: &str| Frontend { port: 53, protocol: Protocol::Udp, ..cluster_ip(address) };
    let lingering = |planner: &Planner, address: &str| -> Vec<String> {
        let ids = planner.table().lingering.get(&at_53(address)).into_iter().flatten();
        ids.map(|id| planner.table().backends[id].address.to_string()).collect()
    };
    let services = vec![udp("blue", "10.96.0.1"), udp("all", "10.96.0.2")];
    let both = |conditions| {
        let first = endpoint("10.0.0.1", "n1", conditions);
        vec![slice_of("blue", vec![first.clone()]), slice_of("all", vec![first])]
    };
    let mut planner = planned(&world(services.clone(), both(READY)));
    // It serves while it goes: no new flows where there is another, and those that it has go on.
    let mut going = both(DRAINING);
    going[0].endpoints.push(endpoint("10.0.0.2", "n1", READY));
    planner.plan(&world(services.clone(), going), &node(), Changed::All, at(1));
    assert_eq!(backends(&planner, at_53("10.96.0.1")).unwrap(), ["10.0.0.2"]);
    assert_eq!(lingering(&planner, "10.96.0.1"), ["10.0.0.1"]);
    // It is one Service's only, and lives.
    let moved = vec![
        slice_of("blue", vec![endpoint("10.0.0.2", "n1", READY)]),
        slice_of("all", vec![endpoint("10.0.0.1", "n1", READY)]),
    ];
    planner.plan(&world(services.clone(), moved), &node(), Changed::All, at(2));
    assert!(planner.table().lingering.is_empty() && planner.table().backends.len() == 2);
    // Gone with its Service.
    planner.plan(&world(Vec::new(), Vec::new()), &node(), Changed::All, at(3));
    assert!(planner.table().lingering.is_empty() && planner.table().backends.is_empty());
}
