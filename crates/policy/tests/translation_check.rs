//! The translation check accepts what the compiler makes of random clusters, and notices when an image is broken.
//!
//! Whether a broken image judges some flow otherwise is found out flow by flow, as the kernel would look it up and as the evaluator says.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use towpath_model::desired::{PolicyImage, Row, RowKey, SetId, Verdict};
use towpath_model::{Direction, NodeName, World};
use towpath_policy::check::{Mismatch, Scope, check};
use towpath_policy::{Compiler, Evaluator, Flow, Holder, Reason, View, image};

use cluster::{Spec, addresses, dns, services, spec, world};

const NODE: &str = "m0";

fn compiled(view: &View<'_>) -> PolicyImage {
    Compiler::new(Duration::ZERO).compile(view, &NodeName::new(NODE), Duration::ZERO).unwrap()
}

fn set(image: &PolicyImage, own: IpAddr, direction: Direction) -> SetId {
    let sets = image.pods[&own];
    if direction == Direction::Ingress { sets.ingress } else { sets.egress }
}

/// What a flow's own end and the image say of it; none if they need not agree: the kernel asks no image about a pod and itself.
fn judged(evaluator: &Evaluator<'_>, image: &PolicyImage, direction: Direction, flow: &Flow) -> Option<[Verdict; 2]> {
    let (own, peer) = match direction {
        Direction::Ingress => (flow.destination, flow.source),
        Direction::Egress => (flow.source, flow.destination),
    };
    let side = evaluator.side(flow, direction)?;
    if matches!(side.reason, Reason::Itself | Reason::OwnNode) {
        return None;
    }
    let (held, _) = image::judge(image, set(image, own, direction), peer, flow.protocol, flow.port);
    Some([side.verdict, held])
}

/// The first of many flows that the image judges otherwise than the policies.
fn differs(spec: &Spec, view: &View<'_>, image: &PolicyImage) -> Option<(IpAddr, Flow)> {
    let evaluator = Evaluator::new(view);
    let all = addresses(spec);
    for own in &all {
        let Some(Holder::Pod(pod)) = evaluator.holder(*own) else { continue };
        if pod.node.as_ref() != Some(&NodeName::new(NODE)) {
            continue;
        }
        for peer in &all {
            for (protocol, _, port) in services() {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let (source, destination) =
                        if direction == Direction::Ingress { (*peer, *own) } else { (*own, *peer) };
                    let flow = Flow { forwarded: true, ..Flow::new(source, destination, protocol, port) };
                    if judged(&evaluator, image, direction, &flow).is_some_and(|[said, held]| said != held) {
                        return Some((*own, flow));
                    }
                }
            }
        }
    }
    None
}

/// One wrong entry in an image.
fn broken(mut image: PolicyImage, how: u8, one: Index, other: Index) -> Option<PolicyImage> {
    fn pick<T: Clone>(list: Vec<T>, index: Index) -> Option<T> {
        (!list.is_empty()).then(|| list[index.index(list.len())].clone())
    }
    match how {
        0 => {
            let key = pick(image.set_classes.keys().copied().collect(), one)?;
            image.set_classes.remove(&key);
        }
        1 => {
            let key = pick(image.set_classes.keys().copied().collect(), one)?;
            let locals = image.rows.keys().filter(|row| row.set == key.0).map(|row| row.class).collect();
            image.set_classes.insert(key, pick(locals, other)?);
        }
        2 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            let row = image.rows[&key];
            let verdict = if row.verdict == Verdict::Allow { Verdict::Deny } else { Verdict::Allow };
            image.rows.insert(key, Row { verdict, ..row });
        }
        3 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            image.rows.remove(&key);
        }
        4 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            let row = image.rows.remove(&key)?;
            image.rows.insert(RowKey { port_bits: key.port_bits.checked_sub(1)?, ..key }, row);
        }
        5 => {
            let key = pick(image.pod_classes.keys().copied().collect(), one)?;
            image.pod_classes.insert(key, pick(image.cidr_classes.values().copied().collect(), other)?);
        }
        6 => {
            let key = pick(image.pod_classes.keys().copied().collect(), one)?;
            image.pod_classes.remove(&key);
        }
        7 => {
            let key = pick(image.cidr_classes.keys().copied().collect(), one)?;
            image.cidr_classes.remove(&key);
        }
        8 => {
            let key = pick(image.cidr_classes.keys().copied().collect(), one)?;
            image.cidr_classes.insert(key, pick(image.pod_classes.values().copied().collect(), other)?);
        }
        9 => {
            let key = pick(image.pods.keys().copied().collect(), one)?;
            let sets = pick(image.pods.values().copied().collect(), other)?;
            image.pods.insert(key, sets);
        }
        _ => {
            let key = pick(image.pods.keys().copied().collect(), one)?;
            image.pods.insert(key, Default::default());
        }
    }
    Some(image)
}

fn noticed(spec: &Spec, world: &World, image: &PolicyImage) -> Result<(bool, bool), TestCaseError> {
    let (dns, given) = (dns(), BTreeMap::new());
    let learned = cluster::learned(&cluster::names(spec, world));
    let view = View { world, dns: &dns, pod_ips: &given, names: &learned };
    let wrong = differs(spec, &view, image);
    let outcome = check(&view, &NodeName::new(NODE), image, &Scope::everything());
    if let Some((own, flow)) = wrong {
        prop_assert!(outcome.is_err(), "the check does not notice that {:?} is judged otherwise", flow);
        let peer = if flow.source == own { flow.destination } else { flow.source };
        let Some(Holder::Pod(pod)) = Evaluator::new(&view).holder(own) else { unreachable!() };
        let about_peer = Scope::of(BTreeSet::from([peer]), BTreeSet::new());
        let about_own = Scope::of(BTreeSet::new(), BTreeSet::from([pod.name.namespace.clone()]));
        for scope in [about_peer, about_own] {
            let outcome = check(&view, &NodeName::new(NODE), image, &scope);
            prop_assert!(outcome.is_err(), "{:?} is judged otherwise and not noticed in {:?}", flow, scope);
        }
    }
    if let Err(mismatch) = &outcome {
        let Mismatch::Flow { direction, flow, image: held, .. } = &**mismatch else {
            return Err(TestCaseError::fail(mismatch.to_string()));
        };
        if let Some(judged) = judged(&Evaluator::new(&view), image, *direction, flow) {
            prop_assert_eq!(judged[1], *held, "the image does not say that: {}", mismatch);
            prop_assert_ne!(judged[0], *held, "nothing is wrong with it: {}", mismatch);
        }
    }
    Ok((wrong.is_some(), outcome.is_err()))
}

proptest! {
    #![proptest_config(cluster::config(96))]

    #[test]
    fn what_the_compiler_makes_passes(spec in spec()) {
        let world = world(&spec.objects());
        let (dns, given) = (dns(), BTreeMap::new());
        let learned = cluster::learned(&cluster::names(&spec, &world));
        let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
        let checked = check(&view, &NodeName::new(NODE), &compiled(&view), &Scope::everything());
        prop_assert!(checked.is_ok(), "{}", checked.unwrap_err());
    }

    #[test]
    fn a_wrong_entry_is_noticed(spec in spec(), how in 0u8..11, one: Index, other: Index) {
        let world = world(&spec.objects());
        let (dns, given) = (dns(), BTreeMap::new());
        let learned = cluster::learned(&cluster::names(&spec, &world));
        let image = compiled(&View { world: &world, dns: &dns, pod_ips: &given, names: &learned });
        if let Some(image) = broken(image, how, one, other) {
            noticed(&spec, &world, &image)?;
        }
    }
}

#[test]
fn most_wrong_entries_matter_and_a_missing_pod_is_named() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let (mut broke, mut seen_by_flows, mut seen) = (0, 0, 0);
    for how in 0..11 {
        for _ in 0..12 {
            let (spec, one, other) = (spec(), any::<Index>(), any::<Index>()).new_tree(&mut runner).unwrap().current();
            let world = world(&spec.objects());
            let (dns, given) = (dns(), BTreeMap::new());
            let learned = cluster::learned(&cluster::names(&spec, &world));
            let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
            let honest = compiled(&view);
            if let Some(address) = honest.pods.keys().next().copied() {
                let mut image = honest.clone();
                image.pods.remove(&address);
                let said = check(&view, &NodeName::new(NODE), &image, &Scope::everything()).unwrap_err();
                assert!(matches!(*said, Mismatch::Missing { address: missing, .. } if missing == address), "{said}");
                image = honest.clone();
                image.pods.insert("203.0.113.9".parse().unwrap(), Default::default());
                let said = check(&view, &NodeName::new(NODE), &image, &Scope::everything()).unwrap_err();
                assert!(matches!(*said, Mismatch::Surplus { .. }), "{said}");
            }
            let Some(image) = broken(honest, how, one, other) else { continue };
            let (by_flows, by_check) = noticed(&spec, &world, &image).unwrap();
            broke += 1;
            seen_by_flows += i32::from(by_flows);
            seen += i32::from(by_check);
        }
    }
    assert!(
        broke > 60 && seen_by_flows * 3 > broke,
        "{broke} broken, {seen_by_flows} seen by flows, {seen} by the check"
    );
    assert!(seen > seen_by_flows, "the check sees ports that no flow was asked about: {seen} and {seen_by_flows}");
}
