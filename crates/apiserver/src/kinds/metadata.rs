//! Validation of `metadata`: names, labels, annotations, owners, finalizers; and of label selectors.

use serde_json::Value;

use super::fault::{Faults, Path};
use super::format;
use super::read::Read;

/// What an object's name must look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum NameRule {
    /// RFC 1123 subdomain: most kinds.
    Subdomain,
    /// RFC 1123 label: namespaces and services.
    Label,
    /// Any one path segment: RBAC.
    PathSegment,
    /// An IP address in canonical form.
    Address,
    /// Anything.
    Any,
}

impl NameRule {
    /// Complaints about `name`; a `prefix` may end with a dash.
    pub(crate) fn check(self, name: &str, prefix: bool) -> Vec<String> {
        let mask = |name: &str| match name.strip_suffix('-') {
            Some(start) if prefix && name.len() > 1 => {
                let mut masked: String = start.to_owned();
                masked.pop();
                masked.push('a');
                masked
            }
            _ => name.to_owned(),
        };
        match self {
            NameRule::Subdomain => format::dns_subdomain(&mask(name)),
            NameRule::Label => format::dns_label(&mask(name)),
            NameRule::PathSegment => format::path_segment(name),
            NameRule::Address => format::canonical_ip(name),
            NameRule::Any => Vec::new(),
        }
    }
}

/// Checks the metadata of a new object.
pub(crate) fn check_new(object: &Value, rule: NameRule, namespaced: bool, faults: &mut Faults) {
    let metadata = object.at("metadata");
    let path = Path::new("metadata");
    let generate = metadata.text("generateName");
    if !generate.is_empty() {
        faults.invalid_each(&path.child("generateName"), generate, rule.check(generate, true));
    }
    let name = metadata.text("name");
    if name.is_empty() {
        faults.required(&path.child("name"), "name or generateName is required");
    } else {
        faults.invalid_each(&path.child("name"), name, rule.check(name, false));
    }
    let namespace = metadata.text("namespace");
    let namespace_path = path.child("namespace");
    match (namespaced, namespace.is_empty()) {
        (true, true) => faults.required(&namespace_path, ""),
        (true, false) => faults.invalid_each(&namespace_path, namespace, format::dns_label(namespace)),
        (false, false) => faults.forbidden(&namespace_path, "not allowed on this type"),
        (false, true) => {}
    }
    check_parts(metadata, &path, faults);
    finalizers(metadata, &path.child("finalizers"), faults);
}

/// Checks the metadata of an update.
pub(crate) fn check_update(object: &Value, old: &Value, faults: &mut Faults) {
    let (metadata, before) = (object.at("metadata"), old.at("metadata"));
    let path = Path::new("metadata");
    if before.has("deletionTimestamp") {
        let known = before.texts("finalizers");
        let mut added: Vec<&str> =
            metadata.texts("finalizers").into_iter().filter(|name| !known.contains(name)).collect();
        added.sort_unstable();
        added.dedup();
        if !added.is_empty() {
            let names: Vec<String> = added.iter().map(|name| super::fault::quote(name)).collect();
            let detail = format!(
                "no new finalizers can be added if the object is being deleted, found new finalizers []string{{{}}}",
                names.join(", ")
            );
            faults.forbidden(&path.child("finalizers"), &detail);
        }
    }
    if metadata.text("resourceVersion").is_empty() {
        faults.invalid(&path.child("resourceVersion"), "", "must be specified for an update");
    }
    let (generation, generation_before) =
        (metadata.int("generation").unwrap_or(0), before.int("generation").unwrap_or(0));
    if generation < generation_before {
        faults.invalid(&path.child("generation"), generation, "must not be decremented");
    }
    for field in ["name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"] {
        immutable(metadata.at(field), before.at(field), &path.child(field), faults);
    }
    check_parts(metadata, &path, faults);
}

/// `field is immutable` unless both are equal (null, absent and empty are the same).
pub(crate) fn immutable(value: &Value, old: &Value, path: &Path, faults: &mut Faults) {
    if !same(value, old) {
        faults.invalid(path, value, format::IMMUTABLE);
    }
}

/// Equal as the API server sees it: what is absent, null or empty is the same thing, at any depth.
pub(crate) fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Object(left), Value::Object(right)) => {
            left.iter().all(|(key, value)| same(value, b.at(key)))
                && right.iter().all(|(key, value)| left.contains_key(key) || same(&Value::Null, value))
        }
        (Value::Array(left), Value::Array(right)) => {
            left.len() == right.len() && left.iter().zip(right).all(|(x, y)| same(x, y))
        }
        _ => a == b || (a.is_blank() && b.is_blank()),
    }
}

fn check_parts(metadata: &Value, path: &Path, faults: &mut Faults) {
    if let Some(generation) = metadata.int("generation").filter(|generation| *generation < 0) {
        faults.invalid(&path.child("generation"), generation, format::NOT_NEGATIVE);
    }
    labels(metadata.at("labels"), &path.child("labels"), faults);
    annotations(metadata, &path.child("annotations"), faults);
    owners(metadata, &path.child("ownerReferences"), faults);
}

/// Checks a map of labels.
pub(crate) fn labels(labels: &Value, path: &Path, faults: &mut Faults) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        faults.invalid_each(path, key, format::label_key(key));
        let value = value.as_str().unwrap_or_default();
        faults.invalid_each(path, value, format::label_value(value));
    }
}

/// Checks the annotations of a `metadata`.
pub(crate) fn annotations(metadata: &Value, path: &Path, faults: &mut Faults) {
    const LIMIT: usize = 256 * 1024;
    let mut size = 0usize;
    for (key, value) in metadata.entries("annotations") {
        faults.invalid_each(path, key, format::label_key(&key.to_lowercase()));
        size = size.saturating_add(key.len()).saturating_add(value.as_str().map_or(0, str::len));
    }
    if size > LIMIT {
        faults.too_long(path, LIMIT);
    }
}

fn owners(metadata: &Value, path: &Path, faults: &mut Faults) {
    let mut controller: Option<String> = None;
    for (index, owner) in metadata.list("ownerReferences").iter().enumerate() {
        let here = path.index(index);
        let api_version = owner.text("apiVersion");
        if api_version.is_empty() {
            faults.required(&here.child("apiVersion"), "must not be empty");
        } else if api_version.matches('/').count() > 1 || api_version.ends_with('/') {
            faults.invalid(&here.child("apiVersion"), api_version, "must be <group>/<version> or <version>");
        }
        for field in ["kind", "name", "uid"] {
            if owner.text(field).is_empty() {
                faults.required(&here.child(field), "must not be empty");
            }
        }
        if api_version == "v1" && owner.text("kind") == "Event" {
            faults.invalid(&here, owner, "/v1, Kind=Event is disallowed from being an owner");
        }
        if owner.flag("controller") {
            let name = format!("{}/{}", owner.text("kind"), owner.text("name"));
            match &controller {
                Some(first) => {
                    let detail = format!(
                        "Only one reference can have Controller set to true. Found \"true\" in references for {first} and {name}"
                    );
                    faults.invalid(path, metadata.at("ownerReferences"), &detail);
                }
                None => controller = Some(name),
            }
        }
    }
}

fn finalizers(metadata: &Value, path: &Path, faults: &mut Faults) {
    let names = metadata.texts("finalizers");
    for name in &names {
        faults.invalid_each(path, name, format::label_key(name));
    }
    if names.contains(&"orphan") && names.contains(&"foregroundDeletion") {
        faults.invalid(path, metadata.at("finalizers"), "finalizer orphan and foregroundDeletion cannot be both set");
    }
}

/// Checks a `LabelSelector`.
pub(crate) fn label_selector(selector: &Value, path: &Path, faults: &mut Faults) {
    labels(selector.at("matchLabels"), &path.child("matchLabels"), faults);
    for (index, requirement) in selector.list("matchExpressions").iter().enumerate() {
        let here = path.child("matchExpressions").index(index);
        let values = requirement.texts("values");
        match requirement.text("operator") {
            "In" | "NotIn" if values.is_empty() => {
                faults.required(&here.child("values"), "must be specified when `operator` is 'In' or 'NotIn'");
            }
            "Exists" | "DoesNotExist" if !values.is_empty() => {
                faults.forbidden(
                    &here.child("values"),
                    "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
                );
            }
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            operator => faults.invalid(&here.child("operator"), operator, "not a valid selector operator"),
        }
        let key = requirement.text("key");
        faults.invalid_each(&here.child("key"), key, format::label_key(key));
        for (place, value) in values.iter().enumerate() {
            faults.invalid_each(&here.child("values").index(place), value, format::label_value(value));
        }
    }
}

/// Whether a selector selects everything because it says nothing.
pub(crate) fn selector_is_empty(selector: &Value) -> bool {
    selector.at("matchLabels").is_blank() && selector.at("matchExpressions").is_blank()
}

/// Whether a `LabelSelector` matches these labels.
pub(crate) fn selector_matches(selector: &Value, labels: &Value) -> bool {
    let exact = selector.entries("matchLabels").all(|(key, value)| labels.get(key).is_some_and(|found| found == value));
    exact
        && selector.list("matchExpressions").iter().all(|requirement| {
            let found = labels.get(requirement.text("key")).and_then(Value::as_str);
            let values = requirement.texts("values");
            match requirement.text("operator") {
                "In" => found.is_some_and(|found| values.contains(&found)),
                "NotIn" => found.is_none_or(|found| !values.contains(&found)),
                "Exists" => found.is_some(),
                _ => found.is_none(),
            }
        })
}
