//! What a check has read of policies, peers and an image, and how it follows changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::desired::{LocalClass, PolicyChanges, PolicyImage};
use towpath_model::{NamespacedName, NodeName, Pod};

use super::Mismatch;
use super::claims::Claims;
use super::matchers::Matchers;
use super::peers::Peers;
use super::reads::Reads;
use super::texts::{Compared, Texts};
use super::written::{Renewed, Written};
use crate::compile::Touched;
use crate::view::{Holder, Holders, View};

/// All of it.
#[derive(Clone, Debug)]
pub(super) struct Reading {
    pub(super) written: Written,
    claims: Claims,
    /// The pods of the node, by address.
    own: BTreeMap<IpAddr, NamespacedName>,
    pub(super) reads: Reads,
    pub(super) matchers: Matchers,
    pub(super) texts: Texts,
    pub(super) peers: Peers,
    /// How much it was when it was read.
    size: usize,
}

/// What is to be compared of one text.
#[derive(Debug)]
pub(super) enum News {
    /// All that is said of anybody.
    Everybody,
    /// What is said of these kinds of peers.
    Kinds(BTreeSet<u32>),
}

impl Reading {
    /// What is no longer there may be so much more than what was there at first, before all is read anew.
    const SLACK: usize = 8192;

    /// Reads everything.
    pub(super) fn of(view: &View<'_>, node: &NodeName, image: &PolicyImage) -> Result<Self, Box<Mismatch>> {
        let (written, claims, holders) = (Written::of(image), Claims::of(view), Holders::of(view));
        let own: BTreeMap<IpAddr, &Pod> =
            holders.all().filter_map(|(address, holder)| Some((address, own_pod(holder, node)?))).collect();
        let names = own.iter().map(|(address, pod)| (*address, pod.name.clone())).collect();
        same_pods(&names, image)?;
        let (mut reads, mut matchers, mut texts) = (Reads::default(), Matchers::default(), Texts::default());
        reads.learn(view.names);
        let again = own.into_iter().map(|(address, pod)| (address, Some(pod))).collect();
        texts.select(&again, view.world, &written, &mut reads, &mut matchers);
        let mut peers = Peers::nobody(view.world, matchers.may_be_pod().is_some());
        peers.ask(view, &matchers)?;
        peers.prefixes(image.cidr_classes.keys(), image);
        peers.fill(&holders, image, view, &matchers);
        peers.sort(&matchers);
        let mut reading = Self { written, claims, own: names, reads, matchers, texts, peers, size: 0 };
        reading.size = reading.size_now();
        Ok(reading)
    }

    fn size_now(&self) -> usize {
        self.peers.size() + usize::try_from(self.matchers.len()).unwrap_or(usize::MAX)
    }

    /// Whether an image is what it has of it.
    pub(super) fn has(&self, image: &PolicyImage) -> bool {
        self.written.is(image)
    }

    /// Takes up what changed: what is to be compared, by the numbers of texts. None: everything must be read anew.
    pub(super) fn follow(
        &mut self,
        view: &View<'_>,
        node: &NodeName,
        changes: &PolicyChanges,
        touched: &Touched,
    ) -> Result<Option<BTreeMap<u32, News>>, Box<Mismatch>> {
        let doubts = self.matchers.may_be_pod();
        let renewed = self.written.follow(changes);
        if touched.everything || self.size_now() > self.size.saturating_mul(2).saturating_add(Self::SLACK) {
            return Ok(None);
        }
        let mut again = self.follow_holders(view, node, touched);
        same_pods(&self.own, self.written.image())?;
        renewed.addresses.iter().for_each(|address| self.peers.class(*address, self.written.image()));
        touched.namespaces.iter().for_each(|namespace| self.peers.relabel(namespace, view, &self.matchers));
        again.extend(self.selected_again(view, touched, &renewed));
        let pods = again.into_iter().map(|address| {
            let pod = self.own.get(&address).and_then(|name| view.world.pods.get(name));
            (address, pod)
        });
        self.texts.select(&pods.collect(), view.world, &self.written, &mut self.reads, &mut self.matchers);
        if self.matchers.may_be_pod() != doubts {
            // Where the line must be cut for that it is not.
            return Ok(None);
        }
        self.peers.ask(view, &self.matchers)?;
        self.peers.prefixes(renewed.prefixes.iter(), self.written.image());
        let fresh = self.peers.sort(&self.matchers);
        Ok(Some(self.news(&renewed, &fresh)))
    }

    /// Looks up who holds what may have another holder: the addresses that are, or were, of pods of the node.
    fn follow_holders(&mut self, view: &View<'_>, node: &NodeName, touched: &Touched) -> BTreeSet<IpAddr> {
        let asked = self.claims.follow(view, touched);
        let mut own = BTreeSet::new();
        if asked.is_empty() {
            return own;
        }
        let holders = self.claims.holders(view, &asked);
        for address in asked {
            self.peers.hold(address, &holders, view, &self.matchers);
            let before = match holders.holder(address).and_then(|holder| own_pod(holder, node)) {
                Some(pod) => self.own.insert(address, pod.name.clone()).or(Some(pod.name.clone())),
                None => self.own.remove(&address),
            };
            own.extend(before.map(|_| address));
        }
        own
    }

    /// Pods of the node that other policies may select, or with another set; and those whose policies must be read again are forgotten.
    fn selected_again(&mut self, view: &View<'_>, touched: &Touched, renewed: &Renewed) -> BTreeSet<IpAddr> {
        touched.policies.iter().for_each(|policy| self.reads.forget(policy));
        if touched.cluster_policies {
            self.reads.forget_cluster();
        }
        // Even if nobody asks: then nothing is stale later.
        let learned = self.reads.learn(view.names);
        let everybody = learned || touched.cluster_policies;
        let namespaces: BTreeSet<&str> = touched.policies.iter().map(|policy| policy.namespace.as_str()).collect();
        let concerned = |namespace: &String| {
            everybody || namespaces.contains(namespace.as_str()) || touched.namespaces.contains(namespace)
        };
        let concerned = self.own.iter().filter(|(_, name)| concerned(&name.namespace)).map(|(address, _)| *address);
        concerned.chain(renewed.pods.iter().copied().filter(|address| self.own.contains_key(address))).collect()
    }

    /// What is to be compared: what is said of texts that are new, of kinds that are, and where the image has other entries.
    fn news(&self, renewed: &Renewed, fresh: &BTreeSet<u32>) -> BTreeMap<u32, News> {
        let mut news: BTreeMap<u32, News> = BTreeMap::new();
        let (mut no_stranger, mut everybody) = (Vec::new(), BTreeSet::new());
        for (number, text) in self.texts.all() {
            match text.compared {
                Compared::Nothing => drop(everybody.insert(number)),
                Compared::NoStranger => no_stranger.push(number),
                Compared::Wholly => {}
            }
        }
        let mut add = |texts: &[u32], kinds: &[u32]| {
            for text in texts {
                if let News::Kinds(known) = news.entry(*text).or_insert_with(|| News::Kinds(BTreeSet::new())) {
                    known.extend(kinds);
                }
            }
        };
        for kind in fresh {
            let Some(seen) = self.peers.kind(*kind) else { continue };
            seen.matched.iter().for_each(|matcher| add(self.texts.asking(*matcher), &[*kind]));
            self.written.sets_of(seen.class).iter().for_each(|set| add(self.texts.with_set(*set), &[*kind]));
            add(&no_stranger, &[*kind]);
        }
        for (set, class) in &renewed.classes {
            add(self.texts.with_set(*set), self.peers.of_class(*class));
        }
        for (set, local) in renewed.rows.iter().filter(|(set, _)| !self.texts.with_set(*set).is_empty()) {
            if *local == LocalClass(0) {
                everybody.extend(self.texts.with_set(*set));
                continue;
            }
            for (class, _) in self.written.classes(*set).filter(|(_, known)| known == local) {
                add(self.texts.with_set(*set), self.peers.of_class(class));
            }
        }
        everybody.into_iter().for_each(|text| drop(news.insert(text, News::Everybody)));
        news
    }

    /// Somebody's name who is of a text.
    pub(super) fn name(&self, address: IpAddr) -> Option<&NamespacedName> {
        self.own.get(&address)
    }
}

fn own_pod<'a>(holder: Holder<'a>, node: &NodeName) -> Option<&'a Pod> {
    match holder {
        Holder::Pod(pod) if pod.node.as_ref() == Some(node) => Some(pod),
        _ => None,
    }
}

fn same_pods(own: &BTreeMap<IpAddr, NamespacedName>, image: &PolicyImage) -> Result<(), Box<Mismatch>> {
    if let Some((address, pod)) = own.iter().find(|(address, _)| !image.pods.contains_key(*address)) {
        return Err(Box::new(Mismatch::Missing { pod: pod.clone(), address: *address }));
    }
    match image.pods.keys().find(|address| !own.contains_key(*address)) {
        Some(address) => Err(Box::new(Mismatch::Surplus { address: *address })),
        None => Ok(()),
    }
}
