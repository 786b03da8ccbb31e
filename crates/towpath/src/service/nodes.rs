//! Open connections, as the nodes' agents count them.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Read;
use std::net::SocketAddr;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use kube::Client;
use towpath_lab::layout::LabName;
use towpath_wire::config::AgentConfig;
use towpath_wire::service::NodeConnections;

use crate::{kubernetes, place};

/// How long a node may take: one that is gone holds up nothing else.
const PATIENCE: Duration = Duration::from_secs(10);

/// Protocol, Service address and backend.
pub(super) type Flow = (String, SocketAddr, SocketAddr);

/// What all nodes say.
#[derive(Debug, Default)]
pub(super) struct Counted {
    /// Open connections.
    pub(super) open: BTreeMap<Flow, u64>,
    /// Nodes that answered.
    pub(super) nodes: BTreeSet<String>,
    /// What is not in it, for people.
    pub(super) incomplete: Vec<String>,
}

impl Counted {
    /// Takes one node's answer, or why there is none.
    pub(super) fn take(&mut self, node: &str, answer: Result<NodeConnections>) {
        match answer {
            Ok(answer) => {
                self.incomplete.extend(answer.incomplete.iter().map(|why| format!("node {node}: {why}")));
                self.nodes.insert(node.to_owned());
                for one in answer.connections {
                    *self.open.entry((one.protocol, one.service, one.backend)).or_default() += one.open;
                }
            }
            Err(error) => self.incomplete.push(format!("node {node}: its connections are not counted: {error:#}")),
        }
    }
}

/// What the agent behind a Service socket says.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(super) fn ask(socket: &Path) -> Result<NodeConnections> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("no agent answers on {}: is it running, and as new as this program?", socket.display())
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    stream
        .read_to_end(&mut text)
        .with_context(|| format!("the agent did not answer within {} s", PATIENCE.as_secs()))?;
    understood(&text)
}

fn understood(text: &[u8]) -> Result<NodeConnections> {
    serde_json::from_slice(text).context("the agent's answer is not understood: is it of another version?")
}

/// Every node of a lab.
pub(super) fn of_lab(lab: &LabName) -> Counted {
    let mut counted = Counted::default();
    match place::agents_of_lab(lab) {
        Ok(agents) => agents.iter().for_each(|(node, config)| counted.take(node, ask(&config.service_socket()))),
        Err(error) => counted.incomplete.push(format!("connections are not counted: {error:#}")),
    }
    counted
}

/// Every node of a cluster that has an agent, all at once; the node this runs on by its own socket.
pub(super) async fn of_cluster(client: &Client) -> Counted {
    let mut counted = Counted::default();
    let own = ask(&AgentConfig::default().service_socket()).ok();
    let own_name = own.as_ref().map(|own| own.node.clone());
    if let Some(own) = own {
        counted.take(&own.node.clone(), Ok(own));
    }
    let agents = match kubernetes::agents(client).await {
        Ok(agents) => agents,
        Err(error) => {
            counted.incomplete.push(format!("connections of other nodes are not counted: {error:#}"));
            return counted;
        }
    };
    if agents.is_empty() && own_name.is_none() {
        counted.incomplete.push(
            "connections are not counted: kube-system has no pods of the DaemonSet towpath, and no agent runs here"
                .to_owned(),
        );
    }
    let others = agents.into_iter().filter(|(node, _)| own_name.as_ref() != Some(node));
    let asked = others.map(|(node, pod)| async move {
        let said = tokio::time::timeout(PATIENCE, said_by(client, &pod)).await;
        let late = |_| Err(anyhow::anyhow!("it did not answer within {} s", PATIENCE.as_secs()));
        (node, said.unwrap_or_else(late))
    });
    for (node, answer) in futures::future::join_all(asked).await {
        counted.take(&node, answer);
    }
    counted
}

async fn said_by(client: &Client, pod: &str) -> Result<NodeConnections> {
    let said = kubernetes::run_in_agent(client, pod, &["/usr/bin/towpath", "service", "connections"]).await?;
    understood(&said.out).with_context(|| format!("it said {:?}", String::from_utf8_lossy(&said.err).trim()))
}
