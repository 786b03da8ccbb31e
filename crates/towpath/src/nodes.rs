//! What the nodes' agents say of themselves: those of a lab over their sockets, those of a cluster by a command in their containers.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;
use serde::de::DeserializeOwned;
use towpath_agent::failure::last_words;
use towpath_wire::config::AgentConfig;

use crate::kubernetes;

/// How long a node may take: one that is gone holds up nothing else.
const PATIENCE: Duration = Duration::from_secs(10);

/// A node and its answer, or why there is none.
pub(crate) type Answer<T> = (String, Result<T>);

/// What an agent says on one of its sockets.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(crate) fn ask<T: DeserializeOwned>(socket: &Path) -> Result<T> {
    let mut stream = UnixStream::connect(socket).with_context(|| nobody(socket))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut text = Vec::new();
    stream
        .read_to_end(&mut text)
        .with_context(|| format!("the agent did not answer within {} s", PATIENCE.as_secs()))?;
    understood(&text)
}

/// Nobody answers: with what the last agent said at its end, if it failed.
fn nobody(socket: &Path) -> String {
    let config = AgentConfig { run_dir: socket.with_file_name(""), ..AgentConfig::default() };
    let said =
        last_words(&config.last_words()).map(|last| format!(" The last one ended at {}: {}", last.at, last.error));
    let said = said.unwrap_or_default();
    format!("no agent answers on {}: is it running, and as new as this program?{said}", socket.display())
}

fn understood<T: DeserializeOwned>(text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).context("the agent's answer is not understood: is it of another version?")
}

/// What this command prints in the container of every agent of a cluster, all at once.
///
/// # Errors
/// The agents cannot be listed, or there are none.
pub(crate) async fn of_cluster<T: DeserializeOwned>(client: &Client, command: &[&str]) -> Result<Vec<Answer<T>>> {
    let agents = kubernetes::agents(client).await?;
    ensure!(!agents.is_empty(), "kube-system has no pods of the DaemonSet towpath: there is nobody to ask");
    let asked = agents.into_iter().map(|(node, pod)| async move { (node, said_by(client, &pod, command).await) });
    Ok(futures::future::join_all(asked).await)
}

/// What a command prints in the container of one agent.
///
/// # Errors
/// It cannot be run, takes too long, or prints something that is not understood.
pub(crate) async fn said_by<T: DeserializeOwned>(client: &Client, pod: &str, command: &[&str]) -> Result<T> {
    let said = tokio::time::timeout(PATIENCE, kubernetes::run_in_agent(client, pod, command)).await;
    let said = said.map_err(|_| anyhow::anyhow!("it did not answer within {} s", PATIENCE.as_secs()))??;
    understood(&said.out).with_context(|| format!("it said {:?}", String::from_utf8_lossy(&said.err).trim()))
}
