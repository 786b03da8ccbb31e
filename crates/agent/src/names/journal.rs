//! What was learned, on disk: a line a lesson, so that writing one costs no more than itself.
//!
//! In the run directory, because it must outlive the agent and not a reboot; a header says of which boot it is (times are since then, so that no wall clock
//! can stretch them). What cannot be read teaches nothing: then names are accepted when they are asked for again.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use towpath_policy::Learned;
use tracing::warn;

use crate::disk;

/// Its name in the run directory.
pub(super) const FILE: &str = "learned-names.jsonl";
const FORMAT: u32 = 1;
/// More lines than this many beyond twice what holds, and it is written anew.
const SPARE_LINES: usize = 1024;

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Header {
    format: u32,
    boot: String,
}

/// A lesson.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Line {
    pub(super) name: String,
    pub(super) addresses: Vec<IpAddr>,
    /// Milliseconds since boot.
    until: u64,
}

impl Line {
    pub(super) fn until(&self) -> Duration {
        Duration::from_millis(self.until)
    }
}

/// Time since the machine was started (`proc_uptime(5)`), suspended time included.
pub(super) fn since_boot() -> Duration {
    let text = fs::read_to_string("/proc/uptime").unwrap_or_default();
    let seconds = text.split_whitespace().next().and_then(|first| first.parse::<f64>().ok());
    seconds.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok()).unwrap_or_default()
}

fn boot() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// The file.
#[derive(Debug)]
pub(super) struct Journal {
    path: PathBuf,
    lines: usize,
    /// Its end is torn, or it is another boot's, or not there.
    stale: bool,
    /// Something that it says was forgotten since.
    outdated: bool,
    failed: bool,
}

impl Journal {
    /// What it says of this boot.
    pub(super) fn open(directory: &Path) -> (Self, Vec<Line>) {
        let path = directory.join(FILE);
        let text = fs::read(&path).unwrap_or_default();
        let mut lines = text.split(|byte| *byte == b'\n');
        let header = lines.next().and_then(|line| serde_json::from_slice::<Header>(line).ok());
        let ours = header.is_some_and(|header| header == Header { format: FORMAT, boot: boot() });
        let lessons: Vec<Line> = match ours {
            // A line that was cut off by the end of its writer, or of the disk, is none.
            true => lines.filter_map(|line| serde_json::from_slice(line).ok()).collect(),
            false => Vec::new(),
        };
        let whole = ours && text.ends_with(b"\n");
        (Self { path, lines: lessons.len(), stale: !whole, outdated: false, failed: false }, lessons)
    }

    /// Lines of it do not hold any more.
    pub(super) fn outdate(&mut self) {
        self.outdated = true;
    }

    /// Writes a lesson.
    pub(super) fn append(&mut self, name: &str, addresses: Vec<IpAddr>, until: Duration) {
        if addresses.is_empty() {
            return;
        }
        let line = Line { name: name.to_owned(), addresses, until: milliseconds(until) };
        let written = serde_json::to_string(&line).map_err(std::io::Error::other).and_then(|line| {
            let mut text = String::new();
            if self.stale {
                // A torn end stands as a line of its own.
                match fs::metadata(&self.path).is_ok_and(|file| file.len() > 0) && self.lines > 0 {
                    true => text.push('\n'),
                    false => {
                        fs::remove_file(&self.path).or_else(ignore_missing)?;
                        text = serde_json::to_string(&Header { format: FORMAT, boot: boot() })? + "\n";
                    }
                }
            }
            text.push_str(&line);
            text.push('\n');
            let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
            file.write_all(text.as_bytes())
        });
        self.note(written);
        self.lines += 1;
    }

    fn note(&mut self, written: std::io::Result<()>) {
        match written {
            Ok(()) => (self.stale, self.failed) = (false, false),
            Err(error) => {
                if !std::mem::replace(&mut self.failed, true) {
                    warn!(%error, file = %self.path.display(),
                        "what names stand for cannot be kept: after a restart of the agent, names must be asked for again");
                }
            }
        }
    }

    /// Writes it anew, if much of it does not hold.
    pub(super) fn tidy(&mut self, learned: &Learned) {
        if !self.outdated && self.lines <= 2 * learned.len() + SPARE_LINES {
            return;
        }
        self.outdated = false;
        let mut lines = vec![serde_json::to_string(&Header { format: FORMAT, boot: boot() })];
        lines.extend(learned.iter().map(|pair| {
            let line =
                Line { name: pair.name.to_owned(), addresses: vec![pair.address], until: milliseconds(pair.until) };
            serde_json::to_string(&line)
        }));
        let text = lines.into_iter().collect::<Result<Vec<_>, _>>().map_err(std::io::Error::other);
        let written = text.and_then(|lines| disk::write_atomically(&self.path, (lines.join("\n") + "\n").as_bytes()));
        self.note(written);
        self.lines = learned.len();
    }
}

fn ignore_missing(error: std::io::Error) -> std::io::Result<()> {
    if error.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(error) }
}
