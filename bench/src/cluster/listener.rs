//! `towpath observe --drops` beside a node's agent: from the moment that it listens until it is dropped.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};

use anyhow::{Context, Result, bail};

use crate::lab::beside;
use crate::place::Place;
use crate::worker;

/// What it says on standard error once the kernel programs tell.
const LISTENING: &str = "listening to node";

/// A process that listens, and the file with what it says.
#[derive(Debug)]
pub(crate) struct Listener {
    child: Child,
    heard: PathBuf,
}

impl Listener {
    /// Starts it and waits until it listens.
    ///
    /// # Errors
    /// It says something else, or ends.
    pub(super) fn start(place: &Place, run_dir: &Path, heard: PathBuf) -> Result<Self> {
        let towpath = beside("towpath")?.display().to_string();
        let run_dir = run_dir.display().to_string();
        let observe = ["run", "--", &towpath, "observe", "--drops", "--local", "--run-dir", &run_dir];
        let out = File::create(&heard).with_context(|| format!("create {}", heard.display()))?;
        let mut child = worker::command(place, &observe)?
            .stdin(Stdio::null())
            .stdout(out)
            .stderr(Stdio::piped())
            .spawn()
            .context("start towpath observe")?;
        let said = child.stderr.take();
        // From here on it ends with this.
        let listener = Self { child, heard };
        let mut line = String::new();
        BufReader::new(said.context("towpath observe has no standard error")?)
            .read_line(&mut line)
            .context("read what towpath observe says")?;
        if line.contains(LISTENING) { Ok(listener) } else { bail!("towpath observe does not listen: {line:?}") }
    }

    /// Drops that it was told so far.
    ///
    /// # Errors
    /// Its file cannot be read.
    pub(crate) fn heard(&self) -> Result<usize> {
        let text = std::fs::read(&self.heard).with_context(|| format!("read {}", self.heard.display()))?;
        Ok(text.iter().filter(|byte| **byte == b'\n').count())
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
