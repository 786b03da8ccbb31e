//! The world: everything the network needs to know of the cluster, as one plain value.

use std::collections::BTreeMap;

use crate::{Namespace, NamespacedName, NetworkPolicy, Node, NodeName, Pod, Service, Slices};

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
}

impl World {
    /// The labels of a namespace; none known: no labels but its name, as the API server would set it.
    pub fn namespace_labels(&self, namespace: &str) -> crate::Labels {
        self.namespaces.get(namespace).map_or_else(
            || crate::Labels::from([("kubernetes.io/metadata.name".to_owned(), namespace.to_owned())]),
            |n| n.labels.clone(),
        )
    }
}
