//! The recipes of the Kubernetes documentation, each with the traffic it names.

use super::*;
use k8s_openapi::serde_json::{Value, from_value, json};

fn pod(namespace: &str, name: &str, label: &str, ip: &str) -> Pod {
    from_value(json!({
        "metadata": {"namespace": namespace, "name": name, "labels": {"app": label}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}]}]},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]}
    }))
    .unwrap()
}

fn cluster(spec: Value) -> Cluster {
    let namespace = |name: &str| from_value(json!({"metadata": {"name": name, "labels": {"team": name}}})).unwrap();
    Cluster {
        nodes: vec![from_value(json!({"metadata": {"name": "n1"}, "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.1"}]}})).unwrap()],
        namespaces: vec![namespace("one"), namespace("two")],
        pods: vec![
            pod("one", "web", "web", "10.0.0.1"),
            pod("one", "cli", "cli", "10.0.0.2"),
            pod("two", "cli", "cli", "10.0.1.2"),
        ],
        policies: vec![from_value(json!({"metadata": {"namespace": "one", "name": "p"}, "spec": spec})).unwrap()],
        cluster_policies: Vec::new(),
        names: Vec::new(),
    }
}

fn reaches(cluster: &Cluster, from: &str, to: &str, protocol: &str, port: u16) -> bool {
    allowed(cluster, &Traffic { from: from.parse().unwrap(), to: to.parse().unwrap(), protocol, port })
}

#[test]
fn default_deny_ingress_isolates_the_namespace_but_not_from_the_own_node_nor_itself() {
    let cluster = cluster(json!({"podSelector": {}, "policyTypes": ["Ingress"]}));
    assert!(!reaches(&cluster, "10.0.1.2", "10.0.0.1", "TCP", 80));
    assert!(!reaches(&cluster, "198.51.100.1", "10.0.0.1", "TCP", 80));
    assert!(reaches(&cluster, "10.0.0.1", "10.0.1.2", "TCP", 80));
    assert!(reaches(&cluster, "10.0.0.1", "198.51.100.1", "TCP", 80));
    assert!(reaches(&cluster, "192.0.2.1", "10.0.0.1", "TCP", 80));
    assert!(reaches(&cluster, "10.0.0.1", "10.0.0.1", "TCP", 80));
}

#[test]
fn a_rule_without_peers_and_ports_allows_all() {
    let cluster = cluster(json!({"podSelector": {}, "ingress": [{}]}));
    assert!(reaches(&cluster, "198.51.100.1", "10.0.0.1", "ICMP", 0));
}

#[test]
fn selectors_in_one_entry_are_anded_and_in_two_ored() {
    let both =
        json!({"namespaceSelector": {"matchLabels": {"team": "two"}}, "podSelector": {"matchLabels": {"app": "web"}}});
    let anded = cluster(json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [both]}]}));
    assert!(!reaches(&anded, "10.0.1.2", "10.0.0.1", "TCP", 80));
    let ored = cluster(json!({"podSelector": {"matchLabels": {"app": "web"}}, "ingress": [{"from": [
        {"namespaceSelector": {"matchLabels": {"team": "two"}}}, {"podSelector": {"matchLabels": {"app": "web"}}}]}]}));
    assert!(reaches(&ored, "10.0.1.2", "10.0.0.1", "TCP", 80));
    assert!(!reaches(&ored, "10.0.0.2", "10.0.0.1", "TCP", 80));
}

#[test]
fn blocks_have_holes_and_families() {
    let cluster = cluster(json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"to": [
        {"ipBlock": {"cidr": "0.0.0.0/0", "except": ["198.51.100.0/24"]}}], "ports": [{"port": 32000, "endPort": 32768}]}]}));
    assert!(reaches(&cluster, "10.0.0.1", "203.0.113.1", "TCP", 32768));
    assert!(!reaches(&cluster, "10.0.0.1", "203.0.113.1", "TCP", 32769));
    assert!(!reaches(&cluster, "10.0.0.1", "198.51.100.7", "TCP", 32000));
    assert!(!reaches(&cluster, "10.0.0.1", "2001:db8::1", "TCP", 32000));
    assert!(!reaches(&cluster, "10.0.0.1", "203.0.113.1", "UDP", 32000));
}

#[test]
fn named_ports_are_those_of_the_destination() {
    let ingress = cluster(json!({"podSelector": {}, "ingress": [{"ports": [{"port": "http"}]}]}));
    assert!(reaches(&ingress, "10.0.1.2", "10.0.0.1", "TCP", 80));
    assert!(!reaches(&ingress, "10.0.1.2", "10.0.0.1", "TCP", 81));
    let egress =
        cluster(json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": [{"ports": [{"port": "http"}]}]}));
    assert!(reaches(&egress, "10.0.0.1", "10.0.1.2", "TCP", 80));
    assert!(!reaches(&egress, "10.0.0.1", "198.51.100.1", "TCP", 80));
}

fn admin(priority: i32, ingress: Value) -> Value {
    json!({"metadata": {"name": format!("p{priority}")}, "spec": {"tier": "Admin", "priority": priority,
        "subject": {"namespaces": {"matchLabels": {"team": "one"}}}, "ingress": ingress}})
}

#[test]
fn the_admin_tier_comes_before_network_policies_and_the_baseline_behind_them() {
    let deny = json!([{"action": "Deny", "from": [{"namespaces": {}}]}]);
    let mut cluster = cluster(json!({"podSelector": {}, "ingress": [{}]}));
    let mut baseline = admin(1, deny.clone());
    baseline["spec"]["tier"] = json!("Baseline");
    cluster.cluster_policies = vec![baseline];
    assert!(reaches(&cluster, "10.0.1.2", "10.0.0.1", "TCP", 80), "a NetworkPolicy selects it");
    let open = std::mem::take(&mut cluster.policies);
    assert!(!reaches(&cluster, "10.0.1.2", "10.0.0.1", "TCP", 80));
    cluster.cluster_policies = vec![admin(1, deny.clone())];
    cluster.policies = open;
    assert!(!reaches(&cluster, "10.0.1.2", "10.0.0.1", "TCP", 80));
    assert!(reaches(&cluster, "198.51.100.1", "10.0.0.1", "TCP", 80), "no isolation");
    let pass = json!([{"action": "Pass", "from": [{"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "cli"}}}}]}]);
    cluster.cluster_policies.push(admin(0, pass));
    assert!(reaches(&cluster, "10.0.1.2", "10.0.0.1", "TCP", 80), "passed to the NetworkPolicy");
}
