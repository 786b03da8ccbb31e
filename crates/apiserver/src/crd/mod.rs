//! Custom resource definitions: checked when written, served at once, gone with all their objects when deleted.
//!
//! `x-kubernetes-validations` (CEL) are stored but not evaluated; a warning says so. Conversion webhooks are refused: only
//! strategy `None` is served.

mod columns;
mod definition;
mod schema;
mod strategy;

use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::meta;
use crate::resource::ResourceKind;
use crate::rest::Call;
use crate::server::Core;
use crate::status::ApiError;

const GROUP: &str = "apiextensions.k8s.io";
const PLURAL: &str = "customresourcedefinitions";

pub(crate) fn is_definition(kind: &ResourceKind) -> bool {
    kind.gvk.group == GROUP && kind.plural == PLURAL
}

fn stored_definitions(core: &Core) -> Vec<Value> {
    let (stored, _) = core.store.list(&core.storage_key(GROUP, PLURAL), None);
    stored.iter().filter_map(|stored| stored.value().ok()).collect()
}

/// A number that changes when any definition does.
pub(crate) fn definitions_version(core: &Core) -> u64 {
    core.store.table_version(&core.storage_key(GROUP, PLURAL))
}

/// Serves the stored definitions.
pub(crate) fn load(core: &Core) {
    for definition in stored_definitions(core) {
        core.registry.set_custom(meta::name(&definition), definition::resources(&definition));
    }
}

/// Checks a definition before it is written and sets the conditions that make clients use it. Other kinds pass.
pub(crate) fn check_definition(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    if !is_definition(&call.kind) {
        return Ok(());
    }
    let errors = definition::check(object, |group| call.core.registry.is_builtin_group(group));
    if !errors.is_empty() {
        return Err(ApiError::invalid_object(&call.kind, meta::name(object), &errors));
    }
    if object.to_string().contains("\"x-kubernetes-validations\"") {
        call.warn("x-kubernetes-validations (CEL rules) of this CustomResourceDefinition are stored but not evaluated by this API server");
    }
    definition::establish(object);
    Ok(())
}

/// A definition was written: serve it as it is now. Other kinds pass.
pub(crate) fn changed(core: &Core, kind: &ResourceKind, object: &Value) {
    if is_definition(kind) {
        let resources = if meta::is_deleting(object) { Vec::new() } else { definition::resources(object) };
        core.registry.set_custom(meta::name(object), resources);
    }
}

/// A definition was removed: its objects go too. Other kinds pass.
pub(crate) fn removed(core: &Core, kind: &ResourceKind, object: &Value) {
    if !is_definition(kind) {
        return;
    }
    core.registry.set_custom(meta::name(object), Vec::new());
    let table = format!("{}/{}", meta::text(object, "/spec/group"), meta::text(object, "/spec/names/plural"));
    for stored in core.store.list(&table, None).0 {
        let Ok(last) = stored.value() else { continue };
        if core.store.remove(&table, &stored.key, last, stored.version).is_err() {
            tracing::warn!(table, name = %stored.key.name, "an object outlived its CustomResourceDefinition");
        }
    }
}

/// The OpenAPI v3 document of a custom group-version.
pub(crate) fn openapi_v3(core: &Core, group: &str, version: &str) -> Option<Value> {
    let mut schemas = Map::new();
    let mut paths = Map::new();
    for definition in stored_definitions(core) {
        if meta::text(&definition, "/spec/group") != group {
            continue;
        }
        let Some(found) = definition::version(&definition, version) else { continue };
        let kind = meta::text(&definition, "/spec/names/kind");
        let plural = meta::text(&definition, "/spec/names/plural");
        let mut schema = found.pointer("/schema/openAPIV3Schema").cloned().unwrap_or_else(|| json!({"type": "object"}));
        let gvk = json!([{"group": group, "version": version, "kind": kind}]);
        meta::as_map(&mut schema).insert("x-kubernetes-group-version-kind".to_owned(), gvk);
        let properties = meta::object_at(&mut schema, "properties");
        properties.entry("apiVersion").or_insert_with(|| json!({"type": "string"}));
        properties.entry("kind").or_insert_with(|| json!({"type": "string"}));
        properties
            .insert("metadata".to_owned(), json!({"type": "object", "description": "Standard object's metadata."}));
        let reversed: Vec<&str> = group.split('.').rev().collect();
        let name = format!("{}.{version}.{kind}", reversed.join("."));
        schemas.insert(name.clone(), schema);
        let scope = if meta::text(&definition, "/spec/scope") == "Cluster" { "" } else { "/namespaces/{namespace}" };
        let path = format!("/apis/{group}/{version}{scope}/{plural}/{{name}}");
        paths.insert(path, operations(group, version, kind, &name));
    }
    if schemas.is_empty() {
        return None;
    }
    Some(json!({
        "openapi": "3.0.0", "info": {"title": "Kubernetes", "version": "v1.33.0"},
        "paths": paths, "components": {"schemas": schemas},
    }))
}

fn operations(group: &str, version: &str, kind: &str, schema: &str) -> Value {
    let gvk = json!({"group": group, "version": version, "kind": kind});
    let reference = json!({"$ref": format!("#/components/schemas/{schema}")});
    let content = json!({"application/json": {"schema": reference}});
    let parameters: Vec<Value> = ["dryRun", "fieldManager", "fieldValidation"]
        .iter()
        .map(|name| json!({"name": name, "in": "query", "schema": {"type": "string", "uniqueItems": true}}))
        .collect();
    let operation = |action: &str| {
        json!({"parameters": parameters, "responses": {"200": {"description": "OK", "content": content}},
            "x-kubernetes-action": action, "x-kubernetes-group-version-kind": gvk})
    };
    json!({"get": operation("get"), "put": operation("put"), "patch": operation("patch"), "delete": operation("delete")})
}

/// What a definition's strategy needs, shared between its versions.
pub(crate) type SharedSchema = Arc<Value>;
