//! `create`: decoding, defaults, admission, validation, then one write.

use std::sync::Arc;

use serde_json::Value;

use super::update::Tracking;
use super::{Call, FieldValidation, Reply, api_version, subresources};
use crate::patch::managed;
use crate::request::decode_body;
use crate::status::ApiError;
use crate::store::{Expect, Key, WriteRefused};
use crate::{admission, auth, crd, meta};

/// How often a taken `generateName` is tried again.
const NAME_ATTEMPTS: usize = 8;

pub(crate) struct CreateOptions {
    pub(crate) tracking: Tracking,
}

pub(crate) async fn create(call: &Arc<Call>, body: &[u8]) -> Result<Reply, ApiError> {
    let mut object = decode_body(&call.headers, body)?;
    check_type(call, &mut object)?;
    if !call.kind.stored {
        if call.kind.gvk.kind == "Binding" {
            return subresources::bind(call, &object, meta::name(&object)).await;
        }
        return match auth::review(call, object)? {
            Some(answer) => Ok(Reply::Object(201, answer)),
            None => Err(ApiError::method_not_allowed(&call.kind, "create")),
        };
    }
    let tracking = Tracking::Update { manager: call.manager(), subresource: String::new() };
    let object = create_object(call, object, CreateOptions { tracking }).await?;
    Ok(Reply::Object(201, object))
}

/// `apiVersion`, `kind` and `metadata.namespace` must be those of the path; absent ones are filled in.
pub(crate) fn check_type(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let Some(map) = object.as_object_mut() else {
        return Err(ApiError::bad_request("the object provided is unrecognized: it is not an object"));
    };
    let wanted = api_version(&call.kind);
    let kind = call.kind.gvk.kind.as_ref();
    let have_version = map.get("apiVersion").and_then(Value::as_str).unwrap_or_default().to_owned();
    let have_kind = map.get("kind").and_then(Value::as_str).unwrap_or_default().to_owned();
    if have_kind.is_empty() != have_version.is_empty() {
        let missing = if have_kind.is_empty() { "Kind" } else { "apiVersion" };
        return Err(ApiError::bad_request(format!("Object '{missing}' is missing in '{}'", short(object))));
    }
    if !have_kind.is_empty() && (have_kind != kind || have_version != wanted) {
        return Err(ApiError::bad_request(format!(
            "the API version in the data ({have_version}, Kind={have_kind}) does not match the expected API version ({wanted}, Kind={kind})"
        )));
    }
    map.insert("apiVersion".to_owned(), wanted.into());
    map.insert("kind".to_owned(), kind.into());
    match map.get("metadata") {
        None | Some(Value::Null) => {
            meta::metadata(object);
        }
        Some(Value::Object(_)) => {}
        Some(_) => return Err(ApiError::bad_request("metadata must be an object")),
    }
    check_namespace(call, object)
}

fn short(object: &Value) -> String {
    let text = object.to_string();
    match text.char_indices().nth(200) {
        Some((at, _)) => format!("{}…", text.get(..at).unwrap_or_default()),
        None => text,
    }
}

fn check_namespace(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let given = meta::namespace(object);
    if call.kind.namespaced {
        if !given.is_empty() && given != call.target.namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        let namespace = Value::from(call.target.namespace.as_str());
        meta::set_meta(object, "namespace", namespace);
    } else if !given.is_empty() {
        meta::remove_meta(object, "namespace");
    }
    Ok(())
}

/// Types and unknown fields, as the request wants them treated. Unknown ones are removed.
pub(crate) fn check_fields(call: &Call, object: &mut Value) -> Result<(), ApiError> {
    let validation = call.field_validation()?;
    if let Some(message) = call.kind.strategy.type_error(object) {
        return Err(ApiError::bad_request(message));
    }
    let unknown = call.kind.strategy.prune_unknown_fields(object);
    match validation {
        FieldValidation::Ignore => {}
        FieldValidation::Warn => {
            for field in unknown {
                call.warn(format!("unknown field {field:?}"));
            }
        }
        FieldValidation::Strict if !unknown.is_empty() => {
            let list: Vec<String> = unknown.iter().map(|field| format!("unknown field {field:?}")).collect();
            let message = format!(
                "{} in version {:?} cannot be handled as a {}: strict decoding error: {}",
                call.kind.gvk.kind,
                call.kind.gvk.version,
                call.kind.gvk.kind,
                list.join(", ")
            );
            return Err(ApiError::bad_request(message));
        }
        FieldValidation::Strict => {}
    }
    Ok(())
}

/// Creates an object that has been decoded.
pub(crate) async fn create_object(call: &Call, mut object: Value, options: CreateOptions) -> Result<Value, ApiError> {
    check_fields(call, &mut object)?;
    let generate = meta::meta(&object, "generateName").to_owned();
    let generated = meta::name(&object).is_empty() && !generate.is_empty();
    if !call.target.name.is_empty() && meta::name(&object).is_empty() {
        meta::set_meta(&mut object, "name", call.target.name.as_str().into());
    }
    if !meta::meta(&object, "resourceVersion").is_empty() {
        return Err(ApiError::new(500, "", "resourceVersion should not be set on objects to be created"));
    }
    let mut attempt = 0;
    loop {
        attempt += 1;
        let mut candidate = object.clone();
        if generated {
            let prefix: String = generate.chars().take(58).collect();
            meta::set_meta(&mut candidate, "name", format!("{prefix}{}", meta::random_suffix(5)).into());
        }
        match create_once(call, candidate, &options).await {
            Err(error) if generated && error.reason == "AlreadyExists" && attempt < NAME_ATTEMPTS => {}
            other => return other,
        }
    }
}

async fn create_once(call: &Call, mut object: Value, options: &CreateOptions) -> Result<Value, ApiError> {
    let kind = &call.kind;
    name_type(call, &mut object);
    begin_metadata(&mut object);
    admission::admit_create(call, &mut object)?;
    kind.strategy.prepare_create(&mut object);
    kind.strategy.default_object(&mut object);
    let mut reservation = call.core.services.reserve(call, &mut object, None)?;
    if let Tracking::Update { manager, subresource } = &options.tracking {
        managed::track(kind, None, &mut object, manager, subresource);
    }
    let errors = kind.strategy.validate_create(&object);
    if !errors.is_empty() {
        return Err(ApiError::invalid_object(kind, meta::name(&object), &errors));
    }
    for warning in kind.strategy.warnings(&object) {
        call.warn(warning);
    }
    crd::check_definition(call, &mut object)?;
    let name = meta::name(&object).to_owned();
    let key = Key::new(meta::namespace(&object), &name);
    if call.dry_run {
        if call.core.store.get(&kind.storage_key, &key).is_some() {
            return Err(ApiError::already_exists(kind, &name));
        }
        return Ok(object);
    }
    let written = call
        .core
        .store
        .put(&kind.storage_key, &key, object, Expect::Absent)
        .map_err(|refused| refusal(call, &name, refused))?;
    reservation.keep();
    crd::changed(&call.core, kind, &written.object);
    call.core.store.wait_durable(written.version).await.map_err(ApiError::internal)?;
    Ok(written.object)
}

/// `apiVersion` and `kind` first, also for objects that the server makes itself.
fn name_type(call: &Call, object: &mut Value) {
    let map = meta::as_map(object);
    map.shift_insert(0, "apiVersion".to_owned(), call.api_version().into());
    map.shift_insert(0, "kind".to_owned(), call.kind.gvk.kind.as_ref().into());
}

/// Server-set metadata of a new object.
fn begin_metadata(object: &mut Value) {
    for field in ["selfLink", "deletionTimestamp", "deletionGracePeriodSeconds", "resourceVersion", "generation"] {
        meta::remove_meta(object, field);
    }
    meta::set_meta(object, "uid", uuid::Uuid::new_v4().to_string().into());
    meta::set_meta(object, "creationTimestamp", meta::now().into());
}

/// The answer for a write that the store refused.
pub(crate) fn refusal(call: &Call, name: &str, refused: WriteRefused) -> ApiError {
    match refused {
        WriteRefused::Exists => ApiError::already_exists(&call.kind, name),
        WriteRefused::Absent => ApiError::not_found(&call.kind, name),
        WriteRefused::Changed => ApiError::modified(&call.kind, name),
        WriteRefused::Broken(why) => ApiError::internal(why),
    }
}
