//! Pseudo-terminals as async byte streams.

use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags};
use rustix::termios::Winsize;
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use crate::kernel::ns;

/// The side of a terminal that a person's keyboard and screen are on. Clones share it.
#[derive(Clone)]
pub(crate) struct Terminal(Arc<AsyncFd<OwnedFd>>);

impl Terminal {
    /// A new terminal of the machine and the side that the process gets.
    pub(crate) fn open() -> anyhow::Result<(Self, OwnedFd)> {
        let (master, slave) = open_pair(c"/dev/ptmx")?;
        Self::watch(master, slave)
    }

    /// A new terminal of the container whose process 1 this is, so that programs inside find it in `/dev/pts`.
    pub(crate) async fn open_in(pid: u32) -> anyhow::Result<(Self, OwnedFd)> {
        let (master, slave) = ns::in_thread("terminal", move || {
            unshare(CloneFlags::CLONE_FS).context("leave the other threads' file system view")?;
            ns::enter(Path::new(&format!("/proc/{pid}/ns/mnt")), CloneFlags::CLONE_NEWNS)?;
            open_pair(c"/dev/pts/ptmx")
        })
        .await?;
        Self::watch(master, slave)
    }

    fn watch(master: OwnedFd, slave: OwnedFd) -> anyhow::Result<(Self, OwnedFd)> {
        rustix::io::ioctl_fionbio(&master, true).context("make a pseudo-terminal non-blocking")?;
        #[allow(
            deprecated,
            reason = "the safe constructor is deprecated for types that change their descriptor; OwnedFd does not"
        )]
        let watched = AsyncFd::new(master).context("watch a pseudo-terminal")?;
        Ok((Self(Arc::new(watched)), slave))
    }

    /// Tells the process the size of the person's window.
    pub(crate) fn resize(&self, columns: u16, rows: u16) {
        let size = Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        if let Err(error) = rustix::termios::tcsetwinsize(self.0.get_ref(), size) {
            tracing::debug!(%error, "terminal size not set");
        }
    }
}

/// Opens a terminal at this multiplexer, and its other side, which only exists in the same mount namespace.
fn open_pair(multiplexer: &CStr) -> anyhow::Result<(OwnedFd, OwnedFd)> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC;
    let master = rustix::fs::open(multiplexer, flags, Mode::empty()).context("open a pseudo-terminal")?;
    rustix::pty::unlockpt(&master).context("unlock a pseudo-terminal")?;
    let name = rustix::pty::ptsname(&master, Vec::new()).context("name a pseudo-terminal")?;
    let slave = rustix::fs::open(name.as_c_str(), flags, Mode::empty()).context("open a pseudo-terminal's end")?;
    Ok((master, slave))
}

impl AsyncRead for Terminal {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.0.poll_read_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::read(fd.get_ref(), buf.initialize_unfilled())?)) {
                Ok(Ok(count)) => {
                    buf.advance(count);
                    return Poll::Ready(Ok(()));
                }
                // What the kernel says when the last process on the other side is gone.
                Ok(Err(error)) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => {
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Terminal {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            let mut guard = ready!(self.0.poll_write_ready(cx))?;
            match guard.try_io(|fd| Ok(rustix::io::write(fd.get_ref(), data)?)) {
                Ok(result) => return Poll::Ready(result),
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
