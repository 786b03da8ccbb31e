//! The world: everything the network needs to know of the cluster, as one plain value.

use std::collections::BTreeMap;

use crate::{
    ClusterNetworkPolicy, Enforcement, Namespace, NamespacedName, NetworkPolicy, Node, NodeName, Pod, Service, Slices,
    Tier,
};

/// The cluster as last heard of. Planners read it; the agent's index keeps it up to date; tests and `verify` build it from
/// manifests.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct World {
    /// Nodes by name.
    pub nodes: BTreeMap<NodeName, Node>,
    /// Namespaces by name.
    pub namespaces: BTreeMap<String, Namespace>,
    /// Pods by name.
    pub pods: BTreeMap<NamespacedName, Pod>,
    /// Services by name.
    pub services: BTreeMap<NamespacedName, Service>,
    /// EndpointSlices by their own name.
    pub slices: Slices,
    /// NetworkPolicies by name.
    pub policies: BTreeMap<NamespacedName, NetworkPolicy>,
    /// ClusterNetworkPolicies by name.
    pub cluster_policies: BTreeMap<String, ClusterNetworkPolicy>,
}

impl World {
    /// The labels of a namespace; none known: no labels but its name, as the API server would set it.
    pub fn namespace_labels(&self, namespace: &str) -> crate::Labels {
        self.namespaces.get(namespace).map_or_else(
            || crate::Labels::from([("kubernetes.io/metadata.name".to_owned(), namespace.to_owned())]),
            |n| n.labels.clone(),
        )
    }

    /// As if every policy that is only audited were enforced.
    pub fn enforce_all(&mut self) {
        self.policies.values_mut().for_each(|policy| policy.enforcement = Enforcement::Enforced);
        self.cluster_policies.values_mut().for_each(|policy| policy.enforcement = Enforcement::Enforced);
    }

    /// The ClusterNetworkPolicies of a tier, those that are only audited too, in the order in which they are asked: by priority, then by name. The API leaves open
    /// which of two of the same priority decides.
    pub fn cluster_policies_of(&self, tier: Tier) -> Vec<&ClusterNetworkPolicy> {
        let mut policies: Vec<_> = self.cluster_policies.values().filter(|policy| policy.tier == tier).collect();
        policies.sort_by_key(|policy| policy.precedence());
        policies
    }
}
