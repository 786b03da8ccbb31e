//! What the kernel will hold once it was told what changed: the image of the check before with the changes made to it.
//!
//! A compiler that changes its image and does not say so would have the kernel keep what it had. So after a change this is what is checked,
//! not what the compiler holds.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use ipnet::IpNet;
use towpath_model::Direction;
use towpath_model::desired::{ClassId, LocalClass, PodSets, PolicyChanges, PolicyImage, SetId};

/// The maps of an image that judge.
#[derive(Clone, Debug, Default)]
pub(super) struct Written {
    image: PolicyImage,
    /// Sets that tell a class from a stranger.
    sets_of: HashMap<ClassId, Vec<SetId>>,
}

/// What of it is no longer as it was.
#[derive(Debug, Default)]
pub(super) struct Renewed {
    pub(super) addresses: Vec<IpAddr>,
    pub(super) prefixes: Vec<IpNet>,
    /// Classes as sets see them.
    pub(super) classes: Vec<(SetId, ClassId)>,
    pub(super) rows: BTreeSet<(SetId, LocalClass)>,
    /// Pods of the node with other sets.
    pub(super) pods: Vec<IpAddr>,
}

impl Written {
    pub(super) fn of(image: &PolicyImage) -> Self {
        let image = PolicyImage {
            pod_classes: image.pod_classes.clone(),
            cidr_classes: image.cidr_classes.clone(),
            set_classes: image.set_classes.clone(),
            rows: image.rows.clone(),
            pods: image.pods.clone(),
            ..PolicyImage::default()
        };
        let mut sets_of: HashMap<ClassId, Vec<SetId>> = HashMap::new();
        image.set_classes.keys().for_each(|(set, class)| sets_of.entry(*class).or_default().push(*set));
        Self { image, sets_of }
    }

    pub(super) fn image(&self) -> &PolicyImage {
        &self.image
    }

    pub(super) fn follow(&mut self, changes: &PolicyChanges) -> Renewed {
        let differing = |address: &&IpAddr| self.image.pods.get(*address) != changes.pods.get(*address);
        let pods: BTreeSet<IpAddr> =
            self.image.pods.keys().chain(changes.pods.keys()).filter(differing).copied().collect();
        let renewed = Renewed {
            addresses: changes.pod_classes.keys().copied().collect(),
            prefixes: changes.cidr_classes.keys().copied().collect(),
            classes: changes.set_classes.keys().copied().collect(),
            rows: changes.rows.keys().map(|row| (row.set, row.class)).collect(),
            pods: pods.into_iter().collect(),
        };
        for ((set, class), local) in &changes.set_classes {
            let sets = self.sets_of.entry(*class).or_default();
            sets.retain(|other| other != set);
            sets.extend(local.map(|_| *set));
        }
        let touched = renewed.classes.iter().map(|(_, class)| class);
        touched.for_each(|class| {
            if self.sets_of.get(class).is_some_and(Vec::is_empty) {
                self.sets_of.remove(class);
            }
        });
        made(&mut self.image.pod_classes, &changes.pod_classes);
        made(&mut self.image.cidr_classes, &changes.cidr_classes);
        made(&mut self.image.set_classes, &changes.set_classes);
        made(&mut self.image.rows, &changes.rows);
        self.image.pods.clone_from(&changes.pods);
        renewed
    }

    /// Whether an image is this.
    pub(super) fn is(&self, image: &PolicyImage) -> bool {
        self.image.pods == image.pods
            && self.image.pod_classes == image.pod_classes
            && self.image.cidr_classes == image.cidr_classes
            && self.image.set_classes == image.set_classes
            && self.image.rows == image.rows
    }

    /// The set of a pod of the node.
    pub(super) fn set(&self, pod: IpAddr, direction: Direction) -> SetId {
        let PodSets { ingress, egress, .. } = self.image.pods.get(&pod).copied().unwrap_or_default();
        match direction {
            Direction::Ingress => ingress,
            Direction::Egress => egress,
        }
    }

    /// Sets that tell a class from a stranger.
    pub(super) fn sets_of(&self, class: ClassId) -> &[SetId] {
        self.sets_of.get(&class).map(Vec::as_slice).unwrap_or_default()
    }

    /// The classes that a set tells from a stranger.
    pub(super) fn classes(&self, set: SetId) -> impl Iterator<Item = (ClassId, LocalClass)> + '_ {
        let entries = self.image.set_classes.range((set, ClassId(0))..=(set, ClassId(u32::MAX)));
        entries.map(|((_, class), local)| (*class, *local))
    }
}

fn made<K: Ord + Clone, V: Clone>(map: &mut BTreeMap<K, V>, changes: &BTreeMap<K, Option<V>>) {
    for (key, value) in changes {
        match value {
            Some(value) => drop(map.insert(key.clone(), value.clone())),
            None => drop(map.remove(key)),
        }
    }
}
