//! Agents that are listened to.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncRead, BufReader};
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use towpath_wire::observe::Told;

use crate::kubernetes;

/// How long an agent that went away is left alone.
const REST: Duration = Duration::from_secs(1);

/// What one of them says.
pub(super) enum Heard {
    /// The node cannot be heard, and why.
    Silent(String, String),
    /// What its agent tells.
    Told(Told),
}

/// Listens at a socket, again and again.
pub(super) fn of_socket(node: String, socket: PathBuf, heard: mpsc::Sender<Heard>) {
    tokio::spawn(async move {
        let connect = || async {
            UnixStream::connect(&socket).await.with_context(|| {
                format!("no agent answers on {}: is it running, and as new as this program?", socket.display())
            })
        };
        let mut said = None;
        while !heard.is_closed() {
            let outcome = match connect().await {
                Ok(stream) => listen(stream, &heard).await,
                Err(error) => Err(error),
            };
            complain(&node, outcome, &mut said, &heard).await;
        }
    });
}

/// Listens to every wanted node of a cluster that has an agent; how many there are.
///
/// # Errors
/// The API server does not answer or refuses.
pub(super) async fn of_cluster(
    client: &kube::Client,
    wanted: impl Fn(&String) -> bool,
    heard: &mpsc::Sender<Heard>,
) -> Result<usize> {
    let agents: Vec<_> = kubernetes::agents(client).await?.into_iter().filter(|(node, _)| wanted(node)).collect();
    let count = agents.len();
    for (node, _) in agents {
        let (client, heard) = (client.clone(), heard.clone());
        tokio::spawn(async move {
            let mut said = None;
            while !heard.is_closed() {
                let outcome = listen_to_pod(&client, &node, &heard).await;
                complain(&node, outcome, &mut said, &heard).await;
            }
        });
    }
    Ok(count)
}

/// The agent's pod may be another one than it was: the DaemonSet was rolled.
async fn listen_to_pod(client: &kube::Client, node: &str, heard: &mpsc::Sender<Heard>) -> Result<()> {
    let agents = kubernetes::agents(client).await?;
    let (_, pod) = agents.iter().find(|(at, _)| at == node).context("it has no agent any more")?;
    let command = ["/usr/bin/towpath", "observe", "--drops", "--local", "--relay"];
    let mut session = kubernetes::begin_in_agent(client, pod, &command).await?;
    // Held: where it ends, the command does.
    let _stdin = session.stdin();
    let out = session.stdout().context("its agent's container gives no output")?;
    listen(out, heard).await
}

/// Every line of an agent, until it ends.
async fn listen(stream: impl AsyncRead + Unpin, heard: &mpsc::Sender<Heard>) -> Result<()> {
    let mut lines = BufReader::new(stream).lines();
    while let Some(line) = lines.next_line().await.context("the connection to its agent broke")? {
        heard.send(Heard::Told(understood(&line)?)).await?;
    }
    Ok(())
}

fn understood(line: &str) -> Result<Told> {
    serde_json::from_str(line)
        .with_context(|| format!("its agent says what is not understood: is it of another version? {line:.200}"))
}

async fn complain(node: &str, outcome: Result<()>, said: &mut Option<String>, heard: &mpsc::Sender<Heard>) {
    let why = match outcome {
        Ok(()) => "its agent ended; trying again".to_owned(),
        Err(error) => format!("{error:#}; trying again"),
    };
    if said.as_ref() != Some(&why) && heard.send(Heard::Silent(node.to_owned(), why.clone())).await.is_ok() {
        *said = Some(why);
    }
    tokio::time::sleep(REST).await;
}
