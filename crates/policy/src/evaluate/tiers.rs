//! ClusterNetworkPolicies of one tier, asked in their order.

use towpath_model::desired::{PolicyRef, RowProtocol, RuleInfo, Verdict};
use towpath_model::{Action, ClusterNetworkPolicy, ClusterPeer, ClusterRule, ProtocolMatch, Subject};

use super::{Case, Reason, entries};

impl Case<'_, '_> {
    /// What a tier decides; none: it leaves the flow to the next one. A rule that passes it on is added to `passed`.
    pub(super) fn tier(
        &self,
        policies: &[&ClusterNetworkPolicy],
        passed: &mut Vec<RuleInfo>,
    ) -> Option<(Verdict, Reason)> {
        let selected = policies.iter().filter(|policy| {
            let Subject { namespaces, pods } = &policy.subject;
            pods.matches(&self.pod.labels) && namespaces.matches(&self.of.namespace_labels(&self.pod.name.namespace))
        });
        let (action, rule) = selected.into_iter().find_map(|policy| self.first_match(policy))?;
        match action {
            Action::Accept => Some((Verdict::Allow, Reason::Rule { rule })),
            Action::Deny => Some((Verdict::Deny, Reason::Rule { rule })),
            Action::Pass => {
                passed.push(rule);
                None
            }
        }
    }

    fn first_match(&self, policy: &ClusterNetworkPolicy) -> Option<(Action, RuleInfo)> {
        for (index, rule) in (0u32..).zip(policy.rules(self.direction)) {
            for (peer, wanted) in (0u32..).zip(&rule.peers).filter(|(_, peer)| self.cluster_peer_matches(peer)) {
                let protocols = entries(&rule.protocols);
                let Some(port) = protocols.into_iter().find(|p| p.is_none_or(|(_, p)| self.protocol_match(p))) else {
                    continue;
                };
                let peer = (*wanted != ClusterPeer::Everybody).then_some(peer);
                return Some((rule.action, self.cluster_rule_info(policy, index, rule, peer, port.map(|(i, _)| i))));
            }
        }
        None
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

    fn cluster_peer_matches(&self, wanted: &ClusterPeer) -> bool {
        match wanted {
            ClusterPeer::Everybody => true,
            ClusterPeer::Pods(Subject { namespaces, pods }) => {
                self.peer.and_then(|p| p.as_peer()).is_some_and(|peer| {
                    pods.matches(peer.labels) && namespaces.matches(&self.of.namespace_labels(peer.namespace))
                })
            }
            ClusterPeer::Nodes(selector) => {
                self.of.holders.nodes_at(self.other).iter().any(|node| selector.matches(&node.labels))
            }
            ClusterPeer::Networks(networks) => networks.iter().any(|net| net.contains(&self.other)),
            ClusterPeer::DomainNames(_) => false,
        }
    }

    fn protocol_match(&self, wanted: &ProtocolMatch) -> bool {
        match (wanted, self.flow.protocol) {
            (ProtocolMatch::Ports(wanted), _) => self.port_matches(wanted),
            (ProtocolMatch::NamedPort(name), RowProtocol::Ports(protocol)) => {
                self.named_port(name, protocol) == Some(self.flow.port)
            }
            (ProtocolMatch::NamedPort(_), RowProtocol::Other) => false,
        }
    }
}
