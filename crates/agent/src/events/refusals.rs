//! What a Service or a pod asks for and does not get, as Events on that object, where its owner looks.
//!
//! Every node refuses the same of a Service, and one says it: of the nodes that are ready and run this network, the one whose name sorts
//! first. All know who that is without asking each other, nothing is written for it, and where two take themselves for the one for
//! a moment, both write the same Event: its name is made of what it says, and the API server takes it once. The price: while that one's
//! agent is down and its node is not, nobody says it; every node's `towpath status` does. What a pod asks for is refused by its own
//! node, which says so; a policy for which a node has no room, by that node.
//!
//! An Event is written once for as long as the refusal stands, when it has stood for a moment, and not again within the hour that it
//! lives. Who can make Services can make refusals: a namespace gets so many Events an hour, and all together so many. What the API server
//! does not take costs nothing of that: it is tried again, less and less often.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::PoisonError;
use std::time::{Duration, SystemTime};

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, PostParams};
use tokio::time::Instant;
use towpath_model::cluster_policy::object::ClusterNetworkPolicy;
use towpath_model::{NamespacedName, NodeName, World};
use towpath_plan::services::{Asks, Refusal, RefusedPart};
use tracing::debug;

use super::LONGEST;
use crate::backoff::Backoff;
use crate::index::Index;
use crate::read;
use crate::reconcile::Report;
use crate::status::{SharedSources, Sources};

/// How often refusals are looked at.
const LOOK: Duration = Duration::from_secs(5);
/// What passes by itself, as while a Service and its slices come one by one, is nobody's business.
const SETTLE: Duration = Duration::from_secs(5);
/// As long as an API server keeps an Event (`--event-ttl`).
const HOUR: Duration = Duration::from_secs(3600);
/// What was not taken is tried again after this long, and at last so often.
const AGAIN: Duration = LOOK;
const SELDOM: Duration = Duration::from_secs(300);
/// Events an hour for the objects of one namespace, and for all.
pub(super) const OF_A_NAMESPACE: usize = 20;
pub(super) const OF_ALL: usize = 200;

/// Events of the last hour.
#[derive(Debug, Default)]
pub(super) struct Written(pub(super) VecDeque<Instant>);

impl Written {
    /// The latest of them was none.
    fn take_back(&mut self) {
        self.0.pop_back();
    }

    pub(super) fn may(&mut self, most: usize, now: Instant) -> bool {
        while self.0.front().is_some_and(|at| now.duration_since(*at) >= HOUR) {
            self.0.pop_front();
        }
        self.0.len() < most
    }
}

/// One refusal: since when it stands, when it was last seen, and whether it was said.
#[derive(Debug)]
struct Standing {
    since: Instant,
    seen: Instant,
    said: bool,
    /// Since when it may be said, after it was not taken.
    again: Instant,
    tries: Backoff,
}

/// Refusals that stand, or did within the hour.
#[derive(Debug, Default)]
struct Told {
    refusals: BTreeMap<Refusal, Standing>,
    of: BTreeMap<String, Written>,
    all: Written,
}

impl Told {
    /// Takes the refusals of now; those to say. What there is no room for now is said later, if it still stands.
    fn look(&mut self, refusals: Vec<Refusal>, now: Instant) -> Vec<Refusal> {
        let present: BTreeSet<Refusal> = refusals.into_iter().collect();
        // What was not said has no claim once it is gone; what was, is not said again while its Event lives.
        self.refusals.retain(|refusal, standing| {
            present.contains(refusal) || (standing.said && now.duration_since(standing.seen) < HOUR)
        });
        let mut due = Vec::new();
        for refusal in present {
            let tries = Backoff::between(AGAIN, SELDOM);
            let fresh = Standing { since: now, seen: now, said: false, again: now, tries };
            let standing = self.refusals.entry(refusal.clone()).or_insert(fresh);
            standing.seen = now;
            if standing.said || now < standing.again || now.duration_since(standing.since) < SETTLE {
                continue;
            }
            let of = self.of.entry(refusal.name.namespace.clone()).or_default();
            if of.may(OF_A_NAMESPACE, now) && self.all.may(OF_ALL, now) {
                of.0.push_back(now);
                self.all.0.push_back(now);
                standing.said = true;
                due.push(refusal);
            }
        }
        self.of.retain(|_, written| written.may(1, now) || !written.0.is_empty());
        due
    }
}

impl Told {
    /// The API server took none of these, which the last look had due: they are due again in a while, and have cost nothing. Those that
    /// were `asked` of it wait longer each time.
    fn were_not_said(&mut self, refusals: &[Refusal], asked: usize, now: Instant) {
        for (n, refusal) in refusals.iter().enumerate() {
            // All of one look have one time, so it does not matter which of them is taken back.
            self.all.take_back();
            if let Some(of) = self.of.get_mut(&refusal.name.namespace) {
                of.take_back();
            }
            if let Some(standing) = self.refusals.get_mut(refusal) {
                standing.said = false;
                standing.again = if n < asked { now + standing.tries.failed() } else { now };
            }
        }
    }
}

/// Whether this node says what all refuse.
fn speaks(index: &Index, node: &NodeName) -> bool {
    let World { nodes, .. } = index.world();
    // Where no node publishes (the kind is not installed), all count.
    let runs_us = |name: &NodeName| index.given().is_empty() || index.given().contains_key(name) || name == node;
    nodes.values().find(|known| known.ready && runs_us(&known.name)).is_some_and(|first| first.name == *node)
}

/// Whether other nodes may refuse it nothing.
fn is_of_one_node(refusal: &Refusal) -> bool {
    refusal.asks == Asks::Pod || (refusal.part == RefusedPart::Room && refusal.asks != Asks::Service)
}

fn refused(sources: &Sources) -> Vec<Refusal> {
    let report = sources.report.read().unwrap_or_else(PoisonError::into_inner);
    let Report { refused_services, misread_pods, misread_bandwidth, misread_policies, aside, .. } = &*report;
    let all = [refused_services, misread_pods, misread_bandwidth, misread_policies, aside];
    all.into_iter().flatten().cloned().collect()
}

/// Writes an Event for every refusal that stays. Runs for ever.
pub(crate) async fn announce(client: kube::Client, sources: SharedSources) {
    let mut told = Told::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(sources) = sources.get() else { continue };
        let mut refusals = refused(sources);
        let all = speaks(&read(&sources.index), &sources.node);
        refusals.retain(|refusal| all || is_of_one_node(refusal));
        let due = told.look(refusals, Instant::now());
        let (mut rest, mut left) = (due.as_slice(), Vec::new());
        while let Some((refusal, others)) = rest.split_first() {
            if let Err(error) = say(&client, &sources.node, refusal).await {
                // The log and the status say the same meanwhile.
                debug!(%error, %refusal, "event not written; trying again");
                if is_of_all(&error) {
                    break;
                }
                left.push(refusal.clone());
            }
            rest = others;
        }
        told.were_not_said(&left, left.len(), Instant::now());
        told.were_not_said(rest, 1, Instant::now());
    }
}

/// Whether the API server would take no other Event either: it does not answer, or has too much to do. What it refuses of one object (whose
/// namespace is going, say) it may take of another.
fn is_of_all(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => status.code == 429 || status.code >= 500,
        _ => true,
    }
}

/// Writes one Event; fine when it is there already, or the object is gone.
async fn say(client: &kube::Client, node: &NodeName, refusal: &Refusal) -> Result<(), kube::Error> {
    let Some(uid) = uid(client, refusal.asks, &refusal.name).await? else { return Ok(()) };
    let event = event(node, refusal, &uid);
    let api: Api<Event> = Api::namespaced(client.clone(), namespace_of(refusal));
    match api.create(&PostParams::default(), &event).await {
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(()),
        other => other.map(drop),
    }
}

/// The object's uid: `kubectl describe` shows only Events that have it. Asked by a list, to which the agent has a right.
pub(super) async fn uid(
    client: &kube::Client,
    asks: Asks,
    name: &NamespacedName,
) -> Result<Option<String>, kube::Error> {
    let only = ListParams::default().fields(&format!("metadata.name={}", name.name));
    let found: Vec<ObjectMeta> = match asks {
        Asks::Pod => {
            let api: Api<core::Pod> = Api::namespaced(client.clone(), &name.namespace);
            api.list_metadata(&only).await?.items.into_iter().map(|object| object.metadata).collect()
        }
        Asks::NetworkPolicy => {
            let api: Api<networking::NetworkPolicy> = Api::namespaced(client.clone(), &name.namespace);
            api.list_metadata(&only).await?.items.into_iter().map(|object| object.metadata).collect()
        }
        Asks::ClusterNetworkPolicy => {
            let api: Api<ClusterNetworkPolicy> = Api::all(client.clone());
            api.list_metadata(&only).await?.items.into_iter().map(|object| object.metadata).collect()
        }
        Asks::Service => {
            let api: Api<core::Service> = Api::namespaced(client.clone(), &name.namespace);
            api.list_metadata(&only).await?.items.into_iter().map(|object| object.metadata).collect()
        }
    };
    Ok(found.into_iter().find(|meta| meta.name.as_ref() == Some(&name.name)).and_then(|meta| meta.uid))
}

fn reason(part: RefusedPart) -> &'static str {
    match part {
        RefusedPart::Endpoint => "EndpointRefused",
        RefusedPart::Frontend => "FrontendRefused",
        RefusedPart::Field => "FieldNotUnderstood",
        RefusedPart::HostPort => "HostPortRefused",
        RefusedPart::Room => "TableFull",
    }
}

/// Where its Event is: those of what is in no namespace are in `default`.
fn namespace_of(refusal: &Refusal) -> &str {
    if refusal.name.namespace.is_empty() { "default" } else { &refusal.name.namespace }
}

fn event(node: &NodeName, refusal: &Refusal, uid: &str) -> Event {
    let (name, reason) = (&refusal.name, reason(refusal.part));
    let note: String = refusal.reason.chars().take(LONGEST).collect();
    let beginning: String = name.name.chars().take(200).collect();
    let now = Timestamp::try_from(SystemTime::now()).unwrap_or_default();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{beginning}.{:016x}", hash(&[uid, reason, &note]))),
            namespace: Some(namespace_of(refusal).to_owned()),
            ..ObjectMeta::default()
        },
        regarding: Some(core::ObjectReference {
            api_version: Some(refusal.asks.api_version().to_owned()),
            kind: Some(refusal.asks.kind().to_owned()),
            name: Some(name.name.clone()),
            namespace: Some(name.namespace.clone()).filter(|namespace| !namespace.is_empty()),
            uid: Some(uid.to_owned()),
            ..core::ObjectReference::default()
        }),
        action: Some("ConfigureNetwork".to_owned()),
        reason: Some(reason.to_owned()),
        note: Some(note),
        type_: Some("Warning".to_owned()),
        event_time: Some(MicroTime(now)),
        reporting_controller: Some("towpath-agent".to_owned()),
        reporting_instance: Some(node.to_string()),
        ..Event::default()
    }
}

/// FNV-1a of 64 bits: the same on every node, whatever it was built with.
pub(crate) fn hash(parts: &[&str]) -> u64 {
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use towpath_model::Node;

    use super::*;

    fn loopback(name: &str) -> Refusal {
        let (namespace, name) = name.split_once('/').unwrap();
        Refusal {
            asks: Asks::Service,
            name: NamespacedName::new(namespace, name),
            part: RefusedPart::Endpoint,
            reason: "EndpointSlice a/b: endpoint 127.0.0.1: loopback addresses are the node's own".to_owned(),
        }
    }

    #[test]
    fn what_stands_is_said_once_and_what_passes_is_not() {
        let (mut told, start) = (Told::default(), Instant::now());
        let stands = || vec![loopback("a/web")];
        assert!(told.look(stands(), start).is_empty(), "not at once");
        assert_eq!(told.look(stands(), start + SETTLE), stands());
        assert!(told.look(stands(), start + SETTLE * 2).is_empty(), "once");
        assert!(told.look(stands(), start + HOUR * 3).is_empty(), "for as long as it stands");
        told.look(Vec::new(), start + HOUR * 3 + SETTLE);
        told.look(stands(), start + HOUR * 3 + SETTLE * 2);
        assert!(told.look(stands(), start + HOUR * 3 + SETTLE * 4).is_empty(), "it came back within the hour");
        told.look(Vec::new(), start + HOUR * 5);
        told.look(stands(), start + HOUR * 6);
        assert_eq!(told.look(stands(), start + HOUR * 6 + SETTLE), stands(), "another time, another Event");
        let reason = "node port 30080/TCP already belongs to Service a/first".to_owned();
        let other = Refusal { part: RefusedPart::Frontend, reason, ..loopback("a/web") };
        let both = || vec![loopback("a/web"), other.clone()];
        told.look(both(), start + HOUR * 6 + SETTLE * 2);
        assert_eq!(told.look(both(), start + HOUR * 6 + SETTLE * 3), std::slice::from_ref(&other), "other words");
    }

    #[test]
    fn what_the_api_server_did_not_take_costs_nothing_and_is_tried_less_and_less_often() {
        let (mut told, start) = (Told::default(), Instant::now());
        let stands = || vec![loopback("a/web")];
        told.look(stands(), start);
        let mut tried = Vec::new();
        let rounds = HOUR.as_secs() / LOOK.as_secs();
        for round in 1..rounds {
            let now = start + SETTLE + LOOK * u32::try_from(round).unwrap();
            let due = told.look(stands(), now);
            tried.extend(due.iter().map(|_| round));
            told.were_not_said(&due, due.len(), now);
        }
        assert!(tried.starts_with(&[1, 2, 4, 8, 16]), "{tried:?}");
        assert!((15..30).contains(&tried.len()), "not for ever at once: {tried:?}");
        // The server is back: all that an hour has room for is there.
        let later = start + HOUR + SELDOM;
        let all: Vec<Refusal> = (0..100).map(|n| loopback(&format!("a/s{n:03}"))).chain(stands()).collect();
        let said = told.look(all.clone(), later).len() + told.look(all, later + SETTLE).len();
        assert_eq!(said, OF_A_NAMESPACE);
    }

    #[test]
    fn where_the_server_takes_nothing_the_others_of_a_look_wait_for_the_next_and_no_longer() {
        let (mut told, start) = (Told::default(), Instant::now());
        let all: Vec<Refusal> = (0..3).map(|n| loopback(&format!("a/s{n}"))).collect();
        told.look(all.clone(), start);
        let mut now = start + SETTLE;
        let due = told.look(all.clone(), now);
        assert_eq!(due, all);
        told.were_not_said(&due, 1, now);
        assert_eq!(
            told.look(all.clone(), now + Duration::from_secs(1)),
            all.iter().skip(1).cloned().collect::<Vec<_>>()
        );
        told.were_not_said(all.get(1..).unwrap(), 0, now);
        for _ in 0..OF_ALL {
            now += SELDOM;
            let due = told.look(all.clone(), now);
            assert_eq!(due, all, "nothing is used up");
            told.were_not_said(&due, 1, now);
        }
    }

    #[test]
    fn what_is_refused_of_one_object_says_nothing_of_the_others() {
        let answer = |code: u16| {
            let mut status = kube::core::Status::failure("no", "Reason");
            status.code = code;
            kube::Error::Api(status.boxed())
        };
        assert!(!is_of_all(&answer(403)) && !is_of_all(&answer(422)));
        assert!(is_of_all(&answer(429)) && is_of_all(&answer(503)));
        assert!(is_of_all(&kube::Error::LinesCodecMaxLineLengthExceeded));
    }

    #[test]
    fn one_namespace_cannot_use_up_what_others_need_and_all_have_an_end() {
        let (mut told, start) = (Told::default(), Instant::now());
        let flood =
            |namespace: &str| -> Vec<Refusal> { (0..100).map(|n| loopback(&format!("{namespace}/s{n:03}"))).collect() };
        let mut all = flood("aaa");
        all.push(loopback("zzz/quiet"));
        told.look(all.clone(), start);
        let said = told.look(all.clone(), start + SETTLE);
        assert_eq!(said.len(), OF_A_NAMESPACE + 1);
        assert!(said.contains(&loopback("zzz/quiet")));
        assert!(told.look(all.clone(), start + SETTLE * 2).is_empty());
        let later = told.look(all.clone(), start + SETTLE + HOUR);
        assert_eq!(later.len(), OF_A_NAMESPACE, "the next of them an hour later");
        assert!(later.iter().all(|refusal| !said.contains(refusal)));
        let many: Vec<Refusal> = (0..40).flat_map(|n| flood(&format!("n{n:02}"))).collect();
        let mut told = Told::default();
        told.look(many.clone(), start);
        assert_eq!(told.look(many, start + SETTLE).len(), OF_ALL);
    }

    #[test]
    fn one_node_says_what_all_refuse() {
        let node = |name: &str, ready: bool| Node {
            name: NodeName::new(name),
            labels: BTreeMap::new(),
            internal_ips: Vec::new(),
            other_ips: Vec::new(),
            created: 0,
            pod_cidrs: Vec::new(),
            ready,
            added: Default::default(),
            flannel: None,
        };
        let mut index = Index::default();
        for (name, ready) in [("a", false), ("b", true), ("c", true)] {
            index.apply(NodeName::new(name), Some(node(name, ready)));
        }
        let who = |index: &Index| -> Vec<&str> {
            ["a", "b", "c"].into_iter().filter(|name| speaks(index, &NodeName::new(*name))).collect()
        };
        assert_eq!(who(&index), ["b"], "the first that is ready");
        index.give(NodeName::new("c"), Some(Vec::new()));
        // b says of itself nothing yet, and takes itself for one of us; c knows only of itself.
        assert_eq!(who(&index), ["b", "c"]);
        index.give(NodeName::new("b"), Some(Vec::new()));
        assert_eq!(who(&index), ["b"]);
        index.apply(NodeName::new("a"), Some(node("a", true)));
        index.give(NodeName::new("a"), Some(Vec::new()));
        assert_eq!(who(&index), ["a"]);
    }

    #[test]
    fn the_same_words_of_the_same_object_are_the_same_event_whoever_says_them() {
        let of = |node: &str, refusal: &Refusal, uid: &str| event(&NodeName::new(node), refusal, uid);
        let refusal = loopback("a/web");
        let (one, two) = (of("n1", &refusal, "u"), of("n2", &refusal, "u"));
        assert_eq!(one.metadata.name, two.metadata.name);
        assert_ne!(one.reporting_instance, two.reporting_instance);
        assert_ne!(one.metadata.name, of("n1", &refusal, "another object of that name").metadata.name);
        assert_eq!(one.reason.as_deref(), Some("EndpointRefused"));
        let long = Refusal { reason: "é".repeat(5000), ..refusal };
        let long = of("n1", &long, "u");
        assert_eq!(long.note.map(|note| note.chars().count()), Some(LONGEST));
        assert_eq!(long.reason.as_deref(), Some("EndpointRefused"));
    }
}
