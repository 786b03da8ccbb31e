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

/// A pool; one that cannot be understood any more is as it was: a mistake in it moves no traffic. (Its condition says so.)
fn parsed(object: &Readable<PoolObject>, before: &channel::Sender<Pools>) -> Option<(String, AddressPool)> {
    let name = k8s_openapi::Metadata::metadata(object).name.clone()?;
    let pool = match object.object() {
        Ok(object) => AddressPool::try_from(object).map_err(|error| error.to_string()),
        Err(error) => Err(error.to_owned()),
    };
    match pool {
        Ok(pool) => Some((name, pool)),
        Err(error) => {
            warn!(pool = name, error, "this AddressPool cannot be understood; it counts as it was before");
            let known = before.borrow().get(&name).cloned();
            known.map(|pool| (name, pool))
        }
    }
}
