//! Decisions of the walkthrough's policies, with the reasons a person reads.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

mod cluster;

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde_json::{Value, json};
use towpath_model::desired::{RowProtocol, Verdict};
use towpath_model::{Direction, Protocol, World};
use towpath_oracle::Cluster;
use towpath_policy::names::NOTHING_LEARNED;
use towpath_policy::{Decision, Flow, Reason, View, evaluate};

const TCP: RowProtocol = RowProtocol::Ports(Protocol::Tcp);
const UDP: RowProtocol = RowProtocol::Ports(Protocol::Udp);
const NGINX: &str = "10.244.1.2";
const BUSYBOX: &str = "10.244.2.2";
const NODE: &str = "192.0.2.1";
const DNS: &str = "169.254.20.10";

fn pod(name: &str, labels: Value, ip: &str) -> Value {
    json!({"metadata": {"namespace": "default", "name": name, "labels": labels},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 8080}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]}})
}

fn policy(name: &str, spec: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name}, "spec": spec})
}

fn cluster(busybox: Value, policies: Vec<Value>) -> World {
    let from = |v: Value| serde_json::from_value(v).unwrap();
    cluster::world(&Cluster {
        nodes: vec![
            serde_json::from_value(json!({"metadata": {"name": "n1"},
                "status": {"addresses": [{"type": "InternalIP", "address": NODE}]}}))
            .unwrap(),
        ],
        namespaces: Vec::new(),
        pods: [pod("nginx", json!({"aa": "aa1"}), NGINX), pod("busybox", busybox, BUSYBOX)].map(from).to_vec(),
        policies: policies.into_iter().map(cluster::policy_object).collect(),
        cluster_policies: Vec::new(),
        names: Vec::new(),
    })
}

fn walkthrough() -> Value {
    policy(
        "test-network-policy",
        json!({"podSelector": {"matchLabels": {"aa": "aa1"}}, "policyTypes": ["Ingress"], "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"xx": "xx"}}}], "ports": [{"protocol": "TCP", "port": 80}]}]}),
    )
}

fn ask(world: &World, from: &str, to: &str, protocol: RowProtocol, port: u16) -> Decision {
    let dns: Vec<IpAddr> = vec![DNS.parse().unwrap()];
    let given = BTreeMap::new();
    let view = View { world, dns: &dns, pod_ips: &given, names: &NOTHING_LEARNED };
    evaluate(&view, &Flow::new(from.parse().unwrap(), to.parse().unwrap(), protocol, port))
}

fn ingress(decision: &Decision) -> String {
    decision.ingress.as_ref().unwrap().to_string()
}

#[test]
fn a_missing_label_is_named_as_what_the_nearest_rule_wants() {
    let world = cluster(json!({}), vec![walkthrough()]);
    let decision = ask(&world, BUSYBOX, NGINX, TCP, 80);
    assert_eq!(decision.verdict, Verdict::Deny);
    assert_eq!(
        ingress(&decision),
        "ingress of pod default/nginx: denied: isolated by NetworkPolicy default/test-network-policy; nearest rule \
         NetworkPolicy default/test-network-policy: spec.ingress[0] from[0] ports[0]: it wants a pod with xx=xx in namespace default"
    );
    assert_eq!(decision.egress.unwrap().reason, Reason::NotIsolated);
}

#[test]
fn with_the_label_port_80_passes_and_ping_does_not() {
    let world = cluster(json!({"xx": "xx"}), vec![walkthrough()]);
    let allowed = ask(&world, BUSYBOX, NGINX, TCP, 80);
    assert_eq!(allowed.verdict, Verdict::Allow);
    assert_eq!(
        ingress(&allowed),
        "ingress of pod default/nginx: allowed: NetworkPolicy default/test-network-policy: spec.ingress[0] from[0] ports[0]"
    );
    let ping = ask(&world, BUSYBOX, NGINX, RowProtocol::Other, 0);
    assert_eq!(ping.verdict, Verdict::Deny);
    assert!(ingress(&ping).ends_with("ports[0]: it wants TCP, this is a protocol without ports"), "{}", ingress(&ping));
    let other = ask(&world, BUSYBOX, NGINX, TCP, 81);
    assert!(ingress(&other).ends_with("ports[0]: it wants port 80, this is 81"), "{}", ingress(&other));
    let udp = ask(&world, BUSYBOX, NGINX, UDP, 80);
    assert!(ingress(&udp).ends_with("ports[0]: it wants TCP, this is UDP"), "{}", ingress(&udp));
}

#[test]
fn of_several_rules_the_one_with_the_least_wrong_is_shown() {
    let more = policy(
        "another",
        json!({"podSelector": {}, "ingress": [
            {"from": [{"ipBlock": {"cidr": "192.168.26.0/24", "except": ["192.168.26.128/25"]}}], "ports": [{"port": 81}]},
            {"from": [{"podSelector": {"matchLabels": {"xx": "xx"}}}], "ports": [{"port": "http"}]}]}),
    );
    let world = cluster(json!({"xx": "xx"}), vec![more]);
    let text = ingress(&ask(&world, BUSYBOX, NGINX, TCP, 82));
    assert!(
        text.ends_with("spec.ingress[1] from[0] ports[0]: it wants port http (8080 in the pod), this is 82"),
        "{text}"
    );
    let text = ingress(&ask(&world, "198.51.100.1", NGINX, TCP, 81));
    assert!(
        text.ends_with(
            "spec.ingress[0] from[0] ports[0]: it wants an address in 192.168.26.0/24 except 192.168.26.128/25"
        ),
        "{text}"
    );
}

#[test]
fn the_own_node_reaches_an_isolated_pod_but_what_it_only_forwards_does_not() {
    let world = cluster(json!({}), vec![policy("deny", json!({"podSelector": {}}))]);
    assert_eq!(ask(&world, NODE, NGINX, TCP, 80).verdict, Verdict::Allow);
    let mut flow = Flow::new(NODE.parse().unwrap(), NGINX.parse().unwrap(), TCP, 80);
    flow.forwarded = true;
    assert_eq!(evaluate(&View::of(&world), &flow).verdict, Verdict::Deny);
    let text = ingress(&ask(&world, BUSYBOX, NGINX, TCP, 80));
    assert!(text.ends_with("isolated by NetworkPolicy default/deny; no rule allows anything"), "{text}");
    assert_eq!(ask(&world, NGINX, NGINX, TCP, 80).verdict, Verdict::Allow);
}

#[test]
fn a_pod_that_the_api_has_not_told_us_of_has_only_its_own_node_in_reach() {
    let mut world = cluster(json!({}), vec![]);
    world.nodes.values_mut().for_each(|n| n.pod_cidrs = vec!["10.244.9.0/24".parse().unwrap()]);
    let new: IpAddr = "10.244.9.9".parse().unwrap();
    let external: IpAddr = "203.0.113.77".parse().unwrap();
    world.nodes.values_mut().for_each(|n| n.other_ips = vec![external]);
    let given = BTreeMap::from([(cluster::named("default", "new"), vec![new])]);
    let view = View { world: &world, dns: &[], pod_ips: &given, names: &NOTHING_LEARNED };
    // What the node sends is its own whatever address it carries; as a destination the kernel knows the internal one.
    assert_eq!(evaluate(&view, &Flow::new(external, new, TCP, 80)).verdict, Verdict::Allow);
    assert_eq!(evaluate(&view, &Flow::new(new, external, TCP, 80)).verdict, Verdict::Deny);
    let node: IpAddr = NODE.parse().unwrap();
    assert_eq!(evaluate(&view, &Flow::new(node, new, TCP, 80)).verdict, Verdict::Allow);
    assert_eq!(evaluate(&view, &Flow::new(new, node, TCP, 80)).verdict, Verdict::Allow);
    assert_eq!(evaluate(&view, &Flow { forwarded: true, ..Flow::new(node, new, TCP, 80) }).verdict, Verdict::Deny);
    assert_eq!(evaluate(&view, &Flow::new(new, new, TCP, 80)).verdict, Verdict::Allow, "itself");
    for peer in [NGINX, "198.51.100.1"] {
        let decision = evaluate(&view, &Flow::new(new, peer.parse().unwrap(), TCP, 80));
        assert_eq!(
            decision.egress.unwrap().to_string(),
            "egress of pod default/new: denied: its labels are not known yet, so only its own node is in reach"
        );
        assert_eq!(evaluate(&view, &Flow::new(peer.parse().unwrap(), new, TCP, 80)).verdict, Verdict::Deny);
    }
}

#[test]
fn the_usual_allow_dns_policy_reaches_the_node_local_address_and_a_block_does_not() {
    let egress = |rule: Value| policy("out", json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [rule]}));
    let usual = egress(json!({"to": [{
        "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}], "ports": [{"protocol": "UDP", "port": 53}, {"port": "dns-tcp"}]}));
    let world = cluster(json!({}), vec![usual]);
    assert_eq!(ask(&world, NGINX, DNS, UDP, 53).verdict, Verdict::Allow);
    assert_eq!(ask(&world, NGINX, DNS, TCP, 53).verdict, Verdict::Allow);
    assert_eq!(ask(&world, NGINX, DNS, TCP, 54).verdict, Verdict::Deny);
    let world = cluster(json!({}), vec![egress(json!({"to": [{"ipBlock": {"cidr": "192.168.26.0/24"}}]}))]);
    assert_eq!(ask(&world, NGINX, DNS, UDP, 53).verdict, Verdict::Deny);
}

#[test]
fn a_decision_is_json_that_tools_can_read() {
    let world = cluster(json!({}), vec![walkthrough()]);
    let decision = ask(&world, BUSYBOX, NGINX, TCP, 81);
    assert_eq!(
        serde_json::to_value(&decision.ingress).unwrap(),
        json!({
            "pod": {"namespace": "default", "name": "nginx"}, "direction": "Ingress", "verdict": "deny",
            "reason": {"type": "default-deny", "isolating": [{"namespace": "default", "name": "test-network-policy"}],
                "nearest": {
                    "rule": {"policy": {"namespace": "default", "name": "test-network-policy"}, "direction": "Ingress",
                        "rule": 0, "peer": 0, "port": 0},
                    "mismatches": [
                        {"field": "port", "wanted": "80", "found": 81},
                        {"field": "peer", "wanted": "a pod with xx=xx in namespace default"}]}}
        })
    );
    assert_eq!(decision.ingress.unwrap().direction, Direction::Ingress);
}

/// The walkthrough's policy, and ClusterNetworkPolicies around it: name, tier, priority, rules for ingress.
fn with_tiers(policies: &[(&str, &str, u16, Value)]) -> World {
    let mut world = cluster(json!({"xx": "xx"}), vec![walkthrough()]);
    for (name, tier, priority, ingress) in policies {
        let object = json!({"metadata": {"name": name}, "spec": {"tier": tier, "priority": priority,
            "subject": {"namespaces": {}}, "ingress": ingress}});
        let object: towpath_model::cluster_policy::object::ClusterNetworkPolicy =
            serde_json::from_value(object).unwrap();
        let policy = towpath_model::ClusterNetworkPolicy::try_from(&object).unwrap();
        world.cluster_policies.insert(policy.name.clone(), policy);
    }
    world
}

#[test]
fn a_rule_of_a_tier_is_named_with_the_rule_that_passed_the_flow_on() {
    let everybody = json!([{"namespaces": {}}]);
    let deny = json!([{"name": "nobody", "action": "Deny", "from": everybody, "protocols": [{"destinationNamedPort": "http"}]}]);
    let world = with_tiers(&[("closed", "Admin", 10, deny.clone())]);
    let denied = ask(&world, BUSYBOX, NGINX, TCP, 8080);
    assert_eq!(
        ingress(&denied),
        "ingress of pod default/nginx: denied: ClusterNetworkPolicy admin/closed: spec.ingress[0] \"nobody\" from[0] protocols[0]"
    );
    assert_eq!(
        serde_json::to_value(&denied.ingress).unwrap()["reason"]["rule"],
        json!({"policy": {"tier": "Admin", "name": "closed"}, "direction": "Ingress", "rule": 0, "name": "nobody", "peer": 0, "port": 0})
    );
    let pass = json!([{"action": "Pass", "from": everybody}]);
    let world = with_tiers(&[("closed", "Admin", 10, deny.clone()), ("open", "Admin", 9, pass)]);
    assert_eq!(
        ingress(&ask(&world, BUSYBOX, NGINX, TCP, 80)),
        "ingress of pod default/nginx: allowed: NetworkPolicy default/test-network-policy: spec.ingress[0] from[0] ports[0]; \
         passed on by ClusterNetworkPolicy admin/open: spec.ingress[0] from[0]"
    );
    let world = with_tiers(&[("closed", "Baseline", 10, deny)]);
    assert!(ingress(&ask(&world, BUSYBOX, NGINX, TCP, 8080)).contains("isolated by NetworkPolicy"), "not the baseline");
    assert!(ingress(&ask(&world, NGINX, BUSYBOX, TCP, 8080)).contains("denied: ClusterNetworkPolicy baseline/closed"));
}
