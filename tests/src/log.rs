//! What a row showed: commands as typed, checks with their outcome.

use std::io::Write;
use std::time::Instant;

/// Colours, when a person looks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Voice {
    /// Everything as it happens, in colour.
    Person,
    /// Everything as it happens, plain.
    Plain,
}

/// One check of a row.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was expected.
    pub what: String,
    /// Why it did not hold; none: it held.
    pub failure: Option<String>,
}

/// The record of one row.
#[derive(Debug)]
pub struct Log {
    voice: Voice,
    checks: Vec<Check>,
    started: Instant,
}

impl Log {
    /// An empty record.
    pub fn new(voice: Voice) -> Self {
        Self { voice, checks: Vec::new(), started: Instant::now() }
    }

    fn paint(&self, style: anstyle::Style, text: &str) -> String {
        match self.voice {
            Voice::Person => format!("{style}{text}{style:#}"),
            Voice::Plain => text.to_owned(),
        }
    }

    fn line(&self, text: &str) {
        // A closed pipe must not end a run that will still clean up.
        let _ = writeln!(std::io::stdout(), "{text}");
    }

    /// Shows a command as the user would type it.
    pub fn command(&self, command: &str) {
        let dim = anstyle::Style::new().dimmed();
        self.line(&self.paint(dim, &format!("    $ {command}")));
    }

    /// Shows a heading.
    pub fn heading(&self, text: &str) {
        let bold = anstyle::Style::new().bold();
        self.line(&self.paint(bold, text));
    }

    /// Shows a remark.
    pub fn say(&self, text: &str) {
        self.line(&format!("    {text}"));
    }

    /// Records and shows a check.
    pub fn check(&mut self, what: impl Into<String>, outcome: Result<(), String>) {
        let what = what.into();
        let (mark, colour) = match outcome {
            Ok(()) => ("✓", anstyle::AnsiColor::Green),
            Err(_) => ("✗", anstyle::AnsiColor::Red),
        };
        let mark = self.paint(colour.on_default(), mark);
        match &outcome {
            Ok(()) => self.line(&format!("    {mark} {what}")),
            Err(why) => self.line(&format!("    {mark} {what}\n        {}", why.trim().replace('\n', "\n        "))),
        }
        self.checks.push(Check { what, failure: outcome.err() });
    }

    /// Records a check that holds when `held` does; `why` is shown when it does not.
    pub fn expect(&mut self, what: impl Into<String>, held: bool, why: impl Into<String>) {
        self.check(what, if held { Ok(()) } else { Err(why.into()) });
    }

    /// The checks that failed.
    pub fn failures(&self) -> impl Iterator<Item = &Check> {
        self.checks.iter().filter(|c| c.failure.is_some())
    }

    /// How many checks were made.
    pub fn len(&self) -> usize {
        self.checks.len()
    }

    /// Whether none was made (a row that checks nothing has shown nothing).
    pub fn is_empty(&self) -> bool {
        self.checks.is_empty()
    }

    /// Seconds since the record was begun.
    pub fn seconds(&self) -> f64 {
        self.started.elapsed().as_secs_f64()
    }
}
