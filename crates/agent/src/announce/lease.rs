//! Which node announces an address: the holder of its Lease (`kube-system/towpath-lb-ADDRESS`).
//!
//! - The holder renews every [`RENEW`] and is believed for [`ANSWER_FOR`] after it began to, on its own clock; others may take the Lease
//!   [`DURATION`] after they saw the last renewal, on theirs. So no two nodes hold it, whatever their clocks say, as long as they run at
//!   the same rate. One request that is lost costs nothing: there is time for another.
//! - A Lease that was deleted is made again by who held it. Others wait as long as if it were there.
//! - An address that had no Lease is asked for on the network first (RFC 5227 §2.1): where a stranger has it, nobody announces it.
//! - A holder that was stopped (SIGSTOP, a frozen cgroup) is silent when it goes on, before it has asked anybody. A machine that was
//!   suspended with its clock is not: it finds out at its next renewal, [`RENEW`] later at most.
//! - While the API server does not answer, nobody can take over either: the last holder goes on alone, as long as it hears of no other.
//!   Whoever does take over announces itself to the same network, so one that was merely cut off from the API server hears it. An API
//!   server that refuses counts as silent for a while ([`REFUSED_FOR`]): it may just be starting.
//! - An agent that starts while the API server is away, and announced the address before, asks the network a few times, and goes on if
//!   nobody answers.
//! - A node whose agent ends in good order gives its Leases back.
//!
//! The load on the API server is 3 writes a second for each address, and two reads from its cache for each write, by the two nodes
//! that would take over first; five more read once in five seconds.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, GetParams, ObjectMeta, PostParams};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;
use towpath_model::NodeName;
use towpath_plan::election::{Observer, Record, Step};
use tracing::{debug, info, warn};

use super::Announcer;
use super::twice::{ONCE_MORE, once_or_twice};
use crate::events::NodeEvents;

/// How long a Lease holds without being renewed: whole seconds, as `spec.leaseDurationSeconds` has them.
pub const DURATION: Duration = Duration::from_secs(1);
/// How long after the beginning of a renewal its holder answers.
pub const ANSWER_FOR: Duration = Duration::from_millis(900);
/// Between renewals, and between looks of those who may take over.
pub const RENEW: Duration = Duration::from_millis(340);
/// One request to the API server.
const REQUEST: Duration = Duration::from_millis(500);
/// From the beginning of a renewal that failed to the next, at least.
const AGAIN: Duration = Duration::from_millis(100);
/// Who comes next in the order waits so much longer before it takes a Lease.
const TURN: Duration = Duration::from_millis(150);
/// So many nodes look often; of those after them some look seldom, in case the first are all gone.
const STANDING_BY: usize = 3;
const IN_RESERVE: usize = 8;
const SELDOM: Duration = Duration::from_secs(5);
/// How long the network is given to name another node before the last holder goes on alone.
const LISTEN: Duration = Duration::from_millis(250);
/// Who goes on alone asks the network so often at once, and then so often: it is heard by every machine on it.
const PROBES: u32 = 3;
const PROBE_EVERY: Duration = Duration::from_secs(10);
/// How long an API server that refuses (401, 403) counts as one that does not answer.
pub const REFUSED_FOR: Duration = Duration::from_secs(10);
/// What names the address, since a Lease's name cannot hold it as it is written.
const ADDRESS_ANNOTATION: &str = "towpath.dev/address";

/// This node's place among the candidates.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Place {
    /// 0 tries first.
    pub rank: usize,
    /// With whom the Lease goes: the pool that has the address now.
    pub owner: Option<OwnerReference>,
}

impl Place {
    /// How often it looks; none: not at all.
    fn looks_every(&self) -> Option<Duration> {
        match self.rank {
            rank if rank < STANDING_BY => Some(RENEW),
            rank if rank < IN_RESERVE => Some(SELDOM),
            _ => None,
        }
    }

    /// How long a Lease must be nobody's before it takes it.
    fn waits(&self) -> Duration {
        TURN.saturating_mul(u32::try_from(self.rank).unwrap_or(u32::MAX)).min(SELDOM)
    }
}

/// Name of an address's Lease: `towpath-lb-192-0-2-1`, `towpath-lb-2001-db8--1`.
pub fn lease_name(address: IpAddr) -> String {
    let mut text = address.to_string().replace(['.', ':'], "-");
    // A name does not end with a dash; what stands for 2001:db8:: is 2001:db8::0.
    if text.ends_with('-') {
        text.push('0');
    }
    format!("towpath-lb-{text}")
}

/// Since when this node takes part in the election for an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Since {
    /// It has not announced the address.
    Now,
    /// It did when its agent ended, and the API server has not said since who does.
    BeforeTheStart,
}

/// What came of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Written {
    Done,
    /// Somebody else wrote meanwhile, or it is gone: it is to be read.
    Changed,
    Unanswered,
    Refused,
}

/// One node's part in the election for one address.
pub struct Election<A> {
    api: Api<Lease>,
    name: String,
    node: String,
    address: IpAddr,
    announcer: A,
    events: Option<Arc<NodeEvents>>,
    observer: Observer,
    began: Instant,
    /// The Lease as we last wrote it.
    held: Option<Lease>,
    /// When our last renewal began that succeeded; none: another node has had the Lease since, or nobody.
    renewed: Option<Instant>,
    /// Since when the Lease is nobody's.
    free_since: Option<Instant>,
    /// Since when the network is asked for an address that has no Lease.
    asked_since: Option<Instant>,
    /// A stranger that has the address was named.
    stranger_named: bool,
    /// The API server does not answer, and we go on.
    alone: bool,
    /// That we had the Lease is of an earlier run.
    resumed: bool,
    /// How often the network was asked since the API server is silent, and when last.
    probed: Option<(u32, Instant)>,
    /// Since when the API server refuses.
    refused_since: Option<Instant>,
}

impl<A: Announcer> Election<A> {
    /// For an address, by Leases of that API.
    pub fn new(api: Api<Lease>, node: &NodeName, address: IpAddr, announcer: A) -> Self {
        Self {
            api,
            name: lease_name(address),
            node: node.to_string(),
            address,
            announcer,
            events: None,
            observer: Observer::new(node.as_str()).waiting(DURATION),
            began: Instant::now(),
            held: None,
            renewed: None,
            free_since: None,
            asked_since: None,
            stranger_named: false,
            alone: false,
            resumed: false,
            probed: None,
            refused_since: None,
        }
    }

    /// The same, taking part since then.
    pub fn since(self, since: Since) -> Self {
        let resumed = since == Since::BeforeTheStart;
        Self { resumed, renewed: resumed.then(Instant::now), ..self }
    }

    /// Writes an Event on the node where a stranger has the address.
    pub(super) fn with_events(mut self, events: Arc<NodeEvents>) -> Self {
        self.events = Some(events);
        self
    }

    /// Stands until told to stop, and then gives back what it has; whether this node still is the last holder, because that could not be
    /// said.
    pub async fn run(mut self, mut place: watch::Receiver<Place>, stop: CancellationToken) -> bool {
        self.announcer.prepare(self.address);
        loop {
            let now = place.borrow_and_update().clone();
            let begun = Instant::now();
            let next = self.step(&now).await.map(|every| begun + every);
            tokio::select! {
                () = stop.cancelled() => break,
                changed = place.changed() => if changed.is_err() { break },
                () = async {
                    match next {
                        Some(next) => sleep_until(next).await,
                        None => std::future::pending().await,
                    }
                } => {}
            }
        }
        self.announcer.withdraw(self.address);
        let still_ours = self.let_go().await;
        self.announcer.forget(self.address);
        still_ours
    }

    /// One look or renewal; how long after its beginning the next is due.
    async fn step(&mut self, place: &Place) -> Option<Duration> {
        if let Some(lease) = self.held.clone() {
            match self.write(Some(lease), Step::Renew, place).await {
                // It is another's now, or somebody wrote to it: read at once.
                Written::Changed => {}
                written => return Some(self.after(written)),
            }
        }
        // Who still counts as the last holder asks as often as one that stands by.
        let every = if self.renewed.is_some() { RENEW } else { place.looks_every()? };
        // From the API server's cache: what is written afterwards is written only if that was the latest.
        let look = timeout(REQUEST, self.api.get_with(&self.name, &GetParams::any())).await;
        let lease = match look {
            Ok(Ok(lease)) => Some(lease),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => None,
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                self.refused("read", &status.message).await;
                return Some(self.after(Written::Refused));
            }
            other => {
                debug!(lease = self.name, error = ?other.map(|look| look.err()), "not read");
                self.without_answer().await;
                return Some(if self.renewed.is_some() { self.after(Written::Unanswered) } else { every });
            }
        };
        Some(self.judge(lease, place, every).await)
    }

    /// How long after the beginning of a write the next step is due.
    fn after(&self, written: Written) -> Duration {
        match written {
            Written::Done => RENEW,
            Written::Changed => AGAIN,
            Written::Unanswered | Written::Refused if self.alone || self.resumed => RENEW,
            Written::Unanswered => AGAIN,
            Written::Refused if self.renewed.is_some() => RENEW,
            Written::Refused => SELDOM,
        }
    }

    /// What follows from the Lease as it was read; how long after that the next look is due.
    async fn judge(&mut self, lease: Option<Lease>, place: &Place, every: Duration) -> Duration {
        let is_absent = lease.is_none();
        let step = self.observer.observe(lease.as_ref().map(record), self.began.elapsed());
        if !is_absent {
            self.asked_since = None;
            self.stranger_named = false;
        }
        // Who looks seldom does so however soon the Lease runs out: those before it are there for that.
        let until_over = self.observer.expires_in(self.began.elapsed()).filter(|left| !left.is_zero());
        let look_in = until_over.filter(|_| every == RENEW).map_or(every, |left| every.min(left));
        match step {
            Step::Follow => {
                self.free_since = None;
                self.refused_since = None;
                self.stop_announcing("another node holds its Lease");
                look_in
            }
            Step::Wait => {
                self.free_since = None;
                self.asked_since.get_or_insert_with(Instant::now);
                self.announcer.probe(self.address);
                look_in
            }
            Step::Renew => {
                let written = self.write(lease, Step::Renew, place).await;
                self.after(written)
            }
            Step::Acquire => {
                if is_absent && self.is_a_strangers().await {
                    return SELDOM;
                }
                let free_since = *self.free_since.get_or_insert_with(Instant::now);
                let left = place.waits().saturating_sub(free_since.elapsed());
                // Who had it last goes first, or an interruption would move it.
                if self.renewed.is_none() && !left.is_zero() {
                    return left.min(every);
                }
                let written = self.write(lease, Step::Acquire, place).await;
                self.after(written)
            }
        }
    }

    /// Whether the address, which has no Lease, is in use by somebody who knows of none. It is asked for again as long as that is so.
    async fn is_a_strangers(&mut self) -> bool {
        let asked = self.asked_since.filter(|_| self.renewed.is_none() || self.resumed);
        if !asked.is_some_and(|since| self.announcer.is_contested_since(self.address, since)) {
            return false;
        }
        self.asked_since = Some(Instant::now());
        self.announcer.probe(self.address);
        if !std::mem::replace(&mut self.stranger_named, true) {
            let note = format!(
                "load balancer address {} is in use by another device on the network, so it is not announced: take it out of its \
                 AddressPool, or off that device",
                self.address
            );
            warn!("{note}");
            if let Some(events) = &self.events {
                let _late = timeout(REQUEST, events.warn("AddressInUse", &note)).await;
            }
        }
        true
    }

    async fn write(&mut self, lease: Option<Lease>, step: Step, place: &Place) -> Written {
        let begun = Instant::now();
        let is_there = lease.is_some();
        let mine = self.mine(lease, step, place);
        let writing = || {
            let (api, name, mine, params) = (self.api.clone(), self.name.clone(), mine.clone(), PostParams::default());
            async move {
                // With the resourceVersion that was read: of two that try at once, one fails.
                if is_there { api.replace(&name, &params, &mine).await } else { api.create(&params, &mine).await }
            }
        };
        let answer = match self.renewed.filter(|_| step == Step::Renew) {
            Some(renewed) => once_or_twice(writing, (renewed + ANSWER_FOR).max(begun + ONCE_MORE)).await,
            None => timeout(REQUEST, writing()).await,
        };
        match answer {
            Ok(Ok(written)) => {
                self.has_it(written, begun);
                Written::Done
            }
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => {
                debug!(lease = self.name, reason = status.message, "changed meanwhile; reading it again");
                self.held = None;
                Written::Changed
            }
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 401 | 403) => {
                self.refused("write", &status.message).await;
                Written::Refused
            }
            other => {
                // What the server says is no answer to this write, but it may be about the Lease, as where an update may create one and
                // this one is gone: it is read before it is written again.
                if matches!(other, Ok(Err(kube::Error::Api(_)))) {
                    self.held = None;
                }
                debug!(lease = self.name, error = ?other.map(|written| written.err()), "not written");
                self.without_answer().await;
                Written::Unanswered
            }
        }
    }

    fn has_it(&mut self, written: Lease, begun: Instant) {
        if self.renewed.is_none() || self.resumed {
            info!(address = %self.address, lease = self.name, "announcing this load balancer's address");
        } else if self.alone {
            info!(address = %self.address, "the API server answers again: its Lease is renewed");
        }
        self.observer.observe(Some(record(&written)), self.began.elapsed());
        self.held = Some(written);
        self.renewed = Some(begun);
        self.free_since = None;
        self.asked_since = None;
        (self.alone, self.resumed) = (false, false);
        self.probed = None;
        self.refused_since = None;
        self.announcer.announce(self.address, Some(begun + ANSWER_FOR));
    }

    /// The API server says that this node may not. Who held the Lease goes on for a while, as if it had said nothing.
    async fn refused(&mut self, what: &str, reason: &str) {
        let since = match self.refused_since {
            Some(since) => since,
            None => {
                warn!(
                    lease = self.name,
                    reason,
                    "may not {what} this Lease, so this node cannot say that it announces the address: the role towpath-agent in \
                     kube-system needs get, create and update of leases"
                );
                *self.refused_since.insert(Instant::now())
            }
        };
        if since.elapsed() < REFUSED_FOR {
            self.without_answer().await;
        } else {
            self.stop_announcing("the API server refuses to let it hold its Lease");
        }
    }

    /// The API server does not answer. Who held the Lease goes on when its time is over, if nobody else has been heard of.
    async fn without_answer(&mut self) {
        let Some(renewed) = self.renewed else { return };
        if renewed.elapsed() < ANSWER_FOR {
            // Nobody was asked yet in this run.
            if self.resumed {
                self.announcer.probe(self.address);
            }
            return;
        }
        self.held = None;
        let times = self.probed.map_or(0, |(times, _)| times);
        if times < PROBES || self.probed.is_none_or(|(_, last)| last.elapsed() >= PROBE_EVERY) {
            self.announcer.probe(self.address);
            self.probed = Some((times.saturating_add(1), Instant::now()));
        }
        if !self.alone {
            sleep(LISTEN).await;
        }
        if self.announcer.is_contested_since(self.address, renewed) {
            return self.stop_announcing("another node answers for it");
        }
        if !self.alone {
            self.alone = true;
            warn!(address = %self.address, "the API server does not answer, so no Lease says who announces this address: going on until \
                another node is heard");
        }
        self.announcer.announce(self.address, None);
    }

    fn stop_announcing(&mut self, why: &str) {
        self.announcer.withdraw(self.address);
        self.held = None;
        self.alone = false;
        self.probed = None;
        if self.renewed.take().is_some() && !std::mem::take(&mut self.resumed) {
            info!(address = %self.address, why, "no longer announcing this load balancer's address");
        }
    }

    fn mine(&self, lease: Option<Lease>, step: Step, place: &Place) -> Lease {
        let mut lease = lease.unwrap_or_else(|| Lease {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                labels: Some([("app.kubernetes.io/name".to_owned(), "towpath".to_owned())].into()),
                annotations: Some([(ADDRESS_ANNOTATION.to_owned(), self.address.to_string())].into()),
                ..ObjectMeta::default()
            },
            spec: None,
        });
        lease.metadata.owner_references = place.owner.clone().map(|owner| vec![owner]);
        let now = MicroTime(Timestamp::now());
        let spec = lease.spec.get_or_insert_with(LeaseSpec::default);
        if step == Step::Acquire {
            spec.acquire_time = Some(now.clone());
            spec.lease_transitions = Some(spec.lease_transitions.unwrap_or(0).saturating_add(1));
        }
        spec.holder_identity = Some(self.node.clone());
        spec.lease_duration_seconds = i32::try_from(DURATION.as_secs()).ok();
        spec.renew_time = Some(now);
        lease
    }

    /// Others need not wait for it to run out. Whether it is still ours as far as anybody can say.
    async fn let_go(&mut self) -> bool {
        let Some(mut lease) = self.held.take() else { return self.renewed.is_some() };
        if let Some(spec) = lease.spec.as_mut() {
            spec.holder_identity = None;
        }
        match timeout(REQUEST, self.api.replace(&self.name, &PostParams::default(), &lease)).await {
            Ok(Ok(_)) => {
                info!(address = %self.address, "no longer announcing this load balancer's address: given up");
                false
            }
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => false,
            other => {
                debug!(lease = self.name, error = ?other.map(|given| given.err()), "not given back; it runs out by itself");
                true
            }
        }
    }
}

fn record(lease: &Lease) -> Record {
    let spec = lease.spec.clone().unwrap_or_default();
    let seconds = spec.lease_duration_seconds.and_then(|s| u64::try_from(s).ok()).filter(|s| *s > 0);
    Record {
        holder: spec.holder_identity.unwrap_or_default(),
        renewed: lease.metadata.resource_version.clone(),
        duration: seconds.map_or(DURATION, Duration::from_secs),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_dns_names_and_no_two_addresses_have_one() {
        let name = |text: &str| lease_name(text.parse().unwrap());
        assert_eq!(name("192.0.2.1"), "towpath-lb-192-0-2-1");
        assert_eq!(name("2001:db8::1"), "towpath-lb-2001-db8--1");
        assert_eq!(name("2001:db8::"), "towpath-lb-2001-db8--0");
        assert_ne!(name("1:2:3:4::"), name("1:2:3:4::1"));
    }

    #[test]
    fn a_holder_is_silent_before_another_may_take_over_and_there_is_time_for_a_second_try() {
        assert!(ANSWER_FOR < DURATION);
        assert!(RENEW + ONCE_MORE * 2 < ANSWER_FOR, "a request that is lost and one that is slow");
        assert!(REQUEST < DURATION && AGAIN <= ONCE_MORE);
    }

    #[test]
    fn the_first_three_look_often_and_few_others_at_all() {
        let looks: Vec<_> = (0..9).map(|rank| Place { rank, owner: None }.looks_every()).collect();
        assert_eq!(looks.iter().filter(|every| **every == Some(RENEW)).count(), 3);
        assert_eq!(looks.iter().filter(|every| every.is_none()).count(), 1);
        // With the first two gone too, the third one is in time: it sees the last renewal a look late at worst.
        assert!(DURATION + RENEW + Place { rank: 2, owner: None }.waits() < Duration::from_secs(2));
    }
}
