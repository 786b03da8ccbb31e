//! `towpath bench`: comparisons that are measured on this machine, by `towpath-bench`, which the build puts beside this program.

use std::os::unix::process::CommandExt;
use std::process::Command as Process;

use anyhow::{Context, Result, bail};

/// What is compared.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// Every backend in a lab of its own, beside the bare underlay, a hand-made kernel VXLAN and, where it is installed, wireguard-go: throughput,
    /// transactions and connections a second, CPU time each, MTU, and what it demands of the underlay. Needs root; some minutes.
    Backends {
        /// Options of towpath-bench: `--rounds 5`, `--block 0.3`, `--json FILE`, `--markdown FILE`, `--svg FILE`; `--help` shows all.
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        options: Vec<String>,
    },
}

/// Becomes the benchmark.
///
/// # Errors
/// It is not there, or does not start.
pub(crate) fn run(command: &Command) -> Result<bool> {
    let Command::Backends { options } = command;
    let own = std::env::current_exe().context("no path of the running program")?;
    let bench = own.with_file_name("towpath-bench");
    if !bench.is_file() {
        bail!(
            "there is no {}; it comes with the source: run `cargo build --profile bench-lab --bins` and `target/bench-lab/towpath bench backends`",
            bench.display()
        );
    }
    let error = Process::new(&bench).args(["--only", "backends"]).args(options).exec();
    Err(error).with_context(|| format!("could not start {}", bench.display()))
}
