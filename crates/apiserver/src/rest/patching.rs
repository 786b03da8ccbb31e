//! `patch`: JSON patch, merge patch, strategic merge patch and server-side apply.

use std::sync::Arc;

use serde_json::Value;

use super::create::{CreateOptions, check_type, create_object};
use super::update::{Changed, Tracking, UpdateOptions, update_object};
use super::{Call, Reply};
use crate::meta;
use crate::patch::apply::{Applier, apply, nothing};
use crate::patch::strategic::strategic_merge;
use crate::request::{content_type, decode_json, decode_yaml};
use crate::status::ApiError;
use crate::store::Key;

const ACCEPTED: &str = "application/json-patch+json, application/merge-patch+json, application/strategic-merge-patch+json, application/apply-patch+yaml";

/// A parsed patch.
pub(crate) enum Patch {
    Json(json_patch::Patch),
    Merge(Value),
    Strategic(Value),
    Apply(Value),
}

impl Patch {
    pub(crate) fn parse(call: &Call, body: &[u8]) -> Result<Self, ApiError> {
        match content_type(&call.headers).as_str() {
            "application/json-patch+json" => serde_json::from_slice(body)
                .map(Self::Json)
                .map_err(|error| ApiError::bad_request(format!("error decoding patch: {error}"))),
            "application/merge-patch+json" => Ok(Self::Merge(decode_json(body)?)),
            "application/strategic-merge-patch+json" if call.kind.gvk.group.contains('.') && is_custom(call) => {
                Err(ApiError::unsupported_media_type(
                    "application/json-patch+json, application/merge-patch+json, application/apply-patch+yaml",
                ))
            }
            "application/strategic-merge-patch+json" => Ok(Self::Strategic(decode_json(body)?)),
            "application/apply-patch+yaml" => Ok(Self::Apply(decode_yaml(body)?)),
            "application/apply-patch+json" => Ok(Self::Apply(decode_json(body)?)),
            _ => Err(ApiError::unsupported_media_type(ACCEPTED)),
        }
    }

    /// The patched object; apply is done elsewhere.
    pub(crate) fn patched(&self, call: &Call, old: &Value) -> Result<Value, ApiError> {
        match self {
            Self::Json(patch) => {
                let mut object = old.clone();
                json_patch::patch(&mut object, patch).map_err(|error| {
                    ApiError::new(
                        422,
                        "Invalid",
                        format!("the server rejected our request due to an error in our request: {error}"),
                    )
                })?;
                Ok(object)
            }
            Self::Merge(patch) => {
                let mut object = old.clone();
                json_patch::merge(&mut object, patch);
                Ok(object)
            }
            Self::Strategic(patch) => strategic_merge(call.kind.strategy.as_ref(), old, patch),
            Self::Apply(_) => Err(ApiError::internal("server-side apply has its own path")),
        }
    }
}

fn is_custom(call: &Call) -> bool {
    !call.core.registry.is_builtin_group(&call.kind.gvk.group)
}

pub(crate) async fn patch(call: &Arc<Call>, body: &[u8], subresource: &'static str) -> Result<Reply, ApiError> {
    let patch = Patch::parse(call, body)?;
    if let Patch::Apply(config) = patch {
        return server_side_apply(call, config, subresource).await;
    }
    if call.query.flag("force") {
        return Err(ApiError::new(
            422,
            "Invalid",
            "PatchOptions.meta.k8s.io \"\" is invalid: force: Forbidden: may not be specified for non-apply patch",
        ));
    }
    let tracking = Tracking::Update { manager: call.manager(), subresource: subresource.to_owned() };
    let options = UpdateOptions { subresource, tracking };
    let change = |old: &Value| {
        let object = patch.patched(call, old)?;
        same_identity(old, &object)?;
        Ok(Changed { object, check_fields: true })
    };
    Ok(Reply::Object(200, update_object(call, &call.target.name, &options, change).await?))
}

/// A patch may not rename or retype its object.
fn same_identity(old: &Value, new: &Value) -> Result<(), ApiError> {
    if !new.is_object() || !new.get("metadata").is_some_and(Value::is_object) {
        return Err(ApiError::bad_request("the patch does not leave an object with metadata"));
    }
    for field in ["apiVersion", "kind"] {
        if old.get(field) != new.get(field) {
            return Err(ApiError::bad_request(format!("a patch may not change {field}")));
        }
    }
    for field in ["name", "namespace"] {
        if meta::meta(old, field) != meta::meta(new, field) {
            return Err(ApiError::bad_request(format!(
                "the {field} of the object ({}) does not match the {field} on the URL ({})",
                meta::meta(new, field),
                meta::meta(old, field)
            )));
        }
    }
    Ok(())
}

async fn server_side_apply(call: &Arc<Call>, mut config: Value, subresource: &'static str) -> Result<Reply, ApiError> {
    if call.query.get("fieldManager").is_empty() {
        return Err(ApiError::new(
            422,
            "Invalid",
            "PatchOptions.meta.k8s.io \"\" is invalid: fieldManager: Required value: is required for apply patch",
        ));
    }
    if config.pointer("/metadata/managedFields").and_then(Value::as_array).is_some_and(|list| !list.is_empty()) {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    if meta::text(&config, "/kind").is_empty() || meta::text(&config, "/apiVersion").is_empty() {
        return Err(ApiError::bad_request("an applied configuration must have apiVersion and kind"));
    }
    check_type(call, &mut config)?;
    let name = meta::name(&config);
    if !name.is_empty() && name != call.target.name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({name}) does not match the name on the URL ({})",
            call.target.name
        )));
    }
    meta::set_meta(&mut config, "name", call.target.name.as_str().into());
    super::create::check_fields(call, &mut config)?;
    let manager = call.manager();
    let by = Applier { manager: &manager, force: call.query.flag("force"), subresource };
    let key = Key::new(&call.target.namespace, &call.target.name);
    let options = UpdateOptions { subresource, tracking: Tracking::Given };
    for _ in 0..2 {
        if call.core.store.get(&call.kind.storage_key, &key).is_none() {
            if !subresource.is_empty() {
                return Err(ApiError::not_found(&call.kind, &call.target.name));
            }
            let object = apply(&call.kind, &nothing(), &config, &by)?;
            match create_object(call, object, CreateOptions { tracking: Tracking::Given }).await {
                Err(error) if error.reason == "AlreadyExists" => {}
                other => return Ok(Reply::Object(201, other?)),
            }
        }
        let change = |old: &Value| {
            let object = apply(&call.kind, old, &config, &by)?;
            Ok(Changed { object, check_fields: false })
        };
        match update_object(call, &call.target.name, &options, change).await {
            Err(error) if error.code == 404 && subresource.is_empty() => {}
            other => return Ok(Reply::Object(200, other?)),
        }
    }
    Err(ApiError::modified(&call.kind, &call.target.name))
}
