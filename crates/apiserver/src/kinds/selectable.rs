//! Fields that field selectors may name, beyond the name and namespace that all kinds have.

use serde_json::Value;

use super::read::Read;

fn value(object: &Value, keys: &[&str]) -> Option<String> {
    Some(match object.deep(keys) {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    })
}

/// `spec.nodeName`, `status.phase` and the like of a pod.
pub(crate) fn pod(path: &str, object: &Value) -> Option<String> {
    match path {
        "spec.hostNetwork" => Some(object.at("spec").flag("hostNetwork").to_string()),
        "spec.nodeName"
        | "spec.restartPolicy"
        | "spec.schedulerName"
        | "spec.serviceAccountName"
        | "status.phase"
        | "status.podIP"
        | "status.nominatedNodeName" => value(object, &path.split('.').collect::<Vec<_>>()),
        _ => None,
    }
}

/// What an event is about, its reason and type.
pub(crate) fn event(path: &str, object: &Value) -> Option<String> {
    if let Some(field) = path.strip_prefix("involvedObject.").or_else(|| path.strip_prefix("regarding.")) {
        const FIELDS: &[&str] = &["kind", "namespace", "name", "uid", "apiVersion", "resourceVersion", "fieldPath"];
        let about = if object.has("regarding") { "regarding" } else { "involvedObject" };
        return if FIELDS.contains(&field) { value(object, &[about, field]) } else { None };
    }
    match path {
        "reason" | "type" => value(object, &[path]),
        "reportingComponent" | "reportingController" => {
            let found = object.text("reportingComponent");
            Some(if found.is_empty() { object.text("reportingController") } else { found }.to_owned())
        }
        "source" => {
            let found = object.at("source").text("component");
            Some(if found.is_empty() { object.text("reportingComponent") } else { found }.to_owned())
        }
        _ => None,
    }
}

/// Whether a node takes new pods.
pub(crate) fn node(path: &str, object: &Value) -> Option<String> {
    (path == "spec.unschedulable").then(|| object.at("spec").flag("unschedulable").to_string())
}

/// A namespace's phase.
pub(crate) fn namespace(path: &str, object: &Value) -> Option<String> {
    if path == "status.phase" { value(object, &["status", "phase"]) } else { None }
}

/// A secret's type.
pub(crate) fn secret(path: &str, object: &Value) -> Option<String> {
    if path == "type" { value(object, &["type"]) } else { None }
}

/// A service's address and type.
pub(crate) fn service(path: &str, object: &Value) -> Option<String> {
    match path {
        "spec.clusterIP" => value(object, &["spec", "clusterIP"]),
        "spec.type" => value(object, &["spec", "type"]),
        _ => None,
    }
}

/// How many replicas there are.
pub(crate) fn replicas(path: &str, object: &Value) -> Option<String> {
    (path == "status.replicas").then(|| object.at("status").int("replicas").unwrap_or(0).to_string())
}

/// How many pods of a job succeeded.
pub(crate) fn job(path: &str, object: &Value) -> Option<String> {
    (path == "status.successful").then(|| object.at("status").int("succeeded").unwrap_or(0).to_string())
}

/// Who signs a certificate request.
pub(crate) fn signing_request(path: &str, object: &Value) -> Option<String> {
    if path == "spec.signerName" { value(object, &["spec", "signerName"]) } else { None }
}

/// What an address belongs to.
pub(crate) fn ip_address(path: &str, object: &Value) -> Option<String> {
    let field = path.strip_prefix("spec.parentRef.")?;
    if ["group", "resource", "namespace", "name"].contains(&field) {
        value(object, &["spec", "parentRef", field])
    } else {
        None
    }
}
