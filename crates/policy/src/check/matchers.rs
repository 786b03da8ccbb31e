//! What the clauses in force on the node ask of peers, each question once, numbered; and which of them a peer answers with yes.
//!
//! Numbers only grow: what nobody asks any more stays until everything is read anew.

use std::collections::HashMap;
use std::sync::Arc;

use towpath_model::labels::Requirement;
use towpath_model::{Labels, NamedPort, Node, Protocol, Selector};

use crate::verify::addresses::Addresses;
use crate::verify::clauses::{Namespaces, PodSet};
use crate::view::PeerPod;

/// What a clause asks of a peer.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Matcher {
    /// It is one of these pods.
    Pods(Whose, Selector),
    /// It is one of these nodes.
    Nodes(Selector),
    /// It has one of these addresses.
    Addresses(Addresses),
    /// It has one of these addresses, and is nobody whom a selector can match.
    Outside(Addresses),
    /// It is a pod that has a port of this name.
    Calls(String, Protocol),
    /// It may be a pod that is not known yet.
    MayBePod,
}

/// Namespaces in which pods are looked for.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) enum Whose {
    /// One, by name.
    Named(String),
    /// Those with matching labels.
    Matching(Selector),
}

impl Matcher {
    pub(super) fn pods(set: &PodSet<'_>) -> Self {
        let whose = match set.namespaces {
            Namespaces::Named(name) => Whose::Named(name.to_owned()),
            Namespaces::Matching(selector) => Whose::Matching(selector.clone()),
        };
        Self::Pods(whose, set.pods.clone())
    }

    fn answers(&self, peer: &PeerPod<'_>, namespace: &Labels) -> bool {
        match self {
            Self::Pods(whose, pods) => {
                let here = match whose {
                    Whose::Named(name) => name == peer.namespace,
                    Whose::Matching(selector) => selector.matches(namespace),
                };
                here && pods.matches(peer.labels)
            }
            Self::Calls(name, protocol) => peer.named_port(name, *protocol).is_some(),
            Self::Nodes(_) | Self::Addresses(_) | Self::Outside(_) | Self::MayBePod => false,
        }
    }
}

/// All of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Matchers {
    numbers: HashMap<Arc<Matcher>, u32>,
    list: Vec<Arc<Matcher>>,
    /// Selectors that want a label with a value, by that; the others of one namespace, by that; and the rest. All ascending.
    by_label: HashMap<String, HashMap<String, Vec<u32>>>,
    by_namespace: HashMap<String, Vec<u32>>,
    of_pods: Vec<u32>,
    of_nodes: Vec<u32>,
    calls: Vec<u32>,
    may_be_pod: Option<u32>,
}

impl Matchers {
    pub(super) fn number(&mut self, matcher: Matcher) -> u32 {
        if let Some(number) = self.numbers.get(&matcher) {
            return *number;
        }
        let number = self.len();
        match &matcher {
            Matcher::Pods(whose, pods) => match (one_of(pods), whose) {
                (Some((key, values)), _) => {
                    let by_value = self.by_label.entry(key.to_owned()).or_default();
                    values.for_each(|value| by_value.entry(value.to_owned()).or_default().push(number));
                }
                (None, Whose::Named(name)) => self.by_namespace.entry(name.clone()).or_default().push(number),
                (None, Whose::Matching(_)) => self.of_pods.push(number),
            },
            Matcher::Nodes(_) => self.of_nodes.push(number),
            Matcher::Calls(..) => self.calls.push(number),
            Matcher::MayBePod => self.may_be_pod = Some(number),
            Matcher::Addresses(_) | Matcher::Outside(_) => {}
        }
        let matcher = Arc::new(matcher);
        self.list.push(matcher.clone());
        self.numbers.insert(matcher, number);
        number
    }

    /// How many there are: the next number.
    pub(super) fn len(&self) -> u32 {
        u32::try_from(self.list.len()).unwrap_or(u32::MAX)
    }

    pub(super) fn get(&self, number: u32) -> Option<&Matcher> {
        self.list.get(usize::try_from(number).ok()?).map(|matcher| &**matcher)
    }

    /// That which asks who may be a pod, if any clause does.
    pub(super) fn may_be_pod(&self) -> Option<u32> {
        self.may_be_pod
    }

    /// Those from a number on that ask for addresses.
    pub(super) fn blocks(&self, from: u32) -> impl Iterator<Item = (u32, &Addresses)> {
        let start = usize::try_from(from).unwrap_or(usize::MAX);
        (from..).zip(self.list.get(start..).unwrap_or_default()).filter_map(|(number, matcher)| match &**matcher {
            Matcher::Addresses(addresses) | Matcher::Outside(addresses) => Some((number, addresses)),
            _ => None,
        })
    }

    /// Whether one asks only who is nobody.
    pub(super) fn is_outside(&self, number: u32) -> bool {
        matches!(self.get(number), Some(Matcher::Outside(_)))
    }

    /// Those from a number on that a pod answers with yes, ascending. `namespace`: the labels of its namespace.
    pub(super) fn of_peer(&self, peer: &PeerPod<'_>, namespace: &Labels, from: u32) -> Vec<u32> {
        let by_label = peer.labels.iter().filter_map(|(key, value)| self.by_label.get(key)?.get(value));
        let lists = by_label.chain(self.by_namespace.get(peer.namespace)).chain([&self.of_pods, &self.calls]);
        let news = lists.flat_map(|list| list.get(list.partition_point(|number| *number < from)..).unwrap_or_default());
        let answers = |number: &u32| self.get(*number).is_some_and(|matcher| matcher.answers(peer, namespace));
        let mut matched: Vec<u32> = news.copied().filter(answers).collect();
        matched.sort_unstable();
        matched.dedup();
        matched
    }

    /// Those from a number on that an address of these nodes answers with yes, ascending.
    pub(super) fn of_nodes(&self, nodes: &[&Node], from: u32) -> Vec<u32> {
        let answers = |number: &u32| match self.get(*number) {
            Some(Matcher::Nodes(selector)) => nodes.iter().any(|node| selector.matches(&node.labels)),
            _ => false,
        };
        self.of_nodes.iter().copied().filter(|number| *number >= from).filter(answers).collect()
    }

    /// The ports that those of a peer ask for. The others that it names say nothing: who answers the same may have other ones.
    pub(super) fn called(&self, matched: &[u32], named: &[NamedPort]) -> Vec<NamedPort> {
        let asked = self.calls.iter().filter(|number| matched.binary_search(number).is_ok());
        let ports = asked.filter_map(|number| match self.get(*number) {
            Some(Matcher::Calls(name, protocol)) => {
                named.iter().find(|port| port.name == *name && port.protocol == *protocol).cloned()
            }
            _ => None,
        });
        ports.collect()
    }
}

/// A label that a selector wants, and the values it may have.
fn one_of(selector: &Selector) -> Option<(&str, impl Iterator<Item = &str>)> {
    selector.requirements().find_map(|requirement| match requirement {
        Requirement::In(key, values) => Some((key.as_str(), values.iter().map(String::as_str))),
        _ => None,
    })
}
