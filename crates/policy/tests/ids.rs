//! Which ids and entries an image has: stable under what does not concern it, as few as possible, and never borrowed.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use serde_json::{Value, json};
use towpath_model::desired::{ClassId, PolicyImage, RuleId, SetId};
use towpath_model::{NetworkPolicy, NodeName, Pod, World};
use towpath_policy::compile::UsedIds;
use towpath_policy::names::NOTHING_LEARNED;
use towpath_policy::{Compiler, Holder, Holders, View};

const GRACE: Duration = Duration::from_secs(5);

fn pod(name: &str, node: &str, labels: Value, ip: &str) -> Pod {
    let ports = json!([{"name": "http", "containerPort": if name.ends_with('2') { 8080 } else { 80 }}]);
    let object: k8s_openapi::api::core::v1::Pod = serde_json::from_value(json!({
        "metadata": {"namespace": "default", "name": name, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "c", "ports": ports}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]}}))
    .unwrap();
    Pod::try_from(&object).unwrap()
}

fn policy(namespace: &str, name: &str, spec: Value) -> NetworkPolicy {
    let object = json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
    NetworkPolicy::try_from(&cluster::policy_object(object)).unwrap()
}

fn world(pods: &[Pod], policies: &[NetworkPolicy]) -> World {
    World {
        pods: pods.iter().map(|p| (p.name.clone(), p.clone())).collect(),
        policies: policies.iter().map(|p| (p.name.clone(), p.clone())).collect(),
        ..World::default()
    }
}

fn pods() -> Vec<Pod> {
    vec![
        pod("web1", "n1", json!({"app": "web"}), "10.0.0.1"),
        pod("web2", "n1", json!({"app": "web"}), "10.0.0.2"),
        pod("cli1", "n2", json!({"app": "cli"}), "10.0.1.1"),
        pod("cli3", "n2", json!({"app": "cli"}), "10.0.1.2"),
        pod("other", "n2", json!({"app": "other"}), "10.0.1.3"),
    ]
}

fn from_cli(port: Value) -> NetworkPolicy {
    let rule = json!({"from": [{"podSelector": {"matchLabels": {"app": "cli"}}}], "ports": [{"port": port}]});
    policy("default", "web", json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [rule]}))
}

fn compile(compiler: &mut Compiler, world: &World, seconds: u64) -> PolicyImage {
    compiler.compile(&View::of(world), &NodeName::new("n1"), Duration::from_secs(seconds)).unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn pods_share_a_set_exactly_if_policies_and_resolved_ports_are_equal() {
    let by_number = compile(&mut Compiler::new(GRACE), &world(&pods(), &[from_cli(json!(80))]), 0);
    assert_eq!(by_number.pods[&ip("10.0.0.1")], by_number.pods[&ip("10.0.0.2")]);
    let by_name = compile(&mut Compiler::new(GRACE), &world(&pods(), &[from_cli(json!("http"))]), 0);
    assert_ne!(by_name.pods[&ip("10.0.0.1")].ingress, by_name.pods[&ip("10.0.0.2")].ingress);
    assert_eq!(by_name.pods[&ip("10.0.0.1")].egress, SetId(0));
    assert!(!by_name.pods.contains_key(&ip("10.0.1.1")), "another node's pod");
}

#[test]
fn peers_that_no_rule_tells_apart_share_a_class_and_the_others_are_absent() {
    let image = compile(&mut Compiler::new(GRACE), &world(&pods(), &[from_cli(json!(80))]), 0);
    let classes: BTreeSet<ClassId> = image.pod_classes.values().copied().collect();
    assert_eq!(image.pod_classes.keys().copied().collect::<Vec<_>>(), [ip("10.0.1.1"), ip("10.0.1.2")]);
    assert_eq!(classes.len(), 1);
    assert_eq!((image.rows.len(), image.set_classes.len(), image.cidr_classes.len()), (1, 1, 0));
}

#[test]
fn a_change_that_does_not_concern_the_node_changes_nothing() {
    let mut compiler = Compiler::new(GRACE);
    let (mut pods, mut policies) = (pods(), vec![from_cli(json!("http"))]);
    let before = compile(&mut compiler, &world(&pods, &policies), 0);
    pods.push(pod("new", "n2", json!({"app": "other"}), "10.0.1.9"));
    policies.push(policy("elsewhere", "p", json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}]}]})));
    policies.push(policy("default", "q", json!({"podSelector": {"matchLabels": {"app": "cli"}}})));
    assert_eq!(before, compile(&mut compiler, &world(&pods, &policies), 1));
    // One more of a known kind is one entry more.
    pods.push(pod("cli5", "n3", json!({"app": "cli"}), "10.0.2.1"));
    let mut grown = compile(&mut compiler, &world(&pods, &policies), 2);
    assert_eq!(grown.pod_classes.remove(&ip("10.0.2.1")), before.pod_classes.get(&ip("10.0.1.1")).copied());
    assert_eq!(before, grown);
}

#[test]
fn a_changed_policy_gets_a_new_set_beside_the_old_one_and_peers_keep_their_class() {
    let mut compiler = Compiler::new(GRACE);
    let before = compile(&mut compiler, &world(&pods(), &[from_cli(json!(80))]), 0);
    let old = before.pods[&ip("10.0.0.1")].ingress;
    let changed = world(&pods(), &[from_cli(json!(81))]);
    let between = compile(&mut compiler, &changed, 1);
    let new = between.pods[&ip("10.0.0.1")].ingress;
    assert_ne!(old, new);
    assert_eq!(between.isolating.keys().copied().collect::<BTreeSet<_>>(), BTreeSet::from([old, new]));
    assert_eq!(before.pod_classes, between.pod_classes);
    assert_eq!(compiler.next_expiry(), Some(Duration::from_secs(6)));
    let after = compile(&mut compiler, &changed, 6);
    assert_eq!(after.isolating.keys().copied().collect::<Vec<_>>(), [new]);
    assert_eq!(before.pod_classes, after.pod_classes);
    assert_eq!(after.rows.len(), 1);
}

#[test]
fn a_compiler_that_resumes_uses_no_id_that_the_kernel_holds() {
    let world = world(&pods(), &[from_cli(json!(80))]);
    let held = compile(&mut Compiler::new(GRACE), &world, 0);
    let used = UsedIds {
        sets: held.isolating.keys().copied().collect(),
        classes: held.pod_classes.values().copied().collect(),
        rules: held.rules.keys().copied().chain([RuleId::DEFAULT_DENY, RuleId::NOT_ISOLATED]).collect(),
        ..UsedIds::default()
    };
    let resumed = compile(&mut Compiler::resume(GRACE, &used, Duration::ZERO), &world, 0);
    assert!(resumed.isolating.keys().all(|id| !used.sets.contains(id)));
    assert!(resumed.pod_classes.values().all(|id| !used.classes.contains(id)));
    assert!(resumed.rules.keys().all(|id| !used.rules.contains(id)));
    assert!(resumed.rules.keys().all(|id| id.0 > 0 && id.0 < 0xffff_fff0));
}

#[test]
fn an_address_given_at_add_counts_before_the_status_shows_it_and_replaces_it() {
    let mut late = pod("web1", "n1", json!({"app": "web"}), "10.0.0.1");
    late.ips = Default::default();
    let restarted = pod("web2", "n1", json!({"app": "web"}), "10.0.0.2");
    let world = world(&[late.clone(), restarted.clone()], &[from_cli(json!(80))]);
    let stranger = cluster::named("default", "stranger");
    let given = BTreeMap::from([
        (late.name.clone(), vec![ip("10.0.0.7")]),
        (restarted.name.clone(), vec![ip("10.0.0.8")]),
        (stranger.clone(), vec![ip("10.0.0.9")]),
    ]);
    let view = View { world: &world, dns: &[], pod_ips: &given, names: &NOTHING_LEARNED };
    let image = Compiler::new(GRACE).compile(&view, &NodeName::new("n1"), Duration::ZERO).unwrap();
    assert_eq!(image.pods.keys().copied().collect::<Vec<_>>(), [ip("10.0.0.7"), ip("10.0.0.8")]);
    assert!(image.pods.values().all(|sets| sets.ingress != SetId(0)));
    assert!(matches!(Holders::of(&view).holder(ip("10.0.0.9")), Some(Holder::UnknownPod(name)) if *name == stranger));
    assert!(Holders::of(&view).holder(ip("10.0.0.2")).is_none(), "the sandbox before the restart had it");
}

#[test]
fn an_address_has_one_holder_and_it_is_the_likeliest() {
    let mut world = world(&pods(), &[]);
    let claim = |name: &str, node: &str, address: &str| pod(name, node, json!({"forged": "yes"}), address);
    let node: k8s_openapi::api::core::v1::Node = serde_json::from_value(json!({"metadata": {"name": "n2"},
        "spec": {"podCIDRs": ["10.0.1.0/24"]}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.2"}]}}))
    .unwrap();
    let node = towpath_model::Node::try_from(&node).unwrap();
    world.nodes.insert(node.name.clone(), node);
    let mut leaving = claim("a-leaving", "n1", "10.0.0.1");
    leaving.terminating = true;
    for pod in [
        claim("a-foreign", "n1", "10.0.1.1"),
        claim("a-node", "n1", "192.0.2.2"),
        claim("a-dns", "n1", "169.254.20.10"),
        leaving,
    ] {
        world.pods.insert(pod.name.clone(), pod);
    }
    let given = BTreeMap::from([(cluster::named("default", "web2"), vec![ip("10.0.1.3")])]);
    let dns = [ip("169.254.20.10")];
    let holders = Holders::of(&View { world: &world, dns: &dns, pod_ips: &given, names: &NOTHING_LEARNED });
    let holder = |address: &str| match holders.holder(ip(address)).unwrap() {
        Holder::Pod(pod) => pod.name.name.clone(),
        Holder::Dns => "DNS".to_owned(),
        Holder::Node(node) => node.to_string(),
        Holder::UnknownPod(name) => name.to_string(),
    };
    assert_eq!(holder("10.0.0.1"), "web1", "a pod that stays, before one that terminates");
    assert_eq!(holder("10.0.1.1"), "cli1", "a pod on the node that owns the range");
    assert_eq!(holder("10.0.1.3"), "web2", "what this node gave out");
    assert_eq!(holder("192.0.2.2"), "n2");
    assert_eq!(holder("169.254.20.10"), "DNS");
}
