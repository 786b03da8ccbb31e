//! The built-in controllers and the scheduler: what kube-controller-manager and kube-scheduler do in a real cluster.
//!
//! Each is level-triggered: an event only says where to look, the decision is made from what the API server holds then. So a
//! controller may be stopped and started at any moment, and two events for one object cost one look.
//!
//! | module | does |
//! | --- | --- |
//! | [`scheduler`] | binds pods to nodes |
//! | [`replicaset`], [`deployment`] | replicas, rolling updates, history |
//! | [`daemonset`], [`statefulset`] | one pod a node; pods with names of their own |
//! | [`endpoints`] | EndpointSlices and Endpoints of Services, mirroring of hand-made Endpoints |
//! | [`service_cidrs`] | condition and end of ranges of Service addresses |
//! | [`namespace`] | what every namespace has, and the end of one |
//! | [`garbage`] | objects whose owners are gone |

mod daemonset;
mod deployment;
mod endpoints;
mod events;
mod garbage;
mod namespace;
mod owned;
mod pods;
mod replicaset;
mod scheduler;
mod service_cidrs;
mod statefulset;
mod template;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use kube::Client;
use kube::runtime::controller::{Action, Controller};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

/// What every controller needs.
#[derive(Clone)]
pub(crate) struct Context {
    client: Client,
    cluster_ca: String,
}

/// Why a look at an object did not end well; it is looked at again a little later.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The API server refused or did not answer.
    #[error(transparent)]
    Kube(#[from] kube::Error),
    /// The object lacks something the API server always sets.
    #[error("object without {0}")]
    Incomplete(&'static str),
    /// Something of ours could not be written as JSON.
    #[error(transparent)]
    Json(#[from] serde_json::Error),
}

/// Whether an API error is this HTTP status.
pub(crate) fn is_status(error: &kube::Error, code: u16) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == code)
}

/// `Ok` also when the object was gone already.
pub(crate) fn gone_is_fine<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Ok(_) => Ok(()),
        Err(error) if is_status(&error, 404) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Starts every controller on `client` (which may do everything) and returns their tasks. `cluster_ca` is the PEM certificate
/// that pods trust the API server by.
///
/// A task ends when `shutdown` is cancelled; dropping the set ends all at once. A task that ends before is a failure
/// that the supervisor reports.
pub fn run(client: Client, cluster_ca: String, shutdown: CancellationToken) -> JoinSet<()> {
    let context = Arc::new(Context { client, cluster_ca });
    let mut tasks = JoinSet::new();
    let mut start = |task: std::pin::Pin<Box<dyn Future<Output = ()> + Send>>| {
        let shutdown = shutdown.clone();
        tasks.spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = task => {}
            }
        });
    };
    start(Box::pin(scheduler::run(context.clone())));
    start(Box::pin(replicaset::run(context.clone())));
    start(Box::pin(deployment::run(context.clone())));
    start(Box::pin(daemonset::run(context.clone())));
    start(Box::pin(statefulset::run(context.clone())));
    start(Box::pin(endpoints::run(context.clone())));
    start(Box::pin(endpoints::mirror::run(context.clone())));
    start(Box::pin(service_cidrs::run(context.clone())));
    start(Box::pin(namespace::run(context.clone())));
    start(Box::pin(garbage::run(context)));
    tasks
}

/// Runs a controller until its stream ends (which it does not).
pub(crate) async fn drive<K, Fut>(
    name: &'static str,
    controller: Controller<K>,
    context: Arc<Context>,
    reconcile: impl FnMut(Arc<K>, Arc<Context>) -> Fut + Send + 'static,
) where
    K: kube::Resource + Clone + serde::de::DeserializeOwned + std::fmt::Debug + Send + Sync + 'static,
    K::DynamicType: Eq + std::hash::Hash + Clone + Default + std::fmt::Debug + Unpin + Send + Sync,
    Fut: Future<Output = Result<Action, Error>> + Send + 'static,
{
    let retry = move |_: Arc<K>, error: &Error, _: Arc<Context>| {
        match error {
            // Somebody else was faster; the next look sees what they did.
            Error::Kube(inner) if is_status(inner, 409) || is_status(inner, 404) => debug!(controller = name, %error),
            // A namespace that ends refuses new objects: nothing to tell.
            Error::Kube(inner) if is_status(inner, 403) => debug!(controller = name, %error),
            _ => warn!(controller = name, %error, "trying again"),
        }
        Action::requeue(Duration::from_millis(200))
    };
    controller.run(reconcile, retry, context).for_each(|_| std::future::ready(())).await;
}
