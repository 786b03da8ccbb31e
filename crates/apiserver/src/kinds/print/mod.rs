//! Table columns and cells as `kubectl get` shows them.

mod age;

use serde_json::{Value, json};

use super::read::Read;
use crate::resource::Column;

pub(crate) use age::age;

/// A column: name, type, description, priority.
pub(crate) struct ColumnRow(pub(crate) &'static str, pub(crate) &'static str, pub(crate) &'static str, pub(crate) i32);

impl ColumnRow {
    /// The column as the API sends it.
    pub(crate) fn column(&self) -> Column {
        let format = if self.0 == "Name" { "name" } else { "" };
        Column { name: self.0.into(), kind: self.1.into(), format: format.into(), description: self.2.into(), priority: self.3 }
    }
}

/// The name column, first everywhere.
pub(crate) const NAME: ColumnRow = ColumnRow(
    "Name",
    "string",
    "Name must be unique within a namespace. Is required when creating resources, although some resources may allow a client to request the generation of an appropriate name automatically.",
    0,
);
/// The age column.
pub(crate) const AGE: ColumnRow = ColumnRow("Age", "string", "CreationTimestamp is a timestamp representing the server time when this object was created.", 0);

/// Columns of kinds that have none of their own.
pub(crate) const PLAIN: &[ColumnRow] =
    &[NAME, ColumnRow("Created At", "date", "CreationTimestamp is a timestamp representing the server time when this object was created.", 0)];

/// Cells of [`PLAIN`].
pub(crate) fn plain_row(object: &Value, _now: &str) -> Vec<Value> {
    let metadata = object.at("metadata");
    vec![json!(metadata.text("name")), json!(metadata.text("creationTimestamp"))]
}

/// The object's name.
pub(crate) fn name(object: &Value) -> Value {
    json!(object.deep(&["metadata", "name"]).as_str().unwrap_or_default())
}

/// The object's age.
pub(crate) fn object_age(object: &Value, now: &str) -> Value {
    json!(age(object.deep(&["metadata", "creationTimestamp"]).as_str().unwrap_or_default(), now))
}
