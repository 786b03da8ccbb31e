//! Names outside the cluster: from the cache, by joining a question that is already on its way, or from upstream.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt;
use futures::future::{BoxFuture, Shared, WeakShared};
use tokio::time::Instant;

use crate::cache::{Cache, Hit, Key};
use crate::cluster::Cluster;
use crate::message::response::{MAX_TTL, wire_name};
use crate::message::{Response, rcode};
use crate::names::Wait;
use crate::rules::Route;
use crate::shares::Shares;
use crate::upstream::{Ask, Upstreams};

/// Questions on their way upstream at a time; each has a socket.
const MAX_IN_FLIGHT: usize = 512;
/// A client that asks for what nobody answers holds a quarter of them, and a zone whose servers are silent half, when it is the only one.
const CLIENTS_PART: usize = 3;
const SERVERS_PART: usize = 1;
/// TTL of an answer that is given after its time (RFC 8767 §4 recommends 30 s).
const STALE_TTL: u32 = 30;
/// How long a failure is remembered, so that one broken name is not asked for again by everybody (RFC 9520).
const FAILURE_FOR: Duration = Duration::from_secs(1);
/// Failures remembered at a time.
const MAX_FAILURES: usize = 4096;

type Answering = BoxFuture<'static, Option<Arc<Response>>>;
type Flight = Shared<Answering>;

/// An answer and how to show its age.
#[derive(Clone, Debug)]
pub(crate) struct Forwarded {
    pub(crate) response: Arc<Response>,
    /// Seconds to take off its TTLs.
    pub(crate) age: u32,
    /// Most that a TTL may then be.
    pub(crate) cap: u32,
}

/// Answers questions by asking upstream.
pub(crate) struct Forwarder {
    shared: Arc<State>,
    in_flight: Mutex<HashMap<Key, WeakShared<Answering>>>,
    /// Who began what is in flight, and who is asked.
    clients: Shares<IpAddr>,
    servers: Shares<Arc<[SocketAddr]>>,
}

struct State {
    cluster: Arc<Cluster>,
    upstreams: Arc<Upstreams>,
    cache: Mutex<Cache>,
    failures: Mutex<HashMap<Key, Instant>>,
    /// Version of the rules that cache and failures are from.
    version: AtomicU64,
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Forwarder {
    pub(crate) fn new(cluster: Arc<Cluster>, upstreams: Arc<Upstreams>) -> Self {
        let (cache, failures) = (Mutex::new(Cache::default()), Mutex::new(HashMap::new()));
        Self {
            shared: Arc::new(State { cluster, upstreams, cache, failures, version: AtomicU64::new(0) }),
            in_flight: Mutex::new(HashMap::new()),
            clients: Shares::new(MAX_IN_FLIGHT, CLIENTS_PART),
            servers: Shares::new(MAX_IN_FLIGHT, SERVERS_PART),
        }
    }

    /// The answer, if it is in the cache and its time is not over.
    pub(crate) fn cached(&self, key: &Key) -> Option<Forwarded> {
        self.shared.follow_rules();
        let hit = locked(&self.shared.cache).get(key, Instant::now()).filter(|hit| !hit.stale)?;
        self.shared.cluster.counters.cache_hits.add();
        Some(self.fresh(key, hit))
    }

    /// The answer for a client; none when nobody has one.
    pub(crate) async fn resolve(&self, key: Key, client: IpAddr) -> Option<Forwarded> {
        let failed = locked(&self.shared.failures).get(&key).is_some_and(|at| at.elapsed() < FAILURE_FOR);
        if !failed
            && let Some(flight) = self.flight(&key, client)
            && let Some(response) = flight.await
        {
            let cap = self.shared.longest(&key.name, &response);
            return Some(Forwarded { response, age: 0, cap });
        }
        let hit = locked(&self.shared.cache).get(&key, Instant::now())?;
        if !hit.stale {
            return Some(self.fresh(&key, hit));
        }
        self.shared.cluster.counters.stale_answers.add();
        Some(Forwarded { response: hit.response, age: 0, cap: STALE_TTL })
    }

    /// Tells of all answers in the cache that policies ask for: clients may have them still.
    pub(crate) fn tell_cached(&self) {
        let names = &self.shared.cluster.names;
        let wanted: Vec<(Key, Hit)> = {
            let cache = locked(&self.shared.cache);
            cache.fresh(Instant::now()).filter(|(key, _)| names.wants(&key.name)).map(|(k, h)| (k.clone(), h)).collect()
        };
        for (key, hit) in wanted {
            // Nobody waits for them.
            drop(self.tell(&key, &self.fresh(&key, hit)));
        }
    }

    /// Tells of an answer that is about to be given, if policies ask for its name: what it must wait for, if anything.
    pub(crate) fn tell(&self, key: &Key, found: &Forwarded) -> Option<Wait> {
        let names = &self.shared.cluster.names;
        // Whoever asks without checks (CD) may be told what a resolver that validates would not have believed.
        if !names.wants(&key.name) || key.checking_disabled || found.response.rcode() != rcode::NOERROR {
            return None;
        }
        let ttl = found.response.least_ttl().saturating_sub(found.age).min(found.cap);
        names.tell(&key.name, &found.response.addresses(), ttl)
    }

    fn fresh(&self, key: &Key, hit: Hit) -> Forwarded {
        let cap = self.shared.longest(&key.name, &hit.response).saturating_sub(hit.age);
        Forwarded { response: hit.response, age: hit.age, cap }
    }

    /// Joins the question if it is on its way, which costs nothing; else sends it, if the client and those to be asked have a share left.
    fn flight(&self, key: &Key, client: IpAddr) -> Option<Flight> {
        let mut in_flight = locked(&self.in_flight);
        // A question that everybody stopped waiting for is not upgraded, and so asked anew.
        if let Some(flight) = in_flight.get(key).and_then(WeakShared::upgrade) {
            self.shared.cluster.counters.joined.add();
            return Some(flight);
        }
        let counters = &self.shared.cluster.counters;
        let Some(of_client) = self.clients.take(&client) else {
            counters.client_over_share();
            return None;
        };
        let servers = self.shared.upstreams_of(&key.name).map(|upstreams| upstreams.servers()).unwrap_or_default();
        let Some(of_servers) = self.servers.take(&servers) else {
            counters.servers_over_share();
            return None;
        };
        let (state, of) = (Arc::clone(&self.shared), key.clone());
        let flight = async move {
            let answer = state.ask(of).await;
            drop((of_client, of_servers));
            answer
        }
        .boxed()
        .shared();
        // Those that ended or were given up leave their keys behind: there are never many more than in flight.
        if in_flight.len() > 2 * MAX_IN_FLIGHT {
            in_flight.retain(|_, flight| flight.upgrade().is_some_and(|f| f.peek().is_none()));
        }
        if let Some(weak) = flight.downgrade() {
            in_flight.insert(key.clone(), weak);
        }
        Some(flight)
    }
}

impl State {
    /// Forgets what was answered under other rules.
    fn follow_rules(&self) {
        let now = self.cluster.rules().version;
        if self.version.swap(now, Ordering::Relaxed) != now {
            *locked(&self.cache) = Cache::default();
            locked(&self.failures).clear();
        }
    }

    /// Longest that an answer may be kept by its zone's rules, in seconds.
    fn longest(&self, name: &str, response: &Response) -> u32 {
        self.cluster.rules().zone_of(name).map_or(MAX_TTL, |zone| match response.is_denial() {
            true => zone.denial_ttl,
            false => zone.success_ttl,
        })
    }

    /// Whom the rules name for the name's zone, if anybody.
    fn upstreams_of(&self, name: &str) -> Option<Arc<Upstreams>> {
        match self.cluster.rules().zone_of(name).map(|zone| &zone.route) {
            None | Some(Route::Node) => Some(Arc::clone(&self.upstreams)),
            Some(Route::Servers(servers)) => Some(Arc::clone(servers)),
            Some(Route::Nobody) => None,
        }
    }

    async fn ask_upstream(&self, name: &str, ask: &Ask) -> Option<Response> {
        self.upstreams_of(name)?.resolve(ask).await
    }

    async fn ask(&self, key: Key) -> Option<Arc<Response>> {
        self.cluster.counters.forwarded.add();
        let ask = Ask {
            qname: wire_name(&key.name)?,
            qtype: key.qtype,
            dnssec_ok: key.dnssec_ok,
            checking_disabled: key.checking_disabled,
        };
        let version = self.cluster.rules().version;
        match self.ask_upstream(&key.name, &ask).await {
            Some(response) => {
                let response = Arc::new(response);
                if self.cluster.rules().version != version {
                    // Whom it was asked is not whom it would be asked now.
                    return Some(response);
                }
                let longest = self.longest(&key.name, &response);
                let mut cache = locked(&self.cache);
                cache.insert(key, Arc::clone(&response), longest, Instant::now());
                let (entries, bytes) = cache.size();
                self.cluster.report_cache(entries, bytes);
                Some(response)
            }
            None => {
                self.cluster.counters.upstream_failures.add();
                let mut failures = locked(&self.failures);
                if failures.len() >= MAX_FAILURES {
                    failures.retain(|_, at| at.elapsed() < FAILURE_FOR);
                }
                if failures.len() < MAX_FAILURES {
                    failures.insert(key, Instant::now());
                }
                None
            }
        }
    }
}
