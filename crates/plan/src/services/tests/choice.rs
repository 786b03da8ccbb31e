//! Which endpoints a frontend leads to.

use super::*;

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
