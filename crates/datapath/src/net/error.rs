//! Errors of this half: which operation on which object, and why the kernel refused.

use std::io;
use std::path::PathBuf;

/// A change or a question to the kernel that failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel refused a netlink request.
    #[error("{operation}: {source}{}", bracketed(.detail))]
    Netlink {
        /// What was asked, with the object: `add route 10.244.1.0/24`.
        operation: String,
        /// The kernel's own explanation, empty when it gave none.
        detail: String,
        /// The error number.
        source: io::Error,
    },
    /// The kernel answered with what we cannot read.
    #[error("{operation}: the kernel's answer cannot be read: {reason}")]
    Answer {
        /// What was asked.
        operation: String,
        /// What is wrong with the answer.
        reason: String,
    },
    /// A sysctl could not be read or written.
    #[error("sysctl {}: {source}; check that /proc/sys is mounted and writable for this process", path.display())]
    Sysctl {
        /// The file below /proc/sys.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another system call failed.
    #[error("{operation}: {source}")]
    System {
        /// What was tried, with the object.
        operation: String,
        /// Why.
        source: io::Error,
    },
    /// nftables refused the ruleset, or `nft` could not be run.
    #[error("nftables table inet towpath: {reason}")]
    Nft {
        /// What `nft` said, and what to do.
        reason: String,
    },
    /// What was asked cannot be done as things are; the text says what to change.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// A failed system call.
    pub fn system(operation: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::System { operation: operation.into(), source: source.into() }
    }

    /// The kernel's error number, when there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Netlink { source, .. } | Self::Sysctl { source, .. } | Self::System { source, .. } => {
                source.raw_os_error()
            }
            Self::Answer { .. } | Self::Nft { .. } | Self::Refused(_) => None,
        }
    }

    /// Whether the object that the request spoke of is not there (any more).
    pub fn is_absent(&self) -> bool {
        matches!(self.errno(), Some(libc::ENODEV | libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENXIO))
    }

    /// Whether an object of that name or key is there already.
    pub fn is_present(&self) -> bool {
        self.errno() == Some(libc::EEXIST)
    }
}

fn bracketed(detail: &str) -> String {
    if detail.is_empty() { String::new() } else { format!(" ({detail})") }
}
