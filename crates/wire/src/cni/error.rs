//! Errors as the CNI specification wants them: a code, a short message, details.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Version;

/// What kind of failure. Codes below 100 are the specification's ("Error"), from 100 up ours.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub enum ErrorCode {
    /// 1: the configuration's version is none of ours, or does not have the verb.
    IncompatibleVersion,
    /// 2: a field of the configuration is not supported.
    UnsupportedField,
    /// 3: the container is unknown or does not exist; the runtime need not clean up.
    UnknownContainer,
    /// 4: a CNI_* variable is missing or wrong.
    InvalidEnvironment,
    /// 5: reading or writing failed.
    Io,
    /// 6: the configuration is not JSON.
    Decode,
    /// 7: the configuration is JSON and wrong.
    InvalidConfig,
    /// 11: a transient condition; the runtime should try again.
    TryAgain,
    /// 50: STATUS: ADD cannot be served now.
    NotAvailable,
    /// 51: STATUS: ADD cannot be served and running containers may have limited connectivity.
    LimitedConnectivity,
    /// 100: no free address in the node's pod range.
    Exhausted,
    /// 101: the pod's device could not be made or removed.
    Plumbing,
    /// 102: the lease could not be written to or read from disk.
    State,
    /// 103: CHECK found a difference.
    Mismatch,
    /// 104: the request is for a sandbox of a pod that has since been replaced.
    StaleSandbox,
    /// 105: the pod asks for an address that it cannot have.
    Choice,
    /// Any other.
    Other(u32),
}

impl From<u32> for ErrorCode {
    fn from(code: u32) -> Self {
        match code {
            1 => Self::IncompatibleVersion,
            2 => Self::UnsupportedField,
            3 => Self::UnknownContainer,
            4 => Self::InvalidEnvironment,
            5 => Self::Io,
            6 => Self::Decode,
            7 => Self::InvalidConfig,
            11 => Self::TryAgain,
            50 => Self::NotAvailable,
            51 => Self::LimitedConnectivity,
            100 => Self::Exhausted,
            101 => Self::Plumbing,
            102 => Self::State,
            103 => Self::Mismatch,
            104 => Self::StaleSandbox,
            105 => Self::Choice,
            other => Self::Other(other),
        }
    }
}

impl From<ErrorCode> for u32 {
    fn from(code: ErrorCode) -> u32 {
        match code {
            ErrorCode::IncompatibleVersion => 1,
            ErrorCode::UnsupportedField => 2,
            ErrorCode::UnknownContainer => 3,
            ErrorCode::InvalidEnvironment => 4,
            ErrorCode::Io => 5,
            ErrorCode::Decode => 6,
            ErrorCode::InvalidConfig => 7,
            ErrorCode::TryAgain => 11,
            ErrorCode::NotAvailable => 50,
            ErrorCode::LimitedConnectivity => 51,
            ErrorCode::Exhausted => 100,
            ErrorCode::Plumbing => 101,
            ErrorCode::State => 102,
            ErrorCode::Mismatch => 103,
            ErrorCode::StaleSandbox => 104,
            ErrorCode::Choice => 105,
            ErrorCode::Other(code) => code,
        }
    }
}

/// An error for the container runtime.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CniError {
    /// What kind.
    pub code: ErrorCode,
    /// What happened, to which object.
    pub msg: String,
    /// What to check or run next; may be empty.
    #[serde(default)]
    pub details: String,
}

impl CniError {
    /// An error without details.
    pub fn new(code: ErrorCode, msg: impl Into<String>) -> Self {
        Self { code, msg: msg.into(), details: String::new() }
    }

    /// The same with what to check or run next.
    #[must_use]
    pub fn hint(mut self, details: impl Into<String>) -> Self {
        self.details = details.into();
        self
    }

    /// As it goes to standard output.
    pub fn to_json(&self, version: Version) -> Value {
        let mut value = json!({ "cniVersion": version.as_str(), "code": u32::from(self.code), "msg": self.msg });
        if !self.details.is_empty()
            && let Some(object) = value.as_object_mut()
        {
            object.insert("details".to_owned(), Value::from(self.details.clone()));
        }
        value
    }
}

impl fmt::Display for CniError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (CNI code {})", self.msg, u32::from(self.code))?;
        if self.details.is_empty() { Ok(()) } else { write!(f, "; {}", self.details) }
    }
}

impl std::error::Error for CniError {}
