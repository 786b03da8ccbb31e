//! Names that policies ask for: their answers are told to the agent, and leave when it has them in the kernel.
//!
//! ```text
//! responder: an answer ─► tell ─► queue ─► feed ─► agent ─► kernel
//!                │                                   │
//!                └── waits, LONGEST_WAIT at most ◄── learned
//! ```
//!
//! An answer whose addresses the agent has learned already, for as long as the client may keep it, waits for nothing. Neither does any while no
//! agent listens: DNS goes on without it, and the kernel goes on to deny what it does not know; when an agent comes, it is told what the cache holds.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::time::{Instant, timeout};
use towpath_model::{DomainName, DomainNames};
use towpath_wire::dns::NameAnswer;

use crate::counters::Counters;

/// No answer waits longer for the agent. With what asking upstream may take ([`crate::upstream::TOTAL`]) it is less than the five seconds
/// that clients wait. An answer that leaves too early costs its client no more than what is sent first: the kernel denies it.
pub(crate) const LONGEST_WAIT: Duration = Duration::from_millis(500);
/// How much longer than its TTL an answer counts as learned; the agent keeps it for twice as long. So a name that is asked for again when its time
/// is over waits for nothing.
const KEPT: Duration = Duration::from_secs(30);
/// An answer that is good for this much longer than what is learned is not told again.
const SLACK: Duration = Duration::from_secs(1);
/// More names than these are not remembered as learned: they are told again.
const MOST_KNOWN: usize = 8192;
/// More answers than these do not wait to be told: an agent that takes none of them does not hear of the rest, which leave at once.
const MOST_QUEUED: usize = 4096;

/// What the agent has said that it learned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Progress {
    /// Which agent's connection; 0: none.
    follower: u64,
    serial: u64,
}

#[derive(Debug, Default)]
struct State {
    wanted: DomainNames,
    /// The connection that hears; 0: none.
    follower: u64,
    followers: u64,
    queue: Vec<NameAnswer>,
    /// Of the message that takes what is in the queue.
    serial: u64,
    /// Until when an address is learned for a name, once the message of that serial is.
    known: HashMap<String, HashMap<IpAddr, (Instant, u64)>>,
}

/// What is told to the agent, and how far it is.
#[derive(Debug)]
pub(crate) struct Names {
    state: Mutex<State>,
    /// Somebody asks for any name at all.
    asked: AtomicBool,
    news: Notify,
    progress: watch::Sender<Progress>,
    counters: Arc<Counters>,
}

impl Names {
    pub(crate) fn new(counters: Arc<Counters>) -> Self {
        Self {
            state: Mutex::new(State { serial: 1, ..State::default() }),
            asked: AtomicBool::new(false),
            news: Notify::new(),
            progress: watch::Sender::new(Progress { follower: 0, serial: 0 }),
            counters,
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether policies ask for a name.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.asked.load(Ordering::Relaxed) && self.state().wanted.matches(name)
    }

    /// An answer is about to be given, with a TTL of `ttl` seconds: what it must wait for, if anything.
    pub(crate) fn tell(&self, name: &str, addresses: &[IpAddr], ttl: u32) -> Option<Wait> {
        if addresses.is_empty() || !self.asked.load(Ordering::Relaxed) {
            return None;
        }
        let now = Instant::now();
        let until = now + Duration::from_secs(u64::from(ttl)) + KEPT;
        let mut state = self.state();
        if !state.wanted.matches(name) {
            return None;
        }
        if state.follower == 0 || state.queue.len() >= MOST_QUEUED {
            self.counters.names_unheard.add();
            return None;
        }
        let learned = self.progress.borrow().serial;
        let (serial, follower) = (state.serial, state.follower);
        if state.known.len() >= MOST_KNOWN && !state.known.contains_key(name) {
            state.known.clear();
        }
        let known = state.known.entry(name.to_owned()).or_default();
        known.retain(|_, (good, _)| *good > now);
        // The last message that one of them is, or was, in.
        let (mut wait_for, mut told) = (0, false);
        for address in addresses {
            match known.get_mut(address) {
                Some((good, at)) if *good + SLACK >= until => wait_for = wait_for.max(*at),
                Some((good, at)) => {
                    // It is in the kernel, or on its way there: only its time is told.
                    (*good, told) = (until, true);
                    wait_for = wait_for.max(*at);
                }
                None => {
                    known.insert(*address, (until, serial));
                    (wait_for, told) = (serial, true);
                }
            }
        }
        if told {
            state.queue.push(NameAnswer { name: name.to_owned(), addresses: addresses.to_vec(), ttl });
            self.counters.names_told.add();
            self.news.notify_one();
        }
        (wait_for > learned)
            .then(|| Wait { until: Progress { follower, serial: wait_for }, heard: self.progress.subscribe() })
    }

    /// Waits for what [`Names::tell`] says.
    pub(crate) async fn learned(&self, mut wait: Wait) {
        let begun = Instant::now();
        let Progress { follower, serial } = wait.until;
        let done = wait.heard.wait_for(|now| now.follower != follower || now.serial >= serial);
        let late = timeout(LONGEST_WAIT, done).await.is_err();
        self.counters.names_held.add();
        self.counters.names_held_micros.add_all(u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX));
        if late {
            self.counters.names_late.add();
        }
    }

    /// An agent listens: from now on for these names. An earlier one is not told any more.
    pub(crate) fn follow(self: &Arc<Self>) -> Follower {
        let mut state = self.state();
        state.followers += 1;
        Follower { names: Arc::clone(self), id: state.followers }
    }
}

/// What an answer waits for.
#[derive(Debug)]
pub(crate) struct Wait {
    until: Progress,
    heard: watch::Receiver<Progress>,
}

/// An agent's connection; when it is dropped nothing waits for that agent any more.
#[derive(Debug)]
pub(crate) struct Follower {
    names: Arc<Names>,
    id: u64,
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut state = self.names.state();
        if state.follower == self.id {
            state.follower = 0;
            state.queue.clear();
            state.known.clear();
            let serial = state.serial;
            drop(state);
            self.names.progress.send_replace(Progress { follower: 0, serial });
        }
    }
}

impl Follower {
    /// Wants to hear of these names. Texts that are no names are for no one: an agent of another version says them.
    pub(crate) fn wants(&self, names: &[String]) {
        let parsed: Vec<DomainName> = names.iter().filter_map(|text| DomainName::parse(text)).collect();
        let mut state = self.names.state();
        state.wanted = parsed.iter().collect();
        // What was not asked for meanwhile is forgotten there.
        state.known.clear();
        self.names.asked.store(!state.wanted.is_empty(), Ordering::Relaxed);
        if state.follower != self.id {
            state.follower = self.id;
            state.queue.clear();
            // Its serials go on from where the last one's were: nothing that waits takes one for the other.
            let serial = state.serial;
            state.serial += 1;
            drop(state);
            self.names.progress.send_replace(Progress { follower: self.id, serial });
        }
    }

    /// The agent has learned everything up to this.
    pub(crate) fn learned(&self, serial: u64, forgot: bool) {
        let mut state = self.names.state();
        if state.follower != self.id {
            return;
        }
        if forgot {
            // What waits to be told, or to be learned, is told again if it is given again: that is all.
            state.known.clear();
        }
        drop(state);
        self.names.progress.send_if_modified(|now| {
            let further = now.follower == self.id && now.serial < serial;
            now.serial = if further { serial } else { now.serial };
            further
        });
    }

    /// Whether a later one is told instead.
    fn is_over(&self) -> bool {
        self.names.state().follower > self.id
    }

    fn take(&self) -> Option<(u64, Vec<NameAnswer>)> {
        let mut state = self.names.state();
        if state.follower != self.id || state.queue.is_empty() {
            return None;
        }
        let serial = state.serial;
        state.serial += 1;
        Some((serial, std::mem::take(&mut state.queue)))
    }

    /// Waits until there is something to tell.
    pub(crate) async fn next(&self) -> (u64, Vec<NameAnswer>) {
        loop {
            if self.is_over() {
                // What woke this one was for another.
                self.names.news.notify_one();
                return std::future::pending().await;
            }
            if let Some(told) = self.take() {
                return told;
            }
            self.names.news.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names() -> Arc<Names> {
        Arc::new(Names::new(Arc::default()))
    }

    fn ip(last: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, last])
    }

    fn followed(names: &Arc<Names>) -> Follower {
        let follower = names.follow();
        follower.wants(&["*.example.com".to_owned(), "no name".to_owned()]);
        follower
    }

    #[tokio::test]
    async fn a_fresh_answer_waits_until_it_is_learned_and_a_known_one_does_not() {
        let names = names();
        let follower = followed(&names);
        assert!(names.tell("example.com", &[ip(1)], 60).is_none(), "nobody asks for it");
        assert!(names.tell("a.example.com", &[], 60).is_none(), "nothing to learn");
        let wait = names.tell("a.example.com", &[ip(1)], 60).unwrap();
        let second = names.tell("a.example.com", &[ip(1)], 60).expect("it waits for the same");
        let (serial, answers) = follower.next().await;
        assert_eq!(
            answers,
            [NameAnswer { name: "a.example.com".to_owned(), addresses: vec![ip(1)], ttl: 60 }],
            "told once"
        );
        let begun = Instant::now();
        let waiting = tokio::spawn({
            let names = Arc::clone(&names);
            async move { tokio::join!(names.learned(wait), names.learned(second)) }
        });
        tokio::time::sleep(Duration::from_millis(40)).await;
        assert!(!waiting.is_finished());
        follower.learned(serial, false);
        waiting.await.unwrap();
        assert!(begun.elapsed() < LONGEST_WAIT / 2);
        assert!(names.tell("a.example.com", &[ip(1)], 60).is_none(), "learned");
        assert!(names.tell("b.example.com", &[ip(1)], 60).is_some(), "of another name it is news");
        assert!(names.tell("a.example.com", &[ip(1), ip(2)], 60).is_some());
    }

    #[tokio::test]
    async fn an_answer_that_is_good_for_longer_is_told_and_does_not_wait() {
        let names = names();
        let follower = followed(&names);
        names.tell("a.example.com", &[ip(1)], 10).unwrap();
        let (serial, _) = follower.next().await;
        follower.learned(serial, false);
        assert!(names.tell("a.example.com", &[ip(1)], 5).is_none(), "out of a cache");
        assert!(names.state().queue.is_empty(), "it is no news");
        assert!(names.tell("a.example.com", &[ip(1)], 60).is_none());
        let (serial, told) = follower.next().await;
        assert_eq!(told[0].ttl, 60, "but told");
        follower.learned(serial, true);
        assert!(names.tell("a.example.com", &[ip(1)], 60).is_some(), "forgotten");
    }

    #[tokio::test]
    async fn nobody_waits_for_an_agent_that_is_slow_gone_or_was_never_there() {
        let names = names();
        assert!(names.tell("a.example.com", &[ip(1)], 60).is_none());
        let follower = followed(&names);
        let wait = names.tell("a.example.com", &[ip(1)], 60).unwrap();
        let begun = Instant::now();
        names.learned(wait).await;
        assert!(begun.elapsed() >= LONGEST_WAIT);
        assert_eq!((names.counters.read().names_held, names.counters.read().names_late), (1, 1));
        let wait = names.tell("a.example.com", &[ip(1)], 60).unwrap();
        let next = followed(&names);
        let begun = Instant::now();
        names.learned(wait).await;
        assert!(begun.elapsed() < LONGEST_WAIT / 4, "another agent listens now");
        drop(follower);
        let wait = names.tell("a.example.com", &[ip(1)], 60).expect("the next one is still there");
        drop(next);
        names.learned(wait).await;
        assert!(begun.elapsed() < LONGEST_WAIT / 4);
        assert!(names.tell("a.example.com", &[ip(1)], 60).is_none());
        assert_eq!(names.counters.read().names_unheard, 1);
    }
}
