//! The line of all addresses, cut into intervals in which nothing but the holders tells two addresses apart: at both ends of every range
//! that a clause speaks of or the image has a prefix for.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use ipnet::IpNet;
use towpath_model::Family;
use towpath_model::desired::{ClassId, PolicyImage};

use super::effort::{Effort, TooMuch};
use crate::image::prefix_class;
use crate::verify::addresses::{Addresses, address as at};

/// One of them. It ends where the next begins.
#[derive(Clone, Debug, Default)]
pub(super) struct Interval {
    /// Number of the list of matchers that ask for addresses here.
    pub(super) blocks: u32,
    /// The class of who is no pod.
    pub(super) class: ClassId,
    /// Pods may be here of which nobody has heard.
    pub(super) may_be_pod: bool,
    /// The first address that is nobody's.
    pub(super) free: Option<u128>,
    /// What such an address is.
    pub(super) spot: Option<u32>,
}

/// Intervals, by their first number, that are not as they were.
#[derive(Clone, Debug, Default)]
pub(super) struct Moved {
    /// Everybody in them may be another to clauses or the image.
    pub(super) renewed: BTreeSet<u128>,
    /// They have other ends.
    pub(super) cut: BTreeSet<u128>,
}

/// All of them.
#[derive(Clone, Debug)]
pub(super) struct Line {
    intervals: BTreeMap<u128, Interval>,
    blocks: Vec<Arc<[u32]>>,
    known: HashMap<Arc<[u32]>, u32>,
}

impl Line {
    /// Cut where pods may be of which nobody has heard, and where they cannot.
    pub(super) fn of(pods: &Addresses) -> Self {
        let nothing: Arc<[u32]> = Arc::new([]);
        let mut line = Self {
            intervals: BTreeMap::from([(0, Interval::default())]),
            blocks: vec![nothing.clone()],
            known: HashMap::from([(nothing, 0)]),
        };
        let mut moved = Moved::default();
        for addresses in [Addresses::of_family(Family::V4), Addresses::of_family(Family::V6)].iter().chain([pods]) {
            line.cut(addresses, &mut moved);
        }
        line.intervals.iter_mut().for_each(|(start, interval)| interval.may_be_pod = pods.has(at(*start)));
        line
    }

    pub(super) fn len(&self) -> usize {
        self.intervals.len()
    }

    pub(super) fn starts(&self) -> impl Iterator<Item = u128> + '_ {
        self.intervals.keys().copied()
    }

    /// The interval of a number, with its first.
    pub(super) fn interval(&self, number: u128) -> Option<(u128, &Interval)> {
        self.intervals.range(..=number).next_back().map(|(start, interval)| (*start, interval))
    }

    pub(super) fn interval_mut(&mut self, number: u128) -> Option<&mut Interval> {
        self.intervals.range_mut(..=number).next_back().map(|(_, interval)| interval)
    }

    /// The last number of the interval that begins there.
    pub(super) fn last(&self, start: u128) -> u128 {
        let next = start.checked_add(1).and_then(|after| self.intervals.range(after..).next());
        next.map_or(u128::MAX, |(next, _)| next - 1)
    }

    /// The matchers of a list, ascending.
    pub(super) fn blocks(&self, list: u32) -> &[u32] {
        usize::try_from(list).ok().and_then(|list| self.blocks.get(list)).map(|list| &**list).unwrap_or_default()
    }

    /// Cuts at both ends of every range.
    fn cut(&mut self, addresses: &Addresses, moved: &mut Moved) {
        for (first, last) in addresses.0.iter() {
            for at in [Some(first), last.checked_add(1)].into_iter().flatten() {
                self.cut_at(at, moved);
            }
        }
    }

    fn cut_at(&mut self, at: u128, moved: &mut Moved) {
        if self.intervals.contains_key(&at) {
            return;
        }
        let Some((start, left)) = self.intervals.range_mut(..at).next_back() else { return };
        let mut right = Interval { spot: None, ..left.clone() };
        left.free = left.free.filter(|free| *free < at);
        right.free = right.free.filter(|free| *free >= at);
        if moved.renewed.contains(start) {
            moved.renewed.insert(at);
        }
        moved.cut.extend([*start, at]);
        self.intervals.insert(at, right);
    }

    /// Has clauses ask for more addresses.
    pub(super) fn add_blocks<'m>(
        &mut self,
        matchers: impl Iterator<Item = (u32, &'m Addresses)>,
        moved: &mut Moved,
    ) -> Result<(), TooMuch> {
        let mut effort = Effort::new();
        let matchers: Vec<_> = matchers.collect();
        matchers.iter().for_each(|(_, addresses)| self.cut(addresses, moved));
        let mut more: BTreeMap<u128, Vec<u32>> = BTreeMap::new();
        for (number, addresses) in matchers {
            for (first, last) in addresses.0.iter() {
                let within = self.intervals.range(first..=last).map(|(start, _)| *start);
                for start in within {
                    effort.take(1)?;
                    more.entry(start).or_default().push(number);
                }
            }
        }
        for (start, numbers) in more {
            let Some(list) = self.intervals.get(&start).map(|interval| interval.blocks) else { continue };
            effort.take(self.blocks(list).len())?;
            let list: Arc<[u32]> = self.blocks(list).iter().copied().chain(numbers).collect();
            let next = u32::try_from(self.blocks.len()).unwrap_or(u32::MAX);
            let list = *self.known.entry(list.clone()).or_insert_with(|| {
                self.blocks.push(list);
                next
            });
            self.intervals.get_mut(&start).into_iter().for_each(|interval| interval.blocks = list);
            moved.renewed.insert(start);
        }
        Ok(())
    }

    /// Takes up that the image has these prefixes with another class, newly or no longer.
    pub(super) fn follow<'n>(
        &mut self,
        prefixes: impl Iterator<Item = &'n IpNet> + Clone,
        image: &PolicyImage,
        moved: &mut Moved,
    ) {
        prefixes.clone().for_each(|prefix| self.cut(&Addresses::of(prefix), moved));
        let ranges = prefixes.flat_map(|prefix| Addresses::of(prefix).0.iter().collect::<Vec<_>>());
        let within: BTreeSet<u128> =
            ranges.flat_map(|(first, last)| self.intervals.range(first..=last).map(|(start, _)| *start)).collect();
        for start in within {
            let class = prefix_class(image, at(start));
            if let Some(interval) = self.intervals.get_mut(&start)
                && interval.class != class
            {
                interval.class = class;
                moved.renewed.insert(start);
            }
        }
    }
}
