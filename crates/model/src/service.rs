//! Services (`core/v1` `Service`).

use std::net::IpAddr;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use crate::{Invalid, Labels, NamespacedName, Protocol, canonical};

/// `spec.type`, with what only that type has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ServiceKind {
    /// `ClusterIP`, addresses in [`Service::cluster_ips`].
    ClusterIp,
    /// `clusterIP: None`: DNS only.
    Headless,
    /// `NodePort`.
    NodePort,
    /// `LoadBalancer`.
    LoadBalancer,
    /// `ExternalName`: a DNS alias.
    ExternalName(String),
}

/// `internalTrafficPolicy` and `externalTrafficPolicy`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default, Serialize, Deserialize)]
pub enum TrafficPolicy {
    /// Any endpoint.
    #[default]
    Cluster,
    /// Endpoints of this node only.
    Local,
}

/// What a Service port leads to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetPort {
    /// This number.
    Number(u16),
    /// The container port of this name; EndpointSlices hold the number.
    Name(String),
}

/// One port of a Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServicePort {
    /// `name`; empty when there is only one.
    pub name: String,
    /// Its protocol.
    pub protocol: Protocol,
    /// The Service's port.
    pub port: u16,
    /// Where it leads.
    pub target: TargetPort,
    /// `nodePort`, when one is assigned.
    pub node_port: Option<u16>,
}

impl ServicePort {
    /// A port; for tests and planners (API objects come through `TryFrom`).
    pub fn new(
        name: impl Into<String>,
        protocol: Protocol,
        port: u16,
        target: TargetPort,
        node_port: Option<u16>,
    ) -> Self {
        Self { name: name.into(), protocol, port, target, node_port }
    }
}

/// A Service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Service {
    /// Namespace and name.
    pub name: NamespacedName,
    /// Its labels.
    pub labels: Labels,
    /// Its type.
    pub kind: ServiceKind,
    /// `spec.clusterIPs`, at most one a family; empty for headless and ExternalName.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`; used only where the cluster allows them.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// Whether `spec.selector` is set (else endpoints are made by hand).
    pub has_selector: bool,
    /// ClientIP affinity in seconds, if on.
    pub affinity_seconds: Option<u32>,
    /// `spec.internalTrafficPolicy`.
    pub internal_policy: TrafficPolicy,
    /// `spec.externalTrafficPolicy`.
    pub external_policy: TrafficPolicy,
    /// `spec.publishNotReadyAddresses`.
    pub publish_not_ready: bool,
    /// `spec.healthCheckNodePort`, where it means something: a load balancer whose external policy is `Local`.
    pub health_check_port: Option<u16>,
}

impl Service {
    /// Whether the node's service proxy is to leave it alone: its labels name another proxy, or none.
    pub fn for_other_proxies(&self) -> bool {
        OTHER_PROXY_LABELS.iter().any(|label| self.labels.contains_key(*label))
    }
}

/// With either of these a Service (and its slices) is not for the proxy that serves the cluster by default.
const OTHER_PROXY_LABELS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

fn addresses(list: impl Iterator<Item = String>) -> Vec<IpAddr> {
    let mut out: Vec<IpAddr> = Vec::new();
    for ip in list.filter_map(|text| text.parse::<IpAddr>().ok().map(canonical)) {
        if !out.contains(&ip) {
            out.push(ip);
        }
    }
    out
}

fn traffic_policy(text: Option<&str>) -> TrafficPolicy {
    if text == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

fn parse_port(who: &str, index: usize, port: &core::ServicePort) -> Result<ServicePort, Invalid> {
    let at = |field: &str| format!("spec.ports[{index}].{field}");
    let number = |field: &str, value: i32| {
        u16::try_from(value)
            .ok()
            .filter(|n| *n > 0)
            .ok_or_else(|| Invalid::new(who, at(field), format!("{value} is not between 1 and 65535")))
    };
    let own = number("port", port.port)?;
    let target = match &port.target_port {
        None => TargetPort::Number(own),
        Some(IntOrString::Int(0)) => TargetPort::Number(own),
        Some(IntOrString::Int(value)) => TargetPort::Number(number("targetPort", *value)?),
        Some(IntOrString::String(name)) => TargetPort::Name(name.clone()),
    };
    let protocol = Protocol::parse(port.protocol.as_deref())
        .ok_or_else(|| Invalid::new(who, at("protocol"), format!("unknown protocol {:?}", port.protocol)))?;
    let node_port = match port.node_port {
        None | Some(0) => None,
        Some(value) => Some(number("nodePort", value)?),
    };
    Ok(ServicePort::new(port.name.clone().unwrap_or_default(), protocol, own, target, node_port))
}

impl TryFrom<&core::Service> for Service {
    type Error = Invalid;

    fn try_from(object: &core::Service) -> Result<Self, Invalid> {
        let meta = &object.metadata;
        let (Some(namespace), Some(name)) = (&meta.namespace, &meta.name) else {
            return Err(Invalid::new("Service", "metadata", "namespace or name missing"));
        };
        let name = NamespacedName::new(namespace, name);
        let who = format!("Service {name}");
        let spec = object.spec.as_ref().ok_or_else(|| Invalid::new(&who, "spec", "missing"))?;
        let listed = spec.cluster_ips.clone().unwrap_or_else(|| spec.cluster_ip.clone().into_iter().collect());
        let headless = listed.iter().any(|ip| ip == "None");
        let kind = match spec.type_.as_deref().unwrap_or("ClusterIP") {
            "ExternalName" => ServiceKind::ExternalName(
                spec.external_name
                    .clone()
                    .filter(|n| !n.is_empty())
                    .ok_or_else(|| Invalid::new(&who, "spec.externalName", "missing"))?,
            ),
            "ClusterIP" if headless => ServiceKind::Headless,
            "ClusterIP" => ServiceKind::ClusterIp,
            "NodePort" => ServiceKind::NodePort,
            "LoadBalancer" => ServiceKind::LoadBalancer,
            other => return Err(Invalid::new(&who, "spec.type", format!("unknown type {other:?}"))),
        };
        let ports = spec
            .ports
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, port)| parse_port(&who, index, port))
            .collect::<Result<Vec<_>, _>>()?;
        let affinity_seconds = (spec.session_affinity.as_deref() == Some("ClientIP")).then(|| {
            let configured = spec
                .session_affinity_config
                .as_ref()
                .and_then(|c| c.client_ip.as_ref())
                .and_then(|c| c.timeout_seconds);
            // core/v1: default 10800 (three hours), 1 to 86400.
            configured.and_then(|s| u32::try_from(s).ok()).filter(|s| (1..=86400).contains(s)).unwrap_or(10800)
        });
        let ingress = object
            .status
            .as_ref()
            .and_then(|s| s.load_balancer.as_ref())
            .and_then(|l| l.ingress.clone())
            .unwrap_or_default();
        let external_policy = traffic_policy(spec.external_traffic_policy.as_deref());
        let health_check_port = spec
            .health_check_node_port
            .and_then(|port| u16::try_from(port).ok())
            .filter(|port| *port > 0 && kind == ServiceKind::LoadBalancer && external_policy == TrafficPolicy::Local);
        let has_addresses = !matches!(kind, ServiceKind::Headless | ServiceKind::ExternalName(_));
        Ok(Self {
            labels: meta.labels.clone().unwrap_or_default(),
            cluster_ips: if has_addresses { addresses(listed.into_iter()) } else { Vec::new() },
            external_ips: addresses(spec.external_ips.clone().into_iter().flatten()),
            load_balancer_ips: addresses(ingress.into_iter().filter_map(|i| i.ip)),
            ports,
            has_selector: spec.selector.as_ref().is_some_and(|s| !s.is_empty()),
            affinity_seconds,
            internal_policy: traffic_policy(spec.internal_traffic_policy.as_deref()),
            external_policy,
            health_check_port,
            publish_not_ready: spec.publish_not_ready_addresses.unwrap_or(false),
            kind,
            name,
        })
    }
}
