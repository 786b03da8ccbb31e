//! The seam between the machinery (storage, REST, patches, watches) and what is known of each kind.
//!
//! A [`ResourceKind`] says everything the machinery needs to serve one resource: its names, its scope, its
//! subresources and, through [`Strategy`], its defaults, validation and table columns. Built-in kinds come from
//! [`crate::kinds`], custom ones are made from their `CustomResourceDefinition`.
//!
//! OpenAPI seam: [`crate::openapi`] offers `pub fn v3(group: &str, version: &str) -> Option<serde_json::Value>` (the document of
//! one built-in group-version; none when it has none) and `pub fn v2() -> serde_json::Value`. The machinery serves them under
//! `/openapi` and adds the documents of custom resources.
//!
//! Objects are `serde_json::Value` here: the API server stores what it was given, also fields that no Rust type knows.

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;

/// Group, version and kind, as in an object's `apiVersion` and `kind`. The core group is the empty string.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GroupVersionKind {
    /// API group, empty for core.
    pub group: Cow<'static, str>,
    /// API version, for example `v1`.
    pub version: Cow<'static, str>,
    /// Kind, for example `Pod`.
    pub kind: Cow<'static, str>,
}

/// Where a `scale` subresource finds its numbers, as JSON pointers.
#[derive(Clone, Debug)]
pub struct ScalePaths {
    /// `/spec/replicas`.
    pub spec_replicas: Cow<'static, str>,
    /// `/status/replicas`.
    pub status_replicas: Cow<'static, str>,
    /// `/spec/selector` (a LabelSelector object) or `/status/selector` (a string); none when there is none.
    pub selector: Option<Cow<'static, str>>,
}

/// One served resource.
#[derive(Clone)]
pub struct ResourceKind {
    /// Group, version and kind.
    pub gvk: GroupVersionKind,
    /// Plural name as in the path, for example `pods`.
    pub plural: Cow<'static, str>,
    /// Singular name, for example `pod`.
    pub singular: Cow<'static, str>,
    /// Short names, for example `po`.
    pub short_names: Vec<Cow<'static, str>>,
    /// Categories, for example `all`.
    pub categories: Vec<Cow<'static, str>>,
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether the `status` subresource exists.
    pub status: bool,
    /// The `scale` subresource, if any.
    pub scale: Option<ScalePaths>,
    /// `false` for create-only reviews (`SelfSubjectAccessReview`, `TokenReview` …) that are never stored.
    pub stored: bool,
    /// Key of the storage that several group-versions share (`events` of core and events.k8s.io); normally
    /// `group/plural`.
    pub storage_key: Cow<'static, str>,
    /// What is specific to the kind.
    pub strategy: Arc<dyn Strategy>,
}

/// Why one field is refused. The machinery turns a list of these into a `Status` with reason `Invalid` (422).
#[derive(Clone, Debug, PartialEq)]
pub struct FieldError {
    /// `FieldValueRequired`, `FieldValueInvalid`, `FieldValueNotSupported`, `FieldValueForbidden`,
    /// `FieldValueDuplicate`, `FieldValueTooLong`, `FieldValueTooMany`, `FieldValueTypeInvalid`, `FieldValueNotFound`.
    pub reason: &'static str,
    /// Field path as Kubernetes writes it: `spec.ports[0].port`.
    pub field: String,
    /// The whole message after the field path, as Kubernetes words it: `Invalid value: 0: must be between 1 and 65535, inclusive`.
    pub message: String,
}

/// One column of a table (`meta.k8s.io/v1` `Table`).
#[derive(Clone, Debug)]
pub struct Column {
    /// Header, for example `Ready`.
    pub name: Cow<'static, str>,
    /// `string`, `integer`, `number`, `boolean` or `date`.
    pub kind: Cow<'static, str>,
    /// `name` for the first column, else empty.
    pub format: Cow<'static, str>,
    /// Shown to people who ask what the column means.
    pub description: Cow<'static, str>,
    /// 0: always shown; 1: with `-o wide`.
    pub priority: i32,
}

/// How list items and map entries merge, for server-side apply and strategic merge patches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ListMerge {
    /// Replaced whole.
    Atomic,
    /// Scalars, merged as a set.
    Set,
    /// Objects keyed by these fields (server-side apply keys; `containerPort`+`protocol` for container ports).
    Map(Vec<Cow<'static, str>>),
}

/// What the merge algorithms need to know of one field.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldMerge {
    /// Set when the field is a list.
    pub list: Option<ListMerge>,
    /// The field is an object that is owned and replaced whole (`x-kubernetes-map-type: atomic`).
    pub atomic_map: bool,
    /// Strategic merge: the single merge key (`patchMergeKey`), when `patchStrategy` has `merge` and items are objects.
    pub patch_merge_key: Option<Cow<'static, str>>,
    /// Strategic merge: `patchStrategy` has `merge` (scalars lists merge as sets when there is no key).
    pub patch_merge: bool,
    /// Strategic merge: `patchStrategy` has `retainKeys`.
    pub retain_keys: bool,
}

/// What differs between kinds. All functions are pure; `now` is RFC 3339 (seconds, UTC).
pub trait Strategy: Send + Sync {
    /// Fills in what the API server fills in (`apply defaults`); called on create, update and on read of stored objects is not needed.
    fn default_object(&self, object: &mut Value);

    /// Before a create is validated: clears status where it may not be set, sets `metadata.generation`.
    fn prepare_create(&self, object: &mut Value);

    /// Before an update is validated: keeps what this endpoint may not change (status on the main resource),
    /// raises `metadata.generation` when the spec changed.
    fn prepare_update(&self, object: &mut Value, old: &Value);

    /// Before an update through `/status`: everything but status (and metadata that status may change) is kept from `old`.
    fn prepare_status_update(&self, object: &mut Value, old: &Value);

    /// Errors of a new object; empty when it is valid.
    fn validate_create(&self, object: &Value) -> Vec<FieldError>;

    /// Errors of an update through the main endpoint, immutable fields included.
    fn validate_update(&self, object: &Value, old: &Value) -> Vec<FieldError>;

    /// Errors of an update through `/status`.
    fn validate_status_update(&self, object: &Value, old: &Value) -> Vec<FieldError>;

    /// Deprecations and the like, sent as `Warning:` headers.
    fn warnings(&self, object: &Value) -> Vec<String>;

    /// Paths of fields that the schema does not know (`spec.containers[0].imagee`), for `fieldValidation`; unknown fields are
    /// also removed from `object` (pruned) as the real server drops them when decoding.
    fn prune_unknown_fields(&self, object: &mut Value) -> Vec<String>;

    /// A wrongly typed field, worded as the real server's decoder does, or none. Answered with 400 BadRequest.
    fn type_error(&self, object: &Value) -> Option<String>;

    /// Merge behaviour of the field at this path of field names from the root (list items are not named:
    /// `["spec", "containers", "ports"]`). Unknown paths: lists atomic, maps granular.
    fn merge(&self, path: &[&str]) -> FieldMerge;

    /// Columns of the table form.
    fn columns(&self) -> Vec<Column>;

    /// Cells of one row, in the order of [`Strategy::columns`].
    fn row(&self, object: &Value, now: &str) -> Vec<Value>;

    /// Whether a field selector may name this path, and its value: `status.phase` → `Running`. `metadata.name` and
    /// `metadata.namespace` are the machinery's. A path the kind offers gives `Some` also when the object has no such field
    /// (the default or empty text); the machinery asks with `Value::Null` whether a path is offered.
    fn selectable_field(&self, path: &str, object: &Value) -> Option<String>;
}
