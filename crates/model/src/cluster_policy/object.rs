//! ClusterNetworkPolicy on the wire: `policy.networking.k8s.io/v1alpha2` of network-policy-api v0.2.0, the channel with the experimental fields.
//!
//! Plain types with the traits of `k8s_openapi`, as in [`crate::custom`]. Unions (a peer, a protocol, a port) are structs of optional fields,
//! because that is what they are in JSON: one that shows no field is one of a later version, and is treated as such by who parses it. For the same
//! reason a part that has another type than it should costs only the rule that it is in.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use k8s_openapi::{ClusterResourceScope, Metadata, Resource};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

/// The API group.
pub const GROUP: &str = "policy.networking.k8s.io";
/// The version.
pub const VERSION: &str = "v1alpha2";
/// Group and version, as `apiVersion` has them.
pub const API_VERSION: &str = "policy.networking.k8s.io/v1alpha2";

/// A policy of the whole cluster.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClusterNetworkPolicy {
    /// Always [`API_VERSION`].
    #[serde(default)]
    pub api_version: String,
    /// Always `ClusterNetworkPolicy`.
    #[serde(default)]
    pub kind: String,
    /// Its name and generation.
    #[serde(default)]
    pub metadata: ObjectMeta,
    /// What is wanted.
    #[serde(default, deserialize_with = "known")]
    pub spec: Spec,
    /// What implementations say of it.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "known")]
    pub status: Option<Status>,
}

impl Resource for ClusterNetworkPolicy {
    const API_VERSION: &'static str = API_VERSION;
    const GROUP: &'static str = GROUP;
    const KIND: &'static str = "ClusterNetworkPolicy";
    const VERSION: &'static str = VERSION;
    const URL_PATH_SEGMENT: &'static str = "clusternetworkpolicies";
    type Scope = ClusterResourceScope;
}

impl Metadata for ClusterNetworkPolicy {
    type Ty = ObjectMeta;

    fn metadata(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn metadata_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// `spec`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// `Admin` or `Baseline`.
    #[serde(deserialize_with = "known")]
    pub tier: String,
    /// 0 to 1000; the lowest is asked first.
    #[serde(deserialize_with = "known")]
    pub priority: Option<i64>,
    /// The pods it applies to.
    #[serde(deserialize_with = "known")]
    pub subject: Subject,
    /// Rules for traffic to them, in order of precedence.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "rules")]
    pub ingress: Option<Vec<IngressRule>>,
    /// Rules for traffic from them, in order of precedence.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "rules")]
    pub egress: Option<Vec<EgressRule>>,
}

/// A value; its type's empty one where it is of another type.
fn known<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(deserializer: D) -> Result<T, D::Error> {
    let value = Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

/// Rules; of one that does not fit its type what it does and how it is called, and no peer.
fn rules<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(
    deserializer: D,
) -> Result<Option<Vec<T>>, D::Error> {
    let list = match Value::deserialize(deserializer)? {
        Value::Null => return Ok(None),
        Value::Array(list) => list,
        other => vec![other],
    };
    let rule = |value: Value| {
        let field =
            |name: &str| value.get(name).filter(|field| field.is_string()).cloned().unwrap_or_else(|| "".into());
        let essentials = serde_json::json!({"name": field("name"), "action": field("action")});
        serde_json::from_value(value).or_else(|_| serde_json::from_value(essentials)).unwrap_or_default()
    };
    Ok(Some(list.into_iter().map(rule).collect()))
}

/// `spec.subject`: one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Subject {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
}

/// Pods by labels, of namespaces by labels. An empty selector selects all.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NamespacedPod {
    /// Which namespaces.
    pub namespace_selector: LabelSelector,
    /// Which pods in them.
    pub pod_selector: LabelSelector,
}

/// A rule of `spec.ingress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct IngressRule {
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `Accept`, `Deny` or `Pass`.
    pub action: String,
    /// Where the traffic comes from, at least one.
    pub from: Option<Vec<RulePeer>>,
    /// Of which protocols; none: of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<RuleProtocol>>,
}

/// A rule of `spec.egress`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct EgressRule {
    /// For people.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// `Accept`, `Deny` or `Pass`.
    pub action: String,
    /// Where the traffic goes to, at least one.
    pub to: Option<Vec<RulePeer>>,
    /// Of which protocols; none: of all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub protocols: Option<Vec<RuleProtocol>>,
}

/// A peer: one field is set. `from` knows the first two only.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RulePeer {
    /// All pods of these namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespaces: Option<LabelSelector>,
    /// Some pods of some namespaces.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pods: Option<NamespacedPod>,
    /// Nodes, by their `status.addresses`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nodes: Option<LabelSelector>,
    /// CIDRs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub networks: Option<Vec<String>>,
    /// Names, or `*.` and the end of names.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain_names: Option<Vec<String>>,
}

/// A protocol: one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RuleProtocol {
    /// TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tcp: Option<Ports>,
    /// UDP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<Ports>,
    /// SCTP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sctp: Option<Ports>,
    /// The container port of this name, of whatever protocol it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_named_port: Option<String>,
}

/// What of a protocol.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Ports {
    /// To which port.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub destination_port: Option<Port>,
}

/// A port: one field is set.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Port {
    /// One, 1 to 65535.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub number: Option<i64>,
    /// From one to another.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub range: Option<PortRange>,
}

/// Ports, both ends included.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PortRange {
    /// The first.
    pub start: i64,
    /// The last, greater than the first.
    pub end: i64,
}

/// `status`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Status {
    /// What implementations say; the API gives no rules for it.
    pub conditions: Vec<Condition>,
}
