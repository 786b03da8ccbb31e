//! How long backends and their ids live.

use std::sync::Arc;

use super::*;

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

/// A planner that knows what an earlier run left in the kernel.
fn restarted(table: &ServiceTable) -> Planner {
    let ids = |frontends: &BTreeMap<Frontend, Arc<FrontendTarget>>| -> Vec<(Frontend, ServiceId)> {
        frontends.iter().map(|(frontend, target)| (*frontend, target.id)).collect()
    };
    let mut new = Planner::new(ServiceConfig::default());
    let backends = table.backends.iter().map(|(id, backend)| (*id, *backend));
    new.adopt(backends, ids(&table.frontends), ids(&table.inside), at(0));
    new
}

#[test]
fn a_restart_leads_no_client_to_another_service_by_an_id_and_cuts_no_flow() {
    let local = |name: &str, address: &str, number: u16| {
        let mut local = service(name, &[address]);
        local.kind = ServiceKind::NodePort;
        (local.internal_policy, local.external_policy) = (TrafficPolicy::Local, TrafficPolicy::Local);
        local.ports[0].node_port = Some(number);
        local
    };
    let services = vec![local("a", "10.96.0.1", 30001), local("b", "10.96.0.2", 30002)];
    let slices = |conditions: Conditions| {
        let one = |name: &str, of: &str, address: &str| slice(name, of, vec![endpoint(address, "n1", conditions)]);
        vec![one("s1", "a", "10.0.0.1"), one("s2", "b", "10.0.0.2")]
    };
    let table = planned(&world(services.clone(), slices(READY))).table().clone();
    let mut new = restarted(&table);
    // Without the first, what is left would come to have other numbers.
    new.plan(&world(services[1..].to_vec(), slices(READY)), &node(), Changed::All, at(0));
    let b = node_port(30002, Family::V4);
    assert_eq!(new.table().inside[&b].id, table.inside[&b].id);
    let given: BTreeSet<ServiceId> =
        new.table().inside.values().chain(new.table().frontends.values()).map(|t| t.id).collect();
    let of_a = [table.inside[&node_port(30001, Family::V4)].id, table.frontends[&cluster_ip("10.96.0.1")].id];
    assert!(of_a.iter().all(|id| !given.contains(id)), "{given:?} has {of_a:?}");

    // A UDP endpoint that is on its way out and serves keeps its flows through a restart, too.
    let udp = |slices: Vec<EndpointSlice>| -> World {
        let services = services.iter().cloned().map(|mut service| {
            service.ports[0].protocol = Protocol::Udp;
            service
        });
        let slices = slices.into_iter().map(|mut slice| {
            slice.ports[0].protocol = Protocol::Udp;
            slice
        });
        world(services.collect(), slices.collect())
    };
    let mut before = slices(READY);
    before[0].endpoints.push(endpoint("10.0.0.3", "n1", READY));
    let mut old = planned(&udp(before.clone()));
    before[0].endpoints[1].conditions = DRAINING;
    old.plan(&udp(before.clone()), &node(), Changed::All, at(1));
    assert_eq!(old.table().lingering.len(), 2, "at the cluster address and the node port");
    let mut new = restarted(old.table());
    new.plan(&udp(before), &node(), Changed::All, at(0));
    assert_eq!(new.table(), old.table());
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
    let mut new = restarted(&table);
    new.plan(&before, &node(), Changed::All, at(0));
    assert_eq!(new.table().frontends, table.frontends);
    assert_eq!(new.table().backends, table.backends, "those that drain included");
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
