//! A policy that is only audited decides nothing, and what it would decide is known to the letter; enforcing it then is one number in the
//! entry of each pod.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::json;
use towpath_model::desired::{PolicyImage, PolicyRef, RowProtocol, RuleId, SetId, Verdict};
use towpath_model::{Direction, NodeName, Protocol, World};
use towpath_oracle::Traffic;
use towpath_policy::names::Learned;
use towpath_policy::{Compiler, Evaluator, Flow, Holder, Reason, View, check, image};

use cluster::{PodSpec, Spec, addresses, audit_or_not, dns, dns_pod, services, spec, world};

const GRACE: Duration = Duration::from_secs(5);

fn compile(compiler: &mut Compiler, world: &World, node: &str) -> PolicyImage {
    let (dns, given, learned) = (dns(), BTreeMap::new(), Learned::default());
    let view = View { world, dns: &dns, pod_ips: &given, names: &learned };
    compiler.compile(&view, &NodeName::new(node), Duration::ZERO).unwrap()
}

fn policies(spec: &mut Spec) -> impl Iterator<Item = &mut serde_json::Value> {
    spec.policies.iter_mut().chain(&mut spec.cluster_policies)
}

/// How many questions were asked; how many of them enforcing would close, and open.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    all: u64,
    closes: u64,
    opens: u64,
}

/// Every question, asked of everything that answers.
fn compare(enforced: &Spec, audited: &[bool]) -> Result<Asked, TestCaseError> {
    let mut spec = enforced.clone();
    policies(&mut spec).zip(audited).filter(|(_, audited)| **audited).for_each(|(policy, _)| audit_or_not(policy));
    let (objects, enforced_objects) = (spec.objects(), enforced.objects());
    let (world, mut enforced_world) = (world(&objects), world(&enforced_objects));
    let (dns, given, learned) = (dns(), BTreeMap::new(), Learned::default());
    let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
    let (evaluator, as_if) = (Evaluator::new(&view), Evaluator::as_if_enforced(&view));
    let mut forced = world.clone();
    forced.enforce_all();
    prop_assert_eq!(&forced, &enforced_world);
    enforced_world.policies.retain(|name, _| !world.policies[name].enforcement.is_audited());
    enforced_world.cluster_policies.retain(|name, _| !world.cluster_policies[name].enforcement.is_audited());
    let mut with_dns = objects.clone();
    with_dns.pods.push(dns_pod());
    let images: BTreeMap<&str, [PolicyImage; 3]> = cluster::NODES
        .iter()
        .map(|node| (*node, [&world, &enforced_world, &forced].map(|w| compile(&mut Compiler::new(GRACE), w, node))))
        .collect();
    for (node, [image, ..]) in &images {
        let checked = check::check(&view, &NodeName::new(*node), image);
        prop_assert!(checked.is_ok(), "the translation check takes an audited policy for one in force: {:?}", checked);
    }
    let mut asked = Asked::default();
    for own in addresses(&spec) {
        let Some(Holder::Pod(pod)) = evaluator.holder(own) else { continue };
        let [image, without, with] = &images[pod.node.as_ref().unwrap().as_str()];
        for peer in addresses(&spec).into_iter().filter(|p| p.is_ipv4() == own.is_ipv4() && *p != own) {
            for (protocol, name, port) in services() {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let (source, destination) = if direction == Direction::Ingress { (peer, own) } else { (own, peer) };
                    let flow = Flow::new(source, destination, protocol, port);
                    let judge = |image: &PolicyImage| image::judge_pod(image, own, direction, peer, protocol, port).0;
                    // What judges does not know of them.
                    let verdict = judge(image);
                    prop_assert_eq!(verdict, judge(without));
                    let side = evaluator.side(&flow, direction).unwrap();
                    if matches!(side.reason, Reason::OwnNode | Reason::Itself) {
                        continue;
                    }
                    prop_assert_eq!(verdict, side.verdict);
                    if !evaluator.may_be_pod(peer) {
                        let traffic = Traffic { from: source, to: destination, protocol: name, port };
                        let allowed = match direction {
                            Direction::Ingress => towpath_oracle::ingress_allowed(&with_dns, &traffic),
                            Direction::Egress => towpath_oracle::egress_allowed(&with_dns, &traffic),
                        };
                        prop_assert_eq!(verdict == Verdict::Allow, allowed, "oracle differs: {:?}", flow);
                    }
                    // And what would judge is what will.
                    let would = image::audit_pod(image, own, direction, peer, protocol, port);
                    let would = would.map_or(verdict, |(verdict, _)| verdict);
                    prop_assert_eq!(would, judge(with), "{:?}", flow);
                    let side = as_if.as_ref().and_then(|as_if| as_if.side(&flow, direction));
                    prop_assert_eq!(would, side.map_or(verdict, |side| side.verdict));
                    asked.all += 1;
                    asked.closes += u64::from(would == Verdict::Deny && verdict == Verdict::Allow);
                    asked.opens += u64::from(would == Verdict::Allow && verdict == Verdict::Deny);
                }
            }
        }
    }
    for image in images.values().map(|[image, ..]| image) {
        for sets in image.pods.values() {
            for (set, audit) in [sets.of(Direction::Ingress), sets.of(Direction::Egress)] {
                prop_assert!(!image.audited.contains_key(&set), "a set that judges has a policy that is only audited");
                prop_assert_eq!(audit != SetId::default(), image.audited.get(&audit).is_some_and(|p| !p.is_empty()));
            }
        }
    }
    Ok(asked)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]

    #[test]
    fn what_is_audited_decides_nothing_and_is_known_to_the_letter(
        spec in spec(), audited in prop::collection::vec(any::<bool>(), 12),
    ) {
        compare(&spec, &audited)?;
    }
}

#[test]
fn the_generator_finds_what_enforcing_would_close_and_open() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut total = Asked::default();
    for round in 0..24_usize {
        let audited: Vec<bool> = (0..12).map(|index| (index + round) % 3 != 0).collect();
        let asked = compare(&spec().new_tree(&mut runner).unwrap().current(), &audited).unwrap();
        total.all += asked.all;
        total.closes += asked.closes;
        total.opens += asked.opens;
    }
    assert!(total.closes * 20 > total.all && total.opens > 100, "{total:?}");
}

/// Two pods of one namespace, which the policies are for.
fn two_pods(policies: Vec<serde_json::Value>, cluster_policies: Vec<serde_json::Value>) -> Spec {
    let pod = |families| PodSpec {
        namespace: 0,
        node: 0,
        kind: cluster::Kind::Plain,
        labels: BTreeMap::new(),
        families,
        ports: BTreeMap::new(),
    };
    Spec {
        namespaces: vec![BTreeMap::new(); cluster::NAMESPACES.len()],
        pods: vec![pod((true, false)), pod((true, false))],
        policies,
        cluster_policies,
        names: Default::default(),
    }
}

const TCP: RowProtocol = RowProtocol::Ports(Protocol::Tcp);

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn enforcing_what_was_audited_is_another_number_in_the_pods_entries_and_no_row() {
    let policy = json!({"metadata": {"namespace": "n0"}, "spec": {"podSelector": {}, "ingress": [
        {"from": [{"podSelector": {}}], "ports": [{"protocol": "TCP", "port": 80}]}]}});
    let mut spec = two_pods(vec![policy], Vec::new());
    audit_or_not(&mut spec.policies[0]);
    let mut compiler = Compiler::new(GRACE);
    let audited = compile(&mut compiler, &world(&spec.objects()), "m0");
    let (own, outside) = (ip("10.0.0.0"), ip("203.0.113.9"));
    let sets = audited.pods[&own];
    assert_eq!((sets.ingress, sets.egress, sets.audit_egress), Default::default());
    let asked = |port| image::audit_pod(&audited, own, Direction::Ingress, outside, TCP, port);
    assert_eq!(asked(80), Some((Verdict::Deny, RuleId::DEFAULT_DENY)));
    let policies = &audited.audited[&sets.audit_ingress];
    assert_eq!(policies.iter().map(ToString::to_string).collect::<Vec<_>>(), ["NetworkPolicy n0/q0"]);
    audit_or_not(&mut spec.policies[0]);
    let enforced = compile(&mut compiler, &world(&spec.objects()), "m0");
    assert_eq!(enforced.pods[&own].ingress, sets.audit_ingress);
    assert_eq!((&enforced.rows, &enforced.set_classes), (&audited.rows, &audited.set_classes));
    assert_eq!((&enforced.pod_classes, &enforced.cidr_classes), (&audited.pod_classes, &audited.cidr_classes));
    assert!(enforced.audited.is_empty());
    // And back.
    audit_or_not(&mut spec.policies[0]);
    assert_eq!(compile(&mut compiler, &world(&spec.objects()), "m0").pods, audited.pods);
}

#[test]
fn the_baseline_is_asked_as_long_as_what_would_isolate_is_only_audited() {
    let baseline = json!({"metadata": {}, "spec": {"tier": "Baseline", "priority": 1, "subject": {"namespaces": {}},
        "ingress": [{"name": "closed", "action": "Deny", "from": [{"namespaces": {}}]}]}});
    let opens = json!({"metadata": {"namespace": "n0", "annotations": {"towpath.dev/audit": "true"}},
        "spec": {"podSelector": {}, "ingress": [{}]}});
    let spec = two_pods(vec![opens], vec![baseline]);
    let image = compile(&mut Compiler::new(GRACE), &world(&spec.objects()), "m0");
    let (own, peer) = (ip("10.0.0.0"), ip("10.0.1.1"));
    let (verdict, rule) = image::judge_pod(&image, own, Direction::Ingress, peer, TCP, 80);
    assert_eq!((verdict, image.rules[&rule].name.as_str()), (Verdict::Deny, "closed"));
    let (verdict, rule) = image::audit_pod(&image, own, Direction::Ingress, peer, TCP, 80).unwrap();
    assert_eq!(verdict, Verdict::Allow);
    assert!(matches!(&image.rules[&rule].policy, PolicyRef::Namespaced(name) if name.name == "q0"));
}
