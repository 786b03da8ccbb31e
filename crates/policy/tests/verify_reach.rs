//! `verify`'s sets of ports against the evaluator, on random clusters: who reaches whom, and what a change changes.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::net::IpAddr;

use ipnet::IpNet;
use proptest::prelude::*;
use towpath_model::desired::Verdict;
use towpath_model::{Direction, Family, family_of};
use towpath_policy::verify::reach::{Matrix, diff};
use towpath_policy::verify::universe::{Endpoint, Who};
use towpath_policy::verify::{Owners, Row, Universe};
use towpath_policy::{Evaluator, Flow, Holder, View};

fn universe(spec: &cluster::Spec) -> Universe {
    let ranges: Vec<IpNet> = ["10.0.0.0/16", "fd00::/64"].map(|net| net.parse().unwrap()).to_vec();
    Universe::of(cluster::world(&spec.objects()), &Owners::new(), &ranges)
}

/// Whether the evaluator knows the endpoint by this address.
fn holds(evaluator: &Evaluator<'_>, endpoint: &Endpoint, address: IpAddr) -> bool {
    match (evaluator.holder(address), &endpoint.who) {
        (Some(Holder::Pod(pod)), Who::Workload(..)) => endpoint.pods.first() == Some(&pod.name),
        (Some(Holder::Node(name)), Who::Node(node)) => name.as_str() == node,
        _ => false,
    }
}

/// A node that is the pod's own: always let in, and not what the table says of nodes.
fn is_own_node(universe: &Universe, from: &Endpoint, to: &Endpoint) -> bool {
    let node = to.pods.first().and_then(|pod| universe.world.pods[pod].node.clone());
    matches!((&from.who, node), (Who::Node(name), Some(node)) if name == node.as_str())
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
        spec in cluster::spec(), changed in prop::collection::vec(cluster::policy(), 0..3), kept in 0usize..4
    ) {
        let mut after = spec.clone();
        after.policies.truncate(kept);
        after.policies.extend(changed);
        let (a, b) = (universe(&spec), universe(&after));
        let found = diff(&a, &b);
        prop_assert!(diff(&a, &a).is_empty());
        let (was, is) = (Evaluator::new(&View::of(&a.world)), Evaluator::new(&View::of(&b.world)));
        let name = |e: &Endpoint| e.pods.first().map(ToString::to_string).unwrap_or_default();
        let pods: Vec<&Endpoint> = b.endpoints.iter().filter(|e| e.namespace().is_some()).collect();
        for from in &pods {
            for to in pods.iter().filter(|to| to.who != from.who) {
                for family in [Family::V4, Family::V6] {
                    let (Some(source), Some(target)) = (from.address(family), to.address(family)) else { continue };
                    if !holds(&is, from, source) || !holds(&is, to, target) {
                        continue;
                    }
                    let says = |rows: &[Row], protocol, port| rows.iter().any(|row| {
                        row.family.is_none_or(|f| f == family) && row.ports.has(protocol, port)
                            && row.from.names.contains(&name(from)) && row.to.names.contains(&name(to))
                    });
                    // A pod without an address may be given another one where the blocks are others.
                    let earlier = |e: &Endpoint| a.endpoints.iter().find(|o| o.who == e.who).and_then(|o| o.address(family));
                    let (Some(first), Some(second)) = (earlier(from), earlier(to)) else { continue };
                    for (protocol, _, port) in cluster::services() {
                        let open = [(&was, first, second), (&is, source, target)].map(|(e, from, to)| is_open(e, from, to, protocol, port));
                        prop_assert_eq!(says(&found.allowed, protocol, port), open == [false, true], "{} to {}", source, target);
                        prop_assert_eq!(says(&found.denied, protocol, port), open == [true, false], "{} to {}", source, target);
                    }
                }
            }
        }
    }
}
