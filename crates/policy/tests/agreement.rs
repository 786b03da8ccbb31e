//! The compiled image, the evaluator and the oracle give the same answer to every question about a random cluster.
//!
//! This is the translation check of the crate. What it must notice is listed, with what was tried, in `mutants.md` beside it.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use towpath_model::desired::{PolicyImage, PolicyRef, RuleId, SetId, Verdict};
use towpath_model::{ClusterPeer, Direction, NodeName};
use towpath_oracle::{Cluster, Traffic};
use towpath_policy::{Compiler, Evaluator, Flow, Holder, Reason, Side, View, image};

use cluster::{Spec, addresses, dns, dns_pod, services, spec, world};

fn oracle_allows(objects: &Cluster, direction: Direction, flow: &Flow, protocol: &str) -> bool {
    let traffic = Traffic { from: flow.source, to: flow.destination, protocol, port: flow.port };
    match direction {
        Direction::Ingress => towpath_oracle::ingress_allowed(objects, &traffic),
        Direction::Egress => towpath_oracle::egress_allowed(objects, &traffic),
    }
}

/// The image's verdict must be the evaluator's, with the same rule or the same isolating policies.
fn image_agrees(image: &PolicyImage, own: IpAddr, peer: IpAddr, flow: &Flow, side: &Side) -> Result<(), TestCaseError> {
    let (verdict, rule) = image::judge_pod(image, own, side.direction, peer, flow.protocol, flow.port);
    match &side.reason {
        // The kernel knows these without a look-up: the packet comes from its own namespace, or never leaves the pod.
        Reason::OwnNode | Reason::Itself => return Ok(()),
        Reason::Unknown => prop_assert_eq!(rule, RuleId::HOST_ONLY),
        Reason::NotIsolated => prop_assert_eq!(rule, RuleId::NOT_ISOLATED),
        Reason::Rule { rule: wanted } => prop_assert_eq!(image.rules.get(&rule), Some(wanted)),
        Reason::DefaultDeny { isolating, nearest } => {
            prop_assert_eq!(rule, RuleId::DEFAULT_DENY);
            let sets = image.pods[&own];
            let set = if side.direction == Direction::Ingress { sets.ingress } else { sets.egress };
            prop_assert!(image.isolating[&set].iter().eq(isolating));
            prop_assert!(nearest.as_ref().is_none_or(|n| !n.mismatches.is_empty()));
        }
    }
    prop_assert_eq!(verdict, side.verdict);
    Ok(())
}

/// How many questions were asked, and how many were answered by a rule and by default.
#[derive(Clone, Copy, Debug, Default)]
struct Asked {
    all: u64,
    by_rule: u64,
    by_default: u64,
    /// Denied by a rule of a ClusterNetworkPolicy; decided behind one that passes; open to all behind ClusterNetworkPolicies.
    denied: u64,
    passed: u64,
    open: u64,
    /// Denied to a pod that is not known yet.
    unknown: u64,
    /// Accepted by name.
    named: u64,
}

/// The cluster with each of some pods behind an address.
fn disguises(spec: &Spec, objects: &Cluster, address: IpAddr) -> Vec<Cluster> {
    let of = |pod: &towpath_model::NamespacedName| {
        let mut all = objects.clone();
        let mut found = all.pods.iter().find(|p| p.metadata.name.as_deref() == Some(&pod.name))?.clone();
        found.metadata.name = Some("disguised".to_owned());
        let text = serde_json::json!({"phase": "Running", "podIPs": [{"ip": address.to_string()}]});
        found.status = serde_json::from_value(text).ok();
        found.spec.as_mut()?.host_network = None;
        all.pods.push(found);
        Some(all)
    };
    let names = (0..spec.pods.len().min(2))
        .map(|i| cluster::named(cluster::NAMESPACES[spec.pods[i].namespace], &format!("p{i}")));
    names.filter_map(|name| of(&name)).collect()
}

/// Whether a rule's domain names decided.
fn by_name(world: &towpath_model::World, side: &Side) -> bool {
    let Reason::Rule { rule } = &side.reason else { return false };
    let PolicyRef::Cluster { name, .. } = &rule.policy else { return false };
    let wanted = world.cluster_policies.get(name).and_then(|p| p.rules(side.direction).get(rule.rule as usize));
    let peer = wanted.zip(rule.peer).and_then(|(wanted, peer)| wanted.peers.get(peer as usize));
    matches!(peer, Some(ClusterPeer::DomainNames(_)))
}

fn check(spec: &Spec) -> Result<Asked, TestCaseError> {
    let mut objects = spec.objects();
    let world = world(&objects);
    objects.names = cluster::names(spec, &world);
    let learned = cluster::learned(&objects.names);
    let (dns, given) = (dns(), BTreeMap::new());
    let view = View { world: &world, dns: &dns, pod_ips: &given, names: &learned };
    let evaluator = Evaluator::new(&view);
    let mut with_dns = objects.clone();
    with_dns.pods.push(dns_pod());
    let images: BTreeMap<&str, PolicyImage> = cluster::NODES
        .iter()
        .map(|node| {
            (*node, Compiler::new(Duration::ZERO).compile(&view, &NodeName::new(*node), Duration::ZERO).unwrap())
        })
        .collect();
    let addresses = addresses(spec);
    let services = services();
    let mut asked = Asked::default();
    let mut unknown: BTreeMap<IpAddr, Vec<Cluster>> = BTreeMap::new();
    for own in &addresses {
        let pod = match evaluator.holder(*own) {
            Some(Holder::Pod(pod)) => pod,
            Some(Holder::Dns) => continue,
            other => {
                let held = towpath_oracle::holds_pod(&objects, *own);
                prop_assert!(!held, "the oracle knows a pod at {}, the evaluator {:?}", own, other);
                continue;
            }
        };
        let node = pod.node.as_ref().unwrap().as_str();
        for (other_node, image) in &images {
            prop_assert_eq!(image.pods.contains_key(own), *other_node == node, "{} on {}", own, other_node);
        }
        for peer in addresses.iter().filter(|p| p.is_ipv4() == own.is_ipv4()) {
            for (protocol, name, port) in &services {
                for direction in [Direction::Ingress, Direction::Egress] {
                    let (source, destination) =
                        if direction == Direction::Ingress { (*peer, *own) } else { (*own, *peer) };
                    let flow = Flow::new(source, destination, *protocol, *port);
                    let side = evaluator.side(&flow, direction).unwrap();
                    if evaluator.may_be_pod(*peer) {
                        // What becomes known of it later must not turn out to have been forbidden.
                        let disguised = unknown.entry(*peer).or_insert_with(|| disguises(spec, &with_dns, *peer));
                        for disguised in disguised.iter().filter(|_| matches!(*port, 0 | 53 | 80 | 8100)) {
                            let forbidden = !oracle_allows(disguised, direction, &flow, name);
                            let missed = forbidden && side.verdict == Verdict::Allow;
                            prop_assert!(!missed, "an unknown pod may do what it may not: {:?}: {}", flow, side);
                        }
                        asked.unknown += u64::from(side.verdict == Verdict::Deny);
                    } else {
                        let allowed = oracle_allows(&with_dns, direction, &flow, name);
                        prop_assert_eq!(
                            side.verdict == Verdict::Allow,
                            allowed,
                            "oracle differs: {:?}: {}",
                            flow,
                            side
                        );
                    }
                    image_agrees(&images[node], *own, *peer, &flow, &side)
                        .map_err(|e| TestCaseError::fail(format!("image differs: {flow:?}: {side}: {e}")))?;
                    asked.all += 1;
                    asked.by_rule += u64::from(matches!(side.reason, Reason::Rule { .. }));
                    let ruled = matches!(side.reason, Reason::Rule { .. });
                    asked.named += u64::from(by_name(&world, &side));
                    asked.denied += u64::from(ruled && side.verdict == Verdict::Deny);
                    asked.passed += u64::from(!side.passed.is_empty());
                    let set = images[node].pods[own];
                    let set = if direction == Direction::Ingress { set.ingress } else { set.egress };
                    asked.open += u64::from(side.reason == Reason::NotIsolated && set != SetId::default());
                    asked.by_default += u64::from(matches!(side.reason, Reason::DefaultDeny { .. }));
                }
            }
        }
    }
    Ok(asked)
}

proptest! {
    #[test]
    fn image_evaluator_and_oracle_agree_on_random_clusters(spec in spec()) {
        check(&spec)?;
    }

    #[test]
    fn an_image_is_consistent(spec in spec()) {
        let world = world(&spec.objects());
        let image = Compiler::new(Duration::ZERO).compile(&View::of(&world), &NodeName::new("m0"), Duration::ZERO).unwrap();
        for (row, value) in &image.rows {
            prop_assert!(image.rules.contains_key(&value.rule) || value.rule == RuleId::NOT_ISOLATED);
            prop_assert!(image.isolating.contains_key(&row.set));
            prop_assert!(row.port_bits <= 16);
            for (other, _) in image.rows.iter().filter(|(o, _)| o.set == row.set && o.class == row.class && o.protocol == row.protocol) {
                let common = row.port_bits.min(other.port_bits);
                let mask = u16::MAX.checked_shl(16 - u32::from(common)).unwrap_or(0);
                prop_assert!(other == row || row.port & mask != other.port & mask, "rows overlap: {:?} {:?}", row, other);
            }
        }
        for sets in image.pods.values() {
            prop_assert!([sets.ingress, sets.egress].iter().all(|s| *s == SetId::default() || image.isolating.contains_key(s)));
            prop_assert!(sets.ingress != sets.egress || sets.ingress == SetId::default(), "a set has one direction");
        }
        // As coarse as can be: no two classes that every set sees alike.
        let mut seen: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for ((set, class), local) in &image.set_classes {
            prop_assert!(local.0 != 0, "local class 0 is what is absent");
            seen.entry(*class).or_default().push((*set, *local));
        }
        let contents: std::collections::BTreeSet<_> = seen.values().collect();
        prop_assert_eq!(contents.len(), seen.len());
    }
}

#[test]
fn the_generator_asks_enough_and_sees_every_kind_of_answer() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let mut total = Asked::default();
    for _ in 0..40 {
        let asked = check(&spec().new_tree(&mut runner).unwrap().current()).unwrap();
        total.all += asked.all;
        total.by_rule += asked.by_rule;
        total.by_default += asked.by_default;
        total.denied += asked.denied;
        total.passed += asked.passed;
        total.open += asked.open;
        total.unknown += asked.unknown;
        total.named += asked.named;
    }
    assert!(total.all > 50_000, "{total:?}");
    assert!(total.by_rule * 10 > total.all && total.by_default * 10 > total.all, "{total:?}");
    assert!([total.denied, total.open].iter().all(|count| count * 50 > total.all), "{total:?}");
    assert!(total.passed > 1000, "{total:?}");
    assert!(total.unknown > 300, "{total:?}");
    assert!(total.named > 300, "{total:?}");
}
