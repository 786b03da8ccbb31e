//! What the agent answers on its policy socket to `towpath policy wait`: one JSON document that says which policies its kernel enforces.
//!
//! Versions are `metadata.resourceVersion`, which within one kind grows with every write (Kubernetes orders them as decimal numbers:
//! KEP-5504). A node that has a version in force judges every packet from then on by that state of the object, or a later one.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What one node enforces.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct InForce {
    /// The node.
    pub node: String,
    /// By kind (`NetworkPolicy`, `ClusterNetworkPolicy`, `Namespace`, `Pod`): what the API server said of it and is in the kernel. A kind that it
    /// has not listed since this agent started is not there.
    #[serde(default)]
    pub kinds: BTreeMap<String, KindInForce>,
    /// NetworkPolicies that the API server no longer has and that hold, as `namespace/name`: their namespace ends and still has pods.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub outliving: Vec<String>,
    /// Policies that are closed here because there is no room for their rules, as `NetworkPolicy namespace/name` or `ClusterNetworkPolicy name`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub aside: Vec<String>,
    /// Why what the agent knows is not in the kernel, for people; empty: it is.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub failing: String,
}

/// What of one kind is in force.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct KindInForce {
    /// The newest version of any of its objects. Everything that was written before is in force too.
    pub newest: u64,
    /// Its objects (`name`, or `namespace/name`) with their versions (0: deleted, and in force all the same); none: they are too many to be named (pods).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub objects: Option<BTreeMap<String, u64>>,
}
