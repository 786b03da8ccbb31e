//! Which changes are planned together: what comes after a rest at once, and what comes while the loop works, or in the rest after it,
//! when that is over. So a change that comes alone waits for nothing, and however many come, the loop works half of the time at most.

use std::time::{Duration, Instant};

/// The shortest rest.
const SHORTEST: Duration = Duration::from_millis(1);
/// No change waits longer for others.
const LONGEST: Duration = Duration::from_millis(20);

/// When the loop worked last, and how long it rests since then.
#[derive(Debug, Default)]
pub(super) struct Pace {
    rests_until: Option<Instant>,
}

impl Pace {
    /// Changes were planned and applied: it rests as long as that took.
    pub(super) fn worked(&mut self, begun: Instant, ended: Instant) {
        let rest = ended.saturating_duration_since(begun).clamp(SHORTEST, LONGEST);
        self.rests_until = Some(ended + rest);
    }

    /// Until when changes are taken together with one that comes now.
    pub(super) fn gathers_until(&self, now: Instant) -> Instant {
        self.rests_until.map_or(now, |until| until.max(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_after_a_rest_waits_for_nothing_and_others_until_the_rest_is_over() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        let after = |milliseconds: u64| start + Duration::from_millis(milliseconds);
        assert_eq!(pace.gathers_until(start), start, "the first of all");
        pace.worked(start, after(4));
        assert_eq!(pace.gathers_until(after(5)), after(8), "it rests as long as it worked");
        assert_eq!(pace.gathers_until(after(8)), after(8));
        assert_eq!(pace.gathers_until(after(100)), after(100));
    }

    #[test]
    fn a_rest_is_neither_nothing_nor_without_end() {
        let (mut pace, start) = (Pace::default(), Instant::now());
        pace.worked(start, start);
        assert_eq!(pace.gathers_until(start), start + SHORTEST);
        let ended = start + Duration::from_secs(3);
        pace.worked(start, ended);
        assert_eq!(pace.gathers_until(ended), ended + LONGEST);
    }
}
