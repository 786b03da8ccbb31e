//! System calls of a process, one by one: which it makes, and killing it in one of them.
//!
//! A process that is killed so has not made that call: to be killed in the next one is to be killed after it.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::cluster::wait;

/// A call of one thread, by its name and by how many of that name the thread made until then, itself included.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Call {
    /// `openat`, …
    pub name: String,
    /// From 1.
    pub nth: u32,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.name, self.nth)
    }
}

/// Where the program is: for commands whose environment is cleared.
const PROGRAM: &str = "/usr/bin/strace";

fn words(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// Runs a program and writes down its calls.
pub fn recording(into: &Path) -> Vec<String> {
    words(&[PROGRAM, "-qq", "-o", &into.to_string_lossy()])
}

/// Runs a program and kills it in a call.
pub fn killing(call: &Call) -> Vec<String> {
    let (trace, inject) = (format!("trace={}", call.name), injection(call));
    words(&[PROGRAM, "-qq", "-o", "/dev/null", "-e", &trace, "-e", &inject])
}

fn injection(call: &Call) -> String {
    format!("inject={}:signal=KILL:when={}", call.name, call.nth)
}

/// The calls in a record, in the order in which they were begun; of several threads each with its own counts.
pub fn calls(record: &str) -> Vec<Call> {
    let mut counts: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    let begun = record.lines().filter_map(|line| {
        // `1234 openat(…`, or without the thread where there is one only; `<... openat resumed>` begins nothing.
        let line = line.trim_start();
        let (thread, call) = match line.split_once(' ') {
            Some((thread, rest)) if thread.bytes().all(|b| b.is_ascii_digit()) => (thread, rest.trim_start()),
            _ => ("", line),
        };
        let name = call.split('(').next()?;
        let is_name = !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        is_name.then_some((thread, name))
    });
    let count = |(thread, name)| {
        let nth = counts.entry((thread, name)).or_default();
        *nth += 1;
        Call { name: name.to_owned(), nth: *nth }
    };
    begun.map(count).collect()
}

/// A tracer of a process that runs already, and of all its threads.
#[derive(Debug)]
pub struct Tracer {
    strace: Child,
    pid: i32,
}

/// How long a tracer may take to let go of a process.
const LETTING_GO: Duration = Duration::from_secs(5);

impl Tracer {
    /// Writes down the calls of these names from when this returns.
    ///
    /// # Errors
    /// It cannot be traced.
    pub fn recording(pid: i32, names: &[&str], into: &Path) -> Result<Self> {
        let trace = format!("trace={}", names.join(","));
        Self::attach(pid, &["-o", &into.to_string_lossy(), "-e", &trace])
    }

    /// Kills it in a call, counted from when this returns: the first of its threads to get so far.
    ///
    /// # Errors
    /// It cannot be traced.
    pub fn killing(pid: i32, call: &Call) -> Result<Self> {
        let (trace, inject) = (format!("trace={}", call.name), injection(call));
        Self::attach(pid, &["-o", "/dev/null", "-e", &trace, "-e", &inject])
    }

    fn attach(pid: i32, options: &[&str]) -> Result<Self> {
        let mut strace = Command::new(PROGRAM);
        strace.args(["-f", "-qq"]).args(options).args(["-p", &pid.to_string()]);
        let tracer = Self { strace: strace.stdin(Stdio::null()).spawn().context("start strace")?, pid };
        let traced = |status: &str| status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"));
        wait("strace to have all threads", Duration::from_secs(10), || {
            for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
                let status = std::fs::read_to_string(task?.path().join("status"))?;
                ensure!(traced(&status), "process {pid}: {status}");
            }
            Ok(())
        })?;
        Ok(tracer)
    }

    /// Whether the process has ended, its tracer and its parent told or not.
    pub fn has_ended(&self) -> bool {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid)).unwrap_or_default();
        let state = status.lines().find_map(|line| line.strip_prefix("State:")).unwrap_or_default().trim_start();
        !state.starts_with(|state: char| !"ZX".contains(state))
    }

    fn is_gone_within(&mut self, time: Duration) -> bool {
        let deadline = Instant::now() + time;
        loop {
            match self.strace.try_wait() {
                Ok(None) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                ended => return !matches!(ended, Ok(None)),
            }
        }
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        // It ends with the process. Asked to end while that dies, it would wait forever: for the process, before it has seen the last of its threads.
        if self.has_ended() && self.is_gone_within(LETTING_GO) || self.is_gone_within(Duration::ZERO) {
            return;
        }
        // Asked first, not killed: so its record is whole. The process may die at this very moment.
        if let Ok(pid) = i32::try_from(self.strace.id()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        if !self.is_gone_within(LETTING_GO) {
            let _ = self.strace.kill();
            let _ = self.strace.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_by_name_and_thread() {
        let record = "7  openat(AT_FDCWD, \"a b\") = 3\n8  openat(AT_FDCWD, \"b\" <unfinished ...>\n7  read(3, \"openat(\", 9) = 7\n\
                      8  <... openat resumed>) = 4\n7  openat(AT_FDCWD) = 5\n7  +++ killed by SIGKILL +++\n--- SIGCHLD ---\n";
        let of = |name: &str, nth| Call { name: name.to_owned(), nth };
        assert_eq!(calls(record), [of("openat", 1), of("openat", 1), of("read", 1), of("openat", 2)]);
        assert_eq!(calls("execve(\"x\") = 0\nbrk(NULL) = 0x1\n"), [of("execve", 1), of("brk", 1)]);
    }
}
