//! Defaults of the remaining kinds.

use serde_json::{Map, Value, json};

use crate::kinds::read::{Read, fill, fill_text, items_mut, pair, present, put, section};

/// Resource quantities finer than a thousandth are rounded up to it, as the API server does.
pub(crate) fn round_up(list: &mut Value) {
    for (_, value) in list.as_object_mut().into_iter().flatten() {
        if let Some(rounded) = value.as_str().and_then(crate::kinds::quantity::round_up_to_milli) {
            *value = Value::String(rounded);
        }
    }
}

/// Rounds the quantities of `limits` and `requests`-like maps at the top of a spec.
pub(crate) fn resource_list(object: &mut Value) {
    if let Some(hard) = present(object, "spec").and_then(|spec| present(spec, "hard")) {
        round_up(hard);
    }
}

/// Fills in a `Namespace`.
pub(crate) fn namespace(object: &mut Value) {
    if let Some(metadata) = present(object, "metadata") {
        let name = metadata.text("name").to_owned();
        if !name.is_empty()
            && let Some(labels) = section(metadata, "labels")
        {
            labels.insert("kubernetes.io/metadata.name".to_owned(), Value::String(name));
        }
    }
    fill(object, "spec", json!({}));
    let deleting = object.deep(&["metadata", "deletionTimestamp"]).is_string();
    if let Some(spec) = present(object, "spec")
        && !deleting
        && spec.list("finalizers").is_empty()
    {
        put(spec, "finalizers", json!(["kubernetes"]));
    }
    fill(object, "status", json!({}));
    if let Some(status) = present(object, "status") {
        fill_text(status, "phase", "Active");
    }
}

/// Fills in a `Node`: what it can allocate follows its capacity.
pub(crate) fn node(object: &mut Value) {
    if let Some(spec) = present(object, "spec") {
        pair(spec, "podCIDR", "podCIDRs", |cidr| cidr, |item| item);
    }
    let Some(status) = present(object, "status") else { return };
    let capacity = status.at("capacity").clone();
    if !capacity.is_blank() {
        fill(status, "allocatable", capacity);
    }
    for list in ["capacity", "allocatable"] {
        if let Some(list) = present(status, list) {
            round_up(list);
        }
    }
}

/// Fills in a `Secret`: `stringData` is written into `data`.
pub(crate) fn secret(object: &mut Value) {
    use base64::Engine;
    fill_text(object, "type", "Opaque");
    let Some(Value::Object(texts)) = crate::kinds::read::drop_field(object, "stringData") else { return };
    if let Some(data) = section(object, "data") {
        for (key, text) in texts {
            let encoded = base64::engine::general_purpose::STANDARD.encode(text.as_str().unwrap_or_default());
            data.insert(key, Value::String(encoded));
        }
    }
}

/// Fills in a `PersistentVolume`.
pub(crate) fn persistent_volume(object: &mut Value) {
    if let Some(spec) = present(object, "spec") {
        fill_text(spec, "persistentVolumeReclaimPolicy", "Retain");
        fill(spec, "volumeMode", "Filesystem");
        if let Some(path) = present(spec, "hostPath") {
            fill(path, "type", "");
        }
        if let Some(claim) = present(spec, "claimRef") {
            fill(claim, "kind", "PersistentVolumeClaim");
            fill(claim, "apiVersion", "v1");
        }
    }
    fill(object, "status", json!({}));
    if let Some(status) = present(object, "status") {
        fill_text(status, "phase", "Pending");
    }
}

/// Fills in a `PersistentVolumeClaim`.
pub(crate) fn persistent_volume_claim(object: &mut Value) {
    if let Some(spec) = present(object, "spec") {
        fill(spec, "volumeMode", "Filesystem");
        fill(spec, "resources", json!({}));
    }
    fill(object, "status", json!({}));
    if let Some(status) = present(object, "status") {
        fill_text(status, "phase", "Pending");
    }
}

/// Fills in a `LimitRange`.
pub(crate) fn limit_range(object: &mut Value) {
    let Some(spec) = present(object, "spec") else { return };
    for item in items_mut(spec, "limits") {
        if item.text("type") != "Container" {
            continue;
        }
        let map =
            |item: &Value, name: &str| -> Map<String, Value> { item.at(name).as_object().cloned().unwrap_or_default() };
        let mut default = map(item, "default");
        let mut request = map(item, "defaultRequest");
        for (name, value) in map(item, "max") {
            default.entry(name).or_insert(value);
        }
        for (name, value) in default.iter().map(|(name, value)| (name.clone(), value.clone())).chain(map(item, "min")) {
            request.entry(name).or_insert(value);
        }
        for (name, values) in [("default", default), ("defaultRequest", request)] {
            if !values.is_empty() {
                put(item, name, Value::Object(values));
            }
        }
    }
}

/// Fills in a `RoleBinding` or `ClusterRoleBinding`.
pub(crate) fn cluster_role_binding(object: &mut Value) {
    const GROUP: &str = "rbac.authorization.k8s.io";
    if let Some(role) = present(object, "roleRef") {
        fill_text(role, "apiGroup", GROUP);
    }
    for subject in items_mut(object, "subjects") {
        if matches!(subject.text("kind"), "User" | "Group") {
            fill_text(subject, "apiGroup", GROUP);
        }
    }
}

/// Fills in a `StorageClass`.
pub(crate) fn storage_class(object: &mut Value) {
    fill(object, "reclaimPolicy", "Delete");
    fill(object, "volumeBindingMode", "Immediate");
}

/// Fills in a `CSIDriver`.
pub(crate) fn csi_driver(object: &mut Value) {
    fill(object, "spec", json!({}));
    let Some(spec) = present(object, "spec") else { return };
    fill(spec, "attachRequired", true);
    for name in ["podInfoOnMount", "storageCapacity", "requiresRepublish", "seLinuxMount"] {
        fill(spec, name, false);
    }
    fill(spec, "fsGroupPolicy", "ReadWriteOnceWithFSType");
    if spec.list("volumeLifecycleModes").is_empty() {
        put(spec, "volumeLifecycleModes", json!(["Persistent"]));
    }
}

/// Fills in a `PriorityClass`.
pub(crate) fn priority_class(object: &mut Value) {
    fill(object, "preemptionPolicy", "PreemptLowerPriority");
}

/// Fills in a `HorizontalPodAutoscaler`.
pub(crate) fn horizontal_pod_autoscaler(object: &mut Value) {
    let Some(spec) = present(object, "spec") else { return };
    fill(spec, "minReplicas", 1);
    if spec.list("metrics").is_empty() {
        let target = json!({"type": "Utilization", "averageUtilization": 80});
        put(spec, "metrics", json!([{"type": "Resource", "resource": {"name": "cpu", "target": target}}]));
    }
    let Some(behavior) = present(spec, "behavior") else { return };
    let percent = json!({"type": "Percent", "value": 100, "periodSeconds": 15});
    let pods = json!({"type": "Pods", "value": 4, "periodSeconds": 15});
    for (name, policies) in [("scaleUp", json!([pods, percent])), ("scaleDown", json!([percent]))] {
        fill(behavior, name, json!({}));
        if let Some(rules) = present(behavior, name) {
            fill(rules, "selectPolicy", "Max");
            fill(rules, "policies", policies);
            if name == "scaleUp" {
                fill(rules, "stabilizationWindowSeconds", 0);
            }
        }
    }
}

/// Fills in a `CustomResourceDefinition`: names follow the kind, conversion is none.
pub(crate) fn custom_resource_definition(object: &mut Value) {
    let Some(spec) = present(object, "spec") else { return };
    if let Some(names) = present(spec, "names") {
        let kind = names.text("kind").to_owned();
        fill_text(names, "singular", &kind.to_lowercase());
        if !kind.is_empty() {
            fill_text(names, "listKind", &format!("{kind}List"));
        }
    }
    fill(spec, "conversion", json!({"strategy": "None"}));
    for version in items_mut(spec, "versions") {
        fill(version, "served", false);
        fill(version, "storage", false);
    }
}

/// Fills in a `MutatingWebhookConfiguration` or `ValidatingWebhookConfiguration`.
pub(crate) fn webhook_configuration(object: &mut Value) {
    let mutating = object.text("kind") == "MutatingWebhookConfiguration";
    for webhook in items_mut(object, "webhooks") {
        fill(webhook, "failurePolicy", "Fail");
        fill(webhook, "matchPolicy", "Equivalent");
        fill(webhook, "namespaceSelector", json!({}));
        fill(webhook, "objectSelector", json!({}));
        fill(webhook, "timeoutSeconds", 10);
        if mutating {
            fill(webhook, "reinvocationPolicy", "Never");
        }
        for rule in items_mut(webhook, "rules") {
            fill(rule, "scope", "*");
        }
        if let Some(service) = present(webhook, "clientConfig").and_then(|config| present(config, "service")) {
            fill(service, "port", 443);
        }
    }
}
