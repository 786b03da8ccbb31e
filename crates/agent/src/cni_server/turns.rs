//! One at a time for each attachment, side by side for different ones.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OwnedMutexGuard;
use towpath_wire::cni::Attachment;

type Lock = Arc<tokio::sync::Mutex<()>>;

/// Whose turn it is.
#[derive(Debug, Default)]
pub(super) struct Turns {
    locks: Arc<Mutex<HashMap<Attachment, Lock>>>,
}

/// The turn of one request; ends when dropped.
#[derive(Debug)]
pub(super) struct Turn {
    owner: Attachment,
    guard: Option<OwnedMutexGuard<()>>,
    locks: Arc<Mutex<HashMap<Attachment, Lock>>>,
}

impl Turns {
    /// Waits until nobody else works on the attachment. First come, first served.
    pub(super) async fn take(&self, owner: &Attachment) -> Turn {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.entry(owner.clone()).or_default().clone()
        };
        let guard = lock.lock_owned().await;
        Turn { owner: owner.clone(), guard: Some(guard), locks: self.locks.clone() }
    }

    /// Attachments that somebody works on or waits for.
    pub(super) fn busy(&self) -> BTreeSet<Attachment> {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// How many those are.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.locks.lock().unwrap_or_else(PoisonError::into_inner).len()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        self.guard = None;
        // Who waits has a clone; new clones are made only under the lock that is held here.
        if locks.get(&self.owner).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.owner);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn one_attachment_waits_and_another_does_not() {
        let turns = Turns::default();
        let (a, b) = (Attachment::new("a", "eth0").unwrap(), Attachment::new("b", "eth0").unwrap());
        let first = turns.take(&a).await;
        let _other =
            tokio::time::timeout(Duration::from_secs(5), turns.take(&b)).await.expect("another attachment is free");
        let waiting = tokio::time::timeout(Duration::from_millis(20), turns.take(&a)).await;
        assert!(waiting.is_err(), "the same attachment has to wait");
        drop(first);
        drop(tokio::time::timeout(Duration::from_secs(5), turns.take(&a)).await.expect("free again"));
    }

    #[tokio::test]
    async fn nothing_is_kept_of_attachments_nobody_works_on() {
        let turns = Turns::default();
        let a = Attachment::new("a", "eth0").unwrap();
        let first = turns.take(&a).await;
        let second = turns.take(&a);
        drop(first);
        drop(second.await);
        assert_eq!(turns.len(), 0);
    }
}
