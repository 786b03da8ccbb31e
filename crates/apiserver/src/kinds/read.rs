//! Reading JSON objects by field name, where what is absent reads as empty.

use serde_json::{Map, Value};

/// Look-ups that never fail: a missing or differently typed field reads as nothing. Wrong types are refused before
/// (see [`crate::kinds::conform`]), so validation need not repeat that.
pub(crate) trait Read {
    /// The field, or JSON null.
    fn at(&self, key: &str) -> &Value;
    /// The field below all these, or JSON null.
    fn deep(&self, keys: &[&str]) -> &Value;
    /// The text of the field, or the empty string.
    fn text(&self, key: &str) -> &str;
    /// The integer in the field.
    fn int(&self, key: &str) -> Option<i64>;
    /// Whether the field is `true`.
    fn flag(&self, key: &str) -> bool;
    /// The items of the list in the field.
    fn list(&self, key: &str) -> &[Value];
    /// The strings of the list in the field.
    fn texts<'a>(&'a self, key: &str) -> Vec<&'a str>;
    /// The entries of the map in the field, none when it is absent.
    fn entries<'a>(&'a self, key: &str) -> Box<dyn Iterator<Item = (&'a String, &'a Value)> + 'a>;
    /// Whether the field is there and not null.
    fn has(&self, key: &str) -> bool;
    /// Whether this is an object without fields, an empty list, an empty string or null.
    fn is_blank(&self) -> bool;
}

static NULL: Value = Value::Null;

impl Read for Value {
    fn at(&self, key: &str) -> &Value {
        self.get(key).unwrap_or(&NULL)
    }

    fn deep(&self, keys: &[&str]) -> &Value {
        keys.iter().fold(self, |value, key| value.at(key))
    }

    fn text(&self, key: &str) -> &str {
        self.at(key).as_str().unwrap_or_default()
    }

    fn int(&self, key: &str) -> Option<i64> {
        self.at(key).as_i64()
    }

    fn flag(&self, key: &str) -> bool {
        self.at(key).as_bool().unwrap_or_default()
    }

    fn list(&self, key: &str) -> &[Value] {
        self.at(key).as_array().map(Vec::as_slice).unwrap_or_default()
    }

    fn texts<'a>(&'a self, key: &str) -> Vec<&'a str> {
        self.list(key).iter().filter_map(Value::as_str).collect()
    }

    fn entries<'a>(&'a self, key: &str) -> Box<dyn Iterator<Item = (&'a String, &'a Value)> + 'a> {
        match self.at(key).as_object() {
            Some(map) => Box::new(map.iter()),
            None => Box::new(std::iter::empty()),
        }
    }

    fn has(&self, key: &str) -> bool {
        !self.at(key).is_null()
    }

    fn is_blank(&self) -> bool {
        match self {
            Value::Null => true,
            Value::String(text) => text.is_empty(),
            Value::Array(items) => items.is_empty(),
            Value::Object(map) => map.is_empty(),
            _ => false,
        }
    }
}

/// The object in this field, made when it is absent or null; none when `object` is no object or the field holds something else.
pub(crate) fn section<'a>(object: &'a mut Value, key: &str) -> Option<&'a mut Map<String, Value>> {
    let map = object.as_object_mut()?;
    let field = map.entry(key).or_insert(Value::Null);
    if field.is_null() {
        *field = Value::Object(Map::new());
    }
    field.as_object_mut()
}

/// The field, when it is present and not null.
pub(crate) fn present<'a>(object: &'a mut Value, key: &str) -> Option<&'a mut Value> {
    object.get_mut(key).filter(|value| !value.is_null())
}

/// The items of the list in this field, none when it is absent.
pub(crate) fn items_mut<'a>(object: &'a mut Value, key: &str) -> impl Iterator<Item = &'a mut Value> {
    object.get_mut(key).and_then(Value::as_array_mut).into_iter().flatten()
}

/// Sets the field unless it already has a value.
pub(crate) fn fill(object: &mut Value, key: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut() {
        let field = map.entry(key).or_insert(Value::Null);
        if field.is_null() {
            *field = value.into();
        }
    }
}

/// Sets the field unless it already has a value that is not the empty string.
pub(crate) fn fill_text(object: &mut Value, key: &str, value: &str) {
    if object.text(key).is_empty() && (object.at(key).is_null() || object.at(key).is_string()) {
        put(object, key, value);
    }
}

/// Sets the field.
pub(crate) fn put(object: &mut Value, key: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut() {
        map.insert(key.to_owned(), value.into());
    }
}

/// Removes the field.
pub(crate) fn drop_field(object: &mut Value, key: &str) -> Option<Value> {
    object.as_object_mut().and_then(|map| map.shift_remove(key))
}

/// Copies the field from `old`, removing it when `old` has none.
pub(crate) fn keep_from(object: &mut Value, old: &Value, key: &str) {
    match old.get(key) {
        Some(value) => put(object, key, value.clone()),
        None => {
            drop_field(object, key);
        }
    }
}

/// A single value and the list that begins with it: whichever is missing follows the other, and where they differ the
/// single value is right, as older clients know only that (`podCIDR` and `podCIDRs`). `wrap` makes an item of a value.
pub(crate) fn pair(
    object: &mut Value,
    single: &str,
    list: &str,
    wrap: fn(Value) -> Value,
    unwrap: fn(&Value) -> &Value,
) {
    let first = object.list(list).first().map(|item| unwrap(item).clone());
    let own = object.at(single).clone();
    match first {
        Some(first) if own.is_blank() => put(object, single, first),
        Some(first) if first == own => {}
        None if own.is_blank() => {}
        _ => put(object, list, Value::Array(vec![wrap(own)])),
    }
}
