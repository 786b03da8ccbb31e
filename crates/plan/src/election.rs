//! Who holds a Lease (`coordination.k8s.io/v1`), decided from it as it was read. Pure: clocks of other replicas are never compared with ours; a Lease is
//! over when it has not changed for its duration since *we* first saw it so (as client-go's leader election does).

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
}

/// What one replica has seen of the Lease.
#[derive(Clone, Debug)]
pub struct Observer {
    identity: String,
    seen: Option<(Record, Duration)>,
}

impl Observer {
    /// A replica that has seen nothing.
    pub fn new(identity: impl Into<String>) -> Self {
        Self { identity: identity.into(), seen: None }
    }

    /// Decides from the Lease as just read (none: there is no such object). `now` is any monotonic count.
    pub fn observe(&mut self, record: Option<Record>, now: Duration) -> Step {
        let Some(record) = record else {
            self.seen = None;
            return Step::Acquire;
        };
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
