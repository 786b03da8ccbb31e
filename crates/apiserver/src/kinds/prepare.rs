//! What happens to an object of one kind before it is validated and stored, beyond defaults: first status, fields that
//! follow the type of a Service, what an update that leaves allotted values out means.

use serde_json::{Value, json};

use super::read::{Read, drop_field, fill, items_mut, keep_from, present, put, section};
use super::validate::first_pod_status;

/// A new pod is Pending; its service class follows its requests and limits.
pub(crate) fn pod_create(object: &mut Value) {
    let mut status = first_pod_status(object.at("spec"));
    if !object.at("spec").list("schedulingGates").is_empty() {
        let condition = json!({
            "type": "PodScheduled", "status": "False", "reason": "SchedulingGated",
            "message": "Scheduling is blocked due to non-empty scheduling gates",
        });
        put(&mut status, "conditions", json!([condition]));
    }
    put(object, "status", status);
}

/// A status that says nothing of the service class keeps it.
pub(crate) fn pod_status(object: &mut Value, old: &Value) {
    if let (Some(status), Some(class)) = (present(object, "status"), old.at("status").get("qosClass")) {
        fill(status, "qosClass", class.clone());
    }
}

/// A new namespace is Active and held by the finalizer of the namespace controller.
pub(crate) fn namespace_create(object: &mut Value) {
    fill(object, "spec", json!({}));
    if let Some(spec) = present(object, "spec") {
        let mut finalizers: Vec<String> = spec.texts("finalizers").into_iter().map(str::to_owned).collect();
        if !finalizers.iter().any(|name| name == "kubernetes") {
            finalizers.push("kubernetes".to_owned());
        }
        put(spec, "finalizers", finalizers);
    }
    put(object, "status", json!({"phase": "Active"}));
}

/// An update never touches what holds a namespace.
pub(crate) fn namespace_update(object: &mut Value, old: &Value) {
    fill(object, "spec", json!({}));
    if let Some(spec) = present(object, "spec") {
        keep_from(spec, old.at("spec"), "finalizers");
    }
}

/// Volumes and claims begin as Pending.
pub(crate) fn volume_create(object: &mut Value) {
    put(object, "status", json!({"phase": "Pending"}));
}

/// A workload's first status counts nothing; some counters are always written.
pub(crate) fn workload_create(object: &mut Value) {
    put(object, "status", json!({}));
    workload_counters(object);
}

/// Counters that a workload's status always has.
pub(crate) fn workload_counters(object: &mut Value) {
    let counters: &[&str] = match object.text("kind") {
        "ReplicaSet" | "ReplicationController" => &["replicas"],
        "StatefulSet" => &["replicas", "availableReplicas"],
        "DaemonSet" => &["currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady"],
        _ => &[],
    };
    if let Some(status) = present(object, "status") {
        for counter in counters {
            fill(status, counter, 0);
        }
    }
}

/// A job's pods are found by the job's uid, unless its author chose a selector.
pub(crate) fn job_create(object: &mut Value) {
    put(object, "status", json!({}));
    let (uid, name) = (object.at("metadata").text("uid").to_owned(), object.at("metadata").text("name").to_owned());
    let Some(spec) = present(object, "spec") else { return };
    if spec.flag("manualSelector") || uid.is_empty() {
        return;
    }
    let Some(labels) =
        section(spec, "template").map(|_| ()).and_then(|()| present(spec, "template")).and_then(|template| {
            fill(template, "metadata", json!({}));
            present(template, "metadata").and_then(|metadata| section(metadata, "labels"))
        })
    else {
        return;
    };
    for (key, value) in [("controller-uid", &uid), ("job-name", &name)] {
        labels.insert(key.to_owned(), Value::String(value.clone()));
        labels.insert(format!("batch.kubernetes.io/{key}"), Value::String(value.clone()));
    }
    fill(spec, "selector", json!({}));
    if let Some(labels) = present(spec, "selector").and_then(|selector| section(selector, "matchLabels")) {
        labels.insert("batch.kubernetes.io/controller-uid".to_owned(), Value::String(uid));
    }
}

/// A new Service: one address stands for the list of addresses; nothing balances yet.
pub(crate) fn service_create(object: &mut Value) {
    put(object, "status", json!({"loadBalancer": {}}));
    let Some(spec) = present(object, "spec") else { return };
    let ip = spec.text("clusterIP").to_owned();
    if !ip.is_empty() && spec.list("clusterIPs").is_empty() {
        put(spec, "clusterIPs", json!([ip]));
    }
}

fn needs_address(spec: &Value) -> bool {
    matches!(spec.text("type"), "ClusterIP" | "NodePort" | "LoadBalancer")
}

fn needs_node_ports(spec: &Value) -> bool {
    match spec.text("type") {
        "NodePort" => true,
        "LoadBalancer" => spec.at("allocateLoadBalancerNodePorts") != &Value::Bool(false),
        _ => false,
    }
}

fn needs_health_check(spec: &Value) -> bool {
    spec.text("type") == "LoadBalancer" && spec.text("externalTrafficPolicy") == "Local"
}

/// An update of a Service: what was allotted stays when the update leaves it out; what belonged to the old type goes with it.
pub(crate) fn service_update(object: &mut Value, old: &Value) {
    let before = old.at("spec");
    let Some(spec) = present(object, "spec") else { return };
    normalise_addresses(spec, before);
    if needs_address(before) && needs_address(spec) {
        if spec.text("clusterIP").is_empty() && spec.list("clusterIPs").is_empty() {
            keep_from(spec, before, "clusterIP");
            keep_from(spec, before, "clusterIPs");
        } else if spec.list("clusterIPs").is_empty() && spec.at("clusterIP") == before.at("clusterIP") {
            keep_from(spec, before, "clusterIPs");
        }
        for field in ["ipFamilyPolicy", "ipFamilies"] {
            if !spec.has(field) {
                keep_from(spec, before, field);
            }
        }
    }
    if needs_node_ports(before) && needs_node_ports(spec) {
        keep_node_ports(spec, before);
    }
    if needs_health_check(before) && needs_health_check(spec) && spec.int("healthCheckNodePort").unwrap_or(0) == 0 {
        keep_from(spec, before, "healthCheckNodePort");
    }
    drop_what_the_type_had(spec, before);
    if spec.text("type") != "LoadBalancer" {
        put(
            object,
            "status",
            match old.get("status") {
                Some(status) => without_balancer(status),
                None => json!({"loadBalancer": {}}),
            },
        );
    }
}

fn without_balancer(status: &Value) -> Value {
    let mut status = status.clone();
    put(&mut status, "loadBalancer", json!({}));
    status
}

/// The single address and the list say the same, also when the update changed only one of them.
fn normalise_addresses(spec: &mut Value, before: &Value) {
    let (ip, ips) = (spec.text("clusterIP").to_owned(), spec.list("clusterIPs").len());
    let same_list = spec.at("clusterIPs") == before.at("clusterIPs");
    if ip.is_empty() && !before.text("clusterIP").is_empty() && same_list {
        drop_field(spec, "clusterIPs");
    } else if !ip.is_empty()
        && (ips == 0 && before.text("clusterIP") != ip || (same_list && before.text("clusterIP") != ip))
    {
        put(spec, "clusterIPs", json!([ip]));
    }
}

fn keep_node_ports(spec: &mut Value, before: &Value) {
    let mut used: Vec<i64> = spec.list("ports").iter().filter_map(|port| port.int("nodePort")).collect();
    for port in items_mut(spec, "ports") {
        if port.int("nodePort").unwrap_or(0) != 0 {
            continue;
        }
        let twin = before.list("ports").iter().find(|old| old.text("name") == port.text("name"));
        if let Some(number) = twin.and_then(|twin| twin.int("nodePort")).filter(|number| !used.contains(number)) {
            put(port, "nodePort", number);
            used.push(number);
        }
    }
}

fn drop_what_the_type_had(spec: &mut Value, before: &Value) {
    if needs_address(before) && !needs_address(spec) {
        for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy", "internalTrafficPolicy"] {
            if spec.at(field) == before.at(field) {
                drop_field(spec, field);
            }
        }
    }
    if needs_node_ports(before) && !needs_node_ports(spec) {
        let old: Vec<Value> = before.list("ports").iter().map(|port| port.at("nodePort").clone()).collect();
        let same = spec.list("ports").len() == old.len()
            && spec.list("ports").iter().zip(&old).all(|(port, old)| port.at("nodePort") == old);
        if same {
            for port in items_mut(spec, "ports") {
                drop_field(port, "nodePort");
            }
        }
    }
    if needs_health_check(before)
        && !needs_health_check(spec)
        && spec.at("healthCheckNodePort") == before.at("healthCheckNodePort")
    {
        drop_field(spec, "healthCheckNodePort");
    }
    let left = |field: &str, spec: &Value| spec.at(field) == before.at(field);
    if before.text("type") == "LoadBalancer" && spec.text("type") != "LoadBalancer" {
        for field in ["allocateLoadBalancerNodePorts", "loadBalancerClass"] {
            if left(field, spec) {
                drop_field(spec, field);
            }
        }
    }
    let accessible = matches!(spec.text("type"), "NodePort" | "LoadBalancer")
        || (spec.text("type") == "ClusterIP" && !spec.list("externalIPs").is_empty());
    if !accessible && left("externalTrafficPolicy", spec) {
        drop_field(spec, "externalTrafficPolicy");
    }
}
