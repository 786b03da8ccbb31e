//! The rows of the walkthrough, in the order a reader types them.

mod access;
mod backends;
mod balancers;
mod names;
mod pods;
mod services;

use anyhow::Result;

use crate::cluster::Cluster;
use crate::log::Log;

pub use access::{Reach, reachability};
pub use balancers::balancer_address;

/// One row.
#[derive(Clone, Copy, Debug)]
pub struct Row {
    /// Its number, for example `W3`.
    pub id: &'static str,
    /// What the reader does.
    pub title: &'static str,
    /// Does it and records what came of it. An error is a row that could not be done at all.
    pub run: fn(&Cluster, &mut Log) -> Result<()>,
}

/// All rows. Later rows use what earlier ones made.
pub const ROWS: &[Row] = &[
    Row { id: "W1", title: "two containers in a pod share one address", run: pods::w1 },
    Row { id: "W2", title: "pods reach each other by address, on one node and across nodes", run: pods::w2 },
    Row { id: "W3", title: "a Deployment behind a NodePort Service", run: services::w3 },
    Row { id: "W4", title: "replicas come and go under traffic", run: services::w4 },
    Row { id: "W5", title: "names of Services resolve", run: names::w5 },
    Row { id: "W6", title: "a Service address does not answer ping", run: services::w6 },
    Row { id: "W7", title: "without a policy nothing is isolated", run: access::w7 },
    Row { id: "W8", title: "a policy admits pods by label only: one without it", run: access::w8 },
    Row { id: "W9", title: "the same policy: one with the label", run: access::w9 },
    Row { id: "W10", title: "blocks of addresses, and egress", run: access::w10 },
    Row { id: "W11", title: "default deny of a namespace", run: access::w11 },
    Row { id: "W12", title: "without the policies everything is reachable again", run: access::w12 },
    Row { id: "W13", title: "a load balancer's address, reached from outside", run: balancers::w13 },
    Row { id: "W14", title: "ExternalName", run: names::w14 },
    Row { id: "W15", title: "Services without a selector", run: services::w15 },
    Row { id: "W16", title: "headless Service, a name for each pod", run: names::w16 },
    Row { id: "W17", title: "an annotation picks the balancing algorithm", run: services::w17 },
    Row { id: "W19", title: "troubleshooting with kubectl", run: pods::w19 },
    Row { id: "W20", title: "each backend carries it all", run: backends::w20 },
    Row { id: "W21", title: "the backend of a running cluster is changed", run: backends::w21 },
];

/// Whether a probe is to be answered. What is not to be is given less time: a second attempt of TCP's falls into it, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hope {
    Answer,
    Silence,
}

impl Hope {
    pub(crate) fn of(works: bool) -> Self {
        if works { Self::Answer } else { Self::Silence }
    }

    fn seconds(self) -> u32 {
        match self {
            Self::Answer => 4,
            Self::Silence => 2,
        }
    }

    /// A request over HTTP from a shell with busybox, bounded in time (busybox's own `-T` crashes on Debian 12).
    pub(crate) fn fetch(self, url: &str) -> String {
        format!("timeout {} wget -q -O - {url}", self.seconds())
    }

    /// The same on a node or a host outside, where the machine's own tools are.
    pub(crate) fn fetch_from_host(self, url: &str) -> String {
        format!("curl -sS -m {} {url}", self.seconds())
    }

    /// `ping` with the family that an address has.
    pub(crate) fn ping(self, address: &str) -> String {
        let tool = if address.contains(':') { "ping -6" } else { "ping" };
        format!("{tool} -c 1 -W {} {address}", self.seconds().div_ceil(2))
    }
}

/// A request that is to be answered.
pub(crate) fn fetch(url: &str) -> String {
    Hope::Answer.fetch(url)
}

/// The same on a node or a host outside.
pub(crate) fn fetch_from_host(url: &str) -> String {
    Hope::Answer.fetch_from_host(url)
}

/// A ping that is to be answered.
pub(crate) fn ping(address: &str) -> String {
    Hope::Answer.ping(address)
}
