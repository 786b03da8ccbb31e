//! Packets by way of user space (`udp`): when the device for them is made and taken away, and whether anybody carries them.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;
use towpath_model::custom::BackendName;
use towpath_model::desired::NodePeer;
use towpath_wire::config::AgentConfig;
use towpath_wire::udp::UdpWork;
use tracing::error;

use super::Reconciler;
use super::peers::QUIET;
use crate::udp::{self, Carried, Nodes};

/// How long the first plan waits to hear whether anybody carries.
const SETTLE: Duration = Duration::from_secs(1);
/// What did not work is tried again.
const AGAIN: Duration = Duration::from_secs(10);

/// The way by user space.
pub(super) struct Way {
    port: u16,
    /// Whether it is this node's backend.
    own: bool,
    /// Packets are taken so until then.
    until: Option<Instant>,
    /// Whether they are to be taken.
    wanted: bool,
    /// Index of the device, if it is there.
    device: Option<u32>,
    /// Why it is not there though it is to be, and when that is looked at again.
    problem: Option<(String, Instant)>,
    work: watch::Sender<Option<UdpWork>>,
    /// The nodes at IPv6 addresses that carry is to know.
    nodes: watch::Sender<Nodes>,
    carried: watch::Receiver<Carried>,
    /// To which nodes at IPv6 addresses packets were carried when the ways were looked at; none: nobody carried.
    seen: Option<Nodes>,
    _keeping: AbortOnDropHandle<()>,
}

impl Way {
    /// With what an earlier run left, which is taken away when nobody has sent that way for a while.
    pub(super) async fn start(config: &AgentConfig, datapath: &Datapath) -> Result<Self> {
        let (work, wanted) = watch::channel(None);
        let (nodes, to_know) = watch::channel(Nodes::default());
        let (told, carried) = watch::channel(Carried::default());
        let keeping = udp::keep(config.carry_udp_socket(), datapath.clone(), wanted, to_know, told);
        let left = Some(datapath.facts().await?.udp_ifindex).filter(|index| *index > 0);
        Ok(Self {
            port: config.udp_port,
            own: config.backend == BackendName::Udp,
            until: left.map(|_| Instant::now() + QUIET),
            wanted: left.is_some(),
            device: left,
            problem: None,
            work,
            nodes,
            carried,
            seen: None,
            _keeping: AbortOnDropHandle::new(tokio::spawn(keeping)),
        })
    }

    pub(super) fn carried(&self) -> watch::Receiver<Carried> {
        self.carried.clone()
    }

    pub(super) fn is_carried(&self) -> bool {
        self.device.is_some() && self.carried.borrow().is_yes()
    }

    /// The nodes at IPv6 addresses to which packets are carried.
    pub(super) fn known(&self) -> Nodes {
        self.carried.borrow().nodes().unwrap_or_default()
    }

    /// Has carry know these. To be said when nothing leads any more to a node that is not among them.
    pub(super) fn know(&self, nodes: BTreeSet<Ipv6Addr>) {
        self.nodes.send_if_modified(|now| {
            let another = **now != nodes;
            *now = Arc::new(nodes);
            another
        });
    }

    /// Why packets cannot be carried on this node, if that is this node's backend.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem
            .as_ref()
            .filter(|_| self.own)
            .map(|(why, _)| format!("the backend udp cannot be used on this node: {why}"))
    }

    /// Waits until whether anybody carries, and to whom, is another matter than when the ways were looked at.
    pub(super) async fn changed(&mut self) {
        let before = self.seen.clone();
        match self.carried.wait_for(|now| now.nodes() != before).await.map(|now| now.nodes()) {
            Ok(now) => self.seen = now,
            // The task ends with this value.
            Err(_) => std::future::pending().await,
        }
    }

    /// Whether packets are to be taken so from now on, or no longer, unlike before.
    pub(super) fn follow(&mut self, some_send: bool, now: Instant) -> bool {
        if some_send {
            self.until = Some(now + QUIET);
        }
        self.seen = self.carried.borrow().nodes();
        let wanted = self.until.is_some_and(|until| now < until);
        std::mem::replace(&mut self.wanted, wanted) != wanted
    }

    /// Whether nobody has sent so for a while, or what did not work may be tried again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let again = self.problem.as_ref().is_some_and(|(_, at)| *at <= now);
        self.wanted && (again || self.until.is_none_or(|until| until <= now))
    }

    /// Makes the device if it is to be there, and has packets carried, at first to these nodes; whether that has just begun. A node that cannot is one
    /// that takes envelopes, and tries again.
    pub(super) async fn make(
        &mut self,
        datapath: &Datapath,
        work: Option<UdpWork>,
        nodes: impl FnOnce() -> BTreeSet<Ipv6Addr>,
    ) -> bool {
        if !self.wanted {
            return false;
        }
        let made = datapath.take_udp(true).await;
        let problem = made.as_ref().err().map(ToString::to_string);
        if problem != self.problem.take().map(|(why, _)| why)
            && let Some(why) = &problem
        {
            error!(why, "packets cannot go by way of user space (udp) on this node");
        }
        self.problem = problem.map(|why| (why, Instant::now() + AGAIN));
        self.device = made.ok().flatten();
        let work = self.device.zip(work).map(|(device, work)| UdpWork { device, port: self.port, ..work });
        if *self.work.borrow() == work {
            return false;
        }
        self.know(nodes());
        self.work.send_replace(work);
        self.device.is_some()
    }

    /// Waits a moment until it is known whether anybody carries.
    pub(super) async fn settle(&mut self) {
        let known = self.carried.wait_for(|now| *now != Carried::Unknown);
        let _ = timeout(SETTLE, known).await;
    }

    /// Takes the device away if it is not to be there.
    pub(super) async fn unmake(&mut self, datapath: &Datapath) -> Result<(), String> {
        if self.wanted {
            return Ok(());
        }
        self.problem = None;
        self.work.send_if_modified(|now| now.take().is_some());
        self.device = datapath.take_udp(false).await.map_err(|error| error.to_string())?;
        Ok(())
    }
}

impl Reconciler {
    /// What is to be carried for this node, but for the device and the port; none: it is no node yet.
    pub(super) fn own_udp_work(&self, peers: &[NodePeer]) -> Option<UdpWork> {
        let address = peers.iter().find(|peer| peer.local)?.tunnel;
        Some(UdpWork { device: 0, address, port: 0, network: self.tunnels.vni, queues: udp::queues() })
    }
}
