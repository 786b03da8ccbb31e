//! The index: a synchronous in-memory [`World`] kept up to date by `apply / remove / reset`.
//!
//! It says which parts changed, so that only their planners run; an object that says nothing new to the network (a
//! heartbeat, a status nobody here reads) changes nothing. It knows which kinds have had their first full list: nothing is
//! planned, and nothing in the kernel touched, before all have (or, while the API server is away, before what an earlier run knew of
//! them is [recalled](Index::recall)).

mod nouns;
mod pod_ranges;

use std::collections::{BTreeMap, BTreeSet};
use std::time::SystemTime;

use tokio::sync::mpsc;
use towpath_model::desired::PolicyRef;
use towpath_model::{NamespacedName, NetworkPolicy, NodeName, Pod, ServiceCidr, Uid, World};
use towpath_plan::Changed;
use towpath_plan::added_ranges::Within;
use towpath_plan::dns::rules::Sources;
use towpath_policy::compile::Touched;

pub use nouns::{Kind, Noun};

use crate::aside::Aside;
use crate::heard::{self, Heard};
use crate::node_network::given::Given;
use crate::outliving::{Outliving, Question};
use towpath_plan::backend::Says;

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
mod tests;
