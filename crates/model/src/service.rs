//! Services (`core/v1` `Service`).

use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde::{Deserialize, Serialize};

use crate::desired::Algorithm;
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
    /// Its labels; nodes keep only those that say whose it is ([`Service::slim`]).
    pub labels: Labels,
    /// Its type.
    pub kind: ServiceKind,
    /// `spec.clusterIPs`, at most one a family; empty for headless and ExternalName.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`; used only where the cluster allows them.
    pub external_ips: Vec<IpAddr>,
    /// `status.loadBalancer.ingress[].ip`, but for those of `ipMode: Proxy`.
    pub load_balancer_ips: Vec<IpAddr>,
    /// `spec.loadBalancerClass`.
    #[serde(default)]
    pub load_balancer_class: Option<String>,
    /// Whether we gave it those addresses ([`crate::load_balancer::is_ours`]); else another implementation did, which announces them.
    #[serde(default)]
    pub balanced_by_us: bool,
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
    /// How a backend is chosen.
    #[serde(default)]
    pub algorithm: Algorithm,
    /// `spec.loadBalancerSourceRanges`, for its load balancer addresses; none: all clients.
    #[serde(default)]
    pub source_ranges: Option<Vec<IpNet>>,
    /// What the object says that means nothing, for people.
    #[serde(default)]
    pub misunderstood: Vec<String>,
    /// `spec.healthCheckNodePort`, where it means something: a load balancer whose external policy is `Local`.
    pub health_check_port: Option<u16>,
}

impl Service {
    /// Forgets labels that mean nothing to a node: most Services have some, and a node keeps every Service of the cluster.
    pub fn slim(&mut self) {
        // Made anew: a tree that was emptied keeps the room of its first leaf, which is half a kilobyte.
        let labels = std::mem::take(&mut self.labels).into_iter();
        self.labels = labels.filter(|(label, _)| OTHER_PROXY_LABELS.contains(&label.as_str())).collect();
    }

    /// Whether the node's service proxy is to leave it alone: its labels name another proxy, or none.
    pub fn for_other_proxies(&self) -> bool {
        OTHER_PROXY_LABELS.iter().any(|label| self.labels.contains_key(*label))
    }
}

/// Names the [`Algorithm`] of a Service.
pub const ALGORITHM_ANNOTATION: &str = "towpath.dev/lb-algorithm";
/// Before `spec.loadBalancerSourceRanges` there was this annotation, which still counts where the field is empty.
const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";

/// With either of these a Service (and its slices) is not for the proxy that serves the cluster by default.
const OTHER_PROXY_LABELS: [&str; 2] = ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"];

fn addresses(list: impl Iterator<Item = String>) -> Vec<IpAddr> {
    let mut out: Vec<IpAddr> = Vec::new();
    for ip in list.filter_map(|text| text.parse::<IpAddr>().ok().map(canonical)) {
        if !out.contains(&ip) {
            out.push(ip);
        }
    }
    out.shrink_to_fit();
    out
}

fn traffic_policy(text: Option<&str>) -> TrafficPolicy {
    if text == Some("Local") { TrafficPolicy::Local } else { TrafficPolicy::Cluster }
}

fn algorithm(annotations: &Labels, misunderstood: &mut Vec<String>) -> Algorithm {
    let Some(name) = annotations.get(ALGORITHM_ANNOTATION) else { return Algorithm::default() };
    Algorithm::named(name).unwrap_or_else(|| {
        let known = Algorithm::ALL.map(Algorithm::name).join(", ");
        let taken = Algorithm::default().name();
        misunderstood.push(format!("annotation {ALGORITHM_ANNOTATION}: {name:?} is none of {known}; {taken} is used"));
        Algorithm::default()
    })
}

/// A range that cannot be read lets nobody in.
fn source_ranges(
    spec: &core::ServiceSpec,
    annotations: &Labels,
    misunderstood: &mut Vec<String>,
) -> Option<Vec<IpNet>> {
    let listed = spec.load_balancer_source_ranges.clone().filter(|list| !list.is_empty());
    let annotated = || {
        let text = annotations.get(SOURCE_RANGES_ANNOTATION).filter(|text| !text.trim().is_empty())?;
        Some(text.split(',').map(str::to_owned).collect())
    };
    let listed: Vec<String> = listed.or_else(annotated)?;
    let mut ranges: Vec<IpNet> = Vec::new();
    for text in listed {
        match text.trim().parse::<IpNet>() {
            Ok(range) => ranges.push(range.trunc()),
            Err(_) => {
                misunderstood.push(format!("loadBalancerSourceRanges: {text:?} is not a range, and lets nobody in"))
            }
        }
    }
    ranges.sort_unstable();
    ranges.dedup();
    Some(ranges)
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
        let mut ports = spec
            .ports
            .iter()
            .flatten()
            .enumerate()
            .map(|(index, port)| parse_port(&who, index, port))
            .collect::<Result<Vec<_>, _>>()?;
        // Kept for as long as the object is there: without the room that a growing list has.
        ports.shrink_to_fit();
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
        let annotations = meta.annotations.clone().unwrap_or_default();
        let mut misunderstood = Vec::new();
        let has_addresses = !matches!(kind, ServiceKind::Headless | ServiceKind::ExternalName(_));
        Ok(Self {
            labels: meta.labels.clone().unwrap_or_default(),
            cluster_ips: if has_addresses { addresses(listed.into_iter()) } else { Vec::new() },
            external_ips: addresses(spec.external_ips.clone().into_iter().flatten()),
            load_balancer_ips: addresses(
                // KEP-1860: with `Proxy` the load balancer delivers to the node itself, and nodes go through it.
                ingress.into_iter().filter(|i| i.ip_mode.as_deref() != Some("Proxy")).filter_map(|i| i.ip),
            ),
            algorithm: algorithm(&annotations, &mut misunderstood),
            source_ranges: source_ranges(spec, &annotations, &mut misunderstood),
            misunderstood,
            load_balancer_class: spec.load_balancer_class.clone(),
            balanced_by_us: crate::load_balancer::is_ours(object),
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parsed(annotations: serde_json::Value, spec: serde_json::Value, status: serde_json::Value) -> Service {
        let object = json!({"metadata": {"namespace": "a", "name": "b", "annotations": annotations}, "spec": spec, "status": status});
        Service::try_from(&serde_json::from_value::<core::Service>(object).unwrap()).unwrap()
    }

    #[test]
    fn a_node_keeps_the_labels_that_say_whose_a_service_is() {
        let object = json!({
            "metadata": {"namespace": "a", "name": "b", "labels": {"app": "web", OTHER_PROXY_LABELS[0]: "another"}}, "spec": {},
        });
        let mut service = Service::try_from(&serde_json::from_value::<core::Service>(object).unwrap()).unwrap();
        service.slim();
        assert!(service.for_other_proxies() && service.labels.len() == 1, "{:?}", service.labels);
    }

    #[test]
    fn an_algorithm_is_named_by_an_annotation_and_an_unknown_one_is_said() {
        for algorithm in Algorithm::ALL {
            let service = parsed(json!({ALGORITHM_ANNOTATION: algorithm.name()}), json!({}), json!({}));
            assert_eq!((service.algorithm, service.misunderstood.len()), (algorithm, 0));
        }
        let service = parsed(json!({ALGORITHM_ANNOTATION: "Fastest"}), json!({}), json!({}));
        assert_eq!(service.algorithm, Algorithm::Random);
        let [said] = service.misunderstood.as_slice() else { panic!("{:?}", service.misunderstood) };
        assert!(said.contains("\"Fastest\"") && said.contains("source-hash, maglev; random is used"), "{said}");
        assert_eq!(parsed(json!({}), json!({}), json!({})).algorithm, Algorithm::Random);
    }

    #[test]
    fn source_ranges_come_from_the_field_else_from_the_annotation() {
        let annotation = json!({SOURCE_RANGES_ANNOTATION: "192.0.2.0/24, 198.51.100.7/32"});
        let spec = json!({"loadBalancerSourceRanges": ["203.0.113.9/24", "fd00::/8", "203.0.113.0/24"]});
        let both = parsed(annotation.clone(), spec, json!({}));
        let of = |service: &Service| {
            service.source_ranges.clone().map(|list| list.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(of(&both).unwrap(), ["203.0.113.0/24", "fd00::/8"]);
        assert_eq!(of(&parsed(annotation, json!({}), json!({}))).unwrap(), ["192.0.2.0/24", "198.51.100.7/32"]);
        assert_eq!(of(&parsed(json!({}), json!({"loadBalancerSourceRanges": []}), json!({}))), None);
        let wrong = parsed(json!({}), json!({"loadBalancerSourceRanges": ["all"]}), json!({}));
        assert_eq!((of(&wrong).unwrap().len(), wrong.misunderstood.len()), (0, 1), "nobody is let in by mistake");
    }

    #[test]
    fn a_load_balancer_that_is_a_proxy_is_gone_through() {
        let ingress =
            json!([{"ip": "192.0.2.1", "ipMode": "Proxy"}, {"ip": "192.0.2.2", "ipMode": "VIP"}, {"ip": "192.0.2.3"}]);
        let service = parsed(json!({}), json!({"type": "LoadBalancer"}), json!({"loadBalancer": {"ingress": ingress}}));
        assert_eq!(service.load_balancer_ips, ["192.0.2.2", "192.0.2.3"].map(|ip| ip.parse::<IpAddr>().unwrap()));
    }
}
