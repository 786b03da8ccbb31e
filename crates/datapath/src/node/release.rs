//! Lets go of UDP flows that are held to a backend which their Service no longer has: nothing else ever would, since nobody answers them.
//!
//! Two things hold a flow: a connected socket that a socket hook translated, and a translation of the veth path. The former is ended
//! (its owner's next call fails with `ECONNABORTED`, and it connects again), the latter deleted (the next datagram is translated anew, or
//! refused). A socket that connected to a pod's address itself is none of ours. What an endpoint that still serves has, it keeps
//! while it goes; TCP is never touched.
//!
//! ```text
//! apply_services ── UdpTable ──► thread "towpath-release": list translated sockets, end those that are astray, once more a moment later
//! ```
//!
//! Asked only when UDP backends went, and never more than a fifth of the time at work.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use towpath_model::{Family, family_of};

use crate::bpf::{Connection, End, HeldSocket, HeldSockets, Programs, Translations, UdpTarget};
use crate::error::Error;
use crate::net;
use crate::net::namespaces::{self, Namespaces};
use crate::net::sock_diag::{self, Connected, SockDiag};
use crate::requests::{Released, ServiceFlow, ServiceFlows};

/// What connects while an entry flips may still get an old backend: so long after, all are looked at again.
const AGAIN: Duration = Duration::from_millis(700);
/// Rest after a pass, in times that it took.
const REST: u32 = 4;

/// Where UDP flows may go.
#[derive(Debug, Default)]
pub(super) struct UdpTable {
    at: HashMap<End, HashSet<End>>,
    /// NodePorts, at any node's address.
    anywhere: HashMap<(Family, u16), HashSet<End>>,
}

impl UdpTable {
    pub(super) fn of(targets: impl Iterator<Item = UdpTarget>) -> Self {
        let mut udp = Self::default();
        for UdpTarget { address, family, port, backends } in targets {
            match address {
                Some(address) => udp.at.entry((address, port)).or_default().extend(backends),
                None => udp.anywhere.entry((family, port)).or_default().extend(backends),
            }
        }
        udp
    }

    /// Whether a flow to `service` may be held to `backend`.
    fn allows(&self, service: End, backend: End) -> bool {
        let anywhere = || self.anywhere.get(&(family_of(service.0), service.1));
        self.at.get(&service).or_else(anywhere).is_some_and(|backends| backends.contains(&backend))
    }
}

/// A handle on the thread; dropping it ends the thread after the pass in hand.
#[derive(Debug)]
pub(super) struct Releaser {
    queue: Sender<UdpTable>,
    released: Arc<Mutex<Released>>,
    sockets: Arc<Result<HeldSockets, String>>,
}

fn locked(released: &Mutex<Released>) -> MutexGuard<'_, Released> {
    released.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Releaser {
    /// Starts the thread, in the network namespace of the caller's thread, which has this cookie.
    pub(super) fn start(programs: &Programs, netns_cookie: u64) -> Result<Self, Error> {
        let places = namespaces::PLACES.map(PathBuf::from);
        Self::start_with(programs, netns_cookie, &places, Means::of_kernel)
    }

    /// As [`Releaser::start`], with other places and means: for tests.
    pub(super) fn start_with(
        programs: &Programs,
        netns_cookie: u64,
        places: &[PathBuf],
        means: impl FnOnce(&HeldSockets) -> Means,
    ) -> Result<Self, Error> {
        let sockets = Arc::new(programs.held_sockets().map_err(|error| error.to_string()));
        let means = sockets.as_ref().as_ref().map(means).map_err(Clone::clone);
        let lost = match &means {
            Ok(means) => means.lost(),
            Err(error) => vec![format!(
                "UDP sockets that are held to a backend which is gone are not found, and stay held ({error}; Linux 5.9 with \
                 CONFIG_DEBUG_INFO_BTF)"
            )],
        };
        for lost in &lost {
            tracing::warn!(lost, "this kernel lacks a feature");
        }
        let released = Arc::new(Mutex::new(Released { lost, ..Released::default() }));
        let (queue, inbox) = mpsc::channel();
        let mut pass = Pass {
            sockets: Arc::clone(&sockets),
            translations: programs.translations()?,
            means: means.ok(),
            namespaces: Namespaces::new(places.iter().cloned()),
            netns_cookie,
        };
        let shared = Arc::clone(&released);
        let run = move || work(&inbox, |table| pass.run(table, &shared));
        std::thread::Builder::new()
            .name("towpath-release".to_owned())
            .spawn(run)
            .map_err(|e| net::Error::system("start the thread that releases UDP flows", e))?;
        Ok(Self { queue, released, sockets })
    }

    /// Has flows released that this table does not allow.
    pub(super) fn release(&self, table: UdpTable) {
        if self.queue.send(table).is_err() {
            tracing::warn!("the thread that releases UDP flows has ended; restart the agent");
        }
    }

    pub(super) fn released(&self) -> Released {
        locked(&self.released).clone()
    }

    /// What lists translated sockets, or why nothing does.
    pub(super) fn sockets(&self) -> &Result<HeldSockets, String> {
        &self.sockets
    }
}

/// Two passes over each table, or one if the next table has come; always the newest.
fn work(inbox: &Receiver<UdpTable>, mut pass: impl FnMut(&UdpTable)) {
    let mut looked_at: Option<UdpTable> = None;
    loop {
        let next = match &looked_at {
            None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
            Some(_) => inbox.recv_timeout(AGAIN),
        };
        let table = match (next, looked_at.take()) {
            (Ok(table), _) => inbox.try_iter().last().unwrap_or(table),
            (Err(RecvTimeoutError::Timeout), Some(table)) => {
                pass(&table);
                continue;
            }
            _ => return,
        };
        let begun = Instant::now();
        pass(&table);
        looked_at = Some(table);
        std::thread::sleep(begun.elapsed() * REST);
    }
}

/// By which of the kernel's ways a socket can be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Means {
    /// `SOCK_DESTROY`: finds the one socket at once.
    pub(super) diag: bool,
    /// `bpf_sock_destroy`: walks all UDP sockets of the machine for each namespace.
    pub(super) iterator: bool,
}

impl Means {
    fn of_kernel(sockets: &HeldSockets) -> Self {
        // More than once: a port of ours may be a pod's host port, and the socket translated.
        let diag = (0..3).any(|_| sock_diag::works_here().is_ok());
        Self { diag, iterator: sockets.can_end() }
    }

    fn lost(self) -> Vec<String> {
        if self.diag || self.iterator {
            return Vec::new();
        }
        vec![
            "UDP sockets that are held to a backend which is gone cannot be ended, and stay held: this kernel has neither \
             CONFIG_INET_DIAG_DESTROY nor bpf_sock_destroy (Linux 6.5)"
                .to_owned(),
        ]
    }
}

struct Pass {
    sockets: Arc<Result<HeldSockets, String>>,
    translations: Translations,
    means: Option<Means>,
    namespaces: Namespaces,
    netns_cookie: u64,
}

impl Pass {
    fn run(&mut self, table: &UdpTable, released: &Mutex<Released>) {
        let translations = self.translations.retain_udp(|t| table.allows(t.service, t.backend));
        let sockets = self.end_astray(table);
        let mut released = locked(released);
        let mut problems = Vec::new();
        match translations {
            Ok(count) => released.translations += count as u64,
            Err(error) => problems.push(error.to_string()),
        }
        match sockets {
            Ok((count, left)) => {
                released.sockets += count;
                problems.extend(left);
            }
            Err(error) => problems.push(error.to_string()),
        }
        released.problem = (!problems.is_empty()).then(|| problems.join("; "));
        if let Some(problem) = &released.problem {
            tracing::warn!(problem, "UDP flows are held to backends that are gone");
        }
    }

    /// Ends sockets that are held to what the table does not allow; how many, and what could not be done, in words.
    fn end_astray(&mut self, table: &UdpTable) -> Result<(u64, Vec<String>), Error> {
        let (Ok(sockets), Some(means)) = (self.sockets.as_ref(), self.means) else { return Ok((0, Vec::new())) };
        let mut astray: BTreeMap<u64, Vec<HeldSocket>> = BTreeMap::new();
        let udp = |socket: &HeldSocket| i32::from(socket.protocol) == libc::IPPROTO_UDP && socket.is_open();
        for socket in sockets.list()?.into_iter().filter(udp) {
            if !table.allows(socket.service, socket.backend) {
                astray.entry(socket.netns_cookie).or_default().push(socket);
            }
        }
        if means == (Means { diag: false, iterator: false }) {
            return Ok((0, Vec::new()));
        }
        let (mut ended, mut problems) = (0, Vec::new());
        let mut end = |held: &[HeldSocket]| match end_here(sockets, means, held) {
            Ok(count) => ended += count,
            Err(error) => problems.push(error.to_string()),
        };
        if let Some(own) = astray.remove(&self.netns_cookie) {
            end(&own);
        }
        let cookies: BTreeSet<u64> = astray.keys().copied().collect();
        let within = |cookie: u64| end(astray.get(&cookie).map_or(&[], Vec::as_slice));
        let missing = self.namespaces.within(&cookies, within)?;
        if !missing.is_empty() {
            let count: usize = missing.iter().filter_map(|cookie| astray.get(cookie)).map(Vec::len).sum();
            problems.push(format!(
                "{count} UDP sockets of {} pods are held to backends that are gone, and the pods' network namespaces are not in {}: \
                 mount the directory in which the container runtime keeps them into the agent's container, with mountPropagation \
                 HostToContainer",
                missing.len(),
                namespaces::PLACES.join(" or "),
            ));
        }
        Ok((ended, problems))
    }
}

/// Ends sockets of the calling thread's network namespace; how many. One that is gone by itself, or connected elsewhere meanwhile, is no error.
fn end_here(sockets: &HeldSockets, means: Means, held: &[HeldSocket]) -> Result<u64, Error> {
    let mut left: Vec<HeldSocket> = held.to_vec();
    if means.diag {
        let diag = SockDiag::open()?;
        left.retain(|socket| diag.end(&connected(socket)).is_err());
    }
    let mut ended = (held.len() - left.len()) as u64;
    if means.iterator && !left.is_empty() {
        let cookies: BTreeSet<u64> = sockets.end_here(&left)?.into_iter().collect();
        ended += cookies.len() as u64;
    }
    Ok(ended)
}

fn connected(socket: &HeldSocket) -> Connected {
    let HeldSocket { cookie, v6, local, backend, ifindex, .. } = *socket;
    Connected { cookie, v6, local, remote: backend, ifindex }
}

/// Open connections by Service address and backend: sockets that were translated when they connected, and what is translated at devices.
pub(super) fn flows(
    sockets: Option<&Result<HeldSockets, String>>,
    connections: Vec<Connection>,
) -> Result<ServiceFlows, Error> {
    let mut counted = ServiceFlows::default();
    let mut count = |protocol, service, backend| {
        *counted.flows.entry(ServiceFlow { protocol, service, backend }).or_default() += 1;
    };
    for connection in connections.iter().filter(|connection| connection.is_open()) {
        if let Some(service) = connection.service {
            count(connection.protocol, service, connection.responder);
        }
    }
    match sockets {
        Some(Ok(sockets)) => {
            for socket in sockets.list()?.iter().filter(|socket| socket.is_open()) {
                count(socket.protocol, socket.service, socket.backend);
            }
        }
        Some(Err(error)) => counted.without_sockets = Some(error.clone()),
        None => {}
    }
    Ok(counted)
}
