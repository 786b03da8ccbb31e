//! From what a kernel holds of an earlier run to the images of this one.
//!
//! A compiler that starts anew knows none of the sets that pods still have in the kernel, and gives out classes that those sets have never
//! heard of. To an old set such a class would be a stranger: who is denied by name would pass for a moment, at every start. So
//! the first images speak to the old sets too: of every new class they say what the old sets held of the addresses in it, and a class
//! whose addresses the old sets saw differently is doubled. After the grace period nothing of it is left.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use towpath_model::desired::{ClassId, PodSets, PolicyImage, RowKey, SetId};

use super::classes::Content;
use super::ids::Ids;

/// What the old sets hold of a class; equal ones are one number, 0 is a stranger.
type Seen = usize;

/// What pods' sets of an earlier run hold.
#[derive(Debug)]
pub(super) struct Bridge {
    held: PolicyImage,
    /// By number: how the old sets see it.
    contents: Vec<Content>,
    seen: HashMap<ClassId, Seen>,
    /// Which of the new classes stands for which pair of a new class and what the old sets see.
    classes: HashMap<(ClassId, Seen), ClassId>,
    /// New classes that stand for a pair themselves.
    claimed: BTreeSet<ClassId>,
    /// Doubles that were made.
    made: Vec<ClassId>,
    /// Until when it is needed; none: it has not been yet.
    until: Option<Duration>,
}

impl Bridge {
    /// Of what a kernel holds; none: no pod has a set there.
    pub(super) fn of(held: &PolicyImage) -> Option<Self> {
        let sets: BTreeSet<SetId> = held.pods.values().flat_map(PodSets::all).collect();
        let in_use = |set: &SetId| *set != SetId::default() && sets.contains(set);
        let mut bridge = Self {
            held: PolicyImage {
                rows: held.rows.iter().filter(|(key, _)| in_use(&key.set)).map(|(key, row)| (*key, *row)).collect(),
                pod_classes: held.pod_classes.clone(),
                cidr_classes: held.cidr_classes.clone(),
                ..PolicyImage::default()
            },
            contents: vec![Content::new()],
            seen: HashMap::new(),
            classes: HashMap::from([((ClassId::default(), 0), ClassId::default())]),
            claimed: BTreeSet::from([ClassId::default()]),
            made: Vec::new(),
            until: None,
        };
        let mut of_class: BTreeMap<ClassId, Content> = BTreeMap::new();
        for ((set, class), local) in held.set_classes.iter().filter(|((set, _), _)| in_use(set)) {
            of_class.entry(*class).or_default().push((*set, *local));
        }
        let mut numbers: HashMap<Content, Seen> = HashMap::new();
        for (class, content) in of_class {
            let number = *numbers.entry(content).or_insert_with_key(|content| {
                bridge.contents.push(content.clone());
                bridge.contents.len() - 1
            });
            bridge.seen.insert(class, number);
        }
        sets.iter().any(|set| *set != SetId::default()).then_some(bridge)
    }

    /// When it is over, once it was used.
    pub(super) fn until(&self) -> Option<Duration> {
        self.until
    }

    /// Makes an image speak to the old sets.
    pub(super) fn span(&mut self, image: &mut PolicyImage, ids: &mut Ids, now: Duration, grace: Duration) {
        self.until.get_or_insert(now.saturating_add(grace));
        let nets: BTreeSet<IpNet> = image.cidr_classes.keys().chain(self.held.cidr_classes.keys()).copied().collect();
        let mut used: BTreeMap<ClassId, (ClassId, Seen)> = BTreeMap::new();
        let mut cidr_classes: BTreeMap<IpNet, ClassId> = BTreeMap::new();
        for net in nets {
            let pair = (longest(&image.cidr_classes, net), self.seen_in(net));
            cidr_classes.insert(net, self.class(pair, ids, &mut used));
        }
        let addresses: BTreeSet<IpAddr> =
            image.pod_classes.keys().chain(self.held.pod_classes.keys()).copied().collect();
        let mut pod_classes: BTreeMap<IpAddr, ClassId> = BTreeMap::new();
        for address in addresses {
            let of_region = || longest(&image.cidr_classes, IpNet::from(address));
            let new = image.pod_classes.get(&address).copied().unwrap_or_else(of_region);
            let seen = match self.held.pod_classes.get(&address) {
                Some(class) => self.seen.get(class).copied().unwrap_or_default(),
                None => self.seen_in(IpNet::from(address)),
            };
            pod_classes.insert(address, self.class((new, seen), ids, &mut used));
        }
        let mut contents: HashMap<ClassId, Content> = HashMap::new();
        for ((set, class), local) in &image.set_classes {
            contents.entry(*class).or_default().push((*set, *local));
        }
        for (class, (new, seen)) in used {
            let fresh = contents.get(&new).into_iter().flatten();
            for (set, local) in fresh.chain(self.contents.get(seen).into_iter().flatten()) {
                image.set_classes.insert((*set, class), *local);
            }
        }
        image.cidr_classes = cidr_classes;
        image.pod_classes = pod_classes;
        let rows: Vec<(RowKey, _)> = self.held.rows.iter().map(|(key, row)| (*key, *row)).collect();
        image.rows.extend(rows);
    }

    /// Gives back what it took.
    pub(super) fn end(self, ids: &mut Ids, now: Duration) {
        self.made.iter().for_each(|class| ids.release(class.0, now));
    }

    fn seen_in(&self, net: IpNet) -> Seen {
        self.seen.get(&longest(&self.held.cidr_classes, net)).copied().unwrap_or_default()
    }

    fn class(
        &mut self,
        pair: (ClassId, Seen),
        ids: &mut Ids,
        used: &mut BTreeMap<ClassId, (ClassId, Seen)>,
    ) -> ClassId {
        let class = match self.classes.get(&pair) {
            Some(class) => *class,
            None => {
                let class = if self.claimed.insert(pair.0) {
                    pair.0
                } else {
                    let double = ClassId(ids.take());
                    self.made.push(double);
                    double
                };
                self.classes.insert(pair, class);
                class
            }
        };
        used.insert(class, pair);
        class
    }
}

/// The class of the longest prefix that a prefix is in.
fn longest(classes: &BTreeMap<IpNet, ClassId>, net: IpNet) -> ClassId {
    if classes.is_empty() {
        return ClassId::default();
    }
    let mut lengths = (0..=net.prefix_len()).rev();
    lengths.find_map(|length| classes.get(&IpNet::new(net.addr(), length).ok()?.trunc()).copied()).unwrap_or_default()
}
