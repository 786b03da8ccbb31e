//! Whether what must go on goes on: the reconcile loop, which turns once a second when nothing happens, and the call that the data path
//! is at. A node on which one hangs would show well, and follow nothing any more.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What takes longer does not come back. A first turn with tens of thousands of Services takes long on a busy machine, and who is
/// killed in it begins anew: nothing that only takes its time may reach this.
const HANGS: Duration = Duration::from_secs(600);

/// When the loop began its last turn.
#[derive(Clone, Debug, Default)]
pub struct Pulse(Arc<Mutex<Option<Instant>>>);

impl Pulse {
    /// A turn begins.
    pub(crate) fn beat(&self) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }

    /// How long ago; none: the loop has not begun.
    pub(crate) fn age(&self) -> Option<Duration> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).map(|beat| beat.elapsed())
    }
}

/// What hangs, in words, by how long the loop has been at its turn and the data path at its call.
pub(crate) fn hangs(turn: Option<Duration>, call: Option<Duration>) -> Option<String> {
    let late = |time: Option<Duration>| time.filter(|time| *time >= HANGS);
    match (late(call), late(turn)) {
        (Some(call), _) => Some(format!("one call of the data path has taken {} s", call.as_secs())),
        (None, Some(turn)) => Some(format!("one turn of the reconcile loop has taken {} s", turn.as_secs())),
        (None, None) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_first_turn_with_very_many_services_is_no_hanging_one() {
        let minutes = |n: u64| Some(Duration::from_secs(n * 60));
        assert_eq!(hangs(None, None), None, "it starts");
        assert_eq!(hangs(minutes(9), minutes(9)), None);
        assert!(hangs(minutes(10), minutes(10)).unwrap().contains("data path has taken 600 s"));
        assert!(hangs(minutes(10), None).unwrap().contains("reconcile loop"));
        assert!(hangs(Some(Duration::ZERO), minutes(11)).is_some(), "who waits for nothing need not ask the data path");
    }
}
