//! What comes out: a table on the terminal, JSON, Markdown, a plot.

mod markdown;
mod svg;
mod ways;

use std::fmt::Write as _;
use std::io::{IsTerminal, Write as _};
use std::path::Path;

use anyhow::{Context, Result};
use serde::Serialize;
use serde_json::json;

use crate::groups::Run;
use crate::row::Row;

/// What the figures were taken on.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Machine {
    kernel: String,
    cpus: usize,
    model: String,
    virtual_machine: bool,
}

impl Machine {
    /// This one.
    pub(crate) fn this() -> Self {
        let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let field = |name: &str| {
            let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name));
            line.and_then(|line| line.split(':').nth(1)).unwrap_or("").trim().to_owned()
        };
        let model = field("model name");
        Self {
            kernel: kernel.trim().to_owned(),
            cpus: info.lines().filter(|line| line.starts_with("processor")).count(),
            model: if model.is_empty() { "unknown CPU".to_owned() } else { model },
            virtual_machine: field("flags").split(' ').any(|flag| flag == "hypervisor"),
        }
    }

    fn line(&self) -> String {
        let kind = if self.virtual_machine { "virtual machine" } else { "bare metal" };
        format!("Linux {}, {} CPUs ({}), {kind}", self.kernel, self.cpus, self.model)
    }
}

/// How the figures were taken, in one line.
fn conditions(run: &Run, seed: u64) -> String {
    let options = &run.options;
    format!(
        "blocks of {} s, {} rounds wanted, client on CPU {}, server on CPU {}, rounds dropped above {} % steal or {} % foreign CPU, seed {seed}",
        options.block, options.rounds, run.cpus.client, run.cpus.server, options.max_steal, options.max_foreign
    )
}

/// Shows what is being done, on one line of a terminal; an empty text takes it away.
pub(crate) fn progress(text: &str) {
    let mut err = std::io::stderr();
    if err.is_terminal() {
        // Progress that cannot be shown stops nothing.
        let _ = write!(err, "\r\x1b[K{text}").and_then(|()| err.flush());
    }
}

/// Says something that is no figure.
pub(crate) fn note(text: &str) {
    progress("");
    eprintln!("{text}");
}

/// Says that a row is done.
pub(crate) fn finished(row: &Row) {
    progress("");
    eprintln!("{}: {} {}", row.title, row.figure(), row.verdict.word());
}

/// Prints the table and writes the files asked for.
///
/// # Errors
/// A file cannot be written.
pub(crate) fn write(run: &Run, machine: &Machine, seed: u64) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let ways = ways::lines(run);
    let mut text = table(&run.rows, &[machine.line(), conditions(run, seed)]);
    if !ways.is_empty() {
        let _ = write!(text, "\n{}", aligned(&ways));
    }
    match out.write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => return Err(error).context("print the table"),
        _ => {}
    }
    if let Some(path) = &run.options.json {
        let series: Vec<_> =
            run.series.iter().map(|(title, series)| json!({"title": title, "series": series})).collect();
        let value =
            json!({"machine": machine, "conditions": conditions(run, seed), "rows": run.rows, "measured": series});
        save(path, &format!("{value:#}\n"))?;
    }
    let facts = [machine.line(), conditions(run, seed)];
    let parts = [Part::Network, Part::Backends, Part::Services, Part::Policy].map(|part| {
        let rows: Vec<Row> = run.rows.iter().filter(|row| Part::of(row) == part).cloned().collect();
        (part, rows)
    });
    // What was not measured now stays as it was.
    for (part, rows) in parts.iter().filter(|(_, rows)| !rows.is_empty()) {
        if let Some(path) = &run.options.markdown {
            let mut figures = markdown::table(rows, &facts);
            if *part == Part::Backends {
                figures = format!("{}\n{figures}", markdown::plain(&ways));
            }
            let before = std::fs::read_to_string(path).unwrap_or_default();
            save(path, &markdown::between_markers(&before, part.name(), &figures))?;
        }
        match (part, &run.options.svg) {
            (Part::Network, Some(path)) => save(path, &svg::plot(rows, &machine.line()))?,
            (Part::Backends, Some(path)) => {
                let stem = path.file_stem().unwrap_or_default().to_string_lossy();
                save(&path.with_file_name(format!("{stem}-backends.svg")), &svg::plot(rows, &machine.line()))?;
            }
            _ => {}
        }
    }
    Ok(())
}

/// Tables of the report, each with the machine that it was taken on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    /// What all traffic meets.
    Network,
    /// Backends beside each other.
    Backends,
    /// Services and their scale.
    Services,
    /// Policies and theirs.
    Policy,
}

impl Part {
    fn of(row: &Row) -> Self {
        let services = ["services.", "endpoints.", "programs."];
        if row.id.starts_with("policy.") {
            return Part::Policy;
        }
        if row.id.starts_with("backends.") {
            return Part::Backends;
        }
        if services.iter().any(|prefix| row.id.starts_with(prefix)) { Part::Services } else { Part::Network }
    }

    /// What the marks in the report call it.
    fn name(self) -> &'static str {
        match self {
            Part::Network => "figures",
            Part::Backends => "figures of backends",
            Part::Services => "figures of Services",
            Part::Policy => "figures of policy",
        }
    }
}

fn save(path: &Path, text: &str) -> Result<()> {
    std::fs::write(path, text).with_context(|| format!("write {}", path.display()))
}

/// How many rounds count, of how many.
fn rounds(row: &Row) -> String {
    if row.dropped == 0 { row.kept.to_string() } else { format!("{} (−{})", row.kept, row.dropped) }
}

fn null(row: &Row) -> String {
    row.null.map_or("–".to_owned(), |null| format!("{null:.3}"))
}

/// Lines whose columns stand under each other.
fn aligned<const N: usize>(lines: &[[String; N]]) -> String {
    let widths: Vec<usize> = (0..N)
        .map(|column| lines.iter().filter_map(|line| Some(line.get(column)?.chars().count())).max().unwrap_or(0))
        .collect();
    let mut text = String::new();
    for line in lines {
        let cells: Vec<String> = line.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

fn table(rows: &[Row], facts: &[String]) -> String {
    let head = ["what", "goal", "measured [95 % CI]", "rounds", "A/A", "verdict"].map(str::to_owned);
    let mut lines = vec![head];
    lines.extend(rows.iter().map(|row| {
        [row.title.clone(), row.goal_text(), row.figure(), rounds(row), null(row), row.verdict.word().to_owned()]
    }));
    let mut text = aligned(&lines);
    for (number, row) in rows.iter().enumerate().filter(|(_, row)| !row.note.is_empty()) {
        let _ = writeln!(text, "{}{}: {}", if number == 0 { "\n" } else { "" }, row.id, row.note);
    }
    let _ = writeln!(text, "\n{}", facts.join("\n"));
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::row::tests::about;
    use crate::row::{Goal, Unit};
    use crate::stats::Random;

    pub(super) fn rows() -> Vec<Row> {
        let mut random = Random::new(1);
        let mut row = |title: &str, unit, samples: &[f64], goal| {
            let mut about = about(goal);
            about.title = title.to_owned();
            Row::of_samples(about, unit, samples.to_vec(), String::new(), &mut random)
        };
        vec![
            row("a ÷ b <fast> & \"good\"", Unit::Ratio, &[0.9, 1.0, 1.1], Some(Goal::AtLeast(0.95))),
            row("slow | one", Unit::Seconds, &[4.0], Some(Goal::AtMost(3.0))),
            row("huge", Unit::Ratio, &[250.0, 260.0], None),
            row("nothing", Unit::Ratio, &[], Some(Goal::AtLeast(1.0))),
        ]
    }

    #[test]
    fn every_row_is_of_one_part_by_its_id() {
        let part = |id: &str| {
            let mut about = about(None);
            about.id = id.to_owned();
            Part::of(&Row::of_samples(about, Unit::Ratio, Vec::new(), String::new(), &mut Random::new(1)))
        };
        assert_eq!(["same-node.rr.veth", "lab.up"].map(part), [Part::Network; 2]);
        assert_eq!(["services.crr.1", "endpoints.p50", "programs.new-judged"].map(part), [Part::Services; 3]);
        assert_eq!(["policy.rr.10", "policy.label"].map(part), [Part::Policy; 2]);
        assert_eq!(part("backends.rr.host-gw"), Part::Backends);
    }

    #[test]
    fn a_table_has_aligned_columns_and_a_line_a_row() {
        let text = table(&rows(), &["facts".to_owned()]);
        let lines: Vec<&str> = text.lines().collect();
        let column = |line: &str, word: &str| line.split(word).next().unwrap().chars().count();
        assert_eq!(column(lines[0], "measured"), column(lines[1], "1.000"));
        assert_eq!(column(lines[0], "verdict"), column(lines[1], "met"));
        assert_eq!(column(lines[0], "verdict"), column(lines[2], "missed"));
        assert!(lines[4].ends_with("void") && text.ends_with("facts\n"), "{text}");
    }
}
