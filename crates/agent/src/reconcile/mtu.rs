//! The MTU of this node's pods, as the ways to other nodes change ([`towpath_plan::pod_mtu`]).

use std::time::Instant;

use towpath_datapath::{NodeFacts, PodMtu};
use towpath_model::custom::BackendName;
use towpath_model::desired::{NodePeer, Reach};
use towpath_plan::pod_mtu::{Carried, Change};
use tracing::{info, warn};

use super::Reconciler;

impl Reconciler {
    fn carries(&self, facts: &NodeFacts) -> Carried {
        Carried { plain: facts.uplink_mtu, envelope: facts.tunnel_mtu, fixed: self.pod_mtu_said }
    }

    fn wanted_way(&self) -> Reach {
        match self.backend {
            BackendName::HostGw => Reach::Route,
            BackendName::Macvlan => Reach::Link,
            BackendName::Ipip => Reach::Ipip,
            _ => Reach::Tunnel,
        }
    }

    /// Before packets go to other nodes as planned: pods send nothing that would not fit. One that could not be lowered holds up nothing: it is told
    /// by the kernel what is too big.
    pub(super) async fn lower_mtu(&mut self, planned: &[NodePeer]) {
        let Ok(facts) = self.datapath.facts().await else { return };
        let ways = planned.iter().filter(|peer| !peer.local).map(|peer| peer.reach);
        let fits = self.carries(&facts).by_all(ways, self.wanted_way());
        if let Some(change) = self.pod_mtu.before(fits) {
            self.change_mtu(change).await;
        }
    }

    /// When packets go as they go now, and every now and then: pods may send what fits.
    pub(super) async fn follow_mtu(&mut self) {
        let Ok(status) = self.datapath.status().await else { return };
        let fits = self.carries(&status.facts).by_all(status.reached.values().copied(), self.wanted_way());
        let widest = match self.pod_mtu.is_unknown() {
            true => self.datapath.widest_pod().await.ok().flatten(),
            false => None,
        };
        let waited = self.pod_mtu.next().is_some();
        if let Some(change) = self.pod_mtu.after(fits, self.pod_mtu_said.is_some(), widest, self.now()) {
            self.change_mtu(change).await;
        }
        self.teller.due |= waited != self.pod_mtu.next().is_some();
    }

    /// Whether pods may have to be given more although nothing happens.
    pub(super) fn mtu_is_due(&self) -> bool {
        self.pod_mtu.next().is_some_and(|at| at <= self.now())
    }

    /// What could not be done is tried again.
    pub(super) async fn retry_mtu(&mut self) {
        if let Some(change) = self.mtu_failed {
            self.change_mtu(change).await;
        }
    }

    async fn change_mtu(&mut self, change: Change) {
        let begun = Instant::now();
        let wanted = match change {
            Change::AtMost(mtu) => PodMtu::AtMost(mtu),
            Change::Exactly(mtu) => PodMtu::Exactly(mtu),
        };
        let (problems, changed) = match self.datapath.apply_pod_mtu(wanted).await {
            Ok(applied) => (applied.problems, applied.changes.len()),
            Err(error) => (vec![error.to_string()], 0),
        };
        if changed > 0 {
            info!(?change, pods = changed, took = ?begun.elapsed(), "the MTU of pods is another now");
        }
        self.teller.due = true;
        self.mtu_failed = (!problems.is_empty()).then_some(change);
        let known = self.with_report(|report| std::mem::replace(&mut report.mtu_problems, problems.clone()));
        for problem in problems.iter().filter(|problem| !known.contains(problem)) {
            warn!(problem, "trying again");
        }
    }
}
