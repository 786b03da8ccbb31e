//! Sockets that a socket hook translated: which are connected to which backend, in every network namespace, and the end of some.
//!
//! Promises to look at translated sockets only, and to end only those that it is told of and that are still connected to that very
//! backend. An object of its own (`bpf/held.c`): a kernel that lacks its iterators loses nothing else.

use std::fs::File;
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use libbpf_rs::{MapCore as _, Object, ObjectBuilder};

use super::error::{Error, Result};
use super::map::{Map, from_bytes};
use super::observe::End;
use crate::abi::{self, Addr, Be16, SockPeer};

/// The compiled `bpf/held.c`.
static OBJECT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/held.o"));

const FIND: &str = "tp_held_sockets";
const END: &str = "tp_end_sockets";
/// `TCP_ESTABLISHED`; of UDP: connected.
const ESTABLISHED: u32 = 1;
/// `TCP_SYN_SENT` and `TCP_CLOSE_WAIT`: a connection that its client has not closed.
const OPEN: [u32; 3] = [ESTABLISHED, 2, 8];

/// A socket that is connected to the backend that it was translated to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HeldSocket {
    /// `SO_COOKIE`: no other socket since boot has it.
    pub cookie: u64,
    /// Cookie of its network namespace.
    pub netns_cookie: u64,
    /// IP protocol number.
    pub protocol: u8,
    /// What its owner connected to.
    pub service: End,
    /// What it is connected to.
    pub backend: End,
    /// Its own address and port.
    pub local: End,
    /// Whether it is an `AF_INET6` socket; its addresses may be IPv4 all the same.
    pub v6: bool,
    /// Device that it is bound to; 0: none.
    pub ifindex: u32,
    /// As the kernel counts TCP's states.
    state: u32,
}

impl HeldSocket {
    fn of(raw: &abi::HeldSocket) -> Self {
        Self {
            cookie: raw.cookie,
            netns_cookie: raw.netns_cookie,
            protocol: raw.proto,
            service: (raw.peer.service.ip(), raw.peer.service_port.get()),
            backend: (raw.peer.backend.ip(), raw.peer.backend_port.get()),
            local: (raw.local.ip(), raw.local_port.get()),
            v6: raw.family == 6,
            ifindex: raw.ifindex,
            state: raw.state,
        }
    }

    /// Whether its owner still speaks there: of TCP, from the handshake until the owner closes.
    pub fn is_open(&self) -> bool {
        OPEN.contains(&self.state)
    }

    fn peer(&self) -> SockPeer {
        let end = |(ip, port): (IpAddr, u16)| (Addr::new(ip), Be16::new(port));
        let ((backend, backend_port), (service, service_port)) = (end(self.backend), end(self.service));
        SockPeer { backend, service, backend_port, service_port }
    }
}

/// The iterators, usable from any thread.
#[derive(Debug)]
pub struct HeldSockets {
    find: OwnedFd,
    /// Linux 6.5; none: `bpf_sock_destroy` is not there.
    end: Option<OwnedFd>,
    doomed: Map<u64, SockPeer>,
}

fn load(main: &Object, with_end: bool) -> Result<Object> {
    let failed = |e| Error::bpf("load", "iterators of translated sockets (bpf/held.c)", e);
    let sockets = main.maps().find(|map| map.name() == "tp_sock_peer");
    let sockets = sockets.ok_or_else(|| Error::Mismatch { what: "map tp_sock_peer, which is missing".to_owned() })?;
    let mut open = ObjectBuilder::default().name("towpath_held").and_then(|b| b.open_memory(OBJECT)).map_err(failed)?;
    for mut map in open.maps_mut().filter(|map| map.name() == "tp_sock_peer") {
        map.reuse_fd(sockets.as_fd()).map_err(failed)?;
    }
    for mut program in open.progs_mut().filter(|program| program.name() == END) {
        program.set_autoload(with_end);
    }
    open.load().map_err(failed)
}

/// Attaches an iterator; its link's descriptor, which keeps the program.
fn attach(object: &Object, name: &'static str, map: Option<&str>) -> Result<OwnedFd> {
    let failed = |e| Error::bpf("attach iterator", name, e);
    let missing = |what: &str| Error::Mismatch { what: format!("{what}, which is missing") };
    let program = object.progs_mut().find(|program| program.name() == name).ok_or_else(|| missing(name))?;
    let link = match map {
        Some(map) => {
            let map = object.maps().find(|m| m.name() == map).ok_or_else(|| missing(map))?;
            program.attach_iter(map.as_fd()).map_err(failed)?
        }
        None => program.attach_iter_with_opts(libbpf_rs::IterOpts::None).map_err(failed)?,
    };
    link.as_fd().try_clone_to_owned().map_err(|e| Error::kernel("keep iterator", name, e))
}

impl HeldSockets {
    /// Loads the iterators over the sockets that `main`'s hooks translate.
    ///
    /// # Errors
    /// The kernel has no BTF, or no iterators over socket storage.
    pub(super) fn open(main: &Object) -> Result<Self> {
        let (object, with_end) = match load(main, true) {
            Ok(object) => (object, has_destroy()),
            Err(_) => (load(main, false)?, false),
        };
        Ok(Self {
            find: attach(&object, FIND, Some("tp_sock_peer"))?,
            end: with_end.then(|| attach(&object, END, None)).transpose()?,
            doomed: Map::open(&object, "tp_doomed")?,
        })
    }

    /// Every translated socket of the machine that is connected to the backend it was translated to. Costs what there are translated
    /// sockets, some ten thousand a millisecond.
    ///
    /// # Errors
    /// The kernel fails.
    pub fn list(&self) -> Result<Vec<HeldSocket>> {
        let bytes = run(&self.find, FIND)?;
        let raw = bytes.chunks_exact(size_of::<abi::HeldSocket>()).filter_map(from_bytes::<abi::HeldSocket>);
        Ok(raw.map(|raw| HeldSocket::of(&raw)).collect())
    }

    /// Whether [`HeldSockets::end_here`] can do anything.
    pub fn can_end(&self) -> bool {
        self.end.is_some()
    }

    /// Ends those of these UDP sockets that are in the calling thread's network namespace and still connected as listed: their owners'
    /// next call fails with `ECONNABORTED`. The cookies of those that were. Walks all UDP sockets of the machine.
    ///
    /// # Errors
    /// The kernel fails.
    pub fn end_here(&self, sockets: &[HeldSocket]) -> Result<Vec<u64>> {
        let Some(end) = &self.end else { return Ok(Vec::new()) };
        for socket in sockets {
            self.doomed.put(&socket.cookie, &socket.peer())?;
        }
        let bytes = run(end, END);
        for socket in sockets {
            self.doomed.delete(&socket.cookie)?;
        }
        Ok(bytes?.chunks_exact(size_of::<u64>()).filter_map(from_bytes::<u64>).collect())
    }
}

/// Whether the running kernel has `bpf_sock_destroy`.
fn has_destroy() -> bool {
    use libbpf_rs::btf::types::Func;
    libbpf_rs::Btf::from_vmlinux().is_ok_and(|btf| btf.type_by_name::<Func<'_>>("bpf_sock_destroy").is_some())
}

/// All that an iterator says, over the calling thread's network namespace where that matters.
fn run(link: &OwnedFd, name: &'static str) -> Result<Vec<u8>> {
    // SAFETY: the descriptor is open for the whole call; the answer is a new descriptor or a negative error.
    let made = unsafe { libbpf_sys::bpf_iter_create(link.as_raw_fd()) };
    if made < 0 {
        return Err(Error::kernel("run iterator", name, io::Error::from_raw_os_error(-made)));
    }
    // SAFETY: the kernel just made this descriptor for us, and nobody else has it.
    let mut iterator = File::from(unsafe { OwnedFd::from_raw_fd(made) });
    let (mut said, mut buffer) = (Vec::new(), vec![0; 64 * 1024]);
    loop {
        match iterator.read(&mut buffer) {
            Ok(0) => return Ok(said),
            Ok(n) => said.extend_from_slice(buffer.get(..n).unwrap_or_default()),
            // After a million sockets that say nothing the kernel wants to be asked again.
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(e) => return Err(Error::kernel("read iterator", name, e)),
        }
    }
}
