//! What the nodes' agents have in force, as they say.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use kube::Client;
use towpath_lab::layout::LabName;
use towpath_wire::policy::InForce;

use crate::{kubernetes, place};

/// How long a node may take: one that is gone holds up nothing else.
const PATIENCE: Duration = Duration::from_secs(10);

/// A node and its answer, or why there is none.
pub(super) type Answer = (String, Result<InForce>);

/// What the agent behind a policy socket says.
///
/// # Errors
/// Nobody answers, or something that is not understood.
pub(super) fn ask(socket: &Path) -> Result<InForce> {
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

fn understood(text: &[u8]) -> Result<InForce> {
    serde_json::from_slice(text).context("the agent's answer is not understood: is it of another version?")
}

/// Every node of a lab.
///
/// # Errors
/// There is no such lab.
pub(super) fn of_lab(lab: &LabName) -> Result<Vec<Answer>> {
    let agents = place::agents_of_lab(lab)?;
    Ok(agents.into_iter().map(|(node, config)| (node, ask(&config.policy_socket()))).collect())
}

/// Every node of a cluster that has an agent, all at once.
///
/// # Errors
/// The agents cannot be listed, or there are none.
pub(super) async fn of_cluster(client: &Client) -> Result<Vec<Answer>> {
    let agents = kubernetes::agents(client).await?;
    ensure!(!agents.is_empty(), "kube-system has no pods of the DaemonSet towpath: nobody can say what is in force");
    let asked = agents.into_iter().map(|(node, pod)| async move {
        let said = tokio::time::timeout(PATIENCE, said_by(client, &pod)).await;
        let late = |_| Err(anyhow::anyhow!("it did not answer within {} s", PATIENCE.as_secs()));
        (node, said.unwrap_or_else(late))
    });
    Ok(futures::future::join_all(asked).await)
}

async fn said_by(client: &Client, pod: &str) -> Result<InForce> {
    let said = kubernetes::run_in_agent(client, pod, &["/usr/bin/towpath", "policy", "in-force"]).await?;
    understood(&said.out).with_context(|| format!("it said {:?}", String::from_utf8_lossy(&said.err).trim()))
}
