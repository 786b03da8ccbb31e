//! The node's data path thread: every call to the kernel is made on it, one after the other.
//!
//! ```text
//!  async callers ── job ──► thread "towpath-kernel" (owns the state, in the network namespace it was started in)
//!        ▲                        │
//!        └────── oneshot ◄────────┘
//! ```
//!
//! One thread, because namespaces belong to threads and because one writer needs no locks; blocking there blocks no async
//! executor. Dropping the last handle ends the thread after the job in hand.
//!
//! Chores are what can wait: the next is done when no job has come for a while, so that a job waits for one chore at most.

use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::error::Error;

/// How long no job has come before chores are done.
const QUIET: Duration = Duration::from_millis(100);

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A handle on the thread; cheap to clone.
#[derive(Debug)]
pub(crate) struct Worker<S> {
    jobs: mpsc::Sender<Job<S>>,
    in_hand: InHand,
}

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone(), in_hand: self.in_hand.clone() }
    }
}

/// Since when the thread is at what it does now; none: it waits.
#[derive(Clone, Debug, Default)]
struct InHand(Arc<Mutex<Option<Instant>>>);

impl InHand {
    fn during<R>(&self, work: impl FnOnce() -> R) -> R {
        self.set(Some(Instant::now()));
        let result = work();
        self.set(None);
        result
    }

    fn set(&self, since: Option<Instant>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = since;
    }
}

impl<S: 'static> Worker<S> {
    /// Starts the thread in the caller's network namespace and makes its state with `open` there. `chore` does the next thing
    /// that can wait, and says whether there may be more.
    pub(crate) async fn start(
        open: impl FnOnce() -> Result<S, Error> + Send + 'static,
        chore: fn(&mut S) -> bool,
    ) -> Result<Self, Error> {
        let (jobs, inbox) = mpsc::channel::<Job<S>>();
        let (opened, result) = oneshot::channel();
        let in_hand = InHand::default();
        let here = in_hand.clone();
        let run = move || match open() {
            Ok(mut state) => {
                if opened.send(Ok(())).is_ok() {
                    work(&mut state, &inbox, chore, &here);
                }
            }
            // Nobody waits for the outcome any more: there is nobody to tell.
            Err(error) => drop(opened.send(Err(error))),
        };
        std::thread::Builder::new()
            .name("towpath-kernel".to_owned())
            .spawn(run)
            .map_err(|e| crate::net::Error::system("start the data path thread", e))?;
        result.await.unwrap_or(Err(Error::Stopped))?;
        Ok(Self { jobs, in_hand })
    }

    /// How long the thread has been at what it does now; none: it waits for work.
    pub(crate) fn busy_for(&self) -> Option<Duration> {
        self.in_hand.0.lock().unwrap_or_else(PoisonError::into_inner).map(|since| since.elapsed())
    }

    /// Runs `work` on the thread. A caller that goes away does not stop it.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        self.submit(work).await
    }

    /// As [`Worker::call`], but the work has its place when this returns: before everything that is asked for later, whenever the answer
    /// is waited for.
    pub(crate) fn submit<R: Send + 'static, W>(
        &self,
        work: W,
    ) -> impl Future<Output = Result<R, Error>> + Send + use<R, S, W>
    where
        W: FnOnce(&mut S) -> Result<R, Error> + Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        // A caller that was cancelled gets no answer; the work is done all the same.
        let job: Job<S> = Box::new(move |state| drop(answer.send(work(state))));
        let sent = self.jobs.send(job).map_err(|_| Error::Stopped);
        async move {
            sent?;
            result.await.unwrap_or(Err(Error::Stopped))
        }
    }
}

/// Does jobs until there is nobody to send them.
fn work<S>(state: &mut S, inbox: &mpsc::Receiver<Job<S>>, chore: fn(&mut S) -> bool, in_hand: &InHand) {
    let mut rest = Some(QUIET);
    loop {
        let next = match rest {
            Some(rest) => inbox.recv_timeout(rest),
            None => inbox.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
        };
        match next {
            Ok(job) => {
                in_hand.during(|| job(state));
                rest = Some(QUIET);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {
                let begun = Instant::now();
                // A chore may hold a lock of the whole machine, so half of the time is for others.
                rest = in_hand.during(|| chore(state)).then(|| begun.elapsed());
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_submitted_has_its_place_before_its_answer_is_waited_for() {
        let worker = Worker::start(|| Ok(Vec::new()), |_| false).await.unwrap();
        let say = |what: &'static str| {
            move |said: &mut Vec<&'static str>| {
                said.push(what);
                Ok(said.clone())
            }
        };
        let (first, second) = (worker.submit(say("first")), worker.submit(say("second")));
        assert_eq!(worker.call(say("third")).await.unwrap(), ["first", "second", "third"]);
        assert_eq!(second.await.unwrap(), ["first", "second"]);
        assert_eq!(first.await.unwrap(), ["first"]);
    }

    #[tokio::test]
    async fn what_is_in_hand_is_seen_while_it_hangs_and_not_after_it() {
        let worker = Worker::start(|| Ok(()), |()| false).await.unwrap();
        let (release, hangs) = mpsc::channel::<()>();
        let call = worker.submit(move |()| {
            let _released = hangs.recv();
            Ok(())
        });
        let deadline = Instant::now() + Duration::from_secs(10);
        while worker.busy_for().is_none_or(|time| time < Duration::from_millis(5)) {
            assert!(Instant::now() < deadline, "{:?}", worker.busy_for());
            tokio::task::yield_now().await;
        }
        drop(release);
        call.await.unwrap();
        while worker.busy_for().is_some() {
            assert!(Instant::now() < deadline);
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn chores_are_done_when_nobody_asks_and_a_job_waits_for_one_at_most() {
        const CHORES: usize = 5;
        let chore = |done: &mut Vec<&'static str>| {
            std::thread::sleep(Duration::from_millis(30));
            done.push("chore");
            done.iter().filter(|what| **what == "chore").count() < CHORES
        };
        let worker = Worker::start(|| Ok(Vec::new()), chore).await.unwrap();
        let ask = || {
            worker.call(|done: &mut Vec<&'static str>| {
                done.push("job");
                Ok(done.clone())
            })
        };
        for count in 1..=20 {
            assert_eq!(ask().await.unwrap().len(), count, "jobs come one upon the other: no chore in between");
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            assert!(Instant::now() < deadline, "chores are not done");
            tokio::time::sleep(QUIET + Duration::from_millis(100)).await;
            let done = ask().await.unwrap();
            let chores = done.iter().filter(|what| **what == "chore").count();
            assert!(chores <= CHORES, "a chore after the last: {done:?}");
            if chores == CHORES {
                break;
            }
        }
    }
}
