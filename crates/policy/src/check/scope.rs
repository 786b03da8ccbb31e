//! What of an image must be checked after a change, if all of it was checked before.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::NamespacedName;
use towpath_model::desired::{ClassId, PolicyChanges, PolicyImage, SetId};

use crate::compile::Touched;
use crate::names::Mark;
use crate::view::{DNS_NAMESPACE, View};

/// What the node had given to pods ([`View::pod_ips`]), and up to when it had learned names ([`View::names`]), when an image was checked.
#[derive(Clone, Debug, Default)]
pub struct Before {
    given: BTreeMap<NamespacedName, Vec<IpAddr>>,
    taught: Mark,
}

impl Before {
    /// Of a view.
    pub fn of(view: &View<'_>) -> Self {
        Self { given: view.pod_ips.clone(), taught: view.names.mark() }
    }
}

/// What a check is about. What it leaves out was checked before, and nothing of it changed since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Scope {
    pub(super) everything: bool,
    /// Held against every pod of the node.
    pub(super) peers: BTreeSet<IpAddr>,
    /// Everybody in them is held against every pod of the node.
    pub(super) prefixes: BTreeSet<IpNet>,
    /// The node's pods in them are held against everybody,
    pub(super) namespaces: BTreeSet<String>,
    /// and so are those of these addresses, unless others that are judged alike were.
    pub(super) own: BTreeSet<IpAddr>,
    /// Other pods may be on the node than before: each has its sets, and nobody else.
    pub(super) pods: bool,
}

impl Scope {
    /// Every pod of the node against everybody.
    pub fn everything() -> Self {
        Self { everything: true, ..Self::default() }
    }

    /// These addresses against every pod of the node, and the pods of the node in these namespaces against everybody.
    pub fn of(peers: BTreeSet<IpAddr>, namespaces: BTreeSet<String>) -> Self {
        Self { peers, namespaces, ..Self::default() }
    }

    /// What objects that changed, and entries of the image that did, may have made another since an image was checked.
    pub fn after(
        view: &View<'_>,
        image: &PolicyImage,
        touched: &Touched,
        changes: &PolicyChanges,
        before: &Before,
    ) -> Self {
        if touched.everything || touched.cluster_policies {
            return Self::everything();
        }
        // Of another table, or of one that has learned very much meanwhile, nobody knows what is new in it.
        let Some(named) = view.names.since(before.taught) else { return Self::everything() };
        let mut scope = Self::default();
        scope.namespaces.extend(touched.policies.iter().map(|policy| policy.namespace.clone()));
        // Which NetworkPolicies select a pod does not depend on its namespace's labels.
        if !view.world.cluster_policies.is_empty() {
            scope.namespaces.extend(touched.namespaces.iter().cloned());
        }
        scope.pods = !touched.pods.is_empty() || before.given != *view.pod_ips;
        for name in &touched.pods {
            scope.peers.extend(addresses(view, name));
        }
        for namespace in &touched.namespaces {
            let first = NamespacedName::new(namespace.clone(), String::new());
            let pods = view.world.pods.range(first..).take_while(|(name, _)| name.namespace == *namespace);
            pods.for_each(|(name, _)| scope.peers.extend(addresses(view, name)));
        }
        if touched.namespaces.contains(DNS_NAMESPACE) {
            scope.peers.extend(view.dns);
        }
        let names: BTreeSet<&NamespacedName> = view.pod_ips.keys().chain(before.given.keys()).collect();
        for name in names.into_iter().filter(|name| view.pod_ips.get(*name) != before.given.get(*name)) {
            // What its status claims counts only while nothing is given.
            scope.peers.extend(addresses(view, name));
            scope.peers.extend(before.given.get(name).into_iter().flatten());
        }
        scope.own.extend(scope.peers.iter().filter(|address| image.pods.contains_key(*address)));
        scope.peers.extend(named);
        scope.peers.extend(changes.pod_classes.keys());
        changes.cidr_classes.keys().for_each(|prefix| scope.add_prefix(prefix));
        scope.add_classes(image, &seen_otherwise(image, changes));
        scope
    }

    /// Adds everybody in a prefix.
    fn add_prefix(&mut self, prefix: &IpNet) {
        // One address is looked at alone, and not with all that borders on it.
        if prefix.prefix_len() == prefix.max_prefix_len() {
            self.peers.insert(prefix.addr());
        } else {
            self.prefixes.insert(*prefix);
        }
    }

    /// Adds everybody of these classes.
    fn add_classes(&mut self, image: &PolicyImage, classes: &HashSet<ClassId>) {
        if classes.is_empty() {
            return;
        }
        let pods = image.pod_classes.iter().filter(|(_, class)| classes.contains(class));
        self.peers.extend(pods.map(|(address, _)| *address));
        let prefixes = image.cidr_classes.iter().filter(|(_, class)| classes.contains(class));
        prefixes.for_each(|(prefix, _)| self.add_prefix(prefix));
    }

    /// Whether nothing is to be checked.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether pods of the node that are judged alike, of these addresses and namespaces, must be held against everybody.
    pub(super) fn is_new(&self, addresses: &[IpAddr], mut namespaces: impl Iterator<Item = impl AsRef<str>>) -> bool {
        self.everything
            || addresses.iter().all(|address| self.own.contains(address))
            || namespaces.any(|namespace| self.namespaces.contains(namespace.as_ref()))
    }
}

fn addresses(view: &View<'_>, name: &NamespacedName) -> Vec<IpAddr> {
    let given = view.pod_ips.get(name).into_iter().flatten();
    given.chain(view.world.pods.get(name).into_iter().flat_map(|pod| &pod.ips)).copied().collect()
}

/// Classes that a set sees otherwise than before, which was there before and still is: a new one is checked with its pods.
fn seen_otherwise(image: &PolicyImage, changes: &PolicyChanges) -> HashSet<ClassId> {
    let stays = |set: &SetId| !changes.isolating.contains_key(set);
    let entries = changes.set_classes.keys().filter(|(set, _)| stays(set)).map(|(_, class)| *class);
    let mut classes: HashSet<ClassId> = entries.collect();
    let rows: HashSet<_> = changes.rows.keys().filter(|row| stays(&row.set)).map(|row| (row.set, row.class)).collect();
    let sets: BTreeSet<SetId> = rows.iter().map(|(set, _)| *set).collect();
    for set in sets {
        let entries = image.set_classes.range((set, ClassId(0))..=(set, ClassId(u32::MAX)));
        classes.extend(entries.filter(|(_, local)| rows.contains(&(set, **local))).map(|((_, class), _)| *class));
    }
    classes
}
