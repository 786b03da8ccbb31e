//! What `towpath lab node …` asks of the supervisor: a line of JSON each way, over a socket that only root reaches.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use crate::layout::Layout;
use crate::options::NodeSpec;

/// A change of the lab's nodes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Ask {
    /// One more.
    AddNode,
    /// This one leaves.
    DeleteNode(String),
}

/// The node that was added or deleted, or why not.
type Answer = Result<NodeSpec, String>;

/// Somebody asks, and waits.
pub(super) struct Asked {
    pub(super) what: Ask,
    answer: oneshot::Sender<Answer>,
}

impl Asked {
    /// What came of it.
    pub(super) fn answer(self, answer: Result<NodeSpec>) {
        // Who asked may have gone.
        let _ = self.answer.send(answer.map_err(|error| format!("{error:#}")));
    }
}

/// Asks the supervisor of a lab, and waits for as long as it takes.
///
/// # Errors
///
/// The lab does not run, or its own answer.
pub(crate) fn ask(layout: &Layout, what: &Ask) -> Result<NodeSpec> {
    let name = layout.name();
    let mut stream = UnixStream::connect(layout.control_socket())
        .with_context(|| format!("lab {name} is not running; `towpath lab start` brings a stopped lab back"))?;
    let mut line = serde_json::to_string(what)?;
    line.push('\n');
    stream.write_all(line.as_bytes()).context("ask the lab's supervisor")?;
    let mut said = String::new();
    BufReader::new(stream).read_line(&mut said).context("hear the lab's supervisor")?;
    let answer: Answer = serde_json::from_str(&said).with_context(|| {
        format!("the supervisor of lab {name} ended meanwhile; its log is {}", layout.supervisor_log().display())
    })?;
    answer.map_err(|why| anyhow!("{why}"))
}

/// Passes on what is asked. Ends when nobody takes it any more.
pub(super) async fn listen(listener: UnixListener, asked: mpsc::Sender<Asked>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept().await.context("accept a connection of `lab node`")?;
        let asked = asked.clone();
        tokio::spawn(async move {
            if let Err(error) = serve(stream, asked).await {
                tracing::warn!(error = %format!("{error:#}"), "a request of `lab node`");
            }
        });
    }
}

async fn serve(stream: tokio::net::UnixStream, asked: mpsc::Sender<Asked>) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let mut line = String::new();
    tokio::io::BufReader::new(read).read_line(&mut line).await.context("read it")?;
    let what = serde_json::from_str(&line).with_context(|| format!("understand {line:?}"))?;
    let (answer, answered) = oneshot::channel();
    asked.send(Asked { what, answer }).await.context("the lab ends")?;
    let mut text = serde_json::to_string(&answered.await.context("the lab ends")?)?;
    text.push('\n');
    write.write_all(text.as_bytes()).await.context("answer it")
}
