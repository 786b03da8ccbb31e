//! `metadata.managedFields`: who wrote which fields.

use serde_json::{Map, Value};

use super::fields::{Difference, FieldSet};
use crate::meta;
use crate::resource::ResourceKind;
use crate::rest::api_version;

/// One entry of managedFields.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub(crate) manager: String,
    /// `Apply` or `Update`.
    pub(crate) operation: String,
    pub(crate) api_version: String,
    pub(crate) subresource: String,
    pub(crate) time: String,
    pub(crate) fields: FieldSet,
}

impl Entry {
    pub(crate) fn is(&self, manager: &str, operation: &str, subresource: &str) -> bool {
        self.manager == manager && self.operation == operation && self.subresource == subresource
    }
}

/// The entries of an object.
pub(crate) fn entries(object: &Value) -> Vec<Entry> {
    let list = object.pointer("/metadata/managedFields").and_then(Value::as_array);
    list.into_iter()
        .flatten()
        .map(|entry| Entry {
            manager: meta::text(entry, "/manager").to_owned(),
            operation: meta::text(entry, "/operation").to_owned(),
            api_version: meta::text(entry, "/apiVersion").to_owned(),
            subresource: meta::text(entry, "/subresource").to_owned(),
            time: meta::text(entry, "/time").to_owned(),
            fields: entry.get("fieldsV1").map(FieldSet::parse).unwrap_or_default(),
        })
        .collect()
}

/// Writes the entries into an object: applied ones first, then by time and name; empty ones are left out.
pub(crate) fn set_entries(object: &mut Value, mut entries: Vec<Entry>) {
    entries.retain(|entry| !entry.fields.is_empty());
    entries.sort_by(|a, b| (&a.operation, &a.time, &a.manager).cmp(&(&b.operation, &b.time, &b.manager)));
    if entries.is_empty() {
        return meta::remove_meta(object, "managedFields");
    }
    let list: Vec<Value> = entries
        .into_iter()
        .map(|entry| {
            let mut map = Map::new();
            map.insert("manager".to_owned(), entry.manager.into());
            map.insert("operation".to_owned(), entry.operation.into());
            map.insert("apiVersion".to_owned(), entry.api_version.into());
            if !entry.time.is_empty() {
                map.insert("time".to_owned(), entry.time.into());
            }
            map.insert("fieldsType".to_owned(), "FieldsV1".into());
            map.insert("fieldsV1".to_owned(), entry.fields.to_value());
            if !entry.subresource.is_empty() {
                map.insert("subresource".to_owned(), entry.subresource.into());
            }
            Value::Object(map)
        })
        .collect();
    meta::set_meta(object, "managedFields", Value::Array(list));
}

/// Whether the client asks for managedFields to be cleared: an empty list, or a list of one empty entry.
fn is_reset(object: &Value) -> bool {
    let list = object.pointer("/metadata/managedFields").and_then(Value::as_array);
    match list.map(Vec::as_slice) {
        Some([]) => true,
        Some([one]) => one.as_object().is_some_and(Map::is_empty),
        _ => false,
    }
}

/// Notes what an update changed: its manager owns those fields now, and nobody else does.
pub(crate) fn track(kind: &ResourceKind, old: Option<&Value>, new: &mut Value, manager: &str, subresource: &str) {
    let mut entries = match old {
        Some(old) if !is_reset(new) => entries(old),
        _ => Vec::new(),
    };
    let empty = Value::Object(Map::new());
    let difference = Difference::between(kind.strategy.as_ref(), old.unwrap_or(&empty), new);
    if difference.changed.is_empty() && difference.removed.is_empty() {
        return set_entries(new, entries);
    }
    let version = api_version(kind);
    let mut found = false;
    for entry in &mut entries {
        let own = entry.is(manager, "Update", subresource) && entry.api_version == version;
        let before = entry.fields.clone();
        if own {
            found = true;
            entry.fields.union(&difference.changed);
        } else {
            entry.fields.subtract(&difference.changed);
        }
        entry.fields.subtract(&difference.removed);
        if own && entry.fields != before {
            entry.time = meta::now();
        }
    }
    if !found && !difference.changed.is_empty() {
        entries.push(Entry {
            manager: manager.to_owned(),
            operation: "Update".to_owned(),
            api_version: version,
            subresource: subresource.to_owned(),
            time: meta::now(),
            fields: difference.changed,
        });
    }
    set_entries(new, entries);
}

/// Whether two objects are the same but for their version and the times in managedFields.
pub(crate) fn same_but_times(a: &Value, b: &Value) -> bool {
    let (Some(a), Some(b)) = (a.as_object(), b.as_object()) else { return a == b };
    a.len() == b.len()
        && a.iter().all(|(key, value)| match b.get(key) {
            None => false,
            Some(other) if key == "metadata" => without_times(value) == without_times(other),
            Some(other) => value == other,
        })
}

fn without_times(metadata: &Value) -> Value {
    let mut metadata = metadata.clone();
    let map = meta::as_map(&mut metadata);
    map.shift_remove("resourceVersion");
    for entry in map.get_mut("managedFields").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(entry) = entry.as_object_mut() {
            entry.shift_remove("time");
        }
    }
    metadata
}
