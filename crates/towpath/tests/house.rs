//! What the documents say of the house is so: rooms, dependency rules, files that are pointed to.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use towpath_wire::config::AgentConfig;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn read(path: &str) -> String {
    std::fs::read_to_string(root().join(path)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Directories that are crates, as the table of ARCHITECTURE.md names them.
fn crates() -> BTreeSet<String> {
    let mut found: BTreeSet<String> = std::fs::read_dir(root().join("crates"))
        .unwrap()
        .map(|entry| format!("crates/{}", entry.unwrap().file_name().to_string_lossy()))
        .filter(|dir| root().join(dir).join("Cargo.toml").is_file())
        .collect();
    found.extend(["bench/".to_owned(), "tests/".to_owned(), "bpf/".to_owned(), "deploy/".to_owned()]);
    found
}

#[test]
fn every_room_is_in_the_architecture_and_every_room_there_exists() {
    let text = read("ARCHITECTURE.md");
    let described: BTreeSet<String> = text
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .filter_map(|line| line.split('`').next())
        .filter(|room| room.starts_with("crates/") || room.ends_with('/'))
        .map(str::to_owned)
        .collect();
    assert_eq!(described, crates());
}

/// All documents, by their paths below the root.
fn documents() -> Vec<String> {
    let below = |directory: &str| {
        let entries = std::fs::read_dir(root().join(directory)).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned());
        let documents = names.filter(|name| name.ends_with(".md"));
        documents.map(|name| format!("{directory}{name}")).collect::<Vec<_>>()
    };
    ["", "docs/", "docs/decisions/"].into_iter().flat_map(below).collect()
}

/// What links may name behind a `#`: the headings, as GitHub makes anchors of them.
fn anchors(text: &str) -> BTreeSet<String> {
    let (mut found, mut in_code) = (BTreeSet::new(), false);
    for line in text.lines() {
        in_code ^= line.starts_with("```");
        let title = line.trim_start_matches('#');
        if in_code || title.len() == line.len() || !title.starts_with(' ') {
            continue;
        }
        let kept = title.trim().to_lowercase();
        let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c)).collect::<String>();
        let plain = kept.replace(' ', "-");
        let numbered = (1..).map(|number| format!("{plain}-{number}"));
        let free = std::iter::once(plain.clone()).chain(numbered).find(|anchor| !found.contains(anchor));
        found.extend(free);
    }
    found
}

#[test]
fn links_of_the_documents_lead_somewhere() {
    for document in documents() {
        let text = read(&document);
        let path = root().join(&document);
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if link.starts_with("http") {
                continue;
            }
            let (target, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = if target.is_empty() { path.clone() } else { path.parent().unwrap().join(target) };
            assert!(target.exists(), "{document} points to {link}, which is not there");
            if !anchor.is_empty() {
                let headings = anchors(&std::fs::read_to_string(&target).unwrap());
                assert!(headings.contains(anchor), "{document} points to {link}; headings there are {headings:?}");
            }
        }
    }
}

/// What a document says may be in `agent.yaml`: code that begins with `limits` or its like, or stands before "in `agent.yaml`".
fn configured(text: &str) -> Vec<String> {
    let pieces: Vec<&str> = text.split('`').collect();
    let is_limit = |code: &str| {
        let first = code.split(['.', ':']).next().unwrap_or_default();
        first == "limits" || first.ends_with("Limits")
    };
    // Code and what stands between it take turns.
    let code = pieces.windows(3).skip(1).step_by(2);
    let keys = code.filter(|window| is_limit(window[0]) || window[1..] == [" in ", "agent.yaml"]);
    keys.map(|window| window[0].to_owned()).collect()
}

/// The field that an agent's configuration does not have; none: it has all that are named.
fn unknown_field(key: &str) -> Option<String> {
    let text = match key.contains(':') {
        true => key.to_owned(),
        false => key.rsplit('.').fold("null".to_owned(), |inner, name| format!("{{{name}: {inner}}}")),
    };
    let value: serde_json::Value = serde_saphyr::from_str(&text).unwrap_or_else(|e| panic!("{key}: {e}"));
    let refused = serde_json::from_value::<AgentConfig>(value).err()?.to_string();
    refused.contains("unknown field").then_some(refused)
}

#[test]
fn keys_that_documents_name_are_keys_of_the_agents_configuration() {
    assert!(unknown_field("mapLimits.setClasses").is_some() && unknown_field("limits.sets").is_some());
    let mut named = 0;
    for document in documents() {
        for key in configured(&read(&document)) {
            let unknown = unknown_field(&key);
            assert!(unknown.is_none(), "{document} names {key}: {}", unknown.unwrap_or_default());
            named += 1;
        }
    }
    assert!(named >= 6, "only {named} keys were found: how documents name them has changed");
}

#[test]
fn decisions_are_numbered_without_gaps() {
    let mut names: Vec<String> = std::fs::read_dir(root().join("docs/decisions"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    for (index, name) in names.iter().enumerate() {
        assert!(name.starts_with(&format!("{:03}-", index + 1)), "{name} should be number {}", index + 1);
        let title = read(&format!("docs/decisions/{name}"));
        assert!(title.starts_with(&format!("# {}. ", index + 1)), "{name} should begin with its number and title");
    }
}

#[test]
fn every_crate_forbids_unsafe_code_but_the_one_that_may() {
    for room in crates().iter().filter(|room| room.starts_with("crates/")) {
        let library = root().join(room).join("src/lib.rs");
        let file = if library.exists() { library } else { root().join(room).join("src/main.rs") };
        let forbids = std::fs::read_to_string(&file).unwrap().contains("#![forbid(unsafe_code)]");
        assert_eq!(forbids, room != "crates/datapath", "{}", file.display());
    }
}

#[test]
fn every_alert_says_what_it_is_and_has_a_runbook() {
    let rules: serde_json::Value = serde_saphyr::from_str(&read("deploy/monitoring/alerts.yaml")).unwrap();
    let operations = read("docs/operations.md");
    let mut alerts = BTreeSet::new();
    for rule in rules["groups"].as_array().unwrap().iter().flat_map(|group| group["rules"].as_array().unwrap()) {
        let name = rule["alert"].as_str().unwrap();
        let text = |field: &str| rule["annotations"][field].as_str().unwrap_or_else(|| panic!("{name} has no {field}"));
        assert!(!text("summary").is_empty() && !text("description").is_empty(), "{name}");
        assert!(text("runbook_url").ends_with(&format!("docs/operations.md#{}", name.to_lowercase())), "{name}");
        assert!(operations.contains(&format!("\n### {name}\n")), "{name} has no section in docs/operations.md");
        assert!(["info", "warning", "critical"].contains(&rule["labels"]["severity"].as_str().unwrap()), "{name}");
        assert!(rule["for"].is_string() && rule["expr"].is_string(), "{name}");
        assert!(alerts.insert(name.to_owned()), "{name} is there twice");
    }
    let sections = operations.lines().filter_map(|line| line.strip_prefix("### Towpath"));
    for section in sections {
        assert!(alerts.contains(&format!("Towpath{section}")), "a runbook of no alert: Towpath{section}");
    }
    let _: serde_json::Value = serde_saphyr::from_str(&read("deploy/monitoring/scrape.yaml")).unwrap();
}
