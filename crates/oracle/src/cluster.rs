//! ClusterNetworkPolicy, as `clusternetworkpolicy_types.go` of network-policy-api v0.2.0 words it.
//!
//! Objects are JSON as the API server shows it: nothing here parses them into anything first.
#![allow(clippy::indexing_slicing, reason = "what a JSON value does not have is null")]

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::LabelSelector;
use k8s_openapi::serde_json::{Value, from_value};

use crate::{Cluster, Traffic, block, has_named_port, pod_at, selector};

/// What the rules of a tier say: `Some(true)` accepts, `Some(false)` denies; none: no rule matched, or one that passes did.
///
/// `subject` is the end whose rules are asked, `peer` the address of the other one, `direction` is `ingress` or `egress`.
pub(crate) fn decides(
    cluster: &Cluster,
    tier: &str,
    direction: &str,
    subject: &Pod,
    peer: IpAddr,
    traffic: &Traffic<'_>,
) -> Option<bool> {
    let mut policies: Vec<&Value> = cluster.cluster_policies.iter().filter(|p| p["spec"]["tier"] == tier).collect();
    // "Policies with lower priority values have higher precedence, and are checked before policies with higher priority values in the
    // same tier." Of the same priority: "the implementation can apply any of the matching policies"; ours goes by name.
    policies.sort_by_key(|p| (p["spec"]["priority"].as_i64(), p["metadata"]["name"].as_str()));
    for policy in policies {
        let audited = policy["metadata"]["annotations"]["towpath.dev/audit"] == "true";
        if audited || !peer_selects_pod(cluster, &policy["spec"]["subject"], subject) {
            continue;
        }
        // "The relative precedence of ingress rules within a single CNP object (all of which share the priority) will be determined by
        // the order in which the rule is written."
        for rule in policy["spec"][direction].as_array().into_iter().flatten() {
            match (matches(cluster, rule, direction, peer, traffic), rule["action"].as_str()) {
                (Match::No, _) => {}
                // "For "Accept" rules, "fail closed" means: "treat the rule as matching no traffic". For "Deny" and "Pass" rules, "fail
                // closed" means: "treat the rule as a 'Deny all' rule"."
                (Match::NotUnderstood, Some("Accept")) => {}
                (Match::NotUnderstood, _) => return Some(false),
                // "Accepts the selected traffic … No further ingress ClusterNetworkPolicy or NetworkPolicy rules will be processed."
                (Match::Yes, Some("Accept")) => return Some(true),
                // "Drops the selected traffic."
                (Match::Yes, Some("Deny")) => return Some(false),
                // "Skips all further ClusterNetworkPolicy rules in the current tier for the selected traffic, and passes evaluation to
                // the next tier."
                (Match::Yes, _) => return None,
            }
        }
    }
    None
}

enum Match {
    Yes,
    No,
    NotUnderstood,
}

fn matches(cluster: &Cluster, rule: &Value, direction: &str, peer: IpAddr, traffic: &Traffic<'_>) -> Match {
    let peers = rule[if direction == "ingress" { "from" } else { "to" }].as_array().cloned().unwrap_or_default();
    let known: &[&str] = if direction == "ingress" {
        &["namespaces", "pods"]
    } else {
        &["namespaces", "pods", "nodes", "networks", "domainNames"]
    };
    // "If an implementation sees no fields are set then it can infer that the deployed CRD is of an incompatible version with an unknown
    // field. In that case it should fail closed."
    if peers.iter().any(|p| known.iter().all(|field| p[field].is_null())) {
        return Match::NotUnderstood;
    }
    let pod = pod_at(cluster, peer);
    // "If any element matches the source of incoming traffic then the specified action is applied."
    let from_peer = peers.iter().any(|wanted| match pod {
        Some(pod) if peer_selects_pod(cluster, wanted, pod) => true,
        Some(_) => in_networks(wanted, peer),
        None => in_networks(wanted, peer) || is_node(cluster, wanted, peer) || is_named(cluster, wanted, peer),
    });
    // "If unspecified, protocol-specific attributes will not be used to match traffic."
    let destination = pod_at(cluster, traffic.to);
    let protocols = rule["protocols"].as_array();
    let protocol =
        protocols.is_none_or(|list| list.iter().any(|wanted| protocol_matches(wanted, destination, traffic)));
    if from_peer && protocol { Match::Yes } else { Match::No }
}

fn select(wanted: &Value, labels: Option<std::collections::BTreeMap<String, String>>) -> bool {
    let wanted: LabelSelector = from_value(wanted.clone()).unwrap_or_default();
    selector::matches(&wanted, &labels.unwrap_or_default())
}

/// A subject, and the two kinds of peers that are pods: "Namespaces defines a way to select all pods within a set of Namespaces", "Pods
/// defines a way to select a set of pods in a set of namespaces. Note that host-networked pods are not included".
fn peer_selects_pod(cluster: &Cluster, wanted: &Value, pod: &Pod) -> bool {
    let namespace = cluster.namespaces.iter().find(|n| n.metadata.name == pod.metadata.namespace);
    let of_namespace = namespace.and_then(|n| n.metadata.labels.clone());
    if !wanted["namespaces"].is_null() {
        return select(&wanted["namespaces"], of_namespace);
    }
    !wanted["pods"].is_null()
        && select(&wanted["pods"]["namespaceSelector"], of_namespace)
        && select(&wanted["pods"]["podSelector"], pod.metadata.labels.clone())
}

/// "Networks defines a way to select peers via CIDR blocks … cluster-internal traffic will be checked against the rule as well."
fn in_networks(wanted: &Value, peer: IpAddr) -> bool {
    let networks = wanted["networks"].as_array().into_iter().flatten();
    networks.filter_map(Value::as_str).any(|network| block::contains(network, peer))
}

/// "It selects the nodeIPs as the peer type by matching on the IPs present in the node.Status.Addresses field of the node."
fn is_node(cluster: &Cluster, wanted: &Value, peer: IpAddr) -> bool {
    !wanted["nodes"].is_null()
        && cluster.nodes.iter().filter(|node| select(&wanted["nodes"], node.metadata.labels.clone())).any(|node| {
            let addresses = node.status.iter().flat_map(|s| s.addresses.iter().flatten());
            addresses.into_iter().any(|a| a.address.parse() == Ok(peer))
        })
}

/// "DomainNames provides a way to specify domain names as peers." What a node holds is no host outside, whatever DNS says.
fn is_named(cluster: &Cluster, wanted: &Value, peer: IpAddr) -> bool {
    let any_node = Value::from_iter([("nodes", Value::Object(Default::default()))]);
    let patterns: Vec<&str> =
        wanted["domainNames"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let said = cluster.names.iter().filter(|(_, address)| *address == peer);
    !is_node(cluster, &any_node, peer)
        && said.into_iter().any(|(name, _)| patterns.iter().any(|pattern| name_matches(pattern, name)))
}

/// "'*', the wildcard specifier, matches one or more entire labels. It does not support partial matches. '*' may only be specified as a
/// prefix." "`*.kubernetes.io` matches subdomains of kubernetes.io … It does not match "kubernetes.io"".
fn name_matches(pattern: &str, name: &str) -> bool {
    let labels =
        |text: &str| -> Vec<String> { text.trim_end_matches('.').split('.').map(str::to_ascii_lowercase).collect() };
    let (mut wanted, name) = (labels(pattern), labels(name));
    if wanted[0] != "*" {
        return wanted == name;
    }
    wanted.remove(0);
    name.len() > wanted.len() && name.ends_with(&wanted)
}

fn protocol_matches(wanted: &Value, destination: Option<&Pod>, traffic: &Traffic<'_>) -> bool {
    // "DestinationNamedPort selects a destination port on a pod based on the ContainerPort name."
    if let Some(name) = wanted["destinationNamedPort"].as_str() {
        return destination.is_some_and(|pod| has_named_port(pod, name, traffic.protocol, traffic.port));
    }
    let wanted = match traffic.protocol {
        "TCP" => &wanted["tcp"]["destinationPort"],
        "UDP" => &wanted["udp"]["destinationPort"],
        "SCTP" => &wanted["sctp"]["destinationPort"],
        _ => return false,
    };
    let port = i64::from(traffic.port);
    let range = &wanted["range"];
    // "an inclusive range of ports from the assigned Start value to End value."
    wanted["number"] == port
        || matches!((range["start"].as_i64(), range["end"].as_i64()), (Some(start), Some(end)) if (start..=end).contains(&port))
}
