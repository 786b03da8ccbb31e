//! Errors as Kubernetes answers them: a `Status` object with code, reason and details.
//!
//! Wording and details follow `k8s.io/apimachinery/pkg/api/errors`, because kubectl and controllers read them.

use std::borrow::Cow;
use std::fmt;

use serde_json::{Map, Value, json};

use crate::resource::{FieldError, ResourceKind};

/// An answer other than success.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// `reason` of the Status, for example `NotFound`; empty when Kubernetes gives none.
    pub reason: Cow<'static, str>,
    /// What happened, for people.
    pub message: String,
    /// `details` of the Status.
    pub details: Option<Box<Value>>,
    /// Sent as `Retry-After`, in seconds.
    pub retry_after: Option<u32>,
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({} {})", self.message, self.code, self.reason)
    }
}

impl std::error::Error for ApiError {}

/// `deployments.apps`, or `pods` in the core group.
pub(crate) fn qualified(group: &str, name: &str) -> String {
    if group.is_empty() { name.to_owned() } else { format!("{name}.{group}") }
}

fn details(group: &str, kind: &str, name: &str) -> Value {
    let mut map = Map::new();
    for (key, value) in [("name", name), ("group", group), ("kind", kind)] {
        if !value.is_empty() {
            map.insert(key.to_owned(), Value::from(value));
        }
    }
    Value::Object(map)
}

impl ApiError {
    /// An error with this code and reason.
    pub fn new(code: u16, reason: impl Into<Cow<'static, str>>, message: impl Into<String>) -> Self {
        Self { code, reason: reason.into(), message: message.into(), details: None, retry_after: None }
    }

    /// Sets `details` of the Status.
    pub fn set_details(&mut self, details: Value) {
        self.details = Some(Box::new(details));
    }

    fn of(code: u16, reason: &'static str, kind: &ResourceKind, name: &str, message: String) -> Self {
        let mut error = Self::new(code, reason, message);
        error.set_details(details(&kind.gvk.group, &kind.plural, name));
        error
    }

    /// 400 `BadRequest`.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 500 `InternalError`.
    pub fn internal(message: impl fmt::Display) -> Self {
        let mut error = Self::new(500, "InternalError", format!("Internal error occurred: {message}"));
        error.set_details(json!({"causes": [{"message": message.to_string()}]}));
        error
    }

    /// 404 `NotFound` for an object.
    pub fn not_found(kind: &ResourceKind, name: &str) -> Self {
        let message = format!("{} {name:?} not found", qualified(&kind.gvk.group, &kind.plural));
        Self::of(404, "NotFound", kind, name, message)
    }

    /// 404 for a path that is no resource.
    pub fn no_such_resource() -> Self {
        let mut error = Self::new(404, "NotFound", "the server could not find the requested resource");
        error.set_details(json!({}));
        error
    }

    /// 409 `AlreadyExists`.
    pub fn already_exists(kind: &ResourceKind, name: &str) -> Self {
        let message = format!("{} {name:?} already exists", qualified(&kind.gvk.group, &kind.plural));
        Self::of(409, "AlreadyExists", kind, name, message)
    }

    /// 409 `Conflict`.
    pub fn conflict(kind: &ResourceKind, name: &str, why: &str) -> Self {
        let message =
            format!("Operation cannot be fulfilled on {} {name:?}: {why}", qualified(&kind.gvk.group, &kind.plural));
        Self::of(409, "Conflict", kind, name, message)
    }

    /// 409 `Conflict` because somebody else wrote in between.
    pub fn modified(kind: &ResourceKind, name: &str) -> Self {
        Self::conflict(
            kind,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 403 `Forbidden` by admission.
    pub fn forbidden(kind: &ResourceKind, name: &str, why: &str) -> Self {
        let resource = qualified(&kind.gvk.group, &kind.plural);
        let message = if name.is_empty() {
            format!("{resource} is forbidden: {why}")
        } else {
            format!("{resource} {name:?} is forbidden: {why}")
        };
        Self::of(403, "Forbidden", kind, name, message)
    }

    /// 422 `Invalid` with one cause a field.
    pub fn invalid(group: &str, kind: &str, name: &str, errors: &[FieldError]) -> Self {
        let mut texts: Vec<String> = Vec::new();
        for error in errors {
            let text = format!("{}: {}", error.field, error.message);
            if !texts.contains(&text) {
                texts.push(text);
            }
        }
        let list = match texts.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let causes: Vec<Value> = errors
            .iter()
            .map(|error| json!({"reason": error.reason, "message": error.message, "field": error.field}))
            .collect();
        let mut details = details(group, kind, name);
        if let Some(map) = details.as_object_mut() {
            map.insert("causes".to_owned(), Value::Array(causes));
        }
        let message = format!("{} {name:?} is invalid: {list}", qualified(group, kind));
        let mut error = Self::new(422, "Invalid", message);
        error.set_details(details);
        error
    }

    /// 422 `Invalid` for an object of this kind.
    pub(crate) fn invalid_object(kind: &ResourceKind, name: &str, errors: &[FieldError]) -> Self {
        Self::invalid(&kind.gvk.group, &kind.gvk.kind, name, errors)
    }

    /// 405 `MethodNotAllowed`.
    pub fn method_not_allowed(kind: &ResourceKind, verb: &str) -> Self {
        let resource = qualified(&kind.gvk.group, &kind.plural);
        let message = format!("{verb} is not supported on resources of kind {resource:?}");
        Self::of(405, "MethodNotAllowed", kind, "", message)
    }

    /// 401 `Unauthorized`.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 410 `Expired`: the version asked for is no longer in the window.
    pub fn expired(asked: u64, oldest: u64) -> Self {
        Self::new(410, "Expired", format!("too old resource version: {asked} ({oldest})"))
    }

    /// 504 `Timeout`: the version asked for lies in the future.
    pub fn version_too_large(asked: u64, current: u64) -> Self {
        let mut error = Self::new(504, "Timeout", format!("Too large resource version: {asked}, current: {current}"));
        error.set_details(json!({
            "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
            "retryAfterSeconds": 1,
        }));
        error.retry_after = Some(1);
        error
    }

    /// 406: none of the forms asked for can be made.
    pub fn not_acceptable() -> Self {
        Self::new(
            406,
            "NotAcceptable",
            "only the following media types are accepted: application/json, application/yaml",
        )
    }

    /// 415: the body's form is not known.
    pub fn unsupported_media_type(accepted: &str) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!("the body of the request was in an unknown format - accepted media types include: {accepted}"),
        )
    }

    /// The `Status` object.
    pub fn status(&self) -> Value {
        let mut map = Map::new();
        map.insert("kind".into(), "Status".into());
        map.insert("apiVersion".into(), "v1".into());
        map.insert("metadata".into(), json!({}));
        map.insert("status".into(), "Failure".into());
        map.insert("message".into(), self.message.as_str().into());
        if !self.reason.is_empty() {
            map.insert("reason".into(), self.reason.as_ref().into());
        }
        if let Some(details) = &self.details {
            map.insert("details".into(), (**details).clone());
        }
        map.insert("code".into(), self.code.into());
        Value::Object(map)
    }
}
