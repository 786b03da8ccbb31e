//! Who has an address or a port, and what is refused.

use super::*;

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
            other_ips: Vec::new(),
            created: 0,
            added: Default::default(),
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
        other_ips: Vec::new(),
        created: 0,
        added: Default::default(),
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
fn a_range_that_becomes_services_own_is_no_place_for_endpoints_and_external_addresses_any_more() {
    let mut outside = service("web", &["10.96.0.1"]);
    outside.external_ips = vec![ip("10.50.0.7")];
    let world = world_of(outside);
    let config = ServiceConfig { external_cidrs: vec!["10.50.0.0/16".parse().unwrap()], ..ServiceConfig::default() };
    let mut planner = Planner::new(config);
    planner.plan(&world, &node(), Changed::All, at(0));
    assert!(planner.table().frontends.contains_key(&cluster_ip("10.50.0.7")));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), ["10.0.0.1"]);

    let ranges = ["10.50.0.0/24".parse().unwrap(), "10.0.0.0/24".parse().unwrap()];
    assert!(planner.follow_service_ranges(&ranges) && !planner.follow_service_ranges(&ranges));
    planner.plan(&world, &node(), Changed::All, at(1));
    assert!(!planner.table().frontends.contains_key(&cluster_ip("10.50.0.7")));
    assert_eq!(backends(&planner, cluster_ip("10.96.0.1")).unwrap(), [] as [&str; 0]);
    assert_eq!(planner.refusals().len(), 2);

    planner.follow_service_ranges(&[]);
    planner.plan(&world, &node(), Changed::All, at(2));
    assert_eq!(backends(&planner, cluster_ip("10.50.0.7")).unwrap(), ["10.0.0.1"]);
}
