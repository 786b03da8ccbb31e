//! The `towpath` command line, and the one binary of every process but `towpath-cni`.
//!
//! Commands of the lab that change the calling process itself (`lab exec`, `lab stage` …) run before any thread exists.
#![forbid(unsafe_code)]

mod bench;
mod configured;
mod connectivity;
mod daemon;
mod dns;
mod explain;
mod install;
mod ipam;
mod kubernetes;
mod lab;
mod lab_client;
mod man;
mod nodes;
mod observe;
mod place;
mod policy;
mod probe;
mod progress;
mod service;
mod status;
mod sysdump;
mod verify;

use std::io::Write;
use std::process::ExitCode;

use anyhow::Result;
use clap::{CommandFactory, Parser, Subcommand};
use serde::Serialize;

/// The whole network of a Kubernetes cluster in one program.
#[derive(Parser, Debug)]
#[command(name = "towpath", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// A cluster on this machine that needs no Kubernetes.
    #[command(subcommand)]
    Lab(lab::Command),
    /// Nodes, tunnels, counts and health.
    Status(status::Options),
    /// The path of a packet, the Service translation, and the policy and rule that decide.
    Explain(explain::Options),
    /// Questions about policies, from manifests or a live API: who reaches whom, expectations, proofs, differences, mistakes.
    #[command(subcommand)]
    Verify(verify::Command),
    /// Policies: whether what was written is in force on every node.
    #[command(subcommand)]
    Policy(policy::Command),
    /// Services: what they lead to on which node, why an endpoint is not used, and open connections.
    #[command(subcommand)]
    Service(service::Command),
    /// DNS: what the domain names of policies stand for on each node.
    #[command(subcommand)]
    Dns(dns::Command),
    /// Addresses of pods: whether what is written down fits what there is.
    #[command(subcommand)]
    Ipam(ipam::Command),
    /// What is dropped, as it happens: who sent it, to whom, and the rule that denied it.
    Observe(observe::Options),
    /// Tries the network of a live cluster, from pods of its own.
    #[command(subcommand)]
    Connectivity(connectivity::Command),
    /// Collects what somebody else needs to find out what is wrong, in one file without secrets.
    Sysdump(sysdump::Options),
    /// Comparisons, measured on this machine.
    #[command(subcommand)]
    Bench(bench::Command),
    /// The node agent (one a node).
    Agent(daemon::Options),
    /// What answers DNS and carries packets of the backend udp (one a node, beside the agent). It takes over from one that runs.
    Carry(daemon::CarryOptions),
    /// Cluster-wide duties, under a Lease.
    Controller(daemon::Options),
    /// Prints the objects that put Towpath into a Kubernetes cluster (pipe it into kubectl apply -f -).
    Install(install::Options),
    /// Prints the DaemonSet that takes Towpath off every node, once everything else of it is deleted.
    Uninstall(install::UninstallOptions),
    /// What is done on a node itself.
    #[command(subcommand)]
    Node(install::NodeCommand),
    /// Writes a man page for every command into a directory.
    #[command(hide = true)]
    Man {
        /// The directory; made if it is not there.
        directory: std::path::PathBuf,
    },
    /// Both ends of what `connectivity test` tries.
    #[command(subcommand, hide = true)]
    Probe(probe::Command),
    /// Shell completions on standard output.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

/// How an answer is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Output {
    /// For people.
    Text,
    /// For programs.
    Json,
}

/// Prints a line; a reader that has gone away (`| head`) is no error.
pub(crate) fn print(text: &str) -> Result<()> {
    print_while_read(text).map(drop)
}

/// Prints a line; `false`: nobody reads any more.
pub(crate) fn print_while_read(text: &str) -> Result<bool> {
    match writeln!(std::io::stdout(), "{text}") {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(false),
        written => Ok(written.map(|()| true)?),
    }
}

/// Prints a value as indented JSON.
pub(crate) fn print_json(value: &impl Serialize) -> Result<()> {
    print(&serde_json::to_string_pretty(value)?)
}

/// Writes an array to standard output, an element at a time.
pub(crate) fn print_json_array<T: Serialize>(values: impl Iterator<Item = T>) -> Result<()> {
    print("[")?;
    let mut values = values.peekable();
    while let Some(value) = values.next() {
        let text = serde_json::to_string_pretty(&value)?;
        print(&if values.peek().is_some() { text + "," } else { text })?;
    }
    print("]")
}

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().collect();
    // Before anything else: a stage must find a process without threads.
    if args.iter().skip(1).take(2).eq(["lab", "stage"]) {
        return towpath_lab::stage::main(args.get(3..).unwrap_or_default());
    }
    match run(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("towpath: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs a command. An answer that is no success (`explain`: denied) is no error, but its exit code is one's.
fn run(command: Command) -> Result<ExitCode> {
    let succeeded = match command {
        // Its exit codes tell an answer from a question that was not understood.
        Command::Verify(command) => return Ok(verify::run(&command)),
        Command::Lab(command) => lab::run(command),
        Command::Status(options) => client_runtime()?.block_on(status::run(&options)),
        Command::Explain(options) => client_runtime()?.block_on(explain::run(&options)),
        Command::Policy(command) => client_runtime()?.block_on(policy::run(&command)),
        Command::Service(command) => client_runtime()?.block_on(service::run(&command)),
        Command::Dns(command) => client_runtime()?.block_on(dns::run(&command)),
        Command::Ipam(command) => client_runtime()?.block_on(ipam::run(&command)),
        Command::Observe(options) => client_runtime()?.block_on(observe::run(&options)),
        Command::Connectivity(command) => client_runtime()?.block_on(connectivity::run(&command)),
        Command::Man { directory } => man::write(Cli::command(), &directory).map(|()| true),
        Command::Probe(command) => probe::run(&command),
        Command::Bench(command) => bench::run(&command),
        Command::Sysdump(options) => client_runtime()?.block_on(sysdump::run(&options)),
        Command::Agent(options) => daemon::agent(&options),
        Command::Carry(options) => daemon::carry(&options),
        Command::Controller(options) => daemon::controller(&options),
        Command::Install(options) => install::run(&options),
        Command::Uninstall(options) => install::run_uninstall(&options),
        Command::Node(command) => install::run_node(&command),
        Command::Completions { shell } => {
            clap_complete::generate(shell, &mut Cli::command(), "towpath", &mut std::io::stdout());
            Ok(true)
        }
    }?;
    Ok(if succeeded { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A runtime for commands that ask an API server something.
pub(crate) fn client_runtime() -> Result<tokio::runtime::Runtime> {
    // The one TLS provider that is linked in; an earlier choice stays.
    let _ = rustls::crypto::ring::default_provider().install_default();
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
