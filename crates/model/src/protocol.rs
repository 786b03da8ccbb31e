//! Transport protocols, address families and the canonical form of an address.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

/// A protocol that Kubernetes lets a port name (`core/v1` `Protocol`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Protocol {
    /// IP protocol 6.
    #[serde(rename = "TCP")]
    Tcp,
    /// IP protocol 17.
    #[serde(rename = "UDP")]
    Udp,
    /// IP protocol 132.
    #[serde(rename = "SCTP")]
    Sctp,
}

impl Protocol {
    /// All three.
    pub const ALL: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

    /// The IP protocol number (IANA).
    pub fn number(self) -> u8 {
        match self {
            Protocol::Tcp => 6,
            Protocol::Udp => 17,
            Protocol::Sctp => 132,
        }
    }

    /// As an API field holds it; `None` stands for the API's default, TCP.
    pub fn parse(text: Option<&str>) -> Option<Protocol> {
        match text {
            None | Some("" | "TCP") => Some(Protocol::Tcp),
            Some("UDP") => Some(Protocol::Udp),
            Some("SCTP") => Some(Protocol::Sctp),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::Tcp => "TCP",
            Protocol::Udp => "UDP",
            Protocol::Sctp => "SCTP",
        })
    }
}

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// The family of an address; an IPv4-mapped IPv6 address counts as IPv6 here, see [`canonical`].
pub fn family_of(address: IpAddr) -> Family {
    match address {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// An IPv4-mapped IPv6 address as the IPv4 address it maps; any other unchanged.
pub fn canonical(address: IpAddr) -> IpAddr {
    address.to_canonical()
}
