//! What the agent tells on its observe socket to `towpath observe`: a JSON document a line ([`Told`]), until the reader goes away.

use std::collections::BTreeMap;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "camelCase")]
pub enum Told {
    /// The first line: what is dropped from now on is told.
    Listening {
        /// The node.
        node: String,
    },
    /// A packet was dropped, or a socket refused.
    Drop(Box<DropEvent>),
    /// So many were not told since the line before, for there were too many.
    Untold {
        /// The node.
        node: String,
        /// How many.
        count: u64,
    },
    /// Nothing will come any more.
    End {
        /// The node.
        node: String,
        /// Why, and what to do.
        why: String,
    },
}

/// A packet that was dropped, or a socket that was refused.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct DropEvent {
    /// When (RFC 3339, UTC).
    pub time: String,
    /// The node that dropped it.
    pub node: String,
    /// What became of it.
    pub verdict: Fate,
    /// Why: the label `reason` of the metric `towpath_drop_packets_total`; of what was refused, the label `path` of `towpath_packets_total`.
    pub reason: String,
    /// Where in the kernel.
    pub place: Place,
    /// `TCP`, `UDP`, `SCTP`, `ICMP`, `ICMPv6`, or an IP protocol's number; empty: the packet could not be read.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub protocol: String,
    /// Flags of a TCP header, `SYN,ACK`, or the type of an ICMP message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detail: Option<String>,
    /// Who sent it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<FlowEnd>,
    /// To whom.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination: Option<FlowEnd>,
    /// The endpoint that it was on its way to, where the destination is a Service's address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<FlowEnd>,
    /// What of the policies denied it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<Denial>,
    /// The device that it came in by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub device: Option<String>,
    /// Bytes, link header included; 0 of a socket.
    pub bytes: u32,
}

/// What became of a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Fate {
    /// Dropped: its sender is not told.
    #[default]
    Dropped,
    /// Answered with a reset or an ICMP error, or the system call failed.
    Refused,
    /// It passed: the first packet of a connection that a policy which is only audited would have denied.
    Audited,
}

/// Where in the kernel.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Place {
    /// At a device.
    #[default]
    Device,
    /// At a device's driver (XDP).
    Driver,
    /// In a socket's system call: nothing was sent.
    Socket,
}

/// One end of a flow.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FlowEnd {
    /// Its address.
    pub address: IpAddr,
    /// Its port; 0: not known, or of a protocol without.
    pub port: u16,
    /// The pod, node or Service that has the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub is: Option<Holder>,
    /// Labels of the pod.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// Who has an address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Holder {
    /// `Pod`, `Node`, `Service` or `DNS`.
    pub kind: String,
    /// Namespace, of what has one.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub namespace: String,
    /// Name.
    pub name: String,
}

/// What of the policies denied a packet.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Denial {
    /// `Ingress` of the one that is spoken to, or `Egress` of the one that speaks.
    pub direction: String,
    /// The rule in words: `spec.egress[0]` of a policy; or that none allows it.
    pub rule: String,
    /// The policies that isolate the pod, or the one that the rule is of (`NAMESPACE/NAME`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub policies: Vec<String>,
}
