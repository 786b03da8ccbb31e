//! A lease and its file: one line of JSON, then one line with a checksum of the first, so that a torn or altered file is
//! found out instead of believed.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};
use towpath_model::NamespacedName;
use towpath_model::desired::LocalPod;
use towpath_wire::cni::Attachment;

/// Addresses that a container's attachment holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// Container and interface.
    pub owner: Attachment,
    /// Name of the CNI network.
    pub network: String,
    /// The pod; none: a container that Kubernetes does not know.
    pub pod: Option<NamespacedName>,
    /// The pod's uid as the runtime gave it; may be empty.
    pub uid: String,
    /// Path of the network namespace as the runtime gave it, for people.
    pub netns: String,
    /// The addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// What ADD made; none: ADD has not been answered.
    pub attached: Option<AttachedDevice>,
}

/// What ADD made, so that a restarted agent knows what it cannot read from the kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedDevice {
    /// The pod in the kernel.
    pub pod: LocalPod,
    /// MTU of its device in bytes.
    pub mtu: u32,
}

/// Why a file is no lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotALease {
    /// It ends before its checksum.
    #[error("it is truncated")]
    Truncated,
    /// The checksum is of something else.
    #[error("its checksum does not match its contents")]
    Checksum,
    /// It is not the JSON of a lease.
    #[error("it is no lease: {0}")]
    Contents(String),
    /// It is another's.
    #[error("it is the lease of {0}, under another's name")]
    OtherOwner(Attachment),
}

impl Lease {
    /// The file's contents.
    pub fn to_file(&self) -> Result<Vec<u8>, serde_json::Error> {
        let mut text = serde_json::to_vec(self)?;
        let sum = fnv1a64(&text);
        text.extend_from_slice(format!("\nfnv1a64:{sum:016x}\n").as_bytes());
        Ok(text)
    }

    /// Reads the file of `owner`.
    pub fn from_file(owner: &Attachment, contents: &[u8]) -> Result<Self, NotALease> {
        let text = std::str::from_utf8(contents).map_err(|_| NotALease::Checksum)?;
        let (json, rest) = text.split_once('\n').ok_or(NotALease::Truncated)?;
        let sum = rest.strip_suffix('\n').ok_or(NotALease::Truncated)?;
        if sum != format!("fnv1a64:{:016x}", fnv1a64(json.as_bytes())) {
            return Err(NotALease::Checksum);
        }
        let lease: Lease = serde_json::from_str(json).map_err(|e| NotALease::Contents(e.to_string()))?;
        if lease.owner == *owner { Ok(lease) } else { Err(NotALease::OtherOwner(lease.owner)) }
    }
}

/// FNV-1a, 64 bits: finds damage, not malice (the directory is root's).
fn fnv1a64(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}
