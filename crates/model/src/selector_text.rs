//! Label selectors as `kubectl -l` takes them: `app=web,tier!=cache,env in (prod,test),region notin (eu),gpu,!spot`.

use std::collections::BTreeSet;
use std::str::FromStr;

use crate::labels::{Requirement, Selector};

/// Why a text is no selector.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{part:?} is no requirement on labels: key=value, key!=value, key in (a,b), key notin (a,b), key or !key")]
pub struct NoSelector {
    /// What is not understood.
    pub part: String,
}

impl FromStr for Selector {
    type Err = NoSelector;

    fn from_str(text: &str) -> Result<Self, NoSelector> {
        let parts = split(text).into_iter().filter(|part| !part.trim().is_empty());
        Ok(Self::of(parts.map(str::parse).collect::<Result<Vec<_>, _>>()?))
    }
}

/// At the commas outside of parentheses.
fn split(text: &str) -> Vec<&str> {
    let (mut parts, mut begin, mut inside) = (Vec::new(), 0, false);
    for (at, letter) in text.char_indices() {
        match letter {
            '(' => inside = true,
            ')' => inside = false,
            ',' if !inside => {
                parts.extend(text.get(begin..at));
                begin = at + 1;
            }
            _ => {}
        }
    }
    parts.extend(text.get(begin..));
    parts
}

impl FromStr for Requirement {
    type Err = NoSelector;

    fn from_str(text: &str) -> Result<Self, NoSelector> {
        let part = text.trim();
        let refused = || NoSelector { part: part.to_owned() };
        let key = |text: &str| {
            let text = text.trim();
            is_key(text).then(|| text.to_owned()).ok_or_else(refused)
        };
        let value = |text: &str| {
            let text = text.trim();
            (text.is_empty() || is_name(text)).then(|| BTreeSet::from([text.to_owned()])).ok_or_else(refused)
        };
        if let Some((before, list)) = part.strip_suffix(')').and_then(|rest| rest.split_once('(')) {
            let values = list.split(',').map(value).collect::<Result<Vec<_>, _>>()?.into_iter().flatten().collect();
            let (name, operator) = before.trim().rsplit_once(char::is_whitespace).ok_or_else(refused)?;
            return match operator {
                "in" => Ok(Self::In(key(name)?, values)),
                "notin" => Ok(Self::NotIn(key(name)?, values)),
                _ => Err(refused()),
            };
        }
        if let Some((name, wanted)) = part.split_once("!=") {
            return Ok(Self::NotIn(key(name)?, value(wanted)?));
        }
        if let Some((name, wanted)) = part.split_once("==").or_else(|| part.split_once('=')) {
            return Ok(Self::In(key(name)?, value(wanted)?));
        }
        match part.strip_prefix('!') {
            Some(name) => Ok(Self::DoesNotExist(key(name)?)),
            None => Ok(Self::Exists(key(part)?)),
        }
    }
}

/// A label's value, or its key after the `/`: up to 63 letters, digits, `-`, `_` and `.`, a letter or digit at both ends.
fn is_name(text: &str) -> bool {
    let ends =
        text.starts_with(|c: char| c.is_ascii_alphanumeric()) && text.ends_with(|c: char| c.is_ascii_alphanumeric());
    ends && text.len() <= 63 && text.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
}

/// A label's key: a name, before it perhaps a domain and `/`.
fn is_key(text: &str) -> bool {
    match text.split_once('/') {
        None => is_name(text),
        Some((domain, name)) => {
            let parts = domain.split('.').all(|part| is_name(part) && part == part.to_ascii_lowercase());
            parts && domain.len() <= 253 && !domain.contains('_') && is_name(name)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Labels;

    fn labels(list: &[(&str, &str)]) -> Labels {
        list.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn every_form_means_what_kubectl_makes_of_it() {
        let web = labels(&[("app", "web"), ("env", "prod"), ("example.com/team", "a")]);
        for (text, matches) in [
            ("", true),
            ("app=web", true),
            ("app==web , env=prod", true),
            ("app=db", false),
            ("app!=db", true),
            ("tier!=db", true),
            ("env in (test, prod)", true),
            ("env in (test)", false),
            ("env notin (test,staging),app", true),
            ("tier notin (x)", true),
            ("!tier", true),
            ("!app", false),
            ("example.com/team=a", true),
            ("app=", false),
        ] {
            assert_eq!(text.parse::<Selector>().unwrap().matches(&web), matches, "{text}");
        }
    }

    #[test]
    fn what_is_none_is_named() {
        for text in [
            "app in web",
            "a b",
            "=x",
            "app=we b",
            "app within (a)",
            "!",
            "app=web,)",
            "a=b=c",
            "app='web'",
            "app=-web",
            "a/b/c",
            "Team/a",
            "app in (a, 'b')",
        ] {
            let refused = text.parse::<Selector>().unwrap_err();
            assert!(!refused.part.is_empty() && text.contains(&refused.part), "{text}: {refused}");
        }
    }

    #[test]
    fn what_a_selector_shows_is_read_as_itself() {
        for text in ["app=web,env in (a,b)", "!x,y,z notin (q)"] {
            let selector: Selector = text.parse().unwrap();
            assert_eq!(selector.to_string().parse::<Selector>().unwrap(), selector);
        }
    }
}
