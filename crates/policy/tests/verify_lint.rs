//! `verify lint`: each code found where it is due and nowhere else; and what thousands of rules cost.

#![allow(clippy::unwrap_used, clippy::indexing_slicing, reason = "a test may panic, its helper functions too")]

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use towpath_model::{ClusterNetworkPolicy, Namespace, NamespacedName, NetworkPolicy, Pod, World};
use towpath_policy::verify::diff::diff;
use towpath_policy::verify::expect::Checker;
use towpath_policy::verify::lint::{Code, Finding, lint};
use towpath_policy::verify::prove::{Answer, Limits, prove};
use towpath_policy::verify::reach::reach;
use towpath_policy::verify::words::{Peers, PortWords};
use towpath_policy::verify::{Change, Expectation, Owners, Statement, Universe};

fn pod(namespace: &str, app: &str) -> Pod {
    let object = json!({"metadata": {"namespace": namespace, "name": app, "labels": {"app": app}},
        "spec": {"containers": [{"name": "c", "ports": [{"name": "http", "containerPort": 80}]}]}});
    Pod::try_from(&serde_json::from_value(object).unwrap()).unwrap()
}

/// Two pods in `shop`, one in `ops` (team=ops), and these policies.
fn universe(policies: &[(&str, Value)], cluster: &[(&str, Value)]) -> Universe {
    let mut world = World::default();
    for pod in [pod("shop", "web"), pod("shop", "db"), pod("ops", "monitor")] {
        world.pods.insert(pod.name.clone(), pod);
    }
    for (name, team) in [("shop", "shop"), ("ops", "ops")] {
        let object = json!({"metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name, "team": team}}});
        world
            .namespaces
            .insert(name.to_owned(), Namespace::try_from(&serde_json::from_value(object).unwrap()).unwrap());
    }
    for (name, spec) in policies {
        let (namespace, name) = name.split_once('/').unwrap();
        let object = json!({"metadata": {"namespace": namespace, "name": name}, "spec": spec});
        let policy = NetworkPolicy::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.policies.insert(policy.name.clone(), policy);
    }
    for (name, spec) in cluster {
        let object = json!({"metadata": {"name": name}, "spec": spec});
        let (policy, problems) = ClusterNetworkPolicy::fail_closed(&serde_json::from_value(object).unwrap()).unwrap();
        assert!(problems.is_empty(), "{problems:?}");
        world.cluster_policies.insert(policy.name.clone(), policy);
    }
    Universe::of(world, &Owners::new(), &[])
}

fn found(policies: &[(&str, Value)], cluster: &[(&str, Value)]) -> Vec<(Code, String, String)> {
    let findings = lint(&universe(policies, cluster));
    findings.into_iter().map(|Finding { code, object, field, .. }| (code, object, field)).collect()
}

fn one(code: Code, object: &str, field: &str) -> Vec<(Code, String, String)> {
    vec![(code, object.to_owned(), field.to_owned())]
}

fn web(ingress: Value) -> Value {
    json!({"podSelector": {"matchLabels": {"app": "web"}}, "policyTypes": ["Ingress"], "ingress": ingress})
}

#[test]
fn policies_that_say_what_they_mean_are_not_complained_about() {
    let dns = json!({"to": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
        "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}}}], "ports": [{"protocol": "UDP", "port": 53}]});
    let policies = [
        ("shop/closed", json!({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})),
        (
            "shop/web",
            web(json!([{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": "http"}]},
            {"from": [{"namespaceSelector": {"matchLabels": {"team": "ops"}}}]}])),
        ),
        (
            "shop/out",
            json!({"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"], "egress": [
            {"to": [{"podSelector": {"matchLabels": {"app": "web"}}}]}, dns]}),
        ),
    ];
    // That there is no DNS pod in the input is the one thing to say: its peer selects nobody here.
    let rest: Vec<_> = found(&policies, &[]).into_iter().filter(|(code, ..)| *code != Code::NoNamespace).collect();
    assert_eq!(rest, []);
}

#[test]
fn selectors_that_select_nothing_are_found_by_field() {
    let nobody = json!({"podSelector": {"matchLabels": {"app": "wbe"}}});
    assert_eq!(found(&[("shop/a", nobody)], &[]), one(Code::NoSubject, "NetworkPolicy shop/a", "spec.podSelector"));
    let elsewhere = json!({"podSelector": {}});
    assert_eq!(
        found(&[("empty/a", elsewhere)], &[]),
        one(Code::EmptyNamespace, "NetworkPolicy empty/a", "metadata.namespace")
    );
    let peer = web(
        json!([{"from": [{"podSelector": {"matchLabels": {"app": "db"}}}, {"podSelector": {"matchLabels": {"app": "x"}}}]}]),
    );
    assert_eq!(found(&[("shop/a", peer)], &[]), one(Code::NoPeer, "NetworkPolicy shop/a", "spec.ingress[0].from[1]"));
    let space = web(json!([{"from": [{"namespaceSelector": {"matchLabels": {"name": "ops"}}}]}]));
    assert_eq!(
        found(&[("shop/a", space)], &[]),
        one(Code::NoNamespace, "NetworkPolicy shop/a", "spec.ingress[0].from[0]")
    );
    let port = web(json!([{"from": [{"podSelector": {}}], "ports": [{"port": "http", "protocol": "UDP"}]}]));
    assert_eq!(found(&[("shop/a", port)], &[]), one(Code::NoPortName, "NetworkPolicy shop/a", "spec.ingress[0].ports"));
    let subject = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {"matchLabels": {"team": "none"}}}});
    assert_eq!(found(&[], &[("c", subject)]), one(Code::NoSubject, "ClusterNetworkPolicy c", "spec.subject"));
}

#[test]
fn a_rule_that_another_covers_is_found_and_one_that_is_only_similar_is_not() {
    let wide = json!({"from": [{"podSelector": {}}], "ports": [{"port": 80, "endPort": 90}]});
    let narrow = json!({"from": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": 85}]});
    let both = [("shop/a", web(json!([narrow, wide])))];
    assert_eq!(found(&both, &[]), one(Code::Shadowed, "NetworkPolicy shop/a", "spec.ingress[0].from[0]"));
    let beyond =
        json!({"from": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": 85, "endPort": 91}]});
    assert_eq!(found(&[("shop/a", web(json!([beyond, wide])))], &[]), []);
    let equal = [("shop/a", web(json!([wide, wide])))];
    assert_eq!(found(&equal, &[]), one(Code::Shadowed, "NetworkPolicy shop/a", "spec.ingress[1].from[0]"));
    // Another policy covers it only if it is about the same pods.
    let all = json!({"podSelector": {}, "ingress": [wide]});
    assert_eq!(
        found(&[("shop/a", web(json!([narrow]))), ("shop/b", all)], &[]),
        one(Code::Shadowed, "NetworkPolicy shop/a", "spec.ingress[0].from[0]")
    );
    let db = json!({"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [wide]});
    assert_eq!(found(&[("shop/a", web(json!([narrow]))), ("shop/b", db)], &[]), []);
}

#[test]
fn in_a_tier_what_is_asked_first_shadows_and_priorities_should_differ() {
    let policy = |priority: u32, action: &str, team: Value| {
        json!({"tier": "Admin", "priority": priority, "subject": {"namespaces": {}},
            "ingress": [{"action": action, "from": [{"namespaces": team}]}]})
    };
    let ops = || json!({"matchLabels": {"team": "ops"}});
    let later = [("a", policy(2, "Accept", ops())), ("b", policy(1, "Deny", json!({})))];
    assert_eq!(found(&[], &later), one(Code::Shadowed, "ClusterNetworkPolicy a", "spec.ingress[0].from[0]"));
    assert_eq!(found(&[], &[("a", policy(1, "Accept", ops())), ("b", policy(2, "Deny", json!({})))]), []);
    let tie = [("a", policy(1, "Accept", ops())), ("b", policy(1, "Deny", json!({})))];
    assert_eq!(found(&[], &tie), one(Code::SamePriority, "ClusterNetworkPolicy b", "spec.priority"));
    // A tier before NetworkPolicy decides over their rules too; one that passes does not.
    let rule = [("shop/a", web(json!([{"from": [{"namespaceSelector": ops()}]}])))];
    assert_eq!(
        found(&rule, &[("b", policy(1, "Deny", json!({})))]),
        one(Code::Shadowed, "NetworkPolicy shop/a", "spec.ingress[0].from[0]")
    );
    assert_eq!(found(&rule, &[("b", policy(1, "Pass", json!({})))]), []);
    // What is passed on first comes to the rule, whatever is denied after it.
    let pass = |pass: u32, deny: u32| {
        found(&rule, &[("a", policy(pass, "Pass", ops())), ("b", policy(deny, "Deny", json!({})))])
    };
    assert_eq!(pass(1, 2), []);
    let shadowed: Vec<String> =
        pass(2, 1).into_iter().map(|(code, object, _)| format!("{} {object}", code.id())).collect();
    assert_eq!(shadowed, ["TP004 ClusterNetworkPolicy a", "TP004 NetworkPolicy shop/a"]);
}

#[test]
fn egress_without_dns_is_found_and_egress_to_nothing_is_not() {
    let out = |egress: Value| json!({"podSelector": {}, "policyTypes": ["Egress"], "egress": egress});
    let api = json!({"to": [{"podSelector": {"matchLabels": {"app": "web"}}}], "ports": [{"port": 80}]});
    assert_eq!(found(&[("shop/a", out(json!([api])))], &[]), one(Code::NoDns, "NetworkPolicy shop/a", "spec.egress"));
    assert_eq!(found(&[("shop/a", out(json!([])))], &[]), []);
    let any = json!({"ports": [{"port": 53, "protocol": "UDP"}]});
    assert_eq!(found(&[("shop/a", out(json!([api]))), ("shop/dns", out(json!([any])))], &[]), []);
    let tcp = json!({"ports": [{"port": 53}]});
    assert_eq!(found(&[("shop/a", out(json!([tcp])))], &[]), one(Code::NoDns, "NetworkPolicy shop/a", "spec.egress"));
}

#[test]
fn blocks_over_pods_are_found_by_how_much_of_them_they_hold() {
    let block = |cidr: &str, except: Value| web(json!([{"from": [{"ipBlock": {"cidr": cidr, "except": except}}]}]));
    let at = "spec.ingress[0].from[0]";
    assert_eq!(
        found(&[("shop/a", block("10.244.3.0/24", json!([])))], &[]),
        one(Code::PartOfPods, "NetworkPolicy shop/a", at)
    );
    assert_eq!(
        found(&[("shop/a", block("0.0.0.0/0", json!([])))], &[]),
        one(Code::AllPods, "NetworkPolicy shop/a", at)
    );
    assert_eq!(found(&[("shop/a", block("0.0.0.0/0", json!(["10.244.0.0/16"])))], &[]), []);
    assert_eq!(found(&[("shop/a", block("::/0", json!([])))], &[]), []);
}

#[test]
fn codes_are_stable_and_each_says_what_to_do() {
    let ids: Vec<&str> = Code::ALL.iter().map(|code| code.id()).collect();
    let wanted: Vec<String> = (1..=ids.len()).map(|n| format!("TP{n:03}")).collect();
    assert_eq!(ids, wanted);
    let titles: BTreeSet<&str> = Code::ALL.iter().map(|code| code.title()).collect();
    assert_eq!(titles.len(), ids.len());
    assert!(Code::ALL.iter().all(|code| code.advice().ends_with('.')));
}

/// A policy with ten thousand rules, each a block with holes, a selector with every operator, a range of ports, a port by name.
fn hostile() -> Universe {
    let rule = |n: u32| {
        let (a, b) = (n / 250 % 250, n % 250);
        json!({"from": [
            {"ipBlock": {"cidr": format!("10.{a}.{b}.0/24"), "except": [format!("10.{a}.{b}.128/25"), format!("10.{a}.{b}.7/32")]}},
            {"namespaceSelector": {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": [format!("t{n}")]}]},
             "podSelector": {"matchLabels": {"app": format!("a{n}")}, "matchExpressions": [{"key": format!("k{}", n % 50), "operator": "Exists"}, {"key": "old", "operator": "DoesNotExist"}]}}],
            "ports": [{"port": 1 + n % 60000, "endPort": 5000 + n % 60000}, {"port": format!("p{}", n % 100)}]})
    };
    let rules: Vec<Value> = (0..10_000).map(rule).collect();
    universe(&[("shop/huge", json!({"podSelector": {}, "ingress": rules}))], &[])
}

#[test]
fn ten_thousand_rules_take_bounded_time() {
    let begun = Instant::now();
    let (universe, none) = (hostile(), Owners::new());
    assert!(!reach(&universe, None).rows.is_empty());
    let side = || (universe.world.clone(), &none);
    assert!(diff(&Change::of(side(), side(), &[])).is_empty());
    let mut checker = Checker::of(&universe);
    let set = |text: &str| Peers::parse(text).unwrap();
    let expectation = Expectation {
        allow: false,
        from: set("outside"),
        to: set("shop/web"),
        ports: PortWords::parse("icmp").unwrap(),
    };
    assert!(checker.check(&expectation).unwrap().failures.is_empty());
    assert!(lint(&universe).len() > 100);
    let ask = |text: &str| {
        prove(&universe, &Statement::parse(text).unwrap(), &Limits { steps: 2_000_000, known_namespaces: false })
    };
    assert!(matches!(
        ask("nothing outside namespace shop reaches any pod in namespace shop on icmp"),
        Ok(Answer::Proved { .. })
    ));
    let Ok(Answer::Disproved(_)) = ask("nothing reaches any pod in namespace shop") else { panic!("it is open") };
    // Whether everything is closed that no rule names takes all of them at once: an answer, or that there is none.
    let _ = ask("everything app=a1 reaches any pod in namespace shop on 80");
    assert!(begun.elapsed() < Duration::from_secs(120), "{:?}", begun.elapsed());
}

#[test]
fn expectations_about_nobody_are_no_answer() {
    let universe = universe(&[("shop/web", web(json!([])))], &[]);
    let mut checker = Checker::of(&universe);
    let mut check = |allow: bool, from: &str, to: &str, ports: &str| {
        let (from, to) = (Peers::parse(from).unwrap(), Peers::parse(to).unwrap());
        checker.check(&Expectation { allow, from, to, ports: PortWords::parse(ports).unwrap() })
    };
    for (from, to, ports, why) in [
        ("shop/nobody", "shop/web", "80", "there is no workload or pod shop/nobody"),
        ("pods app=x", "shop/web", "80", "nobody here is that"),
        ("node/n1", "shop/web", "80", "there is no node n1"),
        ("shop/web", "shop/web", "80", "no policy is between these"),
        ("shop/db", "shop/web", "sql", "shop/web has no TCP port of that name"),
        ("shop/web", "outside", "http", "an address outside has no TCP port of that name"),
    ] {
        let error = check(true, from, to, ports).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    assert_eq!(check(false, "anything", "shop/web", "any port").unwrap().failures.len(), 0);
    let failed = check(true, "shop/db or outside", "app=web", "http").unwrap();
    let text: Vec<String> = failed.failures.iter().map(|f| format!("{} {} {}", f.from, f.to, f.ports)).collect();
    assert_eq!(text, ["shop/db shop/web TCP 80", "outside (IPv4) shop/web TCP 80"]);
    assert!(failed.failures[0].decision.to_string().contains("isolated by NetworkPolicy shop/web"));
    let name = NamespacedName::new("shop", "web");
    assert!(universe.world.pods.contains_key(&name));
}

#[test]
fn names_of_domains_are_found_without_any_pod() {
    let rule = json!([{"action": "Accept", "to": [{"domainNames": ["example.com"]}]}]);
    let spec = json!({"tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": rule});
    let mut bare = universe(&[], &[("c", spec)]).world;
    bare.pods.clear();
    let codes: Vec<Code> = lint(&Universe::of(bare, &Owners::new(), &[])).into_iter().map(|f| f.code).collect();
    assert_eq!(codes, [Code::Domains]);
}
