//! `towpath probe serve|ask`: both ends of what `towpath connectivity test` tries, so that its pods need no image but Towpath's own.
//!
//! Hidden commands: what they say to each other may change with any version. Every wait is bounded, and a server ends by itself.

mod ask;
mod http;
mod serve;

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// Commands of a probe pod.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Answers over HTTP and UDP until its time is over, or SIGTERM.
    Serve(serve::Options),
    /// Tries what a JSON list says, one after the other, and prints a JSON line for each.
    Ask {
        /// The list.
        list: String,
    },
}

/// Runs a command.
///
/// # Errors
/// A port cannot be listened on, or the list is none.
pub(crate) fn run(command: &Command) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let done = runtime.block_on(async {
        match command {
            Command::Serve(options) => serve::run(options).await,
            Command::Ask { list } => {
                let asks: Vec<Ask> = serde_json::from_str(list).context("the list is no JSON list of what to ask")?;
                ask::run(&asks).await
            }
        }
    });
    // A name that is still being looked up must not hold up the end.
    runtime.shutdown_background();
    done.map(|()| true)
}

/// Where to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    /// An address or a name.
    pub(crate) host: String,
    /// TCP or UDP port.
    pub(crate) port: u16,
}

impl Endpoint {
    /// An endpoint by its address.
    pub(crate) fn new(host: impl ToString, port: u16) -> Self {
        Self { host: host.to_string(), port }
    }
}

impl std::fmt::Display for Endpoint {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(f, "[{}]:{}", self.host, self.port),
            false => write!(f, "{}:{}", self.host, self.port),
        }
    }
}

/// How many bytes a datagram carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Size {
    /// The server says who it is and whom it sees.
    WhoAmI,
    /// As many as make a packet of the pod device's MTU, sent without permission to fragment.
    Mtu,
    /// So many bytes.
    Bytes(u32),
}

/// What to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Action {
    /// HTTP: who answers, and as whom it sees the client.
    Http(Endpoint),
    /// Bytes from the server, each compared.
    Download(Endpoint, u32),
    /// Bytes to the server, which compares each.
    Upload(Endpoint, u32),
    /// A datagram there and back.
    Udp(Endpoint, Size),
    /// A TCP connection, and no more.
    Connect(Endpoint),
    /// The addresses of a name, by the pod's own resolver configuration.
    Resolve(String),
    /// The text at a path of an HTTP server.
    Text(Endpoint, String),
}

/// What must come of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Expect {
    /// An answer.
    Answer,
    /// Nothing at all: what is denied is dropped, not refused.
    Silence,
}

/// One thing to try.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Ask {
    /// Comes back with the answer.
    pub(crate) id: usize,
    /// What.
    pub(crate) action: Action,
    /// It is tried again until this comes of it.
    pub(crate) expect: Expect,
    /// For how long, in milliseconds.
    pub(crate) patience: u64,
    /// How long one attempt may take, in milliseconds.
    pub(crate) timeout: u64,
}

/// Patience when waiting has been in vain before, in milliseconds.
const LITTLE: u64 = 1_000;

impl Ask {
    /// The same with little patience.
    pub(crate) fn impatient(self) -> Self {
        Self { patience: self.patience.min(LITTLE), ..self }
    }
}

/// What a probe server says of itself and of its client.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Served {
    /// Its pod.
    pub(crate) pod: String,
    /// Its node.
    pub(crate) node: String,
    /// The client's address, as the server's socket has it.
    pub(crate) client: Option<IpAddr>,
    /// Bytes that came in the body, all as they should be.
    pub(crate) bytes: u64,
}

/// What came of one attempt.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Outcome {
    /// A server of ours answered.
    Served(Served),
    /// So many bytes came, all as they should be.
    Bytes(u64),
    /// The connection was accepted.
    Connected,
    /// A name has these addresses.
    Addresses(Vec<IpAddr>),
    /// A text.
    Text(String),
    /// Refused at once.
    Refused,
    /// Nothing within the time.
    Silent,
    /// Something else.
    Failed(String),
}

impl Outcome {
    /// Whether it is what was expected, in kind.
    pub(crate) fn is(&self, expect: Expect) -> bool {
        match (self, expect) {
            (Self::Silent, Expect::Silence) => true,
            (Self::Silent | Self::Refused | Self::Failed(_), _) | (_, Expect::Silence) => false,
            _ => true,
        }
    }
}

/// One answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Answer {
    /// Of the ask with this number.
    pub(crate) id: usize,
    /// The last attempt's.
    pub(crate) outcome: Outcome,
    /// How many attempts there were.
    pub(crate) attempts: u32,
    /// How long the last attempt took, in milliseconds.
    pub(crate) millis: u64,
}

/// The byte at a place of every body and datagram: what is lost, doubled or moved shows.
fn byte_at(index: usize) -> u8 {
    u8::try_from(index % 251).unwrap_or_default()
}

/// The first `length` bytes.
fn pattern(length: usize) -> Vec<u8> {
    pattern_from(0, length)
}

/// `length` bytes from a place on.
fn pattern_from(place: usize, length: usize) -> Vec<u8> {
    (place..place.saturating_add(length)).map(byte_at).collect()
}

/// What a datagram is answered with: itself, but for the first byte, by which an answer is known.
fn answered(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    if let Some(first) = answer.first_mut() {
        *first = !*first;
    }
    answer
}
