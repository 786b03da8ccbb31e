//! What may have become different since the last compilation.

use std::collections::BTreeSet;

use towpath_model::NamespacedName;

/// Objects that may have changed, come or gone since a [`Compiler`](super::Compiler) last looked at them. Naming too many costs time;
/// one that changed and is not named is not seen before [`Touched::everything`].
///
/// Addresses that the node gave out ([`View::pod_ips`](crate::View::pod_ips)), its DNS addresses and what domain names stand for
/// ([`View::names`](crate::View::names)) need no mention: they are few, and compared.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Touched {
    /// Everything, nodes too.
    pub(crate) everything: bool,
    pub(crate) pods: BTreeSet<NamespacedName>,
    pub(crate) namespaces: BTreeSet<String>,
    pub(crate) policies: BTreeSet<NamespacedName>,
    pub(crate) cluster_policies: bool,
}

impl Touched {
    /// Nobody knows.
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// Nothing but time.
    pub fn nothing() -> Self {
        Self::default()
    }

    /// A pod.
    pub fn pod(&mut self, name: NamespacedName) {
        self.pods.insert(name);
    }

    /// Whether any pod is among them.
    pub fn has_pods(&self) -> bool {
        self.everything || !self.pods.is_empty()
    }

    /// The pods among them; none: nobody knows which.
    pub fn pods(&self) -> Option<&BTreeSet<NamespacedName>> {
        (!self.everything).then_some(&self.pods)
    }

    /// Whether a pod is.
    pub fn has_pod(&self, name: &NamespacedName) -> bool {
        self.everything || self.pods.contains(name)
    }

    /// The NetworkPolicies among them; none: nobody knows which.
    pub fn policies(&self) -> Option<&BTreeSet<NamespacedName>> {
        (!self.everything).then_some(&self.policies)
    }

    /// A namespace: its labels.
    pub fn namespace(&mut self, name: String) {
        self.namespaces.insert(name);
    }

    /// A NetworkPolicy.
    pub fn policy(&mut self, name: NamespacedName) {
        self.policies.insert(name);
    }

    /// Any ClusterNetworkPolicy: there are few.
    pub fn cluster_policies(&mut self) {
        self.cluster_policies = true;
    }

    /// Both.
    pub fn merge(&mut self, other: Touched) {
        self.everything |= other.everything;
        self.pods.extend(other.pods);
        self.namespaces.extend(other.namespaces);
        self.policies.extend(other.policies);
        self.cluster_policies |= other.cluster_policies;
    }

    /// A node, or what nobody can name: everything.
    pub fn all(&mut self) {
        *self = Self::everything();
    }
}
