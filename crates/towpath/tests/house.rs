//! What the documents say of the house is so: rooms, dependency rules, files that are pointed to.
#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::panic,
    reason = "a test says what failed by panicking, in its helpers too"
)]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

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

#[test]
fn links_of_the_documents_lead_somewhere() {
    for document in [
        "README.md",
        "ARCHITECTURE.md",
        "docs/roadmap.md",
        "docs/install.md",
        "docs/operations.md",
        "docs/load-balancer.md",
        "docs/security.md",
        "docs/services.md",
        "docs/verify.md",
    ] {
        let text = read(document);
        let base = root().join(document).parent().unwrap().to_path_buf();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            if !link.starts_with("http") {
                let target = link.split('#').next().unwrap_or_default();
                assert!(base.join(target).exists(), "{document} points to {target}, which is not there");
            }
        }
    }
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
