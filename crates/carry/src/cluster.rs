//! The cluster's records as all tasks share them, what is counted, and the cache's size for those who ask.

use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use tokio::sync::Notify;
use towpath_plan::dns::{Outcome, QueryType, Zone};
use towpath_wire::dns::{DnsCounters, FeedMessage};

use crate::counters::Counters;
use crate::names::Names;
use crate::rules::Rules;

/// What the agent fed, and the counters.
#[derive(Debug)]
pub(crate) struct Cluster {
    zone: RwLock<Zone>,
    own: Vec<IpAddr>,
    rules: RwLock<Arc<Rules>>,
    pub(crate) counters: Arc<Counters>,
    /// What is told to the agent of names that policies ask for.
    pub(crate) names: Arc<Names>,
    cached: AtomicU64,
    cached_bytes: AtomicU64,
    changed: Notify,
}

impl Cluster {
    pub(crate) fn new(servers: Vec<IpAddr>) -> Self {
        let counters = Arc::<Counters>::default();
        Self {
            own: servers.clone(),
            rules: RwLock::default(),
            zone: RwLock::new(Zone::new(servers)),
            names: Arc::new(Names::new(Arc::clone(&counters))),
            counters,
            cached: AtomicU64::new(0),
            cached_bytes: AtomicU64::new(0),
            changed: Notify::new(),
        }
    }

    /// Applies a message of the feed; answers follow it from here on.
    pub(crate) fn apply(&self, message: FeedMessage) {
        self.restore(message);
        self.counters.feed_messages.add();
        self.changed.notify_one();
    }

    /// As [`Cluster::apply`], for what came from disk.
    pub(crate) fn restore(&self, message: FeedMessage) {
        self.note_rules(&message);
        // A writer that panicked left a zone that is whole: `apply` replaces entries one at a time.
        if matches!(message, FeedMessage::Snapshot { .. }) {
            // A large snapshot is indexed aside, so that answers go on meanwhile.
            let mut next = self.zone.read().unwrap_or_else(PoisonError::into_inner).successor();
            next.apply(message);
            *self.zone.write().unwrap_or_else(PoisonError::into_inner) = next;
        } else {
            self.zone.write().unwrap_or_else(PoisonError::into_inner).apply(message);
        }
    }

    /// What is configured beside the cluster's names.
    pub(crate) fn rules(&self) -> Arc<Rules> {
        Arc::clone(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn note_rules(&self, message: &FeedMessage) {
        let (FeedMessage::Snapshot { rules: Some(rules), .. } | FeedMessage::Rules { rules }) = message else { return };
        // A new connection of the feed says what is known already: then caches and preferred servers stay.
        if self.zone.read().unwrap_or_else(PoisonError::into_inner).records().rules() == Some(rules) {
            return;
        }
        let mut now = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        *now = Arc::new(Rules::new(rules, &self.own, now.version + 1));
        tracing::info!(zones = rules.zones.len(), "zones, hosts and aliases beside the cluster's names changed");
    }

    /// As [`Zone::answer`].
    pub(crate) fn answer(&self, name: &str, query: QueryType, turn: u16) -> Outcome {
        self.zone.read().unwrap_or_else(PoisonError::into_inner).answer(name, query, turn)
    }

    /// Everything fed, to be saved.
    pub(crate) fn snapshot(&self) -> FeedMessage {
        self.zone.read().unwrap_or_else(PoisonError::into_inner).records().snapshot()
    }

    /// As [`Cluster::snapshot`]; none before anything was fed.
    pub(crate) fn state(&self) -> Option<FeedMessage> {
        let zone = self.zone.read().unwrap_or_else(PoisonError::into_inner);
        (!zone.records().domain().is_empty()).then(|| zone.records().snapshot())
    }

    /// Waits until something was fed.
    pub(crate) async fn changed(&self) {
        self.changed.notified().await;
    }

    pub(crate) fn report_cache(&self, entries: usize, bytes: usize) {
        self.cached.store(entries as u64, Ordering::Relaxed);
        self.cached_bytes.store(bytes as u64, Ordering::Relaxed);
    }

    pub(crate) fn counters(&self) -> DnsCounters {
        DnsCounters {
            cached: self.cached.load(Ordering::Relaxed),
            cached_bytes: self.cached_bytes.load(Ordering::Relaxed),
            ..self.counters.read()
        }
    }
}
