//! How far this node is with the backend that is wanted, as its `NodeNetwork` tells it.
//!
//! It is told when it is another, but not at every step of every node: in a large cluster, whose nodes all change at once, that would be as many writes as
//! there are pairs of nodes.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use towpath_datapath::{NodeStatus, udp_names};
use towpath_model::NodeName;
use towpath_model::custom::BackendName;
use towpath_model::desired::{NodePeer, Reach};
use towpath_plan::backend::{self, Behind, Way};

use super::Reconciler;
use crate::read;

/// At least so long between two that are told, for every so many nodes.
const PACE: (Duration, usize) = (Duration::from_secs(1), 50);

/// What is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// The backend that this node sends by, to whoever takes it.
    pub backend: BackendName,
    /// Other nodes.
    pub peers: usize,
    /// Those among them that are reached by another.
    pub behind: Vec<Behind>,
    /// MTU of new pods, in bytes.
    pub pod_mtu: u32,
    /// Pods will have more if everything stays as it is for a while.
    pub mtu_waits: bool,
}

/// How each of these nodes is reached.
pub(crate) fn ways<'a>(peers: &[NodePeer], status: &'a NodeStatus) -> Vec<Way<'a>> {
    let named = udp_names::others(peers);
    let same_name = |tunnel: IpAddr| matches!(tunnel, IpAddr::V6(v6) if !named.contains(&v6));
    let known: BTreeMap<&NodeName, bool> = peers.iter().map(|peer| (&peer.name, same_name(peer.tunnel))).collect();
    let way = |(node, reach): (&'a NodeName, &Reach)| {
        let same_name = *known.get(node)?;
        Some(Way { node, reach: *reach, same_name, beyond: status.beyond.contains(node) })
    };
    status.reached.iter().filter_map(way).collect()
}

/// Who tells it, and when it did so last.
#[derive(Debug)]
pub(super) struct Teller {
    told: watch::Sender<Option<Progress>>,
    at: Option<Instant>,
    /// Something may be another.
    pub(super) due: bool,
}

impl Default for Teller {
    fn default() -> Self {
        Self { told: watch::Sender::new(None), at: None, due: true }
    }
}

impl Teller {
    pub(super) fn subscribe(&self) -> watch::Receiver<Option<Progress>> {
        self.told.subscribe()
    }

    fn rests(&self, peers: usize) -> bool {
        let (pace, nodes) = PACE;
        let least = pace.saturating_mul(u32::try_from(peers / nodes).unwrap_or(u32::MAX).max(1));
        self.at.is_some_and(|at| at.elapsed() < least)
    }
}

impl Reconciler {
    /// Tells how far it is, if that may be another and was not told just now.
    pub(super) async fn tell_progress(&mut self) {
        if !self.teller.due || self.teller.rests(self.peers.len()) {
            return;
        }
        let Ok(status) = self.datapath.status().await else { return };
        // Before the first peers nothing is known.
        if self.peers.is_empty() {
            return;
        }
        let ways = ways(&self.peers, &status);
        let behind = backend::behind(self.backend, self.able(), ways, read(&self.index).backends());
        let now = Progress {
            backend: self.backend,
            peers: status.reached.len(),
            behind,
            pod_mtu: status.facts.pod_mtu,
            mtu_waits: self.pod_mtu.next().is_some(),
        };
        self.teller.due = false;
        let another = self.teller.told.send_if_modified(|told| {
            let another = told.as_ref() != Some(&now);
            *told = Some(now);
            another
        });
        if another {
            self.teller.at = Some(Instant::now());
        }
    }
}
