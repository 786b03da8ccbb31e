//! `kubectl logs`, `exec`, `attach` and `port-forward`, answered from the containers of this lab.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::FutureExt;
use futures::future::BoxFuture;
use serde_json::Value;
use tokio::io::AsyncWriteExt;
use towpath_apiserver::ApiError;
use towpath_apiserver::streaming::{ByteReader, CommandOptions, Duplex, Exit, LogOptions, ProcessIo, StreamHandler};

use crate::kernel::ns;
use crate::kubelet::{Entry, Registry};
use crate::layout::Layout;
use crate::runtime::container::Container;
use crate::runtime::logs;

/// How long a forwarded connection may take to be made.
const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// Finds containers by the pod objects that the API server hands over.
pub(crate) struct Streams {
    layout: Layout,
    registry: Registry,
}

fn text<'a>(pod: &'a Value, pointer: &str) -> &'a str {
    pod.pointer(pointer).and_then(Value::as_str).unwrap_or_default()
}

fn refuse(error: anyhow::Error) -> ApiError {
    ApiError::bad_request(format!("{error:#}"))
}

impl Streams {
    /// Streams of the lab at `layout`.
    pub(crate) fn new(layout: Layout, registry: Registry) -> Self {
        Self { layout, registry }
    }

    fn entry(&self, pod: &Value) -> Result<Entry> {
        self.registry.get(text(pod, "/metadata/uid")).with_context(|| {
            format!("pod {:?} has no sandbox: it is not running (yet, or any more)", text(pod, "/metadata/name"))
        })
    }

    fn container(&self, pod: &Value, name: &str) -> Result<Container> {
        let found = self.entry(pod)?.containers.get(name).cloned();
        found
            .filter(|container| container.ended().is_none())
            .with_context(|| format!("container {name:?} of pod {:?} is not running", text(pod, "/metadata/name")))
    }

    /// The log of the current instance, or of the one before it.
    fn log_file(&self, pod: &Value, options: &LogOptions) -> Result<PathBuf> {
        let at = |pointer| text(pod, pointer);
        let dir = self
            .layout
            .pod_logs(at("/spec/nodeName"), at("/metadata/namespace"), at("/metadata/name"), at("/metadata/uid"))
            .join(&options.container);
        let mut numbers = instances(&dir);
        numbers.sort_unstable();
        let chosen = if options.previous { numbers.iter().rev().nth(1) } else { numbers.last() };
        match chosen {
            Some(number) => Ok(dir.join(format!("{number}.log"))),
            None if options.previous => {
                let name = at("/metadata/name");
                bail!("previous terminated container {:?} in pod {name:?} not found", options.container)
            }
            None => bail!(
                "container {:?} in pod {:?} is waiting to start: {}",
                options.container,
                at("/metadata/name"),
                waiting_reason(pod, &options.container)
            ),
        }
    }
}

/// Numbers of the instances whose logs are there.
fn instances(dir: &Path) -> Vec<u64> {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.strip_suffix(".log")?.parse().ok()).collect()
}

fn waiting_reason<'a>(pod: &'a Value, container: &str) -> &'a str {
    let lists = ["/status/containerStatuses", "/status/initContainerStatuses"];
    let statuses = lists.iter().filter_map(|list| pod.pointer(list)?.as_array()).flatten();
    statuses
        .filter(|status| status.get("name").and_then(Value::as_str) == Some(container))
        .find_map(|status| status.pointer("/state/waiting/reason")?.as_str())
        .unwrap_or("ContainerCreating")
}

impl StreamHandler for Streams {
    fn logs(&self, pod: Arc<Value>, options: LogOptions) -> BoxFuture<'static, Result<ByteReader, ApiError>> {
        let file = self.log_file(&pod, &options);
        let running = self
            .entry(&pod)
            .ok()
            .and_then(|entry| entry.containers.get(&options.container).cloned())
            .filter(|container| options.follow && file.as_ref().is_ok_and(|file| file == container.log_path()));
        async move {
            let file = file.map_err(refuse)?;
            let (reader, mut writer) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move {
                let follow = running.map(|container| container.log_progress());
                if let Err(error) = logs::copy(&file, &options, follow, &mut writer).await {
                    tracing::debug!(error = %format!("{error:#}"), "log stream ended");
                }
                let _ = writer.shutdown().await;
            });
            Ok(Box::pin(reader) as ByteReader)
        }
        .boxed()
    }

    fn exec(
        &self,
        pod: Arc<Value>,
        options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>> {
        let container = self.container(&pod, &options.container);
        async move {
            let container = container.map_err(refuse)?;
            container.exec(&options.command, options.tty, io).await.map(Exit::Code).map_err(refuse)
        }
        .boxed()
    }

    fn attach(
        &self,
        pod: Arc<Value>,
        options: CommandOptions,
        io: ProcessIo,
    ) -> BoxFuture<'static, Result<Exit, ApiError>> {
        let container = self.container(&pod, &options.container);
        async move {
            container.map_err(refuse)?.attach(io).await.map_err(refuse)?;
            Ok(Exit::Detached)
        }
        .boxed()
    }

    fn port_forward(&self, pod: Arc<Value>, port: u16, stream: Duplex) -> BoxFuture<'static, Result<(), ApiError>> {
        let entry = self.entry(&pod);
        async move {
            let netns = entry.map_err(refuse)?.netns;
            forward(&netns, port, stream).await.map_err(|error| ApiError::internal(format!("{error:#}")))
        }
        .boxed()
    }
}

async fn forward(netns: &Path, port: u16, mut stream: Duplex) -> Result<()> {
    let connection = ns::in_net(netns, move || {
        let addresses: [SocketAddr; 2] = [(Ipv4Addr::LOCALHOST, port).into(), (Ipv6Addr::LOCALHOST, port).into()];
        let mut last = None;
        for address in addresses {
            match std::net::TcpStream::connect_timeout(&address, CONNECT_LIMIT) {
                Ok(connection) => return Ok(connection),
                Err(error) => last = last.or(Some(error)),
            }
        }
        let error = last.context("no address")?;
        Err(error).with_context(|| format!("failed to connect to localhost:{port} inside the pod's namespace"))
    })
    .await?;
    connection.set_nonblocking(true)?;
    let mut connection = tokio::net::TcpStream::from_std(connection)?;
    let (mut from_pod, mut to_pod) = connection.split();
    let up = async {
        tokio::io::copy(&mut stream.reader, &mut to_pod).await?;
        to_pod.shutdown().await
    };
    let down = async {
        tokio::io::copy(&mut from_pod, &mut stream.writer).await?;
        stream.writer.shutdown().await
    };
    let (up, down) = tokio::join!(up, down);
    up.and(down).context("a forwarded connection broke")
}
