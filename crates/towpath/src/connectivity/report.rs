//! What is said while it runs, and the results at the end: as text, JSON and JUnit XML.

use std::fmt::Write;
use std::time::Instant;

use serde::Serialize;
use serde_json::{Value, json};

use super::judge::{CheckResult, Status};

/// Says a line at a time what happens.
pub(super) struct Reporter {
    to_error: bool,
}

impl Reporter {
    /// With `to_error`, standard output is left to the results.
    pub(super) fn new(to_error: bool) -> Self {
        Self { to_error }
    }

    /// A line.
    pub(super) fn say(&self, line: &str) {
        // Nobody reads any more (`| head`): the test goes on, since its namespace must go.
        match self.to_error {
            true => eprintln!("{line}"),
            false => drop(crate::print(line)),
        }
    }

    /// A check has ended.
    pub(super) fn result(&self, result: &CheckResult) {
        self.say(&line(result));
    }
}

fn line(result: &CheckResult) -> String {
    let status = match result.status {
        Status::Passed => "ok  ",
        Status::Failed => "FAIL",
        Status::Skipped => "skip",
    };
    let again = match result.attempts {
        0 | 1 => String::new(),
        n => format!(" (attempt {n})"),
    };
    format!(
        "{status} {:<34} {} on {} → {}: {}, {:.0} ms{again}",
        result.name,
        result.from,
        result.from_node,
        result.to,
        result.said,
        result.seconds * 1000.0
    )
}

/// All results.
#[derive(Debug, Default)]
pub(super) struct Report {
    begun: Option<Instant>,
    /// The nodes that were tried.
    pub(super) nodes: Vec<String>,
    /// In order.
    pub(super) results: Vec<CheckResult>,
}

/// The results as JSON.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Document<'a> {
    version: &'static str,
    nodes: &'a [String],
    seconds: f64,
    passed: usize,
    failed: usize,
    skipped: usize,
    checks: &'a [CheckResult],
}

impl Report {
    /// The clock starts.
    pub(super) fn begin(&mut self) {
        self.begun = Some(Instant::now());
    }

    fn seconds(&self) -> f64 {
        self.begun.map(|begun| begun.elapsed().as_secs_f64()).unwrap_or_default()
    }

    fn count(&self, status: Status) -> usize {
        self.results.iter().filter(|result| result.status == status).count()
    }

    /// How many failed.
    pub(super) fn failed(&self) -> usize {
        self.count(Status::Failed)
    }

    /// The last lines: what failed, with what to do, and the counts.
    pub(super) fn summary(&self) -> String {
        let mut text = String::new();
        let mut shown: Vec<&str> = Vec::new();
        for result in self.results.iter().filter(|result| result.status == Status::Failed) {
            let _ = writeln!(text, "\n{}", line(result));
            let said = result.explanation.as_deref().unwrap_or_default();
            if shown.contains(&said) && !said.is_empty() {
                let _ = writeln!(text, "    (towpath explain: as above)");
            } else {
                for line in said.lines() {
                    let _ = writeln!(text, "    {line}");
                }
                shown.push(said);
            }
            for next in &result.next {
                let _ = writeln!(text, "  next: {next}");
            }
        }
        let (passed, failed, skipped) = (self.count(Status::Passed), self.failed(), self.count(Status::Skipped));
        let _ = write!(text, "{passed} passed, {failed} failed, {skipped} skipped in {:.0} s", self.seconds());
        text
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        json!(Document {
            version: env!("CARGO_PKG_VERSION"),
            nodes: &self.nodes,
            seconds: self.seconds(),
            passed: self.count(Status::Passed),
            failed: self.failed(),
            skipped: self.count(Status::Skipped),
            checks: &self.results,
        })
    }

    /// For continuous integration: a suite a kind of check.
    pub(super) fn junit(&self) -> String {
        let mut text = String::from("<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n");
        let _ = writeln!(
            text,
            "<testsuite name=\"towpath connectivity\" tests=\"{}\" failures=\"{}\" errors=\"0\" skipped=\"{}\" time=\"{:.3}\">",
            self.results.len(),
            self.failed(),
            self.count(Status::Skipped),
            self.seconds()
        );
        for result in &self.results {
            let name = format!("{} {} on {} → {}", result.name, result.from, result.from_node, result.to);
            let class = result.name.split('/').next().unwrap_or_default();
            let _ = write!(
                text,
                "  <testcase classname=\"towpath.{}\" name=\"{}\" time=\"{:.3}\"",
                escaped(class),
                escaped(&name),
                result.seconds
            );
            let body = format!("{}\n{}", result.explanation.as_deref().unwrap_or_default(), result.next.join("\n"));
            let _ = match result.status {
                Status::Passed => writeln!(text, "/>"),
                Status::Failed => writeln!(
                    text,
                    "><failure message=\"{}\">{}</failure></testcase>",
                    escaped(&result.said),
                    escaped(body.trim())
                ),
                Status::Skipped => writeln!(text, "><skipped message=\"{}\"/></testcase>", escaped(&result.said)),
            };
        }
        text.push_str("</testsuite>\n");
        text
    }
}

/// Text as XML 1.0 may have it, in attributes too.
pub(crate) fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out.push_str("&amp;"),
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '"' => out.push_str("&quot;"),
            '\n' => out.push_str("&#10;"),
            '\t' => out.push_str("&#9;"),
            // No other control character may be in XML, escaped or not.
            c if c.is_control() => out.push('\u{fffd}'),
            c => out.push(c),
        }
    }
    out
}
