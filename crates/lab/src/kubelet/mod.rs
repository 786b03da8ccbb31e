//! The stand-in kubelet of one node.
//!
//! ```text
//!   pods of this node (watch) ─► a worker a pod ─► volumes, sandbox, CNI ADD, containers, probes
//!                                     │
//!                                     └─► status patches, events; at the end CNI DEL and the final delete
//! ```
//!
//! It talks to the API server with the node's own identity (`system:node:<name>`) and does what the kubelet does, as far as
//! a person with kubectl or a network plugin can tell.

mod environment;
pub(crate) mod events;
mod files;
mod node;
mod pod;
mod probes;
mod report;
mod slot;
mod start;
mod status;
mod volumes;

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Pod, Service};
use kube::runtime::{WatchStreamExt, reflector, watcher};
use kube::{Api, Client, ResourceExt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::layout::Layout;
use crate::options::{ClusterSpec, NodeSpec};
use crate::runtime::cni::Cni;
use crate::runtime::container::Container;
use crate::runtime::spawn::StageProgram;
use events::EventSink;
use pod::{Message, Worker};

/// What all parts of one kubelet share.
pub(crate) struct NodeContext {
    /// Paths.
    pub(crate) layout: Layout,
    /// The cluster.
    pub(crate) spec: Arc<ClusterSpec>,
    /// The node.
    pub(crate) node: NodeSpec,
    /// API access as this node.
    pub(crate) client: Client,
    /// The hidden commands.
    pub(crate) stage: StageProgram,
    /// The image tree.
    pub(crate) image_root: PathBuf,
    /// The network plugins.
    pub(crate) cni: Cni,
    /// Events.
    pub(crate) events: EventSink,
    /// All Services, for environment variables.
    pub(crate) services: reflector::Store<Service>,
    /// Running containers, for `exec` and its like.
    pub(crate) registry: Registry,
}

impl NodeContext {
    /// The node's addresses.
    pub(crate) fn host_ips(&self) -> Vec<IpAddr> {
        self.node.addresses.iter().map(ipnet::IpNet::addr).collect()
    }
}

/// Where streams find containers: by pod uid and container name.
#[derive(Clone, Default)]
pub(crate) struct Registry(Arc<Mutex<HashMap<String, Entry>>>);

/// What streams need of one pod.
#[derive(Clone)]
pub(crate) struct Entry {
    /// The pod's network namespace, for port-forward.
    pub(crate) netns: PathBuf,
    /// Current (or last) instance of each container.
    pub(crate) containers: HashMap<String, Container>,
}

impl Registry {
    fn map(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pod with this uid.
    pub(crate) fn get(&self, uid: &str) -> Option<Entry> {
        self.map().get(uid).cloned()
    }

    fn add_pod(&self, uid: &str, netns: PathBuf) {
        self.map().insert(uid.to_owned(), Entry { netns, containers: HashMap::new() });
    }

    fn add_container(&self, uid: &str, name: &str, container: Container) {
        if let Some(entry) = self.map().get_mut(uid) {
            entry.containers.insert(name.to_owned(), container);
        }
    }

    /// Forgets a pod.
    pub(crate) fn take(&self, uid: &str) -> Option<Entry> {
        self.map().remove(uid)
    }
}

/// Runs the kubelet until it is dropped. `ready` follows the node's Ready condition.
pub(crate) async fn run(context: Arc<NodeContext>, ready: watch::Sender<bool>) -> Result<()> {
    let registered = node::register(&context).await?;
    let mut tasks = JoinSet::new();
    tasks.spawn(node::heartbeat(context.clone(), registered, ready));
    watch_pods(context, &mut tasks).await
}

/// Starts a worker for each pod of the node and passes it every change.
async fn watch_pods(context: Arc<NodeContext>, tasks: &mut JoinSet<()>) -> Result<()> {
    let api: Api<Pod> = Api::all(context.client.clone());
    let config = watcher::Config::default().fields(&format!("spec.nodeName={}", context.node.name));
    let mut stream = watcher(api, config).default_backoff().boxed();
    let mut workers: HashMap<String, mpsc::UnboundedSender<Message>> = HashMap::new();
    let mut listed: Option<Vec<String>> = None;
    loop {
        while let Some(result) = tasks.try_join_next() {
            result?;
        }
        let event = match stream.next().await {
            Some(Ok(event)) => event,
            Some(Err(error)) => {
                tracing::debug!(node = %context.node.name, %error, "pod watch");
                continue;
            }
            None => anyhow::bail!("the pod watch of node {} ended", context.node.name),
        };
        workers.retain(|_, sender| !sender.is_closed());
        match event {
            watcher::Event::Init => listed = Some(Vec::new()),
            watcher::Event::InitApply(pod) => {
                listed.get_or_insert_default().push(pod.uid().unwrap_or_default());
                dispatch(&context, &mut workers, tasks, pod);
            }
            watcher::Event::InitDone => {
                let seen = listed.take().unwrap_or_default();
                for (uid, sender) in workers.iter().filter(|(uid, _)| !seen.contains(uid)) {
                    tracing::debug!(uid, "pod is gone");
                    let _ = sender.send(Message::Gone);
                }
            }
            watcher::Event::Apply(pod) => dispatch(&context, &mut workers, tasks, pod),
            watcher::Event::Delete(pod) => {
                if let Some(sender) = workers.get(&pod.uid().unwrap_or_default()) {
                    let _ = sender.send(Message::Gone);
                }
            }
        }
    }
}

fn dispatch(
    context: &Arc<NodeContext>,
    workers: &mut HashMap<String, mpsc::UnboundedSender<Message>>,
    tasks: &mut JoinSet<()>,
    pod: Pod,
) {
    let uid = pod.uid().unwrap_or_default();
    let pod = Arc::new(pod);
    if let Some(sender) = workers.get(&uid)
        && sender.send(Message::Pod(pod.clone())).is_ok()
    {
        return;
    }
    let (worker, sender) = Worker::new(context.clone(), pod);
    workers.insert(uid, sender);
    tasks.spawn(worker.run());
}
