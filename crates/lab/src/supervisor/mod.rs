//! `lab serve`: the one process behind a lab.
//!
//! ```text
//!   serve ─┬─ API server (127.0.0.1 for kubectl, the underlay's gateway for nodes and pods)
//!          ├─ controllers and scheduler
//!          ├─ a kubelet a node
//!          └─ children, restarted when they die: agent and carry a node, controller
//! ```
//!
//! Nodes come and go while it runs ([`nodes`]), as `towpath lab node` asks for it ([`control`]).
//!
//! It says what it does as lines of JSON on its standard output ([`Step`]) until the cluster is ready, then closes it.
//! An essential part's death ends the process; SIGTERM ends it in good order.

mod bootstrap;
mod child;
mod components;
pub(crate) mod control;
mod nodes;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kube::Client;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use serde::{Deserialize, Serialize};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_apiserver::{ApiServer, Config, Durability, UserInfo};

use crate::kernel::{cgroup, ns};
use crate::kubelet::Registry;
use crate::layout::Layout;
use crate::options::ClusterSpec;
use crate::runtime::image;
use crate::runtime::spawn::{StageProgram, write_private};
use crate::{controllers, streams, topology};
use components::Tokens;
use control::{Ask, Asked};
use nodes::{Nodes, Starting};

/// Port of the API server inside the underlay, as kubeadm's.
pub(crate) const API_PORT: u16 = 6443;
/// How long nodes may take to become ready before `lab up` gives up, and how much longer for each.
const READY_LIMIT: Duration = Duration::from_secs(60);
const READY_LIMIT_EACH: Duration = Duration::from_secs(2);

/// Progress of `lab serve`, one JSON object a line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Step {
    /// Something has begun.
    Doing(String),
    /// The cluster is ready.
    Ready,
    /// It will not become ready, or only in part; the text says why.
    Failed(String),
}

fn tell(step: &Step) {
    use std::io::Write;
    if let Ok(line) = serde_json::to_string(step) {
        let mut out = std::io::stdout().lock();
        let _ = writeln!(out, "{line}").and_then(|()| out.flush());
    }
}

/// Nobody listens to standard output any more: `lab up` has returned.
fn close_stdout() {
    if let Ok(null) = std::fs::OpenOptions::new().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

/// The process's main function: joins its cgroup and session, then serves until it is told to end.
pub(crate) fn main(layout: &Layout) -> Result<()> {
    // Fails when this is a session's leader already, which is fine too.
    let _ = nix::unistd::setsid();
    cgroup::create(&layout.supervisor_cgroup())?;
    cgroup::join(&layout.supervisor_cgroup())?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(std::thread::available_parallelism().map_or(2, std::num::NonZero::get).clamp(2, 8))
        .enable_all()
        .build()
        .context("start the async runtime")?;
    let result = runtime.block_on(serve(layout));
    if let Err(error) = &result {
        tell(&Step::Failed(format!("{error:#}")));
    }
    runtime.shutdown_timeout(Duration::from_secs(1));
    result
}

async fn serve(layout: &Layout) -> Result<()> {
    let text =
        std::fs::read(layout.cluster_file()).with_context(|| format!("read {}", layout.cluster_file().display()))?;
    let spec: ClusterSpec = serde_json::from_slice(&text).context("understand the lab's cluster file")?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = CancellationToken::new();

    tell(&Step::Doing("making nodes and the API server".to_owned()));
    prepare_directories(layout, &spec)?;
    let (images, own) = (layout.images(), spec.program.clone());
    let (network, api, image) = tokio::join!(
        topology::create(layout, &spec),
        start_api(layout, &spec),
        tokio::task::spawn_blocking(move || image::prepare(&images, &own)),
    );
    network.context("build the lab's network")?;
    image??;
    let (api, tokens) = api?;
    open_listeners(layout, &spec, &api).await?;
    write_kubeconfig(layout, &spec, &api)?;
    let admin = Client::new(api.loopback(UserInfo::admin()), "default");
    bootstrap::run(&admin, &spec).await.context("create what every cluster has")?;

    tell(&Step::Doing("starting nodes".to_owned()));
    let mut essential: JoinSet<Result<()>> = JoinSet::new();
    let controllers = controllers::run(admin.clone(), api.ca_pem().to_owned(), stop.clone());
    essential.spawn(watch_controllers(controllers));
    let registry = Registry::default();
    api.set_stream_handler(Arc::new(streams::Streams::new(layout.clone(), registry.clone())));
    let services = watch_services(&admin, &mut essential);
    let socket = layout.control_socket();
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let (asking, mut asked) = mpsc::channel(1);
    essential.spawn(control::listen(listener, asking));
    let mut nodes = Nodes::new(layout.clone(), spec, api.clone(), admin, tokens, services, registry);
    let starting = nodes.start_all(&mut essential)?;

    tell(&Step::Doing("waiting for nodes to become ready".to_owned()));
    let waiting = wait_until_ready(layout.clone(), nodes.spec().clone(), starting);
    tokio::pin!(waiting);
    let mut announced = false;
    let result = loop {
        tokio::select! {
            result = &mut waiting, if !announced => {
                announced = true;
                match result {
                    Ok(()) => tell(&Step::Ready),
                    Err(error) => tell(&Step::Failed(format!("{error:#}"))),
                }
                close_stdout();
            }
            Some(asked) = asked.recv() => change_nodes(layout, &mut nodes, asked, &mut essential).await,
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            Some(ended) = essential.join_next() => match ended {
                // A node that was told to.
                Ok(Ok(())) => {}
                Ok(Err(error)) => break Err(error),
                Err(error) => break Err(anyhow!("a part of the lab died: {error}")),
            },
        }
    };
    stop.cancel();
    essential.shutdown().await;
    nodes.shut_down().await;
    api.shutdown().await;
    result
}

/// Does what was asked; of a node that is added, the answer waits until it is ready.
async fn change_nodes(layout: &Layout, nodes: &mut Nodes, asked: Asked, essential: &mut JoinSet<Result<()>>) {
    match &asked.what {
        Ask::DeleteNode(name) => {
            let deleted = nodes.delete(name).await;
            asked.answer(deleted);
        }
        Ask::AddNode => match nodes.add(essential).await {
            Ok((node, ready)) => {
                let waiting = wait_until_ready(layout.clone(), nodes.spec().clone(), vec![(node.clone(), ready)]);
                tokio::spawn(async move { asked.answer(waiting.await.map(|()| node)) });
            }
            Err(error) => asked.answer(Err(error)),
        },
    }
}

fn prepare_directories(layout: &Layout, spec: &ClusterSpec) -> Result<()> {
    for dir in [layout.credentials(), layout.run().join("pods")] {
        std::fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    }
    spec.nodes.iter().try_for_each(|node| nodes::prepare(layout, spec, node))
}

fn gateways(spec: &ClusterSpec) -> Vec<IpAddr> {
    spec.underlay.iter().map(ipnet::IpNet::addr).collect()
}

async fn start_api(layout: &Layout, spec: &ClusterSpec) -> Result<(ApiServer, Tokens)> {
    let credentials = layout.credentials();
    std::fs::create_dir_all(&credentials).with_context(|| format!("create {}", credentials.display()))?;
    let tokens = Tokens::load_or_make(layout, spec)?;
    let mut config = Config::new(layout.api_data());
    config.service_cidrs.clone_from(&spec.service_cidrs);
    config.advertise = gateways(spec).into_iter().map(|address| (address, API_PORT)).collect();
    config.tokens = tokens.users();
    config.durability = Durability::Relaxed;
    let api = ApiServer::start(config).await.context("start the API server")?;
    Ok((api, tokens))
}

async fn open_listeners(layout: &Layout, spec: &ClusterSpec, api: &ApiServer) -> Result<()> {
    let local = SocketAddr::from(([127, 0, 0, 1], spec.api_port));
    let listener = TcpListener::bind(local).with_context(|| {
        format!(
            "listen on {local} (the lab's API port; if another program took it, run `towpath lab down` and `up` again)"
        )
    })?;
    api.serve(listener)?;
    for gateway in gateways(spec) {
        let address = SocketAddr::new(gateway, API_PORT);
        let bind = move || TcpListener::bind(address).with_context(|| format!("listen on {address} in the underlay"));
        api.serve(ns::in_net(&layout.netns("underlay"), bind).await?)?;
    }
    Ok(())
}

fn write_kubeconfig(layout: &Layout, spec: &ClusterSpec, api: &ApiServer) -> Result<()> {
    let credentials = api.client_credentials("kubernetes-admin", &["system:masters"])?;
    let text = api.kubeconfig(&format!("https://127.0.0.1:{}", spec.api_port), &credentials);
    // Contexts of several labs side by side are told apart by the lab's name.
    let text = text.replace("towpath", &format!("towpath-{}", spec.name));
    write_private(&layout.kubeconfig(), text.as_bytes())
}

async fn watch_controllers(mut controllers: JoinSet<()>) -> Result<()> {
    match controllers.join_next().await {
        None => std::future::pending().await,
        Some(Ok(())) => bail!("a controller ended unexpectedly"),
        Some(Err(error)) => bail!("a controller died: {error}"),
    }
}

/// All Services, kept current for the kubelets' environment variables.
fn watch_services(
    admin: &Client,
    essential: &mut JoinSet<Result<()>>,
) -> reflector::Store<k8s_openapi::api::core::v1::Service> {
    let (store, writer) = reflector::store();
    let stream =
        reflector(writer, watcher(kube::Api::all(admin.clone()), watcher::Config::default())).default_backoff();
    essential.spawn(async move {
        futures::StreamExt::for_each(stream, |_| std::future::ready(())).await;
        bail!("the watch of Services ended")
    });
    store
}

/// How this lab's hidden commands are called.
pub(crate) fn stage_program(spec: &ClusterSpec) -> StageProgram {
    StageProgram { program: spec.program.clone(), args: spec.program_args.clone() }
}

/// Waits until these nodes are Ready and, with Towpath as the network, cluster DNS answers on each.
async fn wait_until_ready(layout: Layout, spec: ClusterSpec, starting: Vec<Starting>) -> Result<()> {
    // Their agents start all at once, on one machine.
    let limit = READY_LIMIT + READY_LIMIT_EACH * u32::try_from(starting.len()).unwrap_or(u32::MAX);
    let deadline = tokio::time::Instant::now() + limit;
    let mut nodes = Vec::new();
    for (node, mut is_ready) in starting {
        let waited = tokio::time::timeout_at(deadline, is_ready.wait_for(|ready| *ready)).await;
        if !matches!(waited, Ok(Ok(_))) {
            let log = layout.node_state(&node.name).join("agent.log");
            bail!(
                "node {} did not become ready within {} s; its agent's log is {}",
                node.name,
                limit.as_secs(),
                log.display()
            );
        }
        nodes.push(node);
    }
    if spec.cni_conf.is_none() {
        for node in &nodes {
            components::wait_for_dns(&layout, &spec, node, deadline).await?;
        }
    }
    Ok(())
}
