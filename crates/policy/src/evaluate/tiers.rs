//! ClusterNetworkPolicies of one tier, asked in their order.

use towpath_model::desired::{PolicyRef, RowProtocol, RuleInfo, Verdict};
use towpath_model::{Action, ClusterNetworkPolicy, ClusterPeer, ClusterRule, Direction, ProtocolMatch, Subject};

use super::{Case, Reason, entries};
use crate::view::Holder;

/// Whether something of a rule matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Match {
    Yes,
    /// The peer may be a pod that is not known yet, and of that the rule would be true.
    Perhaps,
    No,
}

impl Match {
    fn of(matches: bool) -> Self {
        if matches { Match::Yes } else { Match::No }
    }
}

impl Case<'_, '_> {
    /// What a tier decides; none: it leaves the flow to the next one. A rule that passes it on is added to `passed`.
    ///
    /// Of a peer that may be a pod which is not known yet, what rules say of pods is taken to its disadvantage: a `Deny` matches, an `Accept`
    /// does not, and behind a `Pass` nothing of the tier accepts.
    pub(super) fn tier(
        &self,
        policies: &[&ClusterNetworkPolicy],
        passed: &mut Vec<RuleInfo>,
    ) -> Option<(Verdict, Reason)> {
        let selected = policies.iter().filter(|policy| {
            let Subject { namespaces, pods } = &policy.subject;
            pods.matches(&self.pod.labels) && namespaces.matches(&self.of.namespace_labels(&self.pod.name.namespace))
        });
        let mut passed_perhaps = None;
        for policy in selected {
            for (index, rule) in (0u32..).zip(policy.rules(self.direction)) {
                for (matched, peer, port) in self.matches(rule) {
                    let info = || self.cluster_rule_info(policy, index, rule, peer, port);
                    match (rule.action, matched) {
                        (Action::Deny, _) => return Some((Verdict::Deny, Reason::Rule { rule: info() })),
                        (Action::Accept, Match::Yes) if passed_perhaps.is_none() => {
                            return Some((Verdict::Allow, Reason::Rule { rule: info() }));
                        }
                        (Action::Pass, Match::Yes) | (Action::Accept, Match::Yes) => {
                            passed.push(passed_perhaps.unwrap_or_else(info));
                            return None;
                        }
                        (Action::Pass, _) => passed_perhaps = passed_perhaps.or_else(|| Some(info())),
                        (Action::Accept, _) => {}
                    }
                }
            }
        }
        None
    }

    /// The peers of a rule that match with a protocol of it, in order.
    fn matches(&self, rule: &ClusterRule) -> Vec<(Match, Option<u32>, Option<u32>)> {
        let mut found = Vec::new();
        for (index, wanted) in (0u32..).zip(&rule.peers) {
            let peer = self.cluster_peer_matches(wanted);
            if peer == Match::No {
                continue;
            }
            for port in entries(&rule.protocols) {
                if port.is_none_or(|(_, port)| self.protocol_matches_of(port, peer)) {
                    let index = (*wanted != ClusterPeer::Everybody).then_some(index);
                    found.push((peer, index, port.map(|(i, _)| i)));
                    break;
                }
            }
        }
        found
    }

    fn cluster_rule_info(
        &self,
        policy: &ClusterNetworkPolicy,
        index: u32,
        rule: &ClusterRule,
        peer: Option<u32>,
        port: Option<u32>,
    ) -> RuleInfo {
        RuleInfo {
            policy: PolicyRef::Cluster { tier: policy.tier, name: policy.name.clone() },
            direction: self.direction,
            rule: index,
            name: rule.name.clone(),
            peer,
            port,
        }
    }

    fn cluster_peer_matches(&self, wanted: &ClusterPeer) -> Match {
        match wanted {
            ClusterPeer::Everybody => Match::Yes,
            ClusterPeer::Pods(Subject { namespaces, pods }) => match self.peer.and_then(|p| p.as_peer()) {
                Some(peer) => Match::of(
                    pods.matches(peer.labels) && namespaces.matches(&self.of.namespace_labels(peer.namespace)),
                ),
                None if self.of.may_be_pod(self.other) => Match::Perhaps,
                None => Match::No,
            },
            ClusterPeer::Nodes(selector) => {
                Match::of(self.of.holders.nodes_at(self.other).iter().any(|node| selector.matches(&node.labels)))
            }
            ClusterPeer::Networks(networks) => Match::of(networks.iter().any(|net| net.contains(&self.other))),
            // What becomes a pod's or a node's address later is no longer what the name stood for.
            ClusterPeer::DomainNames(names) => {
                let outside = || matches!(self.of.holders.holder(self.other), None | Some(Holder::UnknownPod(_)));
                Match::of(self.of.view.names.name_of(names, self.other).is_some() && outside())
            }
        }
    }

    fn protocol_matches_of(&self, wanted: &ProtocolMatch, peer: Match) -> bool {
        match (wanted, self.flow.protocol) {
            (ProtocolMatch::Ports(wanted), _) => self.port_matches(wanted),
            // What an unknown pod calls its ports is not known either.
            (ProtocolMatch::NamedPort(_), RowProtocol::Ports(_))
                if peer == Match::Perhaps && self.direction == Direction::Egress =>
            {
                true
            }
            (ProtocolMatch::NamedPort(name), RowProtocol::Ports(protocol)) => {
                self.named_port(name, protocol) == Some(self.flow.port)
            }
            (ProtocolMatch::NamedPort(_), RowProtocol::Other) => false,
        }
    }
}
