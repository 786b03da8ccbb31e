//! `towpath status`: what the agents say of themselves.
//!
//! Every node of a lab or of a cluster is asked, or the node this runs on.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use comfy_table::{Table, presets::NOTHING};
use serde::{Deserialize, Serialize};
use towpath_lab::layout::LabName;
use towpath_model::SOCKET_SERVICES_ANNOTATION;
use towpath_wire::config::AgentConfig;
use towpath_wire::status::{AgentStatus, AuditedDenial, AuditedPolicy};

use crate::nodes::{self, Answer};
use crate::place::{self, Cluster, Where};
use crate::progress;

/// Options of `towpath status`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// All nodes of this lab; else, where no kubeconfig is named, the only lab there is, else this machine's own agent.
    #[arg(long)]
    lab: Option<LabName>,
    /// The agent's socket, if it is elsewhere.
    #[arg(long, conflicts_with_all = ["lab", "kubeconfig"])]
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
    /// All nodes of the cluster of this kubeconfig; else of that in KUBECONFIG.
    #[arg(long, conflicts_with = "lab")]
    kubeconfig: Option<PathBuf>,
}

impl Options {
    fn place(&self) -> Where {
        Where { kubeconfig: self.kubeconfig.clone(), lab: self.lab.clone(), output: self.output }
    }
}

/// One node's answer.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct NodeAnswer {
    /// The node.
    pub(crate) node: String,
    /// What its agent says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) status: Option<AgentStatus>,
    /// Why it says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) error: Option<String>,
}

impl NodeAnswer {
    fn of(node: String, answer: Result<AgentStatus>) -> Self {
        match answer {
            Ok(status) => Self { node: status.node.clone(), status: Some(status), error: None },
            Err(error) => Self { node, status: None, error: Some(format!("{error:#}")) },
        }
    }
}

/// What the agent behind a status socket says.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(crate) fn ask(socket: &Path) -> Result<AgentStatus> {
    nodes::ask(socket)
}

/// What every agent of a cluster, or of a lab, says of itself.
///
/// # Errors
/// There is no such lab; the agents cannot be listed, or there are none.
pub(crate) async fn of_all(cluster: &Cluster) -> Result<Vec<NodeAnswer>> {
    let answers: Vec<Answer<Vec<NodeAnswer>>> = match &cluster.lab {
        Some(lab) => {
            let asked = place::agents_of_lab(lab)?.into_iter();
            asked
                .map(|(node, config)| (node.clone(), Ok(vec![NodeAnswer::of(node, ask(&config.status_socket()))])))
                .collect()
        }
        None => nodes::of_cluster(&cluster.client, &["/usr/bin/towpath", "status", "-o", "json"]).await?,
    };
    let one = |(node, answer): Answer<Vec<NodeAnswer>>| match answer {
        Ok(said) => said,
        Err(error) => vec![NodeAnswer::of(node, Err(error))],
    };
    Ok(answers.into_iter().flat_map(one).collect())
}

/// Those that are asked: by a socket; a lab or a cluster, if one is named or there is only one lab; else this machine's own.
async fn answers(options: &Options) -> Result<Vec<NodeAnswer>> {
    let own = |socket: &Path| vec![NodeAnswer::of("this node".to_owned(), ask(socket))];
    if let Some(socket) = &options.socket {
        return Ok(own(socket));
    }
    let place = options.place();
    match place.is_named() || place.lab()?.is_some() {
        true => of_all(&place.cluster().await?).await,
        false => Ok(own(&AgentConfig::default().status_socket())),
    }
}

/// Asks and prints; the answer is a success when every agent answers, is ready and sees no problem.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    if options.watch {
        return progress::watch(&options.place(), Duration::from_secs(options.timeout)).await;
    }
    let answers = answers(options).await?;
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
        for range in &status.pod_ranges {
            notes.push(format!("{}: addresses of {range}", status.node));
        }
        if !status.limited.is_empty() {
            notes.push(format!("{}: limited bandwidth: {}", status.node, status.limited.join(", ")));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_agents_container_prints_is_what_is_read_of_it() {
        let status = AgentStatus { node: "n1".to_owned(), ready: true, policies: 3, ..AgentStatus::default() };
        let answers = [
            NodeAnswer::of("this node".to_owned(), Ok(status)),
            NodeAnswer::of("n2".to_owned(), Err(anyhow::anyhow!("no agent"))),
        ];
        let read: Vec<NodeAnswer> = serde_json::from_str(&serde_json::to_string(&answers).unwrap()).unwrap();
        assert_eq!(read[0].node, "n1", "by its own name");
        assert_eq!(read[0].status.as_ref().map(|status| (status.ready, status.policies)), Some((true, 3)));
        assert_eq!((read[1].status.is_none(), read[1].error.as_deref()), (true, Some("no agent")));
    }
}
