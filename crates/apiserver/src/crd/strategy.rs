//! What the machinery needs to know of a custom kind, from its schema.

use std::borrow::Cow;
use std::sync::Arc;

use serde_json::Value;

use super::SharedSchema;
use super::columns::JsonPath;
use super::schema;
use crate::kinds::fault::Faults;
use crate::kinds::metadata::{self, NameRule};
use crate::kinds::print::age;
use crate::meta;
use crate::resource::{Column, FieldError, FieldMerge, ListMerge, Strategy};

pub(crate) struct CustomStrategy {
    schema: SharedSchema,
    columns: Vec<(Column, JsonPath)>,
    status: bool,
    namespaced: bool,
    preserve: bool,
}

impl CustomStrategy {
    pub(super) fn new(schema: Value, columns: &Value, status: bool, namespaced: bool, preserve: bool) -> Self {
        let mut list: Vec<(Column, JsonPath)> = columns
            .as_array()
            .into_iter()
            .flatten()
            .filter_map(|column| {
                let text = |pointer: &str| Cow::Owned(meta::text(column, pointer).to_owned());
                let path = JsonPath::parse(meta::text(column, "/jsonPath"))?;
                let priority = column.get("priority").and_then(Value::as_i64).unwrap_or(0);
                let priority = i32::try_from(priority).unwrap_or(0);
                let column = Column {
                    name: text("/name"),
                    kind: text("/type"),
                    format: text("/format"),
                    description: text("/description"),
                    priority,
                };
                Some((column, path))
            })
            .collect();
        if list.is_empty()
            && let Some(path) = JsonPath::parse(".metadata.creationTimestamp")
        {
            let column = Column {
                name: "Age".into(),
                kind: "date".into(),
                format: "".into(),
                description: "When the object was created.".into(),
                priority: 0,
            };
            list.push((column, path));
        }
        Self { schema: Arc::new(schema), columns: list, status, namespaced, preserve }
    }

    fn keep_status(&self, object: &mut Value, old: &Value) {
        match old.get("status") {
            Some(status) => meta::as_map(object).insert("status".to_owned(), status.clone()),
            None => meta::as_map(object).shift_remove("status"),
        };
    }
}

/// Whether two objects differ in more than metadata (and status, where that has its own endpoint).
fn differs(a: &Value, b: &Value, status: bool) -> bool {
    let relevant = |key: &str| key != "metadata" && !(status && key == "status");
    let keys = |object: &Value| -> Vec<String> {
        object.as_object().map(|map| map.keys().filter(|key| relevant(key)).cloned().collect()).unwrap_or_default()
    };
    keys(a).iter().chain(&keys(b)).any(|key| a.get(key) != b.get(key))
}

impl Strategy for CustomStrategy {
    fn default_object(&self, object: &mut Value) {
        schema::default(&self.schema, object);
    }

    fn prepare_create(&self, object: &mut Value) {
        if self.status {
            meta::as_map(object).shift_remove("status");
        }
        meta::set_meta(object, "generation", 1.into());
    }

    fn prepare_update(&self, object: &mut Value, old: &Value) {
        if self.status {
            self.keep_status(object, old);
        }
        let generation = old.pointer("/metadata/generation").and_then(Value::as_i64).unwrap_or(1);
        let raised = if differs(object, old, self.status) { generation.saturating_add(1) } else { generation };
        meta::set_meta(object, "generation", raised.into());
    }

    fn prepare_status_update(&self, object: &mut Value, old: &Value) {
        let status = object.get("status").cloned();
        let managed = object.pointer("/metadata/managedFields").cloned();
        *object = old.clone();
        match status {
            Some(status) => meta::as_map(object).insert("status".to_owned(), status),
            None => meta::as_map(object).shift_remove("status"),
        };
        if let Some(managed) = managed {
            meta::set_meta(object, "managedFields", managed);
        }
    }

    fn validate_create(&self, object: &Value) -> Vec<FieldError> {
        let mut faults = Faults::default();
        metadata::check_new(object, NameRule::Subdomain, self.namespaced, &mut faults);
        let mut errors = faults.into_vec();
        schema::validate(&self.schema, object, "", &mut errors);
        errors
    }

    fn validate_update(&self, object: &Value, old: &Value) -> Vec<FieldError> {
        let mut faults = Faults::default();
        metadata::check_update(object, old, &mut faults);
        let mut errors = faults.into_vec();
        schema::validate(&self.schema, object, "", &mut errors);
        errors
    }

    fn validate_status_update(&self, object: &Value, _old: &Value) -> Vec<FieldError> {
        let mut errors = Vec::new();
        schema::validate(&self.schema, object, "", &mut errors);
        errors
    }

    fn warnings(&self, _object: &Value) -> Vec<String> {
        Vec::new()
    }

    fn prune_unknown_fields(&self, object: &mut Value) -> Vec<String> {
        let mut unknown = Vec::new();
        if !self.preserve {
            schema::prune(&self.schema, object, "", true, &mut unknown);
        }
        unknown
    }

    fn type_error(&self, _object: &Value) -> Option<String> {
        None
    }

    fn merge(&self, path: &[&str]) -> FieldMerge {
        let mut merge =
            FieldMerge { list: None, atomic_map: false, patch_merge_key: None, patch_merge: false, retain_keys: false };
        match path {
            ["metadata", "finalizers"] => merge.list = Some(ListMerge::Set),
            ["metadata", "ownerReferences"] => merge.list = Some(ListMerge::Map(vec!["uid".into()])),
            _ => {
                if let Some(found) = schema::at(&self.schema, path) {
                    merge.list = schema::list_merge(found);
                    merge.atomic_map = found.get("x-kubernetes-map-type").and_then(Value::as_str) == Some("atomic");
                }
            }
        }
        merge
    }

    fn columns(&self) -> Vec<Column> {
        let name = Column {
            name: "Name".into(),
            kind: "string".into(),
            format: "name".into(),
            description: "Name must be unique within a namespace.".into(),
            priority: 0,
        };
        std::iter::once(name).chain(self.columns.iter().map(|(column, _)| column.clone())).collect()
    }

    fn row(&self, object: &Value, now: &str) -> Vec<Value> {
        let cell = |(column, path): &(Column, JsonPath)| {
            let found = path.find(object);
            match (column.kind.as_ref(), found.as_slice()) {
                (_, []) => Value::Null,
                ("date", [value, ..]) => match value.as_str() {
                    Some(since) => age(since, now).into(),
                    None => "<unknown>".into(),
                },
                ("string", [Value::String(text)]) => text.as_str().into(),
                ("string", [one]) => one.to_string().into(),
                ("string", many) => Value::from(many.iter().map(|value| plain(value)).collect::<Vec<_>>().join(",")),
                (_, [one, ..]) => (*one).clone(),
            }
        };
        std::iter::once(Value::from(meta::name(object))).chain(self.columns.iter().map(cell)).collect()
    }

    fn selectable_field(&self, _path: &str, _object: &Value) -> Option<String> {
        None
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
