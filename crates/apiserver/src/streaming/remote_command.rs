//! exec and attach over WebSocket: `v5.channel.k8s.io` and `v4.channel.k8s.io`.
//!
//! Every binary message begins with a channel byte: 0 stdin, 1 stdout, 2 stderr, 3 error (a `Status` at the end), 4 terminal
//! size; in v5, 255 closes the channel named by the next byte (KEP-4006).

use std::sync::Arc;

use futures::stream::SplitSink;
use futures::{SinkExt, StreamExt};
use http::Response;
use hyper::upgrade::OnUpgrade;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;

use super::websocket::{self, Socket};
use super::{ByteReader, ByteWriter, CommandOptions, Exit, ProcessIo, StreamHandler, TerminalSize};
use crate::rest::Call;
use crate::server::ResponseBody;
use crate::status::ApiError;

const STDIN: u8 = 0;
const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const ERROR: u8 = 3;
const RESIZE: u8 = 4;
const CLOSE: u8 = 255;
/// Bytes between the socket and a process, each way.
const PIPE: usize = 64 << 10;

/// Our ends of a process's streams.
struct Ends {
    stdin: Option<DuplexStream>,
    stdout: Option<DuplexStream>,
    stderr: Option<DuplexStream>,
    resize: mpsc::Sender<TerminalSize>,
}

fn pipes(options: &CommandOptions) -> (ProcessIo, Ends) {
    let pipe = |wanted: bool| {
        if wanted {
            Some(tokio::io::duplex(PIPE)).map_or((None, None), |(a, b)| (Some(a), Some(b)))
        } else {
            (None, None)
        }
    };
    let (stdin, process_stdin) = pipe(options.stdin);
    let (stdout, process_stdout) = pipe(options.stdout);
    let (stderr, process_stderr) = pipe(options.stderr);
    let (resize, sizes) = mpsc::channel(4);
    let io = ProcessIo {
        stdin: process_stdin.map(|end| Box::pin(end) as ByteReader),
        stdout: process_stdout.map(|end| Box::pin(end) as ByteWriter),
        stderr: process_stderr.map(|end| Box::pin(end) as ByteWriter),
        resize: sizes,
    };
    (io, Ends { stdin, stdout, stderr, resize })
}

/// Answers an exec or attach request: the switch of protocols now, the streams in a task of the server.
pub(crate) fn remote_command(
    call: &Arc<Call>,
    pod: Arc<Value>,
    options: CommandOptions,
    attach: bool,
    handler: Arc<dyn StreamHandler>,
    upgrade: Option<OnUpgrade>,
) -> Result<Response<ResponseBody>, ApiError> {
    let accepted = websocket::accept(&call.headers, upgrade, &["v5.channel.k8s.io", "v4.channel.k8s.io"])?;
    let (response, _, upgrade) = accepted.split();
    let first = [(options.stdout, STDOUT), (options.stderr, STDERR)]
        .into_iter()
        .find_map(|(wanted, channel)| wanted.then_some(channel))
        .unwrap_or(ERROR);
    call.core.spawn(async move {
        let socket = match websocket::socket(upgrade).await {
            Ok(socket) => socket,
            Err(error) => {
                tracing::debug!(%error, "a client left before its streams began");
                return;
            }
        };
        let (io, ends) = pipes(&options);
        let run = if attach { handler.attach(pod, options, io) } else { handler.exec(pod, options, io) };
        serve(socket, ends, run, first).await;
    });
    Ok(response)
}

type Sink = SplitSink<Socket, Message>;

async fn serve(
    socket: Socket,
    ends: Ends,
    run: futures::future::BoxFuture<'static, Result<Exit, ApiError>>,
    first: u8,
) {
    let (mut sink, mut source) = socket.split();
    // Tells the client that the streams are open, as kube-apiserver does.
    if send(&mut sink, first, &[]).await.is_err() {
        return;
    }
    let Ends { stdin, stdout, stderr, resize } = ends;
    let output = async {
        let copied = copy_out(&mut sink, stdout, stderr).await;
        (copied, sink)
    };
    let process = async {
        let (result, (copied, sink)) = futures::join!(run, output);
        (result, copied, sink)
    };
    let input = read_client(&mut source, stdin, resize);
    tokio::select! {
        (result, copied, mut sink) = process => {
            if copied.is_ok() {
                finish(&mut sink, &status(result)).await;
            }
        }
        () = input => {}
    }
}

async fn finish(sink: &mut Sink, status: &Value) {
    // A close without a code is an error to kubectl, which then ignores the status before it.
    let close = CloseFrame { code: CloseCode::Normal, reason: "".into() };
    if send(sink, ERROR, status.to_string().as_bytes()).await.is_ok()
        && let Err(error) = sink.send(Message::Close(Some(close))).await
    {
        tracing::debug!(%error, "a client left before the streams were closed");
    }
}

async fn send(sink: &mut Sink, channel: u8, data: &[u8]) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    let mut message = Vec::with_capacity(data.len() + 1);
    message.push(channel);
    message.extend_from_slice(data);
    sink.send(Message::Binary(message.into())).await
}

/// Copies both outputs until both end.
async fn copy_out(
    sink: &mut Sink,
    mut stdout: Option<DuplexStream>,
    mut stderr: Option<DuplexStream>,
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    let (mut out, mut err) = (vec![0; 32 << 10], vec![0; 32 << 10]);
    while stdout.is_some() || stderr.is_some() {
        let (channel, count) = tokio::select! {
            count = read(&mut stdout, &mut out) => (STDOUT, count),
            count = read(&mut stderr, &mut err) => (STDERR, count),
        };
        let (stream, buffer) = if channel == STDOUT { (&mut stdout, &out) } else { (&mut stderr, &err) };
        match buffer.get(..count) {
            Some([]) | None => *stream = None,
            Some(data) => send(sink, channel, data).await?,
        }
    }
    Ok(())
}

/// Reads from a stream; waits for ever when there is none. A broken stream has ended.
async fn read(stream: &mut Option<DuplexStream>, buffer: &mut [u8]) -> usize {
    match stream {
        Some(stream) => stream.read(buffer).await.unwrap_or(0),
        None => std::future::pending().await,
    }
}

/// Handles what the client sends; returns when the client is gone.
async fn read_client(
    source: &mut futures::stream::SplitStream<Socket>,
    mut stdin: Option<DuplexStream>,
    resize: mpsc::Sender<TerminalSize>,
) {
    while let Some(Ok(message)) = source.next().await {
        let data = match &message {
            Message::Binary(data) => data.as_ref(),
            Message::Text(text) => text.as_bytes(),
            Message::Close(_) => return,
            _ => continue,
        };
        match data.split_first() {
            Some((&STDIN, data)) => {
                if let Some(pipe) = stdin.as_mut()
                    && pipe.write_all(data).await.is_err()
                {
                    // The process reads no more; what the client still types is dropped.
                    stdin = None;
                }
            }
            Some((&RESIZE, data)) => {
                if let Some(size) = terminal_size(data)
                    && resize.send(size).await.is_err()
                {
                    tracing::trace!("the process does not follow its terminal's size");
                }
            }
            Some((&CLOSE, [STDIN])) => stdin = None,
            _ => {}
        }
    }
}

fn terminal_size(data: &[u8]) -> Option<TerminalSize> {
    let value: Value = serde_json::from_slice(data).ok()?;
    let number = |name: &str| value.get(name).and_then(Value::as_u64).and_then(|number| u16::try_from(number).ok());
    Some(TerminalSize { width: number("Width")?, height: number("Height")? })
}

/// The `Status` at the end: kubectl takes the exit code from it.
fn status(result: Result<Exit, ApiError>) -> Value {
    match result {
        Ok(Exit::Detached | Exit::Code(0)) => json!({"metadata": {}, "status": "Success"}),
        Ok(Exit::Code(code)) => json!({
            "metadata": {}, "status": "Failure", "reason": "NonZeroExitCode",
            "message": format!("command terminated with non-zero exit code: exit status {code}"),
            "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]},
        }),
        Err(error) => error.status(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_exit_code_is_where_kubectl_looks_for_it() {
        let failed = status(Ok(Exit::Code(3)));
        assert_eq!(failed["reason"], "NonZeroExitCode");
        assert_eq!(failed["details"]["causes"][0], json!({"reason": "ExitCode", "message": "3"}));
        assert_eq!(status(Ok(Exit::Code(0)))["status"], "Success");
        assert_eq!(terminal_size(br#"{"Width":80,"Height":24}"#), Some(TerminalSize { width: 80, height: 24 }));
        assert_eq!(terminal_size(br#"{"Width":-1,"Height":24}"#), None);
    }
}
