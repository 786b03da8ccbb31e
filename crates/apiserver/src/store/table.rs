//! One table: objects by namespace and name, and the window of its last events.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex, PoisonError};

use hyper::body::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use super::TooOld;
use crate::resource::GroupVersionKind;

/// Events kept a table. A watcher that falls further behind lists again.
const WINDOW_EVENTS: usize = 2048;
/// Bytes of JSON that the window of a table may hold on to.
const WINDOW_BYTES: usize = 8 << 20;

/// Namespace (empty for cluster-wide objects) and name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: Box<str>,
    pub(crate) name: Box<str>,
}

impl Key {
    pub(crate) fn new(namespace: &str, name: &str) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

/// One version of an object.
#[derive(Debug)]
pub(crate) struct Stored {
    pub(crate) key: Key,
    pub(crate) version: u64,
    /// The whole object as JSON text.
    pub(crate) json: Bytes,
    /// Its labels, so that label selectors need no parsing.
    pub(crate) labels: Vec<(Box<str>, Box<str>)>,
    /// Fields of its inside that selectors have asked for: each watcher asks the same, and one reads the object.
    fields: Mutex<Vec<Field>>,
}

/// A field, as a version of the kind has it.
#[derive(Debug)]
struct Field {
    gvk: GroupVersionKind,
    path: Box<str>,
    value: Box<str>,
}

impl Stored {
    pub(super) fn new(key: Key, version: u64, json: Bytes, object: &Value) -> Self {
        let labels = object
            .pointer("/metadata/labels")
            .and_then(Value::as_object)
            .map(|labels| {
                labels.iter().filter_map(|(key, value)| Some((key.as_str().into(), value.as_str()?.into()))).collect()
            })
            .unwrap_or_default();
        Self { key, version, json, labels, fields: Mutex::default() }
    }

    /// Whether a field has this value in a version of the kind; it is looked for once.
    pub(crate) fn field_is(
        &self,
        gvk: &GroupVersionKind,
        path: &str,
        wanted: &str,
        find: impl FnOnce() -> String,
    ) -> bool {
        let mut fields = self.fields.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = fields.iter().find(|field| *field.path == *path && field.gvk == *gvk) {
            return *known.value == *wanted;
        }
        let value = find();
        let same = value == wanted;
        fields.push(Field { gvk: gvk.clone(), path: path.into(), value: value.into() });
        same
    }

    /// The object, parsed.
    pub(crate) fn value(&self) -> Result<Value, serde_json::Error> {
        serde_json::from_slice(&self.json)
    }
}

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EventKind {
    Added,
    Modified,
    Deleted,
}

/// One change of one object.
#[derive(Debug)]
pub(crate) struct Event {
    pub(crate) kind: EventKind,
    pub(crate) version: u64,
    /// The object after the change; of a deletion, as it was at last, at the deletion's version.
    pub(crate) object: Arc<Stored>,
    /// The object before the change.
    pub(crate) previous: Option<Arc<Stored>>,
}

pub(super) struct Table {
    objects: BTreeMap<Key, Arc<Stored>>,
    window: VecDeque<Arc<Event>>,
    window_bytes: usize,
    /// Events after this version are in the window.
    oldest: u64,
    notify: watch::Sender<u64>,
}

impl Table {
    pub(super) fn new(version: u64) -> Self {
        Self {
            objects: BTreeMap::new(),
            window: VecDeque::new(),
            window_bytes: 0,
            oldest: version,
            notify: watch::Sender::new(version),
        }
    }

    pub(super) fn load(&mut self, stored: Stored) {
        self.objects.insert(stored.key.clone(), Arc::new(stored));
    }

    pub(super) fn version(&self) -> u64 {
        self.window.back().map_or(self.oldest, |event| event.version)
    }

    pub(super) fn get(&self, key: &Key) -> Option<&Arc<Stored>> {
        self.objects.get(key)
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.notify.subscribe()
    }

    pub(super) fn notifier(&self) -> watch::Sender<u64> {
        self.notify.clone()
    }

    pub(super) fn list(&self, namespace: Option<&str>) -> Vec<Arc<Stored>> {
        match namespace {
            None => self.objects.values().cloned().collect(),
            Some(namespace) => self
                .objects
                .range((Bound::Included(Key::new(namespace, "")), Bound::Unbounded))
                .take_while(|(key, _)| &*key.namespace == namespace)
                .map(|(_, stored)| Arc::clone(stored))
                .collect(),
        }
    }

    /// Undoes the window's events back to `version`.
    pub(super) fn list_at(&self, namespace: Option<&str>, version: u64) -> Result<Vec<Arc<Stored>>, TooOld> {
        if version < self.oldest {
            return Err(TooOld { oldest: self.oldest });
        }
        if version >= self.version() {
            return Ok(self.list(namespace));
        }
        let mut state: BTreeMap<Key, Arc<Stored>> =
            self.list(namespace).into_iter().map(|stored| (stored.key.clone(), stored)).collect();
        for event in self.window.iter().rev().take_while(|event| event.version > version) {
            let key = &event.object.key;
            if namespace.is_some_and(|namespace| *key.namespace != *namespace) {
                continue;
            }
            match &event.previous {
                Some(previous) => state.insert(key.clone(), Arc::clone(previous)),
                None => state.remove(key),
            };
        }
        Ok(state.into_values().collect())
    }

    pub(super) fn events_after(&self, version: u64, visible: u64) -> Result<Vec<Arc<Event>>, TooOld> {
        if version < self.oldest {
            return Err(TooOld { oldest: self.oldest });
        }
        let first = self.window.partition_point(|event| event.version <= version);
        Ok(self.window.range(first..).take_while(|event| event.version <= visible).cloned().collect())
    }

    pub(super) fn put(&mut self, stored: Arc<Stored>) {
        let previous = self.objects.insert(stored.key.clone(), Arc::clone(&stored));
        let kind = if previous.is_some() { EventKind::Modified } else { EventKind::Added };
        self.push(Event { kind, version: stored.version, object: stored, previous });
    }

    pub(super) fn remove(&mut self, last: Arc<Stored>) {
        let previous = self.objects.remove(&last.key);
        self.push(Event { kind: EventKind::Deleted, version: last.version, object: last, previous });
    }

    fn push(&mut self, event: Event) {
        self.window_bytes += event.object.json.len();
        self.window.push_back(Arc::new(event));
        while self.window.len() > WINDOW_EVENTS || self.window_bytes > WINDOW_BYTES && self.window.len() > 1 {
            let Some(gone) = self.window.pop_front() else { break };
            self.window_bytes = self.window_bytes.saturating_sub(gone.object.json.len());
            self.oldest = gone.version;
        }
    }
}
