//! Numbers for the kernel: unique while they live, and not handed out again soon after.

use std::collections::{HashSet, VecDeque};
use std::time::Duration;

/// Hands out numbers from 1 to a limit, in a circle. A number given back rests for the grace period, and comes around only
/// when the whole circle was used.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    next: u32,
    limit: u32,
    /// Live and resting numbers.
    taken: HashSet<u32>,
    /// Resting numbers with the time they were given back, oldest first.
    resting: VecDeque<(Duration, u32)>,
}

impl Ids {
    /// Numbers 1 to `limit`.
    pub(super) fn up_to(limit: u32) -> Self {
        Self { next: 1, limit, taken: HashSet::new(), resting: VecDeque::new() }
    }

    /// Lets numbers that somebody else still uses rest from now, and goes on above them.
    pub(super) fn avoid(&mut self, used: impl IntoIterator<Item = u32>, now: Duration) {
        for id in used {
            if self.taken.insert(id) {
                self.resting.push_back((now, id));
            }
            self.next = self.next.max(if id >= self.limit { 1 } else { id.saturating_add(1) });
        }
    }

    /// Numbers that live or rest, in no order.
    pub(super) fn taken(&self) -> impl Iterator<Item = u32> + '_ {
        self.taken.iter().copied()
    }

    /// A number that nobody has.
    pub(super) fn take(&mut self) -> u32 {
        // Ends: there are 2^32 numbers and far fewer entries in `taken` than that, each of which is in memory.
        loop {
            let id = self.next;
            self.next = if id >= self.limit { 1 } else { id.saturating_add(1) };
            if self.taken.insert(id) {
                return id;
            }
        }
    }

    /// Gives a number back.
    pub(super) fn release(&mut self, id: u32, now: Duration) {
        self.resting.push_back((now, id));
    }

    /// Forgets what has rested for `grace`.
    pub(super) fn rested(&mut self, now: Duration, grace: Duration) {
        while let Some((since, id)) = self.resting.front().copied()
            && since.saturating_add(grace) <= now
        {
            self.resting.pop_front();
            self.taken.remove(&id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_reused_before_its_grace_is_over() {
        let mut ids = Ids::up_to(3);
        let (a, b) = (ids.take(), ids.take());
        assert_eq!((a, b), (1, 2));
        ids.release(a, Duration::from_secs(1));
        ids.rested(Duration::from_secs(5), Duration::from_secs(5));
        assert_eq!(ids.take(), 3);
        ids.rested(Duration::from_secs(6), Duration::from_secs(5));
        assert_eq!(ids.take(), 1);
    }

    #[test]
    fn numbers_of_an_earlier_run_are_avoided() {
        let mut ids = Ids::up_to(10);
        ids.avoid([2, 9], Duration::ZERO);
        assert_eq!([ids.take(), ids.take(), ids.take()], [10, 1, 3]);
    }
}
