//! The database file and the thread that writes it.
//!
//! Writes queue up while a sync runs and are then made durable together: one sync for all of them. An idle writer
//! starts at once, so a lone write waits for its own sync only.

use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use hyper::body::Bytes;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use serde_json::Value;
use tokio::sync::watch;

use super::StoreError;
use super::table::{Key, Stored};
use crate::config::Durability;

const OBJECTS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("objects");
const FACTS: TableDefinition<'_, &str, u64> = TableDefinition::new("facts");
/// Writes in one transaction at most.
const GROUP: usize = 1000;
/// How long the relaxed mode collects writes before it syncs.
const RELAXED_WINDOW: Duration = Duration::from_millis(5);
/// Versions skipped at start: more than can have been given out and lost in a crash, so that none is used twice.
const RESTART_GAP: u64 = 1000;

/// How far the disk has come.
#[derive(Clone, Debug, Default)]
pub(super) struct DurableState {
    pub(super) version: u64,
    pub(super) failed: Option<String>,
}

pub(super) struct Operation {
    pub(super) table: String,
    pub(super) key: Key,
    /// The object, or none to remove it.
    pub(super) json: Option<Bytes>,
    pub(super) version: u64,
    /// Told when the write is durable.
    pub(super) notify: Option<watch::Sender<u64>>,
}

pub(super) struct Loaded {
    pub(super) version: u64,
    pub(super) objects: Vec<(String, Stored)>,
}

pub(super) struct Disk {
    queue: Mutex<Option<Sender<Operation>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
    durable: watch::Receiver<DurableState>,
}

fn database_error<E>(path: &Path) -> impl Fn(E) -> StoreError
where
    E: Into<redb::Error>,
{
    move |source| StoreError::Database { path: path.display().to_string(), source: Box::new(source.into()) }
}

impl Disk {
    pub(super) fn open(path: &Path, durability: Durability) -> Result<(Self, Loaded), StoreError> {
        let database = Database::builder()
            .set_cache_size(4 << 20)
            .create(path)
            .map_err(database_error::<redb::DatabaseError>(path))?;
        let loaded = load(&database, path)?;
        let state = DurableState { version: loaded.version, failed: None };
        let (announce, durable) = watch::channel(state);
        let (queue, operations) = channel();
        let relaxed = durability == Durability::Relaxed;
        let writer = std::thread::Builder::new()
            .name("apiserver-store".to_owned())
            .spawn(move || write_loop(&database, &operations, &announce, relaxed))
            .map_err(|source| StoreError::Database { path: path.display().to_string(), source: Box::new(source) })?;
        let disk = Self { queue: Mutex::new(Some(queue)), writer: Mutex::new(Some(writer)), durable };
        Ok((disk, loaded))
    }

    pub(super) fn durable(&self) -> watch::Receiver<DurableState> {
        self.durable.clone()
    }

    pub(super) fn enqueue(&self, operation: Operation) -> Result<(), String> {
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let sender = queue.as_ref().ok_or("the API server is shutting down")?;
        sender.send(operation).map_err(|_closed| "the database writer has ended".to_owned())
    }

    pub(super) fn close(&self) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
        let writer = self.writer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(writer) = writer
            && writer.join().is_err()
        {
            tracing::error!("the database writer panicked");
        }
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        self.close();
    }
}

fn load(database: &Database, path: &Path) -> Result<Loaded, StoreError> {
    let begin = database.begin_write().map_err(database_error::<redb::TransactionError>(path))?;
    begin.open_table(OBJECTS).map_err(database_error::<redb::TableError>(path))?;
    let version = {
        let mut facts = begin.open_table(FACTS).map_err(database_error::<redb::TableError>(path))?;
        let last = facts.get("version").map_err(database_error::<redb::StorageError>(path))?.map_or(0, |v| v.value());
        let version = last + RESTART_GAP;
        facts.insert("version", version).map_err(database_error::<redb::StorageError>(path))?;
        version
    };
    begin.commit().map_err(database_error::<redb::CommitError>(path))?;
    let read = database.begin_read().map_err(database_error::<redb::TransactionError>(path))?;
    let table = read.open_table(OBJECTS).map_err(database_error::<redb::TableError>(path))?;
    let mut objects = Vec::new();
    for row in table.iter().map_err(database_error::<redb::StorageError>(path))? {
        let (key, json) = row.map_err(database_error::<redb::StorageError>(path))?;
        objects.extend(parse_row(key.value(), json.value())?);
    }
    Ok(Loaded { version, objects })
}

fn parse_row(key: &str, json: &[u8]) -> Result<Option<(String, Stored)>, StoreError> {
    let mut parts = key.splitn(3, '\u{0}');
    let (Some(table), Some(namespace), Some(name)) = (parts.next(), parts.next(), parts.next()) else {
        return Ok(None);
    };
    let object: Value =
        serde_json::from_slice(json).map_err(|error| StoreError::Corrupt(key.replace('\u{0}', " "), error))?;
    let version = crate::meta::version(&object).unwrap_or(0);
    let stored = Stored::new(Key::new(namespace, name), version, Bytes::copy_from_slice(json), &object);
    Ok(Some((table.to_owned(), stored)))
}

fn write_loop(
    database: &Database,
    operations: &Receiver<Operation>,
    announce: &watch::Sender<DurableState>,
    relaxed: bool,
) {
    while let Ok(first) = operations.recv() {
        if relaxed {
            std::thread::sleep(RELAXED_WINDOW);
        }
        let mut group = vec![first];
        while group.len() < GROUP
            && let Ok(next) = operations.try_recv()
        {
            group.push(next);
        }
        let version = group.last().map_or(0, |operation| operation.version);
        match write_group(database, &group) {
            Ok(()) => {
                announce.send_modify(|state| state.version = version);
                for operation in &group {
                    if let Some(notify) = &operation.notify {
                        notify.send_replace(operation.version);
                    }
                }
            }
            Err(error) => {
                tracing::error!(%error, "the object database cannot be written; the API server refuses writes from now on");
                announce.send_modify(|state| state.failed = Some(error.to_string()));
                return;
            }
        }
    }
}

fn write_group(database: &Database, group: &[Operation]) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut objects = transaction.open_table(OBJECTS)?;
        for operation in group {
            let key = format!("{}\u{0}{}\u{0}{}", operation.table, operation.key.namespace, operation.key.name);
            match &operation.json {
                Some(json) => objects.insert(key.as_str(), json.as_ref())?,
                None => objects.remove(key.as_str())?,
            };
        }
        let mut facts = transaction.open_table(FACTS)?;
        if let Some(last) = group.last() {
            facts.insert("version", last.version)?;
        }
    }
    transaction.commit()?;
    Ok(())
}
