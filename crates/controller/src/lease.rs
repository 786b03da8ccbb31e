//! Leading by a `coordination.k8s.io/v1` Lease: acquires, renews, and runs the work only while it holds.

use std::future::Future;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ObjectMeta, PostParams};
use kube::{Client, ResourceExt};
use tokio::time::{Instant, sleep, timeout};
use tokio_util::sync::CancellationToken;

use towpath_plan::election::{Observer, Record, Step};

/// How long the Lease holds without being renewed.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// A leader that could not renew for so long stops working: well before anybody else may lead.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Between attempts to acquire or renew.
const RETRY: Duration = Duration::from_secs(2);

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
    };
    loop {
        tokio::select! {
            () = candidate.acquired() => {}
            () = shutdown.cancelled() => return,
        }
        tracing::info!(identity, "leading");
        let leading = shutdown.child_token();
        tokio::select! {
            () = candidate.lost() => {
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
}

impl Candidate {
    /// Tries until the Lease is ours.
    async fn acquired(&mut self) {
        let mut told = String::new();
        loop {
            match self.attempt().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => {
                    let error = error.to_string();
                    if error != told {
                        tracing::warn!(%error, lease = NAME, "leader election: will try again");
                        told = error;
                    }
                }
            }
            sleep(RETRY).await;
        }
    }

    /// Renews until that fails for too long.
    async fn lost(&mut self) {
        let mut renewed = Instant::now();
        loop {
            sleep(RETRY).await;
            let left = RENEW_DEADLINE.saturating_sub(renewed.elapsed());
            match timeout(left, self.attempt()).await {
                Ok(Ok(true)) => renewed = Instant::now(),
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(%error, lease = NAME, "the Lease could not be renewed: will try again");
                    if renewed.elapsed() >= RENEW_DEADLINE {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Reads the Lease and writes it if it is, or may be, ours. Whether it is ours now.
    async fn attempt(&mut self) -> Result<bool, kube::Error> {
        let lease = self.api.get_opt(NAME).await?;
        let record = lease.as_ref().map(record);
        let step = self.observer.observe(record, self.start.elapsed());
        if step == Step::Follow {
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
    use super::*;

    #[test]
    fn a_leader_stops_before_another_may_start() {
        assert!(RENEW_DEADLINE + RETRY < LEASE_DURATION);
    }
}
