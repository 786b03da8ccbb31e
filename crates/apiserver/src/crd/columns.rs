//! `additionalPrinterColumns`: the simple JSON paths that columns use.
//!
//! `.spec.a.b`, `.status.conditions[?(@.type=="Ready")].status`, `.spec.list[0]`, `.spec.list[*].name`,
//! `.metadata.labels['a\.b/c']`.

use serde_json::Value;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Field(String),
    Index(usize),
    All,
    Filter(Vec<String>, String),
}

/// A parsed path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JsonPath(Vec<Step>);

impl JsonPath {
    /// None when the path uses something else.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let mut steps = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            if let Some(after) = rest.strip_prefix('[') {
                let (inside, after) = bracket(after)?;
                steps.push(bracket_step(inside)?);
                rest = after;
            } else {
                let after = rest.strip_prefix('.')?;
                let (name, after) = field(after);
                if !name.is_empty() {
                    steps.push(Step::Field(name));
                }
                rest = after;
            }
        }
        Some(Self(steps))
    }

    /// All values at the path.
    pub(super) fn find<'a>(&self, object: &'a Value) -> Vec<&'a Value> {
        let mut found = vec![object];
        for step in &self.0 {
            found = found.into_iter().flat_map(|value| step.apply(value)).collect();
        }
        found
    }
}

/// Splits at the bracket's end, which quotes may hold too.
fn bracket(text: &str) -> Option<(&str, &str)> {
    let mut quote = None;
    for (at, c) in text.char_indices() {
        match (quote, c) {
            (None, ']') => return Some((text.get(..at)?, text.get(at + 1..)?)),
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), c) if c == open => quote = None,
            _ => {}
        }
    }
    None
}

fn bracket_step(inside: &str) -> Option<Step> {
    if inside == "*" {
        return Some(Step::All);
    }
    if let Ok(index) = inside.parse() {
        return Some(Step::Index(index));
    }
    if let Some(quoted) = unquoted(inside) {
        return Some(Step::Field(quoted.replace('\\', "")));
    }
    let condition = inside.strip_prefix("?(")?.strip_suffix(')')?;
    let (path, value) = condition.split_once("==")?;
    let fields = path.trim().strip_prefix("@.")?.split('.').map(str::to_owned).collect();
    Some(Step::Filter(fields, unquoted(value.trim())?.to_owned()))
}

fn unquoted(text: &str) -> Option<&str> {
    let strip = |quote: char| text.strip_prefix(quote)?.strip_suffix(quote);
    strip('\'').or_else(|| strip('"'))
}

/// A field name up to the next separator; a backslash takes the next character as it is.
fn field(text: &str) -> (String, &str) {
    let mut name = String::new();
    let mut characters = text.char_indices();
    while let Some((at, c)) = characters.next() {
        match c {
            '\\' => name.extend(characters.next().map(|(_, c)| c)),
            '.' | '[' => return (name, text.get(at..).unwrap_or_default()),
            other => name.push(other),
        }
    }
    (name, "")
}

fn is_text(value: &Value, wanted: &str) -> bool {
    match value {
        Value::String(text) => text == wanted,
        other => {
            let text = other.to_string();
            text == wanted
        }
    }
}

impl Step {
    fn apply<'a>(&self, value: &'a Value) -> Vec<&'a Value> {
        match self {
            Self::Field(name) => value.get(name).into_iter().collect(),
            Self::Index(index) => value.get(*index).into_iter().collect(),
            Self::All => match value {
                Value::Array(items) => items.iter().collect(),
                Value::Object(map) => map.values().collect(),
                _ => Vec::new(),
            },
            Self::Filter(fields, wanted) => {
                let holds = |item: &&Value| {
                    let found = fields.iter().try_fold(*item, |at, name| at.get(name));
                    found.is_some_and(|found| is_text(found, wanted))
                };
                value.as_array().into_iter().flatten().filter(holds).collect()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn printer_column_paths_find_their_values() {
        let object = json!({"metadata": {"labels": {"a.b/c": "l"}}, "spec": {"n": 3, "list": [{"name": "x"}, {"name": "y"}]},
            "status": {"conditions": [{"type": "A", "status": "False"}, {"type": "Ready", "status": "True"}]}});
        for (path, expected) in [
            (".spec.n", json!([3])),
            (".status.conditions[?(@.type==\"Ready\")].status", json!(["True"])),
            (".status.conditions[?(@.type=='Ready')].status", json!(["True"])),
            (".spec.list[1].name", json!(["y"])),
            (".spec.list[*].name", json!(["x", "y"])),
            (".metadata.labels.a\\.b/c", json!(["l"])),
            (".metadata.labels['a\\.b/c']", json!(["l"])),
            (".spec.missing", json!([])),
        ] {
            assert_eq!(json!(JsonPath::parse(path).unwrap().find(&object)), expected, "{path}");
        }
        assert_eq!(JsonPath::parse("spec.n"), None);
    }
}
