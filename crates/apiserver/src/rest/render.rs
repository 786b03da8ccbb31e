//! Answers in the form that was asked for: objects, tables, metadata only; JSON or YAML.

use std::sync::Arc;

use http::Response;
use serde_json::{Map, Value, json};

use super::{Call, Reply, read, whole, written};
use crate::meta;
use crate::request::Form;
use crate::resource::ResourceKind;
use crate::server::ResponseBody;
use crate::status::ApiError;
use crate::store::Stored;

/// Writes a reply.
pub(crate) fn respond(call: &Call, reply: Reply) -> Result<Response<ResponseBody>, ApiError> {
    Ok(match reply {
        Reply::Response(response) => response,
        Reply::Json(bytes) => whole(200, "application/json", bytes),
        Reply::Value(code, value) => written(code, &value, call.accept),
        Reply::Object(code, object) => {
            let value = match call.accept.form {
                Form::Object => object,
                Form::Metadata => partial(&object),
                Form::Table => {
                    let head = json!({"resourceVersion": meta::meta(&object, "resourceVersion")});
                    let row = row(call, &object, &meta::now())?;
                    table(&call.kind, vec![row], head, true)
                }
            };
            written(code, &value, call.accept)
        }
    })
}

/// A list as table, metadata list or YAML.
pub(crate) fn list(call: &Call, chosen: &[Arc<Stored>], head: Value) -> Result<Reply, ApiError> {
    let objects = chosen.iter().map(|stored| read::parsed(&call.kind, stored));
    let value = match call.accept.form {
        Form::Table => {
            let now = meta::now();
            let rows: Result<Vec<Value>, ApiError> = objects.map(|object| row(call, &object?, &now)).collect();
            table(&call.kind, rows?, head, true)
        }
        Form::Metadata => {
            let items: Result<Vec<Value>, ApiError> = objects.map(|object| Ok(partial(&object?))).collect();
            json!({"kind": "PartialObjectMetadataList", "apiVersion": "meta.k8s.io/v1", "metadata": head, "items": items?})
        }
        Form::Object => {
            let items: Result<Vec<Value>, ApiError> = objects.collect();
            json!({"kind": format!("{}List", call.kind.gvk.kind), "apiVersion": call.api_version(), "metadata": head, "items": items?})
        }
    };
    Ok(Reply::Value(200, value))
}

/// Only the metadata of an object.
pub(crate) fn partial(object: &Value) -> Value {
    json!({
        "kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1",
        "metadata": object.get("metadata").cloned().unwrap_or_else(|| json!({})),
    })
}

/// One row; its `object` is what `includeObject` asks for.
pub(crate) fn row(call: &Call, object: &Value, now: &str) -> Result<Value, ApiError> {
    let mut row = Map::new();
    row.insert("cells".to_owned(), Value::Array(call.kind.strategy.row(object, now)));
    match call.query.get("includeObject") {
        "None" => {}
        "Object" => {
            row.insert("object".to_owned(), object.clone());
        }
        "" | "Metadata" => {
            row.insert("object".to_owned(), partial(object));
        }
        other => {
            return Err(ApiError::bad_request(format!(
                "unrecognized includeObject value: {other:?}: must be None, Metadata or Object"
            )));
        }
    }
    Ok(Value::Object(row))
}

/// A table; in a watch only the first one carries the column definitions.
pub(crate) fn table(kind: &ResourceKind, rows: Vec<Value>, head: Value, columns: bool) -> Value {
    let definitions: Option<Vec<Value>> = columns.then(|| {
        let columns = kind.strategy.columns();
        let describe = columns.iter().map(|column| {
            json!({"name": column.name, "type": column.kind, "format": column.format,
                "description": column.description, "priority": column.priority})
        });
        describe.collect()
    });
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": head,
        "columnDefinitions": definitions, "rows": rows})
}
