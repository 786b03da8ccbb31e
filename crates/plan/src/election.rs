//! Who holds a Lease (`coordination.k8s.io/v1`), decided from it as it was read. Pure: clocks of other replicas are never compared with ours; a Lease is
//! over when it has not changed for its duration since *we* first saw it so (as client-go's leader election does). A Lease that was deleted is
//! over no sooner: whoever held it may not know yet.

use std::time::Duration;

/// What a Lease says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// `spec.holderIdentity`; empty: released.
    pub holder: String,
    /// `spec.renewTime`, only compared for equality.
    pub renewed: Option<String>,
    /// `spec.leaseDurationSeconds`.
    pub duration: Duration,
}

/// What to do about a Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Write it with our name: it is nobody's, or its holder let it run out.
    Acquire,
    /// Write it again: it is ours.
    Renew,
    /// Somebody else leads.
    Follow,
    /// There is no such Lease, and it is too early to make one: another's may just have been deleted.
    Wait,
}

/// What one replica has seen of the Lease.
#[derive(Clone, Debug)]
pub struct Observer {
    identity: String,
    seen: Option<(Record, Duration)>,
    /// Since when there is no such object.
    absent: Option<Duration>,
    /// How long it must be absent before one who never saw it makes it.
    patience: Duration,
}

impl Observer {
    /// A replica that has seen nothing.
    pub fn new(identity: impl Into<String>) -> Self {
        Self { identity: identity.into(), seen: None, absent: None, patience: Duration::ZERO }
    }

    /// Waits so long before it makes a Lease of which it has seen nothing: who held it, if it was deleted just before, is silent then.
    pub fn waiting(mut self, patience: Duration) -> Self {
        self.patience = patience;
        self
    }

    /// How long the Lease must be absent: not at all if it was ours last, as long as it held if it was another's.
    fn absent_for(&self) -> Duration {
        match &self.seen {
            Some((record, _)) if record.holder == self.identity => Duration::ZERO,
            Some((record, _)) => record.duration.max(self.patience),
            None => self.patience,
        }
    }

    /// Decides from the Lease as just read (none: there is no such object). `now` is any monotonic count.
    pub fn observe(&mut self, record: Option<Record>, now: Duration) -> Step {
        let Some(record) = record else {
            let since = *self.absent.get_or_insert(now);
            return if now.saturating_sub(since) >= self.absent_for() { Step::Acquire } else { Step::Wait };
        };
        self.absent = None;
        if record.holder == self.identity {
            self.seen = Some((record, now));
            return Step::Renew;
        }
        if record.holder.is_empty() {
            return Step::Acquire;
        }
        match &self.seen {
            Some((before, since)) if *before == record => {
                let over = now.saturating_sub(*since) >= record.duration;
                if over { Step::Acquire } else { Step::Follow }
            }
            _ => {
                self.seen = Some((record, now));
                Step::Follow
            }
        }
    }

    /// How long until the Lease, if it stays as it was last seen, may be taken; none: nothing of another holder was seen.
    pub fn expires_in(&self, now: Duration) -> Option<Duration> {
        if let Some(since) = self.absent {
            return Some(since.saturating_add(self.absent_for()).saturating_sub(now));
        }
        let (record, since) = self.seen.as_ref().filter(|(record, _)| record.holder != self.identity)?;
        Some(since.saturating_add(record.duration).saturating_sub(now))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LEASE_DURATION: Duration = Duration::from_secs(15);

    fn held(holder: &str, renewed: &str) -> Option<Record> {
        Some(Record { holder: holder.to_owned(), renewed: Some(renewed.to_owned()), duration: LEASE_DURATION })
    }

    const fn at(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn takes_a_lease_that_is_absent_or_released() {
        let mut me = Observer::new("me");
        assert_eq!(me.observe(None, at(0)), Step::Acquire);
        assert_eq!(me.observe(held("", "a"), at(1)), Step::Acquire);
    }

    #[test]
    fn a_deleted_lease_is_anothers_until_whoever_held_it_knows() {
        let mut me = Observer::new("me");
        assert_eq!(me.observe(held("other", "a"), at(0)), Step::Follow);
        assert_eq!(me.observe(None, at(10)), Step::Wait);
        assert_eq!((me.observe(None, at(24)), me.expires_in(at(24))), (Step::Wait, Some(at(1))));
        assert_eq!(me.observe(held("other", "b"), at(24)), Step::Follow, "the holder made it again");
        assert_eq!(me.observe(None, at(30)), Step::Wait, "the wait begins anew");
        assert_eq!(me.observe(None, at(45)), Step::Acquire);
        let mut holder = Observer::new("me");
        assert_eq!(holder.observe(held("me", "a"), at(0)), Step::Renew);
        assert_eq!(holder.observe(None, at(1)), Step::Acquire, "it was ours, so nobody else answers");
        let mut newcomer = Observer::new("me").waiting(at(1));
        assert_eq!(newcomer.observe(None, at(0)), Step::Wait);
        assert_eq!(newcomer.observe(None, at(1)), Step::Acquire);
    }

    #[test]
    fn follows_while_the_holder_renews_however_old_its_clock_is() {
        let mut me = Observer::new("me");
        for second in 0..100 {
            assert_eq!(me.observe(held("other", &second.to_string()), at(second)), Step::Follow);
        }
    }

    #[test]
    fn takes_over_only_a_full_duration_after_the_last_change_it_saw() {
        let mut me = Observer::new("me");
        assert_eq!(me.observe(held("other", "a"), at(100)), Step::Follow);
        assert_eq!(me.observe(held("other", "a"), at(114)), Step::Follow);
        assert_eq!(me.observe(held("other", "b"), at(114)), Step::Follow, "renewed at the last moment");
        assert_eq!(me.observe(held("other", "b"), at(128)), Step::Follow);
        assert_eq!(me.observe(held("other", "b"), at(129)), Step::Acquire);
    }

    #[test]
    fn a_third_replica_that_took_it_starts_the_wait_anew() {
        let mut me = Observer::new("me");
        assert_eq!(me.observe(held("other", "a"), at(0)), Step::Follow);
        assert_eq!(me.observe(held("third", "a"), at(20)), Step::Follow);
        assert_eq!(me.observe(held("me", "c"), at(21)), Step::Renew);
    }

    #[test]
    fn a_follower_knows_when_it_may_take_over() {
        let mut me = Observer::new("me");
        assert_eq!(me.expires_in(at(0)), None);
        me.observe(held("other", "a"), at(100));
        assert_eq!(me.expires_in(at(110)), Some(at(5)));
        assert_eq!(me.expires_in(at(200)), Some(Duration::ZERO));
        me.observe(held("me", "b"), at(201));
        assert_eq!(me.expires_in(at(201)), None, "its own");
    }
}
