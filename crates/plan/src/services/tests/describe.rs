use std::collections::BTreeMap;
use std::net::IpAddr;

use towpath_model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Family, Hints, NamespacedName, Node, NodeName, Protocol,
    Service, ServiceKind, ServicePort, TargetPort, TrafficPolicy, World,
};

use crate::Changed;
use crate::services::describe::{
    Condition, DescribedBackend, Side, Unused, backends, missing_ports, without_local_endpoints,
};
use crate::services::{Planner, RefusedPart, ServiceConfig};

const READY: Conditions = Conditions { ready: true, serving: true, terminating: false };
const UNREADY: Conditions = Conditions { ready: false, serving: false, terminating: false };
const DRAINING: Conditions = Conditions { ready: false, serving: true, terminating: true };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn node(name: &str, zone: &str) -> Node {
    Node {
        name: NodeName::new(name),
        labels: [("topology.kubernetes.io/zone".to_owned(), zone.to_owned())].into(),
        internal_ips: Vec::new(),
        other_ips: Vec::new(),
        created: 0,
        pod_cidrs: Vec::new(),
        ready: true,
        added: Default::default(),
        flannel: None,
    }
}

fn nodes() -> BTreeMap<NodeName, Node> {
    [node("n1", "a"), node("n2", "b")].into_iter().map(|node| (node.name.clone(), node)).collect()
}

fn service() -> Service {
    let object = serde_json::json!({
        "metadata": {"namespace": "default", "name": "web"},
        "spec": {"type": "NodePort", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "selector": {"app": "web"},
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080}]},
    });
    let object: k8s_openapi::api::core::v1::Service = serde_json::from_value(object).unwrap();
    Service::try_from(&object).unwrap()
}

fn endpoint(address: &str, on: &str, conditions: Conditions, zones: &[&str]) -> Endpoint {
    Endpoint {
        address: ip(address),
        conditions,
        hostname: None,
        node: Some(NodeName::new(on)),
        pod: Some(Box::new(NamespacedName::new("default", address))),
        hints: Some(Box::new(Hints {
            zones: zones.iter().map(|zone| (*zone).to_owned()).collect(),
            nodes: Vec::new(),
        })),
    }
}

fn slice(name: &str, endpoints: Vec<Endpoint>) -> EndpointSlice {
    EndpointSlice {
        name: NamespacedName::new("default", name),
        service: NamespacedName::new("default", "web"),
        endpoints,
        ports: vec![EndpointPort { name: "http".to_owned(), protocol: Protocol::Tcp, port: 8080 }],
        headless: false,
    }
}

fn described(service: &Service, slices: &[&EndpointSlice]) -> BTreeMap<String, DescribedBackend> {
    let all = backends(service, &service.ports[0], slices, &nodes(), &ServiceConfig::default());
    all.into_iter().map(|one| (one.backend.address.to_string(), one)).collect()
}

fn on(uses: &crate::services::describe::Uses, node: &str) -> Option<Unused> {
    uses.get(&NodeName::new(node)).cloned().expect("asked about")
}

#[test]
fn every_endpoint_says_who_uses_it_or_why_not() {
    let first = slice(
        "web-1",
        vec![
            endpoint("10.0.0.1", "n1", READY, &["a"]),
            endpoint("10.0.0.2", "n2", READY, &["b"]),
            endpoint("10.0.0.3", "n2", UNREADY, &[]),
            endpoint("10.0.0.4", "n2", DRAINING, &[]),
            endpoint("127.0.0.1", "n2", READY, &[]),
            endpoint("fd00::1", "n2", READY, &[]),
        ],
    );
    let all = described(&service(), &[&first]);
    let states: Vec<(&str, Condition)> = all.iter().map(|(address, one)| (address.as_str(), one.condition)).collect();
    use Condition::{NotReady, Ready, Refused, Terminating};
    assert_eq!(
        states,
        [
            ("10.0.0.1", Ready),
            ("10.0.0.2", Ready),
            ("10.0.0.3", NotReady),
            ("10.0.0.4", Terminating),
            ("127.0.0.1", Refused),
            ("fd00::1", Refused),
        ]
    );
    assert_eq!(
        (on(&all["10.0.0.1"].internal, "n1"), on(&all["10.0.0.1"].internal, "n2")),
        (None, Some(Unused::HintedZones))
    );
    assert_eq!(on(&all["10.0.0.3"].internal, "n1"), Some(Unused::NotReady));
    assert_eq!(on(&all["10.0.0.4"].internal, "n1"), Some(Unused::Terminating));
    let refused = |address: &str| all[address].internal.values().next().cloned().flatten().unwrap().to_string();
    assert!(refused("127.0.0.1").contains("loopback") && refused("fd00::1").contains("family"));
    assert_eq!(all["10.0.0.1"].pod, Some(NamespacedName::new("default", "10.0.0.1")));
}

#[test]
fn what_is_said_is_what_is_planned() {
    let local = Service { external_policy: TrafficPolicy::Local, ..service() };
    let slices = [slice(
        "web-1",
        vec![
            endpoint("10.0.0.1", "n1", READY, &["a"]),
            endpoint("10.0.0.2", "n2", READY, &["b"]),
            endpoint("10.0.0.3", "n1", DRAINING, &[]),
        ],
    )];
    let all = described(&local, &[&slices[0]]);
    let world = World {
        nodes: nodes(),
        services: [(local.name.clone(), local)].into(),
        slices: slices.into_iter().map(|slice| (slice.name.clone(), slice)).collect(),
        ..World::default()
    };
    for name in ["n1", "n2"] {
        let mut planner = Planner::new(ServiceConfig::default());
        let table = planner.plan(&world, &NodeName::new(name), Changed::All, std::time::Duration::ZERO);
        for (frontend, target) in &table.frontends {
            if frontend.address.is_some_and(|address| address != ip("10.96.0.1")) {
                continue;
            }
            let planned: Vec<String> =
                target.backends.iter().map(|id| table.backends[id].address.to_string()).collect();
            let uses = |one: &DescribedBackend| {
                on(if frontend.address.is_some() { &one.internal } else { &one.external }, name).is_none()
            };
            let said: Vec<String> = all.iter().filter(|(_, one)| uses(one)).map(|(a, _)| a.clone()).collect();
            assert_eq!(said, planned, "{name}: {frontend:?}");
        }
    }
    assert_eq!(on(&all["10.0.0.2"].external, "n1"), Some(Unused::OtherNode));
}

#[test]
fn ports_of_local_policy_without_an_endpoint_here_are_counted_by_side_and_family() {
    let internal = Service { internal_policy: TrafficPolicy::Local, ..service() };
    let none = Service { name: NamespacedName::new("default", "none"), ..internal.clone() };
    let external = Service {
        name: NamespacedName::new("default", "out"),
        external_policy: TrafficPolicy::Local,
        kind: ServiceKind::NodePort,
        ports: vec![ServicePort::new("http", Protocol::Tcp, 80, TargetPort::Number(8080), Some(30081))],
        ..service()
    };
    let of_out = EndpointSlice {
        service: external.name.clone(),
        ..slice("out-1", vec![endpoint("10.0.0.2", "n2", READY, &[])])
    };
    let world = World {
        nodes: nodes(),
        services: [internal, none, external].into_iter().map(|s| (s.name.clone(), s)).collect(),
        slices: [slice("web-1", vec![endpoint("10.0.0.1", "n1", READY, &[])]), of_out]
            .into_iter()
            .map(|s| (s.name.clone(), s))
            .collect(),
        ..World::default()
    };
    let of = |node: &str| -> Vec<(String, Side, Family)> {
        let found = without_local_endpoints(&world, &NodeName::new(node));
        found.into_iter().map(|(name, side, family)| (name.name, side, family)).collect()
    };
    assert_eq!(of("n1"), [("out".to_owned(), Side::External, Family::V4)]);
    assert_eq!(of("n2"), [("web".to_owned(), Side::Internal, Family::V4)], "a Service without any is not counted");
}

#[test]
fn a_slice_without_the_port_is_named() {
    let other = EndpointSlice {
        ports: vec![EndpointPort { name: "metrics".to_owned(), protocol: Protocol::Tcp, port: 9090 }],
        ..slice("odd", vec![endpoint("10.0.0.1", "n1", READY, &[])])
    };
    let said = missing_ports(&service().ports[0], &[&other]);
    assert_eq!(said, ["EndpointSlice default/odd has no port http/TCP"]);
    assert!(missing_ports(&service().ports[0], &[&slice("good", Vec::new())]).is_empty());
}

#[test]
fn refusals_say_whose_and_of_what_kind_they_are() {
    let bad = slice("bad", vec![endpoint("169.254.169.254", "n1", READY, &[])]);
    let outside = ServicePort::new("http", Protocol::Tcp, 80, TargetPort::Number(8080), Some(80));
    let odd = Service {
        misunderstood: vec!["annotation towpath.dev/lb-algorithm: \"x\" is none of those known".to_owned()],
        ports: vec![outside],
        ..service()
    };
    let world = World {
        services: [(odd.name.clone(), odd)].into(),
        slices: [(bad.name.clone(), bad)].into(),
        ..World::default()
    };
    let mut planner = Planner::new(ServiceConfig::default());
    planner.plan(&world, &NodeName::new("n1"), Changed::All, std::time::Duration::ZERO);
    let refusals = planner.refusals();
    let mut parts: Vec<RefusedPart> = refusals.iter().map(|refusal| refusal.part).collect();
    parts.sort_unstable();
    assert_eq!(parts, [RefusedPart::Endpoint, RefusedPart::Frontend, RefusedPart::Field], "{refusals:?}");
    assert!(refusals.iter().all(|refusal| refusal.object() == "Service default/web"), "{refusals:?}");
}

#[test]
fn no_slice_leads_to_what_is_the_nodes_own_however_it_is_written() {
    let config = ServiceConfig {
        dns_addresses: vec![ip("192.0.2.53")],
        service_cidrs: vec!["10.96.0.0/12".parse().unwrap()],
        ..ServiceConfig::default()
    };
    for address in [
        "127.0.0.1",
        "127.1.2.3",
        "::1",
        "0.0.0.0",
        "::",
        "0.0.0.1",
        "255.255.255.255",
        "224.0.0.1",
        "ff02::1",
        "169.254.169.254",
        "169.254.170.2",
        "fe80::1",
        "fd00:ec2::254",
        "fd20:ce::254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "10.96.0.10",
        "192.0.2.53",
        "::127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
    ] {
        assert!(crate::services::choose::forbidden(ip(address), &config).is_some(), "{address}");
    }
    for address in
        ["10.0.0.1", "100.100.100.201", "8.8.8.8", "fd00::1", "2001:db8::1", "64:ff9b::808:808", "192.0.2.54"]
    {
        assert_eq!(crate::services::choose::forbidden(ip(address), &config), None, "{address}");
    }
}
