//! Defaults of pods and pod templates.

use serde_json::{Map, Value, json};

use crate::kinds::read::{Read, fill, fill_text, items_mut, pair, present, put, section};

/// Fills in a `Pod`.
pub(crate) fn pod(object: &mut Value) {
    if let Some(status) = present(object, "status") {
        pair(status, "podIP", "podIPs", |ip| json!({ "ip": ip }), |item| item.at("ip"));
    }
    let Some(spec) = present(object, "spec") else { return };
    pod_spec(spec);
    // Only pods, not templates: requests follow limits, links are on, host ports follow container ports.
    for list in ["containers", "initContainers"] {
        for container in items_mut(spec, list) {
            requests_from_limits(container);
        }
    }
    fill(spec, "enableServiceLinks", true);
    if spec.flag("hostNetwork") {
        host_ports(spec);
    }
}

/// Fills in a `PodTemplate` (the kind).
pub(crate) fn pod_template(object: &mut Value) {
    template(object);
}

/// Fills in the `template` of a workload's spec.
pub(super) fn template(owner: &mut Value) {
    let Some(template) = present(owner, "template") else { return };
    let Some(spec) = present(template, "spec") else { return };
    pod_spec(spec);
    if spec.flag("hostNetwork") {
        host_ports(spec);
    }
}

fn pod_spec(spec: &mut Value) {
    fill_text(spec, "dnsPolicy", "ClusterFirst");
    fill_text(spec, "restartPolicy", "Always");
    fill(spec, "securityContext", json!({}));
    fill(spec, "terminationGracePeriodSeconds", 30);
    fill_text(spec, "schedulerName", "default-scheduler");
    if let Some(old) = spec.get("serviceAccount").and_then(Value::as_str).map(str::to_owned) {
        fill_text(spec, "serviceAccountName", &old);
    }
    if !spec.text("serviceAccountName").is_empty() {
        let name = spec.text("serviceAccountName").to_owned();
        put(spec, "serviceAccount", name);
    }
    for list in ["initContainers", "containers", "ephemeralContainers"] {
        for container in items_mut(spec, list) {
            self::container(container);
        }
    }
    for volume in items_mut(spec, "volumes") {
        self::volume(volume);
    }
    if let Some(overhead) = present(spec, "overhead") {
        super::config::round_up(overhead);
    }
}

fn host_ports(spec: &mut Value) {
    for list in ["containers", "initContainers"] {
        for container in items_mut(spec, list) {
            for port in items_mut(container, "ports") {
                if let Some(number) = port.int("containerPort").filter(|_| port.int("hostPort").unwrap_or(0) == 0) {
                    put(port, "hostPort", number);
                }
            }
        }
    }
}

fn requests_from_limits(container: &mut Value) {
    let limits: Map<String, Value> = container.deep(&["resources", "limits"]).as_object().cloned().unwrap_or_default();
    if limits.is_empty() {
        return;
    }
    let Some(resources) = present(container, "resources") else { return };
    let Some(requests) = section(resources, "requests") else { return };
    for (name, value) in limits {
        requests.entry(name).or_insert(value);
    }
}

/// The pull policy that an image's tag implies.
fn pull_policy(image: &str) -> &'static str {
    let (name, digest) = image.split_once('@').map_or((image, false), |(name, _)| (name, true));
    let last = name.rsplit('/').next().unwrap_or_default();
    match last.split_once(':') {
        Some((_, "latest")) => "Always",
        None if !digest => "Always",
        _ => "IfNotPresent",
    }
}

fn container(container: &mut Value) {
    let policy = pull_policy(container.text("image"));
    fill_text(container, "imagePullPolicy", policy);
    fill_text(container, "terminationMessagePath", "/dev/termination-log");
    fill_text(container, "terminationMessagePolicy", "File");
    fill(container, "resources", json!({}));
    for port in items_mut(container, "ports") {
        fill_text(port, "protocol", "TCP");
    }
    for variable in items_mut(container, "env") {
        if let Some(field) = present(variable, "valueFrom").and_then(|from| present(from, "fieldRef")) {
            fill_text(field, "apiVersion", "v1");
        }
        if let Some(field) = present(variable, "valueFrom").and_then(|from| present(from, "resourceFieldRef")) {
            fill(field, "divisor", "0");
        }
    }
    if let Some(resources) = present(container, "resources") {
        for list in ["limits", "requests"] {
            if let Some(list) = present(resources, list) {
                super::config::round_up(list);
            }
        }
    }
    for name in ["livenessProbe", "readinessProbe", "startupProbe"] {
        if let Some(probe) = present(container, name) {
            self::probe(probe);
        }
    }
    if let Some(lifecycle) = present(container, "lifecycle") {
        for name in ["postStart", "preStop"] {
            if let Some(get) = present(lifecycle, name).and_then(|handler| present(handler, "httpGet")) {
                http_get(get);
            }
        }
    }
    if let Some(security) = present(container, "securityContext")
        && security.has("procMount")
        && security.text("procMount").is_empty()
    {
        put(security, "procMount", "Default");
    }
}

fn fill_number(object: &mut Value, key: &str, value: i64) {
    if object.int(key).unwrap_or(0) == 0 {
        put(object, key, value);
    }
}

fn probe(probe: &mut Value) {
    fill_number(probe, "timeoutSeconds", 1);
    fill_number(probe, "periodSeconds", 10);
    fill_number(probe, "successThreshold", 1);
    fill_number(probe, "failureThreshold", 3);
    if let Some(get) = present(probe, "httpGet") {
        http_get(get);
    }
    if let Some(grpc) = present(probe, "grpc") {
        fill(grpc, "service", "");
    }
}

fn http_get(get: &mut Value) {
    fill_text(get, "path", "/");
    fill_text(get, "scheme", "HTTP");
}

fn downward_items(source: &mut Value) {
    for item in items_mut(source, "items") {
        if let Some(field) = present(item, "fieldRef") {
            fill_text(field, "apiVersion", "v1");
        }
        if let Some(field) = present(item, "resourceFieldRef") {
            fill(field, "divisor", "0");
        }
    }
}

fn volume(volume: &mut Value) {
    if volume.as_object().is_some_and(|fields| fields.iter().all(|(name, value)| name == "name" || value.is_null())) {
        put(volume, "emptyDir", json!({}));
    }
    for name in ["secret", "configMap", "downwardAPI", "projected"] {
        if let Some(source) = present(volume, name) {
            fill(source, "defaultMode", 0o644);
        }
    }
    if let Some(source) = present(volume, "hostPath") {
        fill(source, "type", "");
    }
    if let Some(image) = present(volume, "image") {
        let policy = pull_policy(image.text("reference"));
        fill_text(image, "pullPolicy", policy);
    }
    if let Some(source) = present(volume, "iscsi") {
        fill_text(source, "iscsiInterface", "default");
    }
    if let Some(source) = present(volume, "rbd") {
        fill_text(source, "pool", "rbd");
        fill_text(source, "user", "admin");
        fill_text(source, "keyring", "/etc/ceph/keyring");
    }
    if let Some(source) = present(volume, "downwardAPI") {
        downward_items(source);
    }
    if let Some(projected) = present(volume, "projected") {
        for source in items_mut(projected, "sources") {
            if let Some(token) = present(source, "serviceAccountToken") {
                fill(token, "expirationSeconds", 3600);
            }
            if let Some(downward) = present(source, "downwardAPI") {
                downward_items(downward);
            }
        }
    }
    if let Some(claim) = present(volume, "ephemeral").and_then(|source| present(source, "volumeClaimTemplate"))
        && let Some(spec) = present(claim, "spec")
    {
        fill(spec, "volumeMode", "Filesystem");
    }
}
