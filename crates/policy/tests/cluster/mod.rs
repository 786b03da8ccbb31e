//! Random small clusters as API objects: few labels, addresses and ports, so that everything meets everything.
#![allow(dead_code, unreachable_pub, missing_docs, reason = "each test binary uses a part of it")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::networking::v1 as networking;
use proptest::prelude::*;
use proptest::sample::Index;
use serde_json::{Value, json};
use towpath_model::desired::{PolicyChanges, PolicyImage, Row, RowKey, RowProtocol, Verdict};
use towpath_model::{
    ClusterNetworkPolicy, DomainName, Namespace, NamespacedName, NetworkPolicy, Node, Pod, Protocol, World,
};
use towpath_oracle::Cluster;
use towpath_policy::names::{Learned, Limits};
use towpath_policy::{Holders, View};

pub const NAMESPACES: [&str; 3] = ["n0", "n1", "kube-system"];
pub const NODES: [&str; 2] = ["m0", "m1"];
pub const DNS: [&str; 2] = ["169.254.20.10", "fd99::10"];

pub fn dns() -> Vec<IpAddr> {
    DNS.iter().map(|ip| ip.parse().unwrap()).collect()
}

/// Where pods are, and where they may be.
const POD_CIDRS: [&[&str]; 2] = [&["10.0.0.0/24", "fd00::/112"], &["10.0.1.0/25"]];
/// Inside one of [`BLOCKS`], and outside of all.
const NODE_EXTERNAL: [&str; 2] = ["198.51.100.70", "192.0.2.70"];

fn node_ips(node: usize) -> [String; 2] {
    [format!("10.9.0.{}", node + 1), format!("fd09::{}", node + 1)]
}

/// What DNS has said: of addresses outside, and, by somebody hostile, of a pod's, a node's and the node's own DNS.
pub const NAMES: [(&str, &str); 10] = [
    ("api.example.com", "198.51.100.7"),
    ("api.example.com", "2001:db8::1"),
    ("example.com", "203.0.113.9"),
    ("a.b.example.com", "203.0.113.10"),
    ("a.b.example.com", "198.51.100.200"),
    ("other.example.org", "203.0.113.9"),
    ("evil.example.com", "10.0.0.0"),
    ("evil.example.com", "10.9.0.1"),
    ("evil.example.com", "192.0.2.70"),
    ("evil.example.com", "169.254.20.10"),
];

const PATTERNS: [&str; 6] =
    ["*.example.com", "example.com", "api.example.com", "*.b.example.com", "*.example.org", "www.example.net"];

/// What of [`NAMES`] the mask has, less what may be a pod that is not known yet: that is for whoever learns to refuse.
pub fn names(spec: &Spec, world: &World) -> Vec<(String, IpAddr)> {
    let holders = Holders::of(&View::of(world));
    let said = NAMES.iter().enumerate().filter(|(index, _)| spec.names & (1 << index) != 0);
    let parsed = said.map(|(_, (name, address))| ((*name).to_owned(), address.parse().unwrap()));
    parsed.filter(|(_, address)| !holders.may_be_pod(world, *address)).collect()
}

/// The same, as a node has learned it.
pub fn learned(names: &[(String, IpAddr)]) -> Learned {
    let mut learned = Learned::new(Limits::default());
    relearn(&mut learned, 0, names);
    learned
}

/// Has a table hold these and no others, by learning and forgetting. `turn` must grow.
#[allow(dead_code, reason = "not every test changes what it has learned")]
pub fn relearn(learned: &mut Learned, turn: u64, names: &[(String, IpAddr)]) {
    for (name, address) in names {
        let itself = DomainName { below: false, name: name.clone() };
        learned.learn(name, [*address], Duration::from_secs(60 + turn), &[itself]);
    }
    // What was said again this turn is good for longer.
    learned.forget_overdue(Duration::from_secs(59 + turn), &BTreeSet::new());
}

/// How a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Plain,
    Terminating,
    Pending,
    /// On its node's addresses.
    Host,
    /// Ended; still shows addresses, which another pod may have by now.
    Ended,
}

#[derive(Clone, Debug)]
pub struct PodSpec {
    pub namespace: usize,
    pub node: usize,
    pub kind: Kind,
    pub labels: BTreeMap<String, String>,
    /// v4, v6.
    pub families: (bool, bool),
    /// (name, protocol) → number.
    pub ports: BTreeMap<(String, String), u16>,
}

/// A random cluster before it is made into objects. Pods and policies are named by their index.
#[derive(Clone, Debug)]
pub struct Spec {
    pub namespaces: Vec<BTreeMap<String, String>>,
    pub pods: Vec<PodSpec>,
    pub policies: Vec<Value>,
    pub cluster_policies: Vec<Value>,
    /// Which of [`NAMES`] DNS has said.
    pub names: u16,
}

pub fn labels() -> impl Strategy<Value = BTreeMap<String, String>> {
    let value = || prop_oneof![2 => Just(None), 3 => Just(Some("x")), 2 => Just(Some("y"))];
    (value(), value()).prop_map(|(a, b)| {
        [("a", a), ("b", b)].into_iter().filter_map(|(k, v)| Some((k.to_owned(), v?.to_owned()))).collect()
    })
}

fn selector() -> BoxedStrategy<Value> {
    let key = || prop::sample::select(vec!["a", "b", "c", "kubernetes.io/metadata.name"]);
    let values = || prop::sample::subsequence(vec!["x", "y", "n0", "n1"], 1..=3);
    let expression = prop_oneof![
        (key(), values()).prop_map(|(k, v)| json!({"key": k, "operator": "In", "values": v})),
        (key(), values()).prop_map(|(k, v)| json!({"key": k, "operator": "NotIn", "values": v})),
        key().prop_map(|k| json!({"key": k, "operator": "Exists"})),
        key().prop_map(|k| json!({"key": k, "operator": "DoesNotExist"})),
    ];
    prop_oneof![
        2 => Just(json!({})),
        3 => labels().prop_map(|l| json!({"matchLabels": l})),
        3 => (labels(), prop::collection::vec(expression, 1..3))
            .prop_map(|(l, e)| json!({"matchLabels": l, "matchExpressions": e})),
    ]
    .boxed()
}

const BLOCKS: [&str; 14] = [
    "0.0.0.0/0",
    "::/0",
    "10.0.0.0/8",
    "10.0.0.0/16",
    "10.0.0.0/24",
    "10.0.1.0/24",
    "10.0.0.2/31",
    "10.9.0.0/24",
    "198.51.100.0/24",
    "198.51.100.128/25",
    "203.0.113.9/32",
    "fd00::/16",
    "fd00::2/127",
    "2001:db8::/32",
];

fn inside(outer: &str, inner: &str) -> bool {
    let (outer, inner): (ipnet::IpNet, ipnet::IpNet) = (outer.parse().unwrap(), inner.parse().unwrap());
    outer.contains(&inner) && outer != inner
}

fn block() -> BoxedStrategy<Value> {
    (prop::sample::select(BLOCKS.to_vec()), prop::sample::subsequence(BLOCKS.to_vec(), 0..=4))
        .prop_map(|(cidr, holes)| {
            let except: Vec<&str> = holes.into_iter().filter(|hole| inside(cidr, hole)).collect();
            if except.is_empty() {
                json!({"ipBlock": {"cidr": cidr}})
            } else {
                json!({"ipBlock": {"cidr": cidr, "except": except}})
            }
        })
        .boxed()
}

fn peer() -> BoxedStrategy<Value> {
    prop_oneof![
        2 => selector().prop_map(|s| json!({"podSelector": s})),
        2 => selector().prop_map(|s| json!({"namespaceSelector": s})),
        3 => (selector(), selector()).prop_map(|(n, p)| json!({"namespaceSelector": n, "podSelector": p})),
        4 => block(),
    ]
    .boxed()
}

fn port() -> BoxedStrategy<Value> {
    let protocol = prop::sample::select(vec![None, Some("TCP"), Some("UDP"), Some("SCTP")]);
    let port = prop_oneof![
        1 => Just((json!(null), json!(null))),
        3 => prop::sample::select(vec![53, 80, 81, 8080]).prop_map(|p| (json!(p), json!(null))),
        2 => prop::sample::select(vec![(79, 81), (80, 8080), (1, 65535), (8000, 8100)]).prop_map(|(a, b)| (json!(a), json!(b))),
        4 => prop::sample::select(vec!["http", "alt", "dns", "none"]).prop_map(|n| (json!(n), json!(null))),
    ];
    (protocol, port)
        .prop_map(|(protocol, (port, end))| json!({"protocol": protocol, "port": port, "endPort": end}))
        .boxed()
}

fn rules(peers: &'static str) -> BoxedStrategy<Value> {
    let rule =
        (prop::collection::vec(peer(), 0..3), prop::collection::vec(port(), 0..3)).prop_map(move |(p, ports)| {
            let mut rule = serde_json::Map::new();
            if !p.is_empty() {
                rule.insert(peers.to_owned(), json!(p));
            }
            if !ports.is_empty() {
                rule.insert("ports".to_owned(), json!(ports));
            }
            Value::Object(rule)
        });
    prop::collection::vec(rule, 0..4)
        .prop_map(|rules| if rules.is_empty() { json!(null) } else { json!(rules) })
        .boxed()
}

/// Most of what there is shares a namespace and a node, so that it meets.
fn namespace() -> impl Strategy<Value = usize> {
    prop_oneof![5 => Just(0usize), 2 => Just(1usize), 1 => Just(2usize)]
}

fn pod_selector() -> impl Strategy<Value = Value> {
    prop_oneof![Just(json!({})), selector()]
}

/// A policy without a name.
pub fn policy() -> BoxedStrategy<Value> {
    let types =
        prop::sample::select(vec![json!(null), json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])]);
    (namespace().prop_map(|n| NAMESPACES[n]), pod_selector(), types, rules("from"), rules("to"))
        .prop_map(|(namespace, selector, types, ingress, egress)| {
            json!({"metadata": {"namespace": namespace}, "spec": {
                "podSelector": selector, "policyTypes": types, "ingress": ingress, "egress": egress}})
        })
        .boxed()
}

pub fn pod() -> BoxedStrategy<PodSpec> {
    let kind = prop_oneof![
        12 => Just(Kind::Plain),
        1 => Just(Kind::Terminating),
        1 => Just(Kind::Pending),
        1 => Just(Kind::Host),
        1 => Just(Kind::Ended),
    ];
    let families =
        prop::sample::select(vec![(true, false), (true, false), (true, true), (false, true), (false, false)]);
    let port = (
        (prop::sample::select(vec!["http", "alt", "dns"]), prop::sample::select(vec!["TCP", "UDP"])),
        prop::sample::select(vec![53u16, 80, 8080]),
    )
        .prop_map(|((n, p), number)| ((n.to_owned(), p.to_owned()), number));
    (
        namespace(),
        prop_oneof![3 => Just(0usize), 1 => Just(1usize)],
        kind,
        labels(),
        families,
        prop::collection::btree_map(port.clone().prop_map(|p| p.0), port.prop_map(|p| p.1), 0..3),
    )
        .prop_map(|(namespace, node, kind, labels, families, ports)| PodSpec {
            namespace,
            node,
            kind,
            labels,
            families,
            ports,
        })
        .boxed()
}

pub fn spec() -> BoxedStrategy<Spec> {
    (
        prop::collection::vec(labels(), NAMESPACES.len()),
        prop::collection::vec(pod(), 2..9),
        prop_oneof![2 => prop::collection::vec(policy(), 0..3), 3 => prop::collection::vec(policy(), 0..7)],
        prop_oneof![1 => Just(Vec::new()), 3 => prop::collection::vec(cluster_policy(), 0..6)],
        0..1u16 << NAMES.len(),
    )
        .prop_map(|(namespaces, pods, policies, cluster_policies, names)| Spec {
            namespaces,
            pods,
            policies,
            cluster_policies,
            names,
        })
        .boxed()
}

fn namespaced_pod() -> BoxedStrategy<Value> {
    (selector(), selector()).prop_map(|(n, p)| json!({"namespaceSelector": n, "podSelector": p})).boxed()
}

fn cluster_port() -> BoxedStrategy<Value> {
    let number = prop::sample::select(vec![53, 80, 81, 8080, 65535]).prop_map(|n| json!({"number": n}));
    let range = prop::sample::select(vec![(79, 81), (80, 8080), (1, 65535), (8000, 8100)])
        .prop_map(|(start, end)| json!({"range": {"start": start, "end": end}}));
    (prop::sample::select(vec!["tcp", "tcp", "udp", "sctp"]), prop_oneof![number, range])
        .prop_map(|(protocol, port)| json!({protocol: {"destinationPort": port}}))
        .boxed()
}

/// A rule of a ClusterNetworkPolicy.
fn cluster_rule(direction: &'static str) -> BoxedStrategy<Value> {
    let peers = if direction == "ingress" { "from" } else { "to" };
    let pods = || {
        prop_oneof![
            3 => Just(json!({"namespaces": {}})),
            3 => selector().prop_map(|s| json!({"namespaces": s})),
            4 => selector().prop_map(|s| json!({"pods": {"namespaceSelector": {}, "podSelector": s}})),
            3 => namespaced_pod().prop_map(|p| json!({"pods": p})),
        ]
    };
    let networks = || prop::sample::subsequence(BLOCKS.to_vec(), 1..=4).prop_map(|n| json!({"networks": n}));
    let others = prop_oneof![
        12 => pods(),
        6 => selector().prop_map(|s| json!({"nodes": s})),
        12 => networks(),
        6 => prop::sample::subsequence(PATTERNS.to_vec(), 1..=3).prop_map(|n| json!({"domainNames": n})),
        1 => Just(json!({"ofALaterVersion": {}})),
    ];
    let named =
        prop::sample::select(vec!["http", "alt", "dns", "none"]).prop_map(|n| json!({"destinationNamedPort": n}));
    let wide = if direction == "ingress" {
        prop::collection::vec(pods(), 1..3).boxed()
    } else {
        prop::collection::vec(others, 1..3).boxed()
    };
    // Named ports stand beside pods only.
    let what = prop_oneof![
        4 => (wide.clone(), Just(Vec::new())),
        2 => (wide, prop::collection::vec(cluster_port(), 1..3)),
        2 => (prop::collection::vec(pods(), 1..3), prop::collection::vec(prop_oneof![named, cluster_port()], 1..3)),
    ];
    (prop::sample::select(vec!["Accept", "Deny", "Pass"]), what)
        .prop_map(move |(action, (to, protocols))| {
            // Domain names stand in rules that accept only.
            let names = to.iter().any(|peer| peer.get("domainNames").is_some());
            let mut rule = json!({"action": if names { "Accept" } else { action }, peers: to});
            if !protocols.is_empty() {
                rule["protocols"] = json!(protocols);
            }
            rule
        })
        .boxed()
}

/// A ClusterNetworkPolicy without a name. Priorities are few, so that some are equal.
pub fn cluster_policy() -> BoxedStrategy<Value> {
    let subject = prop_oneof![
        4 => Just(json!({"namespaces": {}})),
        2 => selector().prop_map(|s| json!({"namespaces": s})),
        2 => selector().prop_map(|s| json!({"pods": {"namespaceSelector": {}, "podSelector": s}})),
        2 => namespaced_pod().prop_map(|p| json!({"pods": p})),
    ];
    (
        prop::sample::select(vec!["Admin", "Baseline"]),
        0..3,
        subject,
        prop::collection::vec(cluster_rule("ingress"), 0..4),
        prop::collection::vec(cluster_rule("egress"), 0..4),
    )
        .prop_map(|(tier, priority, subject, ingress, egress)| {
            json!({"metadata": {}, "spec": {"tier": tier, "priority": priority, "subject": subject, "ingress": ingress, "egress": egress}})
        }).boxed()
}

/// Addresses of the pod with an index. An ended pod shows those of the pod before it.
pub fn pod_ips(spec: &Spec, index: usize) -> Vec<String> {
    let Some(pod) = spec.pods.get(index) else { return Vec::new() };
    if pod.kind == Kind::Host {
        return node_ips(pod.node).to_vec();
    }
    let number = if pod.kind == Kind::Ended { index.saturating_sub(1) } else { index };
    let v4 = pod.families.0.then(|| format!("10.0.{}.{}", number % 2, number));
    let v6 = pod.families.1.then(|| format!("fd00::{number:x}"));
    v4.into_iter().chain(v6).collect()
}

impl Spec {
    fn pod_object(&self, index: usize, pod: &PodSpec) -> Value {
        let containers: Vec<Value> = (0..)
            .zip(&pod.ports)
            .map(|(i, ((name, protocol), number))| {
                json!({"name": format!("c{i}"), "ports": [{"name": name, "protocol": protocol, "containerPort": number}]})
            })
            .collect();
        let ips: Vec<Value> = pod_ips(self, index).iter().map(|ip| json!({"ip": ip})).collect();
        let phase = match pod.kind {
            Kind::Pending => "Pending",
            Kind::Ended => {
                if index.is_multiple_of(2) {
                    "Succeeded"
                } else {
                    "Failed"
                }
            }
            Kind::Plain | Kind::Terminating | Kind::Host => "Running",
        };
        let deleted = (pod.kind == Kind::Terminating).then_some("2026-01-01T00:00:00Z");
        json!({
            "metadata": {"namespace": NAMESPACES[pod.namespace], "name": format!("p{index}"), "labels": pod.labels, "deletionTimestamp": deleted},
            "spec": {"nodeName": NODES[pod.node], "hostNetwork": pod.kind == Kind::Host, "containers": containers},
            "status": {"phase": phase, "podIPs": ips}
        })
    }

    /// The API objects.
    pub fn objects(&self) -> Cluster {
        let from = |v: Value| v;
        let nodes = (0..NODES.len()).map(|n| {
            let mut addresses: Vec<Value> =
                node_ips(n).iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
            addresses.push(json!({"type": "Hostname", "address": NODES[n]}));
            addresses.push(json!({"type": "ExternalIP", "address": NODE_EXTERNAL[n]}));
            let zone = ["x", "y"][n];
            let labels = json!({"a": zone, "kubernetes.io/hostname": NODES[n]});
            serde_json::from_value(
                json!({"metadata": {"name": NODES[n], "labels": labels}, "spec": {"podCIDRs": POD_CIDRS[n]}, "status": {"addresses": addresses}}),
            )
            .unwrap()
        });
        let namespaces = NAMESPACES.iter().zip(&self.namespaces).map(|(name, labels)| {
            let mut labels = labels.clone();
            labels.insert("kubernetes.io/metadata.name".to_owned(), (*name).to_owned());
            serde_json::from_value(json!({"metadata": {"name": name, "labels": labels}})).unwrap()
        });
        let pods = self.pods.iter().enumerate().map(|(i, p)| serde_json::from_value(self.pod_object(i, p)).unwrap());
        let policies = self.policies.iter().enumerate().map(|(i, p)| {
            let mut object = from(p.clone());
            object["metadata"]["name"] = json!(format!("q{i}"));
            serde_json::from_value(object).unwrap()
        });
        // The names go against the order in which they were made.
        let cluster_policies = self.cluster_policies.iter().enumerate().map(|(i, p)| {
            let mut object = from(p.clone());
            object["metadata"]["name"] = json!(format!("c{}", 9 - i % 10));
            object
        });
        Cluster {
            cluster_policies: cluster_policies.collect(),
            nodes: nodes.collect(),
            namespaces: namespaces.collect(),
            pods: pods.collect(),
            policies: policies.collect(),
            names: Vec::new(),
        }
    }
}

/// Has a policy audited, or enforced if it was.
pub fn audit_or_not(policy: &mut Value) {
    let said = &mut policy["metadata"]["annotations"]["towpath.dev/audit"];
    *said = if *said == "true" { json!("false") } else { json!("true") };
}

/// The objects as `model` parses them.
pub fn world(objects: &Cluster) -> World {
    let mut world = World::default();
    for object in &objects.nodes {
        let node = Node::try_from(object).unwrap();
        world.nodes.insert(node.name.clone(), node);
    }
    for object in &objects.namespaces {
        let namespace = Namespace::try_from(object).unwrap();
        world.namespaces.insert(namespace.name.clone(), namespace);
    }
    for object in &objects.pods {
        let pod = Pod::try_from(object).unwrap();
        world.pods.insert(pod.name.clone(), pod);
    }
    for object in &objects.policies {
        let policy = NetworkPolicy::try_from(object).unwrap();
        world.policies.insert(policy.name.clone(), policy);
    }
    for object in &objects.cluster_policies {
        let object: towpath_model::cluster_policy::object::ClusterNetworkPolicy =
            serde_json::from_value(object.clone()).unwrap();
        let (policy, _) = ClusterNetworkPolicy::fail_closed(&object).unwrap();
        world.cluster_policies.insert(policy.name.clone(), policy);
    }
    world
}

/// What the oracle must know of the node-local DNS to class it: a pod like the cluster's own DNS.
pub fn dns_pod() -> core::Pod {
    let ips: Vec<Value> = DNS.iter().map(|ip| json!({"ip": ip})).collect();
    serde_json::from_value(json!({
        "metadata": {"namespace": "kube-system", "name": "node-local-dns", "labels": {"k8s-app": "kube-dns"}},
        "spec": {"containers": [{"name": "dns", "ports": [
            {"name": "dns", "protocol": "UDP", "containerPort": 53}, {"name": "dns-tcp", "protocol": "TCP", "containerPort": 53}]}]},
        "status": {"phase": "Running", "podIPs": ips}
    }))
    .unwrap()
}

pub fn named(namespace: &str, name: &str) -> NamespacedName {
    NamespacedName::new(namespace, name)
}

/// A policy object from JSON.
pub fn policy_object(value: Value) -> networking::NetworkPolicy {
    serde_json::from_value(value).unwrap()
}

/// All addresses worth asking about: of pods, nodes, DNS, and outside.
pub fn addresses(spec: &Spec) -> Vec<IpAddr> {
    let mut all: Vec<String> = (0..spec.pods.len()).flat_map(|i| pod_ips(spec, i)).collect();
    all.extend((0..NODES.len()).flat_map(node_ips));
    all.extend(DNS.map(str::to_owned));
    all.extend(NODE_EXTERNAL.map(str::to_owned));
    all.extend(
        [
            "198.51.100.7",
            "198.51.100.200",
            "203.0.113.9",
            "203.0.113.10",
            "10.0.0.77",
            "2001:db8::1",
            "2001:db9::1",
            "fd00::77",
        ]
        .map(str::to_owned),
    );
    let mut parsed: Vec<IpAddr> = all.iter().map(|ip| ip.parse().unwrap()).collect();
    parsed.sort();
    parsed.dedup();
    parsed
}

/// Protocols and ports worth asking about: borders of everything [`policy`] makes.
pub fn services() -> Vec<(RowProtocol, &'static str, u16)> {
    let tcp: &[u16] = &[0, 1, 53, 79, 80, 81, 82, 7999, 8000, 8080, 8100, 8101, 65535];
    let asked = [
        (Protocol::Tcp, "TCP", tcp),
        (Protocol::Udp, "UDP", &[1, 53, 80, 8080, 8101][..]),
        (Protocol::Sctp, "SCTP", &[1, 80, 8101][..]),
    ];
    let mut all: Vec<(RowProtocol, &'static str, u16)> = Vec::new();
    for (protocol, name, ports) in asked {
        all.extend(ports.iter().map(|port| (RowProtocol::Ports(protocol), name, *port)));
    }
    all.push((RowProtocol::Other, "ICMP", 0));
    all
}

/// So many cases, unless `PROPTEST_CASES` says otherwise.
pub fn config(cases: u32) -> ProptestConfig {
    let said = std::env::var("PROPTEST_CASES").ok().and_then(|text| text.parse().ok());
    ProptestConfig { cases: said.unwrap_or(cases), ..ProptestConfig::default() }
}

/// One wrong entry in an image.
pub fn broken(mut image: PolicyImage, how: u8, one: Index, other: Index) -> Option<PolicyImage> {
    fn pick<T: Clone>(list: Vec<T>, index: Index) -> Option<T> {
        (!list.is_empty()).then(|| list[index.index(list.len())].clone())
    }
    match how {
        0 => {
            let key = pick(image.set_classes.keys().copied().collect(), one)?;
            image.set_classes.remove(&key);
        }
        1 => {
            let key = pick(image.set_classes.keys().copied().collect(), one)?;
            let locals = image.rows.keys().filter(|row| row.set == key.0).map(|row| row.class).collect();
            image.set_classes.insert(key, pick(locals, other)?);
        }
        2 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            let row = image.rows[&key];
            let verdict = if row.verdict == Verdict::Allow { Verdict::Deny } else { Verdict::Allow };
            image.rows.insert(key, Row { verdict, ..row });
        }
        3 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            image.rows.remove(&key);
        }
        4 => {
            let key: RowKey = pick(image.rows.keys().copied().collect(), one)?;
            let row = image.rows.remove(&key)?;
            image.rows.insert(RowKey { port_bits: key.port_bits.checked_sub(1)?, ..key }, row);
        }
        5 => {
            let key = pick(image.pod_classes.keys().copied().collect(), one)?;
            image.pod_classes.insert(key, pick(image.cidr_classes.values().copied().collect(), other)?);
        }
        6 => {
            let key = pick(image.pod_classes.keys().copied().collect(), one)?;
            image.pod_classes.remove(&key);
        }
        7 => {
            let key = pick(image.cidr_classes.keys().copied().collect(), one)?;
            image.cidr_classes.remove(&key);
        }
        8 => {
            let key = pick(image.cidr_classes.keys().copied().collect(), one)?;
            image.cidr_classes.insert(key, pick(image.pod_classes.values().copied().collect(), other)?);
        }
        9 => {
            let key = pick(image.pods.keys().copied().collect(), one)?;
            let sets = pick(image.pods.values().copied().collect(), other)?;
            image.pods.insert(key, sets);
        }
        _ => {
            let key = pick(image.pods.keys().copied().collect(), one)?;
            image.pods.insert(key, Default::default());
        }
    }
    Some(image)
}

/// What is told to a kernel that has one image, so that it has another.
pub fn changes(before: &PolicyImage, after: &PolicyImage) -> PolicyChanges {
    fn each<K: Ord + Clone, V: Clone + PartialEq>(
        before: &BTreeMap<K, V>,
        after: &BTreeMap<K, V>,
    ) -> BTreeMap<K, Option<V>> {
        let keys = before.keys().chain(after.keys()).filter(|key| before.get(*key) != after.get(*key));
        keys.map(|key| (key.clone(), after.get(key).cloned())).collect()
    }
    PolicyChanges {
        pod_classes: each(&before.pod_classes, &after.pod_classes),
        cidr_classes: each(&before.cidr_classes, &after.cidr_classes),
        set_classes: each(&before.set_classes, &after.set_classes),
        rows: each(&before.rows, &after.rows),
        rules: each(&before.rules, &after.rules),
        isolating: each(&before.isolating, &after.isolating),
        audited: after.audited.clone(),
        pods: after.pods.clone(),
    }
}
