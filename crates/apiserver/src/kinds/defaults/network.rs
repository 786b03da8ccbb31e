//! Defaults of Services, endpoints, policies and ingresses.

use serde_json::{Value, json};

use crate::kinds::read::{Read, drop_field, fill, fill_text, items_mut, present, put};

/// Whether a Service's ports are open on every node or it has external addresses.
fn externally_accessible(spec: &Value) -> bool {
    matches!(spec.text("type"), "NodePort" | "LoadBalancer")
        || (spec.text("type") == "ClusterIP" && !spec.list("externalIPs").is_empty())
}

/// Fills in a `Service`; addresses and node ports are allotted elsewhere.
pub(crate) fn service(object: &mut Value) {
    let Some(spec) = present(object, "spec") else { return };
    fill_text(spec, "sessionAffinity", "None");
    match spec.text("sessionAffinity") {
        "None" => {
            drop_field(spec, "sessionAffinityConfig");
        }
        "ClientIP" if !spec.deep(&["sessionAffinityConfig", "clientIP"]).has("timeoutSeconds") => {
            put(spec, "sessionAffinityConfig", json!({"clientIP": {"timeoutSeconds": 10800}}));
        }
        _ => {}
    }
    fill_text(spec, "type", "ClusterIP");
    for port in items_mut(spec, "ports") {
        fill_text(port, "protocol", "TCP");
        let unset = match port.at("targetPort") {
            Value::String(name) => name.is_empty(),
            Value::Number(number) => number.as_i64() == Some(0),
            other => other.is_null(),
        };
        if let Some(number) = port.int("port").filter(|_| unset) {
            put(port, "targetPort", number);
        }
    }
    if externally_accessible(spec) {
        fill_text(spec, "externalTrafficPolicy", "Cluster");
    }
    if matches!(spec.text("type"), "NodePort" | "LoadBalancer" | "ClusterIP") {
        fill(spec, "internalTrafficPolicy", "Cluster");
    }
    if spec.text("type") == "LoadBalancer" {
        fill(spec, "allocateLoadBalancerNodePorts", true);
        if let Some(balancer) = present(object, "status").and_then(|status| present(status, "loadBalancer")) {
            for ingress in items_mut(balancer, "ingress") {
                if !ingress.text("ip").is_empty() {
                    fill(ingress, "ipMode", "VIP");
                }
            }
        }
    }
}

/// Fills in an `Endpoints`.
pub(crate) fn endpoints(object: &mut Value) {
    for subset in items_mut(object, "subsets") {
        for port in items_mut(subset, "ports") {
            fill_text(port, "protocol", "TCP");
        }
    }
}

/// Fills in an `EndpointSlice`.
pub(crate) fn endpoint_slice(object: &mut Value) {
    for port in items_mut(object, "ports") {
        fill(port, "name", "");
        fill(port, "protocol", "TCP");
    }
}

/// Fills in a `NetworkPolicy`.
pub(crate) fn network_policy(object: &mut Value) {
    // A struct and no pointer: what is left out is the empty one, which selects every pod.
    fill(object, "spec", json!({}));
    let Some(spec) = present(object, "spec") else { return };
    for direction in ["ingress", "egress"] {
        for rule in items_mut(spec, direction) {
            for port in items_mut(rule, "ports") {
                fill(port, "protocol", "TCP");
            }
        }
    }
    // Before policyTypes existed, podSelector was mandatory and so it is always shown.
    fill(spec, "podSelector", json!({}));
    if spec.list("policyTypes").is_empty() {
        let types = if spec.list("egress").is_empty() { json!(["Ingress"]) } else { json!(["Ingress", "Egress"]) };
        put(spec, "policyTypes", types);
    }
}

/// Fills in an `IngressClass`.
pub(crate) fn ingress_class(object: &mut Value) {
    if let Some(parameters) = present(object, "spec").and_then(|spec| present(spec, "parameters")) {
        fill(parameters, "scope", "Cluster");
    }
}
