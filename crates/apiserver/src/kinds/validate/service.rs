//! Validation of Services.
//!
//! Whether an address lies in the Service range or a node port is free is checked where they are allotted.

use serde_json::Value;

use super::container::{port_number, protocol};
use super::endpoints::endpoint_ip;
use super::{dual_stack, legacy_cidr, legacy_ip, port_or_name};
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::labels;
use crate::kinds::read::Read;

fn is_headless(spec: &Value) -> bool {
    spec.texts("clusterIPs") == ["None"] || (spec.text("clusterIP") == "None" && spec.list("clusterIPs").is_empty())
}

/// Checks a `Service`; for updates, [`service_update`] too.
pub(crate) fn service(object: &Value, faults: &mut Faults) {
    check(object, &Value::Null, faults);
}

/// Checks what an update of a `Service` may change, and the rest of it.
pub(crate) fn service_update(object: &Value, old: &Value, faults: &mut Faults) {
    cluster_ip_changes(object.at("spec"), old.at("spec"), faults);
    family_changes(object.at("spec"), old.at("spec"), faults);
    let (spec, before) = (object.at("spec"), old.at("spec"));
    let path = Path::new("spec");
    let balancers = spec.text("type") == "LoadBalancer" && before.text("type") == "LoadBalancer";
    if balancers && spec.at("loadBalancerClass") != before.at("loadBalancerClass") {
        faults.invalid(&path.child("loadBalancerClass"), spec.at("loadBalancerClass"), "may not change once set");
    }
    if needs_health_check(spec)
        && needs_health_check(before)
        && spec.at("healthCheckNodePort") != before.at("healthCheckNodePort")
    {
        faults.forbidden(&path.child("healthCheckNodePort"), format::IMMUTABLE);
    }
    check(object, old, faults);
}

fn check(object: &Value, old: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    topology_annotations(object, faults);
    if spec.list("ports").is_empty() && !is_headless(spec) && spec.text("type") != "ExternalName" {
        faults.required(&path.child("ports"), "");
    }
    by_type(spec, &path, faults);
    ports(spec, &path.child("ports"), faults);
    labels(spec.at("selector"), &path.child("selector"), faults);
    session_affinity(spec, &path, faults);
    cluster_ips(spec, old.at("spec"), &path, faults);
    let known = old.at("spec").texts("externalIPs");
    for (index, address) in spec.texts("externalIPs").iter().enumerate() {
        let here = path.child("externalIPs").index(index);
        let before = faults.len();
        legacy_ip(address, &known, &here, faults);
        if faults.len() == before {
            endpoint_ip(address, &here, faults);
        }
    }
    const TYPES: &[&str] = &["ClusterIP", "ExternalName", "LoadBalancer", "NodePort"];
    let kind = spec.text("type");
    if kind.is_empty() {
        faults.required(&path.child("type"), "");
    } else if !TYPES.contains(&kind) {
        faults.unsupported(&path.child("type"), kind, TYPES);
    }
    duplicates(spec, &path.child("ports"), faults);
    load_balancer(object, old, &path, faults);
    traffic_policies(spec, &path, faults);
}

fn topology_annotations(object: &Value, faults: &mut Faults) {
    const HINTS: &str = "service.kubernetes.io/topology-aware-hints";
    const MODE: &str = "service.kubernetes.io/topology-mode";
    let annotations = object.deep(&["metadata", "annotations"]);
    if annotations.has(HINTS) && annotations.has(MODE) && annotations.at(HINTS) != annotations.at(MODE) {
        let path = Path::new("metadata").child("annotations").key(MODE);
        faults.invalid(
            &path,
            annotations.text(MODE),
            &format!("must match annotations[{HINTS}] when both are specified"),
        );
    }
}

fn by_type(spec: &Value, path: &Path, faults: &mut Faults) {
    match spec.text("type") {
        kind @ ("LoadBalancer" | "NodePort") if is_headless(spec) => {
            faults.invalid(
                &path.child("clusterIPs").index(0),
                "None",
                &format!("may not be set to 'None' for {kind} services"),
            );
        }
        "ExternalName" => {
            for field in ["clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
                if !spec.at(field).is_blank() {
                    faults.forbidden(&path.child(field), "may not be set for ExternalName services");
                }
            }
            let name = spec.text("externalName");
            let name = name.strip_suffix('.').unwrap_or(name);
            if name.is_empty() {
                faults.required(&path.child("externalName"), "");
            } else {
                faults.invalid_each(&path.child("externalName"), name, format::dns_subdomain(name));
            }
        }
        _ => {}
    }
}

fn ports(spec: &Value, path: &Path, faults: &mut Faults) {
    let list = spec.list("ports");
    let mut names = Vec::new();
    for (index, port) in list.iter().enumerate() {
        let here = path.index(index);
        let name = port.text("name");
        if name.is_empty() {
            if list.len() > 1 {
                faults.required(&here.child("name"), "");
            }
        } else {
            faults.invalid_each(&here.child("name"), name, format::dns_label(name));
            if names.contains(&name) {
                faults.duplicate(&here.child("name"), name);
            }
            names.push(name);
        }
        port_number(port.int("port").unwrap_or(0), &here.child("port"), faults);
        protocol(port.text("protocol"), &here.child("protocol"), faults);
        port_or_name(port.at("targetPort"), &here.child("targetPort"), faults);
        if port.has("appProtocol") {
            faults.invalid_each(
                &here.child("appProtocol"),
                port.text("appProtocol"),
                format::label_key(port.text("appProtocol")),
            );
        }
    }
}

fn session_affinity(spec: &Value, path: &Path, faults: &mut Faults) {
    const LONGEST: i64 = 86400;
    let (affinity, here) = (spec.text("sessionAffinity"), path.child("sessionAffinity"));
    let config_path = path.child("sessionAffinityConfig");
    match affinity {
        "" => faults.required(&here, ""),
        "None" if spec.has("sessionAffinityConfig") => {
            faults.forbidden(&config_path, "must not be set when session affinity is None");
        }
        "None" => {}
        "ClientIP" => {
            let timeout_path = config_path.child("clientIP").child("timeoutSeconds");
            match spec.deep(&["sessionAffinityConfig", "clientIP"]).int("timeoutSeconds") {
                None => faults.required(&timeout_path, "when session affinity type is ClientIP"),
                Some(seconds) if !(1..=LONGEST).contains(&seconds) => {
                    faults.invalid(&timeout_path, seconds, &format!("must be greater than 0 and less than {LONGEST}"));
                }
                Some(_) => {}
            }
        }
        other => faults.unsupported(&here, other, &["ClientIP", "None"]),
    }
}

fn cluster_ips(spec: &Value, old: &Value, path: &Path, faults: &mut Faults) {
    if spec.text("type") == "ExternalName" {
        return;
    }
    let (field, families_path) = (path.child("clusterIPs"), path.child("ipFamilies"));
    let (all, ips, families) = (spec.at("clusterIPs"), spec.texts("clusterIPs"), spec.texts("ipFamilies"));
    match (spec.text("clusterIP"), ips.first()) {
        ("", Some(_)) => faults.invalid(&field, all, "must be empty when `clusterIP` is not specified"),
        ("", None) => {}
        (_, None) => faults.required(&field, ""),
        (ip, Some(first)) if ip != *first => faults.invalid(&field, all, "first value must match `clusterIP`"),
        _ => {}
    }
    for (index, family) in families.iter().enumerate() {
        if !["IPv4", "IPv6"].contains(family) {
            faults.unsupported(&families_path.index(index), *family, &["IPv4", "IPv6"]);
        }
        if families.iter().take(index).any(|earlier| earlier == family) {
            faults.duplicate(&families_path.index(index), *family);
        }
    }
    const POLICIES: &[&str] = &["PreferDualStack", "RequireDualStack", "SingleStack"];
    if spec.has("ipFamilyPolicy") && !POLICIES.contains(&spec.text("ipFamilyPolicy")) {
        faults.unsupported(&path.child("ipFamilyPolicy"), spec.text("ipFamilyPolicy"), POLICIES);
    }
    let before = faults.len();
    let known = old.texts("clusterIPs");
    for (index, ip) in ips.iter().enumerate() {
        if index == 0 && *ip == "None" {
            if ips.len() > 1 {
                faults.invalid(&field, all, "'None' must be the first and only value");
            }
        } else {
            legacy_ip(ip, &known, &field.index(index), faults);
        }
    }
    let invalid = faults.len() > before;
    if ips.len() > 2 {
        faults.invalid(&field, all, "may only hold up to 2 values");
    }
    if invalid {
        return;
    }
    if ips.len() > 1 && !dual_stack(&ips) {
        faults.invalid(&field, all, "may specify no more than one IP for each IP family");
    }
    if is_headless(spec) {
        return;
    }
    for (index, (ip, family)) in ips.iter().zip(&families).enumerate() {
        let six = format::sloppy_ip(ip).is_some_and(|address| address.is_ipv6());
        if (*family == "IPv4" && six) || (*family == "IPv6" && !six) {
            faults.invalid(
                &field.index(index),
                *ip,
                &format!("expected an {family} value as indicated by `ipFamilies[{index}]`"),
            );
        }
    }
}

fn duplicates(spec: &Value, path: &Path, faults: &mut Faults) {
    let list = spec.list("ports");
    if spec.text("type") == "ClusterIP" {
        for (index, _) in list.iter().enumerate().filter(|(_, port)| port.int("nodePort").unwrap_or(0) != 0) {
            faults.forbidden(&path.index(index).child("nodePort"), "may not be used when `type` is 'ClusterIP'");
        }
    }
    for (index, port) in list.iter().enumerate() {
        let Some(number) = port.int("nodePort").filter(|number| *number != 0) else { continue };
        if list
            .iter()
            .take(index)
            .any(|other| other.text("protocol") == port.text("protocol") && other.int("nodePort") == Some(number))
        {
            faults.duplicate(&path.index(index).child("nodePort"), number);
        }
    }
    for (index, port) in list.iter().enumerate() {
        if list
            .iter()
            .take(index)
            .any(|other| other.text("protocol") == port.text("protocol") && other.at("port") == port.at("port"))
        {
            // The real server shows the key as the internal type is marshalled.
            let key = serde_json::json!({
                "Name": "", "Protocol": port.text("protocol"), "AppProtocol": null, "Port": port.int("port"), "TargetPort": 0, "NodePort": 0,
            });
            faults.duplicate(&path.index(index), &key);
        }
    }
}

fn load_balancer(object: &Value, old: &Value, path: &Path, faults: &mut Faults) {
    const ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";
    let (spec, balancer) = (object.at("spec"), object.at("spec").text("type") == "LoadBalancer");
    let only = "may only be used when `type` is 'LoadBalancer'";
    let ranges = spec.texts("loadBalancerSourceRanges");
    let annotation = object.deep(&["metadata", "annotations", ANNOTATION]).as_str();
    if !ranges.is_empty() {
        let here = path.child("LoadBalancerSourceRanges");
        if !balancer {
            faults.forbidden(&here, only);
        }
        let known: Vec<&str> = old.at("spec").texts("loadBalancerSourceRanges").into_iter().map(str::trim).collect();
        for (index, range) in ranges.iter().enumerate() {
            legacy_cidr(range.trim(), &known, &here.index(index), faults);
        }
    } else if let Some(value) = annotation {
        let here = Path::new("metadata").child("annotations").key(ANNOTATION);
        if !balancer {
            faults.forbidden(&here, only);
        }
        if old.deep(&["metadata", "annotations", ANNOTATION]).as_str() != annotation && !value.trim().is_empty() {
            for range in value.split(',') {
                legacy_cidr(range.trim(), &[], &here, faults);
            }
        }
    }
    let allocate = spec.has("allocateLoadBalancerNodePorts");
    if allocate && !balancer {
        faults.forbidden(&path.child("allocateLoadBalancerNodePorts"), only);
    }
    if balancer && !allocate {
        faults.required(&Path::new("allocateLoadBalancerNodePorts"), "");
    }
    if spec.has("loadBalancerClass") {
        let here = path.child("loadBalancerClass");
        if balancer {
            faults.invalid_each(
                &here,
                spec.text("loadBalancerClass"),
                format::label_key(spec.text("loadBalancerClass")),
            );
        } else {
            faults.forbidden(&here, only);
        }
    }
}

fn needs_health_check(spec: &Value) -> bool {
    spec.text("type") == "LoadBalancer" && spec.text("externalTrafficPolicy") == "Local"
}

fn traffic_policies(spec: &Value, path: &Path, faults: &mut Faults) {
    let kind = spec.text("type");
    let accessible =
        matches!(kind, "LoadBalancer" | "NodePort") || (kind == "ClusterIP" && !spec.list("externalIPs").is_empty());
    let (external, here) = (spec.text("externalTrafficPolicy"), path.child("externalTrafficPolicy"));
    match (accessible, external) {
        (false, "") | (true, "Cluster" | "Local") => {}
        (false, other) => faults.invalid(&here, other, "may only be set for externally-accessible services"),
        (true, "") => faults.required(&here, ""),
        (true, other) => faults.unsupported(&here, other, &["Cluster", "Local"]),
    }
    let here = path.child("healthCheckNodePort");
    match spec.int("healthCheckNodePort").unwrap_or(0) {
        0 => {}
        port if needs_health_check(spec) => port_number(port, &here, faults),
        port => faults.invalid(
            &here,
            port,
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ),
    }
    let here = path.child("internalTrafficPolicy");
    if !spec.has("internalTrafficPolicy") {
        if matches!(kind, "NodePort" | "LoadBalancer" | "ClusterIP") {
            faults.required(&here, "");
        }
    } else if !["Cluster", "Local"].contains(&spec.text("internalTrafficPolicy")) {
        faults.unsupported(&here, spec.text("internalTrafficPolicy"), &["Cluster", "Local"]);
    }
    const DISTRIBUTIONS: &[&str] = &["PreferClose", "PreferSameZone", "PreferSameNode"];
    if spec.has("trafficDistribution") && !DISTRIBUTIONS.contains(&spec.text("trafficDistribution")) {
        faults.unsupported(&path.child("trafficDistribution"), spec.text("trafficDistribution"), DISTRIBUTIONS);
    }
}

fn cluster_ip_changes(spec: &Value, old: &Value, faults: &mut Faults) {
    if [spec, old].iter().any(|spec| spec.text("type") == "ExternalName") || (is_headless(spec) && is_headless(old)) {
        return;
    }
    let path = Path::new("spec").child("clusterIPs");
    let (now, before, shown) = (spec.texts("clusterIPs"), old.texts("clusterIPs"), spec.at("clusterIPs"));
    let changed = "may not change once set";
    if now.len() == before.len() {
        for (index, _) in now.iter().zip(&before).enumerate().filter(|(_, (now, before))| now != before) {
            faults.invalid(&path.index(index), shown, changed);
        }
        return;
    }
    if now.is_empty() {
        faults.invalid(&path.index(0), shown, "primary clusterIP can not be unset");
    } else if !before.is_empty() && now.first() != before.first() {
        faults.invalid(&path.index(0), shown, changed);
    }
    if before.len() > now.len() && now.len() == 1 && spec.text("ipFamilyPolicy") != "SingleStack" {
        let detail = "must be set to 'SingleStack' when releasing the secondary clusterIP";
        faults.invalid(&Path::new("spec").child("ipFamilyPolicy"), spec.at("ipFamilyPolicy"), detail);
    }
}

fn family_changes(spec: &Value, old: &Value, faults: &mut Faults) {
    if [spec, old].iter().any(|spec| spec.text("type") == "ExternalName") || is_headless(spec) || is_headless(old) {
        return;
    }
    let path = Path::new("spec").child("ipFamilies").index(0);
    let (now, before) = (spec.texts("ipFamilies"), old.texts("ipFamilies"));
    let changed = "may not change once set";
    if now.len() == before.len() {
        for _ in now.iter().zip(&before).filter(|(now, before)| now != before) {
            faults.invalid(&path, spec.at("ipFamilies"), changed);
        }
        return;
    }
    if now.is_empty() {
        if spec.list("clusterIPs").is_empty() {
            faults.invalid(&path, spec.at("ipFamilies"), "primary ipFamily can not be unset");
        }
    } else if !before.is_empty() && now.first() != before.first() {
        faults.invalid(&path, spec.at("clusterIPs"), changed);
    }
    if before.len() > now.len() && now.len() == 1 && spec.text("ipFamilyPolicy") != "SingleStack" {
        let detail = "must be set to 'SingleStack' when releasing the secondary ipFamily";
        faults.invalid(&Path::new("spec").child("ipFamilyPolicy"), spec.at("ipFamilyPolicy"), detail);
    }
}

/// Checks a Service's `status`.
pub(crate) fn service_status(object: &Value, old: &Value, faults: &mut Faults) {
    let path = Path::new("status").child("loadBalancer").child("ingress");
    let ingresses = object.deep(&["status", "loadBalancer"]).list("ingress");
    if object.at("spec").text("type") != "LoadBalancer" {
        if !ingresses.is_empty() {
            faults.forbidden(&path, "may only be used when `spec.type` is 'LoadBalancer'");
        }
        return;
    }
    let known: Vec<&str> =
        old.deep(&["status", "loadBalancer"]).list("ingress").iter().map(|ingress| ingress.text("ip")).collect();
    for (index, ingress) in ingresses.iter().enumerate() {
        let here = path.index(index);
        let (ip, mode, hostname) = (ingress.text("ip"), ingress.text("ipMode"), ingress.text("hostname"));
        if !ip.is_empty() {
            legacy_ip(ip, &known, &here.child("ip"), faults);
        }
        match (ip.is_empty(), ingress.has("ipMode")) {
            (false, false) => faults.required(&here.child("ipMode"), "must be specified when `ip` is set"),
            (true, true) => faults.forbidden(&here.child("ipMode"), "may not be specified when `ip` is not set"),
            (false, true) if !["Proxy", "VIP"].contains(&mode) => {
                faults.unsupported(&here.child("ipMode"), mode, &["Proxy", "VIP"])
            }
            _ => {}
        }
        if !hostname.is_empty() {
            faults.invalid_each(&here.child("hostname"), hostname, format::dns_subdomain(hostname));
            if format::sloppy_ip(hostname).is_some() {
                faults.invalid(&here.child("hostname"), hostname, "must be a DNS name, not an IP address");
            }
        }
    }
}
