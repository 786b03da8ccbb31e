//! `towpath policy audit`: what the policies that are only audited would have denied, on all nodes together.

use std::collections::{BTreeMap, BTreeSet};

use comfy_table::{Table, presets::NOTHING};
use serde::Serialize;
use towpath_wire::status::AuditedDenial;

use crate::status::NodeAnswer;

/// An audited policy, in the cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Audited {
    /// Kind and name.
    policy: String,
    /// Since when all nodes count that do (RFC 3339, UTC).
    since: String,
    /// Nodes on which it selects pods.
    nodes: BTreeSet<String>,
    /// Connections that it would have denied there.
    connections: u64,
    /// The same by rule.
    denials: Vec<Denial>,
}

/// What one of its rules would have denied.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
struct Denial {
    direction: String,
    rule: String,
    connections: u64,
    /// When there was one last (RFC 3339, UTC).
    last: String,
    /// Where.
    nodes: BTreeSet<String>,
}

/// What all nodes say.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Audits {
    policies: Vec<Audited>,
    /// Nodes that did not answer, and why: what they count is missing.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    silent: BTreeMap<String, String>,
}

impl Audits {
    pub(super) fn of(answers: Vec<NodeAnswer>) -> Self {
        let mut policies: BTreeMap<String, Audited> = BTreeMap::new();
        let mut silent = BTreeMap::new();
        for NodeAnswer { node, status, error } in answers {
            let Some(status) = status else {
                silent.insert(node, error.unwrap_or_else(|| "no answer".to_owned()));
                continue;
            };
            for audited in status.audited {
                let policy = policies.entry(audited.policy.clone()).or_default();
                policy.policy = audited.policy;
                // Both are of one form, so the later is the greater.
                policy.since = std::mem::take(&mut policy.since).max(audited.since);
                policy.connections = policy.connections.saturating_add(audited.connections);
                policy.nodes.insert(node.clone());
                for denial in audited.denials {
                    policy.add(&node, denial);
                }
            }
        }
        Self { policies: policies.into_values().collect(), silent }
    }

    /// Whether every node answered, and nothing would have been denied.
    pub(super) fn is_clean(&self) -> bool {
        self.silent.is_empty() && self.policies.iter().all(|policy| policy.connections == 0)
    }

    pub(super) fn show(&self) -> String {
        let mut parts = Vec::new();
        if self.policies.is_empty() {
            parts.push("no policy that selects a pod is only audited".to_owned());
        } else {
            parts.push(self.table());
        }
        parts.extend(self.silent.iter().map(|(node, why)| format!("{node} is not counted: {why}")));
        parts.join("\n\n")
    }

    fn table(&self) -> String {
        let mut table = Table::new();
        table.load_style(NOTHING);
        table.set_header(["POLICY", "DIRECTION", "RULE", "WOULD HAVE DENIED", "LAST", "NODES", "SINCE"]);
        for policy in &self.policies {
            let Audited { policy: name, since, nodes, denials, .. } = policy;
            if denials.is_empty() {
                let none = ["", "", "nothing", ""].map(str::to_owned);
                let [direction, rule, count, last] = none;
                table.add_row([name.clone(), direction, rule, count, last, joined(nodes), since.clone()]);
            }
            for Denial { direction, rule, connections, last, nodes } in denials {
                let count = connections.to_string();
                table.add_row([name, direction, rule, &count, last, &joined(nodes), since].map(String::clone));
            }
        }
        table.to_string()
    }
}

impl Audited {
    fn add(&mut self, node: &str, denial: AuditedDenial) {
        let same = |known: &&mut Denial| known.direction == denial.direction && known.rule == denial.rule;
        let known = match self.denials.iter_mut().find(same) {
            Some(known) => known,
            None => {
                let AuditedDenial { direction, rule, .. } = &denial;
                let (direction, rule) = (direction.clone(), rule.clone());
                self.denials.push(Denial { direction, rule, ..Denial::default() });
                let Some(new) = self.denials.last_mut() else { return };
                new
            }
        };
        known.connections = known.connections.saturating_add(denial.connections);
        known.last = std::mem::take(&mut known.last).max(denial.last);
        known.nodes.insert(node.to_owned());
    }
}

fn joined(nodes: &BTreeSet<String>) -> String {
    nodes.iter().map(String::as_str).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use towpath_wire::status::{AgentStatus, AuditedPolicy};

    use super::*;

    fn says(policy: &str, since: &str, denials: &[(&str, u64, &str)]) -> AuditedPolicy {
        let denial = |(rule, connections, last): &(&str, u64, &str)| AuditedDenial {
            direction: "Ingress".to_owned(),
            rule: (*rule).to_owned(),
            connections: *connections,
            last: (*last).to_owned(),
        };
        AuditedPolicy {
            policy: policy.to_owned(),
            since: since.to_owned(),
            connections: denials.iter().map(|(_, n, _)| n).sum(),
            denials: denials.iter().map(denial).collect(),
        }
    }

    fn node(name: &str, audited: Vec<AuditedPolicy>) -> NodeAnswer {
        let status = AgentStatus { audited, ..AgentStatus::default() };
        NodeAnswer { node: name.to_owned(), status: Some(status), error: None }
    }

    #[test]
    fn nodes_are_added_up_by_policy_and_rule() {
        let none = "no rule allows it";
        let answers = vec![
            node("n1", vec![says("NetworkPolicy a/p", "2026-01-01T00:00:00Z", &[(none, 2, "2026-01-05T00:00:00Z")])]),
            node(
                "n2",
                vec![
                    says(
                        "NetworkPolicy a/p",
                        "2026-01-02T00:00:00Z",
                        &[(none, 3, "2026-01-04T00:00:00Z"), ("x", 1, "")],
                    ),
                    says("NetworkPolicy a/q", "2026-01-02T00:00:00Z", &[]),
                ],
            ),
            NodeAnswer { node: "n3".to_owned(), status: None, error: Some("no agent".to_owned()) },
        ];
        let audits = Audits::of(answers);
        let [p, q] = audits.policies.as_slice() else { panic!("{audits:?}") };
        assert_eq!((p.connections, p.since.as_str(), p.nodes.len()), (6, "2026-01-02T00:00:00Z", 2));
        let [first, second] = p.denials.as_slice() else { panic!("{p:?}") };
        assert_eq!((first.connections, first.last.as_str(), first.nodes.len()), (5, "2026-01-05T00:00:00Z", 2));
        assert_eq!((second.connections, joined(&second.nodes).as_str()), (1, "n2"));
        assert_eq!((q.connections, q.denials.len()), (0, 0));
        let text = audits.show();
        assert!(
            text.contains("n1, n2") && text.contains("nothing") && text.contains("n3 is not counted: no agent"),
            "{text}"
        );
        assert!(!audits.is_clean());
        assert!(
            !Audits { policies: Vec::new(), ..audits.clone() }.is_clean(),
            "a node that says nothing may count something"
        );
        assert!(Audits { policies: vec![q.clone()], silent: BTreeMap::new() }.is_clean());
    }
}
