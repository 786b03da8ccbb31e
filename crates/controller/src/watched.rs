//! What a watch has brought so far, and whether that is all there is.

use std::collections::BTreeMap;

use kube::runtime::watcher::Event;
use tokio::time::{Instant, sleep_until};

/// Ends at the time; never when there is none.
pub(crate) async fn until(time: Option<Instant>) {
    match time {
        Some(time) => sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// What a watch has brought.
pub(crate) struct Watched<T> {
    pub(crate) all: BTreeMap<String, T>,
    listing: BTreeMap<String, T>,
    pub(crate) complete: bool,
}

impl<T> Default for Watched<T> {
    fn default() -> Self {
        Self { all: BTreeMap::new(), listing: BTreeMap::new(), complete: false }
    }
}

impl<T: PartialEq> Watched<T> {
    /// Takes an event; whether something is another than before.
    pub(crate) fn take<O>(
        &mut self,
        event: Event<O>,
        name: impl Fn(&O) -> Option<String>,
        kept: impl Fn(&O) -> T,
    ) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(object) => {
                self.listing.extend(name(&object).map(|name| (name, kept(&object))));
                false
            }
            Event::InitDone => {
                let first = !std::mem::replace(&mut self.complete, true);
                let before = std::mem::replace(&mut self.all, std::mem::take(&mut self.listing));
                first || before != self.all
            }
            Event::Apply(object) => name(&object).is_some_and(|name| {
                let now = kept(&object);
                let same = self.all.get(&name) == Some(&now);
                self.all.insert(name, now);
                !same
            }),
            Event::Delete(object) => name(&object).is_some_and(|name| self.all.remove(&name).is_some()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_watch_that_brings_nothing_new_changes_nothing() {
        let mut watched = Watched::<u8>::default();
        let mut take =
            |event| watched.take(event, |(name, _): &(&str, u8)| Some((*name).to_owned()), |(_, value)| *value);
        assert!(!take(Event::Init));
        assert!(!take(Event::InitApply(("a", 1))));
        assert!(take(Event::InitDone), "the first list is news, also an empty one");
        assert!(!take(Event::Apply(("a", 1))));
        assert!(take(Event::Apply(("a", 2))) && take(Event::Delete(("a", 2))) && !take(Event::Delete(("a", 2))));
    }
}
