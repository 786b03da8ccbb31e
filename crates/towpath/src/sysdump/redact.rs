//! Takes out of texts and objects what may be secret. It takes too much rather than too little.

use std::sync::LazyLock;

use regex::Regex;
use serde_json::Value;

/// What is taken out, in words, for the manifest.
pub(super) const REMOVED: [&str; 6] = [
    "Secrets (never asked for)",
    "values of environment variables",
    "annotations, but those of networks and of Kubernetes' own controllers; last-applied-configuration and managedFields",
    "fields whose names speak of tokens, passwords, keys, certificates or credentials",
    "PEM blocks, JSON web tokens, bearer and bootstrap tokens, well-known forms of API keys",
    "user names and passwords in URLs",
];

/// What stands in the place of what was taken out.
const GONE: &str = "(removed)";

/// Annotations that say something of the network, by the beginning of their names.
const ANNOTATIONS: [&str; 12] = [
    "towpath.dev/",
    "flannel.alpha.coreos.com/",
    "projectcalico.org/",
    "cni.projectcalico.org/",
    "k8s.v1.cni.cncf.io/network",
    "service.kubernetes.io/",
    "endpoints.kubernetes.io/",
    "endpointslice.kubernetes.io/",
    "node.alpha.kubernetes.io/",
    "deployment.kubernetes.io/revision",
    "deprecated.daemonset.template.generation",
    "volumes.kubernetes.io/controller-managed-attach-detach",
];

/// Parts of field names whose values are nobody's business.
const FIELDS: [&str; 14] = [
    "token",
    "password",
    "passwd",
    "secret",
    "apikey",
    "api_key",
    "api-key",
    "privatekey",
    "private_key",
    "private-key",
    "credential",
    "certificate",
    "cabundle",
    "key-data",
];

/// A pattern that does not compile is a mistake of this file, and nothing may be written then: it matches everything.
fn pattern(text: &str) -> Regex {
    #[allow(clippy::expect_used, reason = "the patterns are constants, and a test compiles all of them")]
    Regex::new(text).expect("a constant pattern")
}

/// Patterns and what takes their place, in order.
static PATTERNS: LazyLock<Vec<(Regex, &'static str)>> = LazyLock::new(|| {
    [
        // To the end of the text when it has no end: a log that was cut.
        (r"(?s)-----BEGIN [A-Z0-9 ]+-----.*?(-----END [A-Z0-9 ]+-----|\z)", "(PEM removed)"),
        // The same in base64, as kubeconfigs have it.
        (r"LS0tLS1CRUdJT[A-Za-z0-9+/=]+", "(PEM removed)"),
        (r"eyJ[A-Za-z0-9_-]{6,}\.[A-Za-z0-9_-]{6,}(\.[A-Za-z0-9_-]*)?", "(token removed)"),
        (r"(?i)\b(bearer|basic)\s+[A-Za-z0-9._~+/=-]{6,}", "$1 (removed)"),
        (r"://[^/\s@]+@", "://(removed)@"),
        // Bootstrap tokens of kubeadm.
        (r"\b[a-z0-9]{6}\.[a-z0-9]{16}\b", "(token removed)"),
        (r"\b(gh[pousr]_[A-Za-z0-9]{20,}|glpat-[A-Za-z0-9_-]{16,}|AKIA[0-9A-Z]{16}|hvs\.[A-Za-z0-9_-]{16,}|xox[abprs]-[A-Za-z0-9-]{10,})", "(token removed)"),
        (
            r#"(?i)([\w-]*(?:token|password|passwd|secret|api[_-]?key|private[_-]?key|credential|key-data)[\w-]*["']?\s*[=:]\s*["']?)[^\s"',;}\]]+"#,
            "${1}(removed)",
        ),
    ]
    .into_iter()
    .map(|(text, instead)| (pattern(text), instead))
    .collect()
});

/// A text without what looks like a secret.
pub(super) fn text(text: &str) -> String {
    let mut out = text.to_owned();
    for (pattern, instead) in PATTERNS.iter() {
        if let std::borrow::Cow::Owned(changed) = pattern.replace_all(&out, *instead) {
            out = changed;
        }
    }
    out
}

/// A document, in place: of Kubernetes objects the parts that nobody needs, of everything else what looks like a secret.
pub(super) fn value(document: &mut Value) {
    match document {
        Value::String(string) => *string = text(string),
        Value::Array(list) => list.iter_mut().for_each(value),
        Value::Object(fields) => {
            let is_secret = fields.get("kind").and_then(Value::as_str) == Some("Secret");
            fields.shift_remove("managedFields");
            for (name, content) in fields.iter_mut() {
                match (name.as_str(), &mut *content) {
                    ("annotations", Value::Object(annotations)) => keep_ours(annotations),
                    ("env", Value::Array(variables)) => variables.iter_mut().for_each(forget_value),
                    ("data" | "stringData" | "binaryData", secret) if is_secret => *secret = GONE.into(),
                    (_, Value::String(string)) if !string.is_empty() && is_private(name) => *string = GONE.to_owned(),
                    (_, Value::Array(_) | Value::Number(_)) if is_private(name) => *content = GONE.into(),
                    (_, other) => value(other),
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

fn is_private(field: &str) -> bool {
    let field = field.to_ascii_lowercase();
    FIELDS.iter().any(|part| field.contains(part))
}

fn keep_ours(annotations: &mut serde_json::Map<String, Value>) {
    for (name, content) in annotations.iter_mut() {
        if ANNOTATIONS.iter().any(|known| name.starts_with(known)) {
            value(content);
        } else {
            *content = GONE.into();
        }
    }
}

/// A variable keeps its name and where its value comes from.
fn forget_value(variable: &mut Value) {
    if let Some(content) = variable.get_mut("value") {
        *content = GONE.into();
    }
    value(variable);
}
