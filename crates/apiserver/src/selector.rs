//! Label and field selectors in their query-string form.

use serde_json::Value;

use crate::resource::{ResourceKind, Strategy};
use crate::status::ApiError;
use crate::store::Stored;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Operator {
    In,
    NotIn,
    Exists,
    NotExists,
    Greater,
    Less,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Requirement {
    key: String,
    operator: Operator,
    values: Vec<String>,
}

/// A parsed label selector; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct LabelSelector(Vec<Requirement>);

fn refuse(what: &str, selector: &str) -> ApiError {
    ApiError::bad_request(format!("unable to parse requirement in selector {selector:?}: {what}"))
}

impl LabelSelector {
    /// `a=b,c!=d,e in (f,g),h notin (i),j,!k,l>1,m<2`.
    pub(crate) fn parse(text: &str) -> Result<Self, ApiError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if !part.is_empty() {
                requirements.push(parse_requirement(part, text)?);
            }
        }
        Ok(Self(requirements))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn matches(&self, labels: &[(Box<str>, Box<str>)]) -> bool {
        self.0.iter().all(|requirement| {
            let value = labels.iter().find(|(key, _)| **key == *requirement.key).map(|(_, value)| &**value);
            requirement.holds(value)
        })
    }
}

impl Requirement {
    fn holds(&self, value: Option<&str>) -> bool {
        let listed = |value: &str| self.values.iter().any(|have| have == value);
        let number = |value: &str| value.parse::<i64>().ok();
        let bound = self.values.first().and_then(|bound| number(bound));
        match (&self.operator, value) {
            (Operator::In, value) => value.is_some_and(listed),
            (Operator::NotIn, value) => !value.is_some_and(listed),
            (Operator::Exists, value) => value.is_some(),
            (Operator::NotExists, value) => value.is_none(),
            (Operator::Greater, value) => matches!((value.and_then(number), bound), (Some(v), Some(b)) if v > b),
            (Operator::Less, value) => matches!((value.and_then(number), bound), (Some(v), Some(b)) if v < b),
        }
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let mut parts = Vec::new();
    let (mut depth, mut start) = (0_u32, 0_usize);
    for (at, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            ',' if depth == 0 => {
                parts.extend(text.get(start..at));
                start = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(start..));
    parts
}

fn parse_requirement(part: &str, whole: &str) -> Result<Requirement, ApiError> {
    let make = |key: &str, operator, values: Vec<String>| {
        let key = key.trim();
        let legal = |c: char| c.is_ascii_alphanumeric() || "-_./".contains(c);
        if key.is_empty() || !key.chars().all(legal) {
            return Err(refuse(&format!("invalid label key {key:?}"), whole));
        }
        for value in &values {
            if value.len() > 63 || !value.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c)) {
                return Err(refuse(&format!("invalid label value {value:?}"), whole));
            }
        }
        Ok(Requirement { key: key.to_owned(), operator, values })
    };
    if let Some((head, list)) = part.split_once('(') {
        let list = list.trim_end().strip_suffix(')').ok_or_else(|| refuse("missing ')'", whole))?;
        let values = list.split(',').map(|value| value.trim().to_owned()).collect();
        let words: Vec<&str> = head.split_whitespace().collect();
        return match words.as_slice() {
            [key, "in"] => make(key, Operator::In, values),
            [key, "notin"] => make(key, Operator::NotIn, values),
            _ => Err(refuse("expected KEY in (…) or KEY notin (…)", whole)),
        };
    }
    if let Some(key) = part.strip_prefix('!') {
        return make(key, Operator::NotExists, Vec::new());
    }
    let forms = [("!=", Operator::NotIn), ("==", Operator::In), ("=", Operator::In)];
    for (sign, operator) in forms {
        if let Some((key, value)) = part.split_once(sign) {
            return make(key, operator, vec![value.trim().to_owned()]);
        }
    }
    for (sign, operator) in [('>', Operator::Greater), ('<', Operator::Less)] {
        if let Some((key, value)) = part.split_once(sign) {
            let value = value.trim();
            if value.parse::<i64>().is_err() {
                return Err(refuse(&format!("{value:?} is not an integer"), whole));
            }
            return make(key, operator, vec![value.to_owned()]);
        }
    }
    make(part, Operator::Exists, Vec::new())
}

/// A parsed field selector; the empty one matches everything.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSelector(Vec<(String, bool, String)>);

impl FieldSelector {
    /// `metadata.name=x,status.phase!=Running`. Fields the kind does not offer are refused, as by the real server.
    pub(crate) fn parse(text: &str, strategy: &dyn Strategy, kind: &str) -> Result<Self, ApiError> {
        let mut terms = Vec::new();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let (field, equal, value) = if let Some((field, value)) = part.split_once("!=") {
                (field, false, value)
            } else if let Some((field, value)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (field, true, value)
            } else {
                return Err(ApiError::bad_request(format!("invalid selector: '{text}'; can't understand '{part}'")));
            };
            let known = matches!(field, "metadata.name" | "metadata.namespace")
                || strategy.selectable_field(field, &Value::Null).is_some();
            if !known {
                return Err(ApiError::bad_request(format!(
                    "Unable to find {kind:?} that match label selector \"\", field selector {text:?}: field label not supported: {field}"
                )));
            }
            terms.push((field.to_owned(), equal, unescape(value)));
        }
        Ok(Self(terms))
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether an object matches, as this version of its kind shows it; `parse` is called when a field of its inside is asked for that nobody asked for
    /// before.
    pub(crate) fn matches(&self, kind: &ResourceKind, stored: &Stored, parse: impl Fn() -> Value) -> bool {
        let mut parsed = None;
        self.0.iter().all(|(field, equal, wanted)| {
            let same = match field.as_str() {
                "metadata.name" => *stored.key.name == **wanted,
                "metadata.namespace" => *stored.key.namespace == **wanted,
                other => stored.field_is(&kind.gvk, other, wanted, || {
                    kind.strategy.selectable_field(other, parsed.get_or_insert_with(&parse)).unwrap_or_default()
                }),
            };
            same == *equal
        })
    }
}

fn unescape(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    let mut characters = value.chars();
    while let Some(c) = characters.next() {
        match c {
            '\\' => out.extend(characters.next()),
            other => out.push(other),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Vec<(Box<str>, Box<str>)> {
        pairs.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect()
    }

    #[test]
    fn label_selectors_match_as_documented() {
        let have = labels(&[("app", "web"), ("tier", "front"), ("n", "5")]);
        for (selector, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=back", true),
            ("app!=web", false),
            ("missing!=web", true),
            ("app in (web, db),tier notin (back)", true),
            ("app in (db)", false),
            ("app,!missing", true),
            ("!app", false),
            ("n>4,n<6", true),
            ("n>5", false),
        ] {
            assert_eq!(LabelSelector::parse(selector).unwrap().matches(&have), expected, "{selector}");
        }
    }

    #[test]
    fn broken_label_selectors_are_refused() {
        for selector in ["app in (web", "a b", "=x", "x>y", "app=we b", "a^b"] {
            assert_eq!(LabelSelector::parse(selector).unwrap_err().code, 400, "{selector}");
        }
    }
}
