//! Validation of CustomResourceDefinitions: names, versions and the rules of structural schemas that serving relies on.

use serde_json::Value;

use crate::kinds::fault::{Faults, Path};
use crate::kinds::format;
use crate::kinds::metadata::immutable;
use crate::kinds::read::Read;

/// Checks a `CustomResourceDefinition`.
pub(crate) fn custom_resource_definition(object: &Value, faults: &mut Faults) {
    let (spec, path) = (object.at("spec"), Path::new("spec"));
    let (group, names) = (spec.text("group"), spec.at("names"));
    let name = object.deep(&["metadata", "name"]).as_str().unwrap_or_default();
    let wanted = format!("{}.{group}", names.text("plural"));
    if name != wanted {
        faults.invalid(&Path::new("metadata").child("name"), name, "must be spec.names.plural+\".\"+spec.group");
    }
    if group.is_empty() {
        faults.required(&path.child("group"), "");
    } else {
        faults.invalid_each(&path.child("group"), group, format::dns_subdomain(group));
        if !group.contains('.') {
            faults.invalid(&path.child("group"), group, "should be a domain with at least one dot");
        }
    }
    const SCOPES: &[&str] = &["Cluster", "Namespaced"];
    match spec.text("scope") {
        "" => faults.required(&path.child("scope"), ""),
        scope if SCOPES.contains(&scope) => {}
        other => faults.unsupported(&path.child("scope"), other, SCOPES),
    }
    self::names(names, &path.child("names"), faults);
    versions(spec, &path.child("versions"), faults);
    let conversion = spec.at("conversion").text("strategy");
    if !["", "None", "Webhook"].contains(&conversion) {
        faults.unsupported(&path.child("conversion").child("strategy"), conversion, &["None", "Webhook"]);
    }
}

fn names(names: &Value, path: &Path, faults: &mut Faults) {
    for field in ["plural", "singular", "kind", "listKind"] {
        let text = names.text(field);
        if text.is_empty() {
            faults.required(&path.child(field), "");
            continue;
        }
        let lower = text.to_lowercase();
        let checked = if field.ends_with("ind") { lower.as_str() } else { text };
        faults.invalid_each(&path.child(field), text, format::dns_1035_label(checked));
    }
    for field in ["shortNames", "categories"] {
        for (index, text) in names.texts(field).iter().enumerate() {
            faults.invalid_each(&path.child(field).index(index), text, format::dns_1035_label(text));
        }
    }
    if names.text("kind") == names.text("listKind") && !names.text("kind").is_empty() {
        faults.invalid(&path.child("listKind"), names.text("listKind"), "kind and listKind may not be the same");
    }
}

fn versions(spec: &Value, path: &Path, faults: &mut Faults) {
    let list = spec.list("versions");
    if list.is_empty() {
        faults.required(path, "must have exactly one version marked as storage version");
        return;
    }
    let mut seen = Vec::new();
    for (index, version) in list.iter().enumerate() {
        let here = path.index(index);
        let name = version.text("name");
        faults.invalid_each(&here.child("name"), name, format::dns_1035_label(name));
        if seen.contains(&name) {
            faults.invalid(path, spec.at("versions"), "must contain unique version names");
        }
        seen.push(name);
        let schema = version.deep(&["schema", "openAPIV3Schema"]);
        let schema_path = here.child("schema").child("openAPIV3Schema");
        if schema.is_null() {
            faults.required(&schema_path, "schemas are required");
            continue;
        }
        if schema.text("type") != "object" {
            if schema.text("type").is_empty() {
                faults.required(&schema_path.child("type"), "must not be empty at the root");
            } else {
                faults.invalid(&schema_path.child("type"), schema.text("type"), "must be object at the root");
            }
        }
        structural(schema, &schema_path, faults);
        scale(version, &here, faults);
    }
    let stored = list.iter().filter(|version| version.flag("storage")).count();
    if stored != 1 {
        faults.invalid(path, spec.at("versions"), "must have exactly one version marked as storage version");
    }
}

fn scale(version: &Value, path: &Path, faults: &mut Faults) {
    let scale = version.deep(&["subresources", "scale"]);
    let here = path.child("subresources").child("scale");
    if scale.is_null() {
        return;
    }
    for (field, root) in [("specReplicasPath", ".spec"), ("statusReplicasPath", ".status")] {
        let text = scale.text(field);
        if text.is_empty() {
            faults.required(&here.child(field), "");
        } else if !text.starts_with(&format!("{root}.")) {
            faults.invalid(&here.child(field), text, &format!("should be a json path under {root}"));
        }
    }
}

/// Every object, array and value of a structural schema says its type.
fn structural(schema: &Value, path: &Path, faults: &mut Faults) {
    let free = schema.flag("x-kubernetes-int-or-string") || schema.flag("x-kubernetes-preserve-unknown-fields");
    let kind = schema.text("type");
    if kind.is_empty() && !free {
        faults.required(&path.child("type"), "must not be empty for specified object fields");
    }
    const TYPES: &[&str] = &["array", "boolean", "integer", "number", "object", "string"];
    if !kind.is_empty() && !TYPES.contains(&kind) {
        faults.unsupported(&path.child("type"), kind, TYPES);
    }
    if kind == "array" && !schema.at("items").is_object() {
        faults.required(&path.child("items"), "must be specified");
    }
    for (name, property) in schema.entries("properties") {
        structural(property, &path.child("properties").key(name), faults);
    }
    if schema.at("items").is_object() {
        structural(schema.at("items"), &path.child("items"), faults);
    }
    let additional = schema.at("additionalProperties");
    if additional.is_object() {
        structural(additional, &path.child("additionalProperties"), faults);
        if !schema.at("properties").is_blank() {
            faults.forbidden(
                &path.child("additionalProperties"),
                "additionalProperties and properties are mutual exclusive",
            );
        }
    } else if additional == &Value::Bool(false) {
        faults.forbidden(&path.child("additionalProperties"), "additionalProperties cannot be set to false");
    }
}

/// Group and scope of a definition, and its names once established, do not change.
pub(crate) fn custom_resource_definition_update(object: &Value, old: &Value, faults: &mut Faults) {
    let (spec, before, path) = (object.at("spec"), old.at("spec"), Path::new("spec"));
    let established = old
        .at("status")
        .list("conditions")
        .iter()
        .any(|condition| condition.text("type") == "Established" && condition.text("status") == "True");
    immutable(spec.at("group"), before.at("group"), &path.child("group"), faults);
    immutable(
        spec.deep(&["names", "plural"]),
        before.deep(&["names", "plural"]),
        &path.child("names").child("plural"),
        faults,
    );
    if established {
        immutable(spec.at("scope"), before.at("scope"), &path.child("scope"), faults);
        immutable(
            spec.deep(&["names", "kind"]),
            before.deep(&["names", "kind"]),
            &path.child("names").child("kind"),
            faults,
        );
    }
}
