//! What the agent and `towpath carry` say to each other about the backend `udp`: length-prefixed JSON as in [`crate::dns`], and once, in between,
//! file descriptors.
//!
//! ```text
//! agent                                      carry
//!   ├─ Nodes {nodes} ──────────────────────────►│ where nodes' tunnels run over IPv6: the others, at first and whenever they are others
//!   │◄─ Known ───────────────────────────────────┤ packets to these are carried from here on
//!   ├─ Carry {work} ───────────────────────────►│ carries this already: Carrying
//!   │◄─ Give ────────────────────────────────────┤ does not: asks for what it takes
//!   ├─ queues, receivers, senders (SCM_RIGHTS) ─►│ as many of each; the byte with them: 1 if the device takes UDP that is to be cut
//!   │◄─ Carrying ────────────────────────────────┤
//!   ├─ Carry {work} ───────────────────────────►│ again, every few seconds: still? what was counted?
//! ```

use std::net::{IpAddr, Ipv6Addr};

use serde::{Deserialize, Serialize};

/// Queues, and so threads of each direction, at most.
pub const MAX_QUEUES: usize = 16;

/// Between what packets are to be carried.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct UdpWork {
    /// Index of the device.
    pub device: u32,
    /// This node's address, of the family that all nodes' tunnels run over.
    pub address: IpAddr,
    /// UDP port, of all nodes.
    pub port: u16,
    /// Network identifier, 24 bits.
    pub network: u32,
    /// How many queues it has.
    pub queues: usize,
}

/// What the agent says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UdpRequest {
    /// Carry packets.
    Carry {
        /// Between what.
        work: UdpWork,
    },
    /// Know these, and no others: a frame says of a node at an IPv6 address no more than a hash of it.
    Nodes {
        /// The other nodes' addresses.
        nodes: Vec<Ipv6Addr>,
    },
}

/// What carry answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum UdpReply {
    /// It does.
    Carrying {
        /// What it counted since it began.
        counters: UdpCounters,
    },
    /// Give the ends.
    Give,
    /// It knows the nodes.
    Known,
    /// It does not.
    Refused {
        /// Why, for people.
        reason: String,
    },
}

/// What is counted of the backend `udp`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct UdpCounters {
    /// Packets sent to other nodes, each in a datagram.
    pub sent: u64,
    /// Packets that other nodes sent.
    pub received: u64,
    /// Frames of the device that are for no node that is known, or cannot be read.
    pub unsent: u64,
    /// Datagrams that could not be sent.
    pub send_failed: u64,
    /// Datagrams that hold nothing that a node would send, or come from one that goes by what another goes by.
    pub malformed: u64,
    /// Datagrams with another network's identifier.
    pub other_network: u64,
    /// Datagrams that met congestion, with a packet whose ends know nothing of such a thing: the loss tells them (RFC 6040 4.2).
    pub congested: u64,
    /// Frames that the device did not take.
    pub refused: u64,
}

impl UdpCounters {
    /// Each with its name.
    pub fn named(&self) -> [(&'static str, u64); 8] {
        [
            ("sent", self.sent),
            ("received", self.received),
            ("unsent", self.unsent),
            ("send_failed", self.send_failed),
            ("malformed", self.malformed),
            ("other_network", self.other_network),
            ("congested", self.congested),
            ("refused", self.refused),
        ]
    }
}
