use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixListener;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use serde_json::{Value, json};
use towpath_model::custom::NetworkConfigSpec;
use towpath_model::{EndpointSlice, Node, NodeName, Service, World};
use towpath_plan::modes::{Dns, InCharge, Proxy};
use towpath_wire::service::{BackendConnections, NodeConnections};

use super::nodes::Counted;
use super::show;
use super::view::{ServiceView, Views};
use crate::configured::{Configured, Found, NodeSays};
use crate::nodes::ask;

fn parse<T: serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn node(name: &str, zone: &str, ip: &str) -> Node {
    let node: core::Node = parse(json!({
        "metadata": {"name": name, "labels": {"topology.kubernetes.io/zone": zone}},
        "status": {"addresses": [{"type": "InternalIP", "address": ip}], "conditions": []},
    }));
    Node::try_from(&node).unwrap()
}

fn service(name: &str, spec: &Value) -> Service {
    let service: core::Service = parse(json!({"metadata": {"namespace": "shop", "name": name}, "spec": spec}));
    Service::try_from(&service).unwrap()
}

fn slice(name: &str, of: &str, port: &Value, endpoints: &Value) -> EndpointSlice {
    let slice: discovery::EndpointSlice = parse(json!({
        "metadata": {"namespace": "shop", "name": name, "labels": {"kubernetes.io/service-name": of}},
        "addressType": "IPv4", "ports": [port], "endpoints": endpoints,
    }));
    EndpointSlice::try_from(&slice).unwrap()
}

fn world() -> World {
    let web = service(
        "web",
        &json!({
            "type": "NodePort", "clusterIP": "10.96.0.1", "clusterIPs": ["10.96.0.1"], "externalTrafficPolicy": "Local",
            "ports": [{"name": "http", "port": 80, "targetPort": 8080, "nodePort": 30080}], "sessionAffinity": "ClientIP",
        }),
    );
    let cache = service(
        "cache",
        &json!({"clusterIP": "10.96.0.2", "clusterIPs": ["10.96.0.2"], "ports": [{"port": 53, "protocol": "UDP"}]}),
    );
    let names = service(
        "names",
        &json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"port": 53, "protocol": "UDP"}]}),
    );
    let http = json!({"name": "http", "port": 8080});
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n1", "conditions": {"ready": true},
            "targetRef": {"kind": "Pod", "name": "web-1"}},
        {"addresses": ["10.0.0.2"], "nodeName": "n2", "conditions": {"ready": true}},
        {"addresses": ["10.0.0.3"], "nodeName": "n2", "conditions": {"ready": false}},
        {"addresses": ["10.0.0.4"], "nodeName": "n1", "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["127.0.0.1"]},
    ]);
    let slices = [
        slice("web-abc", "web", &http, &endpoints),
        slice("web-odd", "web", &json!({"name": "other", "port": 1}), &json!([{"addresses": ["10.0.0.9"]}])),
    ];
    World {
        nodes: [node("n1", "a", "192.0.2.1"), node("n2", "b", "192.0.2.2")]
            .into_iter()
            .map(|n| (n.name.clone(), n))
            .collect(),
        services: [web, cache, names].into_iter().map(|s| (s.name.clone(), s)).collect(),
        slices: slices.into_iter().map(|s| (s.name.clone(), s)).collect(),
        ..World::default()
    }
}

fn open(protocol: &str, service: &str, backend: &str, open: u64) -> BackendConnections {
    BackendConnections {
        protocol: protocol.to_owned(),
        service: service.parse().unwrap(),
        backend: backend.parse().unwrap(),
        open,
    }
}

fn counted() -> Counted {
    let mut counted = Counted::default();
    let of_n1 = vec![
        open("TCP", "10.96.0.1:80", "10.0.0.1:8080", 3),
        open("TCP", "10.96.0.1:80", "10.0.0.7:8080", 1),
        open("TCP", "192.0.2.1:30080", "10.0.0.1:8080", 2),
        open("UDP", "10.96.0.1:80", "10.0.0.1:8080", 100),
        open("TCP", "10.96.0.9:80", "10.0.0.1:8080", 100),
    ];
    counted.take("n1", Ok(NodeConnections { node: "n1".to_owned(), connections: of_n1, incomplete: Vec::new() }));
    counted.take("n2", Err(anyhow::anyhow!("no agent answers")));
    counted
}

fn configured(world: &World, found: &Found) -> Configured {
    Configured::of(world, found).unwrap()
}

fn view(name: &str, counted: Option<&Counted>) -> ServiceView {
    let world = world();
    let key = towpath_model::NamespacedName::new("shop", name);
    Views::new(&world, configured(&world, &Found::default()), counted).of(&world.services[&key])
}

#[test]
fn a_service_is_shown_with_who_uses_each_endpoint_and_why_others_do_not() {
    let counted = counted();
    let text = show::one(&view("web", Some(&counted)), Some(&counted));
    let expected = "\
Service shop/web: NodePort
  cluster IPs    10.96.0.1
  policies       inside Cluster, outside Local
  algorithm      random
  affinity       ClientIP, 10800 s
  refused        EndpointSlice shop/web-abc: endpoint 127.0.0.1: loopback addresses are the node's own

Port http 80/TCP: 10.96.0.1:80, node port 30080
  EndpointSlice shop/web-odd has no port http/TCP
  BACKEND         NODE  POD         STATE        CLIENTS INSIDE                                CLIENTS OUTSIDE                                                    CONNECTIONS
  10.0.0.1:8080   n1    shop/web-1  ready        of all nodes                                  of n1 (of 1 not: on another node, and the policy is Local)         5
  10.0.0.2:8080   n2                ready        of all nodes                                  of n2 (of 1 not: on another node, and the policy is Local)         0
  10.0.0.3:8080   n2                not ready    none: not ready                               none: not ready; on another node, and the policy is Local          0
  10.0.0.4:8080   n1                terminating  none: terminating                             none: on another node, and the policy is Local; terminating        0
  127.0.0.1:8080                    refused      none: loopback addresses are the node's own                                                                      0
  10.0.0.7:8080                     draining     none: no endpoint any more                                                                                       1

connections as counted on n1
  node n2: its connections are not counted: no agent answers";
    let squeezed =
        |text: &str| text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>();
    assert_eq!(squeezed(&text), squeezed(expected), "{text}");
}

#[test]
fn the_same_as_json_by_names_that_stay() {
    let counted = counted();
    let json = serde_json::to_value(view("web", Some(&counted))).unwrap();
    assert_eq!(json["type"], "NodePort");
    assert_eq!(json["algorithm"], "random");
    assert_eq!(json["countedOn"], json!(["n1"]));
    assert_eq!(json["ports"][0]["frontends"], json!(["10.96.0.1:80", "node port 30080"]));
    let first = &json["ports"][0]["backends"][0];
    assert_eq!(
        *first,
        json!({"address": "10.0.0.1", "port": 8080, "node": "n1", "pod": "shop/web-1", "slices": ["web-abc"], "state": "ready",
            "inside": {"usedBy": ["n1", "n2"], "unused": {}},
            "outside": {"usedBy": ["n1"], "unused": {"on another node, and the policy is Local": ["n2"]}}, "connections": 5})
    );
    let unasked = serde_json::to_value(view("web", None)).unwrap();
    assert!(unasked.get("countedOn").is_none() && unasked["ports"][0]["backends"][0].get("connections").is_none());
}

#[test]
fn a_service_without_endpoints_leads_nowhere_and_a_headless_one_is_not_served() {
    let empty = view("cache", None);
    assert!(empty.leads_nowhere());
    assert!(show::one(&empty, None).contains("no endpoints: connections are refused"));
    assert!(!view("web", None).leads_nowhere());
    let headless = view("names", None);
    assert!(!headless.leads_nowhere());
    let text = show::one(&headless, None);
    assert!(
        text.contains("not served     headless: DNS leads to the endpoints") && !text.contains("refused"),
        "{text}"
    );
}

#[test]
fn the_list_has_a_line_a_service_and_what_is_refused_below() {
    let (world, counted) = (world(), counted());
    let views = Views::new(&world, configured(&world, &Found::default()), Some(&counted));
    let all: Vec<ServiceView> = world.services.values().map(|service| views.of(service)).collect();
    let text = show::list(all.into_iter(), views.notes(), Some(&counted));
    let line = |name: &str| text.lines().find(|line| line.contains(&format!(" {name} "))).unwrap_or_default();
    let words = |name: &str| line(name).split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(words("web"), "shop web NodePort 10.96.0.1 80:30080/TCP random 2/5 6");
    assert_eq!(words("cache"), "shop cache ClusterIP 10.96.0.2 53/UDP random 0/0 0");
    assert!(text.contains("shop/web: EndpointSlice shop/web-abc: endpoint 127.0.0.1"), "{text}");
    assert_eq!(show::list(std::iter::empty(), &[], None), "no Services");
}

#[test]
fn an_agent_of_another_version_or_none_is_said() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("service.sock");
    assert!(format!("{:#}", ask::<NodeConnections>(&path).unwrap_err()).contains("no agent answers"));
    let listener = UnixListener::bind(&path).unwrap();
    let answers = ["{\"node\":\"n1\",\"connections\":[],\"what is this\":1}", "nonsense"];
    let serving = std::thread::spawn(move || {
        for answer in answers {
            listener.accept().unwrap().0.write_all(answer.as_bytes()).unwrap();
        }
    });
    assert_eq!(ask::<NodeConnections>(&path).unwrap().node, "n1");
    assert!(format!("{:#}", ask::<NodeConnections>(&path).unwrap_err()).contains("another version"));
    serving.join().unwrap();
    let sum = counted();
    assert_eq!((sum.open.len(), sum.nodes.len(), sum.incomplete.len()), (5, 1, 1));
    assert_eq!(BTreeMap::from_iter(sum.open).values().sum::<u64>(), 206);
}

#[test]
fn an_endpoint_in_a_range_of_services_is_refused_as_nodes_refuse_it() {
    let world = world();
    let network = NetworkConfigSpec { service_cidrs: Some(vec!["10.0.0.0/24".to_owned()]), ..Default::default() };
    let found = Found { network: Some(network), ..Found::default() };
    let view = Views::new(&world, configured(&world, &found), None)
        .of(&world.services[&towpath_model::NamespacedName::new("shop", "web")]);
    assert!(view.leads_nowhere(), "{view:?}");
    let text = show::one(&view, None);
    assert!(text.contains("endpoint 10.0.0.1: itself a Service address"), "{text}");
    assert!(text.contains("none: itself a Service address"), "{text}");
}

#[test]
fn where_kube_proxy_serves_others_than_pods_it_is_said_by_node() {
    let (world, web) = (world(), towpath_model::NamespacedName::new("shop", "web"));
    let in_charge = Some(InCharge { proxy: Proxy::KubeProxy, dns: Dns::CoreDns });
    let nodes = BTreeMap::from([(NodeName::new("n2"), NodeSays { in_charge, ..NodeSays::default() })]);
    let found = Found { nodes, doubts: vec!["the moon".to_owned()], ..Found::default() };
    let text = show::one(&Views::new(&world, configured(&world, &found), None).of(&world.services[&web]), None);
    assert!(text.contains("not by us      on n2, kube-proxy serves nodes' own processes"), "{text}");
    assert!(text.contains("note           the moon"), "{text}");
    assert!(!show::one(&view("web", None), None).contains("not by us"));
}

#[test]
fn cluster_dns_leads_to_each_nodes_own_server_where_that_answers() {
    let mut world = world();
    let dns: core::Service = parse(json!({
        "metadata": {"namespace": "kube-system", "name": "kube-dns"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"],
            "ports": [{"name": "dns", "port": 53, "protocol": "UDP"}, {"name": "metrics", "port": 9153}]},
    }));
    let dns = Service::try_from(&dns).unwrap();
    world.services.insert(dns.name.clone(), dns.clone());
    let view = Views::new(&world, configured(&world, &Found::default()), None).of(&dns);
    let [port, metrics] = view.ports.as_slice() else { panic!("{view:?}") };
    assert_eq!(port.backends.iter().map(|one| one.state.as_str()).collect::<Vec<_>>(), ["node's own DNS"]);
    assert_eq!(port.backends[0].inside.used_by, ["n1", "n2"]);
    assert!(metrics.backends.is_empty(), "not of other ports");
    assert_eq!(view.endpoints(), (1, 1));
    assert!(show::one(&view, None).contains("of all nodes"));
}
