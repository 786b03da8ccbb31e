//! Validation of ConfigMaps, Secrets, Leases, quotas and classes.

use serde_json::Value;

use super::container::resource_value;
use super::not_negative;
use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::{immutable, same};
use crate::kinds::read::Read;

/// The most that the values of one ConfigMap or Secret may hold, in bytes.
const MOST: usize = 1024 * 1024;

/// Bytes behind a base64 text.
fn decoded_length(text: &str) -> usize {
    let padding = text.bytes().rev().take_while(|b| *b == b'=').count();
    (text.len() / 4).saturating_mul(3).saturating_sub(padding)
}

fn decoded(text: &str) -> Vec<u8> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.decode(text).unwrap_or_default()
}

/// Checks a `ConfigMap`.
pub(crate) fn config_map(object: &Value, faults: &mut Faults) {
    let mut size = 0usize;
    let (data, binary) = (Path::new("data"), Path::new("binaryData"));
    for (key, value) in object.entries("data") {
        faults.invalid_each(&data.key(key), key, format::config_key(key));
        if object.at("binaryData").get(key).is_some() {
            faults.invalid(&data.key(key), key, "duplicate of key present in binaryData");
        }
        size = size.saturating_add(value.as_str().map_or(0, str::len));
    }
    for (key, value) in object.entries("binaryData") {
        faults.invalid_each(&binary.key(key), key, format::config_key(key));
        size = size.saturating_add(value.as_str().map_or(0, decoded_length));
    }
    if size > MOST {
        faults.too_long(&Path::root(), MOST);
    }
}

fn frozen(object: &Value, old: &Value, fields: &[&str], faults: &mut Faults) {
    const DETAIL: &str = "field is immutable when `immutable` is set";
    if !old.flag("immutable") {
        return;
    }
    if !object.flag("immutable") {
        faults.forbidden(&Path::new("immutable"), DETAIL);
    }
    for field in fields.iter().filter(|field| !same(object.at(field), old.at(field))) {
        faults.forbidden(&Path::new(field), DETAIL);
    }
}

/// An immutable `ConfigMap` does not change.
pub(crate) fn config_map_update(object: &Value, old: &Value, faults: &mut Faults) {
    frozen(object, old, &["data", "binaryData"], faults);
}

/// Checks a `Secret`.
pub(crate) fn secret(object: &Value, faults: &mut Faults) {
    let path = Path::new("data");
    let data = object.at("data");
    let mut size = 0usize;
    for (key, value) in object.entries("data") {
        faults.invalid_each(&path.key(key), key, format::config_key(key));
        size = size.saturating_add(value.as_str().map_or(0, decoded_length));
    }
    if size > MOST {
        faults.too_long(&path, MOST);
    }
    let mut needs = |keys: &[&str]| {
        for key in keys.iter().filter(|key| !data.has(key)) {
            faults.required(&path.key(key), "");
        }
    };
    match object.text("type") {
        "kubernetes.io/service-account-token" => {
            const KEY: &str = "kubernetes.io/service-account.name";
            if object.deep(&["metadata", "annotations", KEY]).is_blank() {
                faults.required(&Path::new("metadata").child("annotations").key(KEY), "");
            }
        }
        kind @ ("kubernetes.io/dockercfg" | "kubernetes.io/dockerconfigjson") => {
            let key = if kind.ends_with("json") { ".dockerconfigjson" } else { ".dockercfg" };
            needs(&[key]);
            if data.has(key)
                && let Err(error) = serde_json::from_slice::<serde_json::Map<String, Value>>(&decoded(data.text(key)))
            {
                faults.invalid(&path.key(key), "<secret contents redacted>", &error.to_string());
            }
        }
        "kubernetes.io/basic-auth" if !data.has("username") && !data.has("password") => {
            needs(&["username", "password"])
        }
        "kubernetes.io/ssh-auth" if data.text("ssh-privatekey").is_empty() => {
            faults.required(&path.key("ssh-privatekey"), "")
        }
        "kubernetes.io/tls" => needs(&["tls.crt", "tls.key"]),
        _ => {}
    }
}

/// The type of a `Secret` never changes, an immutable one not at all.
pub(crate) fn secret_update(object: &Value, old: &Value, faults: &mut Faults) {
    immutable(object.at("type"), old.at("type"), &Path::new("type"), faults);
    frozen(object, old, &["data"], faults);
}

/// Checks a `Lease`.
pub(crate) fn lease(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    if let Some(seconds) = spec.int("leaseDurationSeconds").filter(|seconds| *seconds <= 0) {
        faults.invalid(&path.child("leaseDurationSeconds"), seconds, "must be greater than 0");
    }
    not_negative(spec, "leaseTransitions", &path, faults);
    if spec.has("holderIdentity") && spec.text("holderIdentity").is_empty() {
        faults.invalid(&path.child("holderIdentity"), "", "must not be empty");
    }
    let strategy = spec.text("strategy");
    if spec.has("strategy") && strategy.is_empty() {
        faults.invalid(&path.child("strategy"), strategy, "must not be empty");
    }
}

/// Checks a `ResourceQuota`.
pub(crate) fn resource_quota(object: &Value, faults: &mut Faults) {
    let path = Path::new("spec").child("hard");
    for (name, value) in object.at("spec").entries("hard") {
        faults.invalid_each(&path.key(name), name, format::label_key(name));
        resource_value(name, value, &path.key(name), faults);
    }
}

/// Checks a `LimitRange`.
pub(crate) fn limit_range(object: &Value, faults: &mut Faults) {
    for (index, limit) in object.at("spec").list("limits").iter().enumerate() {
        let here = Path::new("spec").child("limits").index(index);
        let kind = limit.text("type");
        faults.invalid_each(&here.child("type"), kind, format::label_key(kind));
        for field in ["max", "min", "default", "defaultRequest", "maxLimitRequestRatio"] {
            for (name, value) in limit.entries(field) {
                resource_value(name, value, &here.child(field).key(name), faults);
            }
        }
        let number = |field: &str, name: &str| super::container::quantity(limit.at(field).at(name));
        let text = |field: &str, name: &str| limit.at(field).text(name).to_owned();
        for (name, _) in limit.entries("min") {
            if let (Some(least), Some(most)) = (number("min", name), number("max", name))
                && least > most
            {
                let detail = format!("min value {} is greater than max value {}", text("min", name), text("max", name));
                faults.invalid(&here.child("min").key(name), text("min", name).as_str(), &detail);
            }
        }
        for (name, _) in limit.entries("default") {
            if let (Some(default), Some(most)) = (number("default", name), number("max", name))
                && default > most
            {
                let detail =
                    format!("default value {} is greater than max value {}", text("default", name), text("max", name));
                faults.invalid(&here.child("default").key(name), text("default", name).as_str(), &detail);
            }
        }
    }
}

/// Checks a `PriorityClass`.
pub(crate) fn priority_class(object: &Value, faults: &mut Faults) {
    const HIGHEST: i64 = 1_000_000_000;
    let name = object.deep(&["metadata", "name"]).as_str().unwrap_or_default();
    let value = object.int("value").unwrap_or(0);
    if name.starts_with("system-") {
        let known = matches!(
            (name, value),
            ("system-cluster-critical", 2_000_000_000) | ("system-node-critical", 2_000_001_000)
        );
        if !known {
            let detail =
                "priority class names with 'system-' prefix are reserved for system use only. error: ".to_owned();
            faults.forbidden(
                &Path::new("metadata").child("name"),
                &format!("{detail}{name} is not a known system priority class"),
            );
        }
    } else if value > HIGHEST {
        faults
            .forbidden(&Path::new("value"), &format!("maximum allowed value of a user defined priority is {HIGHEST}"));
    }
    let policy = object.text("preemptionPolicy");
    if object.has("preemptionPolicy") && !["PreemptLowerPriority", "Never"].contains(&policy) {
        faults.unsupported(&Path::new("preemptionPolicy"), policy, &["PreemptLowerPriority", "Never"]);
    }
}

/// The value of a `PriorityClass` never changes.
pub(crate) fn priority_class_update(object: &Value, old: &Value, faults: &mut Faults) {
    if object.at("value") != old.at("value") {
        faults.forbidden(&Path::new("value"), "may not be changed in an update.");
    }
    immutable(object.at("preemptionPolicy"), old.at("preemptionPolicy"), &Path::new("preemptionPolicy"), faults);
}

/// Checks a `StorageClass`.
pub(crate) fn storage_class(object: &Value, faults: &mut Faults) {
    let path = Path::new("provisioner");
    let provisioner = object.text("provisioner");
    if provisioner.is_empty() {
        faults.required(&path, "");
    } else {
        faults.invalid_each(&path, provisioner, format::label_key(&provisioner.to_lowercase()));
    }
    for (field, values) in
        [("reclaimPolicy", &["Delete", "Retain"]), ("volumeBindingMode", &["Immediate", "WaitForFirstConsumer"])]
    {
        if object.has(field) && !values.contains(&object.text(field)) {
            faults.unsupported(&Path::new(field), object.text(field), values);
        }
    }
}

/// What a `StorageClass` provides never changes.
pub(crate) fn storage_class_update(object: &Value, old: &Value, faults: &mut Faults) {
    if !same(object.at("parameters"), old.at("parameters")) {
        faults.forbidden(&Path::new("parameters"), "updates to parameters are forbidden.");
    }
    if object.at("provisioner") != old.at("provisioner") {
        faults.forbidden(&Path::new("provisioner"), "updates to provisioner are forbidden.");
    }
    if object.at("reclaimPolicy") != old.at("reclaimPolicy") {
        faults.forbidden(&Path::new("reclaimPolicy"), "updates to reclaimPolicy are forbidden.");
    }
    immutable(object.at("volumeBindingMode"), old.at("volumeBindingMode"), &Path::new("volumeBindingMode"), faults);
}
