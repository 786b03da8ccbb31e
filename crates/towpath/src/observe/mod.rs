//! `towpath observe --drops`: what the kernel drops, as it happens, on all nodes; and `--audit`: what passes and would not if policies that are
//! only audited were enforced.
//!
//! ```text
//! agents' observe sockets (a lab's, this node's; of other nodes by a command in the agent's container) ─► filter ─► a line each
//! ```
//!
//! A node that cannot be heard is named on standard error and tried again: it holds up no other.

mod filter;
mod show;
mod sources;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::AsyncReadExt;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use towpath_model::Selector;
use towpath_wire::config::AgentConfig;
use towpath_wire::observe::Told;

use crate::place::{self, Where};
use filter::{Filter, Only};
use sources::Heard;

/// Options of `towpath observe`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// What is dropped or refused: by policy, source checks, Services without endpoints, full tables.
    #[arg(long, required_unless_present = "audit")]
    drops: bool,
    /// What passes, and would be denied if policies that are only audited (towpath.dev/audit: "true") were enforced.
    #[arg(long)]
    audit: bool,
    /// Only where an end is in this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    /// Only where an end is a pod with these labels, as kubectl takes them: app=web,tier!=cache,env in (a,b).
    #[arg(short = 'l', long)]
    selector: Option<Selector>,
    /// Only where an end is this pod: NAME or NAMESPACE/NAME.
    #[arg(long)]
    pod: Option<String>,
    /// Only of this node; may be given several times.
    #[arg(long)]
    node: Vec<String>,
    /// Only for this reason (egress_policy, ingress_policy, source_address …); may be given several times.
    #[arg(long)]
    reason: Vec<String>,
    /// Only of this protocol (tcp, udp, sctp, icmp, icmpv6).
    #[arg(long)]
    protocol: Option<String>,
    /// Only to this port.
    #[arg(long)]
    port: Option<u16>,
    /// Ends after so many lines.
    #[arg(long)]
    count: Option<u64>,
    /// Ends after so many seconds.
    #[arg(long, value_name = "SECONDS")]
    duration: Option<u64>,
    /// Only this node's agent, over its socket.
    #[arg(long)]
    local: bool,
    /// For another `towpath observe`, which filters by itself: prints all that the agent says, as it says it, and ends with standard
    /// input (a command in a container learns of its caller's end by nothing else).
    #[arg(
        long,
        hide = true,
        requires = "local",
        conflicts_with_all = ["namespace", "selector", "pod", "node", "reason", "protocol", "port", "count", "duration", "output"]
    )]
    relay: bool,
    /// The agent's run directory, with --local.
    #[arg(long, requires = "local")]
    run_dir: Option<PathBuf>,
    #[command(flatten)]
    place: Where,
}

impl Options {
    fn filter(&self) -> Filter {
        Filter {
            only: match (self.drops, self.audit) {
                (true, false) => Some(Only::Drops),
                (false, true) => Some(Only::Audits),
                _ => None,
            },
            namespace: self.namespace.clone(),
            selector: self.selector.clone(),
            pod: self.pod.clone(),
            nodes: self.node.clone(),
            reasons: self.reason.clone(),
            protocol: self.protocol.clone(),
            port: self.port,
        }
    }
}

/// Prints until it is ended, or has printed what was asked for.
///
/// # Errors
/// No node can be heard at all, or standard output cannot be written.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    ensure!(options.drops || options.audit, "say what to observe: --drops, --audit");
    let (heard, mut inbox) = mpsc::channel(1024);
    begin(options, heard).await?;
    let filter = options.filter();
    let end = options.duration.map(|seconds| Instant::now() + Duration::from_secs(seconds));
    let mut left = options.count;
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 64];
    loop {
        let next = tokio::select! {
            next = inbox.recv() => next,
            () = sleep_until(end.unwrap_or_else(Instant::now)), if end.is_some() => return Ok(true),
            _ = tokio::signal::ctrl_c() => return Ok(true),
            read = input.read(&mut ignored), if options.relay => match read {
                Ok(0) | Err(_) => return Ok(true),
                Ok(_) => continue,
            },
        };
        let next = next.context("nobody tells anything any more")?;
        if let (true, Heard::Told(told)) = (options.relay, &next) {
            if !crate::print_while_read(&serde_json::to_string(told)?)? {
                return Ok(true);
            }
            continue;
        }
        match next {
            Heard::Silent(node, why) => eprintln!("towpath: node {node}: {why}"),
            Heard::Told(Told::Listening { node }) => eprintln!("towpath: listening to node {node}"),
            Heard::Told(Told::Drop(event)) if filter.has(&event) => {
                let is_read = crate::print_while_read(&match options.place.output {
                    crate::Output::Json => serde_json::to_string(&*event)?,
                    crate::Output::Text => show::line(&event),
                })?;
                left = left.map(|left| left.saturating_sub(1));
                if !is_read || left == Some(0) {
                    return Ok(true);
                }
            }
            Heard::Told(Told::Drop(_)) => {}
            Heard::Told(Told::Untold { node, count }) => {
                eprintln!("towpath: node {node}: {count} more were dropped, refused or audited than could be told");
            }
            Heard::Told(Told::End { node, why }) => eprintln!("towpath: node {node}: {why}"),
        }
    }
}

/// Begins to listen to whom the options name.
async fn begin(options: &Options, heard: mpsc::Sender<Heard>) -> Result<()> {
    let wanted = |node: &String| options.node.is_empty() || options.node.contains(node);
    if options.local {
        let default = AgentConfig::default();
        let config = AgentConfig { run_dir: options.run_dir.clone().unwrap_or(default.run_dir.clone()), ..default };
        sources::of_socket("this one".to_owned(), config.observe_socket(), heard);
        return Ok(());
    }
    let cluster = options.place.cluster().await?;
    let nodes = match &cluster.lab {
        Some(lab) => {
            let agents: Vec<_> = place::agents_of_lab(lab)?.into_iter().filter(|(node, _)| wanted(node)).collect();
            let count = agents.len();
            for (node, config) in agents {
                sources::of_socket(node, config.observe_socket(), heard.clone());
            }
            count
        }
        None => sources::of_cluster(&cluster.client, wanted, &heard).await?,
    };
    ensure!(
        nodes > 0,
        "no node to listen to: there is none of that name, or kube-system has no pods of the DaemonSet towpath"
    );
    Ok(())
}
