//! `towpath status`: what the agents say of themselves.
//!
//! Asked over the agents' sockets: of every node of a lab, or of the node this runs on.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use towpath_agent::failure::last_words;
use towpath_lab::layout::{LabName, Layout};
use towpath_model::SOCKET_SERVICES_ANNOTATION;
use towpath_wire::config::AgentConfig;
use towpath_wire::status::{AgentStatus, AuditedDenial, AuditedPolicy};

use crate::place::Where;
use crate::progress;

/// Options of `towpath status`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// All nodes of this lab; else the only lab there is, else this machine's own agent.
    #[arg(long)]
    lab: Option<LabName>,
    /// The agent's socket, if it is elsewhere.
    #[arg(long, conflicts_with = "lab")]
    socket: Option<PathBuf>,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
    /// Shows how far all nodes of the cluster are with a change of backend, as the API server has it, until it is done.
    #[arg(long, conflicts_with = "socket")]
    watch: bool,
    /// How many seconds to watch; over before it is done is no success.
    #[arg(long, default_value_t = 300, requires = "watch")]
    timeout: u64,
    /// Kubeconfig of the cluster to watch; else KUBECONFIG and the usual places.
    #[arg(long, requires = "watch", conflicts_with = "lab")]
    kubeconfig: Option<PathBuf>,
}

/// One node's answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct NodeAnswer {
    node: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    status: Option<AgentStatus>,
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
}

/// What the agent behind a status socket says.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(crate) fn ask(socket: &Path) -> Result<AgentStatus> {
    let mut stream = UnixStream::connect(socket).with_context(|| nobody(socket))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text).context("the agent did not answer within 5 s")?;
    serde_json::from_slice(&text).context("the agent's answer is not understood: is it of another version?")
}

/// Nobody answers: with what the last agent said at its end, if it failed.
fn nobody(socket: &Path) -> String {
    let config = AgentConfig { run_dir: socket.with_file_name(""), ..AgentConfig::default() };
    let said =
        last_words(&config.last_words()).map(|last| format!(" The last one ended at {}: {}", last.at, last.error));
    format!("no agent answers on {}: is it running?{}", socket.display(), said.unwrap_or_default())
}

fn sockets(options: &Options) -> Result<Vec<(String, PathBuf)>> {
    if let Some(socket) = &options.socket {
        return Ok(vec![("this node".to_owned(), socket.clone())]);
    }
    let lab = match &options.lab {
        Some(name) => Some(name.clone()),
        None => match towpath_lab::commands::list()?.as_slice() {
            [only] => Some(only.name.clone()),
            _ => None,
        },
    };
    let Some(lab) = lab else {
        return Ok(vec![("this node".to_owned(), AgentConfig::default().status_socket())]);
    };
    let layout = Layout::new(&lab)?;
    let spec = towpath_lab::commands::spec(&lab)?;
    let socket = |node: &str| AgentConfig { run_dir: layout.node_run(node).join("towpath"), ..AgentConfig::default() };
    Ok(spec.nodes.iter().map(|n| (n.name.clone(), socket(&n.name).status_socket())).collect())
}

/// Asks and prints; the answer is a success when every agent answers, is ready and sees no problem.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    if options.watch {
        let place = Where { kubeconfig: options.kubeconfig.clone(), lab: options.lab.clone(), output: options.output };
        return progress::watch(&place, Duration::from_secs(options.timeout)).await;
    }
    let answers: Vec<NodeAnswer> = sockets(options)?
        .into_iter()
        .map(|(node, socket)| match ask(&socket) {
            Ok(status) => NodeAnswer { node: status.node.clone(), status: Some(status), error: None },
            Err(error) => NodeAnswer { node, status: None, error: Some(format!("{error:#}")) },
        })
        .collect();
    let healthy = answers.iter().all(|a| a.status.as_ref().is_some_and(|s| s.ready && s.problems.is_empty()));
    match options.output {
        crate::Output::Json => crate::print_json(&answers)?,
        crate::Output::Text => crate::print(&show(&answers))?,
    }
    Ok(healthy)
}

/// What a policy that is only audited would have denied, in a line.
pub(crate) fn would_have_denied(audited: &AuditedPolicy) -> String {
    let AuditedPolicy { policy, since, connections, denials } = audited;
    let connections = match connections {
        0 => "no connection".to_owned(),
        1 => "1 connection".to_owned(),
        n => format!("{n} connections"),
    };
    let mut line = format!("{policy} (audited) would have denied {connections} since {since}");
    for (index, denial) in denials.iter().enumerate() {
        let separator = if index == 0 { ":" } else { ";" };
        let AuditedDenial { direction, rule, connections, last } = denial;
        line.push_str(&format!("{separator} {direction}, {rule}: {connections}, last {last}"));
    }
    line
}

fn show(answers: &[NodeAnswer]) -> String {
    let mut table = Table::new();
    table.load_style(NOTHING);
    table.set_header([
        "NODE",
        "READY",
        "BACKEND",
        "SERVICES",
        "DNS",
        "MTU",
        "PEERS",
        "PODS",
        "FRONTENDS",
        "HOST-PORTS",
        "BACKENDS",
        "POLICIES",
        "RULES",
        "CONNECTIONS",
        "DROPS",
    ]);
    let mut notes = Vec::new();
    for answer in answers {
        let Some(status) = &answer.status else {
            table.add_row([answer.node.as_str(), "no answer"]);
            notes.push(format!("{}: {}", answer.node, answer.error.as_deref().unwrap_or("no answer")));
            continue;
        };
        let drops: u64 = status.counters.iter().filter(|(name, _)| name.starts_with("drop.")).map(|(_, n)| n).sum();
        table.add_row([
            status.node.clone(),
            if status.ready { "yes" } else { "no" }.to_owned(),
            status.backend.clone(),
            status.service_proxy.clone(),
            status.dns.clone(),
            status.pod_mtu.to_string(),
            status.peers.len().to_string(),
            status.pods.to_string(),
            status.frontends.to_string(),
            status.host_ports.to_string(),
            status.backends.to_string(),
            status.policies.to_string(),
            status.rules.to_string(),
            status.connections.to_string(),
            drops.to_string(),
        ]);
        notes.extend(status.problems.iter().chain(&status.hints).map(|p| format!("{}: {p}", status.node)));
        notes.extend(status.audited.iter().map(|audited| format!("{}: {}", status.node, would_have_denied(audited))));
        if !status.announced.is_empty() {
            let addresses: Vec<String> = status.announced.iter().map(ToString::to_string).collect();
            notes.push(format!("{}: announces {}", status.node, addresses.join(", ")));
        }
        if !status.translated_at_device.is_empty() {
            let pods = status.translated_at_device.join(", ");
            notes.push(format!(
                "{}: sockets left alone ({SOCKET_SERVICES_ANNOTATION}), Services translated at the device: {pods}",
                status.node
            ));
        }
        for peer in &status.peers {
            let tunnel = peer.tunnel.map(|t| t.to_string()).unwrap_or_default();
            let network = peer.network.as_ref().map(|network| format!(" (still {network})")).unwrap_or_default();
            let backend = if peer.backend.is_empty() { String::new() } else { format!(" ({})", peer.backend) };
            notes.push(format!(
                "{} → {} by {tunnel}{backend}: {}{network}",
                status.node,
                peer.node,
                peer.pod_cidrs.join(", ")
            ));
        }
        for (reason, count) in status.counters.iter().filter(|(name, n)| name.starts_with("drop.") && **n > 0) {
            notes.push(format!("{}: {reason} {count}", status.node));
        }
    }
    let mut text = table.to_string();
    if !notes.is_empty() {
        text.push_str("\n\n");
        text.push_str(&notes.join("\n"));
    }
    text
}
