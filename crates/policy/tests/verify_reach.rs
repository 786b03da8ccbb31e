//! `verify`'s sets of ports against the evaluator, on random clusters: who reaches whom, and what a change changes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use serde_json::{Value, json};
use towpath_model::desired::Verdict;
use towpath_model::{Direction, Family, NamespacedName, NetworkPolicy, Pod, World, family_of};
use towpath_policy::verify::diff::{Difference, diff};
use towpath_policy::verify::reach::{Matrix, reach};
use towpath_policy::verify::universe::{Endpoint, Who};
use towpath_policy::verify::{Change, Owners, Row, Universe, Workload};
use towpath_policy::{Evaluator, Flow, Holder, View};

fn universe(spec: &cluster::Spec) -> Universe {
    Universe::of(cluster::world(&spec.objects()), &Owners::new(), &ranges())
}

/// Whether the evaluator knows the endpoint by this address.
fn holds(evaluator: &Evaluator<'_>, endpoint: &Endpoint, address: IpAddr) -> bool {
    match (evaluator.holder(address), &endpoint.who) {
        (Some(Holder::Pod(pod)), Who::Workload(..)) => endpoint.pods.first() == Some(&pod.name),
        (Some(Holder::Node(name)), Who::Node(node, _)) => name.as_str() == node,
        _ => false,
    }
}

/// A node that is the pod's own: always let in, and not what the table says of nodes.
fn is_own_node(universe: &Universe, from: &Endpoint, to: &Endpoint) -> bool {
    let node = to.pods.first().and_then(|pod| universe.world.pods[pod].node.clone());
    matches!((&from.who, node), (Who::Node(name, _), Some(node)) if name == node.as_str())
}

fn is_open(
    evaluator: &Evaluator<'_>,
    from: IpAddr,
    to: IpAddr,
    protocol: towpath_model::desired::RowProtocol,
    port: u16,
) -> bool {
    evaluator.evaluate(&Flow::new(from, to, protocol, port)).verdict == Verdict::Allow
}

const OUTSIDE: [&str; 6] =
    ["198.51.100.7", "198.51.100.200", "203.0.113.9", "203.0.113.10", "2001:db8::1", "2001:db9::1"];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]
    #[test]
    fn between_every_two_ends_exactly_those_ports_are_open_that_the_evaluator_opens(spec in cluster::spec()) {
        let universe = universe(&spec);
        let mut matrix = Matrix::of(&universe);
        let evaluator = Evaluator::new(&View::of(&universe.world));
        for (i, from) in universe.endpoints.iter().enumerate() {
            for (j, to) in universe.endpoints.iter().enumerate() {
                let nodes = from.namespace().is_none() && to.namespace().is_none();
                if i == j || nodes || is_own_node(&universe, from, to) {
                    continue;
                }
                for family in [Family::V4, Family::V6] {
                    let (Some(source), Some(target)) = (from.address(family), to.address(family)) else { continue };
                    if !holds(&evaluator, from, source) || !holds(&evaluator, to, target) {
                        continue;
                    }
                    let open = matrix.between(i, j, family);
                    for (protocol, _, port) in cluster::services() {
                        prop_assert_eq!(
                            open.has(protocol, port), is_open(&evaluator, source, target, protocol, port),
                            "{} to {}: {:?} {}: {}", source, target, protocol, port, open
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn outside_exactly_those_ports_are_open_that_the_evaluator_opens(spec in cluster::spec()) {
        let universe = universe(&spec);
        let matrix = Matrix::of(&universe);
        let evaluator = Evaluator::new(&View::of(&universe.world));
        for (i, pod) in universe.endpoints.iter().enumerate().filter(|(_, e)| e.namespace().is_some()) {
            for direction in [Direction::Egress, Direction::Ingress] {
                let parts = matrix.outside(i, direction);
                for address in OUTSIDE.map(|text| text.parse::<IpAddr>().unwrap()) {
                    let Some(own) = pod.address(family_of(address)).filter(|own| holds(&evaluator, pod, *own)) else { continue };
                    prop_assert!(parts.iter().filter(|(part, _)| part.has(address)).count() <= 1, "parts do not overlap");
                    let (source, target) = if direction == Direction::Egress { (own, address) } else { (address, own) };
                    for (protocol, _, port) in cluster::services() {
                        let open = parts.iter().any(|(part, ports)| part.has(address) && ports.has(protocol, port));
                        prop_assert_eq!(open, is_open(&evaluator, source, target, protocol, port), "{} to {} {}", source, target, port);
                    }
                }
            }
        }
    }

    #[test]
    fn a_difference_is_exactly_what_one_evaluator_allows_and_the_other_does_not(
        spec in cluster::spec(), changed in prop::collection::vec(cluster::policy(), 0..3), kept in 0usize..4,
        relabelled in prop::collection::vec((0usize..9, cluster::labels()), 0..3), gone in prop::option::of(0usize..9),
        per_workload in 1usize..4
    ) {
        let mut after = spec.clone();
        after.policies.truncate(kept);
        after.policies.extend(changed);
        for (index, labels) in relabelled {
            if let Some(pod) = after.pods.get_mut(index) {
                pod.labels = labels;
            }
        }
        let (before, mut after) = (cluster::world(&spec.objects()), cluster::world(&after.objects()));
        if let Some(index) = gone {
            after.pods.retain(|name, _| name.name != format!("p{index}"));
        }
        let owners = owners(&before, per_workload);
        let ranges = ranges();
        let same = Change::of((before.clone(), &owners), (before.clone(), &owners), &ranges);
        prop_assert!(diff(&same).is_empty());
        let change = Change::of((before, &owners), (after, &owners), &ranges);
        let found = diff(&change);
        let (a, b) = (change.before(), change.after());
        let (was, is) = (Evaluator::new(&View::of(&a.world)), Evaluator::new(&View::of(&b.world)));
        for from in b.endpoints.iter().flat_map(|e| &e.pods).filter(|pod| a.world.pods.contains_key(*pod)) {
            for to in b.endpoints.iter().flat_map(|e| &e.pods).filter(|pod| *pod != from && a.world.pods.contains_key(*pod)) {
                for family in [Family::V4, Family::V6] {
                    let ends = |world: &World, evaluator: &Evaluator<'_>| -> Option<(IpAddr, IpAddr)> {
                        let at = |name: &NamespacedName| {
                            let ip = world.pods[name].ips.iter().copied().find(|ip| family_of(*ip) == family)?;
                            matches!(evaluator.holder(ip), Some(Holder::Pod(pod)) if pod.name == *name).then_some(ip)
                        };
                        Some((at(from)?, at(to)?))
                    };
                    let (Some(first), Some(second)) = (ends(&a.world, &was), ends(&b.world, &is)) else { continue };
                    let says = |rows: &[Row], protocol, port| rows.iter().any(|row| {
                        row.family.is_none_or(|f| f == family) && row.ports.has(protocol, port)
                            && row.from.names.contains(&name(b, from)) && row.to.names.contains(&name(b, to))
                    });
                    for (protocol, _, port) in cluster::services() {
                        let open = [(&was, first), (&is, second)].map(|(e, (from, to))| is_open(e, from, to, protocol, port));
                        prop_assert_eq!(says(&found.allowed, protocol, port), open == [false, true], "{} to {}", from, to);
                        prop_assert_eq!(says(&found.denied, protocol, port), open == [true, false], "{} to {}", from, to);
                    }
                }
            }
        }
    }
}

fn ranges() -> Vec<IpNet> {
    ["10.0.0.0/16", "fd00::/64"].map(|net| net.parse().unwrap()).to_vec()
}

/// Pods of a namespace in workloads of so many.
fn owners(world: &World, each: usize) -> Owners {
    let workload = |name: &NamespacedName| {
        let number: usize = name.name.trim_start_matches('p').parse().unwrap();
        Workload {
            namespace: name.namespace.clone(),
            name: format!("w{}", number / each),
            kind: "statefulset".to_owned(),
        }
    };
    world.pods.keys().map(|name| (name.clone(), workload(name))).collect()
}

/// What a row calls the endpoint of a pod.
fn name(universe: &Universe, pod: &NamespacedName) -> String {
    let endpoint = universe.endpoints.iter().find(|e| e.pods.contains(pod)).unwrap();
    let Who::Workload(workload, _) = &endpoint.who else { unreachable!("it has pods") };
    let of_workload = |e: &&Endpoint| matches!(&e.who, Who::Workload(other, _) if other == workload);
    let plain = format!("{}/{}", workload.namespace, workload.name);
    match (universe.endpoints.iter().filter(of_workload).count(), endpoint.pods.len()) {
        (1, _) => plain,
        (_, 1) => format!("{plain} [pod {}]", endpoint.pods[0].name),
        (_, more) => format!("{plain} [pod {} and {} more]", endpoint.pods[0].name, more - 1),
    }
}

/// Two pods of a StatefulSet, of which the second has the role of a master, and an API; without addresses.
fn stateful(policies: Value) -> World {
    let mut world = World::default();
    for (name, labels) in [
        ("api", json!({"app": "api"})),
        ("db-0", json!({"statefulset.kubernetes.io/pod-name": "db-0", "role": "replica"})),
        ("db-1", json!({"statefulset.kubernetes.io/pod-name": "db-1", "role": "master"})),
    ] {
        let object = json!({"metadata": {"namespace": "shop", "name": name, "labels": labels}, "spec": {"containers": [{"name": "c"}]}});
        let pod = Pod::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.pods.insert(pod.name.clone(), pod);
    }
    for (index, spec) in policies.as_array().unwrap().iter().enumerate() {
        let object = json!({"metadata": {"namespace": "shop", "name": format!("q{index}")}, "spec": spec});
        let policy = NetworkPolicy::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.policies.insert(policy.name.clone(), policy);
    }
    world
}

fn of_change(before: Value, after: Value) -> Difference {
    let workload = Workload { namespace: "shop".into(), name: "db".into(), kind: "statefulset".into() };
    let owners: Owners =
        ["db-0", "db-1"].into_iter().map(|pod| (NamespacedName::new("shop", pod), workload.clone())).collect();
    diff(&Change::of((stateful(before), &owners), (stateful(after), &owners), &[]))
}

fn rows(rows: &[Row]) -> Vec<String> {
    rows.iter().map(|row| format!("{} {} {}", row.from.short.join(","), row.to.short.join(","), row.ports)).collect()
}

#[test]
fn access_that_moves_from_one_pod_of_a_workload_to_another_is_a_difference() {
    let from_api = json!([{"from": [{"podSelector": {"matchLabels": {"app": "api"}}}]}]);
    let closed = || json!({"podSelector": {}, "policyTypes": ["Ingress"]});
    let first =
        json!({"podSelector": {"matchLabels": {"statefulset.kubernetes.io/pod-name": "db-0"}}, "ingress": from_api});
    let master = json!({"podSelector": {"matchLabels": {"role": "master"}}, "ingress": from_api});
    let found = of_change(json!([closed(), first]), json!([closed(), master]));
    assert_eq!(rows(&found.allowed), ["shop/api shop/db [pod db-1] all"]);
    assert_eq!(rows(&found.denied), ["shop/api shop/db [pod db-0] all"]);
    // A policy that is the first to tell the pods apart: they were there before.
    let found = of_change(json!([closed()]), json!([closed(), master]));
    assert_eq!(rows(&found.allowed), ["shop/api shop/db [pod db-1] all"]);
    assert!(found.denied.is_empty() && found.added.is_empty() && found.removed.is_empty(), "{found:?}");
}

#[test]
fn blocks_among_the_pods_addresses_that_no_pod_has_are_a_difference_of_their_own() {
    let of = |cidr: &str| json!([{"podSelector": {"matchLabels": {"app": "api"}}, "ingress": [{"from": [{"ipBlock": {"cidr": cidr}}]}]}]);
    let found = of_change(of("192.0.2.0/24"), of("10.244.5.0/24"));
    assert_eq!(rows(&found.denied), ["outside 192.0.2.0/24 shop/api all"]);
    assert_eq!(found.unassigned, ["10.244.5.0/24".parse::<IpNet>().unwrap()]);
    assert_eq!((found.placed, found.inner_blocks), (3, 1));
    assert!(!found.is_empty());
    assert!(of_change(of("10.244.5.0/24"), of("10.244.5.0/24")).is_empty());
    // The same block for somebody else is a difference too.
    let mut other = of("10.244.5.0/24");
    other[0]["podSelector"] = json!({"matchLabels": {"role": "master"}});
    let found = of_change(json!([other[0], {"podSelector": {}}]), json!([of("10.244.5.0/24")[0], {"podSelector": {}}]));
    assert_eq!(found.unassigned, ["10.244.5.0/24".parse::<IpNet>().unwrap()]);
}

#[test]
fn every_kind_of_address_of_a_node_is_asked_about_and_pods_beyond_the_range_are_counted() {
    let policy = json!([{"podSelector": {"matchLabels": {"app": "api"}}, "ingress": [{"from": [{"ipBlock": {"cidr": "198.51.100.0/24"}}]}]}]);
    let mut world = stateful(policy);
    let addresses = [("InternalIP", "192.0.2.1"), ("ExternalIP", "192.0.2.9"), ("ExternalIP", "198.51.100.9")];
    let addresses: Vec<Value> = addresses.iter().map(|(kind, ip)| json!({"type": kind, "address": ip})).collect();
    let node = json!({"metadata": {"name": "n1"}, "status": {"addresses": addresses}});
    let node = towpath_model::Node::try_from(&serde_json::from_value(node).unwrap()).unwrap();
    world.nodes.insert(node.name.clone(), node);
    let universe = Universe::of(world.clone(), &Owners::new(), &[]);
    let table = reach(&universe, None);
    let to_api: Vec<&Row> = table.rows.iter().filter(|row| row.to.names.contains(&"shop/api".to_owned())).collect();
    let from: BTreeSet<&str> = to_api.iter().flat_map(|row| &row.from.names).map(String::as_str).collect();
    assert_eq!(from.iter().filter(|name| name.starts_with("node/")).collect::<Vec<_>>(), [&"node/n1 [198.51.100.9]"]);
    assert!(from.iter().any(|name| name.starts_with("outside 198.51.100.")), "{from:?}");
    assert_eq!(universe.unplaced, 0);
    let small = Universe::of(world, &Owners::new(), &["10.0.0.0/31".parse().unwrap()]);
    assert_eq!((small.placed, small.unplaced), (1, 2));
}
