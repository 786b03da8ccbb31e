//! The backend `udp`: packets between nodes in UDP datagrams that are made and taken apart here, for networks that pass nothing else.
//!
//! ```text
//! pods ─► kernel's programs ─► device ─► split ─► datagrams (UDP_SEGMENT) ─► other nodes
//! pods ◄─ kernel's programs ◄─ device ◄─ join  ◄─ datagrams (UDP_GRO)     ◄─ other nodes
//! ```
//!
//! The agent opens the ends and gives them away ([`desk`]); they and two threads for each queue go on while no agent is there. What may be sent to
//! whom, and who may have sent what, the kernel's programs say, as for every other backend: a frame names the node at its other end, and here
//! nothing else is looked at than what is needed to cut and to join ([`split`], [`join`], both pure).

mod bytes;
pub mod client;
pub(crate) mod desk;
mod frame;
mod join;
mod nodes;
mod queue;
mod split;
#[cfg(test)]
mod tests;

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use towpath_wire::udp::{MAX_QUEUES, UdpCounters, UdpWork};

pub(crate) use nodes::Nodes;
use queue::{Lane, Stop};

/// The ends between which packets are carried, as many of each kind.
#[derive(Debug)]
pub(crate) struct Ends {
    queues: Vec<OwnedFd>,
    receivers: Vec<OwnedFd>,
    senders: Vec<OwnedFd>,
    /// Whether the device takes UDP that is to be cut.
    pub(crate) cuts_udp: bool,
}

impl Ends {
    /// First the queues, then the receivers, then the senders; none: they are not three times as many.
    pub(crate) fn of(mut all: Vec<OwnedFd>, cuts_udp: bool) -> Option<Self> {
        let count = all.len() / 3;
        if count == 0 || count > MAX_QUEUES || all.len() != 3 * count {
            return None;
        }
        let senders = all.split_off(2 * count);
        let receivers = all.split_off(count);
        Some(Self { queues: all, receivers, senders, cuts_udp })
    }

    pub(crate) fn into_descriptors(self) -> Vec<OwnedFd> {
        self.queues.into_iter().chain(self.receivers).chain(self.senders).collect()
    }

    fn try_clone(&self) -> io::Result<Self> {
        let clones = |all: &[OwnedFd]| all.iter().map(OwnedFd::try_clone).collect::<io::Result<Vec<_>>>();
        let (queues, receivers) = (clones(&self.queues)?, clones(&self.receivers)?);
        Ok(Self { queues, receivers, senders: clones(&self.senders)?, cuts_udp: self.cuts_udp })
    }
}

/// What is counted; see [`UdpCounters`].
#[derive(Debug, Default)]
struct Counts {
    sent: AtomicU64,
    received: AtomicU64,
    unsent: AtomicU64,
    send_failed: AtomicU64,
    malformed: AtomicU64,
    other_network: AtomicU64,
    congested: AtomicU64,
    refused: AtomicU64,
}

impl Counts {
    fn read(&self) -> UdpCounters {
        let of = |count: &AtomicU64| count.load(Ordering::Relaxed);
        UdpCounters {
            sent: of(&self.sent),
            received: of(&self.received),
            unsent: of(&self.unsent),
            send_failed: of(&self.send_failed),
            malformed: of(&self.malformed),
            other_network: of(&self.other_network),
            congested: of(&self.congested),
            refused: of(&self.refused),
        }
    }
}

/// What is carried between what, as one process gives it to the next.
#[derive(Debug)]
pub(crate) struct Share {
    pub(crate) work: UdpWork,
    /// The nodes at IPv6 addresses that are known.
    pub(crate) nodes: Vec<Ipv6Addr>,
    pub(crate) ends: Ends,
}

/// Packets being carried.
#[derive(Debug)]
struct Carrying {
    work: UdpWork,
    ends: Ends,
    /// A thread ended: the device is gone, say.
    broken: Arc<AtomicBool>,
    /// Ends the threads by its end.
    _stop: Stop,
}

/// Carries packets between the ends that it was given last.
#[derive(Debug, Default)]
pub(crate) struct Carrier {
    carrying: Mutex<Option<Carrying>>,
    nodes: Nodes,
    counts: Arc<Counts>,
}

impl Carrier {
    fn carrying(&self) -> MutexGuard<'_, Option<Carrying>> {
        self.carrying.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was counted, if just this is being carried.
    pub(crate) fn carries(&self, work: &UdpWork) -> Option<UdpCounters> {
        let carrying = self.carrying();
        let same = carrying.as_ref().is_some_and(|now| now.work == *work && !now.broken.load(Ordering::Relaxed));
        same.then(|| self.counts.read())
    }

    /// The nodes at IPv6 addresses, from now on; what is being carried goes on, and goes by them at once.
    pub(crate) fn know(&self, nodes: Vec<Ipv6Addr>) {
        self.nodes.replace(nodes);
    }

    /// Carries between these, and no longer between others. Both do for a moment, which is no harm: each packet is read once.
    pub(crate) fn start(&self, work: UdpWork, ends: Ends) -> io::Result<()> {
        let (stop, stopped) = Stop::new()?;
        let broken = Arc::<AtomicBool>::default();
        let clones = ends.try_clone()?;
        let cuts_udp = clones.cuts_udp;
        for ((queue, receiver), sender) in clones.queues.into_iter().zip(clones.receivers).zip(clones.senders) {
            let (work, nodes, counts) = (work.clone(), self.nodes.clone(), Arc::clone(&self.counts));
            let lane = Lane { queue, receiver, sender, work, nodes, cuts_udp, counts, stopped: stopped.try_clone()? };
            lane.start(&broken)?;
        }
        tracing::info!(queues = ends.queues.len(), port = work.port, "carrying packets between nodes (udp)");
        *self.carrying() = Some(Carrying { work, ends, broken, _stop: stop });
        Ok(())
    }

    /// As [`Carrier::start`], of what another process carried.
    pub(crate) fn take(&self, Share { work, nodes, ends }: Share) {
        self.know(nodes);
        if let Err(error) = self.start(work, ends) {
            tracing::warn!(%error, "packets between nodes (udp) wait for the agent");
        }
    }

    /// What is carried, for another process.
    pub(crate) fn share(&self) -> Option<Share> {
        let carrying = self.carrying();
        let now = carrying.as_ref().filter(|now| !now.broken.load(Ordering::Relaxed))?;
        Some(Share { work: now.work.clone(), nodes: self.nodes.known().list(), ends: now.ends.try_clone().ok()? })
    }

    /// Carries nothing any more; what was read is still written.
    pub(crate) fn stop(&self) {
        self.carrying().take();
    }
}
