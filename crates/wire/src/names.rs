//! What the agent answers on its names socket to `towpath dns names`: one JSON document.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// What domain names of policies stand for on one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeNames {
    /// The node.
    pub node: String,
    /// The agent has just started, and knows nothing yet.
    pub starting: bool,
    /// What policies ask for, `*.` before what all names below are meant of.
    pub asked: Vec<String>,
    /// Names that answers were given for, in order.
    pub names: Vec<LearnedName>,
    /// The latest addresses of answers that were not believed.
    pub refused: Vec<RefusedAddress>,
    /// Pairs of a name and an address that were learned since the agent started.
    pub learned_total: u64,
    /// Addresses that were refused since then.
    pub refused_total: u64,
    /// Pairs that made room for others before their time was over.
    pub evicted_total: u64,
    /// Pairs whose time was over.
    pub forgotten_total: u64,
}

/// A name and what it stands for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LearnedName {
    /// Lower case, without a trailing dot.
    pub name: String,
    /// Its addresses.
    pub addresses: Vec<LearnedAddress>,
}

/// An address of a name.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct LearnedAddress {
    /// The address.
    pub address: IpAddr,
    /// How much longer it is good, in seconds; 0: as long as a pod of the node is connected to it.
    pub seconds: u64,
}

/// An address that was not learned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RefusedAddress {
    /// The name that it was said to be of.
    pub name: String,
    /// The address.
    pub address: IpAddr,
    /// Why, for people.
    pub why: String,
    /// How often it was said.
    pub times: u64,
}
