//! Deletes Leases that say who announces an address which no Service has any more.
//!
//! Agents make them (`kube-system/towpath-lb-ADDRESS`) and never delete one, for each knows only its own part. Whoever asks for one address
//! after the other would fill the namespace. A Lease goes when nobody has its address and it has not been written to between
//! two looks; and it is deleted only as it was seen then, so that an agent that takes it at that moment keeps it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams, ListParams, Preconditions};
use kube::{Client, ResourceExt};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::task::AbortOnDropHandle;
use towpath_model::canonical;

/// Where agents have them.
const NAMESPACE: &str = "kube-system";
/// How their names begin, and what tells them from others.
const PREFIX: &str = "towpath-lb-";
const LABEL: &str = "app.kubernetes.io/name=towpath";
const ADDRESS_ANNOTATION: &str = "towpath.dev/address";
/// Between looks.
const LOOK: Duration = Duration::from_secs(60);
/// One request.
const REQUEST: Duration = Duration::from_secs(5);
/// So many are deleted at one look.
const AT_A_LOOK: usize = 500;

/// The addresses that Services have; none: not known yet.
type InUse = Option<BTreeSet<IpAddr>>;

/// Runs aside of whoever gives addresses. Dropping it ends it.
pub(super) struct Sweeping {
    in_use: watch::Sender<InUse>,
    _task: AbortOnDropHandle<()>,
}

impl Sweeping {
    /// Looks from now on, as soon as it is told what is in use.
    pub(super) fn start(client: Client) -> Self {
        let (in_use, told) = watch::channel(None);
        let task = tokio::spawn(async move {
            let mut sweep = Sweep::new(&client);
            let mut look = interval(LOOK);
            look.set_missed_tick_behavior(MissedTickBehavior::Delay);
            loop {
                look.tick().await;
                let in_use = told.borrow().clone();
                let Some(in_use) = in_use else { continue };
                if let Err(error) = sweep.look(&in_use).await {
                    tracing::debug!(%error, "Leases of load balancers' addresses cannot be listed; trying again");
                }
            }
        });
        Self { in_use, _task: AbortOnDropHandle::new(task) }
    }

    /// What Services have now.
    pub(super) fn tell(&self, in_use: BTreeSet<IpAddr>) {
        self.in_use.send_if_modified(|known| known.replace(in_use.clone()).as_ref() != Some(&in_use));
    }
}

/// A Lease as it stood: uid and version.
type Stood = (Option<String>, Option<String>);

struct Sweep {
    api: Api<Lease>,
    /// Those of addresses that nobody had at the last look.
    idle: BTreeMap<String, Stood>,
}

impl Sweep {
    fn new(client: &Client) -> Self {
        Self { api: Api::namespaced(client.clone(), NAMESPACE), idle: BTreeMap::new() }
    }

    /// Deletes what was idle at the last look and still is.
    async fn look(&mut self, in_use: &BTreeSet<IpAddr>) -> Result<(), kube::Error> {
        let params = ListParams::default().labels(LABEL);
        let Ok(listed) = timeout(REQUEST, self.api.list(&params)).await else { return Ok(()) };
        let nobodys = |lease: &Lease| address(lease).is_some_and(|address| !in_use.contains(&address));
        let now: BTreeMap<String, Stood> = listed?
            .into_iter()
            .filter(nobodys)
            .map(|lease| (lease.name_any(), (lease.uid(), lease.resource_version())))
            .collect();
        let over = now.iter().filter(|(name, stood)| self.idle.get(*name) == Some(*stood)).take(AT_A_LOOK);
        for (name, (uid, version)) in over {
            let preconditions = Preconditions { uid: uid.clone(), resource_version: version.clone() };
            let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
            match timeout(REQUEST, self.api.delete(name, &params)).await {
                Ok(Ok(_)) => tracing::debug!(lease = name, "deleted: nobody has its address"),
                other => {
                    tracing::debug!(lease = name, error = ?other.map(|done| done.err()), "not deleted; trying again")
                }
            }
        }
        self.idle = now;
        Ok(())
    }
}

/// The address that a Lease of an agent is about; none: it is another's Lease.
fn address(lease: &Lease) -> Option<IpAddr> {
    if !lease.name_any().starts_with(PREFIX) {
        return None;
    }
    lease.annotations().get(ADDRESS_ANNOTATION)?.parse().ok().map(canonical)
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use kube::api::{ObjectMeta, PostParams};
    use kube::config::{KubeConfigOptions, Kubeconfig};
    use towpath_apiserver::{ApiServer, Config};

    use super::*;

    async fn make(api: &Api<Lease>, name: &str, address: &str) -> Lease {
        let metadata = ObjectMeta {
            name: Some(name.to_owned()),
            labels: Some([("app.kubernetes.io/name".to_owned(), "towpath".to_owned())].into()),
            annotations: Some([(ADDRESS_ANNOTATION.to_owned(), address.to_owned())].into()),
            ..ObjectMeta::default()
        };
        api.create(&PostParams::default(), &Lease { metadata, spec: None }).await.unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn leases_of_addresses_that_nobody_has_go_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let server = ApiServer::start(Config::new(directory.path().join("data"))).await.unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("https://{}", listener.local_addr().unwrap());
        server.serve(listener).unwrap();
        let admin = server.client_credentials("admin", &["system:masters"]).unwrap();
        let parsed = Kubeconfig::from_yaml(&server.kubeconfig(&url, &admin)).unwrap();
        let config = kube::Config::from_custom_kubeconfig(parsed, &KubeConfigOptions::default()).await.unwrap();
        let client = Client::try_from(config).unwrap();
        let api: Api<Lease> = Api::namespaced(client.clone(), NAMESPACE);
        make(&api, "towpath-lb-192-0-2-1", "192.0.2.1").await;
        make(&api, "towpath-lb-192-0-2-2", "192.0.2.2").await;
        let renewed = make(&api, "towpath-lb-192-0-2-3", "192.0.2.3").await;
        make(&api, "towpath-controller", "192.0.2.4").await;
        make(&api, "towpath-lb-odd", "none").await;
        let in_use = BTreeSet::from(["192.0.2.1".parse().unwrap()]);
        let mut sweep = Sweep::new(&client);
        let names = async || -> BTreeSet<String> {
            api.list(&ListParams::default()).await.unwrap().iter().map(ResourceExt::name_any).collect()
        };
        sweep.look(&in_use).await.unwrap();
        assert_eq!(names().await.len(), 5, "one look is not enough");
        let renewed = Lease { spec: Some(Default::default()), ..renewed };
        api.replace("towpath-lb-192-0-2-3", &PostParams::default(), &renewed).await.unwrap();
        sweep.look(&in_use).await.unwrap();
        let left = ["towpath-controller", "towpath-lb-192-0-2-1", "towpath-lb-192-0-2-3", "towpath-lb-odd"];
        assert_eq!(names().await, left.map(str::to_owned).into());

        // Written to between the look that finds it idle and the deletion: as if it had been seen before.
        let mut late = api.get("towpath-lb-192-0-2-3").await.unwrap();
        late.metadata.labels.get_or_insert_default().insert("a".to_owned(), "b".to_owned());
        let stood = (late.uid(), late.resource_version());
        api.replace("towpath-lb-192-0-2-3", &PostParams::default(), &late).await.unwrap();
        let preconditions = Preconditions { uid: stood.0, resource_version: stood.1 };
        let params = DeleteParams { preconditions: Some(preconditions), ..DeleteParams::default() };
        assert!(api.delete("towpath-lb-192-0-2-3", &params).await.is_err());
        sweep.look(&in_use).await.unwrap();
        sweep.look(&in_use).await.unwrap();
        assert_eq!(names().await.len(), 3, "{:?}", names().await);
    }
}
