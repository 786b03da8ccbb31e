//! What one ADD made and one DEL removes: a container and an interface in it.

use std::fmt;

use serde::{Deserialize, Serialize};

const DELETE_SUFFIX: &str = ".del";

/// A container's attachment, by container id and interface name: the key of leases, devices and queued DELs.
///
/// Both parts are checked, so either can be part of a file name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "Raw", into = "Raw")]
pub struct Attachment {
    container_id: String,
    ifname: String,
}

/// As JSON holds it (specification 1.1.0, `cni.dev/valid-attachments`).
#[derive(Serialize, Deserialize)]
struct Raw {
    #[serde(rename = "containerID")]
    container_id: String,
    ifname: String,
}

/// Why text is no container id or interface name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Malformed {
    /// The container id.
    ContainerId(String),
    /// The interface name.
    Ifname(String),
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::ContainerId(text) => write!(
                f,
                "container id {text:?} must be 1 to 200 of letters, digits, '_', '.' and '-', beginning with a letter or digit"
            ),
            Self::Ifname(text) => write!(
                f,
                "interface name {text:?} must be 1 to 15 bytes without '/', ':', blanks and control characters, and not '.' or '..'"
            ),
        }
    }
}

impl std::error::Error for Malformed {}

impl Attachment {
    /// Both parts, checked: the specification's pattern for container ids, the kernel's for device names.
    pub fn new(container_id: &str, ifname: &str) -> Result<Self, Malformed> {
        if !is_identifier(container_id) || container_id.len() > 200 {
            return Err(Malformed::ContainerId(container_id.chars().take(256).collect()));
        }
        let plain = |c: char| !c.is_whitespace() && !c.is_control() && c != '/' && c != ':';
        if ifname.is_empty() || ifname.len() > 15 || matches!(ifname, "." | "..") || !ifname.chars().all(plain) {
            return Err(Malformed::Ifname(ifname.chars().take(64).collect()));
        }
        Ok(Self { container_id: container_id.to_owned(), ifname: ifname.to_owned() })
    }

    /// The container id.
    pub fn container_id(&self) -> &str {
        &self.container_id
    }

    /// The interface's name in the container.
    pub fn ifname(&self) -> &str {
        &self.ifname
    }

    /// `<container id>@<interface>`: at most 216 bytes, unambiguous because container ids have no `@`.
    pub fn file_stem(&self) -> String {
        format!("{}@{}", self.container_id, self.ifname)
    }

    /// The reverse of [`Attachment::file_stem`].
    pub fn from_file_stem(stem: &str) -> Option<Self> {
        let (container_id, ifname) = stem.split_once('@')?;
        Self::new(container_id, ifname).ok()
    }

    /// The file that queues this attachment's DEL, in [`DELETES_NAME`](super::DELETES_NAME).
    pub fn delete_file(&self) -> String {
        format!("{}{DELETE_SUFFIX}", self.file_stem())
    }

    /// The reverse of [`Attachment::delete_file`].
    pub fn from_delete_file(name: &str) -> Option<Self> {
        name.strip_suffix(DELETE_SUFFIX).and_then(Self::from_file_stem)
    }
}

/// The specification's pattern for container ids and network names: `^[a-zA-Z0-9][a-zA-Z0-9_.\-]*$`.
pub(super) fn is_identifier(text: &str) -> bool {
    text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

impl fmt::Display for Attachment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of container {}", self.ifname, self.container_id)
    }
}

impl TryFrom<Raw> for Attachment {
    type Error = Malformed;

    fn try_from(raw: Raw) -> Result<Self, Malformed> {
        Self::new(&raw.container_id, &raw.ifname)
    }
}

impl From<Attachment> for Raw {
    fn from(attachment: Attachment) -> Self {
        Self { container_id: attachment.container_id, ifname: attachment.ifname }
    }
}
