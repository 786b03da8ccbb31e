//! Whose policies are asked: the pods of the node, sorted into those that the same policies select and that have the same set.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use towpath_model::desired::SetId;
use towpath_model::{Action, ClusterNetworkPolicy, Direction, Labels, NamedPort, NamespacedName, Pod, Tier, World};

use super::matchers::{Matcher, Matchers};
use super::reads::{About, Doors, Policy, Read, Reads};
use super::written::Written;
use crate::verify::addresses::Addresses;

/// What makes pods of the node alike, in one direction.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct Alike {
    pub(super) direction: Direction,
    pub(super) set: SetId,
    /// Numbers of what the policies say that select them, in the order in which they are asked.
    pub(super) reads: Vec<u32>,
    /// Their named ports, if some policy asks for them.
    pub(super) named: Vec<NamedPort>,
}

/// Pods that are.
#[derive(Clone, Debug)]
pub(super) struct Text {
    pub(super) alike: Alike,
    pub(super) addresses: BTreeSet<IpAddr>,
    /// What the policies say, in the order in which it is asked.
    pub(super) steps: Vec<Step>,
    /// A NetworkPolicy selects them.
    pub(super) isolated: bool,
    /// Numbers of the matchers that tell peers apart for them, ascending.
    pub(super) ask: Vec<u32>,
    pub(super) compared: Compared,
}

/// A clause, or several that are asked as one.
#[derive(Clone, Debug)]
pub(super) struct Step {
    /// None: a NetworkPolicy's.
    pub(super) tier: Option<Tier>,
    /// None: everybody.
    pub(super) matcher: Option<u32>,
    pub(super) ports: Arc<Doors>,
    pub(super) action: Action,
    /// It is about pods, and asked of whoever may be one.
    pub(super) doubtful: bool,
}

/// What of what is said of some pods was compared with the image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Compared {
    Nothing,
    /// What is said of everybody whom it, or the image, tells from a stranger; and there was no stranger.
    NoStranger,
    /// What is said of strangers, too: of whoever is one and comes later, nothing else is said.
    Wholly,
}

impl Text {
    /// Whether no policy selects them, and the image has no set for them.
    pub(super) fn is_open(&self) -> bool {
        self.alike.reads.is_empty() && self.alike.set == SetId::default()
    }
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Texts {
    next: u32,
    list: BTreeMap<u32, Text>,
    known: HashMap<Alike, u32>,
    of_pod: HashMap<(IpAddr, Direction), u32>,
    asked_by: HashMap<u32, Vec<u32>>,
    of_set: HashMap<SetId, Vec<u32>>,
}

/// The ClusterNetworkPolicies that judge, by direction, in their order.
struct Tiers<'w> {
    admin: Vec<&'w ClusterNetworkPolicy>,
    baseline: Vec<&'w ClusterNetworkPolicy>,
}

impl<'w> Tiers<'w> {
    fn of(world: &'w World) -> Self {
        let [admin, baseline] = [Tier::Admin, Tier::Baseline].map(|tier| {
            let policies = world.cluster_policies_of(tier).into_iter();
            policies.filter(|policy| !policy.enforcement.is_audited()).collect()
        });
        Self { admin, baseline }
    }
}

impl Texts {
    /// Sorts these pods again, and leaves out who is no pod of the node any more.
    pub(super) fn select(
        &mut self,
        again: &BTreeMap<IpAddr, Option<&Pod>>,
        world: &World,
        written: &Written,
        reads: &mut Reads,
        matchers: &mut Matchers,
    ) {
        let tiers = Tiers::of(world);
        let mut seen: HashMap<(&str, &Labels, Direction), Vec<u32>> = HashMap::new();
        for (address, pod) in again {
            for direction in [Direction::Ingress, Direction::Egress] {
                let before = self.of_pod.get(&(*address, direction)).copied();
                let Some(pod) = pod else {
                    self.of_pod.remove(&(*address, direction));
                    before.into_iter().for_each(|before| self.leave(before, *address, reads));
                    continue;
                };
                let all = seen.entry((pod.name.namespace.as_str(), &pod.labels, direction)).or_insert_with(|| {
                    let policies = selecting(world, &tiers, pod, direction).into_iter();
                    policies.map(|policy| reads.number(policy, direction, matchers)).collect()
                });
                let by_name = direction == Direction::Ingress
                    && all.iter().filter_map(|read| reads.get(*read)).any(|read| read.by_name);
                let named = if by_name { pod.named_ports.to_vec() } else { Vec::new() };
                let set = written.set(*address, direction);
                let alike = Alike { direction, set, reads: all.clone(), named };
                let text = self.number(alike, reads, matchers);
                if before != Some(text) {
                    self.of_pod.insert((*address, direction), text);
                    self.list.get_mut(&text).into_iter().for_each(|text| text.addresses.extend([*address]));
                    before.into_iter().for_each(|before| self.leave(before, *address, reads));
                }
            }
        }
        reads.sweep();
    }

    fn number(&mut self, alike: Alike, reads: &mut Reads, matchers: &mut Matchers) -> u32 {
        if let Some(known) = self.known.get(&alike) {
            return *known;
        }
        let number = self.next;
        self.next += 1;
        let all: Vec<&Read> = alike.reads.iter().filter_map(|read| reads.get(*read)).collect();
        let steps = steps(&all, matchers);
        let isolated = all.iter().any(|read| read.tier.is_none());
        let asked = all.iter().flat_map(|read| &read.ask).copied();
        let ask: BTreeSet<u32> = asked.chain(steps.iter().filter_map(|step| step.matcher)).collect();
        let ask: Vec<u32> = ask.into_iter().collect();
        alike.reads.iter().for_each(|read| reads.enter(*read));
        ask.iter().for_each(|matcher| self.asked_by.entry(*matcher).or_default().push(number));
        self.of_set.entry(alike.set).or_default().push(number);
        self.known.insert(alike.clone(), number);
        let addresses = BTreeSet::new();
        self.list.insert(number, Text { alike, addresses, steps, isolated, ask, compared: Compared::Nothing });
        number
    }

    fn leave(&mut self, number: u32, address: IpAddr, reads: &mut Reads) {
        let Some(text) = self.list.get_mut(&number) else { return };
        text.addresses.remove(&address);
        if !text.addresses.is_empty() {
            return;
        }
        if let Some(text) = self.list.remove(&number) {
            self.known.remove(&text.alike);
            text.alike.reads.iter().for_each(|read| reads.leave(*read));
            text.ask.iter().for_each(|matcher| without(&mut self.asked_by, matcher, number));
            without(&mut self.of_set, &text.alike.set, number);
        }
    }

    pub(super) fn all(&self) -> impl Iterator<Item = (u32, &Text)> {
        self.list.iter().map(|(number, text)| (*number, text))
    }

    pub(super) fn get(&self, number: u32) -> Option<&Text> {
        self.list.get(&number)
    }

    /// Notes what was compared.
    pub(super) fn compared(&mut self, number: u32, compared: Compared) {
        self.list.get_mut(&number).into_iter().for_each(|text| text.compared = compared);
    }

    /// Those for which a matcher tells peers apart.
    pub(super) fn asking(&self, matcher: u32) -> &[u32] {
        self.asked_by.get(&matcher).map(Vec::as_slice).unwrap_or_default()
    }

    /// Those that have a set.
    pub(super) fn with_set(&self, set: SetId) -> &[u32] {
        self.of_set.get(&set).map(Vec::as_slice).unwrap_or_default()
    }
}

fn without<K: std::hash::Hash + Eq>(lists: &mut HashMap<K, Vec<u32>>, key: &K, number: u32) {
    if let Some(list) = lists.get_mut(key) {
        list.retain(|other| *other != number);
        if list.is_empty() {
            lists.remove(key);
        }
    }
}

/// The policies in force that select a pod and speak of a direction, in the order in which they are asked.
fn selecting<'w>(world: &'w World, tiers: &Tiers<'w>, pod: &Pod, direction: Direction) -> Vec<Policy<'w>> {
    let labels = world.namespace_labels(&pod.name.namespace);
    let of_tier = |policies: &[&'w ClusterNetworkPolicy]| -> Vec<Policy<'w>> {
        let selecting = policies.iter().filter(|policy| {
            !policy.rules(direction).is_empty()
                && policy.subject.pods.matches(&pod.labels)
                && policy.subject.namespaces.matches(&labels)
        });
        selecting.map(|policy| Policy::Cluster(policy)).collect()
    };
    let namespace = &pod.name.namespace;
    let first = NamespacedName::new(namespace.clone(), String::new());
    let of_namespace = world.policies.range(first..).take_while(|(name, _)| name.namespace == *namespace);
    let isolating = of_namespace
        .map(|(_, policy)| policy)
        .filter(|policy| !policy.enforcement.is_audited())
        .filter(|policy| policy.rules(direction).is_some() && policy.pod_selector.matches(&pod.labels));
    let mut all = of_tier(&tiers.admin);
    let before = all.len();
    all.extend(isolating.map(Policy::Namespaced));
    if all.len() == before {
        all.extend(of_tier(&tiers.baseline));
    }
    all
}

/// So many clauses of NetworkPolicies, which differ in nothing but addresses, are asked one by one: then one that changes has nobody asked what
/// the others ask. More are asked as one.
const FEW: usize = 16;

/// What policies say, in the order in which they are asked. NetworkPolicies add up, whatever their order: so what they say of everybody is one
/// step, and so is what many of them say of addresses, for each set of ports.
fn steps(all: &[&Read], matchers: &mut Matchers) -> Vec<Step> {
    let (mut steps, mut everyone) = (Vec::new(), Vec::new());
    let mut blocks: BTreeMap<usize, (Arc<Doors>, Vec<Arc<Addresses>>)> = BTreeMap::new();
    let mut by_ports: HashMap<Arc<Doors>, usize> = HashMap::new();
    for read in all {
        for said in &read.clauses {
            let matcher = match &said.about {
                About::Everybody if read.tier.is_none() => {
                    everyone.push(said.ports.clone());
                    continue;
                }
                About::Addresses(addresses) if read.tier.is_none() => {
                    let next = by_ports.len();
                    let index = *by_ports.entry(said.ports.clone()).or_insert(next);
                    blocks.entry(index).or_insert_with(|| (said.ports.clone(), Vec::new())).1.push(addresses.clone());
                    continue;
                }
                About::Everybody => None,
                About::Matched(number) => Some(*number),
                About::Addresses(addresses) => Some(matchers.number(Matcher::Addresses((**addresses).clone()))),
            };
            let (ports, action, doubtful) = (said.ports.clone(), said.action, said.doubtful);
            steps.push(Step { tier: read.tier, matcher, ports, action, doubtful });
        }
    }
    let mut accept = |matcher, ports| {
        steps.push(Step { tier: None, matcher, ports, action: Action::Accept, doubtful: false });
    };
    for (ports, all) in blocks.into_values() {
        let mut one = |addresses| matchers.number(Matcher::Addresses(addresses));
        if all.len() <= FEW {
            all.iter().for_each(|addresses| accept(Some(one((**addresses).clone())), ports.clone()));
        } else {
            accept(Some(one(Addresses::any_of(all.iter().map(|addresses| &**addresses)))), ports);
        }
    }
    if !everyone.is_empty() {
        accept(None, Arc::new(Doors::any_of(&everyone)));
    }
    steps
}
