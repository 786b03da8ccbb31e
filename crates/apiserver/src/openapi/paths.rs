//! The paths of an OpenAPI document: which requests each resource takes, and their parameters.

use serde_json::{Map, Value, json};

use super::{Form, schemas};
use crate::kinds::table::{Row, Served};

/// The paths of these resources.
pub(super) fn of(rows: &[&Row], form: Form) -> Value {
    let mut out = Map::new();
    for row in rows {
        let root = match row.group {
            "" => format!("/api/{}", row.version),
            group => format!("/apis/{group}/{}", row.version),
        };
        let scope = if row.namespaced { "/namespaces/{namespace}" } else { "" };
        let collection = format!("{root}{scope}/{}", row.plural);
        if row.served == Served::Review {
            out.insert(collection, item(row, &[("post", "post")], form));
            continue;
        }
        let all: &[(&str, &str)] = &[("get", "list"), ("post", "post"), ("delete", "deletecollection")];
        out.insert(collection.clone(), item(row, all, form));
        let one: &[(&str, &str)] = &[("get", "get"), ("put", "put"), ("patch", "patch"), ("delete", "delete")];
        out.insert(format!("{collection}/{{name}}"), item(row, one, form));
        if matches!(row.served, Served::Status | Served::Scale) {
            let status: &[(&str, &str)] = &[("get", "get"), ("put", "put"), ("patch", "patch")];
            out.insert(format!("{collection}/{{name}}/status"), item(row, status, form));
        }
        if row.namespaced {
            out.insert(format!("{root}/{}", row.plural), item(row, &[("get", "list")], form));
        }
    }
    out.sort_keys();
    Value::Object(out)
}

fn item(row: &Row, requests: &[(&str, &str)], form: Form) -> Value {
    let mut out = Map::new();
    for (method, action) in requests {
        out.insert((*method).to_owned(), operation(row, method, action, form));
    }
    Value::Object(out)
}

fn operation(row: &Row, method: &str, action: &str, form: Form) -> Value {
    let mut parameters = vec![query("pretty", "string", form)];
    let writes = matches!(method, "post" | "put" | "patch");
    if writes {
        parameters.extend(["dryRun", "fieldManager", "fieldValidation"].map(|name| query(name, "string", form)));
    }
    if method == "patch" {
        parameters.push(query("force", "boolean", form));
    }
    if action == "list" || action == "deletecollection" {
        let names = ["continue", "fieldSelector", "labelSelector", "resourceVersion", "resourceVersionMatch"];
        parameters.extend(names.map(|name| query(name, "string", form)));
        parameters.push(query("limit", "integer", form));
    }
    if action == "list" {
        parameters
            .extend(["allowWatchBookmarks", "sendInitialEvents", "watch"].map(|name| query(name, "boolean", form)));
    }
    if method == "delete" {
        parameters.push(query("propagationPolicy", "string", form));
        parameters.push(query("gracePeriodSeconds", "integer", form));
    }
    let schema = if action == "list" { format!("{}List", row.schema) } else { row.schema.to_owned() };
    let target = json!({"$ref": format!("{}{schema}", form.schema_prefix())});
    let answer = match form {
        Form::V2 => json!({"description": "OK", "schema": target}),
        Form::V3 => json!({"description": "OK", "content": {"application/json": {"schema": target}}}),
    };
    let mut out = json!({
        "description": format!("{action} {}", row.kind),
        "operationId": format!("{action}{}{}{}", row.group.replace('.', ""), row.version, row.kind),
        "tags": [row.group],
        "parameters": parameters,
        "responses": {"200": answer},
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": schemas::gvk(row, ""),
    });
    if let (true, Some(map)) = (writes, out.as_object_mut()) {
        body(map, row, method, form);
    }
    out
}

fn body(operation: &mut Map<String, Value>, row: &Row, method: &str, form: Form) {
    let object = json!({"$ref": format!("{}{}", form.schema_prefix(), row.schema)});
    let patch = json!({"type": "object"});
    let schema = if method == "patch" { patch } else { object };
    match form {
        Form::V2 => {
            if let Some(list) = operation.get_mut("parameters").and_then(Value::as_array_mut) {
                list.push(json!({"name": "body", "in": "body", "required": true, "schema": schema}));
            }
        }
        Form::V3 => {
            let kinds: &[&str] = if method == "patch" {
                &[
                    "application/apply-patch+yaml",
                    "application/json-patch+json",
                    "application/merge-patch+json",
                    "application/strategic-merge-patch+json",
                ]
            } else {
                &["application/json", "application/yaml"]
            };
            let content: Map<String, Value> =
                kinds.iter().map(|kind| ((*kind).to_owned(), json!({"schema": schema}))).collect();
            operation.insert("requestBody".to_owned(), json!({"content": content, "required": true}));
        }
    }
}

fn query(name: &str, kind: &str, form: Form) -> Value {
    match form {
        Form::V2 => json!({"name": name, "in": "query", "type": kind, "uniqueItems": true}),
        Form::V3 => json!({"name": name, "in": "query", "schema": {"type": kind, "uniqueItems": true}}),
    }
}
