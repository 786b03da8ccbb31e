//! Network configuration: what a plugin reads from standard input.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::attachment::is_identifier;
use super::{
    AddResult, Attachment, CniError, DEFAULT_RUN_DIR, DEFAULT_STATE_DIR, ErrorCode, RuntimeBandwidth, SOCKET_NAME,
    Version,
};

/// A network configuration in the form that the runtime hands to one plugin of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkConfig {
    /// Version of the exchange.
    pub version: Version,
    /// Name of the network.
    pub name: String,
    /// The agent's socket: `socket`, else `cni.sock` in `runDir`, else in [`DEFAULT_RUN_DIR`].
    pub socket: PathBuf,
    /// Where DELs are queued when the agent is not there: `stateDir`, else [`DEFAULT_STATE_DIR`].
    pub state_dir: PathBuf,
    /// What the plugins before this one made.
    pub prev_result: Option<AddResult>,
    /// GC: all attachments of this network that are still in use (`cni.dev/valid-attachments`).
    pub valid_attachments: Option<Vec<Attachment>>,
    /// ADD: limits that the runtime asks for (`runtimeConfig.bandwidth`, for who declares the capability).
    pub bandwidth: Option<RuntimeBandwidth>,
}

impl NetworkConfig {
    /// Reads what the runtime wrote to standard input.
    ///
    /// Fields that are not ours (`capabilities`, `args`, what else is in `runtimeConfig`, …) are ignored, as the specification asks.
    pub fn parse(bytes: &[u8]) -> Result<Self, CniError> {
        let object = Self::object(bytes)?;
        let version = Self::version_of(&object)?;
        let name = text(&object, "name")?.unwrap_or_default();
        if !is_identifier(&name) {
            return Err(invalid(format!(
                "name {name:?} must be letters, digits, '_', '.' and '-', beginning with a letter or digit"
            )));
        }
        text(&object, "type")?;
        let socket = match (path(&object, "socket")?, path(&object, "runDir")?) {
            (Some(socket), _) => socket,
            (None, Some(dir)) => dir.join(SOCKET_NAME),
            (None, None) => Path::new(DEFAULT_RUN_DIR).join(SOCKET_NAME),
        };
        let prev_result = match object.get("prevResult") {
            None | Some(Value::Null) => None,
            Some(value) => Some(AddResult::parse(value, version)?),
        };
        Ok(Self {
            version,
            name,
            socket,
            state_dir: path(&object, "stateDir")?.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
            prev_result,
            valid_attachments: valid_attachments(&object)?,
            bandwidth: bandwidth(&object)?,
        })
    }

    /// The version that the configuration asks for, when it can be made out: in which to write errors about the rest.
    pub fn version_hint(bytes: &[u8]) -> Version {
        Self::object(bytes).and_then(|o| Self::version_of(&o)).unwrap_or(Version::V1_1_0)
    }

    fn object(bytes: &[u8]) -> Result<Map<String, Value>, CniError> {
        let decode =
            |why: String| CniError::new(ErrorCode::Decode, format!("network configuration on standard input: {why}"));
        match serde_json::from_slice(bytes) {
            Ok(Value::Object(object)) => Ok(object),
            Ok(_) => Err(decode("is not a JSON object".to_owned())),
            Err(_) if bytes.iter().all(u8::is_ascii_whitespace) => Err(decode("is empty".to_owned())),
            Err(error) => Err(decode(error.to_string())),
        }
    }

    fn version_of(object: &Map<String, Value>) -> Result<Version, CniError> {
        let incompatible = |msg: String| {
            CniError::new(ErrorCode::IncompatibleVersion, msg).hint(format!("supported: {}", Version::listed()))
        };
        match text(object, "cniVersion")? {
            None => Err(incompatible("cniVersion is missing, which means 0.1.0".to_owned())),
            Some(text) => {
                Version::parse(&text).ok_or_else(|| incompatible(format!("cniVersion {text:?} is not supported")))
            }
        }
    }
}

fn invalid(why: String) -> CniError {
    CniError::new(ErrorCode::InvalidConfig, format!("network configuration: {why}"))
}

fn text(object: &Map<String, Value>, field: &str) -> Result<Option<String>, CniError> {
    match object.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(invalid(format!("{field} must be a string"))),
    }
}

fn path(object: &Map<String, Value>, field: &str) -> Result<Option<PathBuf>, CniError> {
    match text(object, field)? {
        Some(path) if Path::new(&path).is_absolute() => Ok(Some(path.into())),
        Some(path) => Err(invalid(format!("{field} {path:?} must be an absolute path"))),
        None => Ok(None),
    }
}

/// The bursts that come with it are not used: ours follow from the rates.
fn bandwidth(object: &Map<String, Value>) -> Result<Option<RuntimeBandwidth>, CniError> {
    match object.get("runtimeConfig").and_then(|config| config.get("bandwidth")) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => serde_json::from_value(value.clone())
            .map(Some)
            .map_err(|error| invalid(format!("runtimeConfig.bandwidth: {error}"))),
    }
}

/// libcni also writes the older name `cni.dev/attachments`; either will do.
fn valid_attachments(object: &Map<String, Value>) -> Result<Option<Vec<Attachment>>, CniError> {
    let Some((field, value)) = ["cni.dev/valid-attachments", "cni.dev/attachments"]
        .into_iter()
        .find_map(|field| object.get(field).map(|value| (field, value)))
    else {
        return Ok(None);
    };
    if value.is_null() {
        return Ok(Some(Vec::new()));
    }
    serde_json::from_value(value.clone()).map(Some).map_err(|error| invalid(format!("{field}: {error}")))
}
