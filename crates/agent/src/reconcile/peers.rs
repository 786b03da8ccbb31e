//! The other nodes: who they are, how they are reached, and whether this one is still where it was.

use std::collections::BTreeSet;
use std::time::Instant;

use towpath_model::NodeName;
use towpath_plan::peers;
use tracing::{debug, warn};

use super::{AUDIT_SOON, Reconciler};
use crate::read;
use crate::settings::OwnNode;

impl Reconciler {
    /// Whether this node's own addresses or ranges are no longer those that the data path was opened with.
    pub(super) fn own_node_moved(&self) -> bool {
        let index = read(&self.index);
        let now = index.world().nodes.get(&self.node).and_then(|node| OwnNode::of(node, &self.parsed).ok());
        now.is_some_and(|now| now != self.own)
    }

    /// Notes which nodes this network has taken over; whether they are others than before.
    pub(super) fn nodes_taken_over(&mut self) -> bool {
        let mut now: BTreeSet<NodeName> = read(&self.index).given().keys().cloned().collect();
        now.insert(self.node.clone());
        let changed = now != self.tunnels.taken_over;
        self.tunnels.taken_over = now;
        changed
    }

    pub(super) async fn apply_peers(&mut self) -> Result<(), String> {
        self.nodes_taken_over();
        let planned = peers::plan(read(&self.index).world(), &self.node, &self.peers, &self.tunnels);
        self.peers.clone_from(&planned.peers);
        self.with_report(|report| {
            report.refused = planned.refused.into_iter().map(|(node, why)| (node.to_string(), why)).collect();
            report.peers.clone_from(&planned.peers);
        });
        let applied = self.datapath.apply_peers(planned.peers).await.map_err(|e| e.to_string())?;
        for change in &applied.changes {
            debug!(change, "peers");
        }
        // One node that cannot be reached must hold up neither this one's readiness nor its policies: the full check, which
        // comes early then, tries again.
        if !applied.problems.is_empty() {
            self.audit_at = self.audit_at.min(Instant::now() + AUDIT_SOON);
        }
        for problem in applied.problems {
            warn!(problem, "a peer cannot be reached as it should; trying again");
        }
        Ok(())
    }
}
