//! The translation check accepts what the compiler makes of random clusters, and notices when an image is broken.
//!
//! Whether a broken image judges some flow otherwise is found out flow by flow, as the kernel would look it up and as the evaluator says.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use proptest::sample::Index;
use towpath_model::desired::{PolicyImage, SetId, Verdict};
use towpath_model::{Direction, NodeName, World};
use towpath_policy::check::{Checker, Mismatch, check};
use towpath_policy::compile::Touched;
use towpath_policy::{Compiler, Evaluator, Flow, Holder, Reason, View, image};

use cluster::{Spec, addresses, broken, changes, dns, services, spec, world};

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

fn noticed(spec: &Spec, world: &World, image: &PolicyImage) -> Result<(bool, bool), TestCaseError> {
    let (dns, given) = (dns(), BTreeMap::new());
    let learned = cluster::learned(&cluster::names(spec, world));
    let view = View { world, dns: &dns, pod_ips: &given, names: &learned };
    let wrong = differs(spec, &view, image);
    let outcome = check(&view, &NodeName::new(NODE), image);
    if let Some((_, flow)) = wrong {
        prop_assert!(outcome.is_err(), "the check does not notice that {:?} is judged otherwise", flow);
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
        let checked = check(&view, &NodeName::new(NODE), &compiled(&view));
        prop_assert!(checked.is_ok(), "{}", checked.unwrap_err());
    }

    #[test]
    fn a_wrong_entry_is_noticed(spec in spec(), how in 0u8..11, one: Index, other: Index) {
        let world = world(&spec.objects());
        let (dns, given) = (dns(), BTreeMap::new());
        let learned = cluster::learned(&cluster::names(&spec, &world));
        let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
        let honest = compiled(&view);
        if let Some(image) = broken(honest.clone(), how, one, other) {
            let (_, seen) = noticed(&spec, &world, &image)?;
            // And if it is told to the kernel later, where everything was read before.
            let mut checker = Checker::new(NodeName::new(NODE));
            prop_assert!(checker.check(&view, &honest).is_ok());
            let told = changes(&honest, &image);
            let later = checker.follow(&view, &honest, Some(&told), &Touched::nothing());
            prop_assert_eq!(later.is_err(), seen, "{:?}", told);
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
                let said = check(&view, &NodeName::new(NODE), &image).unwrap_err();
                assert!(matches!(*said, Mismatch::Missing { address: missing, .. } if missing == address), "{said}");
                image = honest.clone();
                image.pods.insert("203.0.113.9".parse().unwrap(), Default::default());
                let said = check(&view, &NodeName::new(NODE), &image).unwrap_err();
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
