//! `lab stage enter`: become a command inside a cgroup and a network namespace, with the machine's file system.

use std::convert::Infallible;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::process;
use crate::kernel::{cgroup, ns};

/// Where to go and what to become.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct EnterSpec {
    /// Cgroup to join.
    pub(crate) cgroup: Option<PathBuf>,
    /// Network namespace to enter.
    pub(crate) netns: Option<PathBuf>,
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// Added to the environment.
    pub(crate) env: Vec<(String, String)>,
}

pub(super) fn run(spec: EnterSpec) -> Result<Infallible> {
    Err(process::replace(enter(&spec)?))
}

/// Moves the calling process there and returns the command to become.
pub(crate) fn enter(spec: &EnterSpec) -> Result<Command> {
    if let Some(path) = &spec.cgroup {
        cgroup::join(path)?;
    }
    if let Some(path) = &spec.netns {
        ns::enter_net(path)?;
    }
    let (program, args) = spec.argv.split_first().context("no command was given")?;
    let mut command = Command::new(program);
    command.args(args).envs(spec.env.iter().cloned());
    Ok(command)
}
