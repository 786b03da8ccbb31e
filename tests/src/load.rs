//! Load on Services: connections that stay open and new ones at a rate, from wherever the calling thread stands. Whatever breaks, is refused
//! or goes unanswered is kept with its time; nothing is tried twice.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use crate::place::{Place, Session};

/// Longest an answer may take: the machine may be busy, a dead data path does not answer at all.
const ANSWER: Duration = Duration::from_secs(8);
/// A connection that took longer lost its first packet (TCP sends it again after a second), or the machine was very busy.
const SLOW: Duration = Duration::from_millis(950);
/// As many problems are told; all are counted.
const TOLD: usize = 20;

/// What came of it so far. Shared by all threads that make load.
#[derive(Debug)]
pub struct Load {
    begun: Instant,
    over: AtomicBool,
    opened: AtomicUsize,
    asked: AtomicUsize,
    slow: AtomicUsize,
    failed: AtomicUsize,
    problems: Mutex<Vec<String>>,
    answers: Mutex<BTreeMap<String, usize>>,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Default for Load {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            over: AtomicBool::default(),
            opened: AtomicUsize::default(),
            asked: AtomicUsize::default(),
            slow: AtomicUsize::default(),
            failed: AtomicUsize::default(),
            problems: Mutex::default(),
            answers: Mutex::default(),
        }
    }
}

impl Load {
    /// Has all threads end.
    pub fn ends(&self) {
        self.over.store(true, Ordering::Relaxed);
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    fn note(&self, problem: &str) {
        self.failed.fetch_add(1, Ordering::Relaxed);
        let mut problems = locked(&self.problems);
        if problems.len() < TOLD {
            problems.push(format!("after {:.2} s {problem}", self.begun.elapsed().as_secs_f64()));
        }
    }

    /// Opens `count` connections from a place to each address in turn.
    ///
    /// # Errors
    /// One could not be opened, or gave no answer.
    pub fn sessions(from: &Place, to: &[SocketAddr], count: usize) -> Result<Vec<Session>> {
        from.enter(|| {
            let addresses = to.iter().cycle().take(count);
            addresses
                .map(|to| {
                    let mut session = Session::open(*to, ANSWER)?;
                    session.ask(ANSWER)?;
                    Ok(session)
                })
                .collect()
        })
    }

    /// Asks over open connections, one after the other, each about once in `every`, until the end. One that breaks is told and left.
    pub fn keep(&self, what: &str, mut sessions: Vec<Session>, every: Duration) {
        while self.goes_on() && !sessions.is_empty() {
            let pause = every / u32::try_from(sessions.len()).unwrap_or(u32::MAX);
            sessions.retain_mut(|session| {
                if !self.goes_on() {
                    return true;
                }
                match session.ask(ANSWER) {
                    Ok(_) => self.asked.fetch_add(1, Ordering::Relaxed),
                    Err(error) => {
                        self.note(&format!("an open connection broke, {what}: {error:#}"));
                        return false;
                    }
                };
                std::thread::sleep(pause);
                true
            });
        }
    }

    /// Opens connections to the addresses in turn, `per_second` of them as long as answers come as fast, asks once over each and closes it.
    pub fn open(&self, what: &str, to: &[SocketAddr], per_second: u32) {
        let pace = Duration::from_secs(1) / per_second.max(1);
        let mut next = Instant::now();
        for to in to.iter().cycle() {
            if !self.goes_on() {
                return;
            }
            let began = Instant::now();
            match Session::open(*to, ANSWER).and_then(|mut session| session.ask(ANSWER)) {
                Ok(answer) => {
                    self.opened.fetch_add(1, Ordering::Relaxed);
                    *locked(&self.answers).entry(answer.trim().to_owned()).or_default() += 1;
                }
                Err(error) => self.note(&format!("a new connection failed, {what}: {error:#}")),
            }
            if began.elapsed() > SLOW {
                self.slow.fetch_add(1, Ordering::Relaxed);
            }
            next += pace;
            let now = Instant::now();
            match next.checked_duration_since(now) {
                Some(rest) => std::thread::sleep(rest),
                // What could not be kept up with is not made up for by a burst.
                None => next = next.max(now.checked_sub(pace * 10).unwrap_or(now)),
            }
        }
    }

    /// How often each server answered a new connection, by what it said.
    pub fn answers(&self) -> BTreeMap<String, usize> {
        locked(&self.answers).clone()
    }

    /// Says what was done, and fails with what went wrong, or when too little was done to mean anything.
    ///
    /// # Errors
    /// A connection broke or was refused; fewer than `opened` were opened or `asked` requests answered.
    pub fn judge(&self, opened: usize, asked: usize) -> Result<()> {
        let took = self.begun.elapsed().as_secs_f64();
        let [new, kept, slow, failed] =
            [&self.opened, &self.asked, &self.slow, &self.failed].map(|count| count.load(Ordering::Relaxed));
        println!(
            "{took:.1} s: {new} connections opened ({:.0} a second), {kept} requests over open ones, {slow} slow, {failed} failed",
            new as f64 / took
        );
        if failed > 0 {
            bail!("{failed} of {} failed:\n{}", new + kept + failed, locked(&self.problems).join("\n"));
        }
        ensure!(
            new >= opened && kept >= asked,
            "too little was tried: {new} of {opened} opened, {kept} of {asked} asked"
        );
        Ok(())
    }
}
