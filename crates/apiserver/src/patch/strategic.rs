//! Strategic merge patches with their directives: `$patch`, `$retainKeys`, `$setElementOrder`, `$deleteFromPrimitiveList`.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::fields::Place;
use crate::resource::Strategy;
use crate::status::ApiError;

const PATCH: &str = "$patch";
const RETAIN: &str = "$retainKeys";
const ORDER: &str = "$setElementOrder/";
const DELETE_PRIMITIVES: &str = "$deleteFromPrimitiveList/";

/// Applies a patch to an object.
pub(crate) fn strategic_merge(strategy: &dyn Strategy, original: &Value, patch: &Value) -> Result<Value, ApiError> {
    match (original, patch) {
        (Value::Object(original), Value::Object(patch)) => {
            Ok(Value::Object(merge_map(&Place::root(strategy), original, patch)?))
        }
        _ => Err(ApiError::bad_request("a strategic merge patch must be an object")),
    }
}

fn directive(patch: &Map<String, Value>) -> Result<&str, ApiError> {
    match patch.get(PATCH) {
        None => Ok(""),
        Some(Value::String(text)) if matches!(text.as_str(), "merge" | "replace" | "delete") => Ok(text),
        Some(other) => Err(ApiError::bad_request(format!("Unknown patch type found: {other}"))),
    }
}

fn merge_map(
    place: &Place<'_>,
    original: &Map<String, Value>,
    patch: &Map<String, Value>,
) -> Result<Map<String, Value>, ApiError> {
    match directive(patch)? {
        "replace" => {
            let mut new = patch.clone();
            new.shift_remove(PATCH);
            return Ok(new);
        }
        "delete" => return Ok(Map::new()),
        _ => {}
    }
    let mut out = original.clone();
    if let Some(retain) = patch.get(RETAIN).and_then(Value::as_array) {
        out.retain(|key, _| retain.iter().any(|kept| kept.as_str() == Some(key)));
    }
    let mut orders: BTreeMap<&str, &Vec<Value>> = BTreeMap::new();
    for (key, value) in patch {
        if let (Some(name), Some(order)) = (key.strip_prefix(ORDER), value.as_array()) {
            orders.insert(name, order);
        } else if let (Some(name), Some(gone)) = (key.strip_prefix(DELETE_PRIMITIVES), value.as_array())
            && let Some(Value::Array(list)) = out.get_mut(name)
        {
            list.retain(|item| !gone.contains(item));
        }
    }
    for (key, value) in patch.iter().filter(|(key, _)| !key.starts_with('$')) {
        if value.is_null() {
            out.shift_remove(key);
            continue;
        }
        let merged = merge_value(&place.field(key), out.get(key), value)?;
        out.insert(key.clone(), merged);
    }
    for (name, order) in orders {
        let key = place.field(name).merge().patch_merge_key;
        let before = original.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
        if let Some(Value::Array(list)) = out.get_mut(name) {
            let sorted = in_order(std::mem::take(list), order, &before, key.as_deref());
            *list = sorted;
        }
    }
    Ok(out)
}

fn merge_value(place: &Place<'_>, original: Option<&Value>, patch: &Value) -> Result<Value, ApiError> {
    match patch {
        Value::Object(patch) => {
            let empty = Map::new();
            let original = original.and_then(Value::as_object).unwrap_or(&empty);
            Ok(Value::Object(merge_map(place, original, patch)?))
        }
        Value::Array(patch) => {
            let rule = place.merge();
            if !rule.patch_merge {
                return Ok(Value::Array(patch.clone()));
            }
            let original = original.and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
            match rule.patch_merge_key {
                Some(key) => Ok(Value::Array(merge_list(place, &key, original, patch)?)),
                None => {
                    let mut out = original.to_vec();
                    out.extend(patch.iter().filter(|item| !original.contains(item)).cloned());
                    Ok(Value::Array(out))
                }
            }
        }
        scalar => Ok(scalar.clone()),
    }
}

fn merge_list(place: &Place<'_>, key: &str, original: &[Value], patch: &[Value]) -> Result<Vec<Value>, ApiError> {
    let items: Vec<&Map<String, Value>> = patch
        .iter()
        .map(|item| {
            item.as_object().ok_or_else(|| {
                ApiError::bad_request(format!("a list merged by {key:?} must hold objects, but the patch has {item}"))
            })
        })
        .collect::<Result<_, _>>()?;
    let replaces = |item: &&&Map<String, Value>| item.get(PATCH).and_then(Value::as_str) == Some("replace");
    if items.iter().any(|item| replaces(&item)) {
        // The rest of the list is the new one as it is: items with the same key (a node's addresses) do not merge.
        let plain = items.iter().filter(|item| !item.contains_key(PATCH));
        return Ok(plain.map(|item| Value::Object((*item).clone())).collect());
    }
    let mut out: Vec<Value> = original.to_vec();
    for item in items {
        let wanted = item.get(key);
        match (directive(item)?, wanted) {
            ("replace", None) => {}
            ("delete", Some(wanted)) => out.retain(|have| have.get(key) != Some(wanted)),
            (_, None) => {
                return Err(ApiError::bad_request(format!(
                    "map: {} does not contain declared merge key: {key}",
                    Value::Object(item.clone())
                )));
            }
            (_, Some(wanted)) => match out.iter_mut().find(|have| have.get(key) == Some(wanted)) {
                Some(have) => *have = merge_value(place, Some(have), &Value::Object(item.clone()))?,
                None => out.push(merge_value(place, None, &Value::Object(item.clone()))?),
            },
        }
    }
    Ok(out)
}

/// Items that the order names in its order; the others stay before those they came before in the original list.
fn in_order(list: Vec<Value>, order: &[Value], before: &[Value], key: Option<&str>) -> Vec<Value> {
    let identity = |item: &Value| match key {
        Some(key) => item.get(key).cloned().unwrap_or(Value::Null),
        None => item.clone(),
    };
    let rank = |item: &Value| order.iter().position(|wanted| identity(wanted) == identity(item));
    let place = |item: &Value| before.iter().position(|have| identity(have) == identity(item));
    let (mut named, others): (Vec<Value>, Vec<Value>) = list.into_iter().partition(|item| rank(item).is_some());
    named.sort_by_key(|item| rank(item));
    let mut out = Vec::new();
    let mut others = others.into_iter().peekable();
    for item in named {
        while let Some(other) = others.peek() {
            let comes_first = matches!((place(other), place(&item)), (Some(a), Some(b)) if a < b);
            if !comes_first {
                break;
            }
            out.extend(others.next());
        }
        out.push(item);
    }
    out.extend(others);
    out
}
