//! `towpath ipam check`: whether what nodes have written down of addresses fits the devices, pods and programs that there are.

mod nodes;
mod show;

use std::path::PathBuf;

use anyhow::Result;
use towpath_wire::config::AgentConfig;

use crate::place::Where;

/// `towpath ipam …`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Addresses of pods, compared on every node: given without a device, devices without an owner, pods without an address, two of one.
    /// Ends with 0 when all fits together and every node answered.
    Check(Options),
    /// The same of this node alone, as JSON: what `check` asks each node for.
    #[command(hide = true)]
    Checked {
        /// The agent's run directory.
        #[arg(long)]
        run_dir: Option<PathBuf>,
        /// Repair first.
        #[arg(long)]
        repair: bool,
    },
}

/// Options of `towpath ipam check`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Only this node [default: all].
    #[arg(long)]
    node: Option<String>,
    /// Repair what can be repaired without asking the pods' owners: release what nobody has, take away what is nobody's, write down
    /// again what is lost. Then check.
    #[arg(long)]
    repair: bool,
    #[command(flatten)]
    place: Where,
}

/// Runs one of them; a finding, or a node that does not answer, is no success.
pub(crate) async fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Check(options) => {
            let cluster = options.place.cluster().await?;
            let mut said = nodes::all(&cluster, options.node.as_deref(), options.repair).await;
            said.answers.sort_by(|a, b| a.node.cmp(&b.node));
            match options.place.output {
                crate::Output::Json => crate::print_json(&said.answers)?,
                crate::Output::Text => crate::print(&show::table(&said.answers))?,
            }
            said.silent.iter().for_each(|why| eprintln!("towpath: {why}"));
            Ok(said.silent.is_empty() && said.answers.iter().all(|answer| answer.findings.is_empty()))
        }
        Command::Checked { run_dir, repair } => {
            let default = AgentConfig::default();
            let config = AgentConfig { run_dir: run_dir.clone().unwrap_or(default.run_dir.clone()), ..default };
            crate::print(&serde_json::to_string(&nodes::ask(&config.cni_socket(), *repair)?)?)?;
            Ok(true)
        }
    }
}
