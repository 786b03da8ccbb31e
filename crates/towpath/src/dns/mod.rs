//! `towpath dns names`: what the domain names of ClusterNetworkPolicies stand for on each node, and what answers were not believed.

mod nodes;
mod show;

use std::path::PathBuf;

use anyhow::Result;
use towpath_wire::config::AgentConfig;

use crate::place::Where;

pub(crate) use nodes::of_node;

/// `towpath dns …`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Domain names of policies: their addresses on each node, for how long, and what was refused.
    Names(Options),
    /// The same of this node alone, as JSON: what `names` asks each node for.
    #[command(hide = true)]
    Learned {
        /// The agent's run directory.
        #[arg(long)]
        run_dir: Option<PathBuf>,
    },
}

/// Options of `towpath dns names`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Only this node [default: all].
    #[arg(long)]
    node: Option<String>,
    #[command(flatten)]
    place: Where,
}

/// Runs one of them; a node that does not answer is no success.
pub(crate) async fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Names(options) => {
            let cluster = options.place.cluster().await?;
            let mut said = nodes::all(&cluster, options.node.as_deref()).await;
            said.answers.sort_by(|a, b| a.node.cmp(&b.node));
            match options.place.output {
                crate::Output::Json => crate::print_json(&said.answers)?,
                crate::Output::Text => crate::print(&show::table(&said))?,
            }
            said.silent.iter().for_each(|why| eprintln!("towpath: {why}"));
            Ok(said.silent.is_empty())
        }
        Command::Learned { run_dir } => {
            let default = AgentConfig::default();
            let config = AgentConfig { run_dir: run_dir.clone().unwrap_or(default.run_dir.clone()), ..default };
            crate::print(&serde_json::to_string(&nodes::ask(&config.names_socket())?)?)?;
            Ok(true)
        }
    }
}
