//! The other nodes: who they are, how they are reached, and whether this one is still where it was.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towpath_datapath::udp_names;
use towpath_model::NodeName;
use towpath_plan::backend::{self, Able, Says};
use towpath_plan::peers::{self, Peers};
use tracing::{debug, warn};

use super::{AUDIT_SOON, Reconciler};
use crate::read;
use crate::settings::{Here, OwnNode};

/// Packets of a backend are taken for so long after the last node stopped to send them.
pub(super) const QUIET: Duration = Duration::from_secs(30);

impl Reconciler {
    /// Whether this node's own addresses or ranges are no longer those that the data path was opened with.
    pub(super) fn own_node_moved(&mut self) -> bool {
        let now = {
            let index = read(&self.index);
            let Some(node) = index.world().nodes.get(&self.node) else { return false };
            // First, so that nobody is given an address of what nobody asks for any more while it is seen who has one.
            let left = self.own.added.iter().filter(|range| !node.added.wanted.contains(range));
            self.leases.close(&left.copied().collect::<Vec<_>>());
            let still = |range: &IpNet| self.leases.has_of(range);
            OwnNode::of(node, &self.parsed, &Here { addresses: &self.own_addresses, still: &still })
        };
        let Ok(now) = now else { return false };
        // What is refused is only said: no reason to start anew.
        self.own.refused.clone_from(&now.refused);
        if now == self.own {
            return false;
        }
        // The next start knows by it what is in use.
        if let Err(error) = now.store(&self.own_file) {
            debug!("{error:#}");
            return false;
        }
        true
    }

    /// Whether a range that nobody asks for any more is no pod's any more either.
    pub(super) fn range_is_left(&self) -> bool {
        self.own.closed.iter().any(|range| !self.leases.has_of(range))
    }

    /// Notes which nodes this network has taken over; whether they are others than before.
    pub(super) fn nodes_taken_over(&mut self) -> bool {
        let mut now: BTreeSet<NodeName> = read(&self.index).given().keys().cloned().collect();
        now.insert(self.node.clone());
        let changed = now != self.tunnels.taken_over;
        self.tunnels.taken_over = now;
        changed
    }

    /// Notes which way packets go to and come from other nodes; whether that is another than before.
    pub(super) fn ways_changed(&mut self) -> bool {
        let index = read(&self.index);
        let others: BTreeMap<NodeName, Says> = index
            .backends()
            .iter()
            .filter(|(node, _)| **node != self.node)
            .map(|(node, says)| (node.clone(), says.clone()))
            .collect();
        self.kept.keep(index.backends());
        drop(index);
        self.due_ways = false;
        let able = self.able();
        let instead = backend::instead(self.backend, able, &others);
        let now = Instant::now();
        let took_udp = self.udp.follow(backend::takes_udp(self.backend, &others), now);
        if backend::takes_plain(self.backend, &others) {
            self.plain_until = Some(now + QUIET);
        }
        if backend::takes_on_link(self.backend, able, &others) {
            self.on_link_until = Some(now + QUIET);
        }
        let plain = self.plain_until.is_some_and(|until| now < until);
        let on_link = self.on_link_until.is_some_and(|until| now < until);
        let (udp_known, tunnels) = (self.udp.known(), &mut self.tunnels);
        let changed = instead != tunnels.instead
            || udp_known != tunnels.udp_known
            || (plain, on_link) != (tunnels.plain, tunnels.on_link)
            || took_udp;
        (tunnels.instead, tunnels.udp_known) = (instead, udp_known);
        (tunnels.plain, tunnels.on_link) = (plain, on_link);
        changed
    }

    /// What this node is able to do for some backends.
    pub(super) fn able(&self) -> Able {
        Able { ipip: true, udp: self.udp.is_carried(), macs: self.bears_macs }
    }

    /// Whether packets of other nodes are taken as they are, or by way of user space, and nobody has sent any for a while; or whether the latter
    /// became possible or impossible.
    pub(super) fn ways_are_due(&self) -> bool {
        let now = Instant::now();
        let plain = self.tunnels.plain && self.plain_until.is_none_or(|until| until <= now);
        let on_link = self.tunnels.on_link && self.on_link_until.is_none_or(|until| until <= now);
        self.due_ways || plain || on_link || self.udp.is_due(now)
    }

    fn planned(&self) -> Peers {
        peers::plan(read(&self.index).world(), &self.node, &self.peers, &self.tunnels)
    }

    pub(super) async fn apply_peers(&mut self) -> Result<(), String> {
        self.nodes_taken_over();
        self.ways_changed();
        let mut planned = self.planned();
        let work = self.own_udp_work(&planned.peers);
        if self.udp.make(&self.datapath, work, || udp_names::others(&planned.peers)).await {
            // Whoever carried for an earlier run says so at once: no way is left only to be taken again.
            self.udp.settle().await;
            self.ways_changed();
            planned = self.planned();
        }
        let udp_nodes = udp_names::others(&planned.peers);
        if !self.tunnels.udp_known.is_subset(&udp_nodes) {
            // One of them goes by what another has from now on: nothing may lead to it before whoever carries is told.
            self.tunnels.udp_known = Arc::new(self.tunnels.udp_known.intersection(&udp_nodes).copied().collect());
            planned = self.planned();
        }
        self.peers.clone_from(&planned.peers);
        let (backend, no_udp) = (self.backend, self.udp.problem());
        let mut refused = planned.refused;
        for (node, why) in read(&self.index).refused_ranges() {
            refused.entry(node.clone()).or_default().extend(why.iter().cloned());
        }
        if !self.own.refused.is_empty() {
            refused.entry(self.node.clone()).or_default().extend(self.own.refused.iter().cloned());
        }
        self.with_report(|report| {
            report.refused = refused.into_iter().map(|(node, why)| (node.to_string(), why)).collect();
            report.peers.clone_from(&planned.peers);
            report.backend = backend;
            report.no_udp = no_udp;
        });
        self.lower_mtu(&planned.peers).await;
        let applied = self.datapath.apply_peers(planned.peers).await.map_err(|e| e.to_string())?;
        // Nothing leads there any more. To those that are new packets go that way when whoever carries them says that it knows them.
        self.udp.know(udp_nodes);
        self.udp.unmake(&self.datapath).await?;
        self.follow_mtu().await;
        self.teller.due = true;
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
