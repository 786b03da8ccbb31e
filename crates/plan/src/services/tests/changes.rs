//! Planning a change ends where planning from scratch does.

use super::*;

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
    let table = planner.table();
    let all = table.frontends.iter().chain(&table.inside);
    all.filter(|(frontend, _)| planner.claims.get(frontend).is_none_or(|claims| claims.len() == 1))
        .map(|(frontend, target)| {
            let mut all: Vec<BackendAddress> = target.backends.iter().map(|id| table.backends[id]).collect();
            all.sort();
            (*frontend, target.service.clone(), all)
        })
        .collect()
}

fn follow(table: &mut ServiceTable, changes: ServiceChanges) {
    fn each<K: Ord, V>(map: &mut BTreeMap<K, V>, changes: BTreeMap<K, Option<V>>) {
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
        let mut owner: BTreeMap<BackendId, BackendAddress> = Default::default();
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
            for (frontend, target) in &table.inside {
                prop_assert_eq!(&table.frontends[frontend].service, &target.service, "whose the port is, has its inside, too");
            }
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
        prop_assert!(planner.claims.is_empty() && planner.backends.count_held() == 0 && planner.draining.is_empty());
    }
}
