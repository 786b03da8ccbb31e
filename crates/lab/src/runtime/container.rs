//! One container instance: its process, its output, what is attached to it, and commands run inside.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use hyper::body::Bytes;
use jiff::Timestamp;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::process::{Child, Command};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::task::JoinSet;
use towpath_apiserver::streaming::{ProcessIo, TerminalSize};

use super::listening;
use super::logs::{LogWriter, Progress, Stream};
use super::pty::Terminal;
use super::sandbox::Sandbox;
use super::spawn::{self, ProcessNamespace, StageProgram};
use crate::kernel::cgroup;
use crate::stage::{ExecSpec, InitSpec, ProcessSpec, Workload};

/// How long output that a process left in its pipes is read after its end.
const DRAIN: Duration = Duration::from_millis(500);
/// How much output is kept for the first `attach` to an interactive container.
const REPLAY_BYTES: usize = 64 * 1024;

/// What to start.
pub(crate) struct ContainerSpec {
    /// Runtime directory of this container; exists.
    pub(crate) dir: PathBuf,
    /// What the init stage is told.
    pub(crate) init: InitSpec,
    /// `stdin: true`.
    pub(crate) stdin: bool,
    /// `stdinOnce: true`.
    pub(crate) stdin_once: bool,
    /// Where output goes.
    pub(crate) log: PathBuf,
}

/// How a container ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    /// Exit code; 128 plus the signal's number when a signal ended it.
    pub(crate) code: i32,
    /// When.
    pub(crate) at: Timestamp,
}

/// A started container. Clones share it.
#[derive(Clone)]
pub(crate) struct Container(Arc<Inner>);

struct Inner {
    id: String,
    pid: u32,
    dir: PathBuf,
    cgroup: PathBuf,
    process: ProcessSpec,
    sandbox: Sandbox,
    stage: StageProgram,
    started: Timestamp,
    log_path: PathBuf,
    log: watch::Receiver<Progress>,
    io: Arc<Io>,
    ended: watch::Receiver<Option<Ended>>,
}

/// A piece of output.
type Piece = (Stream, Bytes);

/// What is attached to a container.
struct Io {
    output: broadcast::Sender<Piece>,
    replay: Mutex<Option<Vec<Piece>>>,
    stdin: tokio::sync::Mutex<Option<Box<dyn AsyncWrite + Send + Unpin>>>,
    stdin_once: bool,
    terminal: Option<Terminal>,
}

impl Io {
    fn publish(&self, stream: Stream, data: &[u8]) {
        let data = Bytes::copy_from_slice(data);
        if let Some(kept) = self.replay.lock().unwrap_or_else(PoisonError::into_inner).as_mut() {
            let total: usize = kept.iter().map(|(_, piece)| piece.len()).sum();
            if total < REPLAY_BYTES {
                kept.push((stream, data.clone()));
            }
        }
        let _ = self.output.send((stream, data));
    }

    /// Output so far (for the first that attaches to an interactive container) and what follows, without a gap.
    fn subscribe(&self) -> (Vec<Piece>, broadcast::Receiver<Piece>) {
        let mut kept = self.replay.lock().unwrap_or_else(PoisonError::into_inner);
        (kept.take().unwrap_or_default(), self.output.subscribe())
    }
}

/// Starts a container in the sandbox.
pub(crate) async fn start(spec: ContainerSpec, sandbox: &Sandbox, stage: &StageProgram) -> Result<Container> {
    cgroup::create(&spec.init.cgroup)?;
    std::fs::create_dir_all(&spec.init.root.scratch)
        .with_context(|| format!("create {}", spec.init.root.scratch.display()))?;
    let (writer, log) = LogWriter::open(&spec.log)?;
    let mut command = stage.stage("init", &spec.init, &spec.dir.join("init.json"))?;
    command.env_clear().current_dir("/");
    let pair = if spec.init.process.tty { Some(Terminal::open()?) } else { None };
    let terminal = wire_stdio(&mut command, pair, spec.stdin)?;
    let mut child = spawn::spawn(command, sandbox.namespaces(ProcessNamespace::New)).await?;
    let pid = child.id().context("the container ended at once")?;
    let ports = match &spec.init.workload {
        Workload::Web(server) => server.http.clone(),
        Workload::Command | Workload::Pause => Vec::new(),
    };

    let stdin: Option<Box<dyn AsyncWrite + Send + Unpin>> = match &terminal {
        Some(terminal) if spec.stdin => Some(Box::new(terminal.clone())),
        _ => child.stdin.take().map(|pipe| Box::new(pipe) as Box<_>),
    };
    let io = Arc::new(Io {
        output: broadcast::channel(1024).0,
        replay: Mutex::new(spec.stdin_once.then(Vec::new)),
        stdin: tokio::sync::Mutex::new(stdin),
        stdin_once: spec.stdin_once,
        terminal,
    });
    let (done, ended) = watch::channel(None);
    tokio::spawn(watch_over(child, io.clone(), writer, spec.init.cgroup.clone(), done));
    listening::wait(pid, &ports).await;
    Ok(Container(Arc::new(Inner {
        id: format!("{}{}", uuid::Uuid::new_v4().simple(), uuid::Uuid::new_v4().simple()),
        pid,
        dir: spec.dir,
        cgroup: spec.init.cgroup,
        process: spec.init.process,
        sandbox: sandbox.clone(),
        stage: stage.clone(),
        started: Timestamp::now(),
        log_path: spec.log,
        log,
        io,
        ended,
    })))
}

/// Gives the command a terminal or pipes; returns the person's side of the terminal.
fn wire_stdio(command: &mut Command, pair: Option<(Terminal, OwnedFd)>, stdin: bool) -> Result<Option<Terminal>> {
    if let Some((terminal, end)) = pair {
        command.stdin(Stdio::from(end.try_clone()?)).stdout(Stdio::from(end.try_clone()?)).stderr(Stdio::from(end));
        return Ok(Some(terminal));
    }
    command.stdin(if stdin { Stdio::piped() } else { Stdio::null() }).stdout(Stdio::piped()).stderr(Stdio::piped());
    Ok(None)
}

/// Moves output to the log and to whoever is attached, until the process has ended; then cleans up after it.
async fn watch_over(
    mut child: Child,
    io: Arc<Io>,
    writer: LogWriter,
    cgroup: PathBuf,
    done: watch::Sender<Option<Ended>>,
) {
    let writer = Arc::new(Mutex::new(writer));
    let mut pumps = JoinSet::new();
    if let Some(terminal) = io.terminal.clone() {
        pumps.spawn(pump(terminal, Stream::Stdout, io.clone(), writer.clone()));
    }
    if let Some(pipe) = child.stdout.take() {
        pumps.spawn(pump(pipe, Stream::Stdout, io.clone(), writer.clone()));
    }
    if let Some(pipe) = child.stderr.take() {
        pumps.spawn(pump(pipe, Stream::Stderr, io.clone(), writer.clone()));
    }
    let status = child.wait().await;
    let _ = tokio::time::timeout(DRAIN, async { while pumps.join_next().await.is_some() {} }).await;
    pumps.shutdown().await;
    drop(writer);
    io.stdin.lock().await.take();
    let removed = tokio::task::spawn_blocking(move || cgroup::kill_and_remove(&cgroup, Duration::from_secs(5))).await;
    if let Ok(Err(error)) = removed {
        tracing::warn!(%error, "a container's cgroup stays");
    }
    let _ = done.send(Some(Ended { code: exit_code(status), at: Timestamp::now() }));
}

/// The exit code as container runtimes report it.
fn exit_code(status: std::io::Result<std::process::ExitStatus>) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    match status {
        Ok(status) => status.code().or_else(|| status.signal().map(|which| 128 + which)).unwrap_or(255),
        Err(_) => 255,
    }
}

async fn pump(mut from: impl AsyncRead + Unpin, stream: Stream, io: Arc<Io>, log: Arc<Mutex<LogWriter>>) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        let Some(data) = buffer.get(..count).filter(|data| !data.is_empty()) else { break };
        log.lock().unwrap_or_else(PoisonError::into_inner).write(stream, data);
        io.publish(stream, data);
    }
}

impl Container {
    /// Identifier: 64 hexadecimal digits.
    pub(crate) fn id(&self) -> &str {
        &self.0.id
    }

    /// When it was started.
    pub(crate) fn started(&self) -> Timestamp {
        self.0.started
    }

    /// Where its output is.
    pub(crate) fn log_path(&self) -> &std::path::Path {
        &self.0.log_path
    }

    /// Tells how the log grows.
    pub(crate) fn log_progress(&self) -> watch::Receiver<Progress> {
        self.0.log.clone()
    }

    /// How it ended, if it has.
    pub(crate) fn ended(&self) -> Option<Ended> {
        self.0.ended.borrow().clone()
    }

    /// Waits for its end.
    pub(crate) async fn wait(&self) -> Ended {
        let mut ended = self.0.ended.clone();
        match ended.wait_for(Option::is_some).await.map(|value| value.clone()) {
            Ok(Some(ended)) => ended,
            _ => Ended { code: 255, at: Timestamp::now() },
        }
    }

    /// Sends SIGTERM to the workload.
    pub(crate) fn terminate(&self) {
        if self.ended().is_none()
            && let Ok(pid) = i32::try_from(self.0.pid)
        {
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
    }

    /// Kills every process of the container.
    pub(crate) fn kill(&self) {
        if self.ended().is_none()
            && let Err(error) = cgroup::kill(&self.0.cgroup)
        {
            tracing::warn!(%error, "a container cannot be killed");
        }
    }

    async fn spawn_exec(&self, argv: &[String], tty: bool, stdin: bool) -> Result<(Child, Option<Terminal>)> {
        if self.ended().is_some() {
            bail!("the container is not running");
        }
        let mut process = ProcessSpec { argv: argv.to_vec(), tty, ..self.0.process.clone() };
        if tty && !process.env.iter().any(|(name, _)| name == "TERM") {
            process.env.push(("TERM".to_owned(), "xterm".to_owned()));
        }
        let spec = ExecSpec { cgroup: self.0.cgroup.clone(), pid: self.0.pid, process };
        let file = self.0.dir.join(format!("exec-{}.json", uuid::Uuid::new_v4().simple()));
        let mut command = self.0.stage.stage("exec", &spec, &file)?;
        command.env_clear().current_dir("/").kill_on_drop(true);
        let pair = if tty { Some(Terminal::open_in(self.0.pid).await?) } else { None };
        let terminal = wire_stdio(&mut command, pair, stdin)?;
        let child = spawn::spawn(command, self.0.sandbox.namespaces(ProcessNamespace::Of(self.0.pid))).await?;
        Ok((child, terminal))
    }

    /// Runs a command inside and collects its output, at most 10 KiB of each stream.
    pub(crate) async fn run(&self, argv: &[String]) -> Result<(i32, String)> {
        let (mut child, _) = self.spawn_exec(argv, false, false).await?;
        let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
        let (out, err, status) = tokio::join!(collect(stdout), collect(stderr), child.wait());
        Ok((exit_code(status), format!("{out}{err}")))
    }

    /// Runs a command inside with the person's streams; returns its exit code.
    pub(crate) async fn exec(&self, argv: &[String], tty: bool, streams: ProcessIo) -> Result<i32> {
        let (mut child, terminal) = self.spawn_exec(argv, tty, streams.stdin.is_some()).await?;
        let mut output = JoinSet::new();
        let mut input = JoinSet::new();
        if let Some(terminal) = terminal {
            input.spawn(follow_size(terminal.clone(), streams.resize));
            if let Some(stdin) = streams.stdin {
                input.spawn(copy(stdin, terminal.clone()));
            }
            if let Some(stdout) = streams.stdout {
                output.spawn(copy(terminal, stdout));
            }
        } else {
            if let (Some(from), Some(to)) = (streams.stdin, child.stdin.take()) {
                input.spawn(copy(from, to));
            }
            if let Some(from) = child.stdout.take() {
                output.spawn(copy_or_drain(from, streams.stdout));
            }
            if let Some(from) = child.stderr.take() {
                output.spawn(copy_or_drain(from, streams.stderr));
            }
        }
        let status = child.wait().await;
        let _ = tokio::time::timeout(DRAIN, async { while output.join_next().await.is_some() {} }).await;
        Ok(exit_code(status))
    }

    /// Connects a person to the main process until it ends or the person leaves. Returns whether it ended.
    pub(crate) async fn attach(&self, mut streams: ProcessIo) -> Result<bool> {
        if self.ended().is_some() {
            bail!("the container is not running");
        }
        let io = self.0.io.clone();
        let (before, mut output) = io.subscribe();
        let mut input = JoinSet::new();
        if let Some(terminal) = io.terminal.clone() {
            input.spawn(follow_size(terminal, streams.resize));
        }
        if let Some(stdin) = streams.stdin.take() {
            input.spawn(feed(io.clone(), stdin));
        }
        for (stream, data) in before {
            deliver(&mut streams.stdout, &mut streams.stderr, stream, &data).await?;
        }
        let ended = self.wait();
        tokio::pin!(ended);
        loop {
            tokio::select! {
                biased;
                piece = output.recv() => match piece {
                    Ok((stream, data)) => deliver(&mut streams.stdout, &mut streams.stderr, stream, &data).await?,
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Ok(true),
                },
                _ = &mut ended => return Ok(true),
            }
        }
    }
}

async fn deliver(
    stdout: &mut Option<towpath_apiserver::streaming::ByteWriter>,
    stderr: &mut Option<towpath_apiserver::streaming::ByteWriter>,
    stream: Stream,
    data: &[u8],
) -> Result<()> {
    let target = match stream {
        Stream::Stdout => stdout,
        Stream::Stderr => stderr,
    };
    if let Some(target) = target {
        target.write_all(data).await?;
        target.flush().await?;
    }
    Ok(())
}

/// Passes a person's input on; with `stdinOnce` its end is the end of the container's standard input.
async fn feed(io: Arc<Io>, mut from: towpath_apiserver::streaming::ByteReader) {
    let mut buffer = vec![0; 16 * 1024];
    loop {
        let count = from.read(&mut buffer).await.unwrap_or(0);
        let mut target = io.stdin.lock().await;
        let Some(pipe) = target.as_mut() else { return };
        let Some(data) = buffer.get(..count).filter(|data| !data.is_empty()) else {
            if io.stdin_once && io.terminal.is_none() {
                target.take();
            }
            return;
        };
        if pipe.write_all(data).await.is_err() || pipe.flush().await.is_err() {
            return;
        }
    }
}

async fn follow_size(terminal: Terminal, mut sizes: mpsc::Receiver<TerminalSize>) {
    while let Some(size) = sizes.recv().await {
        terminal.resize(size.width, size.height);
    }
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
    let mut buffer = vec![0; 32 * 1024];
    while let Ok(count) = from.read(&mut buffer).await {
        let Some(data) = buffer.get(..count).filter(|data| !data.is_empty()) else { break };
        if to.write_all(data).await.is_err() || to.flush().await.is_err() {
            break;
        }
    }
    let _ = to.shutdown().await;
}

async fn copy_or_drain(from: impl AsyncRead + Unpin, to: Option<towpath_apiserver::streaming::ByteWriter>) {
    match to {
        Some(to) => copy(from, to).await,
        None => copy(from, tokio::io::sink()).await,
    }
}

async fn collect(from: Option<impl AsyncRead + Unpin>) -> String {
    let mut kept = Vec::new();
    if let Some(mut from) = from {
        let _ = (&mut from).take(10 * 1024).read_to_end(&mut kept).await;
        let _ = tokio::io::copy(&mut from, &mut tokio::io::sink()).await;
    }
    String::from_utf8_lossy(&kept).into_owned()
}
