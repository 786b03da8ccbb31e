//! `towpath agent`, `carry` and `controller`: configuration, log, signals.

use std::future::Future;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use towpath_wire::config::{AgentConfig, CarryConfig, ControllerConfig};
use tracing::info;
use tracing_subscriber::EnvFilter;

/// What the library says of requests and watches that were refused, their owners say with the object and what comes of it.
const DEFAULT_LOG: &str = "info,kube_runtime=error,kube_client=off";

/// Options of a daemon.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Configuration file (JSON or YAML); without one everything has its default.
    #[arg(long)]
    config: Option<PathBuf>,
    /// What is logged, for example info or towpath_agent=debug; else RUST_LOG, else info.
    #[arg(long)]
    log: Option<String>,
    /// Logs as JSON, a line an event.
    #[arg(long)]
    log_json: bool,
}

impl Options {
    fn load<T: DeserializeOwned + Default>(&self) -> Result<T> {
        load(self.config.as_deref())
    }

    fn start_log(&self) -> Result<()> {
        let filter = match &self.log {
            Some(text) => EnvFilter::try_new(text).with_context(|| format!("--log {text:?}"))?,
            None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(DEFAULT_LOG)),
        };
        let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
        if self.log_json {
            log.json().init()
        } else {
            log.with_ansi(false).init()
        }
        Ok(())
    }
}

/// A configuration file; the defaults where none is named.
///
/// # Errors
/// It cannot be read, or is none.
pub(crate) fn load<T: DeserializeOwned + Default>(path: Option<&Path>) -> Result<T> {
    let Some(path) = path else { return Ok(T::default()) };
    let text = std::fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| format!("{} is no configuration of this program", path.display()))
}

/// What a DaemonSet or Deployment tells a container of its pod (the downward API), where the configuration, which all
/// share, names nobody.
fn or_environment(configured: &mut String, name: &str) {
    if configured.is_empty() {
        *configured = std::env::var(name).unwrap_or_default();
    }
}

/// Runs a daemon until SIGTERM or SIGINT, or until it ends by itself.
fn run<F, T>(options: &Options, name: &'static str, daemon: impl FnOnce(CancellationToken) -> F) -> Result<T>
where
    F: Future<Output = Result<T>>,
{
    options.start_log()?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let ended = runtime.block_on(async {
        let shutdown = CancellationToken::new();
        let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
        let told = shutdown.clone();
        tokio::spawn(async move {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
            told.cancel();
        });
        info!(version = env!("CARGO_PKG_VERSION"), "towpath {name}");
        daemon(shutdown).await
    });
    // Tasks may be in the middle of a turn: a runtime that is taken down meanwhile has them panic where they next look at the clock. They end with the
    // process, or with what takes its place.
    std::mem::forget(runtime);
    ended
}

/// Starts this program anew in this process, with the words it was started with. The process stays the same one for whoever watches
/// over it: a kubelet would count an end, also in good order, towards a back-off of up to five minutes.
fn start_anew() -> Result<std::convert::Infallible> {
    let program = std::env::current_exe().context("find the file of this program")?;
    let mut words = std::env::args_os();
    let mut command = std::process::Command::new(&program);
    if let Some(name) = words.next() {
        command.arg0(name);
    }
    Err(command.args(words).exec()).with_context(|| format!("run {}", program.display()))
}

/// `towpath agent`. The node's name: the configuration's, else `NODE_NAME`, else the host's.
pub(crate) fn agent(options: &Options) -> Result<bool> {
    towpath_datapath::memory::be_frugal();
    let mut config: AgentConfig = options.load()?;
    or_environment(&mut config.node_name, "NODE_NAME");
    if run(options, "agent", |shutdown| towpath_agent::run(config, shutdown))? != towpath_agent::Ended::Told {
        let Err(reason) = start_anew();
        // Whoever started it starts it again.
        tracing::warn!("ends, for it cannot start anew by itself: {reason:#}");
    }
    Ok(true)
}

/// Options of `towpath carry`.
#[derive(clap::Args, Debug)]
pub(crate) struct CarryOptions {
    #[command(flatten)]
    daemon: Options,
    /// Runs nothing, and succeeds if a carry of the same PID namespace, so of the same container, answers DNS on this node: for
    /// a start-up probe.
    #[arg(long)]
    started: bool,
}

/// `towpath carry`.
pub(crate) fn carry(options: &CarryOptions) -> Result<bool> {
    let config: CarryConfig = options.daemon.load()?;
    if options.started {
        let here =
            crate::client_runtime()?.block_on(towpath_carry::feed::is_of_this_pid_namespace(&config.feed_socket()));
        return here.context("no carry answers DNS on this node");
    }
    run(&options.daemon, "carry", |shutdown| async move { Ok(towpath_carry::run(config, shutdown).await?) })?;
    Ok(true)
}

/// `towpath controller`. Its identity: the configuration's, else `POD_NAME`, else the host's name.
pub(crate) fn controller(options: &Options) -> Result<bool> {
    let mut config: ControllerConfig = options.load()?;
    or_environment(&mut config.identity, "POD_NAME");
    run(options, "controller", |shutdown| async move { Ok(towpath_controller::run(config, shutdown).await?) })?;
    Ok(true)
}
