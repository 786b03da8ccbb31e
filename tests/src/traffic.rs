//! Datagrams between pods that never stop, and what each receiver heard of them: every one says who sent it, over which flow, as which, and when.
//!
//! Sender and receiver read one clock (`CLOCK_MONOTONIC`), so that what is heard can be held against what was in force at that moment.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};

use crate::place::Place;

/// Room for what arrives while the receiver is not scheduled, in bytes.
const ROOM: usize = 8 << 20;
/// Bytes of a datagram that says no more than it has to.
const SIZE: usize = 20;
/// The largest datagram that is read whole, in bytes.
const LARGEST: usize = 9000;
/// How long a receiver waits before it looks whether it is over.
const LOOK: Duration = Duration::from_millis(50);

/// Nanoseconds since the traffic began.
#[derive(Clone, Copy, Debug)]
pub struct Clock(Instant);

impl Default for Clock {
    fn default() -> Self {
        Self(Instant::now())
    }
}

impl Clock {
    /// Now.
    pub fn now(&self) -> u64 {
        u64::try_from(self.0.elapsed().as_nanos()).unwrap_or(u64::MAX)
    }
}

/// What a datagram says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Packet {
    /// Who sent it.
    pub sender: u32,
    /// Over which of its flows.
    pub flow: u32,
    /// As which over this flow, from 0.
    pub number: u32,
    /// When it was about to be sent.
    pub sent: u64,
}

impl Packet {
    /// As bytes.
    pub fn bytes(&self) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        let parts = [self.sender.to_le_bytes(), self.flow.to_le_bytes(), self.number.to_le_bytes()].concat();
        let all = parts.into_iter().chain(self.sent.to_le_bytes());
        bytes.iter_mut().zip(all).for_each(|(to, from)| *to = from);
        bytes
    }

    /// Of bytes that are one.
    pub fn of(bytes: &[u8]) -> Option<Self> {
        let word = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let whole = bytes.len() >= SIZE;
        let sent = u64::from_le_bytes(bytes.get(12..20)?.try_into().ok()?);
        Some(Self { sender: word(0)?, flow: word(4)?, number: word(8)?, sent }).filter(|_| whole)
    }
}

/// A packet and when it was heard.
#[derive(Clone, Copy, Debug)]
pub struct Heard {
    /// The packet.
    pub packet: Packet,
    /// When the receiver took it.
    pub at: u64,
}

/// A packet and when its sender had handed it to the kernel.
#[derive(Clone, Copy, Debug)]
pub struct Sent {
    /// The packet.
    pub packet: Packet,
    /// When the call was over.
    pub done: u64,
}

/// A socket that hears what arrives. Ended by [`Receiver::end`].
#[derive(Debug)]
pub struct Receiver {
    heard: Arc<Mutex<Vec<Heard>>>,
    senders: Arc<Mutex<HashSet<u32>>>,
    over: Arc<AtomicBool>,
    thread: JoinHandle<()>,
}

impl Receiver {
    /// Listens in a place.
    ///
    /// # Errors
    /// The address cannot be listened on there.
    pub fn at(place: &Place, at: SocketAddr, clock: Clock) -> Result<Self> {
        let socket = place.enter(|| bound(at))?;
        socket.set_read_timeout(Some(LOOK))?;
        let (heard, over) = (Arc::<Mutex<Vec<Heard>>>::default(), Arc::<AtomicBool>::default());
        let senders = Arc::<Mutex<HashSet<u32>>>::default();
        let (notes, names, ended) = (heard.clone(), senders.clone(), over.clone());
        let thread = std::thread::spawn(move || {
            let mut buffer = [0; LARGEST];
            let mut empty = false;
            // What has arrived before the end is heard.
            while !(empty && ended.load(Ordering::Relaxed)) {
                let Ok((count, _)) = socket.recv_from(&mut buffer) else {
                    empty = true;
                    continue;
                };
                empty = false;
                let at = clock.now();
                if let Some(packet) = buffer.get(..count).and_then(Packet::of) {
                    notes.lock().unwrap_or_else(PoisonError::into_inner).push(Heard { packet, at });
                    names.lock().unwrap_or_else(PoisonError::into_inner).insert(packet.sender);
                }
            }
        });
        Ok(Self { heard, senders, over, thread })
    }

    /// Whether it has heard of a sender.
    pub fn has_heard_of(&self, sender: u32) -> bool {
        self.senders.lock().unwrap_or_else(PoisonError::into_inner).contains(&sender)
    }

    /// How many it has heard.
    pub fn count(&self) -> usize {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    /// All that it heard.
    ///
    /// # Errors
    /// Its thread panicked.
    pub fn end(self) -> Result<Vec<Heard>> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a receiver panicked"))?;
        Ok(std::mem::take(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner)))
    }
}

fn bound(at: SocketAddr) -> Result<UdpSocket> {
    use nix::sys::socket::{setsockopt, sockopt};
    let socket = UdpSocket::bind(at).with_context(|| format!("listen on {at}"))?;
    setsockopt(&socket, sockopt::RcvBufForce, &ROOM)?;
    Ok(socket)
}

/// One flow of a sender: where to, and whether each of its packets has a socket of its own, and so is a connection of its own.
#[derive(Clone, Copy, Debug)]
pub struct Flow {
    /// Its number, the same in every packet.
    pub number: u32,
    /// Where to.
    pub to: SocketAddr,
    /// A socket for each packet; else one for all.
    pub fresh: bool,
    /// It sends in every so manieth round.
    pub every: u32,
    /// Bytes of a datagram, if they are to be more than it has to say. Such a one is sent in one piece or not at all (the kernel has it not
    /// fragmented if it fits the path that it knows), and one that cannot be sent is an error.
    pub size: usize,
}

/// A thread that sends from a place. Ended by [`Sender::end`].
#[derive(Debug)]
pub struct Sender {
    over: Arc<AtomicBool>,
    thread: JoinHandle<Result<Vec<Sent>>>,
}

impl Sender {
    /// Begins: one round of all flows each `pace`.
    pub fn start(place: Arc<Place>, sender: u32, flows: Vec<Flow>, pace: Duration, clock: Clock) -> Self {
        let over = Arc::<AtomicBool>::default();
        let ended = over.clone();
        let thread = std::thread::spawn(move || {
            place.enter(|| rounds(sender, &flows, pace, clock, || ended.load(Ordering::Relaxed)))
        });
        Self { over, thread }
    }

    /// All that it sent.
    ///
    /// # Errors
    /// It had no socket.
    pub fn end(self) -> Result<Vec<Sent>> {
        self.over.store(true, Ordering::Relaxed);
        self.thread.join().map_err(|_| anyhow!("a sender panicked"))?
    }
}

fn any(to: SocketAddr) -> SocketAddr {
    if to.is_ipv4() { SocketAddr::from(([0; 4], 0)) } else { SocketAddr::from(([0_u16; 8], 0)) }
}

fn rounds(sender: u32, flows: &[Flow], pace: Duration, clock: Clock, over: impl Fn() -> bool) -> Result<Vec<Sent>> {
    let mut steady = Vec::new();
    for flow in flows {
        steady.push((flow, UdpSocket::bind(any(flow.to))?, 0_u32));
    }
    let mut all = Vec::new();
    let (mut next, mut round) = (Instant::now(), 0_u32);
    while !over() {
        for (flow, socket, number) in &mut steady {
            if round % flow.every.max(1) != 0 {
                continue;
            }
            let own = if flow.fresh { Some(UdpSocket::bind(any(flow.to))?) } else { None };
            let packet = Packet { sender, flow: flow.number, number: *number, sent: clock.now() };
            let mut bytes = packet.bytes().to_vec();
            bytes.resize(flow.size.max(SIZE), 0);
            match own.as_ref().unwrap_or(socket).send_to(&bytes, flow.to) {
                Ok(_) => {
                    all.push(Sent { packet, done: clock.now() });
                    *number += 1;
                }
                Err(error) if flow.size > SIZE => {
                    return Err(error).with_context(|| format!("send {} bytes to {}", flow.size, flow.to));
                }
                Err(_) => {}
            }
        }
        round = round.wrapping_add(1);
        next = (next + pace).max(Instant::now());
        std::thread::sleep(next.saturating_duration_since(Instant::now()).max(Duration::from_micros(200)));
    }
    Ok(all)
}

/// Bytes that go from one place to another over one connection, without an end. Ended by [`Bulk::end`].
#[derive(Debug)]
pub struct Bulk {
    over: Arc<AtomicBool>,
    sender: JoinHandle<Result<u64>>,
    receiver: JoinHandle<Result<u64>>,
}

/// What is written at once, and how often.
const PIECE: (usize, Duration) = (64 << 10, Duration::from_millis(5));
/// Longest that a connection may make no progress.
const STALLED: Duration = Duration::from_secs(10);

impl Bulk {
    /// Connects and begins: some 12 MiB a second.
    ///
    /// # Errors
    /// The address cannot be listened on in `to`, or is not reached from `from`.
    pub fn start(from: &Place, to: &Place, at: SocketAddr) -> Result<Self> {
        let listener = to.enter(|| TcpListener::bind(at).with_context(|| format!("listen on {at}")))?;
        let mut client = from
            .enter(|| TcpStream::connect_timeout(&at, STALLED).with_context(|| format!("connect to {at} for bulk")))?;
        let (mut server, _) = listener.accept()?;
        server.set_read_timeout(Some(STALLED))?;
        client.set_write_timeout(Some(STALLED))?;
        let over = Arc::<AtomicBool>::default();
        let ended = over.clone();
        let sender = std::thread::spawn(move || {
            let (piece, mut sent) = (vec![7; PIECE.0], 0);
            while !ended.load(Ordering::Relaxed) {
                client.write_all(&piece).with_context(|| format!("a bulk connection to {at} after {sent} bytes"))?;
                sent += piece.len() as u64;
                std::thread::sleep(PIECE.1);
            }
            Ok(sent)
        });
        let receiver = std::thread::spawn(move || {
            let (mut buffer, mut heard) = (vec![0; PIECE.0], 0);
            loop {
                match server
                    .read(&mut buffer)
                    .with_context(|| format!("a bulk connection at {at} after {heard} bytes"))?
                {
                    0 => return Ok(heard),
                    count => heard += count as u64,
                }
            }
        });
        Ok(Self { over, sender, receiver })
    }

    /// Bytes that were sent, all of which arrived.
    ///
    /// # Errors
    /// The connection broke or stood still, or not all arrived.
    pub fn end(self) -> Result<u64> {
        self.over.store(true, Ordering::Relaxed);
        let sent = self.sender.join().map_err(|_| anyhow!("a sender panicked"))??;
        let heard = self.receiver.join().map_err(|_| anyhow!("a receiver panicked"))??;
        ensure!(sent == heard, "{heard} of {sent} bytes arrived");
        Ok(sent)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_packet_is_read_as_it_was_written_and_nothing_else_is_one() {
        let packet = Packet { sender: 7, flow: 1 << 20, number: 3, sent: u64::MAX - 5 };
        let bytes = packet.bytes();
        assert_eq!(Packet::of(&bytes), Some(packet));
        assert_eq!(Packet::of(&[bytes.as_slice(), &[0; 1400]].concat()), Some(packet), "one that was made longer");
        assert_eq!(Packet::of(&bytes[..SIZE - 1]), None);
    }
}
