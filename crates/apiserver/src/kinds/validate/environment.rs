//! Validation of a container's environment and of references to fields and resources of its pod.

use serde_json::Value;

use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::read::Read;

/// Checks `env`.
pub(super) fn env(container: &Value, path: &Path, faults: &mut Faults) {
    for (index, variable) in container.list("env").iter().enumerate() {
        let here = path.index(index);
        let name = variable.text("name");
        if name.is_empty() {
            faults.required(&here.child("name"), "");
        } else {
            faults.invalid_each(&here.child("name"), name, format::env_name(name));
        }
        if variable.has("valueFrom") {
            value_from(variable, &here.child("valueFrom"), faults);
        }
    }
}

fn value_from(variable: &Value, path: &Path, faults: &mut Faults) {
    let from = variable.at("valueFrom");
    let mut sources = 0;
    if from.has("fieldRef") {
        sources += 1;
        const FIELDS: &[&str] = &[
            "metadata.name",
            "metadata.namespace",
            "metadata.uid",
            "spec.nodeName",
            "spec.serviceAccountName",
            "status.hostIP",
            "status.hostIPs",
            "status.podIP",
            "status.podIPs",
        ];
        field_ref(from.at("fieldRef"), FIELDS, &path.child("fieldRef"), faults);
    }
    if from.has("resourceFieldRef") {
        sources += 1;
        resource_ref(from.at("resourceFieldRef"), false, &path.child("resourceFieldRef"), faults);
    }
    for kind in ["configMapKeyRef", "secretKeyRef"] {
        if from.has(kind) {
            sources += 1;
            key_ref(from.at(kind), &path.child(kind), faults);
        }
    }
    if from.has("fileKeyRef") {
        sources += 1;
        for field in ["key", "volumeName", "path"] {
            if from.at("fileKeyRef").text(field).is_empty() {
                faults.required(&path.child("fileKeyRef").child(field), "");
            }
        }
    }
    if sources == 0 {
        let detail =
            "must specify one of: `fieldRef`, `resourceFieldRef`, `configMapKeyRef`, `secretKeyRef` or `fileKeyRef`";
        faults.invalid(path, "", detail);
    } else if !variable.text("value").is_empty() {
        faults.invalid(path, "", "may not be specified when `value` is not empty");
    } else if sources > 1 {
        faults.invalid(path, "", "may not have more than one field specified at a time");
    }
}

/// Checks a `fieldRef` that may name one of `fields`, a label or an annotation.
pub(super) fn field_ref(reference: &Value, fields: &[&str], path: &Path, faults: &mut Faults) {
    let field = reference.text("fieldPath");
    if reference.text("apiVersion").is_empty() {
        faults.required(&path.child("apiVersion"), "");
        return;
    }
    if field.is_empty() {
        faults.required(&path.child("fieldPath"), "");
        return;
    }
    if let Some((name, key)) = field.strip_suffix("']").and_then(|start| start.split_once("['")) {
        match name {
            "metadata.annotations" => {
                faults.invalid_each(path, &key.to_lowercase(), format::label_key(&key.to_lowercase()))
            }
            "metadata.labels" => faults.invalid_each(path, key, format::label_key(key)),
            other => faults.invalid(path, other, "does not support subscript"),
        }
        return;
    }
    const CONVERTIBLE: &[&str] = &[
        "metadata.annotations",
        "metadata.labels",
        "metadata.name",
        "metadata.namespace",
        "metadata.uid",
        "spec.nodeName",
        "spec.restartPolicy",
        "spec.serviceAccountName",
        "spec.schedulerName",
        "status.phase",
        "status.hostIP",
        "status.hostIPs",
        "status.podIP",
        "status.podIPs",
    ];
    if !CONVERTIBLE.contains(&field) {
        faults.invalid(
            &path.child("fieldPath"),
            field,
            &format!("error converting fieldPath: field label not supported: {field}"),
        );
    } else if !fields.contains(&field) {
        faults.unsupported(&path.child("fieldPath"), field, fields);
    }
}

/// Checks a `resourceFieldRef`.
pub(super) fn resource_ref(reference: &Value, volume: bool, path: &Path, faults: &mut Faults) {
    const RESOURCES: &[&str] = &[
        "limits.cpu",
        "limits.ephemeral-storage",
        "limits.memory",
        "requests.cpu",
        "requests.ephemeral-storage",
        "requests.memory",
    ];
    let resource = reference.text("resource");
    if volume && reference.text("containerName").is_empty() {
        faults.required(&path.child("containerName"), "");
    } else if resource.is_empty() {
        faults.required(&path.child("resource"), "");
    } else if !RESOURCES.contains(&resource)
        && !resource.starts_with("limits.hugepages-")
        && !resource.starts_with("requests.hugepages-")
    {
        faults.unsupported(&path.child("resource"), resource, RESOURCES);
    }
    let divisor = reference.text("divisor");
    if divisor.is_empty() || divisor == "0" {
        return;
    }
    const SIZES: &[&str] = &["1", "1k", "1M", "1G", "1T", "1P", "1E", "1Ki", "1Mi", "1Gi", "1Ti", "1Pi", "1Ei"];
    let what = match resource.split_once('.').map(|(_, name)| name) {
        Some("cpu") if !["1m", "1"].contains(&divisor) => {
            faults.invalid(
                &path.child("divisor"),
                resource,
                "only divisor's values 1m and 1 are supported with the cpu resource",
            );
            return;
        }
        Some("memory") => "memory",
        Some("ephemeral-storage") => "local ephemeral storage",
        Some(name) if name.starts_with("hugepages-") => "hugepages",
        _ => return,
    };
    if !SIZES.contains(&divisor) {
        let detail = format!("only divisor's values {} are supported with the {what} resource", SIZES.join(", "));
        faults.invalid(&path.child("divisor"), resource, &detail);
    }
}

fn key_ref(reference: &Value, path: &Path, faults: &mut Faults) {
    let (name, key) = (reference.text("name"), reference.text("key"));
    faults.invalid_each(&path.child("name"), name, format::dns_subdomain(name));
    if key.is_empty() {
        faults.required(&path.child("key"), "");
    } else {
        faults.invalid_each(&path.child("key"), key, format::config_key(key));
    }
}

/// Checks `envFrom`.
pub(super) fn env_from(container: &Value, path: &Path, faults: &mut Faults) {
    for (index, source) in container.list("envFrom").iter().enumerate() {
        let here = path.index(index);
        let prefix = source.text("prefix");
        if !prefix.is_empty() {
            faults.invalid_each(&here.child("prefix"), prefix, format::env_name(prefix));
        }
        let mut sources = 0;
        for kind in ["configMapRef", "secretRef"] {
            if !source.has(kind) {
                continue;
            }
            sources += 1;
            let name = source.at(kind).text("name");
            let path = here.child(kind).child("name");
            if name.is_empty() {
                faults.required(&path, "");
            } else {
                faults.invalid_each(&path, name, crate::kinds::metadata::NameRule::Subdomain.check(name, true));
            }
        }
        match sources {
            0 => faults.invalid(path, "", "must specify one of: `configMapRef` or `secretRef`"),
            1 => {}
            _ => faults.invalid(path, "", "may not have more than one field specified at a time"),
        }
    }
}
