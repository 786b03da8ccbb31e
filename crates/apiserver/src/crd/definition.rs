//! One `CustomResourceDefinition`: its checks, its conditions, the resources it makes.

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::strategy::CustomStrategy;
use crate::meta;
use crate::registry::version_rank;
use crate::resource::{FieldError, GroupVersionKind, ResourceKind, ScalePaths};

fn versions(definition: &Value) -> impl Iterator<Item = &Value> {
    definition.pointer("/spec/versions").and_then(Value::as_array).into_iter().flatten()
}

/// One version by name.
pub(super) fn version<'a>(definition: &'a Value, name: &str) -> Option<&'a Value> {
    versions(definition).find(|version| meta::text(version, "/name") == name)
}

fn is_true(value: Option<&Value>) -> bool {
    value.and_then(Value::as_bool).unwrap_or(false)
}

fn error(reason: &'static str, field: impl Into<String>, message: impl Into<String>) -> FieldError {
    FieldError { reason, field: field.into(), message: message.into() }
}

fn required(field: impl Into<String>, detail: &str) -> FieldError {
    let message = if detail.is_empty() { "Required value".to_owned() } else { format!("Required value: {detail}") };
    error("FieldValueRequired", field, message)
}

/// What is wrong with a definition.
pub(super) fn check(definition: &Value, is_builtin: impl Fn(&str) -> bool) -> Vec<FieldError> {
    let mut errors = Vec::new();
    let group = meta::text(definition, "/spec/group");
    let plural = meta::text(definition, "/spec/names/plural");
    for (field, value) in [
        ("spec.group", group),
        ("spec.names.plural", plural),
        ("spec.names.kind", meta::text(definition, "/spec/names/kind")),
    ] {
        if value.is_empty() {
            errors.push(required(field, ""));
        }
    }
    let expected = format!("{plural}.{group}");
    let name = meta::name(definition);
    if name != expected {
        let message = format!("Invalid value: {name:?}: must be spec.names.plural+\".\"+spec.group");
        errors.push(error("FieldValueInvalid", "metadata.name", message));
    }
    if is_builtin(group) {
        let message = format!("Invalid value: {group:?}: the group belongs to built-in resources of this API server");
        errors.push(error("FieldValueInvalid", "spec.group", message));
    }
    let scope = meta::text(definition, "/spec/scope");
    if !matches!(scope, "Namespaced" | "Cluster") {
        errors.push(match scope {
            "" => required("spec.scope", ""),
            other => error(
                "FieldValueNotSupported",
                "spec.scope",
                format!("Unsupported value: {other:?}: supported values: \"Cluster\", \"Namespaced\""),
            ),
        });
    }
    let conversion = meta::text(definition, "/spec/conversion/strategy");
    if !matches!(conversion, "" | "None") {
        let message = format!("Unsupported value: {conversion:?}: supported values: \"None\"");
        errors.push(error("FieldValueNotSupported", "spec.conversion.strategy", message));
    }
    check_versions(definition, &mut errors);
    errors
}

fn check_versions(definition: &Value, errors: &mut Vec<FieldError>) {
    let mut names: Vec<&str> = Vec::new();
    for (index, version) in versions(definition).enumerate() {
        let path = format!("spec.versions[{index}]");
        let name = meta::text(version, "/name");
        if name.is_empty() {
            errors.push(required(format!("{path}.name"), ""));
        } else if names.contains(&name) {
            errors.push(error("FieldValueInvalid", path.clone(), "Invalid value: must contain unique version names"));
        }
        names.push(name);
        match version.pointer("/schema/openAPIV3Schema") {
            None => errors.push(required(format!("{path}.schema.openAPIV3Schema"), "schemas are required")),
            Some(schema) => {
                super::schema::check(schema, &format!("{path}.schema.openAPIV3Schema"), true, errors);
            }
        }
    }
    let stored = versions(definition).filter(|version| is_true(version.get("storage"))).count();
    if stored != 1 {
        let message = "Invalid value: must have exactly one version marked as storage version";
        errors.push(error("FieldValueInvalid", "spec.versions", message));
    }
}

/// Fills in names, conditions and stored versions, as the establishing controllers do a moment later in kube-apiserver.
pub(super) fn establish(definition: &mut Value) {
    let names = definition.pointer_mut("/spec/names");
    if let Some(names) = names {
        let kind = meta::text(names, "/kind").to_owned();
        let names = meta::as_map(names);
        names.entry("singular").or_insert_with(|| kind.to_lowercase().into());
        names.entry("listKind").or_insert_with(|| format!("{kind}List").into());
    }
    let spec = meta::object_at(definition, "spec");
    spec.entry("conversion").or_insert_with(|| json!({"strategy": "None"}));
    let names = definition.pointer("/spec/names").cloned().unwrap_or_default();
    let storage = versions(definition)
        .find(|version| is_true(version.get("storage")))
        .map(|version| meta::text(version, "/name").to_owned())
        .unwrap_or_default();
    let now = meta::now();
    let status = meta::object_at(definition, "status");
    status.insert("acceptedNames".to_owned(), names);
    let stored = status.entry("storedVersions").or_insert_with(|| json!([]));
    if let Value::Array(list) = stored
        && !list.iter().any(|have| have.as_str() == Some(&storage))
    {
        list.push(storage.into());
    }
    for (kind, reason, message) in [
        ("NamesAccepted", "NoConflicts", "no conflicts found"),
        ("Established", "InitialNamesAccepted", "the initial names have been accepted"),
    ] {
        let conditions = status.entry("conditions").or_insert_with(|| json!([]));
        let Value::Array(conditions) = conditions else { continue };
        let is_it = |condition: &Value| meta::text(condition, "/type") == kind;
        let holds = conditions.iter().any(|c| is_it(c) && meta::text(c, "/status") == "True");
        if !holds {
            conditions.retain(|condition| !is_it(condition));
            conditions.push(json!({"type": kind, "status": "True", "lastTransitionTime": now,
                "reason": reason, "message": message}));
        }
    }
}

/// The resources of a definition, one a served version.
pub(super) fn resources(definition: &Value) -> Vec<ResourceKind> {
    let text = |pointer: &str| Cow::Owned(meta::text(definition, pointer).to_owned());
    let list = |pointer: &str| -> Vec<Cow<'static, str>> {
        meta::strings(definition.pointer(pointer)).into_iter().map(Cow::Owned).collect()
    };
    let group = meta::text(definition, "/spec/group").to_owned();
    let plural = meta::text(definition, "/spec/names/plural").to_owned();
    let namespaced = meta::text(definition, "/spec/scope") == "Namespaced";
    let preserve = is_true(definition.pointer("/spec/preserveUnknownFields"));
    let mut served: Vec<&Value> = versions(definition).filter(|version| is_true(version.get("served"))).collect();
    served.sort_by_key(|version| version_rank(meta::text(version, "/name")));
    let make = |version: &Value| {
        let empty = Value::Object(Map::new());
        let subresources = version.get("subresources").unwrap_or(&empty);
        let status = subresources.get("status").is_some();
        let schema = version.pointer("/schema/openAPIV3Schema").cloned().unwrap_or(empty.clone());
        let columns = version.get("additionalPrinterColumns").cloned().unwrap_or(Value::Null);
        ResourceKind {
            gvk: GroupVersionKind {
                group: Cow::Owned(group.clone()),
                version: Cow::Owned(meta::text(version, "/name").to_owned()),
                kind: text("/spec/names/kind"),
            },
            plural: Cow::Owned(plural.clone()),
            singular: text("/spec/names/singular"),
            short_names: list("/spec/names/shortNames"),
            categories: list("/spec/names/categories"),
            namespaced,
            status,
            scale: subresources.get("scale").map(scale_paths),
            stored: true,
            storage_key: Cow::Owned(format!("{group}/{plural}")),
            strategy: Arc::new(CustomStrategy::new(schema, &columns, status, namespaced, preserve)),
        }
    };
    served.into_iter().map(make).collect()
}

fn scale_paths(scale: &Value) -> ScalePaths {
    let pointer = |field: &str| meta::text(scale, &format!("/{field}")).replace('.', "/");
    let selector = pointer("labelSelectorPath");
    ScalePaths {
        spec_replicas: Cow::Owned(pointer("specReplicasPath")),
        status_replicas: Cow::Owned(pointer("statusReplicasPath")),
        selector: Some(selector).filter(|path| !path.is_empty()).map(Cow::Owned),
    }
}
