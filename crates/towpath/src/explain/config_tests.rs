//! What is configured is what is explained: a row a field, the same question without it and with it.

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde::de::DeserializeOwned;
use towpath_model::custom::{BackendName, NetworkConfig, NodeNetwork};
use towpath_model::{EndpointSlice, ServiceCidr};
use towpath_plan::backend::Says;
use towpath_wire::config::AgentConfig;

use super::tests::{asked, saying, world};
use super::*;
use crate::configured::NodeSays;

fn yaml<T: DeserializeOwned>(text: &str) -> T {
    serde_saphyr::from_str(text).unwrap()
}

/// With Services whose endpoints are outside of pods' ranges, and with a name server behind `kube-system/kube-dns` if that is to be so.
fn cluster(core_dns: bool) -> World {
    let mut world = world();
    world.services.values_mut().for_each(|web| web.external_ips = vec!["203.0.113.7".parse().unwrap()]);
    for (namespace, name, ip, port, endpoint) in [
        ("default", "far", "10.96.0.30", "{port: 80}", Some("172.20.0.7")),
        ("kube-system", "kube-dns", "10.96.0.10", "{port: 53, protocol: UDP}", core_dns.then_some("10.244.1.3")),
    ] {
        let service: core::Service = yaml(&format!(
            "metadata: {{namespace: {namespace}, name: {name}}}\nspec: {{clusterIP: {ip}, clusterIPs: [{ip}], ports: [{port}]}}"
        ));
        let service = Service::try_from(&service).unwrap();
        world.services.insert(service.name.clone(), service);
        let endpoints =
            endpoint.map_or(String::new(), |ip| format!("{{addresses: [{ip}], conditions: {{ready: true}}}}"));
        let slice: discovery::EndpointSlice = yaml(&format!(
            "metadata: {{namespace: {namespace}, name: {name}-x, labels: {{kubernetes.io/service-name: {name}}}}}\n\
             addressType: IPv4\nports: [{port}]\nendpoints: [{endpoints}]"
        ));
        let slice = EndpointSlice::try_from(&slice).unwrap();
        world.slices.insert(slice.name.clone(), slice);
    }
    world
}

fn network(spec: &str) -> Found {
    let object: NetworkConfig = yaml(&format!(
        "apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {spec}"
    ));
    Found { network: Some(object.spec), ..Found::default() }
}

fn agent(config: &str) -> Found {
    Found { agent: Some(yaml::<AgentConfig>(config)), ..Found::default() }
}

/// A question: who asks whom, and what is answered only without and only with what is configured.
struct Row<'a> {
    found: Found,
    asks: [&'a str; 3],
    without: &'a str,
    with: &'a str,
}

fn row<'a>(found: Found, asks: [&'a str; 3], without: &'a str, with: &'a str) -> Row<'a> {
    Row { found, asks, without, with }
}

/// Asks both ways, without what is found and with it.
fn check(world: &World, rows: Vec<Row<'_>>) {
    for Row { found, asks: [from, to, port], without, with } in rows {
        let answer = |found: &Found| asked(world, found, from, to, port).to_string();
        let (before, after) = (answer(&Found::default()), answer(&found));
        assert!(before.contains(without) && !before.contains(with), "{found:?}, without:\n{before}");
        assert!(after.contains(with) && !after.contains(without), "{found:?}, with:\n{after}");
    }
}

const POD_TO_POD: [&str; 3] = ["pod/client", "pod/web-2", "80"];
const POD_TO_OUTSIDE: [&str; 3] = ["pod/client", "198.51.100.9", "443"];
const OUTSIDE_TO_NODE_PORT: [&str; 3] = ["203.0.113.10", "node/n2", "30000"];
const POD_TO_DNS: [&str; 3] = ["pod/client", "10.96.0.10", "53/udp"];
const MASQUERADED: &str = "masqueraded as the node's address";
const OWN_DNS: &str = "the node's own DNS";

#[test]
fn each_field_of_the_network_config_is_followed() {
    let no_dns = cluster(false);
    check(
        &no_dns,
        vec![
            row(network("{backend: host-gw}"), POD_TO_POD, "VXLAN, as configured", "as it is (host-gw"),
            row(
                network("{backend: ipip}"),
                POD_TO_POD,
                "VXLAN, as configured",
                "in an IP header (ipip), as configured",
            ),
            row(network("{backend: macvlan}"), POD_TO_POD, "VXLAN, as configured", "MAC addresses (macvlan"),
            row(network("{backend: udp}"), ["pod/client", "node/n2", "80"], "VXLAN to", "in a UDP datagram (udp)"),
            row(
                network("{backend: udp}"),
                OUTSIDE_TO_NODE_PORT,
                "VXLAN to node n1",
                "in a UDP datagram (udp), as configured (node n2 does not say what it sends by), to node n1 with the client's",
            ),
            row(
                network("{clusterCIDRs: [10.244.0.0/16, 198.51.100.0/24]}"),
                POD_TO_OUTSIDE,
                MASQUERADED,
                "with the pod's own address (198.51.100.0/24 is a pod range)",
            ),
            row(
                network("{serviceCIDRs: [172.20.0.0/16]}"),
                ["pod/client", "svc/far", "80"],
                "its only endpoint: 172.20.0.7:80",
                "no ready endpoint",
            ),
            row(
                network("{serviceCIDRs: [172.20.0.0/16]}"),
                ["pod/client", "172.20.0.9", "80"],
                "allowed",
                "refused at once",
            ),
            row(
                network("{nonMasqueradeCIDRs: [198.51.100.0/24]}"),
                POD_TO_OUTSIDE,
                MASQUERADED,
                "with the pod's own address (198.51.100.0/24 is in nonMasqueradeCIDRs)",
            ),
            row(network("{masquerade: {ipv4: false}}"), POD_TO_OUTSIDE, MASQUERADED, "(IPv4 is not masqueraded)"),
            row(
                network("{externalCIDRs: [203.0.113.0/28]}"),
                ["pod/client", "203.0.113.7", "8080"],
                MASQUERADED,
                "Service default/web at 203.0.113.7:8080",
            ),
            row(
                network("{nodePortAddresses: [10.0.0.0/8]}"),
                OUTSIDE_TO_NODE_PORT,
                "Service default/web",
                "node n2: from its uplink\n    → node n2",
            ),
            row(
                network("{directServerReturn: true}"),
                OUTSIDE_TO_NODE_PORT,
                "node n1; the answer goes back the same way",
                "node n1; it answers the client itself (directServerReturn)",
            ),
            row(
                network("{serviceProxy: \"off\"}"),
                OUTSIDE_TO_NODE_PORT,
                "at random",
                "by whoever serves Services there (serviceProxy: off)",
            ),
            row(network("{dns: \"off\"}"), POD_TO_DNS, OWN_DNS, "no ready endpoint"),
            row(
                network("{clusterDNS: [10.96.0.53]}"),
                ["pod/client", "10.96.0.53", "53/udp"],
                "refused at once",
                OWN_DNS,
            ),
        ],
    );
    check(
        &cluster(true),
        vec![row(network("{dns: towpath}"), POD_TO_DNS, "its only endpoint: 10.244.1.3:53", OWN_DNS)],
    );
}

#[test]
fn the_agents_own_configuration_is_followed_where_the_network_config_names_nothing_else() {
    let world = cluster(false);
    check(
        &world,
        vec![
            row(
                agent("nodePorts: [20000, 22767]"),
                OUTSIDE_TO_NODE_PORT,
                "Service default/web",
                "node n2: from its uplink\n    → node n2",
            ),
            row(agent("masqueradeIpv4: false"), POD_TO_OUTSIDE, MASQUERADED, "(IPv4 is not masqueraded)"),
            row(agent("backend: ipip"), POD_TO_POD, "VXLAN", "in an IP header (ipip)"),
            row(agent("serviceProxy: \"off\""), OUTSIDE_TO_NODE_PORT, "at random", "by whoever serves Services"),
        ],
    );
    let both = Found { agent: agent("{backend: ipip, masqueradeIpv4: false}").agent, ..network("{backend: host-gw}") };
    let text = asked(&world, &both, "pod/client", "pod/web-2", "80").to_string();
    assert!(text.contains("as it is (host-gw"), "{text}");
    let text = asked(&world, &both, "pod/client", "198.51.100.9", "443").to_string();
    assert!(text.contains("(IPv4 is not masqueraded)"), "{text}");
}

#[test]
fn other_objects_that_agents_follow_are_followed() {
    let ranges = |text: &str| ServiceCidr { ranges: vec![text.parse().unwrap()] };
    let service_cidrs = Some(BTreeMap::from([("kubernetes".to_owned(), ranges("172.20.0.0/16"))]));
    let config = "{nonMasqueradeCIDRs: [198.51.100.0/24], masqLinkLocal: true}".to_owned();
    let ip_masq_agent = BTreeMap::from([("config".to_owned(), config)]);
    check(
        &cluster(false),
        vec![
            row(
                Found { service_cidrs, ..Found::default() },
                ["pod/client", "svc/far", "80"],
                "its only endpoint: 172.20.0.7:80",
                "no ready endpoint",
            ),
            row(
                Found { ip_masq_agent, ..Found::default() },
                POD_TO_OUTSIDE,
                MASQUERADED,
                "(ConfigMap kube-system/ip-masq-agent leaves 198.51.100.0/24 alone)",
            ),
        ],
    );
}

#[test]
fn what_cannot_be_used_or_known_is_said_and_not_taken_for_what_is_in_force() {
    let world = cluster(false);
    let odd = Found { doubts: vec!["nobody knows".to_owned()], ..network("{backend: host-gw, serviceCIDRs: [x]}") };
    let answer = asked(&world, &odd, "pod/client", "pod/web-2", "80");
    assert_eq!(answer.notes[0], "nobody knows");
    assert!(answer.notes[1].contains("NetworkConfig default cannot be used") && answer.notes[1].contains("\"x\""));
    let text = answer.to_string();
    assert!(text.contains(&answer.notes[1]) && text.contains("VXLAN, as configured"), "{text}");
    let broken = Facts::of(&world, &agent("serviceCidrs: [10.244.8.0/22]")).unwrap_err().to_string();
    assert!(broken.contains("overlaps"), "{broken}");
}

#[test]
fn what_a_node_says_of_itself_goes_before_what_is_configured() {
    let world = cluster(true);
    let says = |text: &str| NodeSays::of(&yaml::<NodeNetwork>(text));
    let n1 = "apiVersion: towpath.dev/v1alpha1\nkind: NodeNetwork\nmetadata: {name: n1}\nstatus: {backend: host-gw, receiveReady: [vxlan, host-gw], \
              serviceProxy: kube-proxy, dns: coredns, peersBehind: [{node: n2, backend: vxlan, reason: BeyondRouter}]}";
    let mut found = Found {
        nodes: saying([(
            "n2",
            Says { sends: Some(BackendName::HostGw), receives: [BackendName::HostGw].into(), ..Says::default() },
        )]),
        ..network("{backend: ipip, dns: towpath, serviceProxy: towpath}")
    };
    found.nodes.insert(NodeName::new("n1"), says(n1));
    let hop = |from: &str, to: &str| asked(&world, &found, from, to, "80").ways[0].path[1].clone();
    assert_eq!(hop("pod/client", "pod/web-2"), "node n1: VXLAN to node n2", "a router lies between");
    assert!(hop("pod/web-2", "pod/client").starts_with("node n2: as it is (host-gw"));
    let dns = asked(&world, &found, "pod/client", "10.96.0.10", "53/udp").service.unwrap();
    assert_eq!(dns.backends, ["10.244.1.3:53"]);
    let service = |from: &str, to: &str, port: &str| asked(&world, &found, from, to, port).service.unwrap();
    assert_eq!(service("node/n1", "svc/web", "8080").place, "on node n1, by kube-proxy");
    assert_eq!(service("pod/client", "svc/web", "8080").place, "on node n1, when the socket connects");
    assert_eq!(service("node/n2", "svc/web", "8080").place, "on node n2, when the socket connects");
    let outside = asked(&world, &found, "203.0.113.10", "node/n1", "30000");
    assert_eq!(outside.service.as_ref().unwrap().place, "on node n1, at the uplink, by kube-proxy");
    assert_eq!(outside.service.as_ref().unwrap().algorithm, None);
    assert_eq!(outside.notes, [CLIENT_HIDDEN]);
    assert!(outside.ways[1].path[1].contains("through the node's own stack to node n2"), "{outside}");
}

#[test]
fn ends_are_written_in_json_as_in_words() {
    let end = asked(&cluster(false), &Found::default(), "pod/client", "svc/web", "8080").from;
    assert_eq!(serde_json::to_value(&end).unwrap()["what"], "pod default/client");
}
