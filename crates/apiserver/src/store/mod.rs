//! All objects: in memory as JSON text, on disk in redb, with one rising resource version and a window of events a table.
//!
//! Promises:
//! - Resource versions rise by one a write, over all tables, and never repeat, also over restarts and crashes.
//! - A watcher that reads [`Store::events_after`] from a version it got here misses nothing, or is told that it is too old.
//! - Watchers see only what is on disk (with [`Durability::Synced`]), so a crash takes nothing back that was announced.
//! - [`Store::wait_durable`] returns when a write is on disk; writes that come together share one sync.
//!
//! It touches only its database file. Locks are held for microseconds and never over a wait.

mod disk;
mod table;

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use hyper::body::Bytes;
use serde_json::Value;
use tokio::sync::watch;

use crate::config::Durability;
use disk::{Disk, DurableState, Operation};
use table::Table;
pub(crate) use table::{Event, EventKind, Key, Stored};

/// A table unknown so far, a failed disk and the like.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("the object database {path} cannot be used: {source}; check the directory's permissions and free space")]
    Database { path: String, source: Box<dyn std::error::Error + Send + Sync> },
    #[error("the object database refused an earlier write and accepts no more: {0}; restart after freeing space")]
    Failed(String),
    #[error("the stored object {0} cannot be read: {1}")]
    Corrupt(String, serde_json::Error),
}

/// Why a write was not made.
#[derive(Debug)]
pub(crate) enum WriteRefused {
    /// There is an object with this key already.
    Exists,
    /// There is none.
    Absent,
    /// Somebody else wrote in between.
    Changed,
    /// The object cannot be written as JSON, or the disk failed.
    Broken(String),
}

/// What a write expects to find.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Expect {
    /// No object.
    Absent,
    /// The object at this version.
    Version(u64),
}

/// The version a watcher asked for is older than the window.
#[derive(Debug)]
pub(crate) struct TooOld {
    /// The oldest version that can be asked for.
    pub(crate) oldest: u64,
}

struct Inner {
    version: u64,
    /// The version this process began with: a table that is new since then has had no event before.
    start: u64,
    tables: HashMap<String, Table>,
}

/// The object store.
pub(crate) struct Store {
    inner: RwLock<Inner>,
    disk: Disk,
    durable: watch::Receiver<DurableState>,
    durability: Durability,
}

impl Store {
    /// Opens or creates the database and loads every object.
    pub(crate) fn open(path: &Path, durability: Durability) -> Result<Self, StoreError> {
        let (disk, loaded) = Disk::open(path, durability)?;
        let mut tables: HashMap<String, Table> = HashMap::new();
        let start = loaded.version;
        for (table, stored) in loaded.objects {
            tables.entry(table).or_insert_with(|| Table::new(start)).load(stored);
        }
        let durable = disk.durable();
        Ok(Self { inner: RwLock::new(Inner { version: start, start, tables }), disk, durable, durability })
    }

    fn read(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Inner> {
        self.inner.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// The version of the newest write.
    pub(crate) fn version(&self) -> u64 {
        self.read().version
    }

    /// The version of the newest write to one table (or the start's).
    pub(crate) fn table_version(&self, table: &str) -> u64 {
        self.read().tables.get(table).map_or(0, Table::version)
    }

    /// One object.
    pub(crate) fn get(&self, table: &str, key: &Key) -> Option<Arc<Stored>> {
        self.read().tables.get(table)?.get(key).cloned()
    }

    /// All objects of a table or of one namespace of it, by namespace and name, and the version of this state.
    pub(crate) fn list(&self, table: &str, namespace: Option<&str>) -> (Vec<Arc<Stored>>, u64) {
        let inner = self.read();
        let objects = inner.tables.get(table).map(|table| table.list(namespace)).unwrap_or_default();
        (objects, inner.version)
    }

    /// The same as it was at an earlier version, while the window reaches that far.
    pub(crate) fn list_at(
        &self,
        table: &str,
        namespace: Option<&str>,
        version: u64,
    ) -> Result<Vec<Arc<Stored>>, TooOld> {
        match self.read().tables.get(table) {
            Some(table) => table.list_at(namespace, version),
            None => Ok(Vec::new()),
        }
    }

    /// A receiver that changes when a table has new events to read.
    pub(crate) fn subscribe(&self, table: &str) -> watch::Receiver<u64> {
        if let Some(found) = self.read().tables.get(table) {
            return found.subscribe();
        }
        let mut inner = self.write();
        let start = inner.start;
        inner.tables.entry(table.to_owned()).or_insert_with(|| Table::new(start)).subscribe()
    }

    /// Events of a table after a version, and the version up to which they are complete.
    pub(crate) fn events_after(&self, table: &str, version: u64) -> Result<(Vec<Arc<Event>>, u64), TooOld> {
        let inner = self.read();
        let visible = match self.durability {
            Durability::Synced => self.durable.borrow().version.min(inner.version),
            Durability::Relaxed => inner.version,
        };
        let events = match inner.tables.get(table) {
            Some(table) => table.events_after(version, visible)?,
            None => Vec::new(),
        };
        Ok((events, visible.max(version)))
    }

    /// Creates or replaces an object; sets its `metadata.resourceVersion`.
    pub(crate) fn put(
        &self,
        table: &str,
        key: &Key,
        mut object: Value,
        expect: Expect,
    ) -> Result<Written, WriteRefused> {
        let mut inner = self.write();
        let next = inner.version + 1;
        let start = inner.start;
        let place = inner.tables.entry(table.to_owned()).or_insert_with(|| Table::new(start));
        match (place.get(key), expect) {
            (Some(_), Expect::Absent) => return Err(WriteRefused::Exists),
            (None, Expect::Version(_)) => return Err(WriteRefused::Absent),
            (Some(have), Expect::Version(version)) if have.version != version => return Err(WriteRefused::Changed),
            _ => {}
        }
        let json = numbered(&mut object, next)?;
        let stored = Arc::new(Stored::new(key.clone(), next, json.clone(), &object));
        place.put(stored);
        inner.version = next;
        self.enqueue(&mut inner, table, key, Some(json), next)?;
        drop(inner);
        Ok(Written { version: next, object })
    }

    /// Removes an object; `last` is what watchers see, at the version of the removal.
    pub(crate) fn remove(
        &self,
        table: &str,
        key: &Key,
        mut last: Value,
        version: u64,
    ) -> Result<Written, WriteRefused> {
        let mut inner = self.write();
        let next = inner.version + 1;
        let place = inner.tables.get_mut(table).ok_or(WriteRefused::Absent)?;
        match place.get(key) {
            None => return Err(WriteRefused::Absent),
            Some(have) if have.version != version => return Err(WriteRefused::Changed),
            Some(_) => {}
        }
        let json = numbered(&mut last, next)?;
        place.remove(Arc::new(Stored::new(key.clone(), next, json, &last)));
        inner.version = next;
        self.enqueue(&mut inner, table, key, None, next)?;
        drop(inner);
        Ok(Written { version: next, object: last })
    }

    fn enqueue(
        &self,
        inner: &mut Inner,
        table: &str,
        key: &Key,
        json: Option<Bytes>,
        version: u64,
    ) -> Result<(), WriteRefused> {
        if let Some(why) = &self.durable.borrow().failed {
            return Err(WriteRefused::Broken(why.clone()));
        }
        let notify = inner.tables.get(table).map(Table::notifier);
        if self.durability == Durability::Relaxed
            && let Some(notify) = &notify
        {
            notify.send_replace(version);
        }
        let operation = Operation { table: table.to_owned(), key: key.clone(), json, version, notify };
        self.disk.enqueue(operation).map_err(WriteRefused::Broken)
    }

    /// Returns when everything up to this version is on disk (at once with [`Durability::Relaxed`]).
    pub(crate) async fn wait_durable(&self, version: u64) -> Result<(), StoreError> {
        if self.durability == Durability::Relaxed {
            return Ok(());
        }
        let mut durable = self.durable.clone();
        let state = durable
            .wait_for(|state| state.version >= version || state.failed.is_some())
            .await
            .map_err(|_closed| StoreError::Failed("the writer has ended".to_owned()))?;
        match &state.failed {
            Some(why) if state.version < version => Err(StoreError::Failed(why.clone())),
            _ => Ok(()),
        }
    }

    /// Writes what is waiting and closes the database.
    pub(crate) fn close(&self) {
        self.disk.close();
    }
}

/// A write that was made.
pub(crate) struct Written {
    /// Its version, to wait for with [`Store::wait_durable`].
    pub(crate) version: u64,
    /// The object as stored.
    pub(crate) object: Value,
}

fn numbered(object: &mut Value, version: u64) -> Result<Bytes, WriteRefused> {
    crate::meta::set_meta(object, "resourceVersion", Value::from(version.to_string()));
    match serde_json::to_vec(object) {
        Ok(json) => Ok(Bytes::from(json)),
        Err(error) => Err(WriteRefused::Broken(error.to_string())),
    }
}

#[cfg(test)]
mod tests;
