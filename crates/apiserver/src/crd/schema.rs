//! Structural schemas (`openAPIV3Schema`): defaults, pruning, validation, merge rules.
//!
//! Messages follow the validation library that kube-apiserver uses (`kube-openapi/pkg/validation`).

use serde_json::{Map, Value};

use crate::meta;
use crate::resource::{FieldError, ListMerge};

fn is_true(schema: &Value, field: &str) -> bool {
    schema.get(field).and_then(Value::as_bool).unwrap_or(false)
}

/// The schema below a path of field names; list items are not named.
pub(super) fn at<'a>(schema: &'a Value, path: &[&str]) -> Option<&'a Value> {
    let mut found = schema;
    for name in path {
        found = inside_lists(found);
        found = match found.get("properties").and_then(|properties| properties.get(name)) {
            Some(property) => property,
            None => found.get("additionalProperties").filter(|schema| schema.is_object())?,
        };
    }
    Some(found)
}

fn inside_lists(mut schema: &Value) -> &Value {
    while let Some(items) = schema.get("items") {
        schema = items;
    }
    schema
}

/// `x-kubernetes-list-type`, when the schema is of a list.
pub(super) fn list_merge(schema: &Value) -> Option<ListMerge> {
    if meta::text(schema, "/type") != "array" {
        return None;
    }
    Some(match meta::text(schema, "/x-kubernetes-list-type") {
        "set" => ListMerge::Set,
        "map" => {
            let keys = meta::strings(schema.get("x-kubernetes-list-map-keys"));
            ListMerge::Map(keys.into_iter().map(Into::into).collect())
        }
        _ => ListMerge::Atomic,
    })
}

/// Fills in `default` values.
pub(super) fn default(schema: &Value, value: &mut Value) {
    match value {
        Value::Object(map) => {
            let properties = schema.get("properties").and_then(Value::as_object);
            for (name, property) in properties.into_iter().flatten() {
                let missing = match map.get(name) {
                    None => true,
                    Some(Value::Null) => !is_true(property, "nullable"),
                    Some(_) => false,
                };
                if missing && let Some(given) = property.get("default") {
                    map.insert(name.clone(), given.clone());
                }
                if let Some(below) = map.get_mut(name) {
                    default(property, below);
                }
            }
            if let Some(more) = schema.get("additionalProperties").filter(|more| more.is_object()) {
                map.values_mut().for_each(|below| default(more, below));
            }
        }
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                items.iter_mut().for_each(|item| default(schema, item));
            }
        }
        _ => {}
    }
}

/// Removes fields the schema does not specify and names them.
pub(super) fn prune(schema: &Value, value: &mut Value, path: &str, resource: bool, unknown: &mut Vec<String>) {
    match value {
        Value::Object(map) => prune_map(schema, map, path, resource, unknown),
        Value::Array(items) => {
            if let Some(schema) = schema.get("items") {
                for (index, item) in items.iter_mut().enumerate() {
                    let embedded = is_true(schema, "x-kubernetes-embedded-resource");
                    prune(schema, item, &format!("{path}[{index}]"), embedded, unknown);
                }
            }
        }
        _ => {}
    }
}

fn prune_map(schema: &Value, map: &mut Map<String, Value>, path: &str, resource: bool, unknown: &mut Vec<String>) {
    let keeps = is_true(schema, "x-kubernetes-preserve-unknown-fields");
    let properties = schema.get("properties").and_then(Value::as_object);
    let more = schema.get("additionalProperties");
    let mut gone = Vec::new();
    for (name, below) in map.iter_mut() {
        let at = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        if resource && matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            continue;
        }
        if let Some(property) = properties.and_then(|properties| properties.get(name)) {
            prune(property, below, &at, is_true(property, "x-kubernetes-embedded-resource"), unknown);
        } else {
            match more {
                Some(schema @ Value::Object(_)) => prune(schema, below, &at, false, unknown),
                Some(Value::Bool(true)) => {}
                _ if keeps => {}
                _ => gone.push((name.clone(), at)),
            }
        }
    }
    for (name, at) in gone {
        map.shift_remove(&name);
        unknown.push(at);
    }
}

/// A schema's own mistakes: types must be given, keywords known to be forbidden in structural schemas are refused.
pub(super) fn check(schema: &Value, path: &str, root: bool, errors: &mut Vec<FieldError>) {
    let kind = meta::text(schema, "/type");
    let free = is_true(schema, "x-kubernetes-int-or-string") || is_true(schema, "x-kubernetes-preserve-unknown-fields");
    if root && kind != "object" {
        let message = format!("Invalid value: {kind:?}: must be object at the root");
        errors.push(FieldError { reason: "FieldValueInvalid", field: format!("{path}.type"), message });
    } else if kind.is_empty() && !free {
        let message = "Required value: must not be empty for specified object fields".to_owned();
        errors.push(FieldError { reason: "FieldValueRequired", field: format!("{path}.type"), message });
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
        && regex::Regex::new(pattern).is_err()
    {
        let message = format!("Invalid value: {pattern:?}: must be a valid regular expression, but isn't");
        errors.push(FieldError { reason: "FieldValueInvalid", field: format!("{path}.pattern"), message });
    }
    for (name, property) in schema.get("properties").and_then(Value::as_object).into_iter().flatten() {
        if !(root && name == "metadata") {
            check(property, &format!("{path}.properties[{name}]"), false, errors);
        }
    }
    if let Some(items) = schema.get("items") {
        check(items, &format!("{path}.items"), false, errors);
    }
    if let Some(more) = schema.get("additionalProperties").filter(|more| more.is_object()) {
        check(more, &format!("{path}.additionalProperties"), false, errors);
    }
}

fn shown(path: &str) -> &str {
    if path.is_empty() { "<nil>" } else { path }
}

struct Checker<'a> {
    path: &'a str,
    value: &'a Value,
    errors: &'a mut Vec<FieldError>,
}

impl Checker<'_> {
    fn invalid(&mut self, why: &str) {
        let message = format!("Invalid value: {}: {} in body {why}", self.value, shown(self.path));
        self.errors.push(FieldError { reason: "FieldValueInvalid", field: shown(self.path).to_owned(), message });
    }
}

/// Adds what is wrong with a value.
pub(super) fn validate(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    if value.is_null() && (is_true(schema, "nullable") || path.is_empty()) {
        return;
    }
    let mut checker = Checker { path, value, errors };
    if !type_fits(schema, value) {
        let kind = type_name(schema);
        let value_type = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(number) if number.is_f64() => "number",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let message =
            format!("Invalid value: {value_type:?}: {} in body must be of type {kind}: {value_type:?}", shown(path));
        let field = shown(path).to_owned();
        errors.push(FieldError { reason: "FieldValueTypeInvalid", field, message });
        return;
    }
    check_enum(schema, &mut checker);
    match value {
        Value::Number(number) => check_number(schema, number.as_f64().unwrap_or(0.0), &mut checker),
        Value::String(text) => check_text(schema, text, &mut checker),
        Value::Array(items) => check_list(schema, items, path, errors),
        Value::Object(map) => check_map(schema, map, path, errors),
        _ => {}
    }
    check_combinations(schema, value, path, errors);
}

fn type_name(schema: &Value) -> &str {
    if is_true(schema, "x-kubernetes-int-or-string") { "integer,string" } else { meta::text(schema, "/type") }
}

fn type_fits(schema: &Value, value: &Value) -> bool {
    if is_true(schema, "x-kubernetes-int-or-string") {
        return value.is_string() || value.is_i64() || value.is_u64();
    }
    match meta::text(schema, "/type") {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "integer" => value.is_i64() || value.is_u64() || value.as_f64().is_some_and(|number| number.fract() == 0.0),
        "number" => value.is_number(),
        _ => true,
    }
}

fn check_enum(schema: &Value, checker: &mut Checker<'_>) {
    let Some(allowed) = schema.get("enum").and_then(Value::as_array) else { return };
    if !allowed.contains(checker.value) {
        let list: Vec<String> = allowed.iter().map(Value::to_string).collect();
        let message = format!("Unsupported value: {}: supported values: {}", checker.value, list.join(", "));
        let field = shown(checker.path).to_owned();
        checker.errors.push(FieldError { reason: "FieldValueNotSupported", field, message });
    }
}

fn check_number(schema: &Value, number: f64, checker: &mut Checker<'_>) {
    let bound = |field: &str| schema.get(field).and_then(Value::as_f64);
    if let Some(minimum) = bound("minimum") {
        if is_true(schema, "exclusiveMinimum") && number <= minimum {
            checker.invalid(&format!("should be greater than {minimum}"));
        } else if number < minimum {
            checker.invalid(&format!("should be greater than or equal to {minimum}"));
        }
    }
    if let Some(maximum) = bound("maximum") {
        if is_true(schema, "exclusiveMaximum") && number >= maximum {
            checker.invalid(&format!("should be less than {maximum}"));
        } else if number > maximum {
            checker.invalid(&format!("should be less than or equal to {maximum}"));
        }
    }
    if let Some(unit) = bound("multipleOf")
        && unit != 0.0
        && (number / unit).fract() != 0.0
    {
        checker.invalid(&format!("should be a multiple of {unit}"));
    }
    let in_range = match meta::text(schema, "/format") {
        "int32" => number >= f64::from(i32::MIN) && number <= f64::from(i32::MAX),
        _ => true,
    };
    if !in_range {
        checker.invalid("must be of type int32");
    }
}

fn check_text(schema: &Value, text: &str, checker: &mut Checker<'_>) {
    let bound = |field: &str| schema.get(field).and_then(Value::as_u64);
    let length = text.chars().count() as u64;
    if let Some(minimum) = bound("minLength").filter(|minimum| length < *minimum) {
        checker.invalid(&format!("should be at least {minimum} chars long"));
    }
    if let Some(maximum) = bound("maxLength").filter(|maximum| length > *maximum) {
        let unit = if maximum == 1 { "byte" } else { "bytes" };
        let field = shown(checker.path).to_owned();
        let message = format!("Too long: may not be more than {maximum} {unit}");
        checker.errors.push(FieldError { reason: "FieldValueTooLong", field, message });
    }
    if let Some(pattern) = schema.get("pattern").and_then(Value::as_str)
        && regex::Regex::new(pattern).is_ok_and(|regex| !regex.is_match(text))
    {
        checker.invalid(&format!("should match '{pattern}'"));
    }
    let format = meta::text(schema, "/format");
    if !format_fits(format, text) {
        let field = shown(checker.path).to_owned();
        let message = format!("Invalid value: {text:?}: {field} in body must be of type {format}: {text:?}");
        checker.errors.push(FieldError { reason: "FieldValueInvalid", field, message });
    }
}

fn format_fits(format: &str, text: &str) -> bool {
    match format {
        "ipv4" => text.parse::<std::net::Ipv4Addr>().is_ok(),
        "ipv6" => text.parse::<std::net::Ipv6Addr>().is_ok(),
        "cidr" => text.parse::<ipnet::IpNet>().is_ok(),
        "date-time" => text.parse::<jiff::Timestamp>().is_ok(),
        "date" => text.parse::<jiff::civil::Date>().is_ok(),
        "uuid" => uuid::Uuid::parse_str(text).is_ok(),
        "byte" => {
            use base64::Engine;
            base64::engine::general_purpose::STANDARD.decode(text).is_ok()
        }
        _ => true,
    }
}

fn check_list(schema: &Value, items: &[Value], path: &str, errors: &mut Vec<FieldError>) {
    let bound = |field: &str| schema.get(field).and_then(Value::as_u64);
    let count = items.len() as u64;
    let field = || shown(path).to_owned();
    if let Some(maximum) = bound("maxItems").filter(|maximum| count > *maximum) {
        let message = format!("Too many: {count}: must have at most {maximum} items");
        errors.push(FieldError { reason: "FieldValueTooMany", field: field(), message });
    }
    if let Some(minimum) = bound("minItems").filter(|minimum| count < *minimum) {
        let message = format!("Invalid value: {count}: {} in body should have at least {minimum} items", field());
        errors.push(FieldError { reason: "FieldValueInvalid", field: field(), message });
    }
    let keys: Option<Vec<String>> = match list_merge(schema) {
        Some(ListMerge::Set) => Some(Vec::new()),
        Some(ListMerge::Map(keys)) => Some(keys.iter().map(ToString::to_string).collect()),
        _ => is_true(schema, "uniqueItems").then(Vec::new),
    };
    if let Some(keys) = keys {
        let identity = |item: &Value| -> Value {
            if keys.is_empty() {
                return item.clone();
            }
            keys.iter()
                .map(|key| (key.clone(), item.get(key).cloned().unwrap_or_default()))
                .collect::<Map<_, _>>()
                .into()
        };
        let identities: Vec<Value> = items.iter().map(identity).collect();
        for (index, identity) in identities.iter().enumerate() {
            if identities.iter().take(index).any(|earlier| earlier == identity) {
                let message = format!("Duplicate value: {identity}");
                errors.push(FieldError { reason: "FieldValueDuplicate", field: format!("{path}[{index}]"), message });
            }
        }
    }
    if let Some(schema) = schema.get("items") {
        for (index, item) in items.iter().enumerate() {
            validate(schema, item, &format!("{path}[{index}]"), errors);
        }
    }
}

fn check_map(schema: &Value, map: &Map<String, Value>, path: &str, errors: &mut Vec<FieldError>) {
    let below = |name: &str| if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") };
    for name in meta::strings(schema.get("required")) {
        if !map.contains_key(&name) {
            let message = "Required value".to_owned();
            errors.push(FieldError { reason: "FieldValueRequired", field: below(&name), message });
        }
    }
    let bound = |field: &str| schema.get(field).and_then(Value::as_u64);
    let count = map.len() as u64;
    let mut refuse = |why: String| {
        let field = shown(path).to_owned();
        let message = format!("Invalid value: {count}: {field} in body {why}");
        errors.push(FieldError { reason: "FieldValueInvalid", field, message });
    };
    if let Some(minimum) = bound("minProperties").filter(|minimum| count < *minimum) {
        refuse(format!("should have at least {minimum} properties"));
    }
    if let Some(maximum) = bound("maxProperties").filter(|maximum| count > *maximum) {
        refuse(format!("should have at most {maximum} properties"));
    }
    let properties = schema.get("properties").and_then(Value::as_object);
    for (name, value) in map {
        if path.is_empty() && matches!(name.as_str(), "metadata" | "apiVersion" | "kind") {
            continue;
        }
        if let Some(property) = properties.and_then(|properties| properties.get(name)) {
            validate(property, value, &below(name), errors);
        } else if let Some(more) = schema.get("additionalProperties").filter(|more| more.is_object()) {
            validate(more, value, &below(name), errors);
        }
    }
}

fn check_combinations(schema: &Value, value: &Value, path: &str, errors: &mut Vec<FieldError>) {
    let fits = |schema: &Value| {
        let mut inner = Vec::new();
        validate(schema, value, path, &mut inner);
        inner.is_empty()
    };
    let list = |field: &str| schema.get(field).and_then(Value::as_array);
    for one in list("allOf").into_iter().flatten() {
        validate(one, value, path, errors);
    }
    let mut refuse = |why: &str| {
        let field = shown(path).to_owned();
        let message = format!("Invalid value: {value}: {field} in body {why}");
        errors.push(FieldError { reason: "FieldValueInvalid", field, message });
    };
    if list("anyOf").is_some_and(|all| !all.iter().any(fits)) {
        refuse("must validate at least one schema (anyOf)");
    }
    if list("oneOf").is_some_and(|all| all.iter().filter(|one| fits(one)).count() != 1) {
        refuse("must validate one and only one schema (oneOf)");
    }
    if schema.get("not").is_some_and(fits) {
        refuse("must not validate the schema (not)");
    }
}
