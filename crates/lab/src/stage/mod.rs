//! The hidden `lab stage …` commands: small single-threaded processes that start inside other namespaces.
//!
//! A stage is called before any thread or async runtime exists in its process, so that it may change its own namespaces,
//! root directory and capabilities. What it has to do comes as JSON in a file that only root can read.
//!
//! | stage | does |
//! | --- | --- |
//! | `init FILE` | becomes process 1 of a container: mounts its root, then runs the workload or the built-in server |
//! | `exec FILE` | enters a running container and becomes the command |
//! | `enter FILE` | joins a cgroup and a network namespace and becomes the command (agents, `lab exec`, CNI plugins) |
//! | `lookup ADDRESS NAME` | one DNS query over UDP, with retries for a second; exit code 0 when it was answered |

mod enter;
mod exec;
mod init;
mod lookup;
mod process;
mod root;
mod web;

use std::convert::Infallible;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;

pub(crate) use enter::{EnterSpec, enter};
pub(crate) use exec::ExecSpec;
pub(crate) use init::{InitSpec, Workload};
pub(crate) use process::{DEFAULT_CAPABILITIES, ProcessSpec, capability_bit};
pub(crate) use root::{BindMount, RootSpec};
pub(crate) use web::WebSpec;

/// Runs the stage named by `args` (everything after `lab stage`). Returns only on failure: a stage ends by becoming
/// another program or by ending the process.
///
/// # Errors
///
/// What could not be done; the caller prints it on standard error and exits with 125, or with 127 when the program to
/// become does not exist.
pub fn run(args: &[String]) -> Result<Infallible> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["init", file] => init::run(read_spec(Path::new(file))?),
        ["exec", file] => exec::run(take_spec(Path::new(file))?),
        ["enter", file] => enter::run(take_spec(Path::new(file))?),
        ["lookup", address, name] => lookup::run(address, name),
        other => bail!("no lab stage is called {other:?}; these commands are for the lab itself"),
    }
}

/// Runs a stage and turns its failure into a message and an exit code. For `main`.
pub fn main(args: &[String]) -> std::process::ExitCode {
    let Err(error) = run(args);
    eprintln!("{error:#}");
    let missing = error
        .downcast_ref::<std::io::Error>()
        .or_else(|| error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>()))
        .is_some_and(|cause| cause.kind() == std::io::ErrorKind::NotFound);
    std::process::ExitCode::from(if missing { 127 } else { 125 })
}

fn read_spec<T: DeserializeOwned>(file: &Path) -> Result<T> {
    let text = std::fs::read(file).with_context(|| format!("read the stage file {}", file.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand the stage file {}", file.display()))
}

/// As [`read_spec`], for files of one use: removed once read.
fn take_spec<T: DeserializeOwned>(file: &Path) -> Result<T> {
    let spec = read_spec(file)?;
    std::fs::remove_file(file).with_context(|| format!("remove the stage file {}", file.display()))?;
    Ok(spec)
}
