//! Processes of the benchmark inside places: started, asked one JSON line at a time, ended when dropped.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsFd;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::place::Place;

/// How long a process may take to enter its place and say so.
const START: Duration = Duration::from_secs(10);

/// A process of this binary in a place.
#[derive(Debug)]
pub(crate) struct Worker {
    title: String,
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// The hidden command that does something in a place.
///
/// # Errors
/// The running program's path is unknown.
pub(crate) fn command(place: &Place, what: &[&str]) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("no path of the running program")?);
    command.arg("inside").args(place.arguments()).args(what);
    Ok(command)
}

impl Worker {
    /// Starts a process and waits until it is ready. Only the main thread starts processes: they die with the thread.
    ///
    /// # Errors
    /// It could not enter its place; what it said is on standard error.
    pub(crate) fn start(title: &str, place: &Place, what: &[&str]) -> Result<Self> {
        let mut child = command(place, what)?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("start {title}"))?;
        let (stdin, stdout) = (child.stdin.take(), child.stdout.take());
        let (Some(stdin), Some(stdout)) = (stdin, stdout) else { bail!("{title} has no pipes") };
        let mut worker = Self { title: title.to_owned(), child, stdin, stdout: BufReader::new(stdout) };
        worker.answer::<Value>(START)?;
        Ok(worker)
    }

    /// Process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Sends a question and waits for its answer.
    ///
    /// # Errors
    /// The process ended, did not answer in time, or answered that it failed.
    pub(crate) fn ask<T: DeserializeOwned>(&mut self, question: &impl Serialize, limit: Duration) -> Result<T> {
        let mut line = serde_json::to_string(question)?;
        line.push('\n');
        self.stdin.write_all(line.as_bytes()).with_context(|| format!("{} has ended", self.title))?;
        self.answer(limit)
    }

    fn answer<T: DeserializeOwned>(&mut self, limit: Duration) -> Result<T> {
        let deadline = Instant::now() + limit;
        while self.stdout.buffer().is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("{} did not answer within {:.1} s", self.title, limit.as_secs_f64());
            }
            let timeout = PollTimeout::try_from(left.max(Duration::from_millis(1))).unwrap_or(PollTimeout::MAX);
            match poll(&mut [PollFd::new(self.stdout.get_ref().as_fd(), PollFlags::POLLIN)], timeout) {
                Ok(0) | Err(nix::Error::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error).with_context(|| format!("wait for {}", self.title)),
            }
            if self.stdout.fill_buf().with_context(|| format!("read from {}", self.title))?.is_empty() {
                bail!("{} has ended{}", self.title, self.child.wait().map_or(String::new(), |s| format!(" ({s})")));
            }
        }
        let mut line = String::new();
        self.stdout.read_line(&mut line).with_context(|| format!("read from {}", self.title))?;
        let answer: Result<Value, String> =
            serde_json::from_str(&line).with_context(|| format!("{} answered {line:?}", self.title))?;
        let value = answer.map_err(|error| anyhow!("{}: {error}", self.title))?;
        serde_json::from_value(value).with_context(|| format!("{} answered {line:?}", self.title))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The other side: says that it is ready and answers questions until its standard input ends.
///
/// # Errors
/// Standard input or output cannot be used, or a question is not understood.
pub(crate) fn answer_questions<Q: DeserializeOwned, A: Serialize>(
    mut answer: impl FnMut(Q) -> Result<A>,
) -> Result<()> {
    say(&Ok::<_, String>("ready"))?;
    for line in std::io::stdin().lines() {
        let question = serde_json::from_str(&line?).context("a question of the benchmark is not understood")?;
        say(&answer(question).map_err(|error| format!("{error:#}")))?;
    }
    Ok(())
}

fn say<T: Serialize>(what: &Result<T, String>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(what)?).and_then(|()| out.flush()).context("answer the benchmark")
}

/// Says that a process is ready that takes no questions.
///
/// # Errors
/// Nobody listens.
pub(crate) fn say_ready() -> Result<()> {
    say(&Ok::<_, String>("ready"))
}
