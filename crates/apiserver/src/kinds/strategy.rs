//! The strategy of built-in kinds: what all share, with the kind's own rules plugged in.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde_json::Value;

use super::fault::Faults;
use super::metadata::{self, NameRule};
use super::read::{Read, drop_field, keep_from, put};
use super::schema::{Shapes, Type};
use super::table::{Row, Served};
use super::{conform, metadata::same};
use crate::resource::{Column, FieldError, FieldMerge, Strategy};

/// What one kind does beyond what all do.
#[derive(Clone, Copy)]
pub(crate) struct Rules {
    /// What its name must look like.
    pub(crate) name: NameRule,
    /// Defaults.
    pub(crate) default: fn(&mut Value),
    /// Before a create.
    pub(crate) create: fn(&mut Value),
    /// Before an update; the old object second.
    pub(crate) update: fn(&mut Value, &Value),
    /// Before an update through `/status`; the old object second.
    pub(crate) status_update: fn(&mut Value, &Value),
    /// Errors of a new object, without those of metadata; also run on updates.
    pub(crate) validate: fn(&Value, &mut Faults),
    /// Further errors of an update; the old object second.
    pub(crate) validate_update: fn(&Value, &Value, &mut Faults),
    /// Errors of an update through `/status`; the old object second.
    pub(crate) validate_status: fn(&Value, &Value, &mut Faults),
    /// Warnings.
    pub(crate) warnings: fn(&Value) -> Vec<String>,
    /// Whether a create takes the status it is given (nodes register with theirs).
    pub(crate) born_with_status: bool,
    /// Whether an update repeats `validate` (false where `validate_update` does all).
    pub(crate) validate_again: bool,
    /// Columns.
    pub(crate) columns: &'static [super::print::ColumnRow],
    /// Cells of a row; the time second.
    pub(crate) row: fn(&Value, &str) -> Vec<Value>,
    /// Fields that field selectors may name.
    pub(crate) selectable: fn(&str, &Value) -> Option<String>,
}

impl Rules {
    /// A kind without rules of its own.
    pub(crate) const PLAIN: Rules = Rules {
        name: NameRule::Subdomain,
        default: |_| {},
        create: |_| {},
        update: |_, _| {},
        status_update: |_, _| {},
        validate: |_, _| {},
        validate_update: |_, _, _| {},
        validate_status: |_, _, _| {},
        warnings: |_| Vec::new(),
        born_with_status: false,
        validate_again: true,
        columns: super::print::PLAIN,
        row: super::print::plain_row,
        selectable: |_, _| None,
    };
}

/// The strategy of one built-in kind.
pub(crate) struct Builtin {
    row: &'static Row,
    rules: Rules,
}

impl Builtin {
    /// The kind in `row` with its rules.
    pub(crate) fn strategy(row: &'static Row, rules: Rules) -> Arc<dyn Strategy> {
        Arc::new(Builtin { row, rules })
    }

    fn shape(&self) -> Option<&'static Type> {
        Shapes::get().named(self.row.schema)
    }

    fn has_status(&self) -> bool {
        matches!(self.row.served, Served::Status | Served::Scale)
    }
}

/// The parts whose change raises the generation: everything but type, metadata and status.
fn desired_changed(object: &Value, old: &Value) -> bool {
    let keys = |value: &Value| -> BTreeMap<String, Value> {
        let skip = ["apiVersion", "kind", "metadata", "status"];
        value
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(key, _)| !skip.contains(&key.as_str()))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect()
    };
    let (new, before) = (keys(object), keys(old));
    let null = Value::Null;
    new.keys().chain(before.keys()).any(|key| !same(new.get(key).unwrap_or(&null), before.get(key).unwrap_or(&null)))
}

fn set_generation(object: &mut Value, generation: i64) {
    if let Some(metadata) = object.get_mut("metadata") {
        put(metadata, "generation", generation);
    }
}

impl Strategy for Builtin {
    fn default_object(&self, object: &mut Value) {
        (self.rules.default)(object);
    }

    fn prepare_create(&self, object: &mut Value) {
        self.default_object(object);
        if self.has_status() && !self.rules.born_with_status {
            drop_field(object, "status");
        }
        if self.row.has_generation() {
            set_generation(object, 1);
        } else if let Some(metadata) = object.get_mut("metadata") {
            drop_field(metadata, "generation");
        }
        (self.rules.create)(object);
    }

    fn prepare_update(&self, object: &mut Value, old: &Value) {
        // Defaults first: a field left out that means its default is no change.
        self.default_object(object);
        if self.has_status() {
            keep_from(object, old, "status");
        }
        (self.rules.update)(object, old);
        let before = old.deep(&["metadata", "generation"]).as_i64();
        if self.row.has_generation() {
            let deleting = object.deep(&["metadata", "deletionTimestamp"]).is_null()
                != old.deep(&["metadata", "deletionTimestamp"]).is_null();
            let raise = deleting || desired_changed(object, old);
            set_generation(object, before.unwrap_or(0).saturating_add(i64::from(raise)));
        } else if let Some(metadata) = object.get_mut("metadata") {
            match before {
                Some(before) => put(metadata, "generation", before),
                None => drop(drop_field(metadata, "generation")),
            }
        }
    }

    fn prepare_status_update(&self, object: &mut Value, old: &Value) {
        let status = object.get("status").cloned();
        let metadata = object.get("metadata").cloned();
        let mut kept = old.clone();
        match status {
            Some(status) => put(&mut kept, "status", status),
            None => drop(drop_field(&mut kept, "status")),
        }
        if let Some(mut metadata) = metadata {
            for field in
                ["generation", "ownerReferences", "finalizers", "deletionTimestamp", "deletionGracePeriodSeconds"]
            {
                keep_from(&mut metadata, old.at("metadata"), field);
            }
            put(&mut kept, "metadata", metadata);
        }
        *object = kept;
        (self.rules.status_update)(object, old);
    }

    fn validate_create(&self, object: &Value) -> Vec<FieldError> {
        let mut faults = Faults::default();
        if self.row.served != Served::Review {
            metadata::check_new(object, self.rules.name, self.row.namespaced, &mut faults);
        }
        (self.rules.validate)(object, &mut faults);
        faults.into_vec()
    }

    fn validate_update(&self, object: &Value, old: &Value) -> Vec<FieldError> {
        let mut faults = Faults::default();
        metadata::check_update(object, old, &mut faults);
        if self.rules.validate_again {
            (self.rules.validate)(object, &mut faults);
        }
        (self.rules.validate_update)(object, old, &mut faults);
        faults.into_vec()
    }

    fn validate_status_update(&self, object: &Value, old: &Value) -> Vec<FieldError> {
        let mut faults = Faults::default();
        metadata::check_update(object, old, &mut faults);
        (self.rules.validate_status)(object, old, &mut faults);
        faults.into_vec()
    }

    fn warnings(&self, object: &Value) -> Vec<String> {
        (self.rules.warnings)(object)
    }

    fn prune_unknown_fields(&self, object: &mut Value) -> Vec<String> {
        self.shape().map(|shape| conform::prune(object, shape)).unwrap_or_default()
    }

    fn type_error(&self, object: &Value) -> Option<String> {
        let error = conform::type_error(object, self.shape()?)?;
        let Row { kind, version, .. } = self.row;
        Some(format!("{kind} in version {version:?} cannot be handled as a {kind}: {error}"))
    }

    fn merge(&self, path: &[&str]) -> FieldMerge {
        match self.shape() {
            Some(shape) => conform::merge_at(shape, path),
            None => super::merge::GRANULAR,
        }
    }

    fn columns(&self) -> Vec<Column> {
        self.rules.columns.iter().map(super::print::ColumnRow::column).collect()
    }

    fn row(&self, object: &Value, now: &str) -> Vec<Value> {
        (self.rules.row)(object, now)
    }

    fn selectable_field(&self, path: &str, object: &Value) -> Option<String> {
        (self.rules.selectable)(path, object)
    }
}
