//! `towpath verify lint`: findings with their place in the files.

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Result, bail};
use serde::Serialize;
use towpath_policy::verify::Universe;
use towpath_policy::verify::lint::{Code, Finding, Level, lint};

use super::load::Position;
use super::objects::{Loaded, Problem};
use super::show::{Came, Case, junit};
use super::{Exit, Source};
use anyhow::Context;

/// Options of `towpath verify lint`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Manifests: files, directories, - for standard input.
    paths: Vec<PathBuf>,
    /// The exit code is 1 from this level on.
    #[arg(long, value_enum, default_value = "warning")]
    fail_on: FailOn,
    /// Leave a code out (may be given several times).
    #[arg(long, value_name = "CODE")]
    allow: Vec<String>,
    /// Say what a code means and what to do, and nothing else.
    #[arg(long, value_name = "CODE")]
    explain: Option<String>,
    /// Write a JUnit report there.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// The least level that is a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum FailOn {
    Note,
    Warning,
    Error,
    Never,
}

/// A finding with its place.
#[derive(Debug, Serialize)]
struct Placed {
    #[serde(skip_serializing_if = "String::is_empty")]
    place: String,
    level: Level,
    #[serde(flatten)]
    finding: Finding,
    advice: &'static str,
}

fn code(text: &str) -> Result<Code> {
    let found = Code::ALL.iter().find(|code| code.id().eq_ignore_ascii_case(text)).copied();
    found.with_context(|| format!("{text:?} is no code: they are TP001 to TP{:03}", Code::ALL.len()))
}

/// Looks for mistakes.
pub(super) fn run(options: &Options) -> Result<Exit> {
    if let Some(text) = &options.explain {
        let code = code(text)?;
        crate::print(&format!("{} ({}): {}.\n{}", code.id(), code.level(), code.title(), code.advice()))?;
        return Ok(Exit::Good);
    }
    let allowed = options.allow.iter().map(|text| code(text)).collect::<Result<Vec<_>>>()?;
    let mut loaded = options.source.load(&options.paths)?;
    if loaded.world.policies.is_empty() && loaded.world.cluster_policies.is_empty() && loaded.problems.is_empty() {
        bail!("no policy is there");
    }
    let mut findings = of_loading(&loaded);
    let (world, owners) = (std::mem::take(&mut loaded.world), std::mem::take(&mut loaded.owners));
    let found = lint(&Universe::of(world, &owners, &options.source.pod_cidr));
    findings.extend(found.into_iter().map(|finding| {
        let at = loaded.position(&finding.object, &finding.field);
        (finding, at)
    }));
    findings.retain(|(finding, _)| !allowed.contains(&finding.code));
    let mut placed: Vec<Placed> = findings.into_iter().map(place).collect();
    placed.sort_by_cached_key(|p| (sortable(&p.place), p.finding.clone()));
    if let Some(file) = &options.junit {
        let cases: Vec<Case> = placed.iter().map(case).collect();
        std::fs::write(file, junit("towpath verify lint", &cases))
            .with_context(|| format!("could not write {}", file.display()))?;
    }
    match options.output {
        crate::Output::Json => crate::print_json(&placed)?,
        crate::Output::Text => crate::print(&text(&placed))?,
    }
    let least = match options.fail_on {
        FailOn::Note => Level::Note,
        FailOn::Warning => Level::Warning,
        FailOn::Error => Level::Error,
        FailOn::Never => return Ok(Exit::Good),
    };
    Ok(if placed.iter().any(|p| p.level >= least) { Exit::Bad } else { Exit::Good })
}

/// What reading the objects has found, with its place: of two objects of one name only the last can be looked up.
fn of_loading(loaded: &Loaded) -> Vec<(Finding, Option<Position>)> {
    let mut findings = Vec::new();
    for Problem { at, invalid } in &loaded.problems {
        let code = if invalid.field.ends_with(".ipBlock.except") { Code::Except } else { Code::Invalid };
        findings.push((Finding::new(code, &invalid.object, &invalid.field, invalid.reason.clone()), at.clone()));
    }
    for (object, direction, at) in &loaded.idle {
        let message = format!("spec.policyTypes does not have {direction}, so spec.{direction} is not in force");
        let finding = Finding::new(Code::NotInForce, object, format!("spec.{direction}"), message);
        findings.push((finding, Some(at.clone())));
    }
    for (object, first, second) in &loaded.twice {
        let finding = Finding::new(Code::Twice, object, "metadata.name", format!("it is also at {first}"));
        findings.push((finding, Some(second.clone())));
    }
    findings.extend(loaded.notes.iter().map(|note| (Finding::new(Code::OtherKind, "", "", note), None)));
    findings
}

fn place((finding, at): (Finding, Option<Position>)) -> Placed {
    Placed {
        place: at.map(|at| at.to_string()).unwrap_or_default(),
        level: finding.code.level(),
        advice: finding.code.advice(),
        finding,
    }
}

/// File, then line as a number.
fn sortable(place: &str) -> (String, u64) {
    let (file, line) = place.rsplit_once(':').unwrap_or((place, "0"));
    (file.to_owned(), line.parse().unwrap_or_default())
}

fn line(placed: &Placed) -> String {
    let Finding { code, object, field, message } = &placed.finding;
    let place = if placed.place.is_empty() { String::new() } else { format!("{}: ", placed.place) };
    let what = [object.as_str(), field.as_str()].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join(": ");
    let what = if what.is_empty() { String::new() } else { format!("{what}: ") };
    format!("{place}{} {}: {what}{message}", placed.level, code.id())
}

fn text(placed: &[Placed]) -> String {
    if placed.is_empty() {
        return "nothing found".to_owned();
    }
    let mut text = String::new();
    for finding in placed {
        let _ = writeln!(text, "{}", line(finding));
    }
    let mut codes: Vec<Code> = placed.iter().map(|p| p.finding.code).collect();
    codes.sort_unstable();
    codes.dedup();
    text.push('\n');
    for code in codes {
        let _ = writeln!(text, "{}: {}. {}", code.id(), code.title(), code.advice());
    }
    let count = |level: Level| placed.iter().filter(|p| p.level == level).count();
    let _ = write!(
        text,
        "\n{} errors, {} warnings, {} notes",
        count(Level::Error),
        count(Level::Warning),
        count(Level::Note)
    );
    text
}

fn case(placed: &Placed) -> Case {
    let name = format!("{} {} {}", placed.finding.code.id(), placed.finding.object, placed.finding.field);
    let came = match placed.level {
        Level::Note => Came::Good,
        Level::Warning | Level::Error => Came::Bad(format!("{}\n{}", line(placed), placed.advice)),
    };
    Case { name, place: placed.place.clone(), came }
}
