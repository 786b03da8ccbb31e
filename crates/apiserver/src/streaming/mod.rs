//! Streaming subresources of pods: `log`, `exec`, `attach`, `portforward`.
//!
//! The embedder implements [`StreamHandler`] and registers it with [`crate::ApiServer::set_stream_handler`]. The protocol
//! work (WebSocket channels, SPDY inside WebSocket for port-forward, exit codes, terminal sizes) is done here: a handler
//! sees the pod object and plain async byte streams.
//!
//! # Contract
//!
//! - Before a handler is called the pod exists and, for log, exec and attach, `container` names one of its
//!   containers (init and ephemeral ones included): the default is chosen and unknown names are refused here.
//! - The future a handler returns is *dropped* when the client goes away. Whatever must be ended then (a process, a
//!   reader) has to end on drop. `kubectl exec` ends like this when it is interrupted.
//! - Returning closes the streams: everything written to `stdout`/`stderr` before is still delivered, then the status.
//! - An `Err` is shown to the person: for `log` as the HTTP answer, for the others on the protocol's error channel.

mod portforward;
mod remote_command;
mod spdy;
mod websocket;

pub(crate) use portforward::port_forward;
pub(crate) use remote_command::remote_command;

use std::pin::Pin;
use std::sync::Arc;

use futures::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use crate::status::ApiError;

/// Bytes to read; end of file when the other side closed.
pub type ByteReader = Pin<Box<dyn AsyncRead + Send>>;
/// Bytes to write; dropping or shutting it down closes the stream.
pub type ByteWriter = Pin<Box<dyn AsyncWrite + Send>>;

/// Options of `pods/NAME/log` (`PodLogOptions`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogOptions {
    /// The container, always one of the pod's.
    pub container: String,
    /// Go on with what is written later, until the container ends for good.
    pub follow: bool,
    /// The instance before the last restart.
    pub previous: bool,
    /// Put an RFC 3339 (nanoseconds) time before every line.
    pub timestamps: bool,
    /// Only the last lines.
    pub tail_lines: Option<u64>,
    /// Only what was written in these last seconds.
    pub since_seconds: Option<u64>,
    /// Only what was written at or after this RFC 3339 time.
    pub since_time: Option<String>,
    /// At most this many bytes.
    pub limit_bytes: Option<u64>,
    /// `Stdout` or `Stderr` only; none: both.
    pub stream: Option<String>,
}

/// Options of `exec` and `attach` (`PodExecOptions`, `PodAttachOptions`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CommandOptions {
    /// The container, always one of the pod's.
    pub container: String,
    /// The command and its arguments; empty for attach.
    pub command: Vec<String>,
    /// Whether the client sends stdin.
    pub stdin: bool,
    /// Whether the client wants stdout.
    pub stdout: bool,
    /// Whether the client wants stderr; never together with `tty`.
    pub stderr: bool,
    /// Whether a terminal is wanted.
    pub tty: bool,
}

/// Size of a terminal in character cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TerminalSize {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// The streams of one exec or attach.
pub struct ProcessIo {
    /// Present when [`CommandOptions::stdin`] is set. Ends when the client closes it.
    pub stdin: Option<ByteReader>,
    /// Present when [`CommandOptions::stdout`] is set.
    pub stdout: Option<ByteWriter>,
    /// Present when [`CommandOptions::stderr`] is set.
    pub stderr: Option<ByteWriter>,
    /// Terminal sizes as the client's window changes; the first comes at once when there is a terminal.
    pub resize: mpsc::Receiver<TerminalSize>,
}

/// How a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this code; kubectl exits with the same. Death by signal N is 128+N by custom.
    Code(i32),
    /// The container ended or the stream was detached: success, without a code (attach).
    Detached,
}

/// Both directions of one forwarded connection.
pub struct Duplex {
    /// What the client sends; ends when it shuts down its side.
    pub reader: ByteReader,
    /// What the client receives.
    pub writer: ByteWriter,
}

/// What the embedder does for `kubectl logs`, `exec`, `attach` and `port-forward`. See the module's contract.
pub trait StreamHandler: Send + Sync + 'static {
    /// Opens a log. The reader's end ends the answer; with `follow` it ends when the container is gone.
    fn logs(&self, pod: Arc<Value>, options: LogOptions) -> BoxFuture<'static, Result<ByteReader, ApiError>>;

    /// Runs a command in a container until it ends.
    fn exec(
        &self,
        pod: Arc<Value>,
        options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>>;

    /// Attaches to the container's main process until it ends or the client leaves.
    fn attach(
        &self,
        pod: Arc<Value>,
        options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>>;

    /// Carries one TCP connection to `port` of the pod's own network namespace (`localhost` there) until both sides
    /// are done. Called once for every connection made to the local port of `kubectl port-forward`.
    fn port_forward(&self, pod: Arc<Value>, port: u16, stream: Duplex) -> BoxFuture<'static, Result<(), ApiError>>;
}
