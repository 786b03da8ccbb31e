//! The list of checks, the judgement and the report, without a cluster.

use std::net::IpAddr;

use super::checks::{self, Actor, Asked, Cast, Phase, ServiceFacts, Want};
use super::judge::{self, CheckResult, Status};
use super::manifests::{self, Role};
use super::report::Report;
use super::stage::NodeFacts;
use crate::probe::{Action, Answer, Outcome, Served};

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn cast() -> Cast {
    let node = |n: u8| NodeFacts { name: format!("n{n}"), addresses: vec![IpAddr::from([192, 0, 2, n])] };
    let mut cast = Cast::new("ns", vec![node(1), node(2)], 18116);
    for n in 1..=2_u8 {
        for (role, last) in [(Role::Client, 10), (Role::Server, 20)] {
            let ips = vec![IpAddr::from([10, 244, n, last])];
            cast.add(role, Actor { pod: format!("{}-{n}", role.name()), node: format!("n{n}"), ips });
        }
        let ips = vec![IpAddr::from([192, 0, 2, n])];
        cast.add(Role::Host, Actor { pod: format!("host-{n}"), node: format!("n{n}"), ips });
    }
    for (role, last) in [(Role::Guarded, 30), (Role::HostPort, 40)] {
        let ips = vec![IpAddr::from([10, 244, 1, last])];
        cast.add(role, Actor { pod: format!("{}-1", role.name()), node: "n1".to_owned(), ips });
    }
    for (name, last) in [("web", 1), ("self", 2)] {
        let facts = ServiceFacts {
            cluster_ips: vec![IpAddr::from([10, 96, 0, last])],
            tcp_node_port: (name == "web").then_some(30001),
            udp_node_port: (name == "web").then_some(30002),
        };
        cast.services.insert(name.to_owned(), facts);
    }
    cast.services.insert("peers".to_owned(), ServiceFacts::default());
    cast
}

fn asked() -> Asked {
    Asked { domain: "cluster.local".to_owned(), ..Asked::default() }
}

fn names(phase: Phase) -> Vec<String> {
    checks::plan(&cast(), &asked(), phase).unwrap().into_iter().map(|check| check.name).collect()
}

#[test]
fn every_kind_of_path_is_tried_on_one_node_and_between_nodes() {
    let open = names(Phase::Open);
    for name in [
        "pod-to-pod/tcp/same-node",
        "pod-to-pod/tcp/other-node",
        "pod-to-pod/udp/other-node",
        "pod-to-pod/full-packet/other-node",
        "pod-to-pod/fragments/other-node",
        "pod-to-pod/download/other-node",
        "pod-to-pod/upload/same-node",
        "pod-to-service/tcp",
        "pod-to-service/udp",
        "pod-to-service/by-name",
        "node-to-service/tcp",
        "hairpin/tcp",
        "pod-to-node-port/tcp/other-node",
        "node-to-node-port/udp/same-node",
        "node-to-pod/tcp/other-node",
        "pod-to-node/tcp/same-node",
        "host-port/tcp/other-node",
        "dns/cluster",
        "dns/short",
        "dns/headless",
    ] {
        assert!(open.iter().any(|have| have == name), "{name} is missing of {open:?}");
    }
    // Nobody asked for the world outside.
    assert!(!open.iter().any(|name| name.starts_with("outside")));
}

#[test]
fn a_policy_phase_has_both_a_side_that_may_and_one_that_may_not() {
    for phase in [Phase::Denied, Phase::Allowed, Phase::Egress] {
        let checks = checks::plan(&cast(), &asked(), phase).unwrap();
        let silent = checks.iter().filter(|check| check.want == Want::Silence).count();
        assert!(silent > 0 && silent < checks.len(), "{phase:?}: {silent} of {}", checks.len());
    }
    assert!(checks::plan(&cast(), &asked(), Phase::Lifted).unwrap().iter().all(|check| check.want != Want::Silence));
}

#[test]
fn outside_is_tried_when_asked_for_and_nonsense_is_refused() {
    let outside = Asked { outside: Some("[2001:db8::1]:443".to_owned()), ..asked() };
    let checks = checks::plan(&cast(), &outside, Phase::Open).unwrap();
    let ends: Vec<&Action> = checks.iter().filter(|c| c.name == "outside/tcp").map(|c| &c.action).collect();
    assert!(matches!(ends.as_slice(), [Action::Connect(end), _] if end.host == "2001:db8::1" && end.port == 443));
    let nonsense = Asked { outside: Some("here".to_owned()), ..asked() };
    assert!(checks::plan(&cast(), &nonsense, Phase::Open).is_err());
}

#[test]
fn who_answers_and_whom_it_sees_decide() {
    let served = |pod: &str, client: &str| {
        Outcome::Served(Served { pod: pod.to_owned(), client: Some(ip(client)), ..Served::default() })
    };
    let want = Want::Served { by: vec!["server-1".to_owned()], client: Some(vec![ip("10.244.1.10")]) };
    assert!(judge::against(&want, &served("server-1", "10.244.1.10")).is_ok());
    assert!(judge::against(&want, &served("other", "10.244.1.10")).unwrap_err().contains("instead of server-1"));
    let translated = judge::against(&want, &served("server-1", "192.0.2.1")).unwrap_err();
    assert!(translated.contains("192.0.2.1") && translated.contains("translated"), "{translated}");
    assert!(judge::against(&want, &Outcome::Silent).is_err());
}

#[test]
fn a_deny_is_a_drop_and_neither_a_refusal_nor_an_answer() {
    assert!(judge::against(&Want::Silence, &Outcome::Silent).is_ok());
    assert!(judge::against(&Want::Silence, &Outcome::Refused).unwrap_err().contains("dropped"));
    assert!(judge::against(&Want::Silence, &Outcome::Connected).unwrap_err().contains("does not deny"));
}

#[test]
fn short_transfers_and_other_addresses_fail() {
    assert!(judge::against(&Want::Bytes(Some(10)), &Outcome::Bytes(9)).is_err());
    let found = Outcome::Addresses(vec![ip("10.96.0.1")]);
    assert!(judge::against(&Want::Addresses(Some(vec![ip("10.96.0.1")])), &found).is_ok());
    assert!(judge::against(&Want::Addresses(Some(vec![ip("10.96.0.2")])), &found).is_err());
}

#[test]
fn drops_are_seen_in_the_metrics_or_skipped_where_there_are_none() {
    let metrics = |n: u32| {
        Outcome::Text(format!(
            "towpath_drop_packets_total{{reason=\"ingress_policy\"}} {n}\ntowpath_drop_packets_total{{reason=\"malformed\"}} 9\n"
        ))
    };
    assert_eq!(
        judge::drops_seen(&metrics(1), &metrics(3), 9116),
        (Status::Passed, "2 packets counted as dropped by policy".to_owned())
    );
    assert_eq!(judge::drops_seen(&metrics(3), &metrics(3), 9116).0, Status::Failed);
    assert_eq!(judge::drops_seen(&Outcome::Refused, &Outcome::Refused, 9116).0, Status::Skipped);
}

#[test]
fn a_report_counts_and_its_xml_is_escaped() {
    let check = checks::plan(&cast(), &asked(), Phase::Open).unwrap().remove(0);
    let answer = |outcome| Answer { id: 0, outcome, attempts: 1, millis: 7 };
    let mut report = Report::default();
    report.results.push(CheckResult::of(&check, Ok(&answer(Outcome::Failed("a < \"b\" & c\u{1}".to_owned())))));
    report.results.push(CheckResult::of(&check, Err("no pod".to_owned())));
    assert_eq!(report.failed(), 2);
    let xml = report.junit();
    assert!(
        xml.contains("tests=\"2\" failures=\"2\"") && xml.contains("a &lt; &quot;b&quot; &amp; c\u{fffd}"),
        "{xml}"
    );
    assert!(report.summary().contains("0 passed, 2 failed") && report.summary().contains("could not be tried: no pod"));
    assert_eq!(report.json()["checks"].as_array().map(Vec::len), Some(2));
}

#[test]
fn manifests_fit_their_types_and_only_node_pods_leave_the_restricted_level() {
    let node = NodeFacts { name: "n1".to_owned(), addresses: Vec::new() };
    for role in [Role::Client, Role::Server, Role::Guarded, Role::Host, Role::HostPort] {
        let spec = manifests::pod(role, 1, &node, "towpath", 18116).unwrap().spec.unwrap();
        assert_eq!(spec.host_network == Some(true), role == Role::Host);
        let context = spec.containers[0].security_context.clone().unwrap();
        assert_eq!(context.allow_privilege_escalation, Some(false));
        assert_eq!(context.capabilities.unwrap().drop, Some(vec!["ALL".to_owned()]));
        assert_eq!(spec.automount_service_account_token, Some(false));
        assert_eq!(spec.security_context.unwrap().run_as_non_root, Some(true));
    }
    assert_eq!(manifests::services().unwrap().len(), 3);
    manifests::deny_ingress().unwrap();
    manifests::allow_first_client().unwrap();
    manifests::deny_egress().unwrap();
    manifests::namespace("x").unwrap();
}
