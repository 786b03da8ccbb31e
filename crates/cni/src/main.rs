//! `towpath-cni`, the plugin that the container runtime executes (CNI specification 1.1.0).
//!
//! It reads the environment and standard input, passes the request and the container's network namespace to the agent over a
//! root-only unix socket, and prints the result. It changes nothing itself, but for one thing: a DEL that the agent cannot
//! take is put into a queue on disk, and succeeds.
#![forbid(unsafe_code)]

mod agent;
mod environment;
mod verbs;

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use serde_json::Value;
use towpath_wire::cni::{CniError, ErrorCode, NetworkConfig, Version};

/// The largest network configuration that is read, in bytes.
const LARGEST: u64 = 2 << 20;

fn main() -> ExitCode {
    if std::env::var_os("CNI_COMMAND").is_none() {
        eprintln!(
            "towpath-cni {}: a CNI plugin, executed by the container runtime; CNI versions {}",
            env!("CARGO_PKG_VERSION"),
            Version::listed()
        );
    }
    let mut input = Vec::new();
    let read = std::io::stdin().take(LARGEST).read_to_end(&mut input);
    let outcome = match read {
        Ok(_) => verbs::run(|name| std::env::var_os(name), &input),
        Err(error) => Err(CniError::new(ErrorCode::Io, format!("cannot read the network configuration: {error}"))),
    };
    match outcome {
        Ok(None) => ExitCode::SUCCESS,
        Ok(Some(value)) => print(&value, ExitCode::SUCCESS),
        Err(error) => print(&error.to_json(NetworkConfig::version_hint(&input)), ExitCode::FAILURE),
    }
}

fn print(value: &Value, code: ExitCode) -> ExitCode {
    match writeln!(std::io::stdout().lock(), "{value}") {
        Ok(()) => code,
        // Nobody reads the answer; the exit code is all that is left to tell.
        Err(_) => ExitCode::FAILURE,
    }
}
