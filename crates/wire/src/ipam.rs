//! What the agent answers to `towpath ipam check`, over the CNI socket: a node's addresses, and what does not fit together.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// The addresses of one node.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct NodeAddresses {
    /// The node.
    pub node: String,
    /// Its pod ranges, and how full they are.
    pub ranges: Vec<RangeUse>,
    /// Leases: containers' attachments that have addresses.
    pub leases: usize,
    /// What does not fit together; empty: all is well.
    pub findings: Vec<Finding>,
    /// What was repaired, in words.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub repaired: Vec<String>,
    /// Pods of the API were not compared: the agent has not heard of all of them since it started.
    pub without_pods: bool,
}

/// How full a pod range is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct RangeUse {
    /// The range.
    pub range: String,
    /// Addresses that somebody has.
    pub taken: u64,
    /// Addresses that could be given; as many as fit where there are more.
    pub size: u64,
    /// It gives no more: it was taken from the node, and pods still have addresses of it.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub closed: bool,
}

impl std::fmt::Display for RangeUse {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {} of {}", self.range, self.taken, self.size)?;
        if self.closed { f.write_str(", gives no more") } else { Ok(()) }
    }
}

/// Something that does not fit together.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What kind.
    pub kind: Kind,
    /// Whose: a container's attachment, a device, an address or a file.
    pub object: String,
    /// The pod as `namespace/name`, where it is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<String>,
    /// The addresses that it is about.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub addresses: Vec<IpAddr>,
    /// In words: what it is, and what to do.
    pub what: String,
    /// Whether `--repair` does something about it.
    pub repairable: bool,
}

/// Kinds of findings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Kind {
    /// An address that is given, and no device has: its network namespace is gone.
    LeaseWithoutDevice,
    /// An address that is given to a container whose ADD was never answered.
    Unfinished,
    /// A device whose addresses nobody is written down to have: its lease is lost or damaged.
    DeviceWithoutLease,
    /// A device that is named as a pod's, of which nothing is known.
    DeviceWithoutOwner,
    /// A pod that the kernel's programs know and that has no device.
    EntryWithoutDevice,
    /// A device whose pod the kernel's programs do not know, or by another device.
    DeviceWithoutEntry,
    /// An address that two have.
    Duplicate,
    /// An address that is in none of the node's pod ranges.
    OutOfRange,
    /// A pod whose status says an address that this node gave to nobody.
    PodWithoutLease,
    /// An address that is given to a pod which the API server does not know.
    LeaseWithoutPod,
    /// A DEL that is not done yet.
    QueuedDelete,
}

impl Kind {
    /// As in JSON, for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::LeaseWithoutDevice => "leaseWithoutDevice",
            Self::Unfinished => "unfinished",
            Self::DeviceWithoutLease => "deviceWithoutLease",
            Self::DeviceWithoutOwner => "deviceWithoutOwner",
            Self::EntryWithoutDevice => "entryWithoutDevice",
            Self::DeviceWithoutEntry => "deviceWithoutEntry",
            Self::Duplicate => "duplicate",
            Self::OutOfRange => "outOfRange",
            Self::PodWithoutLease => "podWithoutLease",
            Self::LeaseWithoutPod => "leaseWithoutPod",
            Self::QueuedDelete => "queuedDelete",
        }
    }
}
