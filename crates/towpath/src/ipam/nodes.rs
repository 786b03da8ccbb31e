//! What the nodes' agents say of their addresses.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use towpath_wire::cni::{MAX_MESSAGE, Reply, Request};
use towpath_wire::config::AgentConfig;
use towpath_wire::ipam::NodeAddresses;

use crate::place::Cluster;
use crate::{kubernetes, place};

/// How long a node may take: it looks twice, and before that repairs.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the nodes say.
#[derive(Debug, Default)]
pub(super) struct Said {
    pub(super) answers: Vec<NodeAddresses>,
    /// Who did not answer, for people.
    pub(super) silent: Vec<String>,
}

/// What the agent behind a CNI socket says.
///
/// # Errors
/// Nobody answers, it refuses, or it says something that is not understood.
pub(super) fn ask(socket: &Path, repair: bool) -> Result<NodeAddresses> {
    let mut stream = UnixStream::connect(socket)
        .with_context(|| format!("no agent answers on {}: is it running?", socket.display()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = serde_json::to_vec(&Request::Addresses { repair })?;
    stream.write_all(&u32::try_from(request.len())?.to_be_bytes())?;
    stream.write_all(&request)?;
    let mut length = [0; 4];
    stream
        .read_exact(&mut length)
        .with_context(|| format!("the agent did not answer within {} s", PATIENCE.as_secs()))?;
    let length = usize::try_from(u32::from_be_bytes(length))?;
    ensure!(length <= MAX_MESSAGE, "the agent announces {length} bytes");
    let mut answer = vec![0; length];
    stream.read_exact(&mut answer)?;
    match serde_json::from_slice(&answer).context("the agent's answer is not understood: is it of another version?")? {
        Reply::Addresses { addresses } => Ok(addresses),
        Reply::Failed { error } => bail!("{error}"),
        Reply::Added { .. } | Reply::Done => bail!("the agent answers something else: is it of another version?"),
    }
}

/// Every node of a cluster, or one.
pub(super) async fn all(cluster: &Cluster, only: Option<&str>, repair: bool) -> Said {
    let mut said = Said::default();
    let wanted = |node: &str| only.is_none_or(|only| only == node);
    let mut take = |node: &str, answer: Result<NodeAddresses>| match answer {
        // An agent knows its node's name; one that was found by its socket is told apart by that.
        Ok(answer) => said.answers.push(NodeAddresses { node: node.to_owned(), ..answer }),
        Err(error) => said.silent.push(format!("node {node}: {error:#}")),
    };
    match sources(cluster).await {
        Ok(Sources::Sockets(agents)) => {
            let asked = agents.into_iter().filter(|(node, _)| wanted(node)).map(|(node, config)| async move {
                let answer = tokio::task::spawn_blocking(move || ask(&config.cni_socket(), repair)).await;
                (node, answer.unwrap_or_else(|error| Err(error.into())))
            });
            futures::future::join_all(asked).await.into_iter().for_each(|(node, answer)| take(&node, answer));
        }
        Ok(Sources::Pods(agents)) => {
            let asked = agents.into_iter().filter(|(node, _)| wanted(node)).map(|(node, pod)| async move {
                let answer = tokio::time::timeout(PATIENCE, said_by(&cluster.client, &pod, repair)).await;
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
            let name = crate::status::ask(&own.status_socket())
                .context("kube-system has no pods of the DaemonSet towpath")?
                .node;
            Ok(Sources::Sockets(vec![(name, own)]))
        }
        false => Ok(Sources::Pods(agents)),
    }
}

async fn said_by(client: &kube::Client, pod: &str, repair: bool) -> Result<NodeAddresses> {
    let mut command = vec!["/usr/bin/towpath", "ipam", "checked"];
    command.extend(repair.then_some("--repair"));
    let said = kubernetes::run_in_agent(client, pod, &command).await?;
    let answer = serde_json::from_slice(&said.out);
    answer.with_context(|| format!("it said {:?}", String::from_utf8_lossy(&said.err).trim()))
}
