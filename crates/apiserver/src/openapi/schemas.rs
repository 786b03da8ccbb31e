//! The schemas of an OpenAPI document.

use serde_json::{Map, Value, json};

use super::Form;
use crate::kinds::merge::MergeTable;
use crate::kinds::read::Read;
use crate::kinds::schema::{generator, reference};
use crate::kinds::table::{Row, Served};
use crate::resource::ListMerge;

/// Full name of the metadata of lists.
const LIST_META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta";

/// The schemas of these kinds, of their lists and of all that they refer to, by full name.
pub(super) fn of(rows: &[&Row], form: Form) -> Value {
    let merge = MergeTable::read();
    let mut generator = generator();
    for row in rows {
        (row.root)(&mut generator);
    }
    generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::ListMeta>();
    generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::DeleteOptions>();
    generator.subschema_for::<k8s_openapi::apimachinery::pkg::apis::meta::v1::Status>();
    let mut out = Map::new();
    for (name, schema) in generator.take_definitions(true) {
        out.insert(name.clone(), definition(&name, &schema, &merge, form));
    }
    for row in rows {
        if let Some(schema) = out.get_mut(row.schema).and_then(Value::as_object_mut) {
            schema.insert("x-kubernetes-group-version-kind".to_owned(), json!([gvk(row, "")]));
        }
        if row.served != Served::Review {
            out.insert(format!("{}List", row.schema), list(row, form));
        }
    }
    out.sort_keys();
    Value::Object(out)
}

/// `{group, kind, version}`, of the kind or (with `List`) of its list.
pub(super) fn gvk(row: &Row, suffix: &str) -> Value {
    json!({"group": row.group, "kind": format!("{}{suffix}", row.kind), "version": row.version})
}

fn list(row: &Row, form: Form) -> Value {
    let text = |description: &str| json!({"description": description, "type": "string"});
    let item = link(row.schema, None, form);
    json!({
        "description": format!("{}List is a list of {}.", row.kind, row.plural),
        "type": "object",
        "required": ["items"],
        "properties": {
            "apiVersion": text("APIVersion defines the versioned schema of this representation of an object."),
            "items": {"description": format!("The {}.", row.plural), "type": "array", "items": item},
            "kind": text("Kind is a string value representing the REST resource this object represents."),
            "metadata": link(LIST_META, Some("Standard list metadata."), form),
        },
        "x-kubernetes-group-version-kind": [gvk(row, "List")],
    })
}

/// A reference, with a description of what it means in its place.
fn link(name: &str, description: Option<&str>, form: Form) -> Value {
    let target = json!({"$ref": format!("{}{name}", form.schema_prefix())});
    match (description, form) {
        (None, _) => target,
        (Some(description), Form::V3) => json!({"description": description, "allOf": [target]}),
        (Some(description), Form::V2) => json!({"description": description, "$ref": target.text("$ref")}),
    }
}

fn definition(name: &str, schema: &Value, merge: &MergeTable, form: Form) -> Value {
    let description = schema.text("description");
    match name {
        "io.k8s.apimachinery.pkg.util.intstr.IntOrString" => return number_or_text(description, "int-or-string", form),
        "io.k8s.apimachinery.pkg.api.resource.Quantity" => return number_or_text(description, "", form),
        _ => {}
    }
    let mut out = converted(schema, form);
    let properties = out.get_mut("properties").and_then(Value::as_object_mut);
    for (field, property) in properties.into_iter().flatten() {
        mark(property, name, field, merge);
    }
    if merge.is_atomic(name)
        && let Some(map) = out.as_object_mut()
    {
        map.insert("x-kubernetes-map-type".to_owned(), "atomic".into());
    }
    out
}

fn number_or_text(description: &str, format: &str, form: Form) -> Value {
    let mut out = json!({"description": description});
    if let Some(map) = out.as_object_mut() {
        match form {
            Form::V2 => map.insert("type".to_owned(), "string".into()),
            Form::V3 => {
                let number = if format.is_empty() { "number" } else { "integer" };
                map.insert("oneOf".to_owned(), json!([{"type": number}, {"type": "string"}]))
            }
        };
        if !format.is_empty() {
            map.insert("format".to_owned(), format.into());
        }
    }
    out
}

/// Adds how the field merges.
fn mark(property: &mut Value, owner: &str, field: &str, merge: &MergeTable) {
    let is_list = property.text("type") == "array";
    let rules = merge.field(owner, field, None, is_list);
    let Some(map) = property.as_object_mut() else { return };
    match &rules.list {
        Some(ListMerge::Atomic) => {
            map.insert("x-kubernetes-list-type".to_owned(), "atomic".into());
        }
        Some(ListMerge::Set) => {
            map.insert("x-kubernetes-list-type".to_owned(), "set".into());
        }
        Some(ListMerge::Map(keys)) => {
            map.insert("x-kubernetes-list-map-keys".to_owned(), json!(keys));
            map.insert("x-kubernetes-list-type".to_owned(), "map".into());
        }
        None => {}
    }
    if rules.atomic_map {
        map.insert("x-kubernetes-map-type".to_owned(), "atomic".into());
    }
    if let Some(key) = &rules.patch_merge_key {
        map.insert("x-kubernetes-patch-merge-key".to_owned(), key.as_ref().into());
    }
    let strategy = match (rules.patch_merge, rules.retain_keys) {
        (true, true) => "merge,retainKeys",
        (true, false) => "merge",
        (false, true) => "retainKeys",
        (false, false) => return,
    };
    map.insert("x-kubernetes-patch-strategy".to_owned(), strategy.into());
}

/// A schema with its references rewritten for the document.
fn converted(schema: &Value, form: Form) -> Value {
    match schema {
        Value::Object(map) if reference(schema).is_some() => {
            let description = map.get("description").and_then(Value::as_str);
            link(reference(schema).unwrap_or_default(), description, form)
        }
        Value::Object(map) => {
            let convert = |(key, value): (&String, &Value)| match key.as_str() {
                "properties" => {
                    let fields = value
                        .as_object()
                        .into_iter()
                        .flatten()
                        .map(|(name, field)| (name.clone(), converted(field, form)));
                    (key.clone(), Value::Object(fields.collect()))
                }
                _ => (key.clone(), converted(value, form)),
            };
            Value::Object(map.iter().map(convert).collect())
        }
        Value::Array(items) => Value::Array(items.iter().map(|item| converted(item, form)).collect()),
        other => other.clone(),
    }
}
