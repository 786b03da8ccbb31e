use std::collections::BTreeMap;

use towpath_model::custom::{BackendName, NetworkConfigSpec};
use towpath_model::{
    Conditions, Endpoint, EndpointPort, EndpointSlice, Enforcement, HostPort, Labels, Namespace, NetworkPolicy, Node,
    Phase, Pod, PolicyPort, PolicyRule, PortMatch, Selector, Service, ServiceKind, ServicePort, TargetPort,
    TrafficPolicy,
};

use towpath_plan::backend::{self, Able, Says};

use super::*;
use crate::configured::NodeSays;

fn pod(name: &str, node: &str, ip: &str, label: &str) -> (NamespacedName, Pod) {
    let name = NamespacedName::new("default", name);
    let pod = Pod {
        daemon_set: None,
        name: name.clone(),
        uid: name.name.as_str().into(),
        labels: Labels::from([("app".to_owned(), label.to_owned())]).into(),
        node: Some(NodeName::new(node)),
        ips: vec![ip.parse().unwrap()].into(),
        named_ports: Default::default(),
        host_ports: Default::default(),
        host_network: false,
        phase: Phase::Running,
        terminating: false,
        ready: true,
        socket_services: Default::default(),
        chosen: None,
        bandwidth: None,
    };
    (name, pod)
}

fn node(name: &str, ip: &str, cidr: &str) -> (NodeName, Node) {
    let node = Node {
        name: NodeName::new(name),
        labels: Labels::new(),
        internal_ips: vec![ip.parse().unwrap()],
        other_ips: Vec::new(),
        created: 0,
        added: Default::default(),
        flannel: None,
        pod_cidrs: vec![cidr.parse().unwrap()],
        ready: true,
    };
    (node.name.clone(), node)
}

pub(super) fn world() -> World {
    let service = NamespacedName::new("default", "web");
    let endpoint = |ip: &str| Endpoint {
        address: ip.parse().unwrap(),
        conditions: Conditions { ready: true, serving: true, terminating: false },
        hostname: None,
        node: None,
        pod: None,
        hints: Default::default(),
    };
    World {
        nodes: BTreeMap::from([
            node("n1", "192.168.255.11", "10.244.0.0/24"),
            node("n2", "192.168.255.12", "10.244.1.0/24"),
        ]),
        namespaces: BTreeMap::from([(
            "default".to_owned(),
            Namespace {
                name: "default".to_owned(),
                labels: Labels::new(),
                socket_services: Default::default(),
                pods_choose: false,
                terminating: false,
            },
        )]),
        pods: BTreeMap::from([
            pod("client", "n1", "10.244.0.2", "client"),
            pod("web-1", "n1", "10.244.0.3", "web"),
            pod("web-2", "n2", "10.244.1.3", "web"),
        ]),
        services: BTreeMap::from([(
            service.clone(),
            Service {
                name: service.clone(),
                labels: Labels::new(),
                kind: ServiceKind::NodePort,
                cluster_ips: vec!["10.96.0.20".parse().unwrap()],
                external_ips: Vec::new(),
                load_balancer_ips: Vec::new(),
                load_balancer_class: None,
                balanced_by_us: false,
                ports: vec![ServicePort::new("", Protocol::Tcp, 8080, TargetPort::Number(80), Some(30000))],
                has_selector: true,
                affinity_seconds: None,
                internal_policy: TrafficPolicy::Cluster,
                external_policy: TrafficPolicy::Cluster,
                algorithm: Default::default(),
                source_ranges: None,
                misunderstood: Vec::new(),
                publish_not_ready: false,
                health_check_port: None,
            },
        )]),
        slices: towpath_model::Slices::from([(
            NamespacedName::new("default", "web-x"),
            EndpointSlice {
                name: NamespacedName::new("default", "web-x"),
                service,
                endpoints: vec![endpoint("10.244.0.3"), endpoint("10.244.1.3")],
                ports: vec![EndpointPort { name: String::new(), protocol: Protocol::Tcp, port: 80 }],
                headless: false,
            },
        )]),
        policies: BTreeMap::new(),
        cluster_policies: BTreeMap::new(),
    }
}

pub(super) fn asked(world: &World, found: &Found, from: &str, to: &str, port: &str) -> Explanation {
    let from = who::parse(world, "default", from).unwrap();
    let to = who::parse(world, "default", to).unwrap();
    let facts = Facts::of(world, found).unwrap();
    explain(world, &facts, &from, &to, port.parse().unwrap()).unwrap()
}

/// Nodes that say so of backends.
pub(super) fn saying<const N: usize>(said: [(&str, Says); N]) -> BTreeMap<NodeName, NodeSays> {
    said.map(|(node, backends)| (NodeName::new(node), NodeSays { backends, ..NodeSays::default() })).into()
}

/// Of a cluster whose nodes all send by VXLAN, and say so.
fn ask(world: &World, from: &str, to: &str, port: &str) -> Explanation {
    let says = || Says { sends: Some(BackendName::Vxlan), ..Says::default() };
    let found = Found { nodes: saying([("n1", says()), ("n2", says())]), ..Found::default() };
    asked(world, &found, from, to, port)
}

fn isolate_web(world: &mut World) {
    let name = NamespacedName::new("default", "only-8443");
    world.policies.insert(
        name.clone(),
        NetworkPolicy {
            name,
            pod_selector: Selector::equals([("app", "web")]),
            ingress: Some(vec![PolicyRule {
                peers: Vec::new(),
                ports: vec![PolicyPort { protocol: Protocol::Tcp, port: PortMatch::Range(8443, 8443) }],
            }]),
            egress: None,
            enforcement: Enforcement::Enforced,
        },
    );
}

#[test]
fn a_service_is_translated_and_every_endpoint_judged() {
    let answer = ask(&world(), "pod/client", "svc/web", "8080");
    assert_eq!(answer.outcome, Outcome::Allow);
    assert_eq!(answer.service.as_ref().unwrap().backends, ["10.244.0.3:80", "10.244.1.3:80"]);
    assert_eq!(answer.ways.len(), 2);
    assert!(answer.ways[0].path[1].contains("straight into the other pod"), "{:?}", answer.ways[0].path);
    assert!(answer.ways[1].path[1].contains("VXLAN to node n2"), "{:?}", answer.ways[1].path);
}

#[test]
fn between_nodes_the_way_is_that_of_the_senders_backend_if_the_other_takes_it() {
    let world = world();
    let says = |backend, ipip| Says {
        sends: Some(backend),
        receives: backend::ready_for(backend, Able { ipip, udp: true, macs: true }),
        ..Says::default()
    };
    for (n1, n2, way) in [
        (says(BackendName::Ipip, true), says(BackendName::Vxlan, true), "in an IP header (ipip) to node n2"),
        (says(BackendName::Ipip, true), says(BackendName::Vxlan, false), "VXLAN to node n2"),
        (says(BackendName::Udp, true), says(BackendName::Udp, true), "in a UDP datagram (udp) to node n2"),
        (says(BackendName::Udp, true), says(BackendName::Ipip, true), "VXLAN to node n2"),
        (says(BackendName::HostGw, true), says(BackendName::HostGw, true), "as it is (host-gw"),
        (says(BackendName::HostGw, true), says(BackendName::Ipip, true), "VXLAN to node n2"),
        (says(BackendName::Macvlan, true), says(BackendName::Macvlan, true), "own MAC addresses (macvlan"),
        (says(BackendName::Macvlan, true), says(BackendName::HostGw, true), "VXLAN to node n2"),
        (says(BackendName::Vxlan, true), says(BackendName::HostGw, true), "VXLAN to node n2"),
    ] {
        let found = Found { nodes: saying([("n1", n1), ("n2", n2)]), ..Found::default() };
        let answer = asked(&world, &found, "pod/client", "svc/web", "8080");
        assert!(answer.ways[1].path[1].contains(way), "{way}: {:?}", answer.ways[1].path);
    }
}

#[test]
fn a_pod_whose_sockets_are_left_alone_is_translated_at_its_device() {
    let place = |world: &World, from: &str| ask(world, from, "svc/web", "8080").service.unwrap().place;
    let mut world = world();
    assert_eq!(place(&world, "pod/client"), "on node n1, when the socket connects");
    world.namespaces.get_mut("default").unwrap().socket_services = SocketServices::Disabled;
    let said = "on node n1, at the pod's device (namespace default says towpath.dev/socket-services: disabled)";
    assert_eq!(place(&world, "pod/client"), said);
    assert_eq!(place(&world, "node/n1"), "on node n1, when the socket connects", "the node is no pod");
    let client = world.pods.get_mut(&NamespacedName::new("default", "client")).unwrap();
    client.socket_services = SocketServices::Enabled;
    assert_eq!(place(&world, "pod/client"), "on node n1, when the socket connects");
}

#[test]
fn a_default_deny_names_the_policy_and_the_nearest_rule() {
    let mut world = world();
    isolate_web(&mut world);
    let answer = ask(&world, "pod/client", "pod/web-2", "80");
    assert_eq!(answer.outcome, Outcome::Deny);
    let text = answer.to_string();
    assert!(text.contains("default/only-8443") && text.contains("8443"), "{text}");
}

#[test]
fn ports_that_no_service_has_are_refused_and_ping_is_silent() {
    assert_eq!(ask(&world(), "pod/client", "svc/web", "81").outcome, Outcome::Refused);
    assert_eq!(ask(&world(), "pod/client", "svc/web", "icmp").outcome, Outcome::NoReply);
}

#[test]
fn a_node_port_from_outside_is_translated_on_the_node_addressed() {
    let answer = ask(&world(), "203.0.113.10", "node/n2", "30000");
    assert_eq!(answer.outcome, Outcome::Allow);
    assert!(answer.service.unwrap().place.contains("node n2, at the uplink"));
    assert!(answer.ways[0].path[1].contains("node n2: from its uplink, VXLAN to node n1"), "{:?}", answer.ways[0].path);
    assert!(answer.ways[1].path[1].contains("node n2: from its uplink"), "{:?}", answer.ways[1].path);
}

#[test]
fn who_sees_the_client_of_an_endpoint_that_is_no_pod_is_said() {
    let mut world = world();
    let far = ["192.168.255.11", "192.168.255.12", "203.0.113.77"];
    let slice = world.slices.of(&NamespacedName::new("default", "web")).next().unwrap().clone();
    let endpoint = |address: &str| Endpoint { address: address.parse().unwrap(), ..slice.endpoints[0].clone() };
    world.slices.insert(slice.name.clone(), EndpointSlice { endpoints: far.map(endpoint).to_vec(), ..slice.clone() });
    let hop = |to: &str| {
        let answer = ask(&world, "203.0.113.10", to, "30000");
        assert_eq!((answer.outcome, answer.ways.len()), (Outcome::Allow, 3));
        far.map(|at| {
            let way = answer.ways.iter().find(|way| way.to.address.to_string() == at).unwrap();
            (way.path[1].clone(), way.path[1].contains("a port of 61000 to 65535"))
        })
    };
    let [one, own, outside] = hop("node/n2");
    assert!(one.1 && one.0.starts_with("node n2: from its uplink") && one.0.ends_with("to node n1"), "{one:?}");
    assert_eq!(own, ("node n2: from its uplink".to_owned(), false), "it sees the client");
    assert!(outside.1 && outside.0.starts_with("node n2: from its uplink"), "{outside:?}");
}

#[test]
fn a_host_port_names_the_pod_and_the_binding() {
    let mut world = world();
    let web = world.pods.get_mut(&NamespacedName::new("default", "web-2")).unwrap();
    let port = |port, address: Option<&str>| HostPort {
        port,
        container_port: 80,
        protocol: Protocol::Tcp,
        address: address.map(|a| a.parse().unwrap()),
    };
    web.host_ports = vec![port(8088, None), port(8089, Some("127.0.0.1"))].into();
    for from in ["203.0.113.10", "pod/client", "node/n1"] {
        let answer = ask(&world, from, "node/n2", "8088");
        assert_eq!(answer.outcome, Outcome::Allow, "{answer}");
        let text = answer.to_string();
        assert!(text.contains("hostPort 8088 on 192.168.255.12, of pod default/web-2:"), "{text}");
        assert!(text.contains("to 10.244.1.3:80") && !text.contains("Service"), "{text}");
    }
    // On loopback it is for the node alone, and another node has none of it.
    let text = ask(&world, "node/n2", "127.0.0.1", "8089").to_string();
    assert!(text.contains("hostPort 8089 on 127.0.0.1, of pod default/web-2:"), "{text}");
    for (from, to, port) in
        [("node/n1", "127.0.0.1", "8089"), ("203.0.113.10", "node/n2", "8089"), ("pod/client", "node/n1", "8088")]
    {
        assert_eq!(ask(&world, from, to, port).service, None, "{from} to {to} {port}");
    }
    let parse = |text| who::parse(&world, "default", text).unwrap();
    let facts = Facts::of(&world, &Found::default()).unwrap();
    let from_pod = explain(&world, &facts, &parse("pod/client"), &parse("127.0.0.1"), "8089".parse().unwrap());
    assert!(from_pod.unwrap_err().to_string().contains("node/NAME"));
}

#[test]
fn names_that_mean_nobody_are_refused_by_name() {
    let error = who::parse(&world(), "default", "pod/nobody").unwrap_err().to_string();
    assert!(error.contains("default/nobody"), "{error}");
    assert!(who::parse(&world(), "default", "a/b/c/d").is_err());
    assert!(
        "0".parse::<PortSpec>().is_err()
            && "70000".parse::<PortSpec>().is_err()
            && "80/icmp".parse::<PortSpec>().is_err()
    );
}

#[test]
fn a_load_balancer_from_outside_is_explained_with_its_algorithm_and_its_ranges() {
    let mut world = world();
    let service = world.services.values_mut().next().unwrap();
    service.kind = ServiceKind::LoadBalancer;
    service.load_balancer_ips = vec!["203.0.113.7".parse().unwrap()];
    service.algorithm = Algorithm::SourceHash;
    let answer = ask(&world, "198.51.100.9", "203.0.113.7", "8080");
    assert_eq!((answer.outcome, answer.ways.len()), (Outcome::Allow, 2));
    let text = answer.to_string();
    assert!(text.contains("on the node that the address leads to (here n1)"), "{text}");
    assert!(text.contains("to one of 2 endpoints, by the client's address"), "{text}");

    world.services.values_mut().next().unwrap().source_ranges = Some(vec!["198.51.100.0/29".parse().unwrap()]);
    let answer = ask(&world, "198.51.100.9", "203.0.113.7", "8080");
    assert_eq!(answer.outcome, Outcome::NotForClient);
    let text = answer.to_string();
    assert!(
        text.contains("loadBalancerSourceRanges: 198.51.100.0/29") && text.contains("not for this client"),
        "{text}"
    );
    assert_eq!(ask(&world, "198.51.100.1", "203.0.113.7", "8080").outcome, Outcome::Allow);
    assert_eq!(
        ask(&world, "198.51.100.9", "192.168.255.11", "30000").outcome,
        Outcome::Allow,
        "its NodePort is for all"
    );
}

#[test]
fn a_node_port_is_a_services_only_at_the_addresses_that_the_network_chooses() {
    let world = world();
    let service = |chosen: Option<&str>| {
        let node_port_addresses = chosen.map(|chosen| vec![chosen.to_owned()]);
        let network = Some(NetworkConfigSpec { node_port_addresses, ..Default::default() });
        asked(&world, &Found { network, ..Found::default() }, "203.0.113.10", "node/n2", "30000").service
    };
    assert!(service(None).is_some());
    assert!(service(Some("primary")).is_some(), "a node's object names it");
    assert!(service(Some("192.168.255.12/32")).is_some());
    assert!(service(Some("10.0.0.0/8")).is_none(), "its own business");
}

#[test]
fn a_policy_that_is_only_audited_decides_nothing_and_is_named_with_what_it_would_decide() {
    let mut world = world();
    isolate_web(&mut world);
    world.policies.values_mut().for_each(|policy| policy.enforcement = Enforcement::Audited);
    let answer = ask(&world, "pod/client", "svc/web", "8080");
    assert_eq!(answer.outcome, Outcome::Allow);
    for way in &answer.ways {
        assert!(way.decision.ingress.as_ref().unwrap().policies().is_empty());
        let would = way.if_enforced.as_ref().unwrap();
        assert_eq!(
            (would.decision.verdict, would.policies.as_slice()),
            (Verdict::Deny, ["NetworkPolicy default/only-8443".to_owned()].as_slice())
        );
    }
    let text = answer.to_string();
    assert!(
        text.contains("denied if NetworkPolicy default/only-8443, which is only audited, were enforced:"),
        "{text}"
    );
    assert!(
        text.contains("ingress of pod default/web: allowed: no NetworkPolicy isolates it")
            || text.contains("no NetworkPolicy isolates it"),
        "{text}"
    );
    assert!(text.contains("isolated by NetworkPolicy default/only-8443"), "{text}");
    assert!(text.ends_with("allowed"), "{text}");
    // Where enforcing changes nothing, nothing is said of it.
    let direct = ask(&world, "pod/client", "10.244.0.3", "8443");
    assert!(direct.ways.iter().all(|way| way.if_enforced.is_none()), "{direct}");
}
