//! OpenAPI documents of the built-in kinds, made from their schemas each time they are asked for.
//!
//! They hold what kubectl reads: for `explain` the schemas with descriptions, for `apply` how lists merge, for validation
//! that requests take `fieldValidation`. Nothing is kept in memory here: a client caches a document by its hash.

mod paths;
mod schemas;

use serde_json::{Value, json};

use crate::kinds::table::{ROWS, Row};

/// The two forms of a document, which differ in small ways.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// Swagger 2.0.
    V2,
    /// OpenAPI 3.0.
    V3,
}

impl Form {
    /// Where the document keeps its schemas.
    fn schema_prefix(self) -> &'static str {
        match self {
            Form::V2 => "#/definitions/",
            Form::V3 => "#/components/schemas/",
        }
    }
}

fn info() -> Value {
    json!({"title": "Kubernetes", "version": "v1.36.0"})
}

/// The OpenAPI 3.0 document of one built-in group-version (core is the empty group); none when it has no built-in kinds.
pub fn v3(group: &str, version: &str) -> Option<Value> {
    let rows: Vec<&Row> = ROWS.iter().filter(|row| row.group == group && row.version == version).collect();
    if rows.is_empty() {
        return None;
    }
    Some(json!({
        "openapi": "3.0.0",
        "info": info(),
        "paths": paths::of(&rows, Form::V3),
        "components": {"schemas": schemas::of(&rows, Form::V3)},
    }))
}

/// The Swagger 2.0 document of all built-in kinds.
pub fn v2() -> Value {
    let rows: Vec<&Row> = ROWS.iter().collect();
    json!({
        "swagger": "2.0",
        "info": info(),
        "paths": paths::of(&rows, Form::V2),
        "definitions": schemas::of(&rows, Form::V2),
    })
}

#[cfg(test)]
mod tests;
