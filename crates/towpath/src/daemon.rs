//! `towpath agent`, `carry` and `controller`: configuration, log, signals.

use std::future::Future;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::de::DeserializeOwned;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;
use towpath_wire::config::{AgentConfig, CarryConfig, ControllerConfig};
use tracing::info;
use tracing_subscriber::EnvFilter;

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
        let Some(path) = &self.config else { return Ok(T::default()) };
        let text = std::fs::read_to_string(path).with_context(|| format!("could not read {}", path.display()))?;
        serde_saphyr::from_str(&text).with_context(|| format!("{} is no configuration of this program", path.display()))
    }

    fn start_log(&self) -> Result<()> {
        let filter = match &self.log {
            Some(text) => EnvFilter::try_new(text).with_context(|| format!("--log {text:?}"))?,
            None => EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info")),
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

/// Runs a daemon until SIGTERM or SIGINT.
fn run<F>(options: &Options, name: &'static str, daemon: impl FnOnce(CancellationToken) -> F) -> Result<bool>
where
    F: Future<Output = Result<()>>,
{
    options.start_log()?;
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
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
    })?;
    Ok(true)
}

/// `towpath agent`.
pub(crate) fn agent(options: &Options) -> Result<bool> {
    let config: AgentConfig = options.load()?;
    run(options, "agent", |shutdown| towpath_agent::run(config, shutdown))
}

/// `towpath carry`.
pub(crate) fn carry(options: &Options) -> Result<bool> {
    let config: CarryConfig = options.load()?;
    run(options, "carry", |shutdown| async move { Ok(towpath_carry::run(config, shutdown).await?) })
}

/// `towpath controller`.
pub(crate) fn controller(options: &Options) -> Result<bool> {
    let config: ControllerConfig = options.load()?;
    run(options, "controller", |shutdown| async move { Ok(towpath_controller::run(config, shutdown).await?) })
}
