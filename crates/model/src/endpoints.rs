//! EndpointSlices (`discovery.k8s.io/v1`): where a Service's ports lead.

use std::net::IpAddr;

use k8s_openapi::api::discovery::v1 as discovery;
use serde::{Deserialize, Serialize};

use crate::{Invalid, NamespacedName, NodeName, NodeNames, Protocol, canonical};

/// The label that names a slice's Service.
pub const SERVICE_NAME_LABEL: &str = "kubernetes.io/service-name";

/// The label with which a slice is not for service proxies.
const HEADLESS_LABEL: &str = "service.kubernetes.io/headless";

/// `endpoints[].conditions`, with the API's defaults applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conditions {
    /// May take new connections. Absent means yes.
    pub ready: bool,
    /// Answers, even if it is terminating. Absent means as `ready`.
    pub serving: bool,
    /// Is going away.
    pub terminating: bool,
}

/// `endpoints[].hints`: whose clients an endpoint is meant for; empty lists say nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hints {
    /// `forZones`.
    pub zones: Vec<String>,
    /// `forNodes`.
    pub nodes: Vec<NodeName>,
}

/// One endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Its address; the API treats several as fungible and consumers use the first.
    pub address: IpAddr,
    /// Its state.
    pub conditions: Conditions,
    /// `hostname`: gets a DNS name of its own below the Service.
    pub hostname: Option<Box<str>>,
    /// The node it is on.
    pub node: Option<NodeName>,
    /// The pod behind it (`targetRef`), for people; nodes do not keep it ([`EndpointSlice::slim`]).
    pub pod: Option<Box<NamespacedName>>,
    /// Whose clients it is meant for; most say nothing of it.
    #[serde(default)]
    pub hints: Option<Box<Hints>>,
}

/// One port that all endpoints of a slice have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct EndpointPort {
    /// Matches the Service port's name.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// Its number.
    pub port: u16,
}

/// A slice of a Service's endpoints.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointSlice {
    /// Namespace and name of the slice.
    pub name: NamespacedName,
    /// The Service it belongs to.
    pub service: NamespacedName,
    /// Its endpoints.
    pub endpoints: Vec<Endpoint>,
    /// Its ports.
    pub ports: Vec<EndpointPort>,
    /// Its label says that it is for DNS only, not for service proxies.
    pub headless: bool,
}

impl EndpointSlice {
    /// Forgets what no packet depends on, which only people ask for, and shares the names of nodes: a node keeps every endpoint of the
    /// cluster.
    pub fn slim(&mut self, names: &mut NodeNames) {
        for endpoint in &mut self.endpoints {
            endpoint.pod = None;
            endpoint.node = endpoint.node.take().map(|node| names.shared(&node));
        }
    }
}

impl TryFrom<&discovery::EndpointSlice> for EndpointSlice {
    type Error = Invalid;

    /// Slices that belong to no Service and those of type FQDN are refused: nothing can be sent there.
    fn try_from(object: &discovery::EndpointSlice) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("EndpointSlice", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let who = format!("EndpointSlice {name}");
        let service = meta.labels.as_ref().and_then(|l| l.get(SERVICE_NAME_LABEL)).ok_or_else(|| {
            Invalid::new(&who, "metadata.labels", format!("no {SERVICE_NAME_LABEL}: belongs to no Service"))
        })?;
        if !matches!(object.address_type.as_str(), "IPv4" | "IPv6") {
            return Err(Invalid::new(&who, "addressType", format!("{:?} is not IPv4 or IPv6", object.address_type)));
        }
        let mut endpoints = Vec::new();
        for (index, endpoint) in object.endpoints.iter().flatten().enumerate() {
            let Some(text) = endpoint.addresses.first() else { continue };
            let address: IpAddr = text.parse().map(canonical).map_err(|_| {
                Invalid::new(&who, format!("endpoints[{index}].addresses[0]"), format!("{text:?} is no address"))
            })?;
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let ready = conditions.ready.unwrap_or(true);
            let hints = endpoint.hints.clone().unwrap_or_default();
            let hints = Hints {
                zones: hints.for_zones.into_iter().flatten().map(|z| z.name).collect(),
                nodes: hints.for_nodes.into_iter().flatten().map(|n| NodeName::new(n.name)).collect(),
            };
            endpoints.push(Endpoint {
                hints: Some(hints).filter(|hints| *hints != Hints::default()).map(Box::new),
                address,
                conditions: Conditions {
                    ready,
                    serving: conditions.serving.unwrap_or(ready),
                    terminating: conditions.terminating.unwrap_or(false),
                },
                hostname: endpoint.hostname.as_deref().filter(|h| !h.is_empty()).map(Box::from),
                node: endpoint.node_name.clone().map(NodeName::new),
                pod: endpoint.target_ref.as_ref().filter(|r| r.kind.as_deref() == Some("Pod")).and_then(|r| {
                    let namespace = r.namespace.clone().unwrap_or_else(|| namespace.clone());
                    Some(Box::new(NamespacedName::new(namespace, r.name.clone()?)))
                }),
            });
        }
        let mut ports = Vec::new();
        for port in object.ports.iter().flatten() {
            // A port without a number means "all ports"; no proxy can use it (API: "consumers must ignore it").
            let Some(number) = port.port else { continue };
            let number = u16::try_from(number)
                .map_err(|_| Invalid::new(&who, "ports[].port", format!("{number} is no port")))?;
            let Some(protocol) = Protocol::parse(port.protocol.as_deref()) else { continue };
            ports.push(EndpointPort { name: port.name.clone().unwrap_or_default(), protocol, port: number });
        }
        // Kept for as long as the object is there: without the room that a growing list has.
        endpoints.shrink_to_fit();
        ports.shrink_to_fit();
        let headless = meta.labels.iter().flatten().any(|(label, _)| label == HEADLESS_LABEL);
        Ok(Self { service: NamespacedName::new(namespace, service), name, endpoints, ports, headless })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_node_keeps_of_an_endpoint_what_packets_and_names_depend_on() {
        let object = json!({
            "metadata": {"namespace": "a", "name": "web-1", "labels": {SERVICE_NAME_LABEL: "web"}}, "addressType": "IPv4",
            "endpoints": [{
                "addresses": ["10.0.0.1"], "nodeName": "n1", "hostname": "web-0", "hints": {"forZones": [{"name": "z"}]},
                "targetRef": {"kind": "Pod", "name": "web-0", "namespace": "a"},
            }],
        });
        let whole =
            EndpointSlice::try_from(&serde_json::from_value::<discovery::EndpointSlice>(object).unwrap()).unwrap();
        assert_eq!(whole.endpoints[0].pod.as_deref(), Some(&NamespacedName::new("a", "web-0")));
        let mut slim = whole.clone();
        slim.slim(&mut NodeNames::default());
        let expected = Endpoint { pod: None, ..whole.endpoints[0].clone() };
        assert_eq!(slim.endpoints, [expected]);
        assert!(size_of::<Endpoint>() <= 72, "there may be a hundred thousand: {}", size_of::<Endpoint>());
    }
}
