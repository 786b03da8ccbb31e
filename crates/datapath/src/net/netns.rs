//! Work in another network namespace, on a short-lived thread of its own: a thread that entered a namespace never
//! comes back, so no caller's thread is ever left in the wrong one.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use super::error::Error;

/// Runs `work` on a new thread that has entered `netns`, and waits for it.
pub fn within<R: Send>(netns: BorrowedFd<'_>, work: impl FnOnce() -> Result<R, Error> + Send) -> Result<R, Error> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("towpath-netns".to_owned()).spawn_scoped(scope, move || {
            setns(netns, CloneFlags::CLONE_NEWNET)
                .map_err(|e| Error::system("enter the pod's network namespace", e))?;
            work()
        });
        let thread = thread.map_err(|e| Error::system("start a thread for the pod's network namespace", e))?;
        thread.join().unwrap_or_else(|_| {
            Err(Error::Refused(
                "the thread that worked in the pod's network namespace panicked; see the log".to_owned(),
            ))
        })
    })
}

/// The calling thread's network namespace as a file descriptor.
pub fn current() -> Result<OwnedFd, Error> {
    let path = "/proc/thread-self/ns/net";
    let file = std::fs::File::open(path).map_err(|e| Error::system(format!("open {path}"), e))?;
    Ok(file.into())
}

/// The cookie of the calling thread's network namespace: unique since boot, what `bpf_get_netns_cookie` returns.
pub fn cookie() -> Result<u64, Error> {
    let probe = socket(AddressFamily::Unix, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)
        .map_err(|e| Error::system("open a socket to read the network namespace's cookie", e))?;
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the descriptor is open for the whole call, and the kernel writes at most `length` bytes to `cookie`, whose
    // size it is.
    let result = unsafe {
        libc::getsockopt(
            probe.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(Error::system("read the network namespace's cookie", std::io::Error::last_os_error()));
    }
    Ok(cookie)
}
