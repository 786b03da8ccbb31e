//! What each verb does: check, ask the agent, shape the answer.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::time::Duration;

use serde_json::{Value, json};
use towpath_wire::cni::{
    AddRequest, CheckRequest, CniError, DELETES_NAME, DelRequest, ErrorCode, NetworkConfig, READY_NAME, Reply, Request,
    Version,
};

use crate::agent;
use crate::environment::{self, Lookup, Verb};

/// Longer than the agent takes at most: readiness, the API server, the device.
const ADD_PATIENCE: Duration = Duration::from_secs(60);
const DEL_PATIENCE: Duration = Duration::from_secs(15);
const CHECK_PATIENCE: Duration = Duration::from_secs(30);
const GC_PATIENCE: Duration = Duration::from_secs(60);
const STATUS_PATIENCE: Duration = Duration::from_secs(3);
/// So long an agent may be between its end and being ready again: a new version of it, or a crash. Runtimes ask for STATUS every few
/// seconds, and kubelet makes a node NotReady at the first error.
const BETWEEN_AGENTS: Duration = Duration::from_secs(60);

/// `NSFS_MAGIC` of linux/magic.h: the file system of namespaces.
const NSFS_MAGIC: rustix::fs::FsWord = 0x6e73_6673;

/// Runs the verb that the environment names. What is returned goes to standard output.
pub(crate) fn run(lookup: impl Lookup, input: &[u8]) -> Result<Option<Value>, CniError> {
    let verb = environment::verb(&lookup)?;
    if verb == Verb::Version {
        return Ok(Some(json!({
            "cniVersion": Version::V1_1_0.as_str(),
            "supportedVersions": Version::SUPPORTED.map(Version::as_str),
        })));
    }
    match verb {
        Verb::Add => add(&lookup, input).map(Some),
        Verb::Del => del(&lookup, input).map(|()| None),
        Verb::Check => check(&lookup, input).map(|()| None),
        Verb::Gc => collect_garbage(input).map(|()| None),
        Verb::Status | Verb::Version => status(input).map(|()| None),
    }
}

fn add(lookup: &impl Lookup, input: &[u8]) -> Result<Value, CniError> {
    let attachment = environment::attachment(lookup, "ADD")?;
    let path = environment::netns(lookup, "ADD")?;
    let pod = environment::pod(lookup)?;
    let config = NetworkConfig::parse(input)?;
    let netns = open_netns(&path)?;
    let (network, bandwidth) = (config.name.clone(), config.bandwidth);
    let request = Request::Add(AddRequest { attachment, network, netns: path, pod, bandwidth });
    match agent::ask(&config.socket, &request, Some(&netns), ADD_PATIENCE).map_err(|e| unreachable(&config, &e))? {
        Reply::Added { result } => {
            let whole = match config.prev_result {
                Some(mut before) => {
                    before.append(result);
                    before
                }
                None => result,
            };
            Ok(whole.to_json(config.version))
        }
        Reply::Failed { error } => Err(error),
        Reply::Done | Reply::Addresses { .. } => Err(confused("ADD")),
    }
}

/// DEL succeeds unless the call itself makes no sense, or the agent is not there and the queue cannot be written either.
fn del(lookup: &impl Lookup, input: &[u8]) -> Result<(), CniError> {
    let attachment = environment::attachment(lookup, "DEL")?;
    let config = NetworkConfig::parse(&without_prev_result(input))?;
    let request = DelRequest { attachment, network: config.name.clone() };
    let why = match agent::ask(&config.socket, &Request::Del(request.clone()), None, DEL_PATIENCE) {
        Ok(Reply::Done) => return Ok(()),
        Ok(Reply::Failed { error }) => error.to_string(),
        Ok(Reply::Added { .. } | Reply::Addresses { .. }) => confused("DEL").to_string(),
        Err(error) => unreachable(&config, &error).to_string(),
    };
    let dir = config.state_dir.join(DELETES_NAME);
    agent::queue(&dir, &request).map_err(|error| {
        CniError::new(ErrorCode::Io, format!("{why}; and the DEL cannot be queued in {}: {error}", dir.display()))
            .hint("check that the directory can be written")
    })
}

/// DEL has no use for `prevResult`, so one that is not understood must not keep a container from going.
fn without_prev_result(input: &[u8]) -> Vec<u8> {
    let trimmed = serde_json::from_slice::<Value>(input).ok().and_then(|mut config| {
        config.as_object_mut()?.remove("prevResult")?;
        serde_json::to_vec(&config).ok()
    });
    trimmed.unwrap_or_else(|| input.to_vec())
}

fn check(lookup: &impl Lookup, input: &[u8]) -> Result<(), CniError> {
    let attachment = environment::attachment(lookup, "CHECK")?;
    let path = environment::netns(lookup, "CHECK")?;
    let mut config = NetworkConfig::parse(input)?;
    at_least(&config, Version::V0_4_0, "CHECK")?;
    let prev_result = config.prev_result.take().ok_or_else(|| {
        CniError::new(ErrorCode::InvalidConfig, "network configuration: prevResult is missing, which CHECK needs")
    })?;
    let netns = open_netns(&path)?;
    let request = Request::Check(CheckRequest { attachment, network: config.name.clone(), netns: path, prev_result });
    done(
        "CHECK",
        agent::ask(&config.socket, &request, Some(&netns), CHECK_PATIENCE).map_err(|e| unreachable(&config, &e))?,
    )
}

fn collect_garbage(input: &[u8]) -> Result<(), CniError> {
    let mut config = NetworkConfig::parse(input)?;
    at_least(&config, Version::V1_1_0, "GC")?;
    // Not taken for an empty list: that would remove every container of the network.
    let valid = config.valid_attachments.take().ok_or_else(|| {
        CniError::new(
            ErrorCode::InvalidConfig,
            "network configuration: cni.dev/valid-attachments is missing, which GC needs",
        )
    })?;
    let request = Request::Gc { network: config.name.clone(), valid };
    done("GC", agent::ask(&config.socket, &request, None, GC_PATIENCE).map_err(|e| unreachable(&config, &e))?)
}

fn status(input: &[u8]) -> Result<(), CniError> {
    let config = NetworkConfig::parse(input)?;
    at_least(&config, Version::V1_1_0, "STATUS")?;
    let request = Request::Status { network: config.name.clone() };
    let error = match agent::ask(&config.socket, &request, None, STATUS_PATIENCE) {
        Ok(Reply::Failed { error }) if error.code == ErrorCode::NotAvailable => error,
        Ok(reply) => return done("STATUS", reply),
        // Running pods go on without the agent, so this is 50 and not 51.
        Err(error) => {
            let told = CniError { code: ErrorCode::NotAvailable, ..unreachable(&config, &error) };
            // An agent that is there and says nothing is none that comes back by itself.
            if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) {
                return Err(told);
            }
            told
        }
    };
    between_agents(&config, error)
}

/// Success while the agent was ready a moment ago: an ADD that comes meanwhile is tried again by kubelet.
fn between_agents(config: &NetworkConfig, error: CniError) -> Result<(), CniError> {
    let since = std::fs::metadata(config.socket.with_file_name(READY_NAME)).and_then(|file| file.modified()).ok();
    match since.and_then(|ready| ready.elapsed().ok()) {
        Some(since) if since < BETWEEN_AGENTS => Ok(()),
        Some(since) => {
            Err(CniError { msg: format!("{}; it was last ready {} s ago", error.msg, since.as_secs()), ..error })
        }
        None => Err(error),
    }
}

fn done(verb: &str, reply: Reply) -> Result<(), CniError> {
    match reply {
        Reply::Done => Ok(()),
        Reply::Failed { error } => Err(error),
        Reply::Added { .. } | Reply::Addresses { .. } => Err(confused(verb)),
    }
}

fn at_least(config: &NetworkConfig, version: Version, verb: &str) -> Result<(), CniError> {
    if config.version >= version {
        return Ok(());
    }
    Err(CniError::new(ErrorCode::IncompatibleVersion, format!("CNI version {} has no {verb}", config.version))
        .hint(format!("{verb} exists from {version}")))
}

fn confused(verb: &str) -> CniError {
    CniError::new(ErrorCode::Io, format!("the agent's answer is not one to {verb}"))
        .hint("check that towpath-cni and the agent are of versions that fit")
}

/// The agent cannot be asked: transient for all the plugin can tell, as it comes back by itself.
fn unreachable(config: &NetworkConfig, error: &io::Error) -> CniError {
    let socket = config.socket.display();
    let why = match error.kind() {
        io::ErrorKind::NotFound => format!("there is no Towpath agent on this node ({socket} does not exist)"),
        io::ErrorKind::ConnectionRefused => format!("the Towpath agent is not running (nobody listens on {socket})"),
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            format!("the Towpath agent did not answer in time on {socket}")
        }
        io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => {
            format!("the Towpath agent closed the connection on {socket} without an answer; only root is answered")
        }
        _ => format!("cannot ask the Towpath agent on {socket}: {error}"),
    };
    CniError::new(ErrorCode::TryAgain, why).hint("check the agent's pod on this node and its log")
}

/// Opens a network namespace, and makes sure that it is one and not our own.
fn open_netns(path: &str) -> Result<File, CniError> {
    let file = File::open(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => CniError::new(
            ErrorCode::UnknownContainer,
            format!("CNI_NETNS {path} does not exist: the container is gone"),
        ),
        _ => CniError::new(ErrorCode::Io, format!("cannot open CNI_NETNS {path}: {error}")),
    })?;
    let wrong = |why: &str| CniError::new(ErrorCode::InvalidEnvironment, format!("CNI_NETNS {path} is {why}"));
    let io_error = |error: io::Error| CniError::new(ErrorCode::Io, format!("cannot look at CNI_NETNS {path}: {error}"));
    let kind = rustix::fs::fstatfs(&file).map_err(|e| io_error(e.into()))?;
    if kind.f_type != NSFS_MAGIC {
        return Err(wrong("not a network namespace"));
    }
    let (own, theirs) = (std::fs::metadata("/proc/self/ns/net").map_err(io_error)?, file.metadata().map_err(io_error)?);
    if (own.dev(), own.ino()) == (theirs.dev(), theirs.ino()) {
        return Err(wrong("the network namespace of the plugin itself").hint("pods with hostNetwork need no CNI"));
    }
    Ok(file)
}
