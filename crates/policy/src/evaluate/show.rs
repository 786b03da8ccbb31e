//! A decision in words.

use std::fmt;

use towpath_model::Direction;
use towpath_model::desired::Verdict;

use super::{Decision, Mismatch, Reason, Side};

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Mismatch::Port { wanted, found } => write!(f, "it wants port {wanted}, this is {found}"),
            Mismatch::Protocol { wanted, found: Some(found) } => write!(f, "it wants {wanted}, this is {found}"),
            Mismatch::Protocol { wanted, found: None } => {
                write!(f, "it wants {wanted}, this is a protocol without ports")
            }
            Mismatch::Peer { wanted } => write!(f, "it wants {wanted}"),
        }
    }
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.direction {
            Direction::Ingress => "ingress",
            Direction::Egress => "egress",
        };
        let verdict = match self.verdict {
            Verdict::Allow => "allowed",
            Verdict::Deny => "denied",
        };
        write!(f, "{direction} of pod {}: {verdict}: ", self.pod)?;
        match &self.reason {
            Reason::Itself => f.write_str("a pod always reaches itself"),
            Reason::OwnNode if self.direction == Direction::Ingress => f.write_str("its own node always reaches it"),
            Reason::OwnNode => f.write_str("a pod whose labels are not known yet may reach its own node"),
            Reason::Unknown => f.write_str("its labels are not known yet, so only its own node is in reach"),
            Reason::NotIsolated => f.write_str("no NetworkPolicy isolates it"),
            Reason::Rule { rule } => write!(f, "{rule}"),
            Reason::DefaultDeny { isolating, nearest } => {
                let names: Vec<String> = isolating.iter().map(ToString::to_string).collect();
                write!(f, "isolated by NetworkPolicy {}; ", names.join(", "))?;
                match nearest {
                    None => f.write_str("no rule allows anything"),
                    Some(nearest) => {
                        write!(f, "nearest rule {}: ", nearest.rule)?;
                        for (index, mismatch) in nearest.mismatches.iter().enumerate() {
                            let separator = if index == 0 { "" } else { "; " };
                            write!(f, "{separator}{mismatch}")?;
                        }
                        Ok(())
                    }
                }
            }
        }?;
        self.passed.iter().try_for_each(|rule| write!(f, "; passed on by {rule}"))
    }
}

impl fmt::Display for Decision {
    /// A line for each end that is a pod.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.egress.is_none() && self.ingress.is_none() {
            return f.write_str("allowed: neither end is a pod");
        }
        let mut separator = "";
        for side in [&self.egress, &self.ingress].into_iter().flatten() {
            write!(f, "{separator}{side}")?;
            separator = "\n";
        }
        Ok(())
    }
}
