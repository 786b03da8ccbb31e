//! The pools as agents know them: an address that is in none is announced by nobody.

use std::collections::BTreeMap;

use kube::api::Api;
use kube::runtime::watcher;
use tokio::sync::watch as channel;
use towpath_model::custom::AddressPool as PoolObject;
use towpath_model::{AddressPool, Readable};
use tracing::{debug, warn};

use crate::relist::Watch;

type Pools = BTreeMap<String, AddressPool>;

/// Follows all pools, until nobody looks any more. Where the kind is not installed there are none; until the API server answers they are
/// those `before`.
pub(super) fn watch(client: kube::Client, before: Pools) -> channel::Receiver<Pools> {
    let (sender, receiver) = channel::channel(before);
    tokio::spawn(follow(client, sender));
    receiver
}

async fn follow(client: kube::Client, sender: channel::Sender<Pools>) {
    let mut events = Watch::new(Api::<Readable<PoolObject>>::all(client), watcher::Config::default());
    let mut listed = Pools::new();
    loop {
        let event = tokio::select! {
            () = sender.closed() => return,
            event = events.next() => event,
        };
        match event {
            Err(error) => {
                debug!(%error, "AddressPools cannot be watched; trying again");
                if matches!(&error, watcher::Error::InitialListFailed(kube::Error::Api(status)) if status.code == 404) {
                    sender.send_if_modified(|pools| !std::mem::take(pools).is_empty());
                }
            }
            Ok(watcher::Event::Init) => listed.clear(),
            Ok(watcher::Event::InitApply(object)) => listed.extend(parsed(&object, &sender)),
            Ok(watcher::Event::InitDone) => {
                let all = std::mem::take(&mut listed);
                sender.send_if_modified(|pools| std::mem::replace(pools, all.clone()) != all);
            }
            Ok(watcher::Event::Apply(object)) => {
                if let Some((name, pool)) = parsed(&object, &sender) {
                    sender.send_if_modified(|pools| pools.insert(name, pool.clone()) != Some(pool));
                }
            }
            Ok(watcher::Event::Delete(object)) => {
                let name = k8s_openapi::Metadata::metadata(&object).name.clone().unwrap_or_default();
                sender.send_if_modified(|pools| pools.remove(&name).is_some());
            }
        }
    }
}

/// A pool; one that cannot be understood any more is as it was: a mistake in it moves no traffic. (Its condition says so.) Who never knew
/// it otherwise, because the agent has just started, takes what can be understood of it.
fn parsed(object: &Readable<PoolObject>, before: &channel::Sender<Pools>) -> Option<(String, AddressPool)> {
    let name = k8s_openapi::Metadata::metadata(object).name.clone()?;
    let pool = match object.object() {
        Ok(object) => AddressPool::try_from(object).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_owned()),
    };
    match pool {
        Ok(pool) => Some((name, pool)),
        Err(error) => {
            let known = before.borrow().get(&name).cloned();
            let counts = if known.is_some() { "it counts as it was before" } else { "the rest of it counts" };
            warn!(pool = name, error, "this AddressPool cannot be understood; {counts}");
            let pool = known.or_else(|| object.object().ok().map(AddressPool::readable));
            pool.map(|pool| (name, pool))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn object(addresses: &[&str]) -> Readable<PoolObject> {
        let object = json!({"apiVersion": "towpath.dev/v1alpha1", "kind": "AddressPool", "metadata": {"name": "p"},
            "spec": {"addresses": addresses}});
        serde_json::from_value(object).unwrap()
    }

    #[test]
    fn a_mistake_in_a_pool_silences_nothing_but_itself() {
        let (sender, _receiver) = channel::channel(Pools::new());
        let ranges = |addresses: &[&str]| -> Vec<String> {
            let pool = parsed(&object(addresses), &sender).map(|(_, pool)| pool.ranges).unwrap_or_default();
            pool.iter().map(ToString::to_string).collect()
        };
        let mistaken = ["192.0.2.1-192.0.2.300", "192.0.2.8-192.0.2.9"];
        assert_eq!(ranges(&mistaken), ["192.0.2.8-192.0.2.9"], "an agent that has just started");
        sender.send_modify(|pools| pools.extend(parsed(&object(&["192.0.2.1-192.0.2.9"]), &sender_of_none())));
        assert_eq!(ranges(&mistaken), ["192.0.2.1-192.0.2.9"], "one that knew it before");
    }

    fn sender_of_none() -> channel::Sender<Pools> {
        channel::channel(Pools::new()).0
    }
}
