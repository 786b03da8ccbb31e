//! The device of the backend `udp`: a TAP device that outlives whoever reads it, with as many queues as are opened.
//!
//! A frame of it has a virtio header, so that the kernel leaves packets whole that are to be cut, and checksums that are to be made. It is a TAP
//! device, not a TUN device, for the addresses of a frame say between which nodes it goes (`bpf/abi.h`).
//!
//! A queue is a file descriptor, and whoever holds it needs no rights. Unsafe: the calls that are not in `nix`.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use super::error::Error;

/// The device's name.
pub const UDP_DEVICE: &str = "towpath-udp";
/// Where TUN and TAP devices are made.
const CLONE: &str = "/dev/net/tun";
/// Frames that wait for their reader, each of up to 64 KiB.
pub const WAITING: u32 = 2048;

/// linux/if_tun.h.
const TUNSETIFF: libc::Ioctl = 0x4004_54ca_u32 as libc::Ioctl;
const TUNSETPERSIST: libc::Ioctl = 0x4004_54cb_u32 as libc::Ioctl;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0_u32 as libc::Ioctl;
const TUNSETSTEERINGEBPF: libc::Ioctl = 0x8004_54e0_u32 as libc::Ioctl;
const IFF_TAP: libc::c_int = 0x0002;
const IFF_MULTI_QUEUE: libc::c_int = 0x0100;
const IFF_NO_PI: libc::c_int = 0x1000;
const IFF_VNET_HDR: libc::c_int = 0x4000;
const TUN_F_CSUM: libc::c_ulong = 0x01;
const TUN_F_TSO4: libc::c_ulong = 0x02;
const TUN_F_TSO6: libc::c_ulong = 0x04;
const TUN_F_TSO_ECN: libc::c_ulong = 0x08;
const TUN_F_USO4: libc::c_ulong = 0x20;
const TUN_F_USO6: libc::c_ulong = 0x40;

/// Makes the device, down, or finds that it is there.
///
/// # Errors
/// `/dev/net/tun` is not there or not to be opened, or a device of the name is of another kind.
pub fn make(name: &str) -> Result<(), Error> {
    let queue = attach(name)?;
    // SAFETY: the file is open, and the argument is a number.
    let made = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETPERSIST, 1 as libc::c_ulong) };
    done(made, || format!("have device {name} stay"))
}

/// Queues of a device.
#[derive(Debug)]
pub struct Queues {
    /// One file descriptor each; a read that would wait does not.
    pub queues: Vec<OwnedFd>,
    /// Whether the device takes UDP that is to be cut (Linux 6.2).
    pub cuts_udp: bool,
}

/// Opens queues of the device, which [`make`] made. With the first the device gets its carrier.
///
/// # Errors
/// As [`make`], or more queues than the kernel gives a device (256).
pub fn open(name: &str, count: usize) -> Result<Queues, Error> {
    let mut queues = Vec::new();
    let mut cuts_udp = true;
    for _ in 0..count {
        let queue = attach(name)?;
        let least = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN;
        // SAFETY: the file is open, and the argument is a number.
        let offload = |what: libc::c_ulong| unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, what) };
        cuts_udp = cuts_udp && offload(least | TUN_F_USO4 | TUN_F_USO6) == 0;
        if !cuts_udp {
            done(offload(least), || format!("have device {name} take packets that are to be cut"))?;
        }
        queues.push(queue.into());
    }
    Ok(Queues { queues, cuts_udp })
}

/// Has a program say by which queue of a device a frame goes (`BPF_PROG_TYPE_SOCKET_FILTER`), from now on; `queue` is one of the device's. The
/// device keeps the program.
///
/// # Errors
/// The kernel takes no such program.
pub fn steer(name: &str, queue: &OwnedFd, program: &OwnedFd) -> Result<(), Error> {
    let program: libc::c_int = program.as_raw_fd();
    // SAFETY: both files are open, and the kernel reads `program` during the call.
    let set = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETSTEERINGEBPF, &raw const program) };
    done(set, || format!("have flows of device {name} keep to one queue each"))
}

fn attach(name: &str) -> Result<File, Error> {
    let opened = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(CLONE);
    let file = opened.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => Error::Refused(format!(
            "{CLONE} is not there: load the kernel's module `tun` on the node, and give the agent's container /dev/net"
        )),
        _ => Error::system(format!("open {CLONE}"), e),
    })?;
    // SAFETY: all zero is a value of this plain struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(libc::IFNAMSIZ - 1)) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE) as libc::c_short;
    // SAFETY: the file is open, and `request` lives through the call, which reads it and writes the name back.
    let made = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    done(made, || format!("open a queue of device {name}"))?;
    Ok(file)
}

fn done(result: libc::c_int, operation: impl FnOnce() -> String) -> Result<(), Error> {
    match result {
        -1 => Err(Error::system(operation(), io::Error::last_os_error())),
        _ => Ok(()),
    }
}
