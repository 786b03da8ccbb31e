//! `lab serve`: the one process behind a lab.
//!
//! ```text
//!   serve ─┬─ API server (127.0.0.1 for kubectl, the underlay's gateway for nodes and pods)
//!          ├─ controllers and scheduler
//!          ├─ a kubelet a node
//!          └─ children, restarted when they die: agent and carry a node, controller
//! ```
//!
//! It says what it does as lines of JSON on its standard output ([`Step`]) until the cluster is ready, then closes it.
//! An essential part's death ends the process; SIGTERM ends it in good order.

mod bootstrap;
mod child;
mod components;

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use kube::Client;
use kube::runtime::{WatchStreamExt, reflector, watcher};
use serde::{Deserialize, Serialize};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use towpath_apiserver::{ApiServer, Config, Durability, UserInfo};

use crate::kernel::{cgroup, mounts, ns};
use crate::kubelet::events::EventSink;
use crate::kubelet::{self, NodeContext, Registry};
use crate::layout::Layout;
use crate::options::{ClusterSpec, NodeSpec};
use crate::runtime::cni::Cni;
use crate::runtime::image;
use crate::runtime::spawn::{StageProgram, write_private};
use crate::{controllers, streams, topology};
use components::Tokens;

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
    let spec: Arc<ClusterSpec> = Arc::new(serde_json::from_slice(&text).context("understand the lab's cluster file")?);
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
    let children = components::start(layout, &spec, &api, &tokens, &stop)?;
    let mut ready = Vec::new();
    for node in &spec.nodes {
        let (is_ready, became_ready) = watch::channel(false);
        ready.push((node.name.clone(), became_ready));
        let context = node_context(layout, &spec, node, &api, services.clone(), registry.clone(), &mut essential)?;
        essential.spawn(async move { kubelet::run(context, is_ready).await });
    }

    tell(&Step::Doing("waiting for nodes to become ready".to_owned()));
    let waiting = wait_until_ready(layout, &spec, ready);
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
            _ = terminate.recv() => break Ok(()),
            _ = interrupt.recv() => break Ok(()),
            Some(ended) = essential.join_next() => {
                break match ended {
                    Ok(Ok(())) => Err(anyhow!("a part of the lab ended unexpectedly")),
                    Ok(Err(error)) => Err(error),
                    Err(error) => Err(anyhow!("a part of the lab died: {error}")),
                };
            }
        }
    };
    stop.cancel();
    essential.shutdown().await;
    children.shut_down().await;
    api.shutdown().await;
    result
}

fn prepare_directories(layout: &Layout, spec: &ClusterSpec) -> Result<()> {
    let make = |path: &Path| std::fs::create_dir_all(path).with_context(|| format!("create {}", path.display()));
    make(&layout.credentials())?;
    make(&layout.run().join("pods"))?;
    for node in &spec.nodes {
        make(&layout.node_cni_conf(&node.name))?;
        make(&layout.node_host_dir(&node.name))?;
        cgroup::create(&layout.node_system_cgroup(&node.name))?;
        mounts::mount_bpffs(&layout.node_bpffs(&node.name))?;
        if let Some(template) = &spec.cni_conf {
            let text = fill_cni_conf(template, layout, node)?;
            let file = layout.node_cni_conf(&node.name).join("10-given.conflist");
            std::fs::write(&file, text).with_context(|| format!("write {}", file.display()))?;
        }
    }
    Ok(())
}

/// Replaces the placeholders that [`crate::options::UpOptions::cni_conf`] documents.
fn fill_cni_conf(template: &str, layout: &Layout, node: &NodeSpec) -> Result<String> {
    let cidrs: Vec<String> = node.pod_cidrs.iter().map(ToString::to_string).collect();
    Ok(template
        .replace("$NODE", &node.name)
        .replace("$POD_CIDRS", &serde_json::to_string(&cidrs)?)
        .replace("$POD_CIDR", cidrs.first().map_or("", String::as_str))
        .replace("$STATE", &layout.node_state(&node.name).display().to_string()))
}

fn gateways(spec: &ClusterSpec) -> Vec<IpAddr> {
    spec.underlay.iter().map(ipnet::IpNet::addr).collect()
}

async fn start_api(layout: &Layout, spec: &ClusterSpec) -> Result<(ApiServer, Tokens)> {
    let credentials = layout.credentials();
    std::fs::create_dir_all(&credentials).with_context(|| format!("create {}", credentials.display()))?;
    let tokens = Tokens::load_or_make(&credentials.join("tokens.json"), spec)?;
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

fn node_context(
    layout: &Layout,
    spec: &Arc<ClusterSpec>,
    node: &NodeSpec,
    api: &ApiServer,
    services: reflector::Store<k8s_openapi::api::core::v1::Service>,
    registry: Registry,
    essential: &mut JoinSet<Result<()>>,
) -> Result<Arc<NodeContext>> {
    let user = UserInfo::new(format!("system:node:{}", node.name), &["system:nodes"]);
    let client = Client::new(api.loopback(user), "default");
    let (events, writing) = EventSink::new(client.clone(), &node.name);
    essential.spawn(async move {
        writing.await;
        std::future::pending().await
    });
    let url = format!("https://{}", SocketAddr::new(*gateways(spec).first().context("no underlay")?, API_PORT));
    let credentials = api.client_credentials(&format!("system:node:{}", node.name), &["system:nodes"])?;
    let file = layout.credentials().join(format!("kubelet-{}.kubeconfig", node.name));
    write_private(&file, api.kubeconfig(&url, &credentials).as_bytes())?;
    Ok(Arc::new(NodeContext {
        layout: layout.clone(),
        spec: spec.clone(),
        node: node.clone(),
        client,
        stage: stage_program(spec),
        image_root: layout.images(),
        cni: Cni {
            conf_dir: layout.node_cni_conf(&node.name),
            bin_dirs: spec.cni_bin_dirs.clone(),
            node_netns: layout.netns(&node.name),
        },
        events,
        services,
        registry,
    }))
}

/// How this lab's hidden commands are called.
pub(crate) fn stage_program(spec: &ClusterSpec) -> StageProgram {
    StageProgram { program: spec.program.clone(), args: spec.program_args.clone() }
}

/// Waits until every node is Ready and, with Towpath as the network, cluster DNS answers on each.
async fn wait_until_ready(
    layout: &Layout,
    spec: &ClusterSpec,
    ready: Vec<(String, watch::Receiver<bool>)>,
) -> Result<()> {
    // Their agents start all at once, on one machine.
    let limit = READY_LIMIT + READY_LIMIT_EACH * u32::try_from(ready.len()).unwrap_or(u32::MAX);
    let deadline = tokio::time::Instant::now() + limit;
    for (node, mut is_ready) in ready {
        let waited = tokio::time::timeout_at(deadline, is_ready.wait_for(|ready| *ready)).await;
        if !matches!(waited, Ok(Ok(_))) {
            let log = layout.node_state(&node).join("agent.log");
            bail!(
                "node {node} did not become ready within {} s; its agent's log is {}",
                limit.as_secs(),
                log.display()
            );
        }
    }
    if spec.cni_conf.is_none() {
        for node in &spec.nodes {
            components::wait_for_dns(layout, spec, node, deadline).await?;
        }
    }
    Ok(())
}
