//! What can go wrong between us and the kernel's BPF objects: every error names the operation and the object.

use std::io;

use super::features::Feature;
use super::object::limit_name;

/// An error of the loader or of an `apply_*`.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// libbpf refused: `operation` names what was tried, `object` on which program, map or device.
    #[error("cannot {operation} {object}: {source}")]
    Bpf {
        /// What was tried.
        operation: &'static str,
        /// On which program, map, link, device or path.
        object: String,
        /// libbpf's reason.
        #[source]
        source: libbpf_rs::Error,
    },
    /// The kernel refused a system call.
    #[error("cannot {operation} {object}: {source}")]
    Kernel {
        /// What was tried.
        operation: &'static str,
        /// On which program, map, link, device or path.
        object: String,
        /// The kernel's reason.
        #[source]
        source: io::Error,
    },
    /// The kernel lacks what the programs need.
    #[error(
        "kernel {release} is too old or built without what Towpath needs: {}; run Linux 6.1 or newer \
         (Debian 12, Ubuntu 24.04 and what came after them have it)", listed(.missing)
    )]
    Unsupported {
        /// `uname -r`.
        release: String,
        /// What was looked for and is not there.
        missing: Vec<Feature>,
    },
    /// The verifier refused a program though the kernel has all that is needed: the log's last lines say why.
    #[error("the kernel's verifier refused the programs: {source}; please report it with the kernel's release\n{log}")]
    Verifier {
        /// Last lines of the verifier's log.
        log: String,
        /// libbpf's reason.
        #[source]
        source: libbpf_rs::Error,
    },
    /// A map is at its limit.
    #[error("map {map} is full at {limit} entries: {}", how_to_raise(map))]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Entries it may hold.
        limit: u32,
    },
    /// The object that was built in lacks a map or program that this code expects, or has it in another layout.
    #[error("the built-in BPF object and this program disagree about {what}; rebuild from one source tree")]
    Mismatch {
        /// Which map or program.
        what: String,
    },
    /// What was handed over cannot be expressed.
    #[error("{object}: {reason}")]
    Invalid {
        /// The object.
        object: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

fn how_to_raise(map: &str) -> String {
    match limit_name(map) {
        Some(name) => format!(
            "raise limits.{name} in agent.yaml of ConfigMap kube-system/towpath, and restart DaemonSet kube-system/towpath \
             (a larger map takes over what the smaller one holds)"
        ),
        None => "its size is not configured; have fewer of what it holds".to_owned(),
    }
}

fn listed(missing: &[Feature]) -> String {
    missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}

impl Error {
    /// An error of the kernel.
    pub(crate) fn kernel(operation: &'static str, object: impl Into<String>, source: io::Error) -> Self {
        Error::Kernel { operation, object: object.into(), source }
    }

    /// An error of libbpf.
    pub(crate) fn bpf(operation: &'static str, object: impl Into<String>, source: libbpf_rs::Error) -> Self {
        Error::Bpf { operation, object: object.into(), source }
    }
}

/// Result of everything in this module.
pub type Result<T> = std::result::Result<T, Error>;
