//! Sets of ports of all protocols on one line: TCP, UDP, SCTP with 65,536 ports each, and at the end what has no ports (ICMP).

use std::fmt;

use serde::{Serialize, Serializer};
use towpath_model::Protocol;
use towpath_model::desired::RowProtocol;

use super::ranges::Ranges;

const EACH: u128 = 1 << 16;
const OTHER: u128 = 3 * EACH;

fn base(protocol: Protocol) -> u128 {
    match protocol {
        Protocol::Tcp => 0,
        Protocol::Udp => EACH,
        Protocol::Sctp => 2 * EACH,
    }
}

/// Ports of protocols.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ports(pub(crate) Ranges);

impl Ports {
    /// None.
    pub fn none() -> Self {
        Self::default()
    }

    /// Every port of every protocol, and protocols without ports.
    pub fn all() -> Self {
        Self(Ranges::of(0, OTHER))
    }

    /// Ports `first` to `last` of a protocol, both included.
    pub fn of(protocol: Protocol, first: u16, last: u16) -> Self {
        Self(Ranges::of(base(protocol) + u128::from(first), base(protocol) + u128::from(last)))
    }

    /// All ports of a protocol.
    pub fn of_protocol(protocol: Protocol) -> Self {
        Self::of(protocol, 0, u16::MAX)
    }

    /// What has no ports: ICMP and its like.
    pub fn without_ports() -> Self {
        Self(Ranges::one(OTHER))
    }

    /// One port.
    pub fn one(protocol: RowProtocol, port: u16) -> Self {
        match protocol {
            RowProtocol::Ports(protocol) => Self::of(protocol, port, port),
            RowProtocol::Other => Self::without_ports(),
        }
    }

    /// What is in any of them.
    pub(crate) fn any_of<'p>(list: impl IntoIterator<Item = &'p Self>) -> Self {
        Self(Ranges::collect(list.into_iter().flat_map(|ports| ports.0.iter())))
    }

    /// Whether a port is in it.
    pub fn has(&self, protocol: RowProtocol, port: u16) -> bool {
        match protocol {
            RowProtocol::Ports(protocol) => self.0.has(base(protocol) + u128::from(port)),
            RowProtocol::Other => self.0.has(OTHER),
        }
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// What is in both.
    pub fn and(&self, other: &Self) -> Self {
        Self(self.0.and(&other.0))
    }

    /// What is in either.
    pub fn or(&self, other: &Self) -> Self {
        Self(self.0.or(&other.0))
    }

    /// What is in this and not in the other.
    pub fn without(&self, other: &Self) -> Self {
        Self(self.0.without(&other.0))
    }

    /// One of them to show: the lowest that is not port 0, which nobody listens on, if there is another.
    pub fn sample(&self) -> Option<(RowProtocol, u16)> {
        let zeros = Ranges::collect(Protocol::ALL.map(|p| (base(p), base(p))));
        let number = self.0.without(&zeros).first().or_else(|| self.0.first())?;
        Some(decode(number))
    }

    /// The ports of a protocol, as ranges.
    pub fn ranges(&self, protocol: Protocol) -> Vec<(u16, u16)> {
        let (first, last) = (base(protocol), base(protocol) + EACH - 1);
        let port = |number: u128| u16::try_from(number - first).unwrap_or_default();
        self.0.and(&Ranges::of(first, last)).iter().map(|(a, b)| (port(a), port(b))).collect()
    }
}

/// What a number on the line stands for.
pub(crate) fn decode(number: u128) -> (RowProtocol, u16) {
    let port = u16::try_from(number % EACH).unwrap_or_default();
    let protocol = Protocol::ALL.into_iter().find(|p| number.checked_sub(base(*p)).is_some_and(|rest| rest < EACH));
    protocol.map_or((RowProtocol::Other, 0), |protocol| (RowProtocol::Ports(protocol), port))
}

impl fmt::Display for Ports {
    /// `TCP 80, TCP 8000-8080, UDP (all), ICMP`; `all` for everything, `none` for nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if *self == Self::all() {
            return f.write_str("all");
        }
        let mut parts: Vec<String> = Vec::new();
        for protocol in Protocol::ALL {
            let ranges = self.ranges(protocol);
            let list: Vec<String> = ranges
                .iter()
                .map(|(first, last)| match (first, last) {
                    (0, &u16::MAX) => "(all)".to_owned(),
                    (a, b) if a == b => a.to_string(),
                    (a, b) => format!("{a}-{b}"),
                })
                .collect();
            if !list.is_empty() {
                parts.push(format!("{protocol} {}", list.join(",")));
            }
        }
        if self.has(RowProtocol::Other, 0) {
            parts.push("ICMP".to_owned());
        }
        if parts.is_empty() { f.write_str("none") } else { f.write_str(&parts.join(", ")) }
    }
}

impl Serialize for Ports {
    /// `[{"protocol": "TCP", "first": 80, "last": 80}, {"protocol": "ICMP"}]`.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Part {
            protocol: String,
            #[serde(skip_serializing_if = "Option::is_none")]
            first: Option<u16>,
            #[serde(skip_serializing_if = "Option::is_none")]
            last: Option<u16>,
        }
        let mut parts = Vec::new();
        for protocol in Protocol::ALL {
            parts.extend(self.ranges(protocol).into_iter().map(|(first, last)| Part {
                protocol: protocol.to_string(),
                first: Some(first),
                last: Some(last),
            }));
        }
        if self.has(RowProtocol::Other, 0) {
            parts.push(Part { protocol: "ICMP".to_owned(), first: None, last: None });
        }
        parts.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_read_as_people_write_them() {
        let http = Ports::of(Protocol::Tcp, 80, 80).or(&Ports::of(Protocol::Tcp, 8000, 8080));
        assert_eq!(http.to_string(), "TCP 80,8000-8080");
        let dns = Ports::of(Protocol::Udp, 53, 53).or(&Ports::without_ports());
        assert_eq!(dns.to_string(), "UDP 53, ICMP");
        assert_eq!(Ports::all().to_string(), "all");
        assert_eq!(Ports::none().to_string(), "none");
        let rest = Ports::all().without(&Ports::of_protocol(Protocol::Tcp));
        assert_eq!(rest.to_string(), "UDP (all), SCTP (all), ICMP");
        assert_eq!(Ports::all().sample(), Some((RowProtocol::Ports(Protocol::Tcp), 1)));
        assert_eq!(Ports::of(Protocol::Udp, 0, 0).sample(), Some((RowProtocol::Ports(Protocol::Udp), 0)));
        assert_eq!(Ports::without_ports().sample(), Some((RowProtocol::Other, 0)));
    }
}
