//! Random small clusters as API objects: few labels, addresses and ports, so that everything meets everything.
//!
//! A cluster is JSON, as the API server would show it: what is generated is what is printed and what is cut down when a case is shrunk.
//! Everything here passes Kubernetes' validation, or is an object that the API lets in by `spec` of a later version; what it refuses
//! is for [`crate::text`].

mod cluster_policies;
mod objects;
mod policies;
mod selectors;

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::packet::{Ingress, Packet, Way};
use crate::random::Random;
pub use objects::Parsed;
pub use policies::BLOCKS;

/// The namespaces.
pub const NAMESPACES: [&str; 3] = ["n0", "n1", "kube-system"];
/// The nodes; the first is the one whose kernel judges.
pub const NODES: [&str; 2] = ["m0", "m1"];
/// Pods' places on each node: a place has its addresses, whoever is in it.
pub const PLACES: [usize; 2] = [6, 3];
/// Node-local addresses of DNS.
pub const DNS: [&str; 2] = ["169.254.20.10", "fd99::10"];
/// `ExternalIP` of the nodes: inside one of [`BLOCKS`], and outside of all.
pub const EXTERNAL: [&str; 2] = ["198.51.100.70", "192.0.2.70"];
/// Pod ranges of the nodes.
pub const RANGES: [[&str; 2]; 2] = [["10.0.0.0/24", "fd00::/64"], ["10.0.1.0/24", "fd00:0:0:1::/64"]];

/// The `InternalIP`s of a node.
pub fn node_ips(node: usize) -> [String; 2] {
    [format!("10.9.0.{}", node + 1), format!("fd09::{}", node + 1)]
}

/// The addresses of a place, IPv4 and IPv6.
pub fn place_ips(node: usize, place: usize) -> [String; 2] {
    [format!("10.0.{node}.{}", place + 2), format!("fd00:0:0:{node}::{:x}", place + 2)]
}

/// A cluster: its objects, and what only the node knows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Spec {
    /// `Node`s.
    pub nodes: Vec<Value>,
    /// `Namespace`s.
    pub namespaces: Vec<Value>,
    /// `Pod`s, also such as are on their node's network or have ended.
    pub pods: Vec<Value>,
    /// `NetworkPolicy`s.
    pub policies: Vec<Value>,
    /// `ClusterNetworkPolicy`s.
    pub cluster_policies: Vec<Value>,
    /// Who is in the places of the first node: namespace, name, addresses. The API need not know of them yet.
    pub local: Vec<Local>,
}

/// A pod that the node gave addresses to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Local {
    /// Namespace.
    pub namespace: String,
    /// Name.
    pub name: String,
    /// Its place.
    pub place: usize,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Whether the compiler is told of them by the node too, or by the pod's status only.
    pub given: bool,
}

impl Spec {
    /// A cluster.
    pub fn random(random: &mut Random) -> Self {
        let mut spec = Self {
            nodes: (0..NODES.len()).map(node).collect(),
            namespaces: NAMESPACES.iter().map(|name| namespace(random, name)).collect(),
            ..Self::default()
        };
        for (node, places) in PLACES.into_iter().enumerate() {
            for place in (0..places).filter(|_| random.chance(4, 5)).collect::<Vec<_>>() {
                spec.settle(random, node, place);
            }
        }
        // Heavy clusters are rarer, so that what a single rule does is seen alone as well.
        let most = random.pick(&[2, 4, 6, 8, 12]);
        let least = usize::from(random.chance(7, 8));
        spec.policies = random.list(least, most, policies::policy);
        let most = random.pick(&[0, 2, 4, 8]);
        spec.cluster_policies = random.list(0, most, cluster_policies::policy);
        spec.name_policies(random);
        spec
    }

    /// Puts a pod into a place: a usual one, or one that the API knows less or something else of.
    fn settle(&mut self, random: &mut Random, node: usize, place: usize) {
        let name = format!("p{node}{place}");
        let namespace = random.pick(&["n0", "n0", "n0", "n1", "n1", "kube-system"]);
        let all = place_ips(node, place);
        let families: &[usize] = match random.below(5) {
            0 => &[0],
            1 => &[1],
            _ => &[0, 1],
        };
        let ips: Vec<&str> = families.iter().map(|family| all[*family].as_str()).collect();
        let known = node != 0 || random.chance(11, 12);
        // Kubelet reports addresses later than the node gives them.
        let late = node == 0 && random.chance(1, 6);
        if known {
            let mut pod = pod(random, namespace, &name, node);
            pod["status"] = json!({"phase": if late { "Pending" } else { "Running" }});
            if !late {
                pod["status"]["podIPs"] = ips.iter().map(|ip| json!({"ip": ip})).collect();
            }
            if random.chance(1, 12) {
                pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            }
            self.pods.push(pod);
        }
        if node == 0 {
            self.local.push(Local {
                namespace: namespace.to_owned(),
                name: name.clone(),
                place,
                addresses: ips.iter().filter_map(|ip| ip.parse().ok()).collect(),
                given: !known || late || random.chance(1, 2),
            });
        }
        // One that ended and still shows the address; one on the node's network.
        if random.chance(1, 10) {
            let mut ended = self::pod(random, namespace, &format!("{name}-ended"), node);
            ended["status"] = json!({"phase": random.pick(&["Succeeded", "Failed"]), "podIPs": [{"ip": ips[0]}]});
            self.pods.push(ended);
        }
        if random.chance(1, 10) {
            let mut host = self::pod(random, namespace, &format!("{name}-host"), node);
            host["spec"]["hostNetwork"] = json!(true);
            let addresses: Vec<Value> = node_ips(node).iter().map(|ip| json!({"ip": ip})).collect();
            host["status"] = json!({"phase": "Running", "podIPs": addresses});
            self.pods.push(host);
        }
    }

    /// Takes a pod out of a place, with all that stands for it.
    fn vacate(&mut self, node: usize, place: usize) {
        let name = format!("p{node}{place}");
        self.pods.retain(|pod| !pod["metadata"]["name"].as_str().is_some_and(|known| known.starts_with(&name)));
        self.local.retain(|local| local.name != name);
    }

    /// Takes those out of their places of whom nobody knows any more: neither the API nor, by what it gave, the node.
    pub fn forget_gone(&mut self) {
        let named = |pod: &Value, local: &Local| {
            pod["metadata"]["name"] == local.name && pod["metadata"]["namespace"] == local.namespace
        };
        self.local.retain(|local| local.given || self.pods.iter().any(|pod| named(pod, local)));
    }

    /// Whether the pods are there that a packet begins and ends at.
    pub fn has_places_of(&self, packet: &Packet) -> bool {
        let at = |place: usize, address: IpAddr| {
            self.local.iter().any(|local| local.place == place && local.addresses.contains(&address))
        };
        match packet.way {
            Some(Way::FromPod(place)) => at(place, packet.source),
            Some(Way::ToPod(place, Ingress::Place(from))) => at(place, packet.destination) && at(from, packet.source),
            Some(Way::ToPod(place, _)) => at(place, packet.destination),
            Some(Way::FromTunnel) | None => {
                let ends = [packet.source, packet.destination];
                self.local.iter().flat_map(|local| &local.addresses).any(|address| ends.contains(address))
            }
        }
    }

    /// Names that go neither with the order in which they were made nor against it.
    fn name_policies(&mut self, random: &mut Random) {
        for policy in self.policies.iter_mut().chain(&mut self.cluster_policies) {
            if policy["metadata"]["name"].is_null() {
                policy["metadata"]["name"] = json!(format!("q{:04x}", random.below(0x1_0000)));
            }
        }
        let key = |policy: &Value| policy["metadata"].to_string();
        let mut seen = std::collections::BTreeSet::new();
        self.policies.retain(|policy| seen.insert(key(policy)));
        self.cluster_policies.retain(|policy| seen.insert(key(policy)));
    }

    /// The same cluster a moment later: one or a few things have changed.
    pub fn change(&mut self, random: &mut Random) {
        for _ in 0..=random.below(3) {
            self.change_one(random);
        }
        self.name_policies(random);
    }

    fn change_one(&mut self, random: &mut Random) {
        let node = random.below(NODES.len());
        let place = random.below(PLACES[node]);
        match random.below(10) {
            0 => self.policies.push(policies::policy(random)),
            1 => self.cluster_policies.push(cluster_policies::policy(random)),
            2 if !self.policies.is_empty() => drop(self.policies.remove(random.below(self.policies.len()))),
            3 if !self.cluster_policies.is_empty() => {
                drop(self.cluster_policies.remove(random.below(self.cluster_policies.len())));
            }
            // The same name with other rules.
            4 | 5 if !self.policies.is_empty() => {
                let at = random.below(self.policies.len());
                let namespace = self.policies[at]["metadata"]["namespace"].clone();
                let mut other = policies::policy(random);
                other["metadata"] = json!({"namespace": namespace, "name": self.policies[at]["metadata"]["name"]});
                self.policies[at] = other;
            }
            6 if !self.cluster_policies.is_empty() => {
                let at = random.below(self.cluster_policies.len());
                let mut other = cluster_policies::policy(random);
                other["metadata"] = self.cluster_policies[at]["metadata"].clone();
                self.cluster_policies[at] = other;
            }
            7 if !self.pods.is_empty() => {
                let at = random.below(self.pods.len());
                self.pods[at]["metadata"]["labels"] = selectors::labels(random);
            }
            8 => {
                let at = random.below(NAMESPACES.len());
                self.namespaces[at] = namespace(random, NAMESPACES[at]);
            }
            _ => {
                self.vacate(node, place);
                if random.chance(2, 3) {
                    self.settle(random, node, place);
                }
            }
        }
    }

    /// All objects, each as a document that `kubectl` and `towpath verify` read.
    pub fn manifests(&self) -> String {
        let all = [&self.nodes, &self.namespaces, &self.pods, &self.policies, &self.cluster_policies];
        let documents: Vec<String> = all.into_iter().flatten().map(Value::to_string).collect();
        documents.join("\n---\n")
    }
}

fn node(index: usize) -> Value {
    let (name, zone) = (NODES[index], ["x", "y"][index]);
    let mut addresses: Vec<Value> =
        node_ips(index).iter().map(|ip| json!({"type": "InternalIP", "address": ip})).collect();
    addresses.push(json!({"type": "Hostname", "address": name}));
    addresses.push(json!({"type": "ExternalIP", "address": EXTERNAL[index]}));
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": name, "labels": {"a": zone, "kubernetes.io/hostname": name}},
        "spec": {"podCIDRs": RANGES[index]}, "status": {"addresses": addresses},
    })
}

fn namespace(random: &mut Random, name: &str) -> Value {
    let mut labels = selectors::labels(random);
    labels["kubernetes.io/metadata.name"] = json!(name);
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
}

/// A pod without a status.
fn pod(random: &mut Random, namespace: &str, name: &str, node: usize) -> Value {
    let mut ports: Vec<Value> = Vec::new();
    for (port, protocol) in [("http", "TCP"), ("http", "UDP"), ("alt", "TCP"), ("dns", "UDP"), ("edge", "SCTP")] {
        if random.chance(1, 3) {
            let number = random.pick(&[1, 53, 80, 80, 8080, 65535]);
            ports.push(json!({"name": port, "protocol": protocol, "containerPort": number}));
        }
    }
    // A name is unique in its container only.
    let containers: Vec<Value> =
        ports.iter().enumerate().map(|(at, port)| json!({"name": format!("c{at}"), "ports": [port]})).collect();
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "labels": selectors::labels(random)},
        "spec": {"nodeName": NODES[node], "containers": containers},
    })
}
