//! Leading by a `coordination.k8s.io/v1` Lease: acquires, renews, and runs the work only while it holds.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use towpath_plan::election::{Observer, Record, Step};

/// How long the Lease holds without being renewed.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long stops working: well before anybody else may lead.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// One attempt to acquire or renew.
const ATTEMPT: Duration = Duration::from_secs(5);
/// Between attempts to acquire or renew.
const RETRY: Duration = Duration::from_secs(2);

/// How long things take at most.
#[derive(Clone, Copy, Debug)]
struct Timing {
    attempt: Duration,
    deadline: Duration,
    retry: Duration,
}

const TIMING: Timing = Timing { attempt: ATTEMPT, deadline: RENEW_DEADLINE, retry: RETRY };

/// Name of the Lease.
pub(crate) const NAME: &str = "towpath-controller";

/// Runs `work` whenever this replica leads, until `shutdown`. The token given to `work` is cancelled when it no longer does;
/// the work is dropped then.
pub(crate) async fn lead<F, W>(
    client: &Client,
    namespace: &str,
    identity: &str,
    shutdown: &CancellationToken,
    work: impl Fn(CancellationToken) -> W,
) where
    W: Future<Output = F>,
{
    let mut candidate = Candidate {
        api: Api::namespaced(client.clone(), namespace),
        identity: identity.to_owned(),
        observer: Observer::new(identity),
        start: Instant::now(),
        timing: TIMING,
    };
    loop {
        let since = tokio::select! {
            since = candidate.acquired() => since,
            () = shutdown.cancelled() => return,
        };
        tracing::info!(identity, "leading");
        let leading = shutdown.child_token();
        tokio::select! {
            () = candidate.lost(since) => {
                tracing::warn!(identity, "not leading any more: the Lease could not be renewed, or is another's");
            }
            _ = work(leading.clone()) => {
                // The work ends only when told to; let somebody else try.
                tracing::error!(identity, "the work ended while leading");
            }
            () = shutdown.cancelled() => {}
        }
        leading.cancel();
        if shutdown.is_cancelled() {
            candidate.release().await;
            return;
        }
    }
}

struct Candidate {
    api: Api<Lease>,
    identity: String,
    observer: Observer,
    start: Instant,
    timing: Timing,
}

impl Candidate {
    /// Tries until the Lease is ours; since when it is. That is when the attempt began: the answer may have taken its time, and
    /// others count from when the API server wrote it.
    async fn acquired(&mut self) -> Instant {
        let mut told = String::new();
        loop {
            let begun = Instant::now();
            let error = match timeout(self.timing.attempt, self.attempt()).await {
                Ok(Ok(true)) => return begun,
                Ok(Ok(false)) => String::new(),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "the API server did not answer in time".to_owned(),
            };
            if !error.is_empty() && error != told {
                tracing::warn!(%error, lease = NAME, "leader election: will try again");
                told = error;
            }
            sleep(self.timing.retry).await;
        }
    }

    /// Renews until that fails for too long, from the beginning of the last attempt that succeeded.
    async fn lost(&mut self, since: Instant) {
        let Timing { attempt, deadline, retry } = self.timing;
        let deadline = |since: Instant| since + deadline;
        let mut renewed = since;
        loop {
            sleep(retry.min(deadline(renewed).saturating_duration_since(Instant::now()))).await;
            let begun = Instant::now();
            match timeout_at(deadline(renewed).min(begun + attempt), self.attempt()).await {
                Ok(Ok(true)) => renewed = begun,
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(%error, lease = NAME, "the Lease could not be renewed: will try again")
                }
                Err(_) => tracing::warn!(lease = NAME, "the Lease could not be renewed in time: will try again"),
            }
            if Instant::now() >= deadline(renewed) {
                return;
            }
        }
    }

    /// Reads the Lease and writes it if it is, or may be, ours. Whether it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(NAME).await?;
        let record = lease.as_ref().map(record);
        let step = self.observer.observe(record, self.start.elapsed());
        if matches!(step, Step::Follow | Step::Wait) {
            return Ok(false);
        }
        let written = match lease {
            None => self.api.create(&PostParams::default(), &self.fresh()).await,
            // With the resourceVersion that was read: of two that try at once, one fails.
            Some(lease) => self.api.replace(NAME, &PostParams::default(), &self.mine(lease, step)).await,
        };
        match written {
            Ok(_) => Ok(true),
            Err(kube::Error::Api(status)) if status.code == 409 => {
                tracing::debug!(lease = NAME, "another replica was faster");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn fresh(&self) -> Lease {
        let metadata = ObjectMeta { name: Some(NAME.to_owned()), ..ObjectMeta::default() };
        self.mine(Lease { metadata, ..Lease::default() }, Step::Acquire)
    }

    fn mine(&self, mut lease: Lease, step: Step) -> Lease {
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if step == Step::Acquire {
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.holder_identity = Some(self.identity.clone());
        spec.lease_duration_seconds = i32::try_from(LEASE_DURATION.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Gives the Lease back, so that another replica need not wait for it to run out.
    async fn release(&self) {
        let giving = async {
            let Some(mut lease) = self.api.get_opt(NAME).await? else { return Ok(()) };
            if record(&lease).holder == self.identity {
                lease.spec.get_or_insert_with(LeaseSpec::default).holder_identity = None;
                self.api.replace(NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        match timeout(Duration::from_secs(2), giving).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::warn!(%error, lease = NAME, "the Lease was not released; it runs out by itself"),
            Err(_) => tracing::warn!(lease = NAME, "the Lease was not released in time; it runs out by itself"),
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        // The version changes with every write, also by who does not keep the time.
        renewed: spec.renew_time.map(|t| t.0.to_string()).or_else(|| lease.resource_version()),
        duration: seconds.map_or(LEASE_DURATION, Duration::from_secs),
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::sync::Arc;
    use std::sync::atomic::AtomicUsize;
    use std::sync::atomic::Ordering::Relaxed;

    use http::{Method, Request, Response};
    use kube::client::Body;
    use serde_json::json;

    use super::*;

    #[test]
    fn a_leader_stops_before_another_may_start() {
        assert!(RENEW_DEADLINE + RETRY < LEASE_DURATION);
        assert!(RETRY + ATTEMPT < RENEW_DEADLINE, "a renewal that is lost is tried again");
    }

    type Answered = Result<Response<Body>, Infallible>;

    /// An API server without any Lease that takes its time to make the first one, and answers nothing afterwards.
    fn slow(takes: Duration) -> Client {
        let writes = Arc::new(AtomicUsize::new(0));
        let service = tower::service_fn(move |request: Request<Body>| {
            let writes = writes.clone();
            async move {
                let answer = |code: u16, body: Vec<u8>| -> Answered {
                    Ok(Response::builder().status(code).body(Body::from(body)).unwrap())
                };
                if writes.load(Relaxed) > 0 {
                    return std::future::pending::<Answered>().await;
                }
                if request.method() == Method::GET {
                    let missing = json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"});
                    return answer(404, missing.to_string().into_bytes());
                }
                let body = request.into_body().collect_bytes().await.unwrap();
                sleep(takes).await;
                writes.fetch_add(1, Relaxed);
                answer(201, body.to_vec())
            }
        });
        Client::new(service, "default")
    }

    fn candidate(client: Client, timing: Timing) -> Candidate {
        let (api, observer) = (Api::namespaced(client, "kube-system"), Observer::new("a"));
        Candidate { api, identity: "a".to_owned(), observer, start: Instant::now(), timing }
    }

    #[tokio::test]
    async fn a_leader_counts_from_when_it_asked_not_from_when_it_was_answered() {
        let (takes, deadline) = (Duration::from_millis(800), Duration::from_millis(1200));
        let timing = Timing { attempt: Duration::from_secs(2), deadline, retry: Duration::from_millis(50) };
        let mut leader = candidate(slow(takes), timing);
        let begun = Instant::now();
        let since = leader.acquired().await;
        assert!(begun.elapsed() >= takes);
        leader.lost(since).await;
        assert!(begun.elapsed() < takes + deadline, "it stopped after {:?}", begun.elapsed());
    }

    #[tokio::test]
    async fn an_api_server_that_does_not_answer_holds_up_no_attempt_for_ever() {
        let timing = Timing {
            attempt: Duration::from_millis(20),
            deadline: Duration::from_secs(10),
            retry: Duration::from_millis(1),
        };
        let attempts = Arc::new(AtomicUsize::new(0));
        let seen = attempts.clone();
        let service = tower::service_fn(move |_: Request<Body>| {
            seen.fetch_add(1, Relaxed);
            std::future::pending::<Answered>()
        });
        let mut waiting = candidate(Client::new(service, "default"), timing);
        let acquired = timeout(Duration::from_secs(1), waiting.acquired()).await;
        assert!(acquired.is_err() && attempts.load(Relaxed) > 1, "{attempts:?}");
    }
}
