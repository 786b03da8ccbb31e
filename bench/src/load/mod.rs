//! Load generators: one-byte ping-pong (RR), connections (CRR), a bulk stream, and ping-pong over UDP.
//!
//! Server and client are single-threaded, blocking processes, so that what they cost is the path and little else.

pub(crate) mod client;
mod path;
pub(crate) mod server;

pub(crate) use path::{Cpus, Ends, PathArm};

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

/// Port that servers listen on.
pub(crate) const PORT: u16 = 7010;

/// What a block does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
#[value(rename_all = "kebab-case")]
pub(crate) enum Measure {
    /// One byte each way over one TCP connection, again and again.
    Rr,
    /// Connect, one byte each way, close by RST (so that no port waits), again and again.
    Crr,
    /// As much as goes over one TCP connection.
    Stream,
    /// One byte each way in UDP datagrams.
    UdpRr,
}

impl Measure {
    /// What people call it.
    pub(crate) fn title(self) -> &'static str {
        match self {
            Measure::Rr => "TCP RR",
            Measure::Crr => "TCP CRR",
            Measure::Stream => "TCP stream",
            Measure::UdpRr => "UDP RR",
        }
    }

    /// For identifiers of rows.
    pub(crate) fn id(self) -> &'static str {
        match self {
            Measure::Rr => "rr",
            Measure::Crr => "crr",
            Measure::Stream => "stream",
            Measure::UdpRr => "udp-rr",
        }
    }
}

/// A block to run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    /// What to do.
    pub(crate) measure: Measure,
    /// Where the server is.
    pub(crate) to: SocketAddr,
    /// How long before counting begins, in milliseconds.
    pub(crate) warm_up: u64,
    /// How long it counts, in milliseconds.
    pub(crate) length: u64,
}

/// What a block did.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Done {
    /// Transactions (MiB of a stream) while it counted.
    pub(crate) count: f64,
    /// Seconds that it counted.
    pub(crate) seconds: f64,
    /// Transactions with those before it counted.
    pub(crate) all: f64,
}
