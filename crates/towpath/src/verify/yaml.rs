//! YAML and JSON documents with the line of every value, so that an error can say where.

use std::fmt;

use serde::Deserialize;
use serde::de::{Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use serde_saphyr::Spanned;

/// A value and the line (from 1, in its document) that it begins at; 0: not known.
#[derive(Clone, Debug)]
pub(super) struct Located {
    line: u64,
    node: Node,
}

#[derive(Clone, Debug)]
enum Node {
    Scalar(Value),
    List(Vec<Located>),
    Map(Vec<(String, Located)>),
}

impl<'de> Deserialize<'de> for Located {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let spanned = Spanned::<Node>::deserialize(deserializer)?;
        Ok(Self { line: spanned.referenced.line(), node: spanned.value })
    }
}

struct AnyNode;

impl<'de> Visitor<'de> for AnyNode {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value that JSON has too")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Scalar(value.into()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Scalar(Number::from_f64(value).map_or(Value::Null, Value::Number)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Scalar(Value::String(value.to_owned())))
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Scalar(Value::Null))
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<Node, D::Error> {
        deserializer.deserialize_any(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Node, A::Error> {
        let mut out = Vec::new();
        while let Some(value) = list.next_element()? {
            out.push(value);
        }
        Ok(Node::List(out))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut out = Vec::new();
        while let Some((key, value)) = map.next_entry::<String, Located>()? {
            out.push((key, value));
        }
        Ok(Node::Map(out))
    }
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(AnyNode)
    }
}

impl Located {
    /// The plain value.
    pub(super) fn value(&self) -> Value {
        match &self.node {
            Node::Scalar(value) => value.clone(),
            Node::List(list) => Value::Array(list.iter().map(Located::value).collect()),
            Node::Map(map) => {
                Value::Object(map.iter().map(|(key, value)| (key.clone(), value.value())).collect::<Map<_, _>>())
            }
        }
    }

    /// What is at a key.
    pub(super) fn get(&self, key: &str) -> Option<&Located> {
        match &self.node {
            Node::Map(map) => map.iter().find(|(have, _)| have == key).map(|(_, value)| value),
            Node::Scalar(_) | Node::List(_) => None,
        }
    }

    /// The elements of a list; none: it is no list.
    pub(super) fn elements(&self) -> Option<&[Located]> {
        match &self.node {
            Node::List(list) => Some(list),
            Node::Scalar(_) | Node::Map(_) => None,
        }
    }

    /// The line it begins at.
    pub(super) fn line(&self) -> u64 {
        self.line
    }

    /// The line of a field (`spec.ingress[0].ports[1].port`), or of as much of the path as there is.
    pub(super) fn line_of(&self, path: &str) -> u64 {
        let mut at = self;
        let mut line = self.line;
        for step in path.split(['.', '[']).map(|step| step.trim_end_matches(']')).filter(|step| !step.is_empty()) {
            let next = match &at.node {
                Node::List(list) => step.parse::<usize>().ok().and_then(|index| list.get(index)),
                _ => at.get(step),
            };
            let Some(next) = next else { break };
            at = next;
            if next.line > 0 {
                line = next.line;
            }
        }
        line
    }
}

/// A document of a file.
#[derive(Debug)]
pub(super) struct Document {
    /// Its number in the file, from 1.
    pub(super) number: usize,
    /// Lines of the file before it.
    pub(super) before: u64,
    pub(super) root: Located,
}

/// A text that is no YAML (or JSON): in which document, where, and why.
#[derive(Debug)]
pub(super) struct Unreadable {
    pub(super) document: usize,
    pub(super) line: u64,
    pub(super) reason: String,
}

/// Takes a file apart. Documents without content are left out.
pub(super) fn documents(text: &str) -> Result<Vec<Document>, Unreadable> {
    let mut out = Vec::new();
    for (number, before, part) in parts(text) {
        let empty = |rest: &str| rest.trim().is_empty() || rest.trim_start().starts_with('#');
        let blank = |line: &str| empty(line) || line.strip_prefix("---").is_some_and(empty);
        if part.lines().all(blank) {
            continue;
        }
        let options = serde_saphyr::options! { strict_booleans: true, legacy_octal_numbers: true };
        let root = serde_saphyr::from_str_with_options::<Located>(part, options);
        let root = root.or_else(|error| json(part).ok_or(error)).map_err(|error| Unreadable {
            document: number,
            line: before + error.location().map_or(1, |location| location.line()),
            reason: reason(&error.to_string()),
        })?;
        out.push(Document { number, before, root });
    }
    Ok(out)
}

/// The reader's message without its place, which is in the document and not in the file.
fn reason(message: &str) -> String {
    let first = message.lines().next().unwrap_or_default();
    let (place, rest) = first.split_once(": ").unwrap_or(("", first));
    let (place, rest) = if place == "error" { rest.split_once(": ").unwrap_or(("", rest)) } else { (place, rest) };
    if place.starts_with("line ") { rest.to_owned() } else { first.to_owned() }
}

/// JSON that YAML does not take, such as with tabs.
fn json(text: &str) -> Option<Located> {
    fn located(value: Value) -> Located {
        let node = match value {
            Value::Array(list) => Node::List(list.into_iter().map(located).collect()),
            Value::Object(map) => Node::Map(map.into_iter().map(|(key, value)| (key, located(value))).collect()),
            scalar => Node::Scalar(scalar),
        };
        Located { line: 0, node }
    }
    serde_json::from_str(text).ok().map(located)
}

/// The documents of a file as text, with the number of lines before each. A line that begins with `---` begins one: YAML allows it
/// nowhere else.
fn parts(text: &str) -> Vec<(usize, u64, &str)> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let mut starts: Vec<(usize, u64)> = vec![(0, 0)];
    let (mut offset, mut line) = (0usize, 0u64);
    for full in text.split_inclusive('\n') {
        let is_marker =
            full.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with([' ', '\t', '\r', '\n']));
        if is_marker && offset > 0 {
            starts.push((offset, line));
        }
        offset += full.len();
        line += 1;
    }
    let ends = starts.iter().skip(1).map(|(at, _)| *at).chain([text.len()]).collect::<Vec<_>>();
    let both = starts.iter().zip(ends);
    let cut = both.map(|((begin, line), end)| (*line, text.get(*begin..end).unwrap_or_default()));
    cut.enumerate().map(|(index, (line, part))| (index + 1, line, part)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_has_its_line_also_in_later_documents_and_lists() {
        let text = "# first\na: 1\nb:\n  - x\n  - y: yes\n---\n\n# only words\n---\nc: {d: [1,\n  2]}\n";
        let documents = documents(text).unwrap();
        assert_eq!(documents.iter().map(|d| d.number).collect::<Vec<_>>(), [1, 3]);
        let line = |index: usize, path: &str| documents[index].before + documents[index].root.line_of(path);
        assert_eq!((line(0, "a"), line(0, "b[1].y"), line(0, "b[1].z"), line(0, "nothing")), (2, 5, 5, 2));
        assert_eq!(line(1, "c.d[1]"), 11);
        assert_eq!(documents[0].root.value()["b"][1]["y"], "yes", "a word, as in the API");
    }

    #[test]
    fn what_is_no_yaml_is_refused_with_its_line() {
        let error = documents("a: 1\n---\nb: [\nc: }\n").unwrap_err();
        assert_eq!(error.document, 2);
        assert!(!error.reason.contains("line "), "of the document, not of the file: {}", error.reason);
        assert!((3..=5).contains(&error.line), "{error:?}");
        assert!(documents("{\n\t\"a\":\t[1]\n}").unwrap()[0].root.get("a").is_some(), "JSON with tabs");
        assert!(documents("").unwrap().is_empty());
        assert!(documents("--- # nothing\n---\n").unwrap().is_empty());
        let one_line = documents("a: 1\n--- {b: 2} # here\n").unwrap();
        assert_eq!(one_line[1].root.value()["b"], 2, "what stands beside the marker");
        assert_eq!(one_line[1].before + one_line[1].root.line_of("b"), 2);
    }
}
