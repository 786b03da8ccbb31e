//! The CNI_* variables, checked.

use std::ffi::OsString;

use towpath_wire::cni::{Attachment, CniError, ErrorCode, PodIdentity};

/// Where variables come from: the process's environment, or a test.
pub(crate) trait Lookup: Fn(&str) -> Option<OsString> {}
impl<F: Fn(&str) -> Option<OsString>> Lookup for F {}

/// A verb (`CNI_COMMAND`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

fn wrong(why: String) -> CniError {
    CniError::new(ErrorCode::InvalidEnvironment, why)
}

/// A variable's text; none if it is not set or empty.
fn text(lookup: &impl Lookup, name: &str) -> Result<Option<String>, CniError> {
    match lookup(name).map(OsString::into_string) {
        None => Ok(None),
        Some(Ok(text)) if text.is_empty() => Ok(None),
        Some(Ok(text)) => Ok(Some(text)),
        Some(Err(_)) => Err(wrong(format!("{name} is not UTF-8"))),
    }
}

fn required(lookup: &impl Lookup, name: &str, verb: &str) -> Result<String, CniError> {
    text(lookup, name)?.ok_or_else(|| wrong(format!("{name} is not set, which {verb} needs")))
}

/// The verb.
pub(crate) fn verb(lookup: &impl Lookup) -> Result<Verb, CniError> {
    match required(lookup, "CNI_COMMAND", "every call")?.as_str() {
        "ADD" => Ok(Verb::Add),
        "DEL" => Ok(Verb::Del),
        "CHECK" => Ok(Verb::Check),
        "GC" => Ok(Verb::Gc),
        "STATUS" => Ok(Verb::Status),
        "VERSION" => Ok(Verb::Version),
        other => Err(wrong(format!("CNI_COMMAND {other:?} is none of ADD, DEL, CHECK, GC, STATUS, VERSION"))),
    }
}

/// The container and interface (`CNI_CONTAINERID`, `CNI_IFNAME`).
pub(crate) fn attachment(lookup: &impl Lookup, verb: &str) -> Result<Attachment, CniError> {
    let container_id = required(lookup, "CNI_CONTAINERID", verb)?;
    let ifname = required(lookup, "CNI_IFNAME", verb)?;
    Attachment::new(&container_id, &ifname).map_err(|error| wrong(error.to_string()))
}

/// Path of the container's network namespace (`CNI_NETNS`).
pub(crate) fn netns(lookup: &impl Lookup, verb: &str) -> Result<String, CniError> {
    required(lookup, "CNI_NETNS", verb)
}

/// The pod (`CNI_ARGS`); none for a container that Kubernetes does not know. Keys that are not ours are ignored.
pub(crate) fn pod(lookup: &impl Lookup) -> Result<Option<PodIdentity>, CniError> {
    let arguments = text(lookup, "CNI_ARGS")?.unwrap_or_default();
    let (mut namespace, mut name, mut uid) = (String::new(), String::new(), String::new());
    for pair in arguments.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair
            .split_once('=')
            .ok_or_else(|| wrong(format!("CNI_ARGS: {pair:?} is not KEY=VALUE; pairs are separated by ';'")))?;
        match key {
            "K8S_POD_NAMESPACE" => namespace = value.to_owned(),
            "K8S_POD_NAME" => name = value.to_owned(),
            "K8S_POD_UID" => uid = value.to_owned(),
            _ => {}
        }
    }
    match (namespace.is_empty(), name.is_empty()) {
        (false, false) => Ok(Some(PodIdentity { namespace, name, uid })),
        (true, true) => Ok(None),
        (true, false) => Err(wrong("CNI_ARGS has K8S_POD_NAME without K8S_POD_NAMESPACE".to_owned())),
        (false, true) => Err(wrong("CNI_ARGS has K8S_POD_NAMESPACE without K8S_POD_NAME".to_owned())),
    }
}
