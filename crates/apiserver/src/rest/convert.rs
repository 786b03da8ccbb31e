//! Resources that share a storage: several versions of a custom resource, and `events` of core and `events.k8s.io`.
//!
//! Custom versions differ in `apiVersion` only (conversion strategy `None`). Events are stored in the form in which they
//! were written and read in the one asked for.

use serde_json::{Map, Value};

use super::api_version;
use crate::meta;
use crate::resource::ResourceKind;

/// Core name and events.k8s.io name of the event fields that differ.
const EVENT_FIELDS: [(&str, &str); 7] = [
    ("involvedObject", "regarding"),
    ("message", "note"),
    ("reportingComponent", "reportingController"),
    ("source", "deprecatedSource"),
    ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"),
    ("count", "deprecatedCount"),
];

/// Makes a stored object one of this kind's version.
pub(crate) fn to_version(kind: &ResourceKind, object: &mut Value) {
    let wanted = api_version(kind);
    let have = meta::text(object, "/apiVersion");
    if have == wanted {
        return;
    }
    if kind.gvk.kind == "Event" {
        let to_new = kind.gvk.group == "events.k8s.io";
        rename_event(meta::as_map(object), to_new);
    }
    let map = meta::as_map(object);
    map.insert("apiVersion".to_owned(), wanted.into());
    map.insert("kind".to_owned(), kind.gvk.kind.as_ref().into());
}

fn rename_event(event: &mut Map<String, Value>, to_new: bool) {
    for (core, new) in EVENT_FIELDS {
        let (from, to) = if to_new { (core, new) } else { (new, core) };
        if let Some(value) = event.shift_remove(from) {
            event.insert(to.to_owned(), value);
        }
    }
}
