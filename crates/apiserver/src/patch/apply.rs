//! Server-side apply: merge a configuration into an object, with ownership and conflicts.
//!
//! Rules as in `structured-merge-diff`: a manager's last applied fields that are no longer in its configuration go away
//! unless somebody else owns them; a field that another manager owns with another value is a conflict unless forced;
//! applying the same value makes both owners.

use serde_json::{Map, Value, json};

use super::fields::{Difference, FieldSet, Place, Shape, fields_of, item_element, shape};
use super::managed::{self, Entry};
use crate::meta;
use crate::resource::{ListMerge, ResourceKind};
use crate::rest::api_version;
use crate::status::ApiError;

/// Who applies and how.
pub(crate) struct Applier<'a> {
    pub(crate) manager: &'a str,
    pub(crate) force: bool,
    /// Empty or `status`.
    pub(crate) subresource: &'a str,
}

/// The object after applying; its managedFields are up to date.
pub(crate) fn apply(kind: &ResourceKind, live: &Value, config: &Value, by: &Applier<'_>) -> Result<Value, ApiError> {
    let strategy = kind.strategy.as_ref();
    let root = Place::root(strategy);
    let mut entries = managed::entries(live);
    let mut config = config.clone();
    meta::remove_meta(&mut config, "managedFields");
    let mut own = fields_of(&root, &config);
    own.strip_identity();
    keep_endpoint(kind, &mut own, by.subresource);
    let mut merged = merge(&root, Some(live), &config);
    let mut others = FieldSet::default();
    let mut previous = FieldSet::default();
    for entry in &entries {
        if entry.is(by.manager, "Apply", by.subresource) {
            previous.union(&entry.fields);
        } else {
            others.union(&entry.fields);
        }
    }
    let mut kept = others;
    kept.union(&own);
    previous.subtract(&kept);
    prune(&root, &mut merged, &previous, &kept);
    let changed = Difference::between(strategy, live, &merged).changed;
    let contested = changed.intersection(&own);
    resolve(kind, live, &mut entries, &contested, by)?;
    entries.retain(|entry| !entry.is(by.manager, "Apply", by.subresource));
    entries.push(Entry {
        manager: by.manager.to_owned(),
        operation: "Apply".to_owned(),
        api_version: api_version(kind),
        subresource: by.subresource.to_owned(),
        time: unchanged_time(live, by, &own).unwrap_or_else(meta::now),
        fields: own,
    });
    managed::set_entries(&mut merged, entries);
    Ok(merged)
}

/// The time of the last apply when it owned the same fields.
fn unchanged_time(live: &Value, by: &Applier<'_>, own: &FieldSet) -> Option<String> {
    let entries = managed::entries(live);
    let last = entries.into_iter().find(|entry| entry.is(by.manager, "Apply", by.subresource))?;
    (last.fields == *own).then_some(last.time)
}

/// The main endpoint does not own status, the status endpoint owns nothing else.
fn keep_endpoint(kind: &ResourceKind, own: &mut FieldSet, subresource: &str) {
    if subresource == "status" {
        own.children.retain(|element, _| element == "f:status");
    } else if kind.status {
        own.children.remove("f:status");
    }
}

fn resolve(
    kind: &ResourceKind,
    live: &Value,
    entries: &mut [Entry],
    contested: &FieldSet,
    by: &Applier<'_>,
) -> Result<(), ApiError> {
    let mut causes: Vec<Value> = Vec::new();
    let mut texts: Vec<String> = Vec::new();
    for entry in entries.iter_mut().filter(|entry| !entry.is(by.manager, "Apply", by.subresource)) {
        let conflict = entry.fields.intersection(contested);
        if conflict.is_empty() {
            continue;
        }
        let with = if entry.subresource.is_empty() {
            format!("{:?} using {}", entry.manager, entry.api_version)
        } else {
            format!("{:?} with subresource {:?} using {}", entry.manager, entry.subresource, entry.api_version)
        };
        let paths = conflict.paths();
        for path in &paths {
            causes.push(
                json!({"reason": "FieldManagerConflict", "message": format!("conflict with {with}"), "field": path}),
            );
        }
        match paths.as_slice() {
            [one] => texts.push(format!("conflict with {with}: {one}")),
            many => texts.push(format!("conflicts with {with}:\n- {}", many.join("\n- "))),
        }
        entry.fields.subtract(&conflict);
    }
    if by.force || causes.is_empty() {
        return Ok(());
    }
    let plural = if causes.len() == 1 { "conflict" } else { "conflicts" };
    let message = format!("Apply failed with {} {plural}: {}", causes.len(), texts.join("\n"));
    let mut error = ApiError::new(409, "Conflict", message);
    error
        .set_details(json!({"name": meta::name(live), "group": kind.gvk.group, "kind": kind.plural, "causes": causes}));
    Err(error)
}

/// Puts a configuration over a live value.
fn merge(place: &Place<'_>, live: Option<&Value>, config: &Value) -> Value {
    match (live, config) {
        (Some(Value::Object(live)), Value::Object(new)) if !place.merge().atomic_map => {
            let mut out = live.clone();
            for (name, value) in new {
                let merged = merge(&place.field(name), live.get(name), value);
                out.insert(name.clone(), merged);
            }
            Value::Object(out)
        }
        (Some(Value::Array(live)), Value::Array(new)) => match place.merge().list {
            Some(ListMerge::Set) => {
                let mut out = live.clone();
                out.extend(new.iter().filter(|item| !live.contains(item)).cloned());
                Value::Array(out)
            }
            Some(ListMerge::Map(keys)) => Value::Array(merge_items(place, &keys, live, new)),
            _ => config.clone(),
        },
        _ => config.clone(),
    }
}

/// Items of the configuration in its order; items only the live object has stay where they are among the others.
fn merge_items(
    place: &Place<'_>,
    keys: &[std::borrow::Cow<'static, str>],
    live: &[Value],
    new: &[Value],
) -> Vec<Value> {
    let live_elements: Vec<String> = live.iter().map(|item| item_element(keys, item)).collect();
    let new_elements: Vec<String> = new.iter().map(|item| item_element(keys, item)).collect();
    let mut out: Vec<Value> = Vec::new();
    let mut pending = new.iter().zip(&new_elements).peekable();
    let find_live = |element: &String| live_elements.iter().position(|have| have == element);
    for (item, element) in live.iter().zip(&live_elements) {
        if !new_elements.contains(element) {
            out.push(item.clone());
            continue;
        }
        // New items that come before this one in the configuration come before it here.
        for (value, wanted) in pending.by_ref() {
            let old = find_live(wanted).and_then(|at| live.get(at));
            out.push(merge(place, old, value));
            if wanted == element {
                break;
            }
        }
    }
    for (value, wanted) in pending {
        out.push(merge(place, find_live(wanted).and_then(|at| live.get(at)), value));
    }
    out
}

/// Removes the members of `gone` unless something at or below them is in `kept`.
fn prune(place: &Place<'_>, value: &mut Value, gone: &FieldSet, kept: &FieldSet) {
    let none = FieldSet::default();
    match value {
        Value::Object(map) => {
            for (element, below) in &gone.children {
                let Some(name) = element.strip_prefix("f:") else { continue };
                let keep = kept.children.get(element).unwrap_or(&none);
                let Some(child) = map.get_mut(name) else { continue };
                if below.member && keep.is_empty() && matches!(shape(&place.field(name), child), Shape::Leaf) {
                    map.shift_remove(name);
                    continue;
                }
                prune(&place.field(name), child, below, keep);
                if keep.is_empty() && is_hollow(child) {
                    map.shift_remove(name);
                }
            }
        }
        Value::Array(items) => prune_items(place, items, gone, kept),
        _ => {}
    }
}

fn prune_items(place: &Place<'_>, items: &mut Vec<Value>, gone: &FieldSet, kept: &FieldSet) {
    let none = FieldSet::default();
    let list = place.merge().list;
    let element = |item: &Value| match &list {
        Some(ListMerge::Map(keys)) => item_element(keys, item),
        _ => format!("v:{item}"),
    };
    items.retain_mut(|item| {
        let name = element(item);
        let Some(below) = gone.children.get(&name) else { return true };
        let keep = kept.children.get(&name).unwrap_or(&none);
        if below.member && keep.is_empty() {
            return false;
        }
        prune(place, item, below, keep);
        true
    });
}

fn is_hollow(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(items) => items.is_empty(),
        _ => false,
    }
}

/// An empty object to apply a first configuration to.
pub(crate) fn nothing() -> Value {
    Value::Object(Map::new())
}
