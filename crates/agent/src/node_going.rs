//! Whether this node is about to leave the cluster: its object is being deleted, or the cluster autoscaler has chosen it to go. Who asks
//! kube-proxy's health, as cloud load balancers do, is to send it no new connections (KEP-3836).

use k8s_openapi::api::core::v1::Node;
use kube::api::Api;
use kube::runtime::watcher;
use tokio::sync::watch as channel;
use towpath_model::{NodeName, Readable};
use tracing::debug;

use crate::relist::Watch;

/// What the cluster autoscaler puts on a node that it is about to take away.
const TO_BE_DELETED: &str = "ToBeDeletedByClusterAutoscaler";

/// Follows one node's object until nobody looks any more. Until the API server answers the node stays.
pub fn watch(client: kube::Client, node: &NodeName) -> channel::Receiver<bool> {
    let (sender, receiver) = channel::channel(false);
    let only = watcher::Config::default().fields(&format!("metadata.name={node}"));
    tokio::spawn(follow(Watch::new(Api::all(client), only), sender));
    receiver
}

async fn follow(mut events: Watch<Readable<Node>>, going: channel::Sender<bool>) {
    loop {
        let event = tokio::select! {
            () = going.closed() => return,
            event = events.next() => event,
        };
        let now = match event {
            Ok(watcher::Event::Apply(object) | watcher::Event::InitApply(object)) => {
                object.object().is_ok_and(is_going)
            }
            Ok(watcher::Event::Delete(_)) => true,
            Ok(watcher::Event::Init | watcher::Event::InitDone) => continue,
            Err(error) => {
                debug!(%error, "this node's object cannot be watched; trying again");
                continue;
            }
        };
        going.send_if_modified(|before| std::mem::replace(before, now) != now);
    }
}

fn is_going(node: &Node) -> bool {
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    node.metadata.deletion_timestamp.is_some() || taints.into_iter().flatten().any(|taint| taint.key == TO_BE_DELETED)
}
