//! Network namespaces of our own, each held by one process and gone with it: also after `kill -9` nothing of them stays.

use std::io::Write;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context, Result, bail};

use crate::place::Place;
use crate::worker::{self, Worker};

/// So much of a command's input is in the message when it fails, in bytes.
const GIVEN: usize = 2000;

/// A network namespace. `ps` shows its holder with its name.
#[derive(Debug)]
pub(crate) struct Netns {
    name: String,
    holder: Worker,
    path: PathBuf,
}

impl Netns {
    /// Makes one, with `lo` up. Names begin with `tpb-`.
    ///
    /// # Errors
    /// Not root, or no `ip`.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let name = format!("tpb-{name}");
        let place = Place { new_netns: true, ..Place::default() };
        let holder = Worker::start(&format!("the holder of namespace {name}"), &place, &["hold", &name])?;
        let path = PathBuf::from(format!("/proc/{}/ns/net", holder.pid()));
        let netns = Self { name, holder, path };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// What `ip link … netns` takes.
    pub(crate) fn pid(&self) -> u32 {
        self.holder.pid()
    }

    /// The place of processes in it.
    pub(crate) fn place(&self) -> Place {
        Place { netns: Some(self.path.clone()), ..Place::default() }
    }

    /// Commands of `ip`, a line each.
    ///
    /// # Errors
    /// One failed.
    pub(crate) fn ip(&self, batch: &str) -> Result<()> {
        self.feed(&["ip", "-batch", "-"], batch)
    }

    /// Commands of `bridge`, a line each.
    ///
    /// # Errors
    /// One failed.
    pub(crate) fn bridge(&self, batch: &str) -> Result<()> {
        self.feed(&["bridge", "-batch", "-"], batch)
    }

    /// A ruleset for `nft`.
    ///
    /// # Errors
    /// It was refused.
    pub(crate) fn nft(&self, rules: &str) -> Result<()> {
        self.feed(&["nft", "-f", "-"], rules)
    }

    /// A setting below `/proc/sys/net` of this namespace.
    ///
    /// # Errors
    /// There is none, or not of this value.
    pub(crate) fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        self.feed(&["sh", "-c", "cat > /proc/sys/net/$0", path], value)
    }

    /// Runs a command in it, with a text as its input.
    ///
    /// # Errors
    /// It failed.
    pub(crate) fn feed(&self, argv: &[&str], input: &str) -> Result<()> {
        let what = [&["run", "--"], argv].concat();
        let mut child = worker::command(&self.place(), &what)?
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("start a command in a namespace")?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that ends early says why itself.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().context("wait for a command in a namespace")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let given = input.get(..GIVEN).map_or_else(|| input.to_owned(), |begin| format!("{begin}…"));
            let what = argv.join(" ");
            bail!("{what} in namespace {}: {}, {}; it was given:\n{given}", self.name, output.status, said.trim());
        }
        Ok(())
    }
}
