//! Field errors worded as Kubernetes words them, and the paths they name.
//!
//! The source of the wording is `k8s.io/apimachinery/pkg/util/validation/field`.

use std::fmt;

use serde_json::Value;

use crate::resource::FieldError;

/// A field path as Kubernetes writes it: `spec.ports[0].port`, `metadata.annotations[key]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Path(String);

impl Path {
    /// The root of an object, which has no name.
    pub(crate) fn root() -> Path {
        Path(String::new())
    }

    /// A path that begins with this field.
    pub(crate) fn new(name: &str) -> Path {
        Path(name.to_owned())
    }

    /// The field `name` below this one.
    pub(crate) fn child(&self, name: &str) -> Path {
        if self.0.is_empty() { Path(name.to_owned()) } else { Path(format!("{}.{name}", self.0)) }
    }

    /// The list item `index`.
    pub(crate) fn index(&self, index: usize) -> Path {
        Path(format!("{}[{index}]", self.0))
    }

    /// The map entry `key`.
    pub(crate) fn key(&self, key: &str) -> Path {
        Path(format!("{}[{key}]", self.0))
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "<nil>" } else { &self.0 })
    }
}

/// A value as it appears in an error: strings quoted as Go quotes them, everything else as JSON.
pub(crate) struct Shown(String);

impl From<&str> for Shown {
    fn from(value: &str) -> Shown {
        Shown(quote(value))
    }
}

impl From<&String> for Shown {
    fn from(value: &String) -> Shown {
        Shown(quote(value))
    }
}

impl From<i64> for Shown {
    fn from(value: i64) -> Shown {
        Shown(value.to_string())
    }
}

impl From<bool> for Shown {
    fn from(value: bool) -> Shown {
        Shown(value.to_string())
    }
}

impl From<&Value> for Shown {
    fn from(value: &Value) -> Shown {
        match value {
            Value::String(text) => Shown(quote(text)),
            other => Shown(escape_html(&other.to_string())),
        }
    }
}

/// Go's JSON encoder writes `<`, `>` and `&` as escapes.
fn escape_html(json: &str) -> String {
    json.replace('&', "\\u0026").replace('<', "\\u003c").replace('>', "\\u003e")
}

/// Quotes as Go's `%q` does.
pub(crate) fn quote(text: &str) -> String {
    let mut out = String::with_capacity(text.len() + 2);
    out.push('"');
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\u{7}' => out.push_str("\\a"),
            '\u{8}' => out.push_str("\\b"),
            '\u{b}' => out.push_str("\\v"),
            '\u{c}' => out.push_str("\\f"),
            c if (c as u32) < 0x20 || c == '\u{7f}' => out.push_str(&format!("\\x{:02x}", c as u32)),
            c if c.is_control() => out.push_str(&format!("\\u{:04x}", c as u32)),
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

/// The errors found so far.
#[derive(Debug, Default)]
pub(crate) struct Faults(Vec<FieldError>);

impl Faults {
    /// All errors, in the order they were found.
    pub(crate) fn into_vec(self) -> Vec<FieldError> {
        self.0
    }

    /// How many were found, to notice whether a check added any.
    pub(crate) fn len(&self) -> usize {
        self.0.len()
    }

    fn push(&mut self, reason: &'static str, path: &Path, head: String, detail: &str) {
        let message = if detail.is_empty() { head } else { format!("{head}: {detail}") };
        self.0.push(FieldError { reason, field: path.to_string(), message });
    }

    /// `Required value`.
    pub(crate) fn required(&mut self, path: &Path, detail: &str) {
        self.push("FieldValueRequired", path, "Required value".to_owned(), detail);
    }

    /// `Invalid value`.
    pub(crate) fn invalid(&mut self, path: &Path, value: impl Into<Shown>, detail: &str) {
        self.push("FieldValueInvalid", path, format!("Invalid value: {}", value.into().0), detail);
    }

    /// One `Invalid value` for each detail.
    pub(crate) fn invalid_each(&mut self, path: &Path, value: &str, details: Vec<String>) {
        for detail in details {
            self.invalid(path, value, &detail);
        }
    }

    /// `Unsupported value`, listing what is supported in the given order.
    pub(crate) fn unsupported(&mut self, path: &Path, value: impl Into<Shown>, supported: &[&str]) {
        let list: Vec<String> = supported.iter().map(|value| quote(value)).collect();
        let detail = if list.is_empty() { String::new() } else { format!("supported values: {}", list.join(", ")) };
        self.push("FieldValueNotSupported", path, format!("Unsupported value: {}", value.into().0), &detail);
    }

    /// `Forbidden`.
    pub(crate) fn forbidden(&mut self, path: &Path, detail: &str) {
        self.push("FieldValueForbidden", path, "Forbidden".to_owned(), detail);
    }

    /// `Duplicate value`.
    pub(crate) fn duplicate(&mut self, path: &Path, value: impl Into<Shown>) {
        self.push("FieldValueDuplicate", path, format!("Duplicate value: {}", value.into().0), "");
    }

    /// `Duplicate value`, with the reason.
    pub(crate) fn duplicate_because(&mut self, path: &Path, value: impl Into<Shown>, detail: &str) {
        self.push("FieldValueDuplicate", path, format!("Duplicate value: {}", value.into().0), detail);
    }

    /// `Not found`.
    pub(crate) fn not_found(&mut self, path: &Path, value: impl Into<Shown>) {
        self.push("FieldValueNotFound", path, format!("Not found: {}", value.into().0), "");
    }

    /// `Too long` in bytes.
    pub(crate) fn too_long(&mut self, path: &Path, limit: usize) {
        self.push("FieldValueTooLong", path, "Too long".to_owned(), &format!("may not be more than {limit} bytes"));
    }

    /// `Too many` items.
    pub(crate) fn too_many(&mut self, path: &Path, count: usize, limit: usize) {
        let items = if limit == 1 { "item" } else { "items" };
        self.push(
            "FieldValueTooMany",
            path,
            format!("Too many: {count}"),
            &format!("must have at most {limit} {items}"),
        );
    }
}
