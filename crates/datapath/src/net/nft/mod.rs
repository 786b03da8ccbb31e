//! Our nftables table `inet towpath`: masquerading of what leaves the cluster, connection tracking off for what stays inside,
//! and refusal of what is for a Service address and nobody translated.
//!
//! Only what differs is written, in one transaction, and nothing outside the table is touched. Ranges and addresses are in sets that have
//! names and stay while rules come and go. A packet on its way through a chain goes on by the rules that it began with, but what is in a
//! set it sees as of now: a set that went with the table would look empty to it, and what "is no node" is dropped.

mod rules;
mod sets;

use std::io::{self, Read, Write};
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};

use super::error::Error;
pub use rules::Facts;
use rules::Sets;

/// The table's name, in family `inet`.
pub const TABLE: &str = "towpath";

/// `nft` takes some hundredths of a second, with thousands of ranges some tenths. Nothing else is done in the kernel while it runs.
const PATIENCE: Duration = Duration::from_secs(30);

/// Source ports that masquerading picks from: the range of ordinary clients. Those above are left for translation in
/// kernel programs (`TP_SNAT_PORT_MIN` in `bpf/abi.h`), those below hold listeners and NodePorts.
pub const MASQUERADE_PORTS: (u16, u16) = (32768, 60999);

/// The mark that kube-proxy puts on connections which must have a source of the node (`--iptables-masquerade-bit`, 14 by default).
const KUBE_PROXY_MASQUERADE: u32 = 1 << 14;

/// The table in the kernel, as far as this process knows.
#[derive(Debug, Default)]
pub struct Table {
    written: Option<Written>,
}

/// What was written last.
#[derive(Debug)]
struct Written {
    facts: Facts,
    rules: Vec<Value>,
    sets: Sets,
    /// What the kernel listed right after the rules were written, but for what is in sets.
    listed: Option<Value>,
}

impl Table {
    /// Writes what differs between `facts` and what was written last; whether anything was.
    pub fn apply(&mut self, facts: &Facts) -> Result<bool, Error> {
        if self.written.as_ref().is_some_and(|written| written.facts == *facts) {
            return Ok(false);
        }
        let (facts, rules, sets) = (facts.clone(), rules::rules(facts), rules::sets(facts));
        // What is there is not known any more if writing fails.
        if let Some(written) = self.written.take().filter(|written| written.rules == rules) {
            match run(sets::turn(&written.sets, &sets)) {
                Ok(()) => {
                    self.written = Some(Written { facts, sets, ..written });
                    return Ok(true);
                }
                // Somebody took what was to go, or the table.
                Err(error) => tracing::warn!(%error, "the table is not as it was written: writing all of it"),
            }
        }
        write(&rules, &sets)?;
        let listed = list()?.map(sets::without_elements);
        self.written = Some(Written { facts, rules, sets, listed });
        Ok(true)
    }

    /// Writes the table if the kernel's differs from what we wrote (flushed, deleted or edited by somebody); whether it did.
    pub fn repair(&mut self, facts: &Facts) -> Result<bool, Error> {
        let there = list()?;
        let same = |written: &Written| {
            let sets = there.as_ref().and_then(sets::read);
            sets.as_ref() == Some(&written.sets) && there.clone().map(sets::without_elements) == written.listed
        };
        if !self.written.as_ref().is_some_and(same) {
            self.written = None;
        }
        self.apply(facts)
    }
}

/// Writes rules and sets, whatever there is: a table that another process wrote or somebody edited, or none. What is in sets already stays.
fn write(rules: &[Value], wanted: &Sets) -> Result<(), Error> {
    let named = |verb: &str| json!({verb: {"table": {"family": "inet", "name": TABLE}}});
    let rest =
        |present: &Sets| rules::add_sets().chain(sets::turn(present, wanted)).chain(rules.iter().cloned()).collect();
    if let Some(present) = list()?.as_ref().and_then(sets::read) {
        let commands: Vec<Value> = rest(&present);
        match run(std::iter::once(named("flush")).chain(commands)) {
            Ok(()) => return Ok(()),
            Err(error) => {
                tracing::warn!(%error, "writing the table as a whole: it cannot be made of the one that is there")
            }
        }
    }
    let commands: Vec<Value> = rest(&Sets::new());
    run(["add", "delete", "add"].map(named).into_iter().chain(commands))
}

/// All tables of the namespace, those of others too, as `nft -j list ruleset` says them.
///
/// # Errors
/// `nft` is not there, or not allowed to.
pub fn whole_ruleset() -> Result<Value, Error> {
    let output = nft(&["-j", "list", "ruleset"], None)?;
    serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list ruleset` printed no JSON: {e}") })
}

/// Whether the table is there.
pub fn is_present() -> Result<bool, Error> {
    Ok(list()?.is_some())
}

/// Deletes the table; fine when there is none.
pub fn delete() -> Result<(), Error> {
    let table = json!({"table": {"family": "inet", "name": TABLE}});
    run([json!({"add": table}), json!({"delete": table})])
}

/// Everything that the kernel lists, of all tables.
pub(crate) fn list_all() -> Result<Value, Error> {
    let output = nft(&["-j", "list", "ruleset"], None)?;
    serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list ruleset` printed no JSON: {e}") })
}

/// Carries commands out, all or none.
pub(crate) fn run(commands: impl IntoIterator<Item = Value>) -> Result<(), Error> {
    let commands: Vec<Value> = commands.into_iter().collect();
    nft(&["-j", "-f", "-"], Some(&json!({ "nftables": commands }))).map(drop)
}

/// The table as the kernel lists it, without handles; none when it is not there.
fn list() -> Result<Option<Value>, Error> {
    let output = match nft(&["-j", "list", "table", "inet", TABLE], None) {
        Ok(output) => output,
        Err(Error::Nft { reason }) if reason.contains("No such file or directory") => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut value: Value = serde_json::from_slice(&output)
        .map_err(|e| Error::Nft { reason: format!("`nft -j list table` printed no JSON: {e}") })?;
    strip_handles(&mut value);
    Ok(Some(value))
}

fn strip_handles(value: &mut Value) {
    match value {
        Value::Object(map) => {
            map.remove("handle");
            map.remove("metainfo");
            map.values_mut().for_each(strip_handles);
        }
        Value::Array(list) => list.iter_mut().for_each(strip_handles),
        _ => {}
    }
}

fn nft(arguments: &[&str], input: Option<&Value>) -> Result<Vec<u8>, Error> {
    let broken = |e: std::io::Error| Error::Nft {
        reason: match e.kind() {
            std::io::ErrorKind::NotFound => {
                "the program `nft` is not installed; on Debian: apt install nftables".to_owned()
            }
            _ => format!("`nft` cannot be run: {e}"),
        },
    };
    let output = output_of(Command::new("nft").args(arguments), input, PATIENCE).map_err(broken)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    Err(Error::Nft { reason: format!("`nft {}` failed ({}): {}", arguments.join(" "), output.status, words.trim()) })
}

/// What a program says that is given this. One that does not end in time is killed, and that is its failure.
fn output_of(command: &mut Command, input: Option<&Value>, patience: Duration) -> io::Result<Output> {
    let stdin = if input.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let (ended, end) = mpsc::channel();
    thread::scope(|scope| {
        if let (Some(mut stdin), Some(input)) = (stdin, input) {
            // A child that died at once closes the pipe; its exit status and words say why.
            scope.spawn(move || drop(stdin.write_all(input.to_string().as_bytes())));
        }
        let words = scope.spawn(move || read(stderr));
        scope.spawn(move || drop(ended.send(read(stdout))));
        let stdout = end.recv_timeout(patience);
        if stdout.is_err() {
            child.kill()?;
        }
        let status = child.wait()?;
        let Ok(stdout) = stdout else {
            let late =
                format!("it did not end within {} s and was killed; is the machine overloaded?", patience.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, late));
        };
        let stderr = words.join().unwrap_or_else(|_| Err(io::Error::other("its words were lost")))?;
        Ok(Output { status, stdout: stdout?, stderr })
    })
}

fn read(pipe: Option<impl Read>) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    pipe.map_or(Ok(0), |mut pipe| pipe.read_to_end(&mut all))?;
    Ok(all)
}

#[cfg(test)]
mod tests;
