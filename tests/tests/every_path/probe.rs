//! Hundreds of cases at once: sockets that never block, opened where each client and endpoint stands, and served by one loop.

use std::collections::HashMap;
use std::io::{ErrorKind, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::libc;
use socket2::{Domain, Protocol as Number, Socket, Type};
use towpath_walkthrough::udp::Joined;

use crate::axes::{Axes, Content, Endpoint, Family, Protocol, Translated};
use crate::scene::{CLOSED, OPEN, Scene};
use crate::wire::{self, Chunk, Complaint, LARGE, SMALL};

/// What is denied has this long to arrive after the last case was begun. By then it was sent a second time: by the kernel, if TCP.
const QUIET: Duration = Duration::from_millis(700);
const QUIET_OF_TCP: Duration = Duration::from_millis(1300);
/// An allowed one, on a machine that is busy.
pub(crate) const PATIENCE: Duration = Duration::from_secs(12);
/// Between two times of sending what was not answered.
const AGAIN: Duration = Duration::from_millis(400);
/// So many are begun before anybody listens again.
const AT_ONCE: usize = 50;
const BUFFER: usize = 4 << 20;

/// A question to the network, and what the documentation says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Case {
    pub(crate) axes: Axes,
    /// Its number, which its packets carry, and its source port.
    pub(crate) number: u32,
    pub(crate) port: u16,
    /// Indexes of who stands where.
    pub(crate) asker: usize,
    pub(crate) asked: usize,
    /// The client's address, and the one that the endpoint sees.
    pub(crate) from: IpAddr,
    pub(crate) seen: IpAddr,
    /// What it asks, and the endpoint that this becomes.
    pub(crate) to: SocketAddr,
    pub(crate) at: SocketAddr,
    pub(crate) expected: bool,
}

/// What became of it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Outcome {
    /// Where it arrived, and from which address.
    pub(crate) arrived: Option<(usize, IpAddr)>,
    /// Whether its answer came back as it should: the same bytes, or the error that was to be.
    pub(crate) answered: bool,
    /// What else the client was told.
    pub(crate) told: Option<String>,
}

/// Cases of one protocol and content, while they run.
pub(crate) struct Batch<'b> {
    pub(crate) scene: &'b Scene,
    pub(crate) cases: &'b [Case],
    pub(crate) outcomes: Vec<Outcome>,
    pub(crate) by_number: HashMap<u32, usize>,
    pub(crate) by_port: HashMap<u16, usize>,
    pub(crate) protocol: Protocol,
    pub(crate) content: Content,
    pub(crate) patience: Duration,
    /// TCP and UDP: one a case.
    pub(crate) clients: Vec<Option<Socket>>,
    /// As many have begun.
    pub(crate) begun: usize,
    /// TCP: whose question was sent.
    pub(crate) asked: Vec<bool>,
    pub(crate) taps: Vec<(usize, Socket)>,
    pub(crate) listeners: Vec<(usize, TcpListener)>,
    pub(crate) streams: Vec<(usize, TcpStream)>,
    pub(crate) servers: Vec<(usize, SocketAddr, UdpSocket)>,
    /// SCTP and ICMP: one each for everybody's families.
    pub(crate) raw: HashMap<(usize, Family), UdpSocket>,
}

pub(crate) fn is_later(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::NotConnected | ErrorKind::Interrupted)
        || error.raw_os_error() == Some(libc::EINPROGRESS)
}

fn any(family: Family, port: u16) -> SocketAddr {
    if family == Family::V4 { ([0; 4], port).into() } else { ([0_u16; 8], port).into() }
}

fn domain(family: Family) -> Domain {
    if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 }
}

/// In the calling thread's network namespace.
fn open(family: Family, kind: Type, protocol: Option<i32>, port: Option<u16>) -> Result<Socket> {
    let socket = Socket::new(domain(family), kind, protocol.map(Number::from))?;
    socket.set_nonblocking(true)?;
    if kind != Type::STREAM {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if let Some(port) = port {
        if family == Family::V6 {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(kind == Type::STREAM)?;
        socket.bind(&any(family, port).into()).with_context(|| format!("take port {port}"))?;
    }
    Ok(socket)
}

/// Runs cases of one protocol and content; what is allowed has `patience` long to be answered.
pub(crate) fn run(
    scene: &Scene,
    cases: &[Case],
    protocol: Protocol,
    content: Content,
    patience: Duration,
) -> Result<Vec<Outcome>> {
    let mut batch = Batch {
        scene,
        cases,
        outcomes: vec![Outcome::default(); cases.len()],
        by_number: cases.iter().enumerate().map(|(at, case)| (case.number, at)).collect(),
        by_port: cases.iter().enumerate().map(|(at, case)| (case.port, at)).collect(),
        protocol,
        content,
        patience,
        clients: Vec::new(),
        begun: 0,
        asked: vec![false; cases.len()],
        taps: Vec::new(),
        listeners: Vec::new(),
        streams: Vec::new(),
        servers: Vec::new(),
        raw: HashMap::new(),
    };
    batch.listen()?;
    batch.open_clients()?;
    batch.go()?;
    Ok(batch.outcomes)
}

impl Batch<'_> {
    pub(crate) fn size(&self) -> usize {
        if self.content == Content::Fragments { LARGE } else { SMALL }
    }

    /// Opens what the endpoints need.
    fn listen(&mut self) -> Result<()> {
        let mut endpoints: Vec<(usize, Endpoint)> = self.cases.iter().map(|c| (c.asked, c.axes.endpoint)).collect();
        endpoints.sort_unstable();
        endpoints.dedup();
        for (at, endpoint) in endpoints {
            let standing = self.scene.standing.get(at).context("an endpoint")?;
            if endpoint != Endpoint::Hosted || self.content == Content::Forged {
                self.taps.push((at, standing.spot.enter(tap)?));
            }
            for family in [Family::V4, Family::V6] {
                for port in [OPEN, CLOSED] {
                    let here = SocketAddr::new(standing.address(family), port);
                    match self.protocol {
                        Protocol::Tcp => {
                            let listener = standing.spot.enter(|| {
                                let socket = open(family, Type::STREAM, None, Some(port))?;
                                socket.listen(4096)?;
                                Ok(socket)
                            })?;
                            self.listeners.push((at, listener.into()));
                        }
                        Protocol::Udp if self.content != Content::PortUnreachable => {
                            let socket = standing.spot.enter(|| open(family, Type::DGRAM, None, Some(port)))?;
                            self.servers.push((at, here, socket.into()));
                        }
                        Protocol::Udp | Protocol::Sctp | Protocol::Icmp => {}
                    }
                }
            }
        }
        Ok(())
    }

    /// Opens a socket for each case where its client stands, with the socket hooks of its node or without; or raw ones for all.
    fn open_clients(&mut self) -> Result<()> {
        let odd = matches!(self.content, Content::TooBig | Content::Options);
        if odd || matches!(self.protocol, Protocol::Sctp | Protocol::Icmp) {
            for case in self.cases {
                for at in [case.asker, case.asked] {
                    self.open_raw(at, case.axes.family)?;
                }
            }
        }
        if matches!(self.protocol, Protocol::Sctp | Protocol::Icmp) {
            return Ok(());
        }
        self.clients.resize_with(self.cases.len(), || None);
        let kind = if self.protocol == Protocol::Tcp { Type::STREAM } else { Type::DGRAM };
        let mut groups: Vec<(usize, bool)> = self.cases.iter().map(group).collect();
        groups.sort_unstable();
        groups.dedup();
        for wanted in groups {
            let standing = self.scene.standing.get(wanted.0).context("a client")?;
            let node = standing.node.filter(|_| wanted.1);
            let hooked = node.map(|node| Joined::node(&self.scene.cluster, node)).transpose()?;
            let (cases, clients) = (self.cases, &mut self.clients);
            standing.spot.enter(|| {
                for (case, client) in cases.iter().zip(clients).filter(|(case, _)| group(case) == wanted) {
                    let socket = open(case.axes.family, kind, None, Some(case.port))?;
                    if kind == Type::STREAM {
                        // It ends with a reset, and nothing stays.
                        socket.set_linger(Some(Duration::ZERO))?;
                    }
                    *client = Some(socket);
                }
                Ok(())
            })?;
            drop(hooked);
        }
        Ok(())
    }

    fn open_raw(&mut self, at: usize, family: Family) -> Result<()> {
        if self.raw.contains_key(&(at, family)) {
            return Ok(());
        }
        let number = match (self.protocol, family) {
            _ if self.content == Content::Options => wire::PACKETS,
            (Protocol::Sctp, _) => wire::SCTP,
            (_, Family::V4) => wire::ICMP,
            (_, Family::V6) => wire::ICMP6,
        };
        let spot = &self.scene.standing.get(at).context("a client")?.spot;
        let socket = spot.enter(|| open(family, Type::RAW, Some(number.into()), None))?;
        self.raw.insert((at, family), socket.into());
        Ok(())
    }

    /// Sends, listens, and sends again what was not answered.
    fn go(&mut self) -> Result<()> {
        for at in 0..self.cases.len() {
            self.begin(at);
            self.begun = at + 1;
            if at % AT_ONCE == AT_ONCE - 1 {
                self.listen_once();
            }
        }
        let sent = Instant::now();
        let quiet = if self.protocol == Protocol::Tcp { QUIET_OF_TCP } else { QUIET };
        let mut again = sent + AGAIN;
        loop {
            self.listen_once();
            let complete =
                |(case, outcome): (&Case, &Outcome)| !case.expected || (outcome.answered && outcome.arrived.is_some());
            if sent.elapsed() > quiet && self.cases.iter().zip(&self.outcomes).all(complete)
                || sent.elapsed() > self.patience
            {
                return Ok(());
            }
            if Instant::now() > again {
                again = Instant::now() + AGAIN;
                self.send_again();
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn begin(&mut self, at: usize) {
        let Some(case) = self.cases.get(at) else { return };
        if let Some(client) = self.clients.get(at).and_then(Option::as_ref) {
            if let Err(error) = client.connect(&case.to.into())
                && !is_later(&error)
            {
                self.tell(at, &error);
                return;
            }
            let local = client.local_addr().ok().and_then(|local| local.as_socket());
            if local.is_none_or(|local| local.ip() != case.from) {
                self.note(at, format!("the client sends from {local:?}"));
            }
        }
        if self.protocol != Protocol::Tcp {
            self.send(at);
        }
    }

    fn send(&mut self, at: usize) {
        let (Some(case), size) = (self.cases.get(at), self.size()) else { return };
        let family = case.axes.family;
        let sent = match self.protocol {
            Protocol::Tcp => return,
            Protocol::Udp if self.content == Content::Options => {
                let from = SocketAddr::new(case.from, case.port);
                let packet = wire::with_options(from, case.to, case.number).unwrap_or_default();
                self.send_raw(case.asker, family, &packet, case.to.ip())
            }
            Protocol::Icmp if self.content == Content::Forged => {
                let (server, client) = (SocketAddr::new(case.from, OPEN), SocketAddr::new(case.to.ip(), case.port));
                let packet = wire::complaint(Complaint::PortUnreachable, client, server, case.number);
                self.send_raw(case.asker, family, &packet.unwrap_or_default(), case.to.ip())
            }
            Protocol::Udp => {
                let Some(Some(mut client)) = self.clients.get(at).map(Option::as_ref) else { return };
                client.write(&wire::payload(case.number, size)).map(drop)
            }
            Protocol::Sctp => {
                let packet = wire::sctp(Chunk::Init, case.port, case.to.port(), case.number, size);
                self.send_raw(case.asker, family, &packet, case.to.ip())
            }
            Protocol::Icmp => {
                let packet = wire::echo_request(family == Family::V4, case.number, size);
                self.send_raw(case.asker, family, &packet, case.to.ip())
            }
        };
        if let Err(error) = sent
            && !is_later(&error)
        {
            self.tell(at, &error);
        }
    }

    pub(crate) fn send_raw(&self, at: usize, family: Family, packet: &[u8], to: IpAddr) -> std::io::Result<()> {
        match self.raw.get(&(at, family)) {
            Some(socket) => socket.send_to(packet, SocketAddr::new(to, 0)).map(drop),
            None => Err(ErrorKind::NotFound.into()),
        }
    }

    fn send_again(&mut self) {
        for at in 0..self.cases.len() {
            if self.outcomes.get(at).is_some_and(|outcome| !outcome.answered) {
                self.send(at);
            }
        }
    }

    /// What a call on the client's socket failed with: the error that was to come, or another.
    pub(crate) fn tell(&mut self, at: usize, error: &std::io::Error) {
        let wanted = match self.content {
            Content::PortUnreachable => Some(libc::ECONNREFUSED),
            Content::TooBig => Some(libc::EMSGSIZE),
            // The first is sent before anybody knows what the path takes.
            Content::Fragments if error.raw_os_error() == Some(libc::EMSGSIZE) => return,
            Content::Whole | Content::Fragments | Content::Options | Content::Forged => None,
        };
        if wanted.is_some() && error.raw_os_error() == wanted {
            self.answer(at);
        } else {
            self.note(at, error.to_string());
        }
    }

    pub(crate) fn note(&mut self, at: usize, what: String) {
        if let Some(outcome) = self.outcomes.get_mut(at) {
            outcome.told.get_or_insert(what);
        }
    }

    pub(crate) fn answer(&mut self, at: usize) {
        if let Some(outcome) = self.outcomes.get_mut(at) {
            outcome.answered = true;
        }
        // What a node's kernel answers by itself shows itself by its answer alone.
        let by_kernel = self.protocol == Protocol::Icmp || self.content == Content::PortUnreachable;
        if let Some(case) = self.cases.get(at)
            && case.axes.endpoint == Endpoint::Hosted
            && by_kernel
        {
            self.arrive(at, case.asked, case.seen);
        }
    }

    pub(crate) fn arrive(&mut self, at: usize, place: usize, from: IpAddr) {
        if let Some(outcome) = self.outcomes.get_mut(at) {
            outcome.arrived.get_or_insert((place, from));
            // Nobody answers a complaint.
            outcome.answered |= self.content == Content::Forged;
        }
    }
}

fn group(case: &Case) -> (usize, bool) {
    (case.asker, case.axes.translated == Translated::AtSocket)
}

/// All frames of the calling thread's network namespace.
fn tap() -> Result<Socket> {
    let all = i32::from((libc::ETH_P_ALL as u16).to_be());
    let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Number::from(all)))?;
    socket.set_nonblocking(true)?;
    nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::RcvBufForce, &(32 << 20))?;
    Ok(socket)
}
