//! `get` and `list`.

use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use hyper::body::Bytes;
use serde_json::{Map, Value, json};

use super::{Call, Reply, api_version, convert, render};
use crate::request::Form;
use crate::resource::{FieldError, ResourceKind};
use crate::selector::{FieldSelector, LabelSelector};
use crate::status::ApiError;
use crate::store::{Key, Stored};

/// The object of a call, as stored.
pub(crate) fn stored(call: &Call) -> Result<Arc<Stored>, ApiError> {
    let key = Key::new(&call.target.namespace, &call.target.name);
    call.core.store.get(&call.kind.storage_key, &key).ok_or_else(|| ApiError::not_found(&call.kind, &call.target.name))
}

/// A stored object in the version of this kind.
pub(crate) fn parsed(kind: &ResourceKind, stored: &Stored) -> Result<Value, ApiError> {
    let mut object = stored.value().map_err(|error| {
        ApiError::internal(format!("stored {} {} is damaged: {error}", kind.plural, stored.key.name))
    })?;
    convert::to_version(kind, &mut object);
    Ok(object)
}

/// The JSON text of a stored object in the version of this kind.
pub(crate) fn text(kind: &ResourceKind, shared: bool, stored: &Stored) -> Result<Bytes, ApiError> {
    if !shared {
        return Ok(stored.json.clone());
    }
    Ok(Bytes::from(parsed(kind, stored)?.to_string()))
}

/// Whether other versions or groups share this kind's storage.
pub(crate) fn is_shared(call: &Call) -> bool {
    let served = call.core.registry.served();
    served.kinds.iter().filter(|kind| kind.storage_key == call.kind.storage_key).count() > 1
}

pub(crate) fn get(call: &Call) -> Result<Reply, ApiError> {
    let stored = stored(call)?;
    if let Some(asked) = call.query.number::<u64>("resourceVersion")? {
        refuse_future(asked, call.core.store.version())?;
    }
    if call.accept == crate::request::Accept::default() {
        return Ok(Reply::Json(text(&call.kind, is_shared(call), &stored)?));
    }
    Ok(Reply::Object(200, parsed(&call.kind, &stored)?))
}

/// A version that was never given out cannot be waited for.
pub(crate) fn refuse_future(asked: u64, current: u64) -> Result<(), ApiError> {
    if asked > current { Err(ApiError::version_too_large(asked, current)) } else { Ok(()) }
}

/// The selectors of a list, watch or collection delete.
#[derive(Clone)]
pub(crate) struct Selection {
    labels: LabelSelector,
    fields: FieldSelector,
}

impl Selection {
    pub(crate) fn of(call: &Call) -> Result<Self, ApiError> {
        let labels = LabelSelector::parse(call.query.get("labelSelector"))?;
        let mut fields = call.query.get("fieldSelector").to_owned();
        if !call.target.name.is_empty() {
            fields = format!("metadata.name={}", call.target.name);
        }
        let name = format!("{}, Kind={}", api_version(&call.kind), call.kind.gvk.kind);
        let fields = FieldSelector::parse(&fields, call.kind.strategy.as_ref(), &name)?;
        Ok(Self { labels, fields })
    }

    pub(crate) fn is_all(&self) -> bool {
        self.labels.is_empty() && self.fields.is_empty()
    }

    pub(crate) fn matches(&self, kind: &ResourceKind, stored: &Stored) -> bool {
        let parse = || parsed(kind, stored).unwrap_or_default();
        self.labels.matches(&stored.labels) && self.fields.matches(kind, stored, parse)
    }
}

/// The namespace of a call's collection; none for all.
pub(crate) fn collection(call: &Call) -> Option<&str> {
    Some(call.target.namespace.as_str()).filter(|namespace| !namespace.is_empty())
}

/// Where a limited list goes on.
struct Continue {
    version: u64,
    after: Key,
}

impl Continue {
    fn parse(token: &str) -> Result<Self, ApiError> {
        let bad = || ApiError::bad_request("continue key is not valid: it was not made by this server");
        let bytes = URL_SAFE_NO_PAD.decode(token).map_err(|_error| bad())?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|_error| bad())?;
        let version = value.get("rv").and_then(Value::as_u64).ok_or_else(bad)?;
        let field = |name: &str| value.get(name).and_then(Value::as_str).ok_or_else(bad);
        Ok(Self { version, after: Key::new(field("ns")?, field("name")?) })
    }

    fn token(&self) -> String {
        let value = json!({"rv": self.version, "ns": &*self.after.namespace, "name": &*self.after.name});
        URL_SAFE_NO_PAD.encode(value.to_string())
    }
}

fn list_options_invalid(field: &str, message: &str) -> ApiError {
    let error = FieldError { reason: "FieldValueForbidden", field: field.to_owned(), message: message.to_owned() };
    ApiError::invalid("meta.k8s.io", "ListOptions", "", &[error])
}

/// The objects of a state, its version, and the key after which a continued list goes on.
type Snapshot = (Vec<Arc<Stored>>, u64, Option<Key>);

/// The state that the call asks for.
fn snapshot(call: &Call) -> Result<Snapshot, ApiError> {
    let store = &call.core.store;
    let (table, namespace) = (call.kind.storage_key.as_ref(), collection(call));
    let token = call.query.get("continue");
    let matching = call.query.get("resourceVersionMatch");
    let asked = call.query.number::<u64>("resourceVersion")?;
    if !token.is_empty() {
        if asked.is_some_and(|version| version != 0) {
            return Err(ApiError::bad_request("specifying resource version is not allowed when using continue"));
        }
        let from = Continue::parse(token)?;
        let expired = "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue parameter.";
        let objects =
            store.list_at(table, namespace, from.version).map_err(|_old| ApiError::new(410, "Expired", expired))?;
        return Ok((objects, from.version, Some(from.after)));
    }
    if !matching.is_empty() && asked.is_none() {
        return Err(list_options_invalid(
            "resourceVersionMatch",
            "Forbidden: resourceVersionMatch is forbidden unless resourceVersion is provided",
        ));
    }
    match (matching, asked) {
        ("Exact", Some(0)) => Err(list_options_invalid(
            "resourceVersionMatch",
            "Forbidden: resourceVersionMatch \"Exact\" is forbidden for resourceVersion \"0\"",
        )),
        ("Exact", Some(version)) => {
            refuse_future(version, store.version())?;
            let objects =
                store.list_at(table, namespace, version).map_err(|old| ApiError::expired(version, old.oldest))?;
            Ok((objects, version, None))
        }
        ("" | "NotOlderThan", version) => {
            refuse_future(version.unwrap_or(0), store.version())?;
            let (objects, version) = store.list(table, namespace);
            Ok((objects, version, None))
        }
        _ => Err(list_options_invalid(
            "resourceVersionMatch",
            "Unsupported value: supported values: \"Exact\", \"NotOlderThan\", \"\"",
        )),
    }
}

pub(crate) fn list(call: &Call) -> Result<Reply, ApiError> {
    let selection = Selection::of(call)?;
    let limit = call.query.number::<usize>("limit")?.filter(|limit| *limit > 0);
    let (objects, version, after) = snapshot(call)?;
    let mut chosen: Vec<Arc<Stored>> = Vec::new();
    let mut more: Option<usize> = None;
    let mut rest = objects.iter().filter(|stored| after.as_ref().is_none_or(|after| stored.key > *after));
    for stored in rest.by_ref() {
        if !selection.matches(&call.kind, stored) {
            continue;
        }
        if limit.is_some_and(|limit| chosen.len() >= limit) {
            more = Some(1);
            break;
        }
        chosen.push(Arc::clone(stored));
    }
    let remaining = more.map(|one| one + rest.count());
    let mut head = Map::new();
    head.insert("resourceVersion".to_owned(), version.to_string().into());
    if let (Some(remaining), Some(last)) = (remaining, chosen.last()) {
        head.insert("continue".to_owned(), Continue { version, after: last.key.clone() }.token().into());
        if selection.is_all() {
            head.insert("remainingItemCount".to_owned(), remaining.into());
        }
    }
    let head = Value::Object(head);
    match call.accept.form {
        Form::Object if !call.accept.yaml => Ok(Reply::Json(list_text(call, &chosen, &head)?)),
        _ => render::list(call, &chosen, head),
    }
}

/// The list's JSON, put together from the objects' texts.
fn list_text(call: &Call, chosen: &[Arc<Stored>], head: &Value) -> Result<Bytes, ApiError> {
    let shared = is_shared(call);
    let size: usize = chosen.iter().map(|stored| stored.json.len() + 1).sum();
    let mut out = Vec::with_capacity(size + 256);
    let start = format!(
        "{{\"kind\":\"{}List\",\"apiVersion\":\"{}\",\"metadata\":{head},\"items\":[",
        call.kind.gvk.kind,
        call.api_version()
    );
    out.extend_from_slice(start.as_bytes());
    for (index, stored) in chosen.iter().enumerate() {
        if index > 0 {
            out.push(b',');
        }
        out.extend_from_slice(&text(&call.kind, shared, stored)?);
    }
    out.extend_from_slice(b"]}");
    Ok(Bytes::from(out))
}
