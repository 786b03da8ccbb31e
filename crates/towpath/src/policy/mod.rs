//! `towpath policy wait`: whether what was written of policies is in force on every node, and waiting until it is; `towpath policy audit`: what
//! those that are only audited would have denied.
//!
//! ```text
//! API server: policies, namespaces, the objects that are asked for, with their versions ─┐
//! nodes: what their kernels enforce, from their agents ──────────────────────────────────┴─► behind (table) or JSON
//! ```
//!
//! Nodes are asked by a command in their agents' containers, those of a lab and the one this runs on over the agents' sockets.

mod audit;
mod behind;
mod wanted;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use comfy_table::{Table, presets::NOTHING};
use towpath_wire::config::AgentConfig;
use towpath_wire::policy::InForce;

use crate::nodes::{self, Answer};
use crate::place::{self, Cluster, Where};
use crate::status;
use audit::Audits;
use behind::NodeView;
use wanted::Wanted;

/// Between two questions to the same nodes.
const PAUSE: Duration = Duration::from_millis(100);

/// `towpath policy …`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Waits until every node enforces the policies, namespaces' labels and given objects as the API server has them now.
    Wait(WaitOptions),
    /// What the policies that are only audited (`towpath.dev/audit`) would have denied, on all nodes together; anything, or a node that does not
    /// answer, is no success.
    Audit(Where),
    /// What this node's agent has in force, as JSON: what `wait` asks each node for.
    #[command(hide = true)]
    InForce {
        /// The agent's run directory.
        #[arg(long)]
        run_dir: Option<PathBuf>,
    },
}

/// Options of `towpath policy wait`.
#[derive(clap::Args, Debug)]
pub(crate) struct WaitOptions {
    /// KIND/NAME of what must be in force (networkpolicy, clusternetworkpolicy, namespace, pod); else all policies and namespaces, and
    /// nothing that was deleted.
    objects: Vec<String>,
    /// Namespace of names that need one.
    #[arg(short, long)]
    namespace: Option<String>,
    /// How many seconds to wait; 0: look once.
    #[arg(long, default_value_t = 30)]
    timeout: u64,
    #[command(flatten)]
    place: Where,
}

/// Runs one of them; a node that is behind when the time is over is no success.
pub(crate) async fn run(command: &Command) -> Result<bool> {
    match command {
        Command::Wait(options) => wait(options).await,
        Command::InForce { run_dir } => {
            let default = AgentConfig::default();
            let config = AgentConfig { run_dir: run_dir.clone().unwrap_or(default.run_dir.clone()), ..default };
            crate::print(&serde_json::to_string(&nodes::ask::<InForce>(&config.policy_socket())?)?)?;
            Ok(true)
        }
        Command::Audit(place) => {
            let audits = Audits::of(status::of_all(&place.cluster().await?).await?);
            match place.output {
                crate::Output::Json => crate::print_json(&audits)?,
                crate::Output::Text => crate::print(&audits.show())?,
            }
            Ok(audits.is_clean())
        }
    }
}

/// What every node enforces.
async fn in_force(cluster: &Cluster) -> Result<Vec<Answer<InForce>>> {
    match &cluster.lab {
        Some(lab) => {
            let agents = place::agents_of_lab(lab)?.into_iter();
            Ok(agents.map(|(node, config)| (node, nodes::ask(&config.policy_socket()))).collect())
        }
        None => nodes::of_cluster(&cluster.client, &["/usr/bin/towpath", "policy", "in-force"]).await,
    }
}

async fn wait(options: &WaitOptions) -> Result<bool> {
    let cluster = options.place.cluster().await?;
    let wanted = Wanted::now(&cluster.client, &options.objects, options.namespace.as_deref()).await?;
    let until = Instant::now() + Duration::from_secs(options.timeout);
    let views = loop {
        let answers = in_force(&cluster).await?;
        let views: Vec<NodeView> =
            answers.into_iter().map(|(node, answer)| NodeView::of(node, answer, &wanted)).collect();
        if views.iter().all(NodeView::is_in_force) || Instant::now() >= until {
            break views;
        }
        tokio::time::sleep(PAUSE).await;
    };
    match options.place.output {
        crate::Output::Json => crate::print_json(&views)?,
        crate::Output::Text => crate::print(&show(&views, &wanted))?,
    }
    Ok(views.iter().all(NodeView::is_in_force))
}

fn show(views: &[NodeView], wanted: &Wanted) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header(["NODE", "IN FORCE", "BEHIND"]);
    let mut notes = Vec::new();
    for view in views {
        let total = wanted.objects.len();
        let behind = view.behind.iter().filter(|behind| behind.is_wanted()).count();
        table.add_row([
            view.node.clone(),
            format!("{} of {total}", total.saturating_sub(behind)),
            view.behind.len().to_string(),
        ]);
        notes.extend(view.failing.iter().map(|why| format!("{}: {why}", view.node)));
        notes.extend(view.behind.iter().map(|behind| format!("{}: {behind}", view.node)));
        notes.extend(view.outliving.iter().map(|policy| {
            format!(
                "{}: networkpolicy/{policy} was deleted and holds: its namespace ends and still has pods",
                view.node
            )
        }));
    }
    let mut text = table.to_string();
    if !notes.is_empty() {
        text.push_str("\n\n");
        text.push_str(&notes.join("\n"));
    }
    text
}
