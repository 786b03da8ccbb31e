//! Tests of the built-in kinds: each protects the wording or the behaviour of the real API server.

mod config;
mod pod;
mod print;
mod protobuf;
mod schema;
mod service;
mod workload;

use std::sync::Arc;

use serde_json::{Value, json};

use super::builtin;
use crate::resource::{FieldError, Strategy};

/// The strategy of a kind, by its name; `Event` is the core one.
fn strategy(kind: &str) -> Arc<dyn Strategy> {
    let found = builtin().into_iter().find(|resource| resource.gvk.kind == kind);
    found.unwrap_or_else(|| panic!("no kind {kind}")).strategy
}

fn lines(errors: Vec<FieldError>) -> Vec<String> {
    errors.into_iter().map(|error| format!("{}: {}", error.field, error.message)).collect()
}

/// A new object as the server makes it: named, defaulted, prepared.
fn made(kind: &str, mut object: Value) -> Value {
    let namespaced = builtin().into_iter().find(|resource| resource.gvk.kind == kind).unwrap().namespaced;
    let map = object.as_object_mut().unwrap();
    map.entry("kind").or_insert(json!(kind));
    let metadata = map.entry("metadata").or_insert(json!({})).as_object_mut().unwrap();
    metadata.entry("name").or_insert(json!("thing"));
    metadata.entry("uid").or_insert(json!("11111111-2222-3333-4444-555555555555"));
    if namespaced {
        metadata.entry("namespace").or_insert(json!("default"));
    }
    let strategy = strategy(kind);
    strategy.prepare_create(&mut object);
    strategy.default_object(&mut object);
    object
}

/// What the server says of a new object.
fn refused(kind: &str, object: Value) -> Vec<String> {
    lines(strategy(kind).validate_create(&made(kind, object)))
}

/// What the server says of an update that makes `change` to `old`.
fn refused_update(kind: &str, old: Value, change: impl FnOnce(&mut Value)) -> Vec<String> {
    let mut old = made(kind, old);
    old["metadata"]["resourceVersion"] = json!("7");
    let mut new = old.clone();
    change(&mut new);
    let strategy = strategy(kind);
    strategy.prepare_update(&mut new, &old);
    strategy.default_object(&mut new);
    lines(strategy.validate_update(&new, &old))
}

const LABEL: &str = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')";
const SUBDOMAIN: &str = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')";
const PORT: &str = "must be between 1 and 65535, inclusive";
