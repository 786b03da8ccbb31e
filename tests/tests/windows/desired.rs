//! What is wanted of a cluster, as it changes: random policies, labels of pods and of namespaces, one object at a time.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use towpath_oracle::Cluster as Objects;
use towpath_walkthrough::api::Api;
use towpath_walkthrough::cluster::field;
use towpath_walkthrough::in_force::{Written, version};

pub(crate) const SPACES: [&str; 2] = ["red", "blue"];
/// Named `web` in some pods and `admin` in others, and the other way round.
pub(crate) const PORTS: [u16; 2] = [9000, 9001];
const POLICIES_EACH: usize = 3;
const CLUSTER_POLICIES: usize = 3;
const CLUSTER_POLICY_PATH: &str = "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies";

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same on every machine.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit as u64) as usize
    }

    pub(crate) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn pod_selector(&mut self) -> Value {
        match self.below(4) {
            0 => json!({}),
            1 => json!({"matchLabels": {"tier": self.pick(&["front", "back"])}}),
            2 => json!({"matchLabels": {"app": self.pick(&["x", "v", "z"])}}),
            _ => {
                json!({"matchExpressions": [{"key": "app", "operator": self.pick(&["In", "NotIn"]), "values": [self.pick(&["x", "v"]), "z"]}]})
            }
        }
    }

    fn namespace_selector(&mut self) -> Value {
        match self.below(4) {
            0 => json!({}),
            1 => json!({"matchLabels": {"kubernetes.io/metadata.name": self.pick(&SPACES)}}),
            2 => json!({"matchExpressions": [{"key": "warm", "operator": "Exists"}]}),
            _ => json!({"matchExpressions": [{"key": "warm", "operator": "DoesNotExist"}]}),
        }
    }

    fn peer(&mut self, addresses: &[String]) -> Value {
        match self.below(4) {
            0 => json!({"podSelector": self.pod_selector()}),
            1 => json!({"namespaceSelector": self.namespace_selector()}),
            2 => json!({"namespaceSelector": self.namespace_selector(), "podSelector": self.pod_selector()}),
            _ => {
                let except = addresses[self.below(addresses.len())].clone() + "/32";
                json!({"ipBlock": {"cidr": self.pick(&["10.244.0.0/16", "0.0.0.0/0"]), "except": [except]}})
            }
        }
    }

    fn port(&mut self) -> Value {
        match self.below(5) {
            0 => json!({"protocol": "UDP", "port": self.pick(&PORTS)}),
            1 => json!({"protocol": "UDP", "port": self.pick(&["web", "admin"])}),
            2 => json!({"protocol": "UDP", "port": 8000, "endPort": 9000}),
            3 => json!({"protocol": "TCP"}),
            _ => json!({"protocol": "UDP"}),
        }
    }

    fn some<T>(&mut self, most: usize, mut make: impl FnMut(&mut Self) -> T) -> Vec<T> {
        (0..self.below(most + 1)).map(|_| make(self)).collect()
    }

    fn policy_spec(&mut self, addresses: &[String]) -> Value {
        let types = match self.below(5) {
            0 | 1 => vec!["Ingress"],
            2 | 3 => vec!["Egress"],
            _ => vec!["Ingress", "Egress"],
        };
        let mut spec = json!({"podSelector": self.pod_selector(), "policyTypes": types});
        for (side, peers) in [("Ingress", "from"), ("Egress", "to")] {
            if types.contains(&side) {
                let rules = self.some(3, |dice| {
                    let (of, ports) = (dice.some(2, |d| d.peer(addresses)), dice.some(1, Self::port));
                    json!({peers: of, "ports": ports})
                });
                spec[side.to_lowercase()] = json!(rules);
            }
        }
        spec
    }

    fn cluster_spec(&mut self, addresses: &[String]) -> Value {
        let pods = |dice: &mut Self| json!({"pods": {"namespaceSelector": dice.namespace_selector(), "podSelector": dice.pod_selector()}});
        let mut spec =
            json!({"tier": self.pick(&["Admin", "Baseline"]), "priority": self.below(3), "subject": pods(self)});
        for (side, peers) in [("ingress", "from"), ("egress", "to")] {
            let rules = self.some(2, |dice| {
                let peer = match dice.below(4) {
                    0 => json!({"namespaces": dice.namespace_selector()}),
                    1 if side == "egress" => {
                        json!({"networks": [addresses[dice.below(addresses.len())].clone() + "/32"]})
                    }
                    _ => pods(dice),
                };
                let mut rule = json!({"action": dice.pick(&["Accept", "Deny", "Pass"]), peers: [peer]});
                if dice.below(3) == 0 {
                    rule["protocols"] = json!([{"udp": {"destinationPort": {"number": dice.pick(&PORTS)}}}]);
                }
                rule
            });
            spec[side] = json!(rules);
        }
        spec
    }
}

/// Which changes are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Which {
    /// Of everything.
    All,
    /// Of NetworkPolicies: news of one kind come in the order in which they were written, of several kinds in any.
    NetworkPolicies,
}

/// The objects that decide, as the API server answered.
pub(crate) struct Desired {
    nodes: Vec<Value>,
    namespaces: BTreeMap<String, Value>,
    pods: BTreeMap<String, Value>,
    policies: BTreeMap<String, Value>,
    cluster_policies: BTreeMap<String, Value>,
    addresses: Vec<String>,
}

/// A change that was written.
pub(crate) struct Change {
    /// What, for people.
    pub(crate) what: String,
    /// As nodes acknowledge it.
    pub(crate) written: Written,
}

fn named(objects: Vec<Value>) -> BTreeMap<String, Value> {
    objects.into_iter().map(|object| (key(&object), object)).collect()
}

fn key(object: &Value) -> String {
    let (namespace, name) = (field(object, "/metadata/namespace"), field(object, "/metadata/name"));
    if namespace.is_empty() { name } else { format!("{namespace}/{name}") }
}

fn policy_path(namespace: &str) -> String {
    format!("/apis/networking.k8s.io/v1/namespaces/{namespace}/networkpolicies")
}

impl Desired {
    /// As the API server has it now.
    pub(crate) fn read(api: &Api) -> Result<Self> {
        let pods = named(api.list("/api/v1/pods")?);
        Ok(Self {
            nodes: api.list("/api/v1/nodes")?,
            namespaces: named(api.list("/api/v1/namespaces")?),
            addresses: pods.values().map(|pod| field(pod, "/status/podIP")).collect(),
            pods,
            policies: named(api.list("/apis/networking.k8s.io/v1/networkpolicies")?),
            cluster_policies: named(api.list(CLUSTER_POLICY_PATH)?),
        })
    }

    /// For the oracle.
    pub(crate) fn objects(&self) -> Result<Objects> {
        fn all<T: serde::de::DeserializeOwned>(objects: Vec<Value>) -> Result<T> {
            serde_json::from_value(Value::Array(objects)).context("an object of the API server")
        }
        let of = |objects: &BTreeMap<String, Value>| objects.values().cloned().collect::<Vec<_>>();
        Ok(Objects {
            nodes: all(self.nodes.clone())?,
            namespaces: all(of(&self.namespaces))?,
            pods: all(of(&self.pods))?,
            policies: all(of(&self.policies))?,
            cluster_policies: of(&self.cluster_policies),
            names: Vec::new(),
        })
    }

    /// All NetworkPolicies, with their versions.
    pub(crate) fn policies(&self) -> Result<BTreeMap<String, u64>> {
        self.policies.iter().map(|(name, object)| Ok((name.clone(), version(object)?))).collect()
    }

    /// One random change, written.
    pub(crate) fn change(&mut self, dice: &mut Dice, api: &Api, which: Which) -> Result<Change> {
        let roll = if which == Which::NetworkPolicies { dice.below(10) } else { dice.below(20) };
        match roll {
            0..10 => self.change_policy(dice, api),
            10..13 => self.change_cluster_policy(dice, api),
            13..18 => self.relabel_pod(dice, api),
            _ => self.relabel_namespace(dice, api),
        }
    }

    fn change_policy(&mut self, dice: &mut Dice, api: &Api) -> Result<Change> {
        let (space, number) = (dice.pick(&SPACES), dice.below(POLICIES_EACH));
        let (name, collection) = (format!("policy-{number}"), policy_path(space));
        let key = format!("{space}/{name}");
        let there = self.policies.contains_key(&key);
        if there && dice.below(2) == 0 {
            api.delete(&format!("{collection}/{name}"))?;
            self.policies.remove(&key);
            let written = Written::Deleted("NetworkPolicy", key.clone());
            return Ok(Change { what: format!("delete networkpolicy {key}"), written });
        }
        let spec = dice.policy_spec(&self.addresses);
        let object = if there {
            api.replace_spec(&format!("{collection}/{name}"), &spec)?
        } else {
            let kind = json!({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec});
            api.create(&collection, &kind)?
        };
        let written = Written::Object("NetworkPolicy", key.clone(), version(&object)?);
        self.policies.insert(key.clone(), object);
        Ok(Change { what: format!("networkpolicy {key}: {spec}"), written })
    }

    fn change_cluster_policy(&mut self, dice: &mut Dice, api: &Api) -> Result<Change> {
        let name = format!("cluster-{}", dice.below(CLUSTER_POLICIES));
        let path = format!("{CLUSTER_POLICY_PATH}/{name}");
        let there = self.cluster_policies.contains_key(&name);
        if there && dice.below(2) == 0 {
            api.delete(&path)?;
            self.cluster_policies.remove(&name);
            let written = Written::Deleted("ClusterNetworkPolicy", name.clone());
            return Ok(Change { what: format!("delete clusternetworkpolicy {name}"), written });
        }
        let spec = dice.cluster_spec(&self.addresses);
        let object = if there {
            api.replace_spec(&path, &spec)?
        } else {
            let kind = json!({
                "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy", "metadata": {"name": name}, "spec": spec,
            });
            api.create(CLUSTER_POLICY_PATH, &kind)?
        };
        let written = Written::Object("ClusterNetworkPolicy", name.clone(), version(&object)?);
        self.cluster_policies.insert(name.clone(), object);
        Ok(Change { what: format!("clusternetworkpolicy {name}: {spec}"), written })
    }

    fn relabel_pod(&mut self, dice: &mut Dice, api: &Api) -> Result<Change> {
        let keys: Vec<&String> = self.pods.keys().collect();
        let key = keys[dice.below(keys.len())].clone();
        let (space, name) = key.split_once('/').context("a pod without a namespace")?;
        let labels = json!({"tier": dice.pick(&["front", "back"]), "app": dice.pick(&["x", "v", "z"])});
        let object = api.label(&format!("/api/v1/namespaces/{space}/pods/{name}"), &labels)?;
        let written = Written::Pod(version(&object)?);
        self.pods.insert(key.clone(), object);
        Ok(Change { what: format!("pod {key}: {labels}"), written })
    }

    fn relabel_namespace(&mut self, dice: &mut Dice, api: &Api) -> Result<Change> {
        let name = dice.pick(&SPACES);
        let warm = self.namespaces.get(name).is_some_and(|space| !field(space, "/metadata/labels/warm").is_empty());
        let labels = json!({"warm": if warm { Value::Null } else { json!("yes") }});
        let object = api.label(&format!("/api/v1/namespaces/{name}"), &labels)?;
        let written = Written::Object("Namespace", name.to_owned(), version(&object)?);
        self.namespaces.insert(name.to_owned(), object);
        Ok(Change { what: format!("namespace {name}: {labels}"), written })
    }
}
