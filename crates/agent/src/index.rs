//! The index: a synchronous in-memory [`World`] kept up to date by `apply / remove / reset`.
//!
//! It says which parts changed, so that only their planners run; an object that says nothing new to the network (a
//! heartbeat, a status nobody here reads) changes nothing. It knows which kinds have had their first full list: nothing is
//! planned, and nothing in the kernel touched, before all have (or, while the API server is away, before what an earlier run knew of
//! them is [recalled](Index::recall)).

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;
use towpath_model::cluster_policy::object;
use towpath_model::desired::PolicyRef;
use towpath_model::{
    ClusterNetworkPolicy, EndpointSlice, Invalid, Namespace, NamespacedName, NetworkPolicy, Node, NodeName, Pod,
    Service, ServiceCidr, Sharing, Uid, World,
};
use towpath_plan::Changed;
use towpath_plan::added_ranges::{self, Within};
use towpath_plan::dns::rules::Sources;
use towpath_policy::compile::Touched;
use tracing::warn;

use crate::aside::Aside;
use crate::heard::{self, Heard};
use crate::node_network::given::Given;
use crate::outliving::{Outliving, Question};
use towpath_plan::backend::Says;

/// A kind the agent watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Nodes.
    Node,
    /// Namespaces.
    Namespace,
    /// Pods.
    Pod,
    /// Services.
    Service,
    /// EndpointSlices.
    EndpointSlice,
    /// NetworkPolicies.
    NetworkPolicy,
    /// ClusterNetworkPolicies. Where the kind is not installed there are none.
    ClusterNetworkPolicy,
    /// What other nodes say of their new pods. Nothing waits for it: where it is not known, or not installed, pods are known by
    /// their status.
    NodeNetwork,
    /// Ranges of Service addresses. Nothing waits for them: until they are known, the ranges are those that were in force last.
    ServiceCidr,
    /// CoreDNS's and kube-dns's configuration. Nothing waits for it: until it is known, DNS is answered as before.
    DnsConfig,
    /// ip-masq-agent's configuration. Nothing waits for it: until it is known, what it said last holds.
    IpMasqAgent,
}

impl Kind {
    /// All that must be known before anything is planned.
    pub const ALL: [Kind; 7] = [
        Kind::Node,
        Kind::Namespace,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::NetworkPolicy,
        Kind::ClusterNetworkPolicy,
    ];
}

/// A noun of the model as the index stores it.
pub trait Noun: Sized + PartialEq + Send + Serialize + DeserializeOwned + 'static {
    /// The Kubernetes object it is parsed from.
    type Object;
    /// What it is found by.
    type Key: Ord + Clone + Send + std::fmt::Display + Serialize + DeserializeOwned + 'static;
    /// Its kind.
    const KIND: Kind;
    /// Whether the API server may not have the kind.
    const OPTIONAL: bool = false;

    /// The key that an object's metadata say, if they do.
    fn key(meta: &ObjectMeta) -> Option<Self::Key>;
    /// The noun, or why the object is none.
    ///
    /// # Errors
    /// The object says something impossible.
    fn parse(object: &Self::Object) -> Result<Self, Invalid>;
    /// Whether it stays in force though the API server no longer has it.
    fn outlives(_index: &mut Index, _key: &Self::Key) -> bool {
        false
    }
    /// The API server has it.
    fn is_there(_index: &mut Index, _key: &Self::Key) {}
    /// Its object was heard of, or is gone, and it is kept as it was heard of; none: of all.
    fn heard_of(_index: &mut Index, _key: Option<&Self::Key>) {}
    /// As its object says it, where something closed stands for it in the world.
    fn as_written<'i>(_index: &'i Index, _key: &Self::Key) -> Option<&'i Self> {
        None
    }
    /// Adds what stays in force though a full list no longer has it.
    fn with_outliving(_index: &mut Index, all: BTreeMap<Self::Key, Self>) -> BTreeMap<Self::Key, Self> {
        all
    }
    /// What stands for an object that cannot even be read; none: it counts as absent.
    fn unreadable(_key: &Self::Key) -> Option<Self> {
        None
    }
    /// Forgets what nothing here depends on, and shares what others say alike. Asked of every object before it is kept.
    fn slim(&mut self, _sharing: &mut Sharing) {}
    /// All that the world has.
    fn all(world: &World) -> &BTreeMap<Self::Key, Self>;
    /// Puts one into the world; the one that had the key.
    fn put(world: &mut World, key: Self::Key, noun: Self) -> Option<Self>;
    /// Takes one out of it.
    fn take(world: &mut World, key: &Self::Key) -> Option<Self>;
    /// Puts these in the place of all.
    fn replace(world: &mut World, all: BTreeMap<Self::Key, Self>);
    /// Names it to whoever compiles policies.
    fn touch(_key: &Self::Key, _touched: &mut Touched) {}
    /// Takes over what follows from others, as it was settled last, from the one that had the key: until it is [settled](Noun::settle) anew it holds.
    fn inherit(&mut self, _before: &Self) {}
    /// Works out what follows from all of them together, after one changed.
    fn settle(_index: &mut Index) {}
    /// `metadata.uid` of kinds whose names are given again while what had them before is still heard of; empty: not known.
    fn uid(&self) -> Uid {
        Uid::default()
    }
    /// Whether policies see no difference.
    fn is_same_to_policies(&self, _other: &Self) -> bool {
        false
    }
    /// The Service whose plan it is part of.
    fn service(&self) -> Option<&NamespacedName> {
        None
    }
}

/// Where the world keeps nouns of a kind.
macro_rules! kept_in {
    ($table:ident, $key:ty) => {
        fn all(world: &World) -> &BTreeMap<$key, Self> {
            &world.$table
        }
        fn put(world: &mut World, key: $key, noun: Self) -> Option<Self> {
            world.$table.insert(key, noun)
        }
        fn take(world: &mut World, key: &$key) -> Option<Self> {
            world.$table.remove(key)
        }
        fn replace(world: &mut World, all: BTreeMap<$key, Self>) {
            world.$table = all.into();
        }
    };
}

macro_rules! noun {
    ($noun:ty, $object:ty, $key:ty, $kind:expr, $table:ident, $find:expr, $touch:expr $(, $service:expr, $slim:expr)?) => {
        impl Noun for $noun {
            type Object = $object;
            type Key = $key;
            const KIND: Kind = $kind;
            fn key(meta: &ObjectMeta) -> Option<$key> {
                let find: fn(&ObjectMeta) -> Option<$key> = $find;
                find(meta)
            }
            fn parse(object: &$object) -> Result<Self, Invalid> {
                Self::try_from(object)
            }
            fn touch(key: &$key, touched: &mut Touched) {
                let touch: fn(&$key, &mut Touched) = $touch;
                touch(key, touched);
            }
            kept_in!($table, $key);
            $(fn service(&self) -> Option<&NamespacedName> {
                let part: fn(&$noun) -> &NamespacedName = $service;
                Some(part(self))
            }
            fn slim(&mut self, sharing: &mut Sharing) {
                let slim: fn(&mut $noun, &mut Sharing) = $slim;
                slim(self, sharing);
            })?
        }
    };
}

fn namespaced(meta: &ObjectMeta) -> Option<NamespacedName> {
    Some(NamespacedName::new(meta.namespace.as_ref()?, meta.name.as_ref()?))
}

/// Policies do not look at it.
fn untouched(_: &NamespacedName, _: &mut Touched) {}

#[allow(clippy::ptr_arg, reason = "the kind of key it has in the index")]
fn namespace_touched(name: &String, touched: &mut Touched) {
    touched.namespace(name.clone());
}

fn slim_service(service: &mut Service, _: &mut Sharing) {
    service.slim();
}

impl Noun for Node {
    type Object = core::Node;
    type Key = NodeName;
    const KIND: Kind = Kind::Node;

    fn key(meta: &ObjectMeta) -> Option<NodeName> {
        meta.name.clone().map(NodeName::new)
    }

    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        Self::try_from(object)
    }

    /// Its ranges and addresses decide who may hold an address: of anybody.
    fn touch(_: &NodeName, touched: &mut Touched) {
        touched.all();
    }

    fn inherit(&mut self, before: &Self) {
        self.put_in_force(before.added.in_force.clone());
    }

    fn settle(index: &mut Index) {
        index.settle_pod_ranges();
    }

    /// One that is no longer ready is where it was.
    fn is_same_to_policies(&self, other: &Self) -> bool {
        let seen = |node: &Self| Self { ready: true, flannel: None, added: Default::default(), ..node.clone() };
        seen(self) == seen(other)
    }

    kept_in!(nodes, NodeName);
}

noun!(Namespace, core::Namespace, String, Kind::Namespace, namespaces, |m| m.name.clone(), namespace_touched);

impl Noun for Pod {
    type Object = core::Pod;
    type Key = NamespacedName;
    const KIND: Kind = Kind::Pod;

    fn key(meta: &ObjectMeta) -> Option<NamespacedName> {
        namespaced(meta)
    }

    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        Self::try_from(object)
    }

    fn touch(key: &NamespacedName, touched: &mut Touched) {
        touched.pod(key.clone());
    }

    fn uid(&self) -> Uid {
        self.uid.clone()
    }

    fn slim(&mut self, sharing: &mut Sharing) {
        self.slim(sharing);
    }

    kept_in!(pods, NamespacedName);
}

noun!(
    Service,
    core::Service,
    NamespacedName,
    Kind::Service,
    services,
    namespaced,
    untouched,
    |s| &s.name,
    slim_service
);
noun!(
    EndpointSlice,
    discovery::EndpointSlice,
    NamespacedName,
    Kind::EndpointSlice,
    slices,
    namespaced,
    untouched,
    |s| &s.service,
    |s, sharing| s.slim(&mut sharing.nodes)
);
impl Noun for NetworkPolicy {
    type Object = networking::NetworkPolicy;
    type Key = NamespacedName;
    const KIND: Kind = Kind::NetworkPolicy;

    fn key(meta: &ObjectMeta) -> Option<NamespacedName> {
        namespaced(meta)
    }

    /// Fails closed as far as can be known: nobody talks to the pods of its namespace until it can be read.
    fn unreadable(key: &NamespacedName) -> Option<Self> {
        Some(Self::deny_all(key.clone()))
    }

    /// Fails closed: what cannot be understood admits nobody, and is said.
    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        let (policy, problems) = Self::fail_closed(object)?;
        for problem in problems {
            warn!(%problem, "this part of the policy is not understood: it admits nobody");
        }
        Ok(policy)
    }

    fn touch(key: &NamespacedName, touched: &mut Touched) {
        touched.policy(key.clone());
    }

    fn outlives(index: &mut Index, key: &NamespacedName) -> bool {
        index.world.policies.contains_key(key) && index.outliving.is_deleted(&index.world, &index.synced, key)
    }

    fn is_there(index: &mut Index, key: &NamespacedName) {
        index.outliving.is_there(key);
    }

    fn heard_of(index: &mut Index, key: Option<&NamespacedName>) {
        index.aside.heard_of_policy(key);
    }

    fn as_written<'i>(index: &'i Index, key: &NamespacedName) -> Option<&'i Self> {
        index.aside.policy(key)
    }

    fn with_outliving(index: &mut Index, mut all: BTreeMap<NamespacedName, Self>) -> BTreeMap<NamespacedName, Self> {
        let outliving = index.outliving.missing_from(&all, &index.world, &index.synced);
        all.extend(outliving);
        all
    }

    kept_in!(policies, NamespacedName);
}

impl Noun for ClusterNetworkPolicy {
    type Object = object::ClusterNetworkPolicy;
    type Key = String;
    const KIND: Kind = Kind::ClusterNetworkPolicy;
    const OPTIONAL: bool = true;

    fn key(meta: &ObjectMeta) -> Option<String> {
        meta.name.clone()
    }

    /// Fails closed, and what cannot be understood is said.
    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        let (policy, problems) = Self::fail_closed(object)?;
        for problem in problems {
            warn!(%problem, "this part of the policy is not understood: it accepts nothing, and denies what it might deny");
        }
        Ok(policy)
    }

    fn touch(_: &String, touched: &mut Touched) {
        touched.cluster_policies();
    }

    fn heard_of(index: &mut Index, key: Option<&String>) {
        index.aside.heard_of_cluster_policy(key);
    }

    fn as_written<'i>(index: &'i Index, key: &String) -> Option<&'i Self> {
        index.aside.cluster_policy(key)
    }

    kept_in!(cluster_policies, String);
}

/// Names policies to whoever compiles them.
fn touched(policies: &[PolicyRef]) -> Touched {
    let mut touched = Touched::nothing();
    for policy in policies {
        match policy {
            PolicyRef::Namespaced(name) => touched.policy(name.clone()),
            PolicyRef::Cluster { .. } => touched.cluster_policies(),
        }
    }
    touched
}

/// What changed since it was last asked.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    kinds: BTreeSet<Kind>,
    /// Services whose object or slices changed one by one.
    services: BTreeSet<NamespacedName>,
    /// All Services may have changed.
    all_services: bool,
    /// When what led to changes of endpoints happened, one an object (`endpoints.kubernetes.io/last-change-trigger-time`).
    since: Vec<SystemTime>,
    /// What policies look at.
    touched: Touched,
}

/// More are not kept: a measurement, no state.
const MOST_SINCE: usize = 4096;

impl Changes {
    /// Whether nothing did.
    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// Whether anything of these kinds did.
    pub fn any(&self, kinds: &[Kind]) -> bool {
        kinds.iter().any(|k| self.kinds.contains(k))
    }

    /// Everything: for a first plan or after a failed apply.
    pub fn everything() -> Self {
        Self {
            kinds: Kind::ALL.into_iter().collect(),
            all_services: true,
            touched: Touched::everything(),
            ..Self::default()
        }
    }

    /// What policies look at and may have changed.
    pub fn take_touched(&mut self) -> Touched {
        std::mem::take(&mut self.touched)
    }

    /// All Services, though none of them changed.
    pub fn all_services() -> Self {
        Self { kinds: [Kind::Service].into(), all_services: true, ..Self::default() }
    }

    /// When what led to changes of endpoints happened, as far as anybody says so.
    pub fn led_to_by(&self) -> &[SystemTime] {
        &self.since
    }

    /// The same, led to by what happened then.
    pub fn since(self, since: Vec<SystemTime>) -> Self {
        Self { since, ..self }
    }

    /// Which Services to plan again.
    pub fn services(&self) -> Changed<'_> {
        // A node's addresses decide which endpoints are the node's own.
        if self.all_services || self.kinds.contains(&Kind::Node) {
            Changed::All
        } else {
            Changed::Services(&self.services)
        }
    }

    /// Both.
    pub fn merge(&mut self, other: Changes) {
        self.kinds.extend(other.kinds);
        self.services.extend(other.services);
        self.all_services |= other.all_services;
        self.touched.merge(other.touched);
        let room = MOST_SINCE.saturating_sub(self.since.len());
        self.since.extend(other.since.into_iter().take(room));
    }
}

/// Somebody in whose place Towpath works, and whose configuration is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Predecessor {
    /// ConfigMap `kube-system/coredns`.
    CoreDns,
    /// ConfigMap `kube-system/kube-dns`.
    KubeDns,
    /// ConfigMap `kube-system/ip-masq-agent`.
    IpMasqAgent,
}

impl Predecessor {
    /// Name of its ConfigMap.
    pub fn config_map(self) -> &'static str {
        match self {
            Self::CoreDns => "coredns",
            Self::KubeDns => "kube-dns",
            Self::IpMasqAgent => "ip-masq-agent",
        }
    }
}

/// What ConfigMaps hold; none: not known yet.
#[derive(Debug, Default)]
struct PredecessorConfig {
    coredns: Option<BTreeMap<String, String>>,
    kube_dns: Option<BTreeMap<String, String>>,
    ip_masq_agent: Option<BTreeMap<String, String>>,
}

/// What the API has of ranges of Service addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum ServiceCidrs {
    /// It has not said yet, or does not let this agent know.
    #[default]
    Unknown,
    /// It has no such kind: Kubernetes before 1.33.
    NotServed,
    /// These objects, by name.
    Listed(BTreeMap<String, ServiceCidr>),
}

/// The world, what changed in it, and which kinds are known in full.
#[derive(Debug, Default)]
pub struct Index {
    world: World,
    given: BTreeMap<NodeName, Vec<Given>>,
    backends: BTreeMap<NodeName, Says>,
    predecessors: PredecessorConfig,
    service_cidrs: ServiceCidrs,
    /// Where pod ranges that are added to nodes may be; none: nobody has said, and none is in force.
    bounds: Option<Within>,
    /// Why some of them are not in force.
    refused_ranges: BTreeMap<NodeName, Vec<String>>,
    changes: Changes,
    synced: BTreeSet<Kind>,
    /// Kinds of which only an earlier run's knowledge is there.
    recalled: BTreeSet<Kind>,
    revisions: BTreeMap<Kind, u64>,
    heard: Heard,
    /// Pods that the API server was asked for because their watch had not brought them yet, with their versions.
    asked_for: BTreeMap<String, u64>,
    outliving: Outliving,
    aside: Aside,
}

impl Index {
    /// The world as last heard of.
    pub fn world(&self) -> &World {
        &self.world
    }

    /// Whether every kind is known: by its first full list, or from an earlier run.
    pub fn is_synced(&self) -> bool {
        self.missing().is_empty() && !self.outliving.holds_up()
    }

    /// Kinds of which nothing is known yet.
    pub fn missing(&self) -> Vec<Kind> {
        Kind::ALL.into_iter().filter(|k| !self.synced.contains(k) && !self.recalled.contains(k)).collect()
    }

    /// Kinds that the API server has listed.
    pub fn listed(&self) -> &BTreeSet<Kind> {
        &self.synced
    }

    /// Kinds of which only what an earlier run knew is there.
    pub fn recalled(&self) -> &BTreeSet<Kind> {
        &self.recalled
    }

    /// Counts the changes of a kind.
    pub fn revision(&self, kind: Kind) -> u64 {
        self.revisions.get(&kind).copied().unwrap_or_default()
    }

    /// What the API server said last of each kind, by versions.
    pub fn heard(&self) -> &Heard {
        &self.heard
    }

    /// The full list, with the versions of its objects.
    pub(crate) fn listed_at<N: Noun>(&mut self, all: BTreeMap<N::Key, N>, versions: heard::Listed) {
        self.heard.list(N::KIND, versions);
        if N::KIND == Kind::Pod {
            self.asked_for.clear();
        }
        self.reset(all);
        // What outlives its object is in force, in no version that anybody could want.
        if N::KIND == Kind::NetworkPolicy {
            let kept: Vec<String> = self.outliving.kept().map(ToString::to_string).collect();
            kept.into_iter().for_each(|policy| self.heard.event(N::KIND, policy, Some(0), true));
        }
    }

    /// An object is now so, in this version.
    pub(crate) fn apply_at<N: Noun>(
        &mut self,
        key: N::Key,
        noun: Option<N>,
        version: Option<u64>,
        since: Option<SystemTime>,
    ) {
        self.heard.event(N::KIND, key.to_string(), version, true);
        if !self.is_of_before::<N>(key.to_string(), version) {
            self.apply_since(key, noun, since);
        }
    }

    /// A pod as the API server answered, whose watch is late with it. What the watch has brought by then is newer: it says how the pod goes on.
    pub(crate) fn answered_with(&mut self, key: NamespacedName, pod: Pod, version: Option<u64>) {
        let known = self.world.pods.get(&key).is_some_and(|known| known.uid == pod.uid);
        if known || version.is_some_and(|version| self.heard.newest(Kind::Pod) >= version) {
            return;
        }
        self.asked_for.extend(version.map(|version| (key.to_string(), version)));
        self.apply(key, Some(pod));
    }

    /// Whether an event is from before what the API server was asked for: it is of an earlier pod of that name, by whose labels the one that is
    /// here now must not be judged, and whose end is not its own.
    fn is_of_before<N: Noun>(&mut self, name: String, version: Option<u64>) -> bool {
        if N::KIND != Kind::Pod || self.asked_for.is_empty() {
            return false;
        }
        let asked_for = self.asked_for.get(&name).copied();
        let before = asked_for.zip(version).is_some_and(|(asked_for, version)| version < asked_for);
        if !before {
            self.asked_for.remove(&name);
        }
        before
    }

    /// An object is gone since this version. As long as it holds all the same, it counts as there. `uid`: its own, as far as that is told: another's
    /// end, heard late or twice, is not its.
    pub(crate) fn remove_at<N: Noun>(&mut self, key: &N::Key, uid: &str, version: Option<u64>) {
        let known = N::all(&self.world).get(key).map(N::uid).unwrap_or_default();
        let of_another = known.is_other_than(&Uid::from(uid));
        if !self.is_of_before::<N>(key.to_string(), version) && !of_another {
            self.remove::<N>(key);
        }
        if !N::all(&self.world).contains_key(key) {
            self.heard.event(N::KIND, key.to_string(), version, false);
        }
    }

    /// NetworkPolicies that the API server no longer has and that hold ([`crate::outliving`]).
    pub fn outliving(&self) -> BTreeSet<NamespacedName> {
        self.outliving.of_ending()
    }

    /// From now on whoever takes the questions is asked whether namespaces end that policies are deleted from and `node` has pods of.
    pub fn ask_about_namespaces(&mut self, node: NodeName, questions: mpsc::UnboundedSender<Question>) {
        self.outliving.ask(node, questions);
    }

    /// NetworkPolicies that an earlier run enforced: what of them is no longer there was deleted meanwhile, perhaps with its namespace.
    pub fn remember_policies(&mut self, former: BTreeMap<NamespacedName, NetworkPolicy>) {
        self.outliving.remember(former);
    }

    /// What the API server says of a namespace that policies were deleted from.
    pub fn namespace_ends(&mut self, question: &Question, ends: bool) {
        if ends
            && let Some(namespace) = self.world.namespaces.get_mut(&question.namespace)
            && !std::mem::replace(&mut namespace.terminating, true)
        {
            self.touch(Kind::Namespace);
        }
        self.outliving.answered(question);
        self.end_what_is_over();
    }

    /// Takes away the policies that nothing keeps any more.
    fn end_what_is_over(&mut self) {
        for policy in self.outliving.over(&self.world, &self.synced) {
            self.heard.event(Kind::NetworkPolicy, policy.to_string(), None, false);
            self.aside.heard_of_policy(Some(&policy));
            if self.world.policies.remove(&policy).is_some() {
                self.touch(Kind::NetworkPolicy);
                self.changes.touched.policy(policy);
            }
        }
    }

    /// Closes these policies, which ask for more than this node holds, until their objects change or they are [taken back](Index::take_back);
    /// what that touches. Nothing else changes: the API server says what it said.
    pub fn set_aside(&mut self, policies: &[PolicyRef]) -> Touched {
        policies.iter().for_each(|policy| self.aside.put(&mut self.world, policy));
        touched(policies)
    }

    /// The policies that stand aside.
    pub fn aside(&self) -> Vec<PolicyRef> {
        self.aside.all()
    }

    /// Has all of them in the world again as they are written; which, and what that touches.
    pub fn take_back(&mut self) -> (Vec<PolicyRef>, Touched) {
        let all = self.aside.take_back(&mut self.world);
        let touched = touched(&all);
        (all, touched)
    }

    fn touch(&mut self, kind: Kind) {
        self.changes.kinds.insert(kind);
        *self.revisions.entry(kind).or_default() += 1;
    }

    /// What an earlier run knew of a kind, until the API server lists it; what it has listed already is not touched.
    pub fn recall<N: Noun>(&mut self, all: BTreeMap<N::Key, N>) {
        if self.synced.contains(&N::KIND) {
            return;
        }
        self.replace(all);
        self.recalled.insert(N::KIND);
    }

    /// Addresses that nodes say they gave to their pods, by node: of every node whose object is there.
    pub fn given(&self) -> &BTreeMap<NodeName, Vec<Given>> {
        &self.given
    }

    /// What nodes say of backends, of every node whose object is there.
    pub fn backends(&self) -> &BTreeMap<NodeName, Says> {
        &self.backends
    }

    /// What a node says of backends now; `None`: its object is gone.
    pub fn say(&mut self, node: NodeName, says: Option<Says>) {
        let now = says.clone();
        let before = match says {
            Some(says) => self.backends.insert(node, says),
            None => self.backends.remove(&node),
        };
        if before != now {
            self.changes.kinds.insert(Kind::NodeNetwork);
            self.settle_pod_ranges();
        }
    }

    /// What all nodes say of backends now.
    pub fn say_all(&mut self, all: BTreeMap<NodeName, Says>) {
        if self.backends != all {
            self.backends = all;
            self.changes.kinds.insert(Kind::NodeNetwork);
            self.settle_pod_ranges();
        }
    }

    /// From now on pod ranges may be added to nodes that are in the cluster's and in none of the Services'.
    pub fn bound_pod_ranges(&mut self, cluster: Vec<IpNet>, services: Vec<IpNet>) {
        self.bounds = Some(Within::Cluster { cluster, services });
        self.settle_pod_ranges();
    }

    /// Why pod ranges that were added to nodes are not in force, by node, for people.
    pub fn refused_ranges(&self) -> &BTreeMap<NodeName, Vec<String>> {
        &self.refused_ranges
    }

    /// Works out which of the ranges that were added to nodes are in force.
    fn settle_pod_ranges(&mut self) {
        let Some(bounds) = &self.bounds else { return };
        let mut settled = added_ranges::settle(&self.world.nodes, &self.backends, bounds);
        let before = std::mem::replace(&mut self.refused_ranges, std::mem::take(&mut settled.refused));
        let mut changed = before != self.refused_ranges;
        for (name, node) in &mut self.world.nodes {
            let now = settled.in_force.remove(name).unwrap_or_default();
            if node.added.in_force != now {
                node.put_in_force(now);
                self.changes.touched.all();
                changed = true;
            }
        }
        if changed {
            self.touch(Kind::Node);
        }
    }

    /// Addresses that a node says it gave to its pods now; `None`: its object is gone.
    pub fn give(&mut self, node: NodeName, pods: Option<Vec<Given>>) {
        let now = pods.clone();
        let before = match pods {
            Some(pods) => self.given.insert(node, pods),
            None => self.given.remove(&node),
        };
        if before != now {
            self.changes.kinds.insert(Kind::NodeNetwork);
        }
    }

    /// The same of all nodes.
    pub fn give_all(&mut self, all: BTreeMap<NodeName, Vec<Given>>) {
        if self.given != all {
            self.given = all;
            self.changes.kinds.insert(Kind::NodeNetwork);
        }
    }

    /// Ranges of Service addresses, as far as the API says any.
    pub fn service_cidrs(&self) -> &ServiceCidrs {
        &self.service_cidrs
    }

    /// They are these now.
    pub fn set_service_cidrs(&mut self, now: ServiceCidrs) {
        if self.service_cidrs != now {
            self.service_cidrs = now;
            self.changes.kinds.insert(Kind::ServiceCidr);
        }
    }

    /// One of them is so now; `None`: it is gone, or says nothing that can be understood.
    pub fn set_service_cidr(&mut self, name: String, now: Option<ServiceCidr>) {
        let mut all = match &self.service_cidrs {
            ServiceCidrs::Listed(all) => all.clone(),
            ServiceCidrs::Unknown | ServiceCidrs::NotServed => BTreeMap::new(),
        };
        match now {
            Some(now) => drop(all.insert(name, now)),
            None => drop(all.remove(&name)),
        }
        self.set_service_cidrs(ServiceCidrs::Listed(all));
    }

    /// The configuration of other DNS servers; none before all of it is known.
    pub fn dns_config(&self) -> Option<Sources> {
        let both = (self.predecessors.coredns.clone()?, self.predecessors.kube_dns.clone()?);
        Some(Sources { coredns: both.0, kube_dns: both.1 })
    }

    /// The configuration of ip-masq-agent, empty if it has none; none before it is known.
    pub fn ip_masq_agent(&self) -> Option<&BTreeMap<String, String>> {
        self.predecessors.ip_masq_agent.as_ref()
    }

    /// What a predecessor's ConfigMap holds now; empty: there is none.
    pub fn configure(&mut self, of: Predecessor, data: BTreeMap<String, String>) {
        let (place, kind) = match of {
            Predecessor::CoreDns => (&mut self.predecessors.coredns, Kind::DnsConfig),
            Predecessor::KubeDns => (&mut self.predecessors.kube_dns, Kind::DnsConfig),
            Predecessor::IpMasqAgent => (&mut self.predecessors.ip_masq_agent, Kind::IpMasqAgent),
        };
        if place.as_ref() != Some(&data) {
            *place = Some(data);
            self.changes.kinds.insert(kind);
        }
    }

    /// Takes what changed since the last call.
    pub fn take_changes(&mut self) -> Changes {
        std::mem::take(&mut self.changes)
    }

    /// An object is now so. `None`: it says something impossible and counts as absent.
    pub fn apply<N: Noun>(&mut self, key: N::Key, noun: Option<N>) {
        let Some(mut noun) = noun else { return self.remove::<N>(&key) };
        N::is_there(self, &key);
        N::heard_of(self, Some(&key));
        let before = N::all(&self.world).get(&key);
        before.iter().for_each(|before| noun.inherit(before));
        if before == Some(&noun) {
            return;
        }
        if !before.is_some_and(|before| before.is_same_to_policies(&noun)) {
            N::touch(&key, &mut self.changes.touched);
        }
        self.touch(N::KIND);
        self.changes.services.extend(noun.service().cloned());
        if let Some(old) = N::put(&mut self.world, key, noun) {
            self.changes.services.extend(old.service().cloned());
        }
        N::settle(self);
        self.end_what_is_over();
    }

    /// As [`Index::apply`], of what happened at `since`, if anybody says so.
    pub fn apply_since<N: Noun>(&mut self, key: N::Key, noun: Option<N>, since: Option<SystemTime>) {
        let before = self.revision(N::KIND);
        self.apply(key, noun);
        if self.revision(N::KIND) != before && self.changes.since.len() < MOST_SINCE {
            self.changes.since.extend(since);
        }
    }

    /// An object is gone.
    pub fn remove<N: Noun>(&mut self, key: &N::Key) {
        if N::outlives(self, key) {
            return;
        }
        N::heard_of(self, Some(key));
        if let Some(old) = N::take(&mut self.world, key) {
            self.touch(N::KIND);
            N::touch(key, &mut self.changes.touched);
            self.changes.services.extend(old.service().cloned());
            N::settle(self);
        }
        self.end_what_is_over();
    }

    /// The full list: what is not in it is gone.
    pub fn reset<N: Noun>(&mut self, all: BTreeMap<N::Key, N>) {
        self.synced.insert(N::KIND);
        self.recalled.remove(&N::KIND);
        let all = N::with_outliving(self, all);
        self.replace(all);
        self.end_what_is_over();
    }

    fn replace<N: Noun>(&mut self, mut all: BTreeMap<N::Key, N>) {
        N::heard_of(self, None);
        for (key, noun) in &mut all {
            N::all(&self.world).get(key).iter().for_each(|before| noun.inherit(before));
        }
        if *N::all(&self.world) != all {
            let known = N::all(&self.world);
            let same = |before: &N, noun: &N| before == noun || before.is_same_to_policies(noun);
            let other = |(key, noun): &(&N::Key, &N)| !known.get(*key).is_some_and(|before| same(before, noun));
            let gone = known.keys().filter(|key| !all.contains_key(*key));
            for key in all.iter().filter(other).map(|(key, _)| key).chain(gone) {
                N::touch(key, &mut self.changes.touched);
            }
            // Made anew in one go, a tree's leaves are full; those that grew one by one are half empty.
            N::replace(&mut self.world, all.into_iter().collect());
            self.touch(N::KIND);
            self.changes.all_services |= matches!(N::KIND, Kind::Service | Kind::EndpointSlice);
            N::settle(self);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn namespace(name: &str) -> Namespace {
        Namespace {
            name: name.to_owned(),
            labels: Default::default(),
            socket_services: Default::default(),
            pods_choose: false,
            terminating: false,
        }
    }

    #[test]
    fn a_heartbeat_changes_nothing() {
        let mut index = Index::default();
        index.apply("a".to_owned(), Some(namespace("a")));
        assert!(index.take_changes().any(&[Kind::Namespace]));
        index.apply("a".to_owned(), Some(namespace("a")));
        assert!(index.take_changes().is_empty());
    }

    #[test]
    fn what_led_to_a_change_is_known_until_it_is_taken_and_of_no_heartbeat() {
        let mut index = Index::default();
        let then = SystemTime::UNIX_EPOCH;
        index.apply_since("a".to_owned(), Some(namespace("a")), Some(then));
        index.apply_since("a".to_owned(), Some(namespace("a")), Some(then));
        index.apply_since("b".to_owned(), Some(namespace("b")), None);
        let mut due = index.take_changes();
        assert_eq!(due.led_to_by(), [then]);
        assert!(index.take_changes().led_to_by().is_empty());
        for _ in 0..MOST_SINCE {
            due.merge(Changes::default().since(vec![then]));
        }
        assert_eq!(due.led_to_by().len(), MOST_SINCE, "a measurement, not a leak");
        assert!(Changes::everything().since(due.led_to_by().to_vec()).led_to_by().contains(&then));
    }

    fn node(name: &str, assigned: &str, wanted: &str) -> Node {
        let object = core::Node {
            metadata: ObjectMeta {
                name: Some(name.to_owned()),
                annotations: Some([(towpath_model::POD_CIDRS_ANNOTATION.to_owned(), wanted.to_owned())].into()),
                ..ObjectMeta::default()
            },
            spec: Some(core::NodeSpec { pod_cidrs: Some(vec![assigned.to_owned()]), ..core::NodeSpec::default() }),
            ..core::Node::default()
        };
        Node::try_from(&object).unwrap()
    }

    fn apply_node(index: &mut Index, name: &str, assigned: &str, wanted: &str) {
        index.apply(NodeName::new(name), Some(node(name, assigned, wanted)));
    }

    fn ranges(index: &Index, name: &str) -> Vec<String> {
        index.world().nodes[&NodeName::new(name)].pod_cidrs.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn ranges_that_are_added_to_nodes_are_in_force_as_all_nodes_together_allow_and_a_heartbeat_changes_nothing() {
        let mut index = Index::default();
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24"], "nobody has said where they may be");
        index.bound_pod_ranges(vec!["10.244.0.0/15".parse().unwrap()], Vec::new());
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24", "10.245.1.0/24"]);
        apply_node(&mut index, "n0", "10.244.0.0/24", "10.245.0.0/16,10.0.0.0/24");
        assert_eq!(ranges(&index, "n0"), ["10.244.0.0/24"]);
        assert_eq!(index.refused_ranges()[&NodeName::new("n0")].len(), 2);
        index.take_changes();
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        index.reset(
            ["n0", "n1"].map(|name| (NodeName::new(name), index.world().nodes[&NodeName::new(name)].clone())).into(),
        );
        assert!(index.take_changes().is_empty());
        // Its own, or what another has, changes: both are looked at.
        apply_node(&mut index, "n1", "10.244.1.0/24", "");
        assert_eq!(
            (ranges(&index, "n1"), ranges(&index, "n0")),
            (vec!["10.244.1.0/24".to_owned()], vec!["10.244.0.0/24".to_owned(), "10.245.0.0/16".to_owned()])
        );
        let mut changes = index.take_changes();
        assert!(changes.any(&[Kind::Node]) && changes.take_touched() == Touched::everything());
        index.remove::<Node>(&NodeName::new("n0"));
        assert!(index.refused_ranges().is_empty());
    }

    #[test]
    fn a_range_that_is_taken_away_stays_while_its_node_says_that_it_is_used() {
        let mut index = Index::default();
        index.bound_pod_ranges(vec!["10.244.0.0/15".parse().unwrap()], Vec::new());
        apply_node(&mut index, "n1", "10.244.1.0/24", "10.245.1.0/24");
        let says = |ranges: &[&str]| Says {
            added_ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            ..Says::default()
        };
        index.say(NodeName::new("n1"), Some(says(&["10.245.1.0/24"])));
        apply_node(&mut index, "n1", "10.244.1.0/24", "");
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24", "10.245.1.0/24"]);
        index.take_changes();
        index.say(NodeName::new("n1"), Some(says(&[])));
        assert_eq!(ranges(&index, "n1"), ["10.244.1.0/24"]);
        assert!(index.take_changes().any(&[Kind::Node]));
    }

    #[test]
    fn a_reset_forgets_what_is_not_listed() {
        let mut index = Index::default();
        index.apply("gone".to_owned(), Some(namespace("gone")));
        index.take_changes();
        index.reset(BTreeMap::from([("kept".to_owned(), namespace("kept"))]));
        assert!(index.take_changes().any(&[Kind::Namespace]));
        assert_eq!(index.world().namespaces.keys().collect::<Vec<_>>(), ["kept"]);
    }

    #[test]
    fn what_policies_look_at_is_named_however_it_changes_and_nothing_else_is() {
        let named = |names: &[&str]| {
            let mut touched = Touched::nothing();
            names.iter().for_each(|name| touched.namespace((*name).to_owned()));
            touched
        };
        let labelled = |name: &str| Namespace { labels: [("a".to_owned(), "b".to_owned())].into(), ..namespace(name) };
        let mut index = Index::default();
        index.apply("a".to_owned(), Some(namespace("a")));
        index.apply("b".to_owned(), Some(namespace("b")));
        assert_eq!(index.take_changes().take_touched(), named(&["a", "b"]));
        index.apply("a".to_owned(), Some(namespace("a")));
        assert_eq!(index.take_changes().take_touched(), Touched::nothing(), "a heartbeat");
        let listed = [namespace("a"), labelled("c")].map(|n| (n.name.clone(), n));
        index.reset(BTreeMap::from(listed));
        assert_eq!(index.take_changes().take_touched(), named(&["b", "c"]), "gone and new, not what stayed");
        index.remove::<Namespace>(&"a".to_owned());
        let mut due = index.take_changes();
        index.apply("c".to_owned(), Some(namespace("c")));
        due.merge(index.take_changes());
        assert_eq!(due.take_touched(), named(&["a", "c"]));
        assert_eq!(Changes::everything().take_touched(), Touched::everything());
        let object = |ready: &str, range: &str| {
            let value = serde_json::json!({"metadata": {"name": "n"}, "spec": {"podCIDRs": [range]},
                "status": {"conditions": [{"type": "Ready", "status": ready}]}});
            Node::try_from(&serde_json::from_value::<core::Node>(value).unwrap()).unwrap()
        };
        let key = NodeName::new("n");
        index.apply(key.clone(), Some(object("True", "10.0.0.0/24")));
        assert_eq!(index.take_changes().take_touched(), Touched::everything());
        index.apply(key.clone(), Some(object("False", "10.0.0.0/24")));
        let mut unready = index.take_changes();
        assert!(
            unready.any(&[Kind::Node]) && unready.take_touched() == Touched::nothing(),
            "policies do not ask for it"
        );
        index.apply(key, Some(object("False", "10.0.1.0/24")));
        assert_eq!(index.take_changes().take_touched(), Touched::everything());
    }

    #[test]
    fn only_full_lists_of_every_kind_make_it_synced() {
        let mut index = Index::default();
        index.reset::<Namespace>(BTreeMap::new());
        assert!(!index.is_synced());
        index.reset::<Node>(BTreeMap::new());
        index.reset::<Pod>(BTreeMap::new());
        index.reset::<Service>(BTreeMap::new());
        index.reset::<EndpointSlice>(BTreeMap::new());
        assert_eq!(index.missing(), [Kind::NetworkPolicy, Kind::ClusterNetworkPolicy]);
        index.reset::<NetworkPolicy>(BTreeMap::new());
        index.reset::<ClusterNetworkPolicy>(BTreeMap::new());
        assert!(index.is_synced());
    }

    #[test]
    fn what_is_recalled_holds_until_it_is_listed_and_never_against_a_list() {
        let mut index = Index::default();
        index.recall(BTreeMap::from([("old".to_owned(), namespace("old"))]));
        assert!(!index.missing().contains(&Kind::Namespace) && index.recalled().contains(&Kind::Namespace));
        assert!(index.take_changes().any(&[Kind::Namespace]));
        index.reset(BTreeMap::from([("new".to_owned(), namespace("new"))]));
        assert!(index.recalled().is_empty() && index.listed().contains(&Kind::Namespace));
        let revision = index.revision(Kind::Namespace);
        index.recall(BTreeMap::from([("old".to_owned(), namespace("old"))]));
        assert_eq!(index.world().namespaces.keys().collect::<Vec<_>>(), ["new"]);
        assert_eq!(index.revision(Kind::Namespace), revision);
    }

    #[test]
    fn an_impossible_object_counts_as_absent() {
        let mut index = Index::default();
        index.apply("a".to_owned(), Some(namespace("a")));
        index.take_changes();
        index.apply::<Namespace>("a".to_owned(), None);
        assert!(index.world().namespaces.is_empty());
        assert!(!index.take_changes().is_empty());
    }

    #[test]
    fn a_policy_that_cannot_be_read_admits_nobody_and_any_other_object_counts_as_absent() {
        let key = NamespacedName::new("default", "odd");
        let policy = NetworkPolicy::unreadable(&key).unwrap();
        assert!(policy.pod_selector.is_everything());
        assert_eq!((policy.ingress, policy.egress), (Some(Vec::new()), Some(Vec::new())));
        assert!(Service::unreadable(&key).is_none());
    }
}
