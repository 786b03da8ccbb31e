//! Pinned links: they outlive the process that made them, and their program is replaced in place.
//!
//! Links that another version of the programs pinned (its layouts, and so its maps, are not ours) go on with that version's
//! programs until [`Links::take_over`]: each then runs ours from one packet to the next.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::ptr;

use libbpf_rs::query::{LinkInfo, LinkTypeInfo};

use super::config::Hook;
use super::error::{Error, Result};
use super::map::check;

/// The socket programs and where each attaches.
pub(crate) const SOCKET_PROGRAMS: [(&str, libbpf_sys::bpf_attach_type); 9] = [
    ("tp_connect4", libbpf_sys::BPF_CGROUP_INET4_CONNECT),
    ("tp_connect6", libbpf_sys::BPF_CGROUP_INET6_CONNECT),
    ("tp_sendmsg4", libbpf_sys::BPF_CGROUP_UDP4_SENDMSG),
    ("tp_sendmsg6", libbpf_sys::BPF_CGROUP_UDP6_SENDMSG),
    ("tp_recvmsg4", libbpf_sys::BPF_CGROUP_UDP4_RECVMSG),
    ("tp_recvmsg6", libbpf_sys::BPF_CGROUP_UDP6_RECVMSG),
    ("tp_getpeername4", libbpf_sys::BPF_CGROUP_INET4_GETPEERNAME),
    ("tp_getpeername6", libbpf_sys::BPF_CGROUP_INET6_GETPEERNAME),
    ("tp_sock_release", libbpf_sys::BPF_CGROUP_INET_SOCK_RELEASE),
];

/// The directory of pinned links.
#[derive(Debug)]
pub(crate) struct Links {
    dir: PathBuf,
    /// Other versions' directories, until theirs are taken over.
    former: Vec<PathBuf>,
}

/// What a pinned link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Target {
    /// A device index, 0 when the device is gone.
    Device(u32),
    /// A cgroup's id, 0 when it is gone.
    Cgroup(u64),
    Other,
}

impl Target {
    /// Whether there is still something that it is attached to.
    fn is_there(self) -> bool {
        !matches!(self, Target::Device(0) | Target::Cgroup(0) | Target::Other)
    }
}

fn path_text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))
}

fn open_pinned(path: &Path) -> io::Result<Option<OwnedFd>> {
    let text = path_text(path)?;
    // SAFETY: the path is a string that ends in NUL and outlives the call.
    let fd = unsafe { libbpf_sys::bpf_obj_get(text.as_ptr()) };
    match check(fd) {
        // SAFETY: the call just made this descriptor, and nobody else knows it.
        Ok(()) => Ok(Some(unsafe { OwnedFd::from_raw_fd(fd) })),
        Err(e) if e.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(e) => Err(e),
    }
}

fn target(link: BorrowedFd<'_>) -> Target {
    match LinkInfo::from_fd(link).map(|info| info.info) {
        Ok(LinkTypeInfo::Tcx(info)) => Target::Device(info.ifindex),
        Ok(LinkTypeInfo::Xdp(info)) => Target::Device(info.ifindex),
        Ok(LinkTypeInfo::Cgroup(info)) => Target::Cgroup(info.cgroup_id),
        _ => Target::Other,
    }
}

fn create(program: BorrowedFd<'_>, on: i32, kind: libbpf_sys::bpf_attach_type, pin: &Path) -> io::Result<()> {
    // In its driver, or not at all: what the stack does in the driver's place (generic XDP) costs more than it saves.
    let flags = if kind == libbpf_sys::BPF_XDP { libbpf_sys::XDP_FLAGS_DRV_MODE } else { 0 };
    let options = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        flags,
        ..Default::default()
    };
    // SAFETY: the options outlive the call and name no other memory; the other arguments are numbers.
    let fd = unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), on, kind, ptr::from_ref(&options)) };
    check(fd)?;
    // SAFETY: the call just made this descriptor, and nobody else knows it.
    let link = unsafe { OwnedFd::from_raw_fd(fd) };
    let text = path_text(pin)?;
    // SAFETY: the path is a string that ends in NUL and outlives the call.
    check(unsafe { libbpf_sys::bpf_obj_pin(link.as_raw_fd(), text.as_ptr()) })
}

/// Whether the kernel attaches programs to devices by links (tcx, Linux 6.6). Asks for one on a device that cannot be there: a kernel
/// that has them looks for the device, another refuses the kind of link.
pub(crate) fn has_tcx(program: BorrowedFd<'_>) -> bool {
    // SAFETY: no options are given; the other arguments are numbers.
    let fd =
        unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), i32::MAX, libbpf_sys::BPF_TCX_INGRESS, ptr::null()) };
    match check(fd) {
        Err(error) => error.raw_os_error() == Some(libc::ENODEV),
        Ok(()) => {
            // SAFETY: the call just made this descriptor, and nobody else knows it; the link goes with it.
            drop(unsafe { OwnedFd::from_raw_fd(fd) });
            true
        }
    }
}

fn update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    // SAFETY: no options are given; the other arguments are descriptors that outlive the call.
    check(unsafe { libbpf_sys::bpf_link_update(link.as_raw_fd(), program.as_raw_fd(), ptr::null()) })
}

fn unlink(path: &Path) -> Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(e) => Err(Error::kernel("remove the pin", path.display().to_string(), e)),
    }
}

/// Name of a device link's pin.
fn device_pin(ifindex: u32, hook: Hook) -> String {
    format!("dev-{ifindex}-{}", hook.program())
}

/// Name of a cgroup link's pin.
fn cgroup_pin(program: &str) -> String {
    format!("cgroup-{program}")
}

/// The program that a pin of that name runs.
fn program_of(pin: &str) -> Option<&str> {
    pin.strip_prefix("cgroup-").or_else(|| pin.strip_prefix("dev-")?.split_once('-').map(|(_, program)| program))
}

fn kind_of(hook: Hook) -> libbpf_sys::bpf_attach_type {
    match hook {
        Hook::ToPod | Hook::ToUplink => libbpf_sys::BPF_TCX_EGRESS,
        Hook::FromPod | Hook::FromTunnel | Hook::FromUplink => libbpf_sys::BPF_TCX_INGRESS,
        Hook::FromWire => libbpf_sys::BPF_XDP,
    }
}

fn pins_in(dir: &Path) -> Result<Vec<PathBuf>> {
    let failed = |e| Error::kernel("list", dir.display().to_string(), e);
    let entries = fs::read_dir(dir).map_err(failed)?;
    entries.map(|entry| entry.map(|e| e.path()).map_err(failed)).collect()
}

impl Links {
    /// Links pinned in `dir`, which exists, and in the directories of other versions.
    pub(crate) fn new(dir: PathBuf, former: Vec<PathBuf>) -> Self {
        Self { dir, former }
    }

    /// Whether another version's links are still to be taken over.
    pub(crate) fn has_former(&self) -> bool {
        !self.former.is_empty()
    }

    /// Makes the pinned link run `program` on the target; a link whose target is another or gone is replaced. While another
    /// version's link is there, nothing is done.
    fn ensure(
        &self,
        pin: &str,
        wanted: Target,
        on: i32,
        program: BorrowedFd<'_>,
        kind: libbpf_sys::bpf_attach_type,
    ) -> io::Result<()> {
        let path = self.dir.join(pin);
        if let Some(link) = open_pinned(&path)? {
            if target(link.as_fd()) == wanted {
                return update(link.as_fd(), program);
            }
            fs::remove_file(&path)?;
        }
        if self.is_held(pin, wanted)? { Ok(()) } else { create(program, on, kind, &path) }
    }

    /// Whether another version's link is on the target.
    fn is_held(&self, pin: &str, wanted: Target) -> io::Result<bool> {
        for dir in &self.former {
            if open_pinned(&dir.join(pin))?.is_some_and(|link| target(link.as_fd()) == wanted) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Whether a link of ours or of another version is on the device.
    pub(crate) fn is_linked(&self, ifindex: u32, hook: Hook) -> Result<bool> {
        let (pin, wanted) = (device_pin(ifindex, hook), Target::Device(ifindex));
        let failed = |e| Error::kernel("open the link of", format!("{} on device {ifindex}", hook.program()), e);
        let own = open_pinned(&self.dir.join(&pin)).map_err(failed)?;
        Ok(own.is_some_and(|link| target(link.as_fd()) == wanted) || self.is_held(&pin, wanted).map_err(failed)?)
    }

    /// Has other versions' links run our programs (`program` finds one by its name: a program of the same name is attached
    /// to the same place in all versions), and makes them ours. A link beside which there is one of ours, or whose program has
    /// no successor, goes. How many there were; a failure leaves that link as it is, and a later call tries again.
    pub(crate) fn take_over(&mut self, program: impl Fn(&str) -> Option<OwnedFd>) -> Result<usize> {
        let (mut done, mut failure) = (0, None);
        for dir in std::mem::take(&mut self.former) {
            let mut left = false;
            for pin in pins_in(&dir)? {
                match self.take_over_one(&pin, &program) {
                    Ok(()) => done += 1,
                    Err(error) => (left, failure) = (true, Some(error)),
                }
            }
            if left {
                self.former.push(dir);
            }
        }
        failure.map_or(Ok(done), Err)
    }

    fn take_over_one(&self, pin: &Path, program: impl Fn(&str) -> Option<OwnedFd>) -> Result<()> {
        let failed = |e| Error::kernel("take over", pin.display().to_string(), e);
        let Some(link) = open_pinned(pin).map_err(failed)? else { return Ok(()) };
        let name = pin.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let own = self.dir.join(&name);
        let held = target(link.as_fd());
        // A link of ours of that name is where the configuration says now; theirs may be elsewhere.
        let ours = open_pinned(&own).map_err(failed)?.is_some_and(|link| target(link.as_fd()).is_there());
        match program_of(&name).and_then(program).filter(|_| held.is_there() && !ours) {
            Some(program) => {
                update(link.as_fd(), program.as_fd()).map_err(failed)?;
                fs::rename(pin, own).map_err(failed)
            }
            None => unlink(pin).map(drop),
        }
    }

    /// Attaches to a device of the calling thread's network namespace.
    pub(crate) fn attach_device(&self, ifindex: u32, hook: Hook, program: BorrowedFd<'_>) -> Result<()> {
        let object = || format!("{} to device {ifindex}", hook.program());
        let on = i32::try_from(ifindex)
            .ok()
            .filter(|index| *index > 0)
            .ok_or_else(|| Error::Invalid { object: object(), reason: "not a device index" })?;
        self.ensure(&device_pin(ifindex, hook), Target::Device(ifindex), on, program, kind_of(hook))
            .map_err(|e| Error::kernel("attach", object(), e))
    }

    /// Detaches every hook of a device.
    pub(crate) fn detach_device(&self, ifindex: u32) -> Result<()> {
        Hook::ALL.iter().try_for_each(|hook| self.unlink_everywhere(&device_pin(ifindex, *hook)))
    }

    /// Detaches one hook of a device.
    pub(crate) fn detach_hook(&self, ifindex: u32, hook: Hook) -> Result<()> {
        self.unlink_everywhere(&device_pin(ifindex, hook))
    }

    /// Attaches one socket program to a cgroup.
    pub(crate) fn attach_cgroup(
        &self,
        cgroup: &fs::File,
        path: &Path,
        name: &str,
        kind: libbpf_sys::bpf_attach_type,
        program: BorrowedFd<'_>,
    ) -> Result<()> {
        let failed = |e| Error::kernel("attach", format!("{name} to cgroup {}", path.display()), e);
        // A cgroup's id is its directory's inode.
        let id = cgroup.metadata().map_err(failed)?.ino();
        self.ensure(&cgroup_pin(name), Target::Cgroup(id), cgroup.as_raw_fd(), program, kind).map_err(failed)
    }

    /// Detaches the socket programs.
    pub(crate) fn detach_cgroup(&self) -> Result<()> {
        SOCKET_PROGRAMS.iter().try_for_each(|(name, _)| self.unlink_everywhere(&cgroup_pin(name)))
    }

    fn directories(&self) -> impl Iterator<Item = &PathBuf> {
        self.former.iter().chain([&self.dir])
    }

    fn unlink_everywhere(&self, pin: &str) -> Result<()> {
        self.directories().try_for_each(|dir| unlink(&dir.join(pin)).map(drop))
    }

    /// All pins, other versions' first.
    fn pins(&self) -> Result<Vec<PathBuf>> {
        let each: Vec<Vec<PathBuf>> = self.directories().map(|dir| pins_in(dir)).collect::<Result<_>>()?;
        Ok(each.concat())
    }

    /// Removes links whose target is gone.
    pub(crate) fn sweep(&self) -> Result<usize> {
        let mut removed = 0;
        for pin in self.pins()? {
            let link = open_pinned(&pin).map_err(|e| Error::kernel("open", pin.display().to_string(), e))?;
            let Some(link) = link else { continue };
            if matches!(target(link.as_fd()), Target::Device(0) | Target::Cgroup(0)) {
                removed += usize::from(unlink(&pin)?);
            }
        }
        Ok(removed)
    }

    /// Device hooks that are attached, as the kernel says; not those that are still another version's.
    pub(crate) fn attached(&self) -> Result<Vec<(u32, Hook)>> {
        let mut attached = Vec::new();
        for pin in pins_in(&self.dir)? {
            let name = pin.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let Some((_, program)) = name.strip_prefix("dev-").and_then(|rest| rest.split_once('-')) else { continue };
            let Some(hook) = Hook::ALL.into_iter().find(|hook| hook.program() == program) else { continue };
            let link = open_pinned(&pin).map_err(|e| Error::kernel("open", pin.display().to_string(), e))?;
            match link.map(|link| target(link.as_fd())) {
                Some(Target::Device(ifindex)) if ifindex > 0 => attached.push((ifindex, hook)),
                _ => {}
            }
        }
        attached.sort_unstable();
        Ok(attached)
    }

    /// Devices that have a hook's link, ours or another version's.
    pub(crate) fn devices_of(&self, hook: Hook) -> Result<Vec<u32>> {
        let mut devices = Vec::new();
        for pin in self.pins()? {
            let name = pin.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
            let device = name.strip_prefix("dev-").and_then(|rest| rest.split_once('-'));
            devices.extend(
                device
                    .filter(|(_, program)| *program == hook.program())
                    .and_then(|(index, _)| index.parse::<u32>().ok()),
            );
        }
        Ok(devices)
    }

    /// Removes all of them, other versions' too.
    pub(crate) fn remove_all(&self) -> Result<()> {
        self.pins()?.iter().try_for_each(|pin| unlink(pin).map(|_| ()))
    }
}
