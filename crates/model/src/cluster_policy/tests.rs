//! What the definition allows, what it refuses, and what stands for what is not understood.

use serde_json::{Value, json};

use super::*;
use crate::{Labels, PortMatch, Protocol};

fn object(spec: Value) -> object::ClusterNetworkPolicy {
    let object = json!({"apiVersion": object::API_VERSION, "kind": "ClusterNetworkPolicy", "metadata": {"name": "p"}, "spec": spec});
    serde_json::from_value(object).unwrap()
}

fn with(rule: Value) -> object::ClusterNetworkPolicy {
    object(json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}}, "egress": [rule]}))
}

fn web() -> Labels {
    [("app".to_owned(), "web".to_owned())].into()
}

#[test]
fn every_field_is_read() {
    let policy = ClusterNetworkPolicy::try_from(&object(json!({
        "tier": "Baseline", "priority": 1000,
        "subject": {"pods": {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}}},
        "ingress": [{"name": "in", "action": "Deny", "from": [{"namespaces": {}}, {"pods": {"namespaceSelector": {}, "podSelector": {}}}],
            "protocols": [{"destinationNamedPort": "http"}, {"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}}]}],
        "egress": [
            {"action": "Pass", "to": [{"nodes": {"matchLabels": {"app": "web"}}}], "protocols": [{"sctp": {"destinationPort": {"number": 9}}}]},
            {"action": "Accept", "to": [{"networks": ["10.1.2.3/8", "fd00::/8"]}, {"domainNames": ["*.Example.COM.", "a.b"]}]}],
    })))
    .unwrap();
    assert_eq!((policy.tier, policy.priority, policy.name.as_str()), (Tier::Baseline, 1000, "p"));
    assert!(policy.subject.namespaces.is_everything() && policy.subject.pods.matches(&web()));
    let rule = &policy.ingress[0];
    assert_eq!((rule.name.as_str(), rule.action, rule.peers.len()), ("in", Action::Deny, 2));
    let udp = ProtocolMatch::Ports(PolicyPort { protocol: Protocol::Udp, port: PortMatch::Range(1, 65535) });
    assert_eq!(rule.protocols, [ProtocolMatch::NamedPort("http".to_owned()), udp]);
    assert!(matches!(&policy.egress[0].peers[..], [ClusterPeer::Nodes(nodes)] if nodes.matches(&web())));
    let ClusterPeer::Networks(nets) = &policy.egress[1].peers[0] else { panic!("{policy:?}") };
    assert_eq!(nets.iter().map(ToString::to_string).collect::<Vec<_>>(), ["10.0.0.0/8", "fd00::/8"]);
    assert!(policy.has_domain_names() && policy.has_nodes());
}

#[test]
fn a_peer_or_protocol_of_a_later_version_closes_its_rule_only() {
    let rest = json!({"name": "rest", "action": "Accept", "to": [{"namespaces": {}}]});
    let later = [
        json!({"to": [{"services": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"icmp": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"sourcePort": 1}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"set": [1]}}}]}),
        json!({"to": [{"namespaces": {"matchExpressions": [{"key": "a", "operator": "Near"}]}}]}),
        json!({"to": []}),
        json!({"to": [{"networks": ["10.0.0.0/33"]}]}),
        json!({"to": [{"networks": ["::ffff:10.0.0.0/104"]}]}),
        json!({"to": [{"nodes": {}}], "protocols": [{"destinationNamedPort": "http"}]}),
        json!({"to": [{"namespaces": {}, "nodes": {}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"number": 0}}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"number": 65536}}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": [{"tcp": {"destinationPort": {"range": {"start": 5, "end": 5}}}}]}),
        json!({"to": [{"namespaces": {}}], "protocols": []}),
        json!({"to": [{"domainNames": ["nodots"]}]}),
        json!({"to": [{"networks": [{"cidr": "10.0.0.0/8"}]}]}),
        json!({"to": {"everybody": true}}),
    ];
    for strange in later {
        for action in ["Accept", "Deny", "Pass", "Log"] {
            let mut rule = strange.clone();
            rule["action"] = json!(action);
            let object =
                object(json!({"tier": "Admin", "priority": 0, "subject": {"namespaces": {}}, "egress": [rule, rest]}));
            assert!(ClusterNetworkPolicy::try_from(&object).is_err(), "{strange}");
            let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
            assert_eq!((problems.len(), policy.egress.len()), (1, 2), "{problems:?}");
            assert!(problems[0].to_string().contains("spec.egress[0]"), "{}", problems[0]);
            let closed = &policy.egress[0];
            match action {
                "Accept" => assert!(closed.peers.is_empty() && closed.action == Action::Accept),
                _ => assert!(closed.peers == [ClusterPeer::Everybody] && closed.action == Action::Deny, "{closed:?}"),
            }
            assert!(closed.protocols.is_empty());
            assert_eq!((policy.egress[1].name.as_str(), policy.egress[1].peers.len()), ("rest", 1));
        }
    }
}

#[test]
fn domain_names_are_for_accept_only_and_egress_peers_are_for_egress_only() {
    let names = |action: &str| with(json!({"action": action, "to": [{"domainNames": ["a.example"]}]}));
    assert!(ClusterNetworkPolicy::try_from(&names("Accept")).is_ok());
    let problem = ClusterNetworkPolicy::try_from(&names("Deny")).unwrap_err();
    assert_eq!(
        problem.to_string(),
        "ClusterNetworkPolicy p: spec.egress[0].to: domainNames may stand in Accept rules only"
    );
    let ingress = json!({"tier": "Admin", "priority": 5, "subject": {"namespaces": {}},
        "ingress": [{"action": "Accept", "from": [{"networks": ["10.0.0.0/8"]}]}]});
    assert!(ClusterNetworkPolicy::try_from(&object(ingress)).is_err());
}

#[test]
fn a_policy_of_which_it_is_not_known_where_it_stands_or_for_whom_only_denies() {
    let rules = json!([
        {"action": "Accept", "from": [{"namespaces": {}}]},
        {"action": "Deny", "from": [{"namespaces": {"matchLabels": {"app": "web"}}}]},
        {"action": "Pass", "from": [{"namespaces": {"matchLabels": {"app": "web"}}}]}]);
    let namespaces = json!({"namespaces": {"matchLabels": {"app": "web"}}});
    for (tier, subject) in [("Platform", namespaces), ("Baseline", json!({"serviceAccounts": {}}))] {
        let object = object(json!({"tier": tier, "priority": 7, "subject": subject, "ingress": rules}));
        let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
        assert_eq!(problems.len(), 1);
        assert!(policy.ingress[0].peers.is_empty());
        let denies = policy.ingress.iter().skip(1).all(|r| r.action == Action::Deny && r.peers.len() == 1);
        assert!(denies && policy.priority == 0, "{policy:?}");
    }
}

#[test]
fn what_is_too_much_is_a_problem_and_still_holds() {
    let deny = json!({"action": "Deny", "to": [{"namespaces": {}}]});
    let object =
        object(json!({"tier": "Admin", "priority": 1001, "subject": {"namespaces": {}}, "egress": vec![deny; 26]}));
    let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
    assert_eq!(policy.egress.len(), 26);
    assert!(policy.egress.iter().all(|rule| rule.action == Action::Deny && rule.peers.len() == 1));
    let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
    assert_eq!(
        told,
        [
            "ClusterNetworkPolicy p: spec.priority: 1001; it must be between 0 and 1000",
            "ClusterNetworkPolicy p: spec.egress: 26 items; at most 25 are allowed"
        ]
    );
    assert_eq!(policy.priority, 1000);
    let networks: Vec<String> = (0..26).map(|n| format!("10.{n}.0.0/16")).collect();
    let many = with(json!({"action": "Deny", "name": "n".repeat(101), "to": [{"networks": networks}]}));
    let (policy, problems) = ClusterNetworkPolicy::fail_closed(&many).unwrap();
    assert!(matches!(&policy.egress[0].peers[..], [ClusterPeer::Networks(nets)] if nets.len() == 26), "{problems:?}");
}

#[test]
fn a_star_stands_for_one_label_or_more_and_only_in_front() {
    let policy = ClusterNetworkPolicy::try_from(&with(
        json!({"action": "Accept", "to": [{"domainNames": ["*.kubernetes.io"]}]}),
    ));
    let ClusterPeer::DomainNames(names) = &policy.unwrap().egress[0].peers[0] else { panic!() };
    for (name, fits) in [
        ("www.kubernetes.io", true),
        ("latest.blog.Kubernetes.io.", true),
        ("kubernetes.io", false),
        (".kubernetes.io", false),
        ("mykubernetes.io", false),
        ("wikipedia.org", false),
    ] {
        assert_eq!(names[0].matches(name), fits, "{name}");
    }
    for bad in ["*", "*.", "a.*.b", "a..b", "-a.b", "a.b-", "a b.c", ""] {
        let object = with(json!({"action": "Accept", "to": [{"domainNames": [bad]}]}));
        assert!(ClusterNetworkPolicy::try_from(&object).is_err(), "{bad:?}");
    }
}

#[test]
fn null_is_an_empty_list_as_go_has_it() {
    let text = json!({"metadata": {"name": "p"}, "spec": {"tier": "Admin", "priority": 1, "subject": {"namespaces": {}},
        "ingress": null, "egress": [{"action": "Deny", "to": null, "protocols": null}]}});
    let object: object::ClusterNetworkPolicy = serde_json::from_value(text).unwrap();
    let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
    assert_eq!(problems.len(), 1);
    assert_eq!(policy.egress[0].peers, [ClusterPeer::Everybody]);
}

#[test]
fn a_field_of_another_type_costs_what_it_is_in_and_nothing_else() {
    let text = json!({"metadata": {"name": "p"}, "spec": {"tier": 5, "priority": "high", "subject": ["all"], "ingress": {"a": 1}}});
    let object: object::ClusterNetworkPolicy = serde_json::from_value(text).unwrap();
    let (policy, problems) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
    assert_eq!(problems.len(), 4, "{problems:?}");
    assert_eq!((policy.tier, policy.priority, policy.subject), (Tier::Admin, 0, Subject::default()));
    assert_eq!(policy.ingress[0].peers, [ClusterPeer::Everybody]);
}
