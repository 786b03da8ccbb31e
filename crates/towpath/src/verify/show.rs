//! Answers as text and as JUnit XML.

use std::fmt::Write;

use comfy_table::{Table, presets::NOTHING};
use towpath_model::Family;
use towpath_model::desired::Verdict;
use towpath_policy::verify::Row;
use towpath_policy::verify::diff::Difference;
use towpath_policy::verify::expect::Failure;
use towpath_policy::verify::reach::Reach;

use crate::connectivity::escaped;

/// Names in a cell before they are only counted; JSON has all.
const SHOWN: usize = 8;

fn list(names: &[String]) -> String {
    let shown = names.iter().take(SHOWN).map(String::as_str).collect::<Vec<_>>().join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => shown,
        more => format!("{shown} and {more} more"),
    }
}

fn ports(row: &Row) -> String {
    match row.family {
        None => row.ports.to_string(),
        Some(Family::V4) => format!("{} (IPv4)", row.ports),
        Some(Family::V6) => format!("{} (IPv6)", row.ports),
    }
}

fn table(header: Option<[&str; 3]>, rows: &[Row]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    if let Some(header) = header {
        table.set_header(header);
    }
    for row in rows {
        table.add_row([list(&row.from.short), list(&row.to.short), ports(row)]);
    }
    let text = table.to_string();
    text.lines().map(|line| line.trim_end().strip_prefix(' ').unwrap_or(line.trim_end())).collect::<Vec<_>>().join("\n")
}

/// The table of who reaches whom.
pub(super) fn reach(reach: &Reach, pod_ranges: &str) -> String {
    let mut text = match reach.rows.is_empty() {
        true => "nobody reaches anybody".to_owned(),
        false => table(Some(["FROM", "TO", "PORTS"]), &reach.rows),
    };
    let _ = write!(text, "\n\n{} workloads; what is in no row is closed.", reach.workloads);
    if !reach.on_nodes.is_empty() {
        let _ =
            write!(text, "\nOn their nodes' addresses, where NetworkPolicy does not apply: {}.", list(&reach.on_nodes));
    }
    if let Some(assumed) = assumed(reach.placed, reach.inner_blocks, pod_ranges) {
        let _ = write!(text, "\n{assumed}");
    }
    text
}

/// What is taken for granted of pods without an address, if there are some.
pub(super) fn assumed(placed: usize, inner_blocks: usize, pod_ranges: &str) -> Option<String> {
    let outside = match inner_blocks {
        0 => String::new(),
        1 => ", and outside of the ipBlock that lies within it".to_owned(),
        more => format!(", and outside of the {more} ipBlocks that lie within it"),
    };
    (placed > 0).then(|| format!("Pods without an address are taken to be in {pod_ranges} (--pod-cidr){outside}."))
}

/// What a change does.
pub(super) fn difference(difference: &Difference, pod_ranges: &str) -> String {
    let mut parts = Vec::new();
    if difference.is_empty() {
        parts.push("no difference".to_owned());
    }
    for (title, sign, rows) in [("newly allowed", '+', &difference.allowed), ("newly denied", '-', &difference.denied)]
    {
        if !rows.is_empty() {
            let lines = table(None, rows);
            let lines = lines.lines().map(|line| format!("{sign} {line}")).collect::<Vec<_>>().join("\n");
            parts.push(format!("{title}\n{lines}"));
        }
    }
    for (title, names) in
        [("only after the change", &difference.added), ("only before the change", &difference.removed)]
    {
        if !names.is_empty() {
            parts.push(format!("{title} (not compared): {}", list(names)));
        }
    }
    if !difference.unassigned.is_empty() {
        let blocks: Vec<String> = difference.unassigned.iter().map(ToString::to_string).collect();
        parts.push(format!(
            "changed, and whom it concerns depends on which pods get these addresses (not compared): {}",
            list(&blocks)
        ));
    }
    parts.extend(assumed(difference.placed, difference.inner_blocks, pod_ranges));
    parts.join("\n\n")
}

/// Where an expectation does not hold.
pub(super) fn failure(failure: &Failure) -> String {
    let (is, should) = match failure.decision.verdict {
        Verdict::Allow => ("open", "should be closed"),
        Verdict::Deny => ("closed", "should be open"),
    };
    let mut text = format!("{} → {}: {} {is}, {should}", failure.from, failure.to, failure.ports);
    let example = &failure.example;
    let _ = write!(text, "\n  {} → {} {}", example.source, example.destination, example.port);
    for line in failure.decision.to_string().lines() {
        let _ = write!(text, "\n  {line}");
    }
    text
}

/// How one question came out.
pub(super) enum Came {
    /// As it should.
    Good,
    /// Not as it should: why.
    Bad(String),
    /// It could not be understood: why.
    Unclear(String),
}

/// A question and how it came out, for a report.
pub(super) struct Case {
    pub(super) name: String,
    pub(super) place: String,
    pub(super) came: Came,
}

/// For continuous integration: a test case a question.
pub(super) fn junit(suite: &str, cases: &[Case]) -> String {
    let count = |wanted: fn(&Came) -> bool| cases.iter().filter(|case| wanted(&case.came)).count();
    let failures = count(|came| matches!(came, Came::Bad(_)));
    let errors = count(|came| matches!(came, Came::Unclear(_)));
    let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
    let _ = writeln!(
        text,
        "<testsuite name=\"{}\" tests=\"{}\" failures=\"{failures}\" errors=\"{errors}\" skipped=\"0\">",
        escaped(suite),
        cases.len()
    );
    for case in cases {
        let _ = write!(
            text,
            "  <testcase classname=\"{}\" name=\"{}\" file=\"{}\"",
            escaped(suite),
            escaped(&case.name),
            escaped(&case.place)
        );
        let body = |tag: &str, why: &str| {
            let first = escaped(why.lines().next().unwrap_or_default());
            format!("><{tag} message=\"{first}\">{}</{tag}></testcase>\n", escaped(why))
        };
        match &case.came {
            Came::Good => text.push_str("/>\n"),
            Came::Bad(why) => text.push_str(&body("failure", why)),
            Came::Unclear(why) => text.push_str(&body("error", why)),
        }
    }
    text.push_str("</testsuite>\n");
    text
}
