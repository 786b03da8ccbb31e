//! A server in a temporary directory and the ways to talk to it.
#![allow(dead_code, reason = "each test binary uses its own part of this module")]
#![allow(missing_docs, reason = "a test's own module")]

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use towpath_apiserver::streaming::{ByteReader, CommandOptions, Duplex, Exit, LogOptions, ProcessIo, StreamHandler};
use towpath_apiserver::{ApiError, ApiServer, Config};

pub(crate) struct Cluster {
    pub(crate) server: ApiServer,
    pub(crate) directory: tempfile::TempDir,
    pub(crate) address: SocketAddr,
}

impl Cluster {
    pub(crate) async fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        Self::start_in(directory).await
    }

    pub(crate) async fn start_in(directory: tempfile::TempDir) -> Self {
        let mut config = Config::new(directory.path().join("data"));
        config.tokens = vec![("secret-token".to_owned(), towpath_apiserver::UserInfo::new("viewer", &[]))];
        let server = ApiServer::start(config).await.unwrap();
        server.set_stream_handler(Arc::new(Echo));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        server.serve(listener).unwrap();
        let admin = server.client_credentials("kubernetes-admin", &["system:masters"]).unwrap();
        let kubeconfig = server.kubeconfig(&format!("https://{address}"), &admin);
        std::fs::write(directory.path().join("kubeconfig"), kubeconfig).unwrap();
        Self { server, directory, address }
    }

    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.directory.path().join("kubeconfig")
    }

    pub(crate) async fn client(&self) -> kube::Client {
        let config = kube::config::Kubeconfig::read_from(self.kubeconfig()).unwrap();
        let config =
            kube::Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await.unwrap();
        kube::Client::try_from(config).unwrap()
    }

    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("kubectl");
        command
            .env("KUBECONFIG", self.kubeconfig())
            .env("HOME", self.directory.path())
            .arg("--cache-dir")
            .arg(self.directory.path().join("cache"))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// Runs kubectl, feeding it a manifest when there is one.
    pub(crate) async fn run(&self, arguments: &[&str], stdin: &str) -> Output {
        use std::io::Write;
        let mut command = self.kubectl(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let stdin = stdin.to_owned();
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    /// Runs kubectl, which must succeed, and returns what it prints.
    pub(crate) async fn ok(&self, arguments: &[&str], stdin: &str) -> String {
        let output = self.run(arguments, stdin).await;
        let (out, error) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "kubectl {arguments:?}: {out}{error}");
        out
    }

    /// Runs kubectl, which must fail, and returns its complaint.
    pub(crate) async fn fails(&self, arguments: &[&str], stdin: &str) -> String {
        let output = self.run(arguments, stdin).await;
        assert!(!output.status.success(), "kubectl {arguments:?} succeeded: {}", text(&output.stdout));
        text(&output.stderr)
    }
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Whether there is a kubectl of 1.31 or newer. Where there is none tests are skipped, but fail with CI=true.
pub(crate) fn kubectl_missing() -> bool {
    let version = Command::new("kubectl").args(["version", "--client", "-o", "json"]).output().ok();
    let minor = version
        .and_then(|output| serde_json::from_slice::<Value>(&output.stdout).ok())
        .and_then(|value| value.pointer("/clientVersion/minor")?.as_str()?.trim_end_matches('+').parse::<u32>().ok());
    if minor.is_some_and(|minor| minor >= 31) {
        return false;
    }
    assert!(std::env::var("CI").as_deref() != Ok("true"), "kubectl 1.31 or newer is not in PATH");
    eprintln!("skipped: kubectl 1.31 or newer is not in PATH");
    true
}

/// A stand-in for containers: the commands `cat`, `exit N`, `both`, `size`; a log of three lines; ports that echo.
pub(crate) struct Echo;

async fn run(options: CommandOptions, mut io: ProcessIo) -> Result<Exit, ApiError> {
    let words: Vec<&str> = options.command.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["cat"] => {
            let (mut stdin, mut stdout) = (io.stdin.unwrap(), io.stdout.unwrap());
            tokio::io::copy(&mut stdin, &mut stdout).await.unwrap();
            Ok(Exit::Code(0))
        }
        ["both"] => {
            io.stdout.unwrap().write_all(b"to stdout\n").await.unwrap();
            io.stderr.unwrap().write_all(b"to stderr\n").await.unwrap();
            Ok(Exit::Code(0))
        }
        ["big"] => {
            io.stdout.unwrap().write_all(&vec![b'x'; 1_000_000]).await.unwrap();
            Ok(Exit::Code(0))
        }
        ["size"] => {
            let size = io.resize.recv().await.unwrap();
            io.stdout.unwrap().write_all(format!("{}x{}", size.width, size.height).as_bytes()).await.unwrap();
            Ok(Exit::Code(0))
        }
        ["exit", code] => Ok(Exit::Code(code.parse().unwrap())),
        other => Err(ApiError::internal(format!("no such command: {other:?}"))),
    }
}

impl StreamHandler for Echo {
    fn logs(&self, _pod: Arc<Value>, options: LogOptions) -> BoxFuture<'static, Result<ByteReader, ApiError>> {
        let lines = ["one", "two", "three"];
        let skip = options.tail_lines.map_or(0, |tail| 3_usize.saturating_sub(tail as usize));
        let text: String = lines[skip..].iter().map(|line| format!("{line} of {}\n", options.container)).collect();
        async move { Ok(Box::pin(std::io::Cursor::new(text.into_bytes())) as ByteReader) }.boxed()
    }

    fn exec(
        &self,
        _pod: Arc<Value>,
        options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>> {
        run(options, io).boxed()
    }

    fn attach(
        &self,
        _pod: Arc<Value>,
        _options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>> {
        async move {
            io.stdout.unwrap().write_all(b"attached\n").await.unwrap();
            Ok(Exit::Detached)
        }
        .boxed()
    }

    fn port_forward(
        &self,
        _pod: Arc<Value>,
        port: u16,
        mut stream: Duplex,
    ) -> BoxFuture<'static, Result<(), ApiError>> {
        async move {
            if port == 81 {
                return Err(ApiError::internal("nothing listens on port 81"));
            }
            let mut buffer = [0; 1024];
            loop {
                let count = stream.reader.read(&mut buffer).await.unwrap();
                if count == 0 {
                    return Ok(());
                }
                stream.writer.write_all(format!("{port}:").as_bytes()).await.unwrap();
                stream.writer.write_all(&buffer[..count]).await.unwrap();
            }
        }
        .boxed()
    }
}
