//! The error of the facade.

use std::io;
use std::path::PathBuf;

use crate::{bpf, net};

/// What went wrong, on which object.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Devices, routes, nftables, sysctls.
    #[error(transparent)]
    Net(#[from] net::Error),
    /// Programs, maps, links.
    #[error(transparent)]
    Bpf(#[from] bpf::Error),
    /// A pod could not be attached; what was made for it has been taken back.
    #[error("pod {pod}: {source}")]
    Pod {
        /// Namespace and name.
        pod: String,
        /// Why.
        source: Box<Error>,
    },
    /// A pod cannot have what somebody chose for it; the text says why.
    #[error("{0}")]
    Choice(String),
    /// A record of an attached pod could not be read, written or removed.
    #[error("{operation} {}: {source}", path.display())]
    Record {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The node's data path thread is gone: it panicked, or was shut down.
    #[error("the data path thread has ended; the log says why, restart the agent")]
    Stopped,
    /// Several things went wrong; the rest was done.
    #[error("{}", listed(.0))]
    Several(Vec<Error>),
}

impl Error {
    /// Whether it is who chose something for a pod that can help.
    pub fn is_choice(&self) -> bool {
        match self {
            Error::Choice(_) => true,
            Error::Pod { source, .. } => source.is_choice(),
            _ => false,
        }
    }

    /// Success when there are no errors, else all of them.
    pub(crate) fn collect(mut errors: Vec<Error>) -> Result<(), Error> {
        match errors.len() {
            0 => Ok(()),
            1 => errors.pop().map_or(Ok(()), Err),
            _ => Err(Error::Several(errors)),
        }
    }
}

fn listed(errors: &[Error]) -> String {
    errors.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ")
}
