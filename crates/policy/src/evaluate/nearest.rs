//! The rule that was closest to a match, and what of it does not fit.

use serde::Serialize;
use towpath_model::desired::{RowProtocol, RuleInfo};
use towpath_model::{Direction, NetworkPolicy, Peer, PolicyPort, PortMatch, Protocol};

use super::{Case, entries};

/// A field of a rule that a flow does not fit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "field", rename_all = "kebab-case")]
pub enum Mismatch {
    /// The port.
    Port {
        /// What the rule wants: `80`, `8000-8080`, `http (here 8080)`.
        wanted: String,
        /// What the flow has.
        found: u16,
    },
    /// The protocol.
    Protocol {
        /// What the rule wants.
        wanted: Protocol,
        /// What the flow has; none: one without ports, such as ICMP.
        found: Option<Protocol>,
    },
    /// The peer.
    Peer {
        /// What the rule wants, in words.
        wanted: String,
    },
}

impl Mismatch {
    /// How far off it is: the sum over a rule ranks it. A wrong peer outweighs a wrong protocol and port.
    fn weight(&self) -> u32 {
        match self {
            Mismatch::Port { .. } => 1,
            Mismatch::Protocol { .. } => 2,
            Mismatch::Peer { .. } => 4,
        }
    }
}

/// The rule that was closest to a match.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Nearest {
    /// The rule.
    pub rule: RuleInfo,
    /// What of it does not fit; never empty.
    pub mismatches: Vec<Mismatch>,
}

impl Case<'_, '_> {
    /// The closest of all rules; the first one where several are equally close.
    pub(super) fn nearest(&self, policies: &[&NetworkPolicy]) -> Option<Nearest> {
        let mut best: Option<(u32, Nearest)> = None;
        for policy in policies {
            for (index, rule) in (0u32..).zip(policy.rules(self.direction).unwrap_or_default()) {
                for peer in entries(&rule.peers) {
                    for port in entries(&rule.ports) {
                        let mut mismatches = self.port_mismatch(port.map(|(_, p)| p));
                        mismatches.extend(self.peer_mismatch(policy, peer.map(|(_, p)| p)));
                        let weight = mismatches.iter().map(Mismatch::weight).sum();
                        if best.as_ref().is_none_or(|(least, _)| weight < *least) {
                            let rule = self.rule_info(policy, index, peer, port);
                            best = Some((weight, Nearest { rule, mismatches }));
                        }
                    }
                }
            }
        }
        best.map(|(_, nearest)| nearest)
    }

    fn peer_mismatch(&self, policy: &NetworkPolicy, wanted: Option<&Peer>) -> Option<Mismatch> {
        let wanted = wanted.filter(|w| !self.peer_matches(policy, w))?;
        Some(Mismatch::Peer { wanted: describe_peer(policy, wanted) })
    }

    fn port_mismatch(&self, wanted: Option<&PolicyPort>) -> Vec<Mismatch> {
        let Some(wanted) = wanted.filter(|w| !self.port_matches(w)) else { return Vec::new() };
        if !self.protocol_matches(wanted) {
            let found = match self.flow.protocol {
                RowProtocol::Ports(protocol) => Some(protocol),
                RowProtocol::Other => None,
            };
            let mut mismatches = vec![Mismatch::Protocol { wanted: wanted.protocol, found }];
            if found.is_some() && !self.number_matches(wanted) {
                mismatches.push(self.number_mismatch(wanted));
            }
            return mismatches;
        }
        vec![self.number_mismatch(wanted)]
    }

    fn number_mismatch(&self, wanted: &PolicyPort) -> Mismatch {
        let text = match &wanted.port {
            PortMatch::Any => "any".to_owned(),
            PortMatch::Range(first, last) if first == last => first.to_string(),
            PortMatch::Range(first, last) => format!("{first}-{last}"),
            PortMatch::Named(name) => {
                let whose = match self.direction {
                    Direction::Ingress => "the pod",
                    Direction::Egress => "the peer",
                };
                match self.named_port(name, wanted.protocol) {
                    Some(number) => format!("{name} ({number} in {whose})"),
                    None => format!("{name} ({whose} has no {} port of that name)", wanted.protocol),
                }
            }
        };
        Mismatch::Port { wanted: text, found: self.flow.port }
    }
}

fn describe_peer(policy: &NetworkPolicy, peer: &Peer) -> String {
    match peer {
        Peer::IpBlock { cidr, except } if except.is_empty() => format!("an address in {cidr}"),
        Peer::IpBlock { cidr, except } => {
            let holes: Vec<String> = except.iter().map(ToString::to_string).collect();
            format!("an address in {cidr} except {}", holes.join(", "))
        }
        Peer::Pods { namespaces, pods } => {
            let which = if pods.is_everything() { "any pod".to_owned() } else { format!("a pod with {pods}") };
            match namespaces {
                None => format!("{which} in namespace {}", policy.name.namespace),
                Some(selector) if selector.is_everything() => format!("{which} in any namespace"),
                Some(selector) => format!("{which} in a namespace with {selector}"),
            }
        }
    }
}
