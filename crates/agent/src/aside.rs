//! Policies that stand aside: they ask for more than this node holds, and would hold up the changes of all others.
//!
//! What stands aside is closed ([`NetworkPolicy::closed`]) in the world itself, so that all who judge by the world say the same of it. As it is
//! written it is kept here, and tried again later. A policy whose object is heard of anew is in the world as it is written, and stands
//! aside no longer, until it is found too large again.

use std::collections::{BTreeMap, BinaryHeap, HashMap};

use towpath_model::desired::PolicyRef;
use towpath_model::{ClusterNetworkPolicy, NamespacedName, NetworkPolicy, NodeName, Pod, World};

/// Those policies, as they are written.
#[derive(Debug, Default)]
pub(crate) struct Aside {
    policies: BTreeMap<NamespacedName, NetworkPolicy>,
    cluster: BTreeMap<String, ClusterNetworkPolicy>,
}

impl Aside {
    /// A NetworkPolicy that stands aside, as it is written.
    pub(crate) fn policy(&self, name: &NamespacedName) -> Option<&NetworkPolicy> {
        self.policies.get(name)
    }

    /// A ClusterNetworkPolicy that does.
    pub(crate) fn cluster_policy(&self, name: &str) -> Option<&ClusterNetworkPolicy> {
        self.cluster.get(name)
    }

    /// Closes a policy of the world.
    pub(crate) fn put(&mut self, world: &mut World, policy: &PolicyRef) {
        match policy {
            PolicyRef::Namespaced(name) => {
                let Some(inside) = world.policies.get_mut(name) else { return };
                let closed = inside.closed();
                self.policies.insert(name.clone(), std::mem::replace(inside, closed));
            }
            PolicyRef::Cluster { name, .. } => {
                let Some(inside) = world.cluster_policies.get_mut(name) else { return };
                let closed = inside.closed();
                self.cluster.insert(name.clone(), std::mem::replace(inside, closed));
            }
        }
    }

    /// The object of one was heard of, or is gone; none: of all of them.
    pub(crate) fn heard_of_policy(&mut self, name: Option<&NamespacedName>) {
        match name {
            Some(name) => drop(self.policies.remove(name)),
            None => self.policies.clear(),
        }
    }

    /// The same of a ClusterNetworkPolicy.
    pub(crate) fn heard_of_cluster_policy(&mut self, name: Option<&String>) {
        match name {
            Some(name) => drop(self.cluster.remove(name)),
            None => self.cluster.clear(),
        }
    }

    /// Those that stand aside.
    pub(crate) fn all(&self) -> Vec<PolicyRef> {
        let cluster = self.cluster.values().map(reference);
        self.policies.keys().cloned().map(PolicyRef::Namespaced).chain(cluster).collect()
    }

    /// Puts all of them back into the world as they are written; which.
    pub(crate) fn take_back(&mut self, world: &mut World) -> Vec<PolicyRef> {
        let all = self.all();
        for (name, written) in std::mem::take(&mut self.policies) {
            world.policies.entry(name).and_modify(|inside| *inside = written);
        }
        for (name, written) in std::mem::take(&mut self.cluster) {
            world.cluster_policies.entry(name).and_modify(|inside| *inside = written);
        }
        all
    }
}

fn reference(policy: &ClusterNetworkPolicy) -> PolicyRef {
    PolicyRef::Cluster { tier: policy.tier, name: policy.name.clone() }
}

/// What the policies of a namespace ask for.
#[derive(Default)]
struct Asking<'w> {
    total: usize,
    /// Lightest first.
    policies: Vec<(usize, &'w NamespacedName)>,
}

/// The policies that select pods of the node, in the order in which they stand aside: of the namespace whose policies ask for most together, the
/// one that asks for most, again and again; those of the cluster after all of them. So one namespace's many policies are in nobody's way but its own.
pub(crate) fn order(world: &World, node: &NodeName) -> Vec<PolicyRef> {
    let mut local: HashMap<&str, Vec<&Pod>> = HashMap::new();
    for pod in world.pods.values().filter(|pod| pod.node.as_ref() == Some(node)) {
        local.entry(pod.name.namespace.as_str()).or_default().push(pod);
    }
    let mut asking: BTreeMap<&str, Asking<'_>> = BTreeMap::new();
    for policy in world.policies.values() {
        let pods = local.get(policy.name.namespace.as_str()).into_iter().flatten();
        let weight = policy.weight();
        if weight > 0 && pods.into_iter().any(|pod| policy.pod_selector.matches(&pod.labels)) {
            let of = asking.entry(&policy.name.namespace).or_default();
            of.total = of.total.saturating_add(weight);
            of.policies.push((weight, &policy.name));
        }
    }
    asking.values_mut().for_each(|of| of.policies.sort_unstable());
    let mut order = Vec::new();
    let mut totals: BinaryHeap<(usize, &str)> = asking.iter().map(|(namespace, of)| (of.total, *namespace)).collect();
    while let Some((total, namespace)) = totals.pop() {
        let Some((weight, name)) = asking.get_mut(namespace).and_then(|of| of.policies.pop()) else { continue };
        order.push(PolicyRef::Namespaced(name.clone()));
        totals.push((total.saturating_sub(weight), namespace));
    }
    let mut cluster: Vec<&ClusterNetworkPolicy> = world.cluster_policies.values().filter(|p| p.weight() > 0).collect();
    cluster.sort_by_key(|policy| std::cmp::Reverse((policy.weight(), &policy.name)));
    order.extend(cluster.into_iter().map(reference));
    order
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn world() -> World {
        let pod = |namespace: &str, node: &str| {
            let object = json!({"metadata": {"namespace": namespace, "name": node, "labels": {"app": "web"}}, "spec": {"nodeName": node, "containers": []}});
            Pod::try_from(&serde_json::from_value::<k8s_openapi::api::core::v1::Pod>(object).unwrap()).unwrap()
        };
        let policy = |namespace: &str, name: &str, app: &str, ports: usize| {
            let ports: Vec<_> = (1..=ports).map(|port| json!({"port": port})).collect();
            let object = json!({"metadata": {"namespace": namespace, "name": name},
                "spec": {"podSelector": {"matchLabels": {"app": app}}, "ingress": [{"ports": ports}]}});
            NetworkPolicy::try_from(
                &serde_json::from_value::<k8s_openapi::api::networking::v1::NetworkPolicy>(object).unwrap(),
            )
            .unwrap()
        };
        let pods = [pod("many", "n1"), pod("one", "n1"), pod("far", "n2")];
        let mut policies: Vec<NetworkPolicy> =
            (0..5).map(|n| policy("many", &format!("p{n}"), "web", 40 + n)).collect();
        policies.push(policy("one", "big", "web", 100));
        policies.push(policy("one", "small", "web", 1));
        policies.push(policy("one", "of-nobody", "db", 5000));
        policies.push(policy("far", "elsewhere", "web", 5000));
        World {
            pods: pods.into_iter().map(|pod| (pod.name.clone(), pod)).collect(),
            policies: policies.into_iter().map(|policy| (policy.name.clone(), policy)).collect(),
            ..World::default()
        }
    }

    #[test]
    fn whose_policies_ask_for_most_together_stand_aside_first() {
        let names: Vec<String> = order(&world(), &NodeName::new("n1")).iter().map(ToString::to_string).collect();
        let names: Vec<&str> = names.iter().map(|name| name.trim_start_matches("NetworkPolicy ")).collect();
        // 210 against 101, until many has 82 left.
        let expected = ["many/p4", "many/p3", "many/p2", "one/big", "many/p1", "many/p0", "one/small"];
        assert_eq!(names, expected);
    }

    #[test]
    fn what_stands_aside_is_closed_until_it_is_taken_back_or_heard_of() {
        let (mut world, mut aside) = (world(), Aside::default());
        let before = world.clone();
        let [big, small] = ["big", "small"].map(|name| NamespacedName::new("one", name));
        for name in [&big, &small] {
            aside.put(&mut world, &PolicyRef::Namespaced(name.clone()));
            assert_eq!(world.policies[name], before.policies[name].closed());
            assert_eq!(aside.policy(name), before.policies.get(name));
        }
        // Somebody writes what it is closed to: then that is what is written.
        aside.heard_of_policy(Some(&small));
        assert_eq!(aside.take_back(&mut world), [PolicyRef::Namespaced(big.clone())]);
        assert_eq!(world.policies[&big], before.policies[&big]);
        assert_eq!(world.policies[&small], before.policies[&small].closed());
        aside.put(&mut world, &PolicyRef::Namespaced(big.clone()));
        world.policies.remove(&big);
        aside.take_back(&mut world);
        assert!(!world.policies.contains_key(&big), "it is gone");
    }
}
