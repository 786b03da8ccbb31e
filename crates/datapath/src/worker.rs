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

use std::sync::mpsc;

use tokio::sync::oneshot;

use crate::error::Error;

type Job<S> = Box<dyn FnOnce(&mut S) + Send>;

/// A handle on the thread; cheap to clone.
#[derive(Debug)]
pub(crate) struct Worker<S> {
    jobs: mpsc::Sender<Job<S>>,
}

impl<S> Clone for Worker<S> {
    fn clone(&self) -> Self {
        Self { jobs: self.jobs.clone() }
    }
}

impl<S: 'static> Worker<S> {
    /// Starts the thread in the caller's network namespace and makes its state with `open` there.
    pub(crate) async fn start(open: impl FnOnce() -> Result<S, Error> + Send + 'static) -> Result<Self, Error> {
        let (jobs, inbox) = mpsc::channel::<Job<S>>();
        let (opened, result) = oneshot::channel();
        let run = move || match open() {
            Ok(mut state) => {
                if opened.send(Ok(())).is_ok() {
                    inbox.into_iter().for_each(|job| job(&mut state));
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
        Ok(Self { jobs })
    }

    /// Runs `work` on the thread. A caller that goes away does not stop it.
    pub(crate) async fn call<R: Send + 'static>(
        &self,
        work: impl FnOnce(&mut S) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let (answer, result) = oneshot::channel();
        // A caller that was cancelled gets no answer; the work is done all the same.
        let job: Job<S> = Box::new(move |state| drop(answer.send(work(state))));
        self.jobs.send(job).map_err(|_| Error::Stopped)?;
        result.await.unwrap_or(Err(Error::Stopped))
    }
}
