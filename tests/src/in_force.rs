//! What a node's agent says that its kernel enforces: its acknowledgement of what was written to the API server.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::field;

/// One write, as a node acknowledges it.
#[derive(Clone, Debug)]
pub enum Written {
    /// An object with its version: of a kind whose objects agents tell by name.
    Object(&'static str, String, u64),
    /// An object is gone that the node had acknowledged before.
    Deleted(&'static str, String),
    /// A pod's version.
    Pod(u64),
}

/// The version of an object as the API server answered a write.
///
/// # Errors
/// It has none.
pub fn version(object: &Value) -> Result<u64> {
    let text = field(object, "/metadata/resourceVersion");
    text.parse().with_context(|| format!("resourceVersion {text:?} of {object}"))
}

/// Where a lab's agents answer.
#[derive(Clone, Debug)]
pub struct Acknowledging {
    socket: PathBuf,
}

impl Acknowledging {
    /// The agent of a lab's node.
    pub fn of(lab: &str, node: &str) -> Self {
        Self { socket: Path::new("/run/towpath/lab").join(lab).join("nodes").join(node).join("towpath/policy.sock") }
    }

    /// What it says now.
    ///
    /// # Errors
    /// There is no agent at the moment.
    pub fn says(&self) -> Result<Value> {
        let mut stream = UnixStream::connect(&self.socket).context("no agent")?;
        stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        serde_json::from_str(&text).with_context(|| text.clone())
    }

    /// Whether these are all objects of a kind that it enforces, and in these versions.
    ///
    /// # Errors
    /// As [`Acknowledging::says`].
    pub fn has_exactly(&self, kind: &str, objects: &BTreeMap<String, u64>) -> Result<bool> {
        let says = self.says()?;
        let have = says.get("kinds").and_then(|kinds| kinds.get(kind)?.get("objects")?.as_object());
        let have =
            have.map(|have| have.iter().map(|(name, v)| (name.clone(), v.as_u64().unwrap_or_default())).collect());
        Ok(have.is_some_and(|have: BTreeMap<String, u64>| have == *objects))
    }

    /// Whether a write is in force.
    ///
    /// # Errors
    /// As [`Acknowledging::says`].
    pub fn has(&self, written: &Written) -> Result<bool> {
        let says = self.says()?;
        let of = |kind: &str| says.get("kinds").and_then(|kinds| kinds.get(kind)).cloned();
        let object = |kind: &str, name: &str| of(kind).map(|of| of.get("objects").and_then(|o| o.get(name)?.as_u64()));
        Ok(match written {
            Written::Object(kind, name, version) => object(kind, name).flatten().is_some_and(|have| have >= *version),
            // A kind that was not listed yet is no proof.
            Written::Deleted(kind, name) => object(kind, name).is_some_and(|have| have.is_none()),
            Written::Pod(version) => {
                of("Pod").and_then(|of| of.get("newest")?.as_u64()).is_some_and(|have| have >= *version)
            }
        })
    }
}
