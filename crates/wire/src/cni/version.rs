//! Versions of the CNI specification that we speak.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A version of the CNI specification.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Version {
    /// 0.3.1.
    #[serde(rename = "0.3.1")]
    V0_3_1,
    /// 0.4.0: adds CHECK.
    #[serde(rename = "0.4.0")]
    V0_4_0,
    /// 1.0.0: `ips[].version` is gone.
    #[serde(rename = "1.0.0")]
    V1_0_0,
    /// 1.1.0: adds GC and STATUS, and more fields of interfaces and routes.
    #[serde(rename = "1.1.0")]
    V1_1_0,
}

impl Version {
    /// All of them, oldest first.
    pub const SUPPORTED: [Version; 4] = [Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::V1_1_0];

    /// The version that a `cniVersion` field names, if it is one of ours.
    pub fn parse(text: &str) -> Option<Version> {
        Version::SUPPORTED.into_iter().find(|v| v.as_str() == text)
    }

    /// As a `cniVersion` field holds it.
    pub fn as_str(self) -> &'static str {
        match self {
            Version::V0_3_1 => "0.3.1",
            Version::V0_4_0 => "0.4.0",
            Version::V1_0_0 => "1.0.0",
            Version::V1_1_0 => "1.1.0",
        }
    }

    /// All of them as text, for messages: `0.3.1, 0.4.0, 1.0.0, 1.1.0`.
    pub fn listed() -> String {
        Version::SUPPORTED.map(Version::as_str).join(", ")
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
