//! Tests only: a naive evaluator of NetworkPolicy and ClusterNetworkPolicy, written from their documentation.
//!
//! It shares no code with `model` or `policy`: it reads the API objects as they are, one rule at a time, in the words of
//! <https://kubernetes.io/docs/concepts/services-networking/network-policies/> and of the `networking.k8s.io/v1` reference.
//! Slow and obvious is its whole value. Objects must have passed the API server's validation; what does not parse matches nothing.
//!
//! Where the documentation leaves a choice, ours is:
//! - Traffic from the pod's own node is allowed; traffic to it is judged as to any address.
//! - `ipBlock` is held against pod addresses as well.
//! - A domain name is the addresses outside the cluster that DNS has said of it.
//! - A pod that has ended (`Succeeded`, `Failed`) holds no address; a `hostNetwork` pod is its node.
#![forbid(unsafe_code)]

mod block;
mod cluster;
mod selector;

use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Namespace, Node, Pod};
use k8s_openapi::api::networking::v1::{NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::serde_json::Value;

/// The objects that decide.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// All nodes.
    pub nodes: Vec<Node>,
    /// All namespaces.
    pub namespaces: Vec<Namespace>,
    /// All pods.
    pub pods: Vec<Pod>,
    /// All policies.
    pub policies: Vec<NetworkPolicy>,
    /// All ClusterNetworkPolicies, as JSON.
    pub cluster_policies: Vec<Value>,
    /// What DNS has said of names: each with an address.
    pub names: Vec<(String, IpAddr)>,
}

/// A connection attempt, after Service translation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Traffic<'t> {
    /// Source address.
    pub from: IpAddr,
    /// Destination address.
    pub to: IpAddr,
    /// `TCP`, `UDP`, `SCTP`, or any other text for a protocol that has no ports.
    pub protocol: &'t str,
    /// Destination port.
    pub port: u16,
}

/// "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the source pod and the
/// ingress policy on the destination pod need to allow the connection."
pub fn allowed(cluster: &Cluster, traffic: &Traffic<'_>) -> bool {
    egress_allowed(cluster, traffic) && ingress_allowed(cluster, traffic)
}

/// Whether the source may send it. What is no pod may send everything.
pub fn egress_allowed(cluster: &Cluster, traffic: &Traffic<'_>) -> bool {
    let Some(source) = pod_at(cluster, traffic.from) else { return true };
    let destination = pod_at(cluster, traffic.to);
    if destination.is_some_and(|d| same(d, source)) {
        return true; // "a Pod cannot block access to itself"
    }
    // "Policy tiers are evaluated in the following order: Admin tier, NetworkPolicy tier, Baseline tier."
    if let Some(decision) = cluster::decides(cluster, "Admin", "egress", source, traffic.to, traffic) {
        return decision;
    }
    let mut isolated = false;
    for policy in &cluster.policies {
        if audited(policy.metadata.annotations.as_ref()) || !selects(policy, source) || !has_type(policy, "Egress") {
            continue;
        }
        isolated = true;
        for rule in policy.spec.iter().flat_map(|s| s.egress.iter().flatten()) {
            let to = rule.to.clone().unwrap_or_default();
            let ports = rule.ports.clone().unwrap_or_default();
            // "If this field is empty or missing, this rule matches all destinations." And likewise for ports.
            let peer = to.is_empty() || to.iter().any(|p| peer_matches(cluster, policy, p, traffic.to, destination));
            let port = ports.is_empty() || ports.iter().any(|p| port_matches(p, traffic, destination));
            if peer && port {
                return true;
            }
        }
    }
    // "v1.NetworkPolicy always makes a final decision for selected pods. Further evaluation only happens for Pods not selected by a
    // v1.NetworkPolicy." And at last: "all pods can communicate with each other."
    !isolated && cluster::decides(cluster, "Baseline", "egress", source, traffic.to, traffic).unwrap_or(true)
}

/// Whether the destination may receive it. What is no pod may receive everything.
pub fn ingress_allowed(cluster: &Cluster, traffic: &Traffic<'_>) -> bool {
    let Some(destination) = pod_at(cluster, traffic.to) else { return true };
    let source = pod_at(cluster, traffic.from);
    if source.is_some_and(|s| same(s, destination)) {
        return true;
    }
    if is_own_node(cluster, destination, traffic.from) {
        return true; // "traffic to and from the node where a Pod is running is always allowed"
    }
    if let Some(decision) = cluster::decides(cluster, "Admin", "ingress", destination, traffic.from, traffic) {
        return decision;
    }
    let mut isolated = false;
    for policy in &cluster.policies {
        if audited(policy.metadata.annotations.as_ref())
            || !selects(policy, destination)
            || !has_type(policy, "Ingress")
        {
            continue;
        }
        isolated = true;
        for rule in policy.spec.iter().flat_map(|s| s.ingress.iter().flatten()) {
            let from = rule.from.clone().unwrap_or_default();
            let ports = rule.ports.clone().unwrap_or_default();
            let peer = from.is_empty() || from.iter().any(|p| peer_matches(cluster, policy, p, traffic.from, source));
            let port = ports.is_empty() || ports.iter().any(|p| port_matches(p, traffic, Some(destination)));
            if peer && port {
                return true;
            }
        }
    }
    // "v1.NetworkPolicy always makes a final decision for selected pods. Further evaluation only happens for Pods not selected by a
    // v1.NetworkPolicy." And at last: "all pods can communicate with each other."
    !isolated && cluster::decides(cluster, "Baseline", "ingress", destination, traffic.from, traffic).unwrap_or(true)
}

/// "A policy with the annotation `towpath.dev/audit: "true"` is judged and reported, not enforced" (docs/policy.md).
fn audited(annotations: Option<&std::collections::BTreeMap<String, String>>) -> bool {
    annotations.and_then(|all| all.get("towpath.dev/audit")).is_some_and(|said| said == "true")
}

/// Whether policies look at the address as a pod.
pub fn holds_pod(cluster: &Cluster, address: IpAddr) -> bool {
    pod_at(cluster, address).is_some()
}

/// The pod that holds an address.
fn pod_at(cluster: &Cluster, address: IpAddr) -> Option<&Pod> {
    cluster.pods.iter().find(|pod| {
        let host = pod.spec.as_ref().and_then(|s| s.host_network).unwrap_or(false);
        let Some(status) = &pod.status else { return false };
        let ended = matches!(status.phase.as_deref(), Some("Succeeded") | Some("Failed"));
        let listed = status.pod_ips.iter().flatten().map(|ip| ip.ip.as_str()).chain(status.pod_ip.as_deref());
        !host && !ended && listed.into_iter().any(|text| text.parse() == Ok(address))
    })
}

fn same(one: &Pod, other: &Pod) -> bool {
    one.metadata.namespace == other.metadata.namespace && one.metadata.name == other.metadata.name
}

fn is_own_node(cluster: &Cluster, pod: &Pod, address: IpAddr) -> bool {
    let Some(name) = pod.spec.as_ref().and_then(|s| s.node_name.as_ref()) else { return false };
    cluster.nodes.iter().filter(|n| n.metadata.name.as_ref() == Some(name)).any(|node| {
        let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
        addresses.into_iter().any(|a| a.address.parse() == Ok(address))
    })
}

/// "Each NetworkPolicy includes a podSelector which selects the grouping of pods to which the policy applies. … An empty
/// podSelector selects all pods in the namespace."
fn selects(policy: &NetworkPolicy, pod: &Pod) -> bool {
    let chosen = policy.spec.as_ref().and_then(|s| s.pod_selector.clone()).unwrap_or_default();
    let labels = pod.metadata.labels.clone().unwrap_or_default();
    policy.metadata.namespace == pod.metadata.namespace && selector::matches(&chosen, &labels)
}

/// "If no policyTypes are specified on a NetworkPolicy then by default Ingress will always be set and Egress will be set if the
/// NetworkPolicy has any egress rules."
fn has_type(policy: &NetworkPolicy, direction: &str) -> bool {
    let Some(spec) = &policy.spec else { return false };
    let types = spec.policy_types.clone().unwrap_or_default();
    if types.is_empty() {
        return direction == "Ingress" || spec.egress.as_ref().is_some_and(|rules| !rules.is_empty());
    }
    types.iter().any(|t| t == direction)
}

fn peer_matches(
    cluster: &Cluster,
    policy: &NetworkPolicy,
    wanted: &NetworkPolicyPeer,
    address: IpAddr,
    pod: Option<&Pod>,
) -> bool {
    if let Some(range) = &wanted.ip_block {
        return block::contains(&range.cidr, address)
            && !range.except.iter().flatten().any(|except| block::contains(except, address));
    }
    let Some(pod) = pod else { return false };
    let pod_labels = pod.metadata.labels.clone().unwrap_or_default();
    let pod_fits = wanted.pod_selector.as_ref().is_none_or(|s| selector::matches(s, &pod_labels));
    match &wanted.namespace_selector {
        // "podSelector: This selects particular Pods in the same namespace as the NetworkPolicy."
        None => pod_fits && pod.metadata.namespace == policy.metadata.namespace,
        // "namespaceSelector: This selects particular namespaces for which all Pods should be allowed." Both together: "particular
        // Pods within particular namespaces".
        Some(wanted) => {
            let namespace = cluster.namespaces.iter().find(|n| n.metadata.name == pod.metadata.namespace);
            let labels = namespace.and_then(|n| n.metadata.labels.clone()).unwrap_or_default();
            pod_fits && selector::matches(wanted, &labels)
        }
    }
}

/// Whether a port entry matches; `destination` is the pod that the traffic goes to, in either direction.
fn port_matches(wanted: &NetworkPolicyPort, traffic: &Traffic<'_>, destination: Option<&Pod>) -> bool {
    // "protocol … If not specified, this field defaults to TCP."
    let protocol = wanted.protocol.as_deref().unwrap_or("TCP");
    if protocol != traffic.protocol {
        return false;
    }
    match (&wanted.port, wanted.end_port) {
        // "If this field is not provided, this matches all port names and numbers."
        (None, _) => true,
        (Some(IntOrString::Int(first)), last) => (*first..=last.unwrap_or(*first)).contains(&i32::from(traffic.port)),
        (Some(IntOrString::String(name)), _) => {
            destination.is_some_and(|pod| has_named_port(pod, name, protocol, traffic.port))
        }
    }
}

fn has_named_port(pod: &Pod, name: &str, protocol: &str, number: u16) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let sidecars = spec.init_containers.iter().flatten().filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers.iter().chain(sidecars).flat_map(|c| c.ports.iter().flatten()).any(|port| {
        port.name.as_deref() == Some(name)
            && port.protocol.as_deref().unwrap_or("TCP") == protocol
            && port.container_port == i32::from(number)
    })
}

#[cfg(test)]
mod tests;
