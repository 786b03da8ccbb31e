//! Whether an object has the shape of its type: unknown fields, wrong types, merge rules of a path.

use serde_json::Value;

use super::schema::{Shape, Shapes, Type};
use crate::resource::{FieldMerge, ListMerge};

/// Removes fields that the type does not know and returns their paths. Does what else decoding into the type and encoding
/// again would: removes nulls and empty lists and maps of optional fields, writes quantities in canonical form.
pub(crate) fn prune(object: &mut Value, kind: &Type) -> Vec<String> {
    let mut unknown = Vec::new();
    prune_object(object, kind, "", &mut unknown);
    unknown
}

fn prune_object(object: &mut Value, kind: &Type, path: &str, unknown: &mut Vec<String>) {
    let Some(map) = object.as_object_mut() else { return };
    let mut here: Vec<String> = map.keys().filter(|key| kind.field(key).is_none()).cloned().collect();
    here.sort();
    for key in &here {
        map.shift_remove(key);
        unknown.push(join(path, key));
    }
    map.retain(|_, value| !value.is_null());
    for field in &kind.fields {
        let name: &str = &field.name;
        let Some(value) = map.get_mut(name) else { continue };
        prune_value(value, &field.shape, &join(path, name), unknown);
        let empty = match (&field.shape, &*value) {
            (Shape::List(_), Value::Array(items)) => items.is_empty(),
            (Shape::Map(_), Value::Object(entries)) => entries.is_empty(),
            _ => false,
        };
        if empty && !field.required {
            map.shift_remove(name);
        }
    }
}

fn prune_value(value: &mut Value, shape: &Shape, path: &str, unknown: &mut Vec<String>) {
    match shape {
        Shape::Object(place) => {
            if let Some(kind) = Shapes::get().at(*place) {
                prune_object(value, kind, path, unknown);
            }
        }
        Shape::List(item) if nests(item) => {
            for (index, value) in value.as_array_mut().into_iter().flatten().enumerate() {
                // Go decodes a null in a list of structs as one whose fields are all empty.
                if value.is_null() && matches!(**item, Shape::Object(_)) {
                    *value = Value::Object(serde_json::Map::new());
                }
                prune_value(value, item, &format!("{path}[{index}]"), unknown);
            }
        }
        // And one in a list of texts as the empty text.
        Shape::List(item) if **item == Shape::Text => {
            for value in value.as_array_mut().into_iter().flatten().filter(|value| value.is_null()) {
                *value = Value::from("");
            }
        }
        Shape::Map(item) if nests(item) => {
            for (key, value) in value.as_object_mut().into_iter().flatten() {
                prune_value(value, item, &format!("{path}[{key}]"), unknown);
            }
        }
        // Go decodes a null in a map of texts as the empty text.
        Shape::Map(item) if **item == Shape::Text => {
            for (_, value) in value.as_object_mut().into_iter().flatten() {
                if value.is_null() {
                    *value = Value::from("");
                }
            }
        }
        Shape::Quantity => {
            let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            if let Some(canonical) = super::quantity::canonical(&text) {
                *value = Value::from(canonical);
            }
        }
        _ => {}
    }
}

fn nests(shape: &Shape) -> bool {
    matches!(shape, Shape::Object(_) | Shape::List(_) | Shape::Map(_) | Shape::Quantity)
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// What Go's JSON decoder says of the first wrongly typed field, or none.
pub(crate) fn type_error(object: &Value, kind: &Type) -> Option<String> {
    if !object.is_object() {
        return Some(mismatch(object, kind, "", kind.go_name()));
    }
    object_error(object, kind, "")
}

fn object_error(object: &Value, kind: &Type, path: &str) -> Option<String> {
    let map = object.as_object()?;
    map.iter().filter(|(_, value)| !value.is_null()).find_map(|(name, value)| {
        let field = kind.field(name)?;
        value_error(value, &field.shape, kind, &join(path, name))
    })
}

fn value_error(value: &Value, shape: &Shape, owner: &Type, path: &str) -> Option<String> {
    if value.is_null() {
        return None;
    }
    let wrong = || Some(mismatch(value, owner, path, &go_type(shape)));
    match (shape, value) {
        (Shape::Any, _)
        | (Shape::Text, Value::String(_))
        | (Shape::Flag, Value::Bool(_))
        | (Shape::Float, Value::Number(_)) => None,
        (Shape::Int32, Value::Number(number)) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => None,
        (Shape::Int64, Value::Number(number)) if number.is_i64() => None,
        (Shape::Bytes, Value::String(text)) => base64_error(text),
        (Shape::Time, Value::String(text)) => time_error(text),
        (Shape::Time, _) => {
            Some(format!("json: cannot unmarshal {} into Go value of type string", json_type(value, false)))
        }
        (Shape::IntOrText, Value::String(_)) => None,
        (Shape::IntOrText, Value::Number(number)) if number.as_i64().is_some_and(|n| i32::try_from(n).is_ok()) => None,
        (Shape::IntOrText, _) => {
            Some(format!("json: cannot unmarshal {} into Go value of type int32", json_type(value, true)))
        }
        (Shape::Quantity, Value::String(text)) => quantity_error(text),
        (Shape::Quantity, Value::Number(number)) => quantity_error(&number.to_string()),
        (Shape::Quantity, _) => Some(super::quantity::MALFORMED.to_owned()),
        (Shape::List(item), Value::Array(values)) => {
            values.iter().find_map(|value| value_error(value, item, owner, path))
        }
        (Shape::Map(item), Value::Object(values)) => {
            values.values().find_map(|value| value_error(value, item, owner, path))
        }
        (Shape::Object(place), Value::Object(_)) => object_error(value, Shapes::get().at(*place)?, path),
        _ => wrong(),
    }
}

fn mismatch(value: &Value, owner: &Type, path: &str, target: &str) -> String {
    let integer = target == "int32" || target == "int64";
    let found = json_type(value, integer);
    if path.is_empty() {
        return format!("json: cannot unmarshal {found} into Go value of type {target}");
    }
    format!("json: cannot unmarshal {found} into Go struct field {}.{path} of type {target}", owner.short_name())
}

fn json_type(value: &Value, integer_wanted: bool) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "bool".to_owned(),
        Value::Number(number) if integer_wanted => format!("number {number}"),
        Value::Number(_) => "number".to_owned(),
        Value::String(_) => "string".to_owned(),
        Value::Array(_) => "array".to_owned(),
        Value::Object(_) => "object".to_owned(),
    }
}

fn go_type(shape: &Shape) -> String {
    match shape {
        Shape::Any => "interface {}".to_owned(),
        Shape::Text => "string".to_owned(),
        Shape::Bytes => "[]uint8".to_owned(),
        Shape::Time => "v1.Time".to_owned(),
        Shape::Flag => "bool".to_owned(),
        Shape::Int32 => "int32".to_owned(),
        Shape::Int64 => "int64".to_owned(),
        Shape::Float => "float64".to_owned(),
        Shape::IntOrText => "intstr.IntOrString".to_owned(),
        Shape::Quantity => "resource.Quantity".to_owned(),
        Shape::List(item) => format!("[]{}", go_type(item)),
        Shape::Map(item) => format!("map[string]{}", go_type(item)),
        Shape::Object(place) => Shapes::get().at(*place).map(|kind| kind.go_name().to_owned()).unwrap_or_default(),
    }
}

fn base64_error(text: &str) -> Option<String> {
    use base64::Engine;
    let packed: String = text.chars().filter(|c| *c != '\n' && *c != '\r').collect();
    match base64::engine::general_purpose::STANDARD.decode(&packed) {
        Ok(_) => None,
        Err(base64::DecodeError::InvalidByte(place, _) | base64::DecodeError::InvalidLastSymbol(place, _)) => {
            Some(format!("illegal base64 data at input byte {place}"))
        }
        Err(_) => Some(format!("illegal base64 data at input byte {}", packed.len() / 4 * 4)),
    }
}

fn time_error(text: &str) -> Option<String> {
    if text.is_empty() || text.parse::<jiff::Timestamp>().is_ok() {
        return None;
    }
    let text = super::fault::quote(text);
    Some(format!("parsing time {text} as \"2006-01-02T15:04:05Z07:00\": cannot parse {text} as \"2006\""))
}

fn quantity_error(text: &str) -> Option<String> {
    super::quantity::Quantity::parse(text).is_none().then(|| super::quantity::MALFORMED.to_owned())
}

/// How the field at `path` merges; see [`crate::resource::Strategy::merge`].
pub(crate) fn merge_at(kind: &Type, path: &[&str]) -> FieldMerge {
    let unknown = FieldMerge { list: Some(ListMerge::Atomic), ..super::merge::GRANULAR };
    let shapes = Shapes::get();
    let mut owner = Some(kind);
    let mut shape = Shape::Any;
    let mut merge = super::merge::GRANULAR;
    for name in path {
        // Below a map, the path names a key.
        if let Shape::Map(item) = &shape {
            merge = FieldMerge {
                list: matches!(**item, Shape::List(_)).then_some(ListMerge::Atomic),
                ..super::merge::GRANULAR
            };
            shape = (**item).clone();
        } else {
            let Some(field) = owner.and_then(|owner| owner.field(name)) else { return unknown };
            merge = field.merge.clone();
            shape = field.shape.clone();
        }
        while let Shape::List(item) = shape {
            shape = *item;
        }
        owner = match shape {
            Shape::Object(place) => shapes.at(place),
            _ => None,
        };
    }
    if path.is_empty() { super::merge::GRANULAR } else { merge }
}
