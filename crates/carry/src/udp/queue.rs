//! One queue of the device with its two threads: one reads frames and sends datagrams, one reads datagrams and writes frames.
//!
//! They block, so they are threads; each takes what is there in as few calls as there can be, and waits only when nothing is.

use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use towpath_datapath::datagrams::{self, Incoming};
use towpath_wire::udp::UdpWork;

use super::join::{Joiner, Refused};
use super::split::{Outbox, Train};
use super::{Counts, Nodes};

/// Reads of 64 KiB in one call.
const READS: usize = 8;

/// Ends threads by being dropped.
#[derive(Debug)]
pub(super) struct Stop(#[allow(dead_code, reason = "held open, and closed")] OwnedFd);

impl Stop {
    /// And what they look at.
    pub(super) fn new() -> io::Result<(Self, OwnedFd)> {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
        Ok((Self(write), read))
    }
}

/// A queue and what goes with it.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) queue: OwnedFd,
    pub(super) receiver: OwnedFd,
    pub(super) sender: OwnedFd,
    pub(super) work: UdpWork,
    pub(super) nodes: Nodes,
    pub(super) cuts_udp: bool,
    pub(super) counts: Arc<Counts>,
    pub(super) stopped: OwnedFd,
}

/// What a thread of a lane does until it ends.
type Way = fn(&Lane) -> io::Result<()>;

impl Lane {
    /// Starts both threads; `broken` is set when one ends by itself.
    pub(super) fn start(self, broken: &Arc<AtomicBool>) -> io::Result<()> {
        let lane = Arc::new(self);
        let ways: [(&str, Way); 2] = [("udp-out", Lane::carry_out), ("udp-in", Lane::carry_in)];
        for (name, way) in ways {
            let (lane, broken) = (Arc::clone(&lane), Arc::clone(broken));
            std::thread::Builder::new().name(name.to_owned()).spawn(move || {
                if let Err(error) = way(&lane) {
                    tracing::warn!(%error, "{name}: packets between nodes are not carried by this queue any more");
                    broken.store(true, Ordering::Relaxed);
                }
            })?;
        }
        Ok(())
    }

    /// Waits until there is something to read; whether the lane goes on.
    fn wait(&self, on: BorrowedFd<'_>) -> io::Result<bool> {
        let mut both = [PollFd::from_borrowed_fd(on, PollFlags::IN), PollFd::new(&self.stopped, PollFlags::IN)];
        match poll(&mut both, None) {
            Ok(_) | Err(Errno::INTR) => Ok(!both[1].revents().contains(PollFlags::HUP)),
            Err(error) => Err(error.into()),
        }
    }

    fn add(&self, count: impl Fn(&Counts) -> &AtomicU64, more: u64) {
        count(&self.counts).fetch_add(more, Ordering::Relaxed);
    }

    /// Frames of the device to other nodes, until it is stopped.
    fn carry_out(&self) -> io::Result<()> {
        let mut outbox = Outbox::new(self.work.network);
        while self.gather(&mut outbox)? {
            let trains = outbox.trains();
            self.send(&trains);
            drop(trains);
            outbox.clear();
        }
        Ok(())
    }

    /// Fills the outbox with what is there, at least one frame; whether the lane goes on.
    fn gather(&self, outbox: &mut Outbox) -> io::Result<bool> {
        loop {
            let Some(room) = outbox.room() else { return Ok(true) };
            match rustix::io::read(&self.queue, room) {
                Ok(length) => {
                    if outbox.take(length).is_err() {
                        self.add(|counts| &counts.unsent, 1);
                    }
                }
                Err(Errno::AGAIN) if !outbox.is_empty() => return Ok(true),
                Err(Errno::AGAIN) => {
                    if !self.wait(self.queue.as_fd())? {
                        return Ok(false);
                    }
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&self, trains: &[Train<'_>]) {
        // Looked at when the frames are there: whoever had them sent knew the nodes before.
        let nodes = self.nodes.known();
        let mut whole: Vec<datagrams::Train<'_>> = Vec::with_capacity(trains.len());
        for train in trains {
            let (Some(node), Ok(segment)) = (nodes.at(train.to), u16::try_from(train.segment)) else {
                self.add(|counts| &counts.unsent, train.pieces.len() as u64 / 2);
                continue;
            };
            let to = SocketAddr::new(node, self.work.port);
            whole.push(datagrams::Train { to, segment, ecn: train.ecn, pieces: &train.pieces });
        }
        let mut rest = whole.as_slice();
        while let Err((gone, _)) = datagrams::send(self.sender.as_fd(), rest) {
            self.add(|counts| &counts.sent, packets(rest.get(..gone).unwrap_or_default()));
            if let Some(failed) = rest.get(gone) {
                self.send_singly(failed);
            }
            rest = rest.get(gone + 1..).unwrap_or_default();
        }
        self.add(|counts| &counts.sent, packets(rest));
    }

    /// A device or a path that takes no train (no checksums by hardware, a smaller MTU) may take its datagrams.
    fn send_singly(&self, train: &datagrams::Train<'_>) {
        for pieces in train.pieces.chunks(2) {
            let bytes: usize = pieces.iter().map(|piece| piece.len()).sum();
            let segment = u16::try_from(bytes).unwrap_or(u16::MAX);
            let single = datagrams::Train { to: train.to, segment, ecn: train.ecn, pieces };
            match datagrams::send(self.sender.as_fd(), &[single]) {
                Ok(()) => self.add(|counts| &counts.sent, 1),
                Err(_) => self.add(|counts| &counts.send_failed, 1),
            }
        }
    }

    /// Datagrams of other nodes to the device, until it is stopped.
    fn carry_in(&self) -> io::Result<()> {
        let mut incoming = Incoming::new(READS);
        loop {
            match incoming.receive(self.receiver.as_fd()) {
                Ok(()) => self.deliver(&incoming)?,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if !self.wait(self.receiver.as_fd())? {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn deliver(&self, incoming: &Incoming) -> io::Result<()> {
        let mut joiner = Joiner::new(self.work.network, self.work.address, self.cuts_udp);
        let mut outcome = Ok(());
        let mut write = |front: &[u8], bodies: &[IoSlice<'_>]| {
            if let Err(error) = self.write(front, bodies) {
                outcome = Err(error);
            }
        };
        let nodes = self.nodes.known();
        let (mut received, mut last) = (0, None::<(IpAddr, bool)>);
        for datagram in incoming.datagrams() {
            let passes = last.filter(|(from, _)| *from == datagram.from).map(|(_, passes)| passes);
            let passes = passes.unwrap_or_else(|| nodes.may_be_from(datagram.from));
            last = Some((datagram.from, passes));
            if !passes {
                self.add(|counts| &counts.malformed, 1);
                continue;
            }
            match joiner.take(datagram, &mut write) {
                Ok(()) => received += 1,
                Err(Refused::Malformed) => self.add(|counts| &counts.malformed, 1),
                Err(Refused::OtherNetwork) => self.add(|counts| &counts.other_network, 1),
                Err(Refused::Congested) => self.add(|counts| &counts.congested, 1),
            }
        }
        joiner.flush(&mut write);
        self.add(|counts| &counts.received, received);
        outcome
    }

    /// Fails only when the device is gone.
    fn write(&self, front: &[u8], bodies: &[IoSlice<'_>]) -> io::Result<()> {
        let pieces: Vec<IoSlice<'_>> = [IoSlice::new(front)].into_iter().chain(bodies.iter().copied()).collect();
        loop {
            match rustix::io::writev(&self.queue, &pieces) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::BADFD) => return Err(Errno::BADFD.into()),
                Err(_) => {
                    self.add(|counts| &counts.refused, 1);
                    return Ok(());
                }
            }
        }
    }
}

fn packets(trains: &[datagrams::Train<'_>]) -> u64 {
    trains.iter().map(|train| train.pieces.len() as u64 / 2).sum()
}
