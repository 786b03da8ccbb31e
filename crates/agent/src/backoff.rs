//! When a failed apply is tried again: soon, then less and less often.

use std::time::Duration;

const FIRST: Duration = Duration::from_millis(100);
/// Other changes, of policies too, wait with what failed.
const LONGEST: Duration = Duration::from_secs(5);

/// Doubling delays, back to the first after a success.
#[derive(Debug)]
pub(crate) struct Backoff {
    first: Duration,
    longest: Duration,
    failures: u32,
}

impl Default for Backoff {
    fn default() -> Self {
        Self::between(FIRST, LONGEST)
    }
}

impl Backoff {
    /// With a first and a longest delay.
    pub(crate) fn between(first: Duration, longest: Duration) -> Self {
        Self { first, longest, failures: 0 }
    }

    /// It failed (again); how long to wait.
    pub(crate) fn failed(&mut self) -> Duration {
        let delay = self.first.saturating_mul(1u32.checked_shl(self.failures).unwrap_or(u32::MAX)).min(self.longest);
        self.failures = self.failures.saturating_add(1).min(16);
        delay
    }

    /// It worked.
    pub(crate) fn worked(&mut self) {
        self.failures = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn delays_double_up_to_a_bound_and_start_over() {
        let mut backoff = Backoff::default();
        assert_eq!(backoff.failed(), FIRST);
        assert_eq!(backoff.failed(), FIRST * 2);
        for _ in 0..40 {
            assert!(backoff.failed() <= LONGEST);
        }
        assert_eq!(backoff.failed(), LONGEST);
        backoff.worked();
        assert_eq!(backoff.failed(), FIRST);
    }
}
