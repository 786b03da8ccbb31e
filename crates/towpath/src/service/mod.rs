//! `towpath service list|show`: what a Service leads to, on which nodes, why an endpoint is not used, and how many connections each has.
//!
//! ```text
//! API server: Services, slices, nodes ─► view (the planner's own choice) ─┐
//! nodes: open connections by backend, from their agents ──────────────────┴─► show (table) or JSON
//! ```
//!
//! Nodes are asked by a command in their agents' containers, those of a lab and the one this runs on over the agents' sockets.

mod announcers;
mod nodes;
mod show;
#[cfg(test)]
mod tests;
mod view;

use std::path::PathBuf;

use anyhow::{Context, Result};
use towpath_model::NamespacedName;
use towpath_wire::config::AgentConfig;
use towpath_wire::service::NodeConnections;

use crate::configured::{Configured, Found};
use crate::kubernetes;
use crate::place::{Cluster, Where};
use nodes::Counted;
use view::Views;

/// `towpath service …`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Services: addresses, ports, endpoints that are used.
    List(ListOptions),
    /// One Service: its endpoints, who uses each or why not, and open connections.
    Show(ShowOptions),
    /// Open connections by backend, as this node's agent counts them, as JSON: what `show` asks each node for.
    #[command(hide = true)]
    Connections {
        /// The agent's run directory.
        #[arg(long)]
        run_dir: Option<PathBuf>,
    },
}

/// Options of `towpath service list`.
#[derive(clap::Args, Debug)]
pub(crate) struct ListOptions {
    /// Only this namespace [default: all].
    #[arg(short, long)]
    namespace: Option<String>,
    /// Asks every node for open connections, too.
    #[arg(long)]
    connections: bool,
    #[command(flatten)]
    place: Where,
}

/// Options of `towpath service show`.
#[derive(clap::Args, Debug)]
pub(crate) struct ShowOptions {
    /// NAMESPACE/NAME, or NAME.
    service: String,
    /// Namespace of a name that has none.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Asks no node for open connections.
    #[arg(long)]
    no_connections: bool,
    #[command(flatten)]
    place: Where,
}

/// Runs one of them; `show` of a Service that leads nowhere is no success.
pub(crate) async fn run(command: &Command) -> Result<bool> {
    match command {
        Command::List(options) => list(options).await,
        Command::Show(options) => show(options).await,
        Command::Connections { run_dir } => {
            let default = AgentConfig::default();
            let config = AgentConfig { run_dir: run_dir.clone().unwrap_or(default.run_dir.clone()), ..default };
            crate::print(&serde_json::to_string(&crate::nodes::ask::<NodeConnections>(&config.service_socket())?)?)?;
            Ok(true)
        }
    }
}

/// What all nodes of a cluster hold.
async fn counted(cluster: &Cluster) -> Counted {
    match &cluster.lab {
        Some(lab) => nodes::of_lab(lab),
        None => nodes::of_cluster(&cluster.client).await,
    }
}

async fn list(options: &ListOptions) -> Result<bool> {
    let cluster = options.place.cluster().await?;
    let world = kubernetes::services(&cluster.client, None).await?;
    let counted = if options.connections { Some(counted(&cluster).await) } else { None };
    let wanted = |name: &NamespacedName| options.namespace.as_ref().is_none_or(|only| name.namespace == *only);
    let found = Found::ask(&cluster.client, cluster.lab.as_ref()).await;
    let views = Views::new(&world, Configured::of(&world, &found)?, counted.as_ref());
    let all = world.services.values().filter(|s| wanted(&s.name)).map(|s| views.of(s));
    match options.place.output {
        crate::Output::Json => crate::print_json_array(all)?,
        crate::Output::Text => crate::print(&show::list(all, views.notes(), counted.as_ref()))?,
    }
    Ok(true)
}

async fn show(options: &ShowOptions) -> Result<bool> {
    let cluster = options.place.cluster().await?;
    let namespace = || options.namespace.clone().unwrap_or_else(|| kubernetes::default_namespace(&cluster.client));
    let name = match options.service.trim_start_matches("svc/").split_once('/') {
        Some((namespace, name)) => NamespacedName::new(namespace, name),
        None => NamespacedName::new(namespace(), options.service.trim_start_matches("svc/")),
    };
    let world = kubernetes::services(&cluster.client, Some(&name)).await?;
    let service = world
        .services
        .get(&name)
        .with_context(|| format!("there is no Service {name}; `towpath service list` shows all that there are"))?;
    let counted = if options.no_connections { None } else { Some(counted(&cluster).await) };
    let found = Found::ask(&cluster.client, cluster.lab.as_ref()).await;
    let mut view = Views::new(&world, Configured::of(&world, &found)?, counted.as_ref()).of(service);
    view.announced = announcers::of(&cluster.client, service).await;
    match options.place.output {
        crate::Output::Json => crate::print_json(&view)?,
        crate::Output::Text => crate::print(&show::one(&view, counted.as_ref()))?,
    }
    Ok(!view.leads_nowhere())
}
