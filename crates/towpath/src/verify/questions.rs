//! Files of expectations (`assert`) and of statements (`prove`).

use std::collections::BTreeSet;
use std::fmt::Display;

use anyhow::{Result, anyhow, bail};
use serde_json::Value;
use towpath_policy::verify::Expectation;
use towpath_policy::verify::statement::{Claim, Exception, Statement};
use towpath_policy::verify::words::{Peers, PortWords, Term};

use super::load::{FileDocument, Position};
use super::yaml::Located;

/// A question with what it is called and where it stands.
#[derive(Debug)]
pub(super) struct Question<T> {
    pub(super) name: String,
    pub(super) at: Option<Position>,
    pub(super) asked: T,
}

/// One entry of a file.
struct Entry<'d> {
    document: &'d FileDocument,
    root: &'d Located,
}

impl Entry<'_> {
    fn position(&self, path: &str) -> Position {
        let line = self.document.before + self.root.line_of(path);
        Position { line: line.max(1), ..self.document.at.clone() }
    }

    fn wrong(&self, path: &str, why: impl Display) -> anyhow::Error {
        anyhow!("{}: {why}", self.position(path))
    }

    /// That it has no other keys than these.
    fn only(&self, below: Option<&str>, keys: &[&str]) -> Result<()> {
        let at = below.map_or(Some(self.root), |key| self.root.get(key));
        let Some(Value::Object(map)) = at.map(Located::value) else {
            let path = below.unwrap_or_default();
            return Err(self.wrong(path, format!("here should be {}", keys.join(", "))));
        };
        let prefix = below.map(|key| format!("{key}.")).unwrap_or_default();
        if let Some(key) = map.keys().find(|key| !keys.contains(&key.as_str())) {
            return Err(
                self.wrong(&format!("{prefix}{key}"), format!("unknown field {key:?}; known are {}", keys.join(", ")))
            );
        }
        Ok(())
    }

    /// A field as text: a word, a number, or a list of them with commas.
    fn text(&self, path: &str) -> Result<Option<String>> {
        self.joined(path, ", ")
    }

    /// A set as text: of a list, any of its entries.
    fn set(&self, path: &str) -> Result<Option<String>> {
        self.joined(path, " or ")
    }

    fn joined(&self, path: &str, separator: &str) -> Result<Option<String>> {
        let mut at = Some(self.root);
        for step in path.split('.') {
            at = at.and_then(|at| match at.elements() {
                Some(list) => step.parse::<usize>().ok().and_then(|index| list.get(index)),
                None => at.get(step),
            });
        }
        let word = |value: &Value| match value {
            Value::String(text) => Some(text.clone()),
            Value::Number(number) => Some(number.to_string()),
            _ => None,
        };
        match at.map(Located::value) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Array(list)) => {
                let words: Option<Vec<String>> = list.iter().map(word).collect();
                words
                    .map(|words| Some(words.join(separator)))
                    .ok_or_else(|| self.wrong(path, "a list of something else than words"))
            }
            Some(value) => word(&value).map(Some).ok_or_else(|| self.wrong(path, "here should be text")),
        }
    }

    fn peers(&self, path: &str) -> Result<Option<Peers>> {
        let Some(text) = self.set(path)? else { return Ok(None) };
        Peers::parse(&text).map(Some).map_err(|why| self.wrong(path, format!("{text:?}: {why}")))
    }

    fn ports(&self, path: &str) -> Result<Option<PortWords>> {
        let Some(text) = self.text(path)? else { return Ok(None) };
        PortWords::parse(&text).map(Some).map_err(|why| self.wrong(path, format!("{text:?}: {why}")))
    }
}

fn entries(documents: &[FileDocument]) -> Vec<Entry<'_>> {
    let mut out = Vec::new();
    for document in documents {
        match document.root.elements() {
            Some(list) => out.extend(list.iter().map(|root| Entry { document, root })),
            None => out.push(Entry { document, root: &document.root }),
        }
    }
    out
}

/// Reads expectations: a list of `allow` and `deny`.
///
/// # Errors
/// One cannot be understood; the error has its place.
pub(super) fn expectations(documents: &[FileDocument]) -> Result<Vec<Question<Expectation>>> {
    let mut out = Vec::new();
    for entry in entries(documents) {
        entry.only(None, &["name", "allow", "deny"])?;
        let verb = match (entry.root.get("allow"), entry.root.get("deny")) {
            (Some(_), None) => "allow",
            (None, Some(_)) => "deny",
            _ => return Err(entry.wrong("", "an expectation has either allow or deny")),
        };
        entry.only(Some(verb), &["from", "to", "port"])?;
        let end = |name: &str| -> Result<Peers> {
            let path = format!("{verb}.{name}");
            entry.peers(&path)?.ok_or_else(|| entry.wrong(verb, format!("{name} is missing")))
        };
        let (from, to) = (end("from")?, end("to")?);
        let port = format!("{verb}.port");
        let said = |end: &str| Ok::<_, anyhow::Error>(entry.set(&format!("{verb}.{end}"))?.unwrap_or_default());
        let on = entry.text(&port)?.unwrap_or_else(|| "any port".to_owned());
        let described = format!("{verb} {} → {} on {on}", said("from")?, said("to")?);
        out.push(Question {
            name: entry.text("name")?.unwrap_or(described),
            at: Some(entry.position("")),
            asked: Expectation {
                allow: verb == "allow",
                from,
                to,
                ports: entry.ports(&port)?.unwrap_or_else(PortWords::any),
            },
        });
    }
    if out.is_empty() {
        bail!(
            "no expectation is there: a file of them is a list of `allow: {{from: …, to: …, port: …}}` and `deny: …`"
        );
    }
    Ok(out)
}

/// Reads statements: a list of texts, of `prove: TEXT`, or of fields.
///
/// # Errors
/// One cannot be understood; the error has its place.
pub(super) fn statements(documents: &[FileDocument]) -> Result<Vec<Question<Statement>>> {
    let mut out = Vec::new();
    for entry in entries(documents) {
        let value = entry.root.value();
        if let Value::String(text) = &value {
            let asked = Statement::parse(text).map_err(|why| entry.wrong("", format!("{text:?}: {why}")))?;
            out.push(Question { name: text.clone(), at: Some(entry.position("")), asked });
            continue;
        }
        let (described, asked) = match entry.text("prove")? {
            Some(text) => {
                entry.only(None, &["name", "prove"])?;
                let asked = Statement::parse(&text).map_err(|why| entry.wrong("prove", format!("{text:?}: {why}")))?;
                (text, asked)
            }
            None => by_fields(&entry)?,
        };
        out.push(Question { name: entry.text("name")?.unwrap_or(described), at: Some(entry.position("")), asked });
    }
    if out.is_empty() {
        bail!("no statement is there: a file of them is a list of texts, or of nothing/everything, reaches, on, but");
    }
    Ok(out)
}

fn by_fields(entry: &Entry<'_>) -> Result<(String, Statement)> {
    entry.only(None, &["name", "nothing", "everything", "reaches", "on", "but"])?;
    let (verb, claim) = match (entry.root.get("nothing"), entry.root.get("everything")) {
        (Some(_), None) => ("nothing", Claim::Nothing),
        (None, Some(_)) => ("everything", Claim::Everything),
        _ => return Err(entry.wrong("", "a statement is text, prove: TEXT, or has either nothing or everything")),
    };
    let from = entry.peers(verb)?.unwrap_or_else(|| Peers(vec![Term::Anything]));
    let to = entry.peers("reaches")?.ok_or_else(|| entry.wrong("", "reaches is missing"))?;
    let ports = entry.ports("on")?.unwrap_or_else(PortWords::any);
    let mut but = Vec::new();
    let exceptions = entry.root.get("but").and_then(Located::elements);
    if entry.root.get("but").is_some() && exceptions.is_none() {
        return Err(entry.wrong("but", "but is a list of {from, to, on}"));
    }
    for (index, exception) in exceptions.unwrap_or_default().iter().enumerate() {
        let known: BTreeSet<&str> = ["from", "to", "on"].into();
        let path = format!("but[{index}]");
        match exception.value() {
            Value::Object(map) if !map.is_empty() && map.keys().all(|key| known.contains(key.as_str())) => {}
            _ => return Err(entry.wrong(&path, "an exception has one or more of from, to, on")),
        }
        let field = |name: &str| format!("but.{index}.{name}");
        but.push(Exception {
            from: entry.peers(&field("from"))?,
            to: entry.peers(&field("to"))?,
            ports: entry.ports(&field("on"))?.unwrap_or_else(PortWords::any),
        });
    }
    let more = if but.is_empty() { "" } else { " but …" };
    let who = entry.set(verb)?.unwrap_or_else(|| "anything".to_owned());
    let whom = entry.set("reaches")?.unwrap_or_default();
    let on = entry.text("on")?.unwrap_or_else(|| "any port".to_owned());
    let described = format!("{verb} {who} reaches {whom} on {on}{more}");
    Ok((described, Statement { claim, from, to, ports, but }))
}
