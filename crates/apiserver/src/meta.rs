//! Reading and writing `metadata` and other well-known places of an object.

use jiff::Timestamp;
use serde_json::{Map, Value};

/// The text at a JSON pointer, empty when there is none.
pub(crate) fn text<'a>(object: &'a Value, pointer: &str) -> &'a str {
    object.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

/// One text of `metadata`, empty when there is none.
pub(crate) fn meta<'a>(object: &'a Value, field: &str) -> &'a str {
    object.get("metadata").and_then(|meta| meta.get(field)).and_then(Value::as_str).unwrap_or_default()
}

/// `metadata.name`.
pub(crate) fn name(object: &Value) -> &str {
    meta(object, "name")
}

/// `metadata.namespace`.
pub(crate) fn namespace(object: &Value) -> &str {
    meta(object, "namespace")
}

/// `metadata.resourceVersion` as a number.
pub(crate) fn version(object: &Value) -> Option<u64> {
    meta(object, "resourceVersion").parse().ok()
}

/// The object below a field, made when it is absent or not an object.
pub(crate) fn object_at<'a>(parent: &'a mut Value, field: &str) -> &'a mut Map<String, Value> {
    if !parent.is_object() {
        *parent = Value::Object(Map::new());
    }
    let slot = match parent {
        Value::Object(map) => map.entry(field).or_insert_with(|| Value::Object(Map::new())),
        other => other,
    };
    as_map(slot)
}

/// This value as a map, replaced by an empty one when it is something else.
pub(crate) fn as_map(value: &mut Value) -> &mut Map<String, Value> {
    if !value.is_object() {
        *value = Value::Object(Map::new());
    }
    match value {
        Value::Object(map) => map,
        // Replaced by an object just above.
        _ => unreachable!("the value is an object"),
    }
}

/// `metadata`, made when absent.
pub(crate) fn metadata(object: &mut Value) -> &mut Map<String, Value> {
    object_at(object, "metadata")
}

/// Sets one field of `metadata`.
pub(crate) fn set_meta(object: &mut Value, field: &str, value: Value) {
    metadata(object).insert(field.to_owned(), value);
}

/// Removes one field of `metadata`.
pub(crate) fn remove_meta(object: &mut Value, field: &str) {
    if let Some(meta) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        meta.shift_remove(field);
    }
}

/// Makes one field of `metadata` what it is in `from`, absent when absent there.
pub(crate) fn copy_meta(object: &mut Value, from: &Value, field: &str) {
    match from.get("metadata").and_then(|meta| meta.get(field)) {
        Some(value) => set_meta(object, field, value.clone()),
        None => remove_meta(object, field),
    }
}

/// Whether the object is being deleted.
pub(crate) fn is_deleting(object: &Value) -> bool {
    !meta(object, "deletionTimestamp").is_empty()
}

/// `metadata.finalizers`.
pub(crate) fn finalizers(object: &Value) -> Vec<String> {
    strings(object.pointer("/metadata/finalizers"))
}

/// The texts of a list.
pub(crate) fn strings(list: Option<&Value>) -> Vec<String> {
    list.and_then(Value::as_array)
        .map(|list| list.iter().filter_map(|item| item.as_str().map(str::to_owned)).collect())
        .unwrap_or_default()
}

/// Sets `metadata.finalizers`, removing the field when there are none.
pub(crate) fn set_finalizers(object: &mut Value, finalizers: Vec<String>) {
    if finalizers.is_empty() {
        remove_meta(object, "finalizers");
    } else {
        set_meta(object, "finalizers", Value::from(finalizers));
    }
}

/// This moment, plus some seconds, as RFC 3339 in whole seconds.
pub(crate) fn now_plus(seconds: i64) -> String {
    let now = Timestamp::now().as_second().saturating_add(seconds);
    Timestamp::from_second(now).unwrap_or(Timestamp::UNIX_EPOCH).to_string()
}

/// This moment as RFC 3339 in whole seconds.
pub(crate) fn now() -> String {
    now_plus(0)
}

/// Five random letters and digits, as `generateName` appends them.
pub(crate) fn random_suffix(length: usize) -> String {
    const LETTERS: &[u8; 27] = b"bcdfghjklmnpqrstvwxz2456789";
    let bits = uuid::Uuid::new_v4().as_u128();
    let mut rest = bits;
    (0..length)
        .map(|_| {
            let index = (rest % 27) as usize;
            rest /= 27;
            LETTERS.get(index).copied().map_or('x', char::from)
        })
        .collect()
}
