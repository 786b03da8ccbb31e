//! `prove` against brute force: on a small universe every pod there could be is made, and every flow between them judged.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test may panic, its helper functions too"
)]

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use proptest::prelude::*;
use serde_json::{Value, json};
use towpath_model::desired::{RowProtocol, Verdict};
use towpath_model::{
    ClusterNetworkPolicy, DomainName, Namespace, NamespacedName, NetworkPolicy, Node, Pod, Protocol, World,
};
use towpath_policy::Learned;
use towpath_policy::verify::prove::{Answer, Limits, Unanswered, prove};
use towpath_policy::verify::{Owners, Statement, Universe};
use towpath_policy::{Evaluator, Flow, View};

const RANGE: &str = "10.0.0.0/16";
const INNER: &str = "10.0.1.0/24";

/// Namespaces: two that are spoken of (the labels of `n0` are known), and three strangers, so that two can be in different ones.
const SPACES: [(&str, Option<&str>); 5] =
    [("n0", Some("x")), ("n1", None), ("n1", Some("x")), ("s", None), ("s", Some("x"))];

/// Addresses outside that are nodes' ones. None of them is a pod's own node.
const NODES: [(&str, &str); 4] =
    [("m0", "203.0.113.10"), ("m1-with-x", "203.0.113.11"), ("m2", "198.51.100.8"), ("m3-with-x", "198.51.100.9")];

#[derive(Clone, Debug)]
struct Maker {
    space: usize,
    a: Option<&'static str>,
    b: Option<&'static str>,
    inner: bool,
    http: bool,
}

/// Every kind of pod.
fn kinds() -> Vec<Maker> {
    let mut all = Vec::new();
    for space in 0..SPACES.len() {
        for a in [None, Some("x"), Some("z")] {
            for b in [None, Some("x")] {
                for (inner, http) in [(false, false), (true, false), (false, true), (true, true)] {
                    all.push(Maker { space, a, b, inner, http });
                }
            }
        }
    }
    all
}

fn space(name: &str, labelled: bool) -> Namespace {
    let mut labels = json!({"kubernetes.io/metadata.name": name});
    if labelled {
        labels["t"] = json!("x");
    }
    Namespace::try_from(&serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap())
        .unwrap()
}

/// A world of one shape of strangers' labels: every namespace name has one set of labels in it.
fn world(policies: &Policies, labelled: [bool; 2], makers: &[Maker]) -> (World, Vec<(Maker, IpAddr, bool)>) {
    let mut world = policies.world();
    let spaces = [("n0", true), ("n1", labelled[0]), ("s", labelled[1]), ("s2", false), ("s3", true)];
    for (name, with) in spaces {
        world.namespaces.insert(name.to_owned(), space(name, with));
    }
    let mut made = Vec::new();
    for (index, maker) in makers.iter().enumerate() {
        let (name, label) = SPACES[maker.space];
        let with = world.namespaces[name].labels.contains_key("t");
        if with != label.is_some() {
            continue;
        }
        let address: IpAddr = format!("10.0.{}.{}", u8::from(maker.inner), index % 250 + 1).parse().unwrap();
        let labels: BTreeMap<&str, &str> =
            [("a", maker.a), ("b", maker.b)].into_iter().filter_map(|(k, v)| Some((k, v?))).collect();
        let ports = if maker.http { json!([{"name": "http", "containerPort": 80}]) } else { json!([]) };
        let object = json!({"metadata": {"namespace": name, "name": format!("p{index}"), "labels": labels},
            "spec": {"containers": [{"name": "c", "ports": ports}]}, "status": {"phase": "Running", "podIPs": [{"ip": address}]}});
        let pod = Pod::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.pods.insert(pod.name.clone(), pod);
        made.push((maker.clone(), address, true));
    }
    for (name, address) in NODES {
        let labels = if name.ends_with('x') { json!({"z": "x"}) } else { json!({}) };
        let object = json!({"metadata": {"name": name, "labels": labels}, "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        let node = Node::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.nodes.insert(node.name.clone(), node);
    }
    for address in ["203.0.113.9", "198.51.100.7"].into_iter().chain(NODES.map(|(_, address)| address)) {
        let nobody = Maker { space: 0, a: None, b: None, inner: false, http: false };
        made.push((nobody, address.parse().unwrap(), false));
    }
    (world, made)
}

fn selector() -> impl Strategy<Value = Value> {
    prop_oneof![
        1 => Just(json!({})),
        2 => Just(json!({"matchLabels": {"a": "x"}})),
        1 => Just(json!({"matchLabels": {"b": "x"}})),
        1 => Just(json!({"matchExpressions": [{"key": "a", "operator": "NotIn", "values": ["x"]}]})),
        1 => Just(json!({"matchExpressions": [{"key": "a", "operator": "Exists"}]})),
        1 => Just(json!({"matchExpressions": [{"key": "b", "operator": "DoesNotExist"}, {"key": "a", "operator": "Exists"}]})),
    ]
}

fn peer() -> impl Strategy<Value = Value> {
    let namespaces = prop_oneof![
        Just(json!({"matchLabels": {"t": "x"}})),
        Just(json!({"matchLabels": {"kubernetes.io/metadata.name": "n1"}})),
        Just(
            json!({"matchExpressions": [{"key": "kubernetes.io/metadata.name", "operator": "NotIn", "values": ["n0"]}]})
        ),
        Just(json!({})),
    ];
    prop_oneof![
        2 => selector().prop_map(|s| json!({"podSelector": s})),
        2 => (namespaces, selector()).prop_map(|(n, s)| json!({"namespaceSelector": n, "podSelector": s})),
        2 => prop::sample::select(vec![INNER, "0.0.0.0/0", "203.0.113.0/24"]).prop_map(|c| json!({"ipBlock": {"cidr": c}})),
        1 => Just(json!({"ipBlock": {"cidr": "0.0.0.0/0", "except": [RANGE]}})),
    ]
}

fn rules(key: &'static str) -> impl Strategy<Value = Value> {
    let port = prop::sample::select(vec![json!({"port": 80}), json!({"port": "http"}), json!({"protocol": "UDP"})]);
    let rule = (prop::collection::vec(peer(), 0..3), prop::option::of(port))
        .prop_map(move |(peers, port)| json!({key: peers, "ports": port.into_iter().collect::<Vec<_>>()}));
    prop::collection::vec(rule, 0..3).prop_map(|rules| json!(rules))
}

#[derive(Clone, Debug)]
struct Policies {
    namespaced: BTreeMap<NamespacedName, NetworkPolicy>,
    cluster: BTreeMap<String, ClusterNetworkPolicy>,
}

impl Policies {
    fn world(&self) -> World {
        World { policies: self.namespaced.clone(), cluster_policies: self.cluster.clone(), ..World::default() }
    }
}

fn cluster_rules(key: &'static str) -> impl Strategy<Value = Value> {
    let spaces = || {
        prop::sample::select(vec![
            json!({}),
            json!({"matchLabels": {"t": "x"}}),
            json!({"matchLabels": {"kubernetes.io/metadata.name": "n0"}}),
        ])
    };
    let pods = (spaces(), selector()).prop_map(|(n, p)| json!({"pods": {"namespaceSelector": n, "podSelector": p}}));
    let whole = spaces().prop_map(|n| json!({"namespaces": n}));
    let outward = prop_oneof![
        prop::sample::select(vec![INNER, "0.0.0.0/0", "203.0.113.0/24"]).prop_map(|net| json!({"networks": [net]})),
        Just(json!({"nodes": {}})),
        Just(json!({"nodes": {"matchLabels": {"z": "x"}}})),
        // In rules that do not accept it is not understood: they deny all.
        Just(json!({"domainNames": ["*.example.com", "example.com"]})),
    ];
    let peer = if key == "to" {
        prop_oneof![2 => pods, 2 => whole, 3 => outward].boxed()
    } else {
        prop_oneof![pods, whole].boxed()
    };
    let protocol = prop::sample::select(vec![
        json!(null),
        json!([{"tcp": {"destinationPort": {"number": 80}}}]),
        json!([{"udp": {"destinationPort": {"range": {"start": 1, "end": 65535}}}}]),
        json!([{"destinationNamedPort": "http"}]),
    ]);
    let rule = (prop::sample::select(vec!["Accept", "Deny", "Pass"]), prop::collection::vec(peer, 1..3), protocol)
        .prop_map(move |(action, peers, protocols)| json!({"action": action, key: peers, "protocols": protocols}));
    prop::collection::vec(rule, 0..3).prop_map(|rules| json!(rules))
}

fn cluster_policies() -> impl Strategy<Value = BTreeMap<String, ClusterNetworkPolicy>> {
    let subject = (prop::sample::select(vec![json!({}), json!({"matchLabels": {"t": "x"}})]), selector())
        .prop_map(|(n, p)| json!({"pods": {"namespaceSelector": n, "podSelector": p}}));
    let policy =
        (prop::sample::select(vec!["Admin", "Baseline"]), 0..3, subject, cluster_rules("from"), cluster_rules("to"));
    prop_oneof![Just(Vec::new()).boxed(), prop::collection::vec(policy, 0..4).boxed()].prop_map(|list| {
        let parse = |(index, (tier, priority, subject, ingress, egress))| {
            let object = json!({"metadata": {"name": format!("c{index}")}, "spec": {
                "tier": tier, "priority": priority, "subject": subject, "ingress": ingress, "egress": egress}});
            // What does not fit together stands in its place as a rule that is closed.
            ClusterNetworkPolicy::fail_closed(&serde_json::from_value(object).unwrap()).unwrap().0
        };
        list.into_iter().enumerate().map(parse).map(|policy| (policy.name.clone(), policy)).collect()
    })
}

fn policies() -> impl Strategy<Value = Policies> {
    (namespaced(), cluster_policies()).prop_map(|(namespaced, cluster)| Policies { namespaced, cluster })
}

fn namespaced() -> impl Strategy<Value = BTreeMap<NamespacedName, NetworkPolicy>> {
    let types = prop::sample::select(vec![json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])]);
    let policy = (prop::sample::select(vec!["n0", "n0", "n1"]), selector(), types, rules("from"), rules("to"));
    prop::collection::vec(policy, 0..5).prop_map(|list| {
        let parse = |(index, (namespace, selector, types, ingress, egress))| {
            let object = json!({"metadata": {"namespace": namespace, "name": format!("q{index}")}, "spec": {
                "podSelector": selector, "policyTypes": types, "ingress": ingress, "egress": egress}});
            NetworkPolicy::try_from(&serde_json::from_value(object).unwrap()).unwrap()
        };
        list.into_iter().enumerate().map(parse).map(|policy| (policy.name.clone(), policy)).collect()
    })
}

/// A set as text, and the same said by itself.
type Said = (&'static str, fn(&Maker, IpAddr, bool) -> bool);

const SETS: [Said; 11] = [
    ("anything", |_, _, _| true),
    ("any pod", |_, _, pod| pod),
    ("outside", |_, _, pod| !pod),
    ("a=x", |m, _, pod| pod && m.a == Some("x")),
    ("a!=x,!b", |m, _, pod| pod && m.a != Some("x") && m.b.is_none()),
    ("in namespace n0", |m, _, pod| pod && SPACES[m.space].0 == "n0"),
    ("outside namespace n0", |m, _, pod| !(pod && SPACES[m.space].0 == "n0")),
    ("pods a in namespaces t=x", |m, _, pod| pod && m.a.is_some() && SPACES[m.space].1 == Some("x")),
    ("outside namespaces t=x or b=x", |m, _, pod| !(pod && SPACES[m.space].1 == Some("x")) || m.b == Some("x")),
    ("10.0.1.0/24 or 203.0.113.8/30", |_, ip, _| {
        ip.to_string().starts_with("10.0.1.")
            || ["203.0.113.9", "203.0.113.10", "203.0.113.11"].contains(&ip.to_string().as_str())
    }),
    ("nodes", |_, ip, _| NODES.iter().any(|(_, address)| ip.to_string() == *address)),
];

type Port = (RowProtocol, u16);
const TCP: RowProtocol = RowProtocol::Ports(Protocol::Tcp);
const UDP: RowProtocol = RowProtocol::Ports(Protocol::Udp);
const FLOWS: [Port; 4] = [(TCP, 80), (TCP, 81), (UDP, 53), (RowProtocol::Other, 0)];

/// Ports as text, and the same said by itself (`bool`: the destination calls it http).
type SaidPorts = (&'static str, fn(Port, bool) -> bool);
const PORTS: [SaidPorts; 5] = [
    ("any port", |_, _| true),
    ("80", |p, _| p == (TCP, 80)),
    ("81, icmp", |p, _| p == (TCP, 81) || p.0 == RowProtocol::Other),
    ("any udp port", |p, _| p.0 == UDP),
    ("http", |p, http| p.0 == TCP && http),
];

#[derive(Clone, Debug)]
struct Asked {
    nothing: bool,
    from: usize,
    to: usize,
    on: usize,
    but: Option<(usize, usize)>,
}

impl Asked {
    fn text(&self) -> String {
        let claim = if self.nothing { "nothing" } else { "everything" };
        let (from, to, on) = (SETS[self.from].0, SETS[self.to].0, PORTS[self.on].0);
        let but =
            self.but.map(|(set, ports)| format!(" but {} from {}", PORTS[ports].0, SETS[set].0)).unwrap_or_default();
        format!("{claim} {from} reaches {to} on {on}{but}")
    }

    fn speaks_of(&self, from: &(Maker, IpAddr, bool), to: &(Maker, IpAddr, bool), port: Port) -> bool {
        let http = to.0.http && to.2 && port == (TCP, 80);
        let is = |set: usize, who: &(Maker, IpAddr, bool)| SETS[set].1(&who.0, who.1, who.2);
        let excepted = self.but.is_some_and(|(set, ports)| is(set, from) && PORTS[ports].1(port, http));
        is(self.from, from) && is(self.to, to) && PORTS[self.on].1(port, http) && !excepted
    }
}

fn asked() -> impl Strategy<Value = Asked> {
    let set = || 0..SETS.len();
    (any::<bool>(), set(), set(), 0..PORTS.len(), prop::option::of((set(), 0..PORTS.len())))
        .prop_map(|(nothing, from, to, on, but)| Asked { nothing, from, to, on, but })
}

/// Whether a flow between any of all pods contradicts the statement; none: it speaks of no flow.
fn contradicted(policies: &Policies, asked: &Asked) -> Option<bool> {
    let mut spoken = None;
    let makers = kinds();
    for labelled in [[false, false], [false, true], [true, false], [true, true]] {
        let (world, made) = world(policies, labelled, &makers);
        // DNS may say anything, also nothing at all.
        let mut learned = Learned::new(towpath_policy::names::Limits::default());
        for (_, address, _) in made.iter().filter(|(.., pod)| asked.nothing && !pod) {
            let name = DomainName { below: false, name: "example.com".to_owned() };
            learned.learn("example.com", [*address], Duration::ZERO, &[name]);
        }
        let evaluator = Evaluator::new(&View { names: &learned, ..View::of(&world) });
        for from in &made {
            for to in made.iter().filter(|to| to.1 != from.1 && (to.2 || from.2)) {
                for port in FLOWS.into_iter().filter(|port| asked.speaks_of(from, to, *port)) {
                    let verdict = evaluator.evaluate(&Flow::new(from.1, to.1, port.0, port.1)).verdict;
                    if (verdict == Verdict::Allow) == asked.nothing {
                        return Some(true);
                    }
                    spoken = Some(false);
                }
            }
        }
    }
    spoken
}

fn universe(policies: &Policies) -> Universe {
    let mut world = policies.world();
    world.namespaces.insert("n0".to_owned(), space("n0", true));
    Universe::of(world, &Owners::new(), &[RANGE.parse().unwrap()])
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, max_shrink_iters: 200, ..ProptestConfig::default() })]
    #[test]
    fn a_statement_is_proved_exactly_if_no_possible_pod_contradicts_it(policies in policies(), asked in prop::collection::vec(asked(), 4)) {
        let universe = universe(&policies);
        for asked in asked {
            let statement = Statement::parse(&asked.text()).unwrap();
            let answer = prove(&universe, &statement, &Limits::default());
            let truth = contradicted(&policies, &asked);
            let found = match answer {
                Ok(Answer::Proved { .. }) => None,
                // That it contradicts the statement, the evaluator has said.
                Ok(Answer::Disproved(found)) => Some(found),
                Err(Unanswered::Unspeakable(why)) => {
                    prop_assert_eq!(truth, None, "{}: {}", asked.text(), why);
                    continue;
                }
                Err(why) => panic!("{}: {why}", asked.text()),
            };
            let truth = truth == Some(true);
            prop_assert!(!truth || found.is_some(), "{}: proved, and it is not so", asked.text());
            // Of the ports that brute force tries, and with its one name, it must have found it too.
            if let Some(found) = found {
                let tried = match found.protocol.as_str() {
                    "TCP" => found.port == 80 || (found.port == 81 && found.port_names.is_empty()),
                    "UDP" => found.port == 53 && found.port_names.is_empty(),
                    other => other == "ICMP",
                };
                prop_assert!(truth || !tried, "{}: {}", asked.text(), found);
            }
        }
    }
}

fn tutorial() -> Universe {
    let object = json!({"metadata": {"namespace": "payments", "name": "db"}, "spec": {
        "podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "api"}}}], "ports": [{"port": 5432}]}]}});
    let policy = NetworkPolicy::try_from(&serde_json::from_value(object).unwrap()).unwrap();
    let world = World { policies: [(policy.name.clone(), policy)].into(), ..World::default() };
    Universe::of(world, &Owners::new(), &[])
}

fn ask(universe: &Universe, text: &str) -> Result<Answer, Unanswered> {
    prove(universe, &Statement::parse(text).unwrap(), &Limits::default())
}

#[test]
fn the_example_of_the_tutorial_is_proved_and_a_wider_claim_is_not() {
    let universe = tutorial();
    let text =
        "nothing outside namespace payments reaches app=db in namespace payments on any port but 5432 from app=api";
    assert!(matches!(ask(&universe, text), Ok(Answer::Proved { .. })));
    let wider = ask(&universe, "nothing outside namespace payments reaches app=db in namespace payments").unwrap();
    let Answer::Disproved(found) = wider else { panic!("{wider:?}") };
    assert_eq!((found.from.labels["app"].as_str(), found.port), ("api", 5432));
    assert_eq!(found.decision.verdict, Verdict::Allow);
    let text = found.to_string();
    assert!(text.contains("NetworkPolicy payments/db: spec.ingress[0] from[0] ports[0]"), "{text}");
    let all = ask(&universe, "everything app=api reaches app=db in namespace payments on 5432").unwrap();
    assert!(matches!(all, Answer::Proved { .. }), "{all:?}");
    let all = ask(&universe, "everything app=api reaches app=db in namespace payments on 5432-5433").unwrap();
    assert!(matches!(all, Answer::Disproved(found) if found.port == 5433));
}

#[test]
fn names_are_refused_and_a_limit_is_an_answer_of_its_own() {
    let universe = tutorial();
    let error = ask(&universe, "nothing reaches payments/db").unwrap_err().to_string();
    assert!(error.contains("pods app=db in namespace payments"), "{error}");
    let statement = Statement::parse("nothing reaches app=db").unwrap();
    let limits = Limits { steps: 10, known_namespaces: false };
    assert_eq!(prove(&universe, &statement, &limits).unwrap_err(), Unanswered::TooLong { steps: 10 });
}

/// One ClusterNetworkPolicy of the admin tier for all pods, with these egress rules, and these nodes.
fn of_admin(egress: Value, nodes: &[(&str, Value)]) -> Universe {
    let object = json!({"metadata": {"name": "c"}, "spec": {
        "tier": "Admin", "priority": 1, "subject": {"namespaces": {}}, "egress": egress}});
    let policy = ClusterNetworkPolicy::try_from(&serde_json::from_value(object).unwrap()).unwrap();
    let mut world = World { cluster_policies: [(policy.name.clone(), policy)].into(), ..World::default() };
    for (index, (address, labels)) in nodes.iter().enumerate() {
        let object = json!({"metadata": {"name": format!("m{index}"), "labels": labels},
            "status": {"addresses": [{"type": "InternalIP", "address": address}]}});
        let node = Node::try_from(&serde_json::from_value(object).unwrap()).unwrap();
        world.nodes.insert(node.name.clone(), node);
    }
    Universe::of(world, &Owners::new(), &[])
}

#[test]
fn an_address_outside_may_be_a_nodes_and_that_of_a_known_node_is() {
    let to = |action: &str, selector: Value| json!({"action": action, "to": [{"nodes": selector}]});
    let rest = |action: &str| json!({"action": action, "to": [{"networks": ["0.0.0.0/0"]}]});
    let any = of_admin(json!([to("Accept", json!({})), rest("Deny")]), &[]);
    let text = "nothing in namespace shop reaches 192.0.2.1";
    let Ok(Answer::Disproved(found)) = ask(&any, text) else { panic!("a node could have it") };
    assert!(found.to.is_node && found.to.to_string() == "192.0.2.1, a node", "{found}");
    assert!(matches!(ask(&any, &format!("{text} but to nodes")), Ok(Answer::Proved { .. })));
    let closed = of_admin(json!([to("Deny", json!({})), rest("Accept")]), &[]);
    assert!(
        matches!(ask(&closed, "everything in namespace shop reaches 192.0.2.1"), Ok(Answer::Disproved(found)) if found.to.is_node)
    );
    assert!(matches!(ask(&closed, "nothing in namespace shop reaches nodes"), Ok(Answer::Proved { .. })));
    // A node that is known has the labels that it has.
    let labelled = |zone: &str| json!({"matchLabels": {"zone": zone}});
    let known = of_admin(
        json!([to("Accept", labelled("b")), rest("Deny")]),
        &[("192.0.2.1", json!({"zone": "a"})), ("192.0.2.2", json!({"zone": "b"}))],
    );
    assert!(matches!(ask(&known, text), Ok(Answer::Proved { .. })));
    for address in ["192.0.2.2", "192.0.2.3"] {
        let text = format!("nothing in namespace shop reaches {address}");
        assert!(matches!(ask(&known, &text), Ok(Answer::Disproved(_))), "{text}");
    }
    // Two nodes that say one address are each of them possible.
    let shared = of_admin(
        json!([to("Accept", labelled("b")), rest("Deny")]),
        &[("192.0.2.1", json!({"zone": "a"})), ("192.0.2.1", json!({"zone": "b"}))],
    );
    assert!(matches!(ask(&shared, text), Ok(Answer::Disproved(_))));
}

#[test]
fn nothing_is_proved_of_nobody() {
    let mut world = tutorial().world;
    world.namespaces.insert("shop".to_owned(), space("shop", false));
    let universe = Universe::of(world, &Owners::new(), &[]);
    let known = Limits { known_namespaces: true, ..Limits::default() };
    for (text, limits, why) in [
        ("nothing in namespace shpo reaches app=db", known, "from: any pod in namespace shpo: nobody can be that"),
        ("nothing app=web or in namespace shpo reaches app=db in namespace payments", known, "in namespace shpo"),
        ("nothing app=web,app=api reaches app=db", Limits::default(), "from: pods app=api,app=web: nobody"),
        ("nothing in namespace shop reaches 2001:db8::/32", Limits::default(), "to: 2001:db8::/32: nobody"),
        ("everything app=web reaches outside on http", Limits::default(), "no possible flow is meant"),
        ("nothing outside reaches 192.0.2.1", Limits::default(), "no possible flow is meant"),
        ("nothing reaches app=db but any port", Limits::default(), "no possible flow is meant"),
        (
            "nothing app=web reaches app=db but from in namespace shop or outside namespace shop",
            Limits::default(),
            "no possible flow",
        ),
    ] {
        let answer = prove(&universe, &Statement::parse(text).unwrap(), &limits);
        let Err(Unanswered::Unspeakable(said)) = answer else { panic!("{text}: {answer:?}") };
        assert!(said.contains(why), "{text}: {said}");
    }
}

#[test]
fn that_every_port_is_open_can_be_shown_of_a_rule_that_names_them_all() {
    let mut object = json!({"metadata": {"namespace": "shop", "name": "all"}, "spec": {
        "podSelector": {}, "ingress": [{"ports": [{"port": 1, "endPort": 65535}]}]}});
    let of = |object: &Value| {
        let policy = NetworkPolicy::try_from(&serde_json::from_value(object.clone()).unwrap()).unwrap();
        let world = World { policies: [(policy.name.clone(), policy)].into(), ..World::default() };
        Universe::of(world, &Owners::new(), &[])
    };
    let text = "everything reaches in namespace shop on tcp";
    assert!(matches!(ask(&of(&object), text), Ok(Answer::Proved { .. })));
    object["spec"]["ingress"][0]["ports"][0]["port"] = json!(2);
    assert!(matches!(ask(&of(&object), text), Ok(Answer::Disproved(found)) if found.port == 1));
}
