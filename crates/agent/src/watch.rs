//! Watches: one task a kind turns the Kubernetes API's events into updates of the [`Index`].
//!
//! A watch never ends by itself: errors are logged with their kind, waited out with growing, jittered delays ([`crate::relist`]), and followed by a
//! relist that the index takes as a reset. Objects are parsed here, once, each by itself: one that is impossible is logged with
//! its reason and counts as absent (a policy: as one that admits nobody), and holds up no other. A kind that the API server need not have
//! is asked for again now and then.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::SystemTime;

use k8s_openapi::api::core::v1::ConfigMap;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::jiff::Timestamp;
use kube::api::Api;
use kube::runtime::watcher;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use towpath_model::custom::NodeNetwork;
use towpath_model::{
    ClusterNetworkPolicy, EndpointSlice, Namespace, NetworkPolicy, Node, NodeName, Pod, Readable, Service, ServiceCidr,
    Sharing,
};
use towpath_plan::backend::Says;
use tracing::{debug, warn};

use crate::counts;
use crate::heard;
use crate::index::{Index, Kind, Noun, Predecessor, ServiceCidrs};
use crate::node_network::given::{self, Given};
use crate::relist::Watch;

/// A change to the index, made by the one who owns it.
pub type Update = Box<dyn FnOnce(&mut Index) + Send>;

/// Starts a watch of every kind. Dropping the set ends them.
pub fn watch_all(client: &kube::Client, updates: &mpsc::Sender<Update>) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(watch::<Node>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<Namespace>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<Pod>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<Service>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<EndpointSlice>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<NetworkPolicy>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch::<ClusterNetworkPolicy>(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch_given(Api::all(client.clone()), updates.clone()));
    tasks.spawn(watch_service_cidrs(Api::all(client.clone()), updates.clone()));
    for of in [Predecessor::CoreDns, Predecessor::KubeDns, Predecessor::IpMasqAgent] {
        tasks.spawn(watch_predecessor(Api::namespaced(client.clone(), "kube-system"), of, updates.clone()));
    }
    tasks
}

fn parse<N>(object: &Readable<N::Object>, sharing: &mut Sharing) -> Option<(N::Key, Option<N>)>
where
    N: Noun,
    N::Object: kube::Resource<DynamicType = ()> + k8s_openapi::Metadata<Ty = ObjectMeta>,
{
    let key = N::key(k8s_openapi::Metadata::metadata(object))?;
    let known = match object.object() {
        Ok(known) => known,
        Err(error) => {
            warn!(kind = ?N::KIND, %key, %error, "an object that does not fit its type");
            let stand_in = N::unreadable(&key);
            return Some((key, stand_in));
        }
    };
    match N::parse(known) {
        Ok(mut noun) => {
            noun.slim(sharing);
            Some((key, Some(noun)))
        }
        Err(error) => {
            // Slices of no Service and the like are ordinary; anything else a person may want to see.
            debug!(kind = ?N::KIND, %key, %error, "object left out");
            let stand_in = N::unreadable(&key);
            Some((key, stand_in))
        }
    }
}

/// When what led to this state of an object happened, as its controller says (`EndpointsLastChangeTriggerTime`: a pod became ready, or
/// its Service changed).
fn triggered(object: &impl k8s_openapi::Metadata<Ty = ObjectMeta>) -> Option<SystemTime> {
    let annotations = object.metadata().annotations.as_ref()?;
    let time: Timestamp = annotations.get("endpoints.kubernetes.io/last-change-trigger-time")?.parse().ok()?;
    Some(time.into())
}

fn version(object: &impl k8s_openapi::Metadata<Ty = ObjectMeta>) -> Option<u64> {
    heard::version(object.metadata())
}

async fn watch<N>(api: Api<Readable<N::Object>>, updates: mpsc::Sender<Update>)
where
    N: Noun,
    N::Object: k8s_openapi::Metadata<Ty = ObjectMeta>
        + kube::Resource<DynamicType = ()>
        + Clone
        + DeserializeOwned
        + Debug
        + Send
        + Sync
        + 'static,
    Readable<N::Object>: kube::Resource,
{
    let mut events = Watch::new(api, watcher::Config::default());
    let mut listed: BTreeMap<N::Key, N> = BTreeMap::new();
    let mut versions = heard::Listed::default();
    let mut absence = Absence::default();
    let mut sharing = Sharing::default();
    loop {
        let event = match events.next().await {
            Ok(event) => event,
            Err(error) if N::OPTIONAL && absence.shown_by::<N>(&error) => {
                let none: Update = Box::new(|index| index.listed_at::<N>(BTreeMap::new(), heard::Listed::default()));
                if updates.send(none).await.is_err() {
                    return;
                }
                continue;
            }
            Err(error) => {
                counts::interrupted(N::KIND, &error);
                warn!(kind = ?N::KIND, %error, "watch interrupted; going on where it was, or listing again");
                continue;
            }
        };
        // A list that is begun is nothing that the API server said.
        if !matches!(event, watcher::Event::Init) {
            counts::heard(N::KIND);
        }
        let update: Update = match event {
            watcher::Event::Init => {
                listed.clear();
                versions = heard::Listed::default();
                continue;
            }
            watcher::Event::InitApply(object) => {
                if let Some((key, noun)) = parse::<N>(&object, &mut sharing) {
                    version(&object).into_iter().for_each(|version| versions.add(N::KIND, &key, version));
                    listed.extend(noun.map(|noun| (key, noun)));
                }
                continue;
            }
            watcher::Event::InitDone => {
                absence = Absence { listed: true, ..Absence::default() };
                let (all, versions) = (std::mem::take(&mut listed), std::mem::take(&mut versions));
                Box::new(move |index| index.listed_at(all, versions))
            }
            watcher::Event::Apply(object) => match parse::<N>(&object, &mut sharing) {
                Some((key, noun)) => {
                    let (since, version) = (object.object().ok().and_then(triggered), version(&object));
                    Box::new(move |index| index.apply_at(key, noun, version, since))
                }
                None => continue,
            },
            watcher::Event::Delete(object) => match N::key(k8s_openapi::Metadata::metadata(&object)) {
                Some(key) => {
                    let version = version(&object);
                    let uid = k8s_openapi::Metadata::metadata(&object).uid.clone().unwrap_or_default();
                    Box::new(move |index| index.remove_at::<N>(&key, &uid, version))
                }
                None => continue,
            },
        };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

/// Whether the API server has no such kind. One that had it is believed only when it has said so several times: while its definition is
/// being replaced, or the server starts, what was listed holds.
#[derive(Default)]
struct Absence {
    listed: bool,
    denials: u32,
    complained: bool,
}

impl Absence {
    /// So often in a row, with growing delays between, it must say so.
    const BELIEVED: u32 = 4;

    fn shown_by<N: Noun>(&mut self, error: &watcher::Error) -> bool {
        if is_not_served(error) {
            self.denials += 1;
            return !self.listed || self.denials >= Self::BELIEVED;
        }
        self.denials = 0;
        let unknown = !self.listed && is_forbidden(error);
        if unknown && !std::mem::replace(&mut self.complained, true) {
            let consequence = "none of them is in force on this node; give the agent's ClusterRole list and watch";
            warn!(kind = ?N::KIND, %error, "objects of this kind may not be listed: {consequence}");
        }
        unknown
    }
}

/// The same for what nodes say of their new pods. Where the kind is not installed it is asked for now and then.
async fn watch_given(api: Api<Readable<NodeNetwork>>, updates: mpsc::Sender<Update>) {
    let mut events = Watch::new(api, watcher::Config::default());
    let mut listed: BTreeMap<NodeName, (Vec<Given>, Says)> = BTreeMap::new();
    let name = |object: &Readable<NodeNetwork>| k8s_openapi::Metadata::metadata(object).name.clone().map(NodeName::new);
    // A node of another version may say what this one does not know: then its new pods are known by their status.
    let said = |object: &Readable<NodeNetwork>| {
        object.object().map(|object| (given::of(object), Says::of(object))).unwrap_or_default()
    };
    loop {
        let event = match events.next().await {
            Ok(event) => event,
            Err(error) => {
                counts::interrupted(Kind::NodeNetwork, &error);
                debug!(%error, "NodeNetworks cannot be watched");
                continue;
            }
        };
        let update: Update = match event {
            watcher::Event::Init => {
                listed.clear();
                continue;
            }
            watcher::Event::InitApply(object) => {
                listed.extend(name(&object).map(|name| (name, said(&object))));
                continue;
            }
            watcher::Event::InitDone => {
                let all = std::mem::take(&mut listed);
                Box::new(move |index| {
                    index.say_all(all.iter().map(|(node, (_, says))| (node.clone(), says.clone())).collect());
                    index.give_all(all.into_iter().map(|(node, (given, _))| (node, given)).collect());
                })
            }
            watcher::Event::Apply(object) => {
                let Some(name) = name(&object) else { continue };
                let (given, says) = said(&object);
                Box::new(move |index| {
                    index.say(name.clone(), Some(says));
                    index.give(name, Some(given));
                })
            }
            watcher::Event::Delete(object) => {
                let Some(name) = name(&object) else { continue };
                Box::new(move |index| {
                    index.say(name.clone(), None);
                    index.give(name, None);
                })
            }
        };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

/// The same for ranges of Service addresses. A server without the kind says so (404), and is asked again now and then.
async fn watch_service_cidrs(api: Api<Readable<ServiceCIDR>>, updates: mpsc::Sender<Update>) {
    let mut events = Watch::new(api, watcher::Config::default());
    let (mut listed, mut complained) = (BTreeMap::new(), false);
    let name = |object: &Readable<ServiceCIDR>| k8s_openapi::Metadata::metadata(object).name.clone();
    loop {
        let update: Update = match events.next().await {
            Ok(watcher::Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed.extend(name(&object).and_then(|name| Some((name, service_cidr(&object)?))));
                continue;
            }
            Ok(watcher::Event::InitDone) => {
                let all = ServiceCidrs::Listed(std::mem::take(&mut listed));
                Box::new(move |index| index.set_service_cidrs(all))
            }
            Ok(watcher::Event::Apply(object)) => {
                let (Some(name), now) = (name(&object), service_cidr(&object)) else { continue };
                Box::new(move |index| index.set_service_cidr(name, now))
            }
            Ok(watcher::Event::Delete(object)) => {
                let Some(name) = name(&object) else { continue };
                Box::new(move |index| index.set_service_cidr(name, None))
            }
            Err(error) if is_not_served(&error) => Box::new(|index| index.set_service_cidrs(ServiceCidrs::NotServed)),
            Err(error) => {
                // Said once: without the right to it (an older installation) it would be said for ever.
                if !std::mem::replace(&mut complained, true) {
                    warn!(%error, "ServiceCIDRs cannot be watched: the ranges of Services stay as they are");
                }
                continue;
            }
        };
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

fn service_cidr(object: &Readable<ServiceCIDR>) -> Option<ServiceCidr> {
    let parsed = object.object().map_err(ToString::to_string);
    match parsed.and_then(|object| ServiceCidr::try_from(object).map_err(|error| error.to_string())) {
        Ok(range) => Some(range),
        Err(error) => {
            warn!(error, "a ServiceCIDR that cannot be understood counts as absent");
            None
        }
    }
}

/// The API server does not know the kind.
fn is_not_served(error: &watcher::Error) -> bool {
    refused_with(error) == Some(404)
}

/// The API server does not let this agent know.
fn is_forbidden(error: &watcher::Error) -> bool {
    refused_with(error) == Some(403)
}

fn refused_with(error: &watcher::Error) -> Option<u16> {
    use watcher::Error::{InitialListFailed, WatchStartFailed};
    match error {
        InitialListFailed(kube::Error::Api(status)) | WatchStartFailed(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

/// The same for the ConfigMap of a predecessor, and for no other ConfigMap.
async fn watch_predecessor(api: Api<ConfigMap>, of: Predecessor, updates: mpsc::Sender<Update>) {
    let only = watcher::Config::default().fields(&format!("metadata.name={}", of.config_map()));
    let mut events = Watch::new(api, only);
    let (mut listed, mut complained) = (BTreeMap::new(), false);
    loop {
        let data = match events.next().await {
            Ok(watcher::Event::Init) => {
                listed.clear();
                continue;
            }
            Ok(watcher::Event::InitApply(object)) => {
                listed = object.data.unwrap_or_default();
                continue;
            }
            Ok(watcher::Event::InitDone) => std::mem::take(&mut listed),
            Ok(watcher::Event::Apply(object)) => object.data.unwrap_or_default(),
            Ok(watcher::Event::Delete(_)) => BTreeMap::new(),
            Err(error) => {
                // Said once: without the right to it (an older installation) it would be said for ever.
                if !std::mem::replace(&mut complained, true) {
                    warn!(config_map = of.config_map(), %error, "cannot be watched: what it says is not followed");
                }
                continue;
            }
        };
        complained = false;
        let update: Update = Box::new(move |index| index.configure(of, data));
        if updates.send(update).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_kind_that_was_there_is_gone_only_when_the_server_says_so_again_and_again() {
        let refused = |code: u16| {
            let status = kube::core::Status::failure("refused", "").with_code(code);
            watcher::Error::InitialListFailed(kube::Error::Api(Box::new(status)))
        };
        type Policies = ClusterNetworkPolicy;
        let mut new = Absence::default();
        assert!(new.shown_by::<Policies>(&refused(404)), "there never was any");
        assert!(new.shown_by::<Policies>(&refused(403)), "nothing can be known");
        assert!(!new.shown_by::<Policies>(&refused(503)), "it does not say");
        let mut there = Absence { listed: true, ..Absence::default() };
        let said: Vec<bool> = (0..4).map(|_| there.shown_by::<Policies>(&refused(404))).collect();
        assert_eq!(said, [false, false, false, true]);
        assert!(!there.shown_by::<Policies>(&refused(403)), "what was listed holds");
        assert!(!there.shown_by::<Policies>(&refused(404)), "it begins anew");
    }

    #[test]
    fn the_time_that_a_controller_says_is_read_and_nonsense_is_not() {
        let of = |said: &str| {
            let annotations = [("endpoints.kubernetes.io/last-change-trigger-time".to_owned(), said.to_owned())];
            let metadata = ObjectMeta { annotations: Some(annotations.into()), ..ObjectMeta::default() };
            triggered(&k8s_openapi::api::discovery::v1::EndpointSlice { metadata, ..Default::default() })
        };
        assert_eq!(of("1970-01-01T00:01:40Z"), Some(SystemTime::UNIX_EPOCH + Duration::from_secs(100)));
        assert_eq!(of("1970-01-01T01:01:40.5+01:00"), Some(SystemTime::UNIX_EPOCH + Duration::from_millis(100_500)));
        for nonsense in ["", "yesterday", "1970-01-01", "-9999999999-01-01T00:00:00Z"] {
            assert_eq!(of(nonsense), None, "{nonsense}");
        }
        assert_eq!(triggered(&k8s_openapi::api::core::v1::Service::default()), None);
    }
}
