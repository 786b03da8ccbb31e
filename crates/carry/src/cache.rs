//! Upstream answers by question: bounded in memory, kept past their time for when no upstream answers (RFC 8767).

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use crate::message::Response;

/// Memory that answers may take, in bytes, keys included.
pub(crate) const MAX_BYTES: usize = 8 << 20;
/// How long after its time an answer may still be given when no upstream answers.
pub(crate) const STALE_FOR: Duration = Duration::from_secs(3600);
/// Entries cost about this much beside their key and answer.
const OVERHEAD: usize = 128;

/// What tells questions to upstream servers apart.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    /// Lower case, as [`crate::message::Query::name`].
    pub(crate) name: String,
    pub(crate) qtype: u16,
    pub(crate) dnssec_ok: bool,
    pub(crate) checking_disabled: bool,
}

struct Entry {
    response: Arc<Response>,
    received: Instant,
    ttl: Duration,
    serial: u64,
    size: usize,
}

/// An answer out of the cache.
#[derive(Clone, Debug)]
pub(crate) struct Hit {
    pub(crate) response: Arc<Response>,
    /// Seconds since it was received.
    pub(crate) age: u32,
    /// Its time is over.
    pub(crate) stale: bool,
}

/// The cache. The oldest answers make room for new ones.
#[derive(Default)]
pub(crate) struct Cache {
    entries: HashMap<Key, Entry>,
    /// In the order they came; a key that was replaced is in it twice, with an old serial.
    order: VecDeque<(Key, u64)>,
    bytes: usize,
    serial: u64,
}

impl Cache {
    pub(crate) fn get(&self, key: &Key, now: Instant) -> Option<Hit> {
        let entry = self.entries.get(key)?;
        let age = now.saturating_duration_since(entry.received);
        if age >= entry.ttl + STALE_FOR {
            return None;
        }
        Some(Hit {
            response: Arc::clone(&entry.response),
            age: u32::try_from(age.as_secs()).unwrap_or(u32::MAX),
            stale: age >= entry.ttl,
        })
    }

    /// Keeps an answer if it says for how long, and no longer than `longest` seconds.
    pub(crate) fn insert(&mut self, key: Key, response: Arc<Response>, longest: u32, now: Instant) {
        let Some(ttl) = response.ttl.map(|ttl| ttl.min(longest)) else { return };
        let size = OVERHEAD + 2 * key.name.len() + response.size();
        if size > MAX_BYTES / 8 {
            return;
        }
        self.remove(&key);
        self.serial += 1;
        self.bytes += size;
        self.order.push_back((key.clone(), self.serial));
        let ttl = Duration::from_secs(u64::from(ttl));
        self.entries.insert(key, Entry { response, received: now, ttl, serial: self.serial, size });
        while self.bytes > MAX_BYTES {
            let Some((oldest, serial)) = self.order.pop_front() else { break };
            if self.entries.get(&oldest).is_some_and(|e| e.serial == serial) {
                self.remove(&oldest);
            }
        }
        if self.order.len() > 2 * self.entries.len() + 64 {
            let entries = &self.entries;
            self.order.retain(|(key, serial)| entries.get(key).is_some_and(|e| e.serial == *serial));
        }
    }

    /// Everything whose time is not over.
    pub(crate) fn fresh(&self, now: Instant) -> impl Iterator<Item = (&Key, Hit)> {
        self.entries.keys().filter_map(move |key| Some((key, self.get(key, now).filter(|hit| !hit.stale)?)))
    }

    fn remove(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.size;
        }
    }

    /// Entries and bytes.
    pub(crate) fn size(&self) -> (usize, usize) {
        (self.entries.len(), self.bytes)
    }
}

#[cfg(test)]
mod tests;
