//! Towpath's own kinds, group `towpath.dev`: their shape on the wire, as the definitions in `deploy/kustomize/base/crd-*.yaml` say.
//!
//! They are plain types with the traits of `k8s_openapi`, so that an API client takes them without this crate knowing one. What
//! the definitions validate (ranges, addresses, counts) is text here: whoever acts on it parses it.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, LabelSelector, ObjectMeta};
use k8s_openapi::{ClusterResourceScope, Metadata, Resource};
use serde::de::IntoDeserializer;
use serde::{Deserialize, Deserializer, Serialize};

pub use towpath_wire::config::{Acceleration, BackendName, Duty};

/// The API group of all kinds here.
pub const GROUP: &str = "towpath.dev";
/// The version of all kinds here.
pub const VERSION: &str = "v1alpha1";
/// Group and version, as `apiVersion` has them.
pub const API_VERSION: &str = "towpath.dev/v1alpha1";

/// Name of the one [`NetworkConfig`].
pub const NETWORK_CONFIG_NAME: &str = "default";

macro_rules! kind {
    ($type:ident, $plural:literal) => {
        impl Resource for $type {
            const API_VERSION: &'static str = API_VERSION;
            const GROUP: &'static str = GROUP;
            const KIND: &'static str = stringify!($type);
            const VERSION: &'static str = VERSION;
            const URL_PATH_SEGMENT: &'static str = $plural;
            type Scope = ClusterResourceScope;
        }

        impl Metadata for $type {
            type Ty = ObjectMeta;

            fn metadata(&self) -> &ObjectMeta {
                &self.metadata
            }

            fn metadata_mut(&mut self) -> &mut ObjectMeta {
                &mut self.metadata
            }
        }
    };
}

kind!(NetworkConfig, "networkconfigs");
kind!(NodeNetwork, "nodenetworks");
kind!(AddressPool, "addresspools");

/// The cluster-wide configuration; there is one, [`NETWORK_CONFIG_NAME`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NetworkConfig {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `NetworkConfig`.
    pub kind: String,
    /// Name, generation.
    pub metadata: ObjectMeta,
    /// What is wanted.
    #[serde(default)]
    pub spec: NetworkConfigSpec,
    /// What has become of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<NetworkConfigStatus>,
}

impl NetworkConfig {
    /// The one object, with this in it.
    pub fn new(spec: NetworkConfigSpec) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::KIND.to_owned(),
            metadata: ObjectMeta { name: Some(NETWORK_CONFIG_NAME.to_owned()), ..ObjectMeta::default() },
            spec,
            status: None,
        }
    }
}

/// What is wanted of the network. A field that is left out is as the processes' own configuration says.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkConfigSpec {
    /// How packets get from node to node.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<BackendName>,
    /// Of the envelopes: of the backend `vxlan`, and of what other backends leave to them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vxlan: Option<VxlanConfig>,
    /// Of the backend `udp`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub udp: Option<UdpConfig>,
    /// Pod ranges of the whole cluster, all nodes' pod ranges within them.
    #[serde(rename = "clusterCIDRs", skip_serializing_if = "Option::is_none")]
    pub cluster_cidrs: Option<Vec<String>>,
    /// Service ranges, at most one a family.
    #[serde(rename = "serviceCIDRs", skip_serializing_if = "Option::is_none")]
    pub service_cidrs: Option<Vec<String>>,
    /// Destinations outside the cluster that see pods' own addresses.
    #[serde(rename = "nonMasqueradeCIDRs", skip_serializing_if = "Option::is_none")]
    pub non_masquerade_cidrs: Option<Vec<String>>,
    /// Whether what pods send out of the cluster leaves with their node's address.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub masquerade: Option<MasqueradeConfig>,
    /// Ranges in which Services may have external addresses (`spec.externalIPs`); nowhere, if there are none.
    #[serde(rename = "externalCIDRs", skip_serializing_if = "Option::is_none")]
    pub external_cidrs: Option<Vec<String>>,
    /// At which of a node's addresses NodePorts answer: CIDRs, or `primary` alone; all, if there are none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_port_addresses: Option<Vec<String>>,
    /// The node of a Service's endpoint answers clients outside the cluster itself, with the Service's address as source, whichever node they
    /// came in at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub direct_server_return: Option<bool>,
    /// Whether Services are forwarded by drivers of devices (XDP).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_acceleration: Option<Acceleration>,
    /// Devices that lead out of a node besides the uplink, by name or by the beginning of names (`eth*`).
    #[serde(skip_serializing_if = "Option::is_none")]
    pub devices: Option<Vec<String>>,
    /// MTU of pods' devices in bytes, 1280–65535; none: what the ways between nodes carry.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Who serves Services.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_proxy: Option<Duty>,
    /// Who answers cluster DNS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Duty>,
    /// Addresses of the Service `kube-system/kube-dns`, at most one a family.
    #[serde(rename = "clusterDNS", skip_serializing_if = "Option::is_none")]
    pub cluster_dns: Option<Vec<String>>,
    /// Domain of the cluster, without a trailing dot.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_domain: Option<String>,
}

/// Of the envelopes: of the backend `vxlan`, and of what other backends leave to them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct VxlanConfig {
    /// Network identifier, 1–16777215.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vni: Option<u32>,
    /// UDP port, the same on all nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// Whether what pods send out of the cluster leaves with their node's address; a family that is left out does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MasqueradeConfig {
    /// IPv4.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv4: Option<bool>,
    /// IPv6.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ipv6: Option<bool>,
}

/// Of the backend `udp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UdpConfig {
    /// UDP port, the same on all nodes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
}

/// What has become of a [`NetworkConfig`].
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NetworkConfigStatus {
    /// The generation that the controller has looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Kubernetes conditions.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// What one node offers to the others and what it has; named as the node, and written by that node's agent alone.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeNetwork {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `NodeNetwork`.
    pub kind: String,
    /// Name: the node's.
    pub metadata: ObjectMeta,
    /// What the node offers.
    #[serde(default)]
    pub spec: NodeNetworkSpec,
    /// What it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<NodeNetworkStatus>,
}

impl NodeNetwork {
    /// The object of a node.
    pub fn new(node: &str, spec: NodeNetworkSpec) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::KIND.to_owned(),
            metadata: ObjectMeta { name: Some(node.to_owned()), ..ObjectMeta::default() },
            spec,
            status: None,
        }
    }
}

/// What a node offers to the others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeNetworkSpec {
    /// Outer address of its tunnel.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tunnel_address: Option<String>,
    /// Inner MAC address that packets to its pods are sent to.
    #[serde(rename = "tunnelMAC", skip_serializing_if = "Option::is_none")]
    pub tunnel_mac: Option<String>,
    /// Its pod ranges that are in use.
    #[serde(rename = "podCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub pod_cidrs: Vec<String>,
    /// Those of them that its `spec.podCIDRs` has not: an annotation added them, and may have been taken away while pods have addresses of them.
    #[serde(rename = "addedPodCIDRs", skip_serializing_if = "Vec::is_empty")]
    pub added_pod_cidrs: Vec<String>,
}

/// The backends that this version knows; of a node of a later one, which may say more, the others mean nothing here.
fn known_backends<'de, D: Deserializer<'de>>(names: D) -> Result<Vec<BackendName>, D::Error> {
    let names = Vec::<String>::deserialize(names)?;
    let known = |name: String| {
        BackendName::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(name)).ok()
    };
    Ok(names.into_iter().filter_map(known).collect())
}

/// The same of one, or none.
fn known_backend<'de, D: Deserializer<'de>>(name: D) -> Result<Option<BackendName>, D::Error> {
    let name = Option::<String>::deserialize(name)?;
    Ok(name.and_then(|name| {
        BackendName::deserialize(IntoDeserializer::<serde::de::value::Error>::into_deserializer(name)).ok()
    }))
}

/// What a node has.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeNetworkStatus {
    /// Backend that it sends by to whoever is ready to receive it, in reach of it.
    #[serde(skip_serializing_if = "Option::is_none", deserialize_with = "known_backend")]
    pub backend: Option<BackendName>,
    /// Backends whose packets it takes now.
    #[serde(skip_serializing_if = "Vec::is_empty", deserialize_with = "known_backends")]
    pub receive_ready: Vec<BackendName>,
    /// MTU of its pods in bytes.
    #[serde(rename = "podMTU", skip_serializing_if = "Option::is_none")]
    pub pod_mtu: Option<u32>,
    /// Nodes whose pods it reaches by another backend than its own; of many the first by name.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub peers_behind: Vec<PeerBehind>,
    /// How many there are; none: it does not know yet.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub peers_behind_count: Option<u32>,
    /// Generation of the [`NetworkConfig`] that is in force on it; none: there is no such object.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub network_config_generation: Option<i64>,
    /// Who serves Services to the node's own processes and the outside: `towpath`, `kube-proxy` or `others`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_proxy: Option<String>,
    /// Who answers cluster DNS on it: `towpath`, `coredns`, `stand-in` or `others`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<String>,
    /// Version of its agent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub agent_version: Option<String>,
    /// Addresses given to its pods, as soon as they are given.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub pods: Vec<GivenAddress>,
    /// Kubernetes conditions; `Ready` when the first full sync is in its kernel, `Settled` when nothing more of a change of backend is to come,
    /// `PathsFit` when what its pods may send fits the paths to the other nodes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

/// A node that is reached by another backend than the one that is wanted.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct PeerBehind {
    /// The node.
    pub node: String,
    /// The backend that its pods are reached by.
    pub backend: String,
    /// Why, in one word: `NotReady`, `Silent`, `Kernel`, `BeyondRouter`, `SameName`, `Uplink`.
    pub reason: String,
}

/// Addresses that ADD gave to a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct GivenAddress {
    /// The pod's namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid; empty when the container runtime did not say.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The addresses, at most one a family.
    pub ips: Vec<String>,
}

/// Addresses for Services of type LoadBalancer; parsed by [`crate::address_pool`].
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct AddressPool {
    /// Always [`API_VERSION`].
    pub api_version: String,
    /// Always `AddressPool`.
    pub kind: String,
    /// Name, uid, generation.
    pub metadata: ObjectMeta,
    /// Which addresses, and for whom.
    #[serde(default)]
    pub spec: AddressPoolSpec,
    /// How many are left.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<AddressPoolStatus>,
}

impl AddressPool {
    /// A pool of that name.
    pub fn new(name: &str, spec: AddressPoolSpec) -> Self {
        Self {
            api_version: API_VERSION.to_owned(),
            kind: Self::KIND.to_owned(),
            metadata: ObjectMeta { name: Some(name.to_owned()), ..ObjectMeta::default() },
            spec,
            status: None,
        }
    }
}

/// Which addresses, and for whom.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AddressPoolSpec {
    /// CIDRs (`192.0.2.0/28`), ranges with both ends in them (`192.0.2.10-192.0.2.20`), and single addresses.
    pub addresses: Vec<String>,
    /// Labels of Services that may have them; none: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service_selector: Option<LabelSelector>,
    /// Labels of the namespaces whose Services may have them; none: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub namespace_selector: Option<LabelSelector>,
    /// Whether Services that name neither a pool nor an address get one from here; absent: yes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub auto_assign: Option<bool>,
    /// Whether Services of different namespaces may share one of its addresses; absent: no.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub allow_sharing_across_namespaces: Option<bool>,
    /// Labels of the nodes that may announce its addresses; none: all.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node_selector: Option<LabelSelector>,
}

/// What has become of a pool. Counts beyond an `int64` are its largest value.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct AddressPoolStatus {
    /// The generation that the controller has looked at.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Addresses in it, without those that are the cluster's own.
    pub total: i64,
    /// Addresses that Services have; one that is shared counts once.
    pub assigned: i64,
    /// Addresses that a Service could get.
    pub available: i64,
    /// `Ready` and `Overlaps`.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub conditions: Vec<Condition>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_later_version_says_of_backends_is_no_reason_to_know_nothing_of_its_node() {
        let said =
            serde_json::json!({"backend": "by-pigeon", "receiveReady": ["vxlan", "by-pigeon", "ipip"], "pods": []});
        let status: NodeNetworkStatus = serde_json::from_value(said).unwrap();
        assert_eq!((status.backend, status.receive_ready), (None, vec![BackendName::Vxlan, BackendName::Ipip]));
    }

    #[test]
    fn what_is_left_out_is_not_written_and_names_are_those_of_the_definition() {
        let config = NetworkConfig::new(NetworkConfigSpec {
            cluster_cidrs: Some(vec!["10.244.0.0/16".to_owned()]),
            service_proxy: Some(Duty::Off),
            ..NetworkConfigSpec::default()
        });
        let value = serde_json::to_value(&config).unwrap();
        let expected = serde_json::json!({
            "apiVersion": "towpath.dev/v1alpha1", "kind": "NetworkConfig", "metadata": {"name": "default"},
            "spec": {"clusterCIDRs": ["10.244.0.0/16"], "serviceProxy": "off"},
        });
        assert_eq!(value, expected);
        assert_eq!(serde_json::from_value::<NetworkConfig>(value).unwrap(), config);
    }

    #[test]
    fn a_field_of_a_newer_version_does_no_harm() {
        let text = r#"{"apiVersion":"towpath.dev/v1alpha1","kind":"NodeNetwork","metadata":{"name":"n1"},
            "spec":{"tunnelAddress":"192.0.2.1","newer":1},"status":{"pods":[{"namespace":"a","name":"b","ips":["10.244.0.2"]}]}}"#;
        let node: NodeNetwork = serde_json::from_str(text).unwrap();
        assert_eq!(node.spec.tunnel_address.as_deref(), Some("192.0.2.1"));
        assert_eq!(node.status.unwrap().pods[0].ips, ["10.244.0.2"]);
    }
}
