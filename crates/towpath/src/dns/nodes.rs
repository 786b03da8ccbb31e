//! What the nodes' agents have learned.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use towpath_wire::config::AgentConfig;
use towpath_wire::names::NodeNames;

use crate::place::Cluster;
use crate::{kubernetes, place};

/// How long a node may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the nodes say.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) answers: Vec<NodeNames>,
    /// Who did not answer, for people.
    pub(super) silent: Vec<String>,
}

/// What the agent behind a names socket says.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(super) fn ask(socket: &Path) -> Result<NodeNames> {
    let mut stream = UnixStream::connect(socket).with_context(|| {
        format!("no agent answers on {}: is it running, and as new as this program?", socket.display())
    })?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    let late = || format!("the agent did not answer within {} s", PATIENCE.as_secs());
    stream.read_to_end(&mut text).with_context(late)?;
    understood(&text)
}

fn understood(text: &[u8]) -> Result<NodeNames> {
    serde_json::from_slice(text).context("the agent's answer is not understood: is it of another version?")
}

/// Every node of a cluster, or one.
pub(super) async fn all(cluster: &Cluster, only: Option<&str>) -> Said {
    let mut said = Said::default();
    let wanted = |node: &str| only.is_none_or(|only| only == node);
    let mut take = |node: &str, answer: Result<NodeNames>| match answer {
        Ok(answer) => said.answers.push(answer),
        Err(error) => said.silent.push(format!("node {node}: {error:#}")),
    };
    match sources(cluster).await {
        Ok(Sources::Sockets(agents)) => {
            for (node, config) in agents.iter().filter(|(node, _)| wanted(node)) {
                take(node, ask(&config.names_socket()));
            }
        }
        Ok(Sources::Pods(agents)) => {
            let asked = agents.into_iter().filter(|(node, _)| wanted(node)).map(|(node, pod)| async move {
                let answer = tokio::time::timeout(PATIENCE, said_by(&cluster.client, &pod)).await;
                let late = |_| Err(anyhow!("it did not answer within {} s", PATIENCE.as_secs()));
                (node, answer.unwrap_or_else(late))
            });
            futures::future::join_all(asked).await.into_iter().for_each(|(node, answer)| take(&node, answer));
        }
        Err(error) => said.silent.push(format!("nodes are not asked: {error:#}")),
    }
    if let Some(only) = only.filter(|_| said.answers.is_empty() && said.silent.is_empty()) {
        said.silent.push(format!("node {only} is not there, or has no agent"));
    }
    said
}

/// What one node has learned.
///
/// # Errors
/// It cannot be asked.
pub(crate) async fn of_node(cluster: &Cluster, node: &str) -> Result<NodeNames> {
    let Said { answers, silent } = all(cluster, Some(node)).await;
    answers.into_iter().next().with_context(|| silent.join("; "))
}

enum Sources {
    Sockets(Vec<(String, AgentConfig)>),
    Pods(Vec<(String, String)>),
}

async fn sources(cluster: &Cluster) -> Result<Sources> {
    if let Some(lab) = &cluster.lab {
        return Ok(Sources::Sockets(place::agents_of_lab(lab)?));
    }
    let agents: Vec<(String, String)> = kubernetes::agents(&cluster.client).await?.into_iter().collect();
    match agents.is_empty() {
        // The node this runs on, where agents are no pods of the cluster.
        true => {
            let own = AgentConfig::default();
            let name = ask(&own.names_socket()).context("kube-system has no pods of the DaemonSet towpath")?.node;
            Ok(Sources::Sockets(vec![(name, own)]))
        }
        false => Ok(Sources::Pods(agents)),
    }
}

async fn said_by(client: &kube::Client, pod: &str) -> Result<NodeNames> {
    let said = kubernetes::run_in_agent(client, pod, &["/usr/bin/towpath", "dns", "learned"]).await?;
    understood(&said.out).with_context(|| format!("it said {:?}", String::from_utf8_lossy(&said.err).trim()))
}
