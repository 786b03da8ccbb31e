//! Places that many want. What one may hold shrinks with what is left, so that nobody, and no number of them, leaves nothing to the
//! next who comes.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A number of places, and who holds how many.
pub(crate) struct Shares<W> {
    held: Arc<Mutex<Held<W>>>,
    all: usize,
    part: usize,
}

struct Held<W> {
    taken: usize,
    by: HashMap<W, usize>,
}

/// A place; free again when it is dropped.
pub(crate) struct Place<W: Eq + Hash> {
    held: Arc<Mutex<Held<W>>>,
    who: W,
}

fn locked<W>(held: &Mutex<Held<W>>) -> MutexGuard<'_, Held<W>> {
    held.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<W: Clone + Eq + Hash> Shares<W> {
    /// `all` places, of which everybody may hold a `part`th of what is free then. One alone comes to hold `all / (part + 1)`.
    pub(crate) fn new(all: usize, part: usize) -> Self {
        Self { held: Arc::new(Mutex::new(Held { taken: 0, by: HashMap::new() })), all, part }
    }

    /// A place; none for who has his share.
    pub(crate) fn take(&self, who: &W) -> Option<Place<W>> {
        let mut held = locked(&self.held);
        let free = self.all.saturating_sub(held.taken);
        let share = free.checked_div(self.part).unwrap_or(free).max(1);
        if free == 0 || held.by.get(who).is_some_and(|count| *count >= share) {
            return None;
        }
        held.taken += 1;
        *held.by.entry(who.clone()).or_default() += 1;
        Some(Place { held: Arc::clone(&self.held), who: who.clone() })
    }
}

impl<W: Eq + Hash> Drop for Place<W> {
    fn drop(&mut self) {
        let mut held = locked(&self.held);
        held.taken -= 1;
        if let Some(count) = held.by.get_mut(&self.who) {
            *count -= 1;
            if *count == 0 {
                held.by.remove(&self.who);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all_that_are_given(shares: &Shares<u8>, who: u8) -> Vec<Place<u8>> {
        std::iter::from_fn(|| shares.take(&who)).collect()
    }

    #[test]
    fn one_alone_gets_a_quarter_and_what_he_gives_back_is_his_again() {
        let shares = Shares::new(512, 3);
        let mut places = all_that_are_given(&shares, 1);
        assert_eq!(places.len(), 128);
        places.truncate(100);
        assert_eq!(all_that_are_given(&shares, 1).len(), 28);
        drop(places);
        assert_eq!(all_that_are_given(&shares, 1).len(), 128);
        assert!(locked(&shares.held).by.is_empty(), "who holds nothing is forgotten");
    }

    #[test]
    fn whoever_comes_gets_a_place_however_many_took_all_that_they_could() {
        let shares = Shares::new(512, 3);
        let mut held: Vec<_> = (0..10).map(|who| all_that_are_given(&shares, who)).collect();
        assert!(all_that_are_given(&shares, 10).len() > 5, "also before those who were first have given anything back");
        for _ in 0..20 {
            for (who, places) in held.iter_mut().enumerate() {
                places.clear();
                *places = all_that_are_given(&shares, u8::try_from(who).unwrap());
            }
        }
        let counts: Vec<usize> = held.iter().map(Vec::len).collect();
        assert!(counts.iter().all(|count| (38..=41).contains(count)), "in the end they hold the same: {counts:?}");
        assert!(all_that_are_given(&shares, 10).len() > 25);
    }

    #[test]
    fn there_are_never_more_places_than_all() {
        let shares = Shares::new(4, 3);
        let held: Vec<_> = (0..8).filter_map(|who| shares.take(&who)).collect();
        assert_eq!(held.len(), 4);
        assert!(shares.take(&0).is_none());
    }
}
