//! Packets by way of user space (`udp`): when the device for them is made and taken away, and whether anybody carries them.

use std::net::IpAddr;
use std::time::{Duration, Instant};

use anyhow::Result;
use tokio::sync::watch;
use tokio::time::timeout;
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;
use towpath_model::custom::BackendName;
use towpath_wire::config::AgentConfig;
use towpath_wire::udp::UdpWork;
use tracing::error;

use super::Reconciler;
use super::peers::QUIET;
use crate::udp::{self, Carried};

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
    carried: watch::Receiver<Carried>,
    /// Whether anybody carried when the ways were looked at.
    seen: bool,
    _keeping: AbortOnDropHandle<()>,
}

impl Way {
    /// With what an earlier run left, which is taken away when nobody has sent that way for a while.
    pub(super) async fn start(config: &AgentConfig, datapath: &Datapath) -> Result<Self> {
        let (work, wanted) = watch::channel(None);
        let (told, carried) = watch::channel(Carried::default());
        let keeping = udp::keep(config.carry_udp_socket(), datapath.clone(), wanted, told);
        let left = Some(datapath.facts().await?.udp_ifindex).filter(|index| *index > 0);
        Ok(Self {
            port: config.udp_port,
            own: config.backend == BackendName::Udp,
            until: left.map(|_| Instant::now() + QUIET),
            wanted: left.is_some(),
            device: left,
            problem: None,
            work,
            carried,
            seen: false,
            _keeping: AbortOnDropHandle::new(tokio::spawn(keeping)),
        })
    }

    pub(super) fn carried(&self) -> watch::Receiver<Carried> {
        self.carried.clone()
    }

    pub(super) fn is_carried(&self) -> bool {
        self.device.is_some() && self.carried.borrow().is_yes()
    }

    /// Why packets cannot be carried on this node, if that is this node's backend.
    pub(super) fn problem(&self) -> Option<String> {
        self.problem
            .as_ref()
            .filter(|_| self.own)
            .map(|(why, _)| format!("the backend udp cannot be used on this node: {why}"))
    }

    /// Waits until whether anybody carries is another matter than when the ways were looked at.
    pub(super) async fn changed(&mut self) {
        let before = self.seen;
        match self.carried.wait_for(|now| now.is_yes() != before).await.map(|now| now.is_yes()) {
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
        self.seen = self.carried.borrow().is_yes();
        let wanted = self.until.is_some_and(|until| now < until);
        std::mem::replace(&mut self.wanted, wanted) != wanted
    }

    /// Whether nobody has sent so for a while, or what did not work may be tried again.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        let again = self.problem.as_ref().is_some_and(|(_, at)| *at <= now);
        self.wanted && (again || self.until.is_none_or(|until| until <= now))
    }

    /// Makes the device if it is to be there, and has packets carried; whether that has just begun. A node that cannot is one that takes
    /// envelopes, and tries again.
    pub(super) async fn make(&mut self, datapath: &Datapath, work: Option<UdpWork>) -> bool {
        if !self.wanted {
            return false;
        }
        let made = datapath.take_udp(true).await;
        let no_address = || "its tunnels run over IPv6".to_owned();
        let problem = made.as_ref().map_or_else(|error| Some(error.to_string()), |d| d.is_none().then(no_address));
        if problem != self.problem.take().map(|(why, _)| why)
            && let Some(why) = &problem
        {
            error!(why, "packets cannot go by way of user space (udp) on this node");
        }
        self.problem = problem.map(|why| (why, Instant::now() + AGAIN));
        self.device = made.ok().flatten();
        let work = self.device.zip(work).map(|(device, work)| UdpWork { device, port: self.port, ..work });
        self.work.send_if_modified(|now| std::mem::replace(now, work.clone()) != work) && self.device.is_some()
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
    /// What is to be carried for this node, but for the device and the port; none: it has no IPv4 address.
    pub(super) fn own_udp_work(&self) -> Option<UdpWork> {
        let v4 = |address: &IpAddr| if let IpAddr::V4(v4) = address { Some(*v4) } else { None };
        let address = self.own.addresses.iter().find_map(v4)?;
        Some(UdpWork { device: 0, address, port: 0, network: self.tunnels.vni, queues: udp::queues() })
    }
}
