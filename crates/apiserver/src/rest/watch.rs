//! `watch`: initial state where asked for, then events as they become durable, bookmarks, and an end that clients expect.
//!
//! One task-free stream a watcher: it reads the table's window when the table changes, so a slow watcher costs no
//! memory; one that falls out of the window gets an `ERROR` event with 410 and lists again.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Bytes, Frame};
use serde_json::{Value, json};
use tokio::sync::watch::Receiver;
use tokio::time::Instant;

use super::read::{Selection, collection};
use super::{Call, Reply, read, render};
use crate::meta;
use crate::request::Form;
use crate::resource::FieldError;
use crate::status::ApiError;
use crate::store::{Event, EventKind, Stored};

/// How often an idle watch that allows bookmarks gets one, as kube-apiserver has it.
const BOOKMARK_EVERY: Duration = Duration::from_secs(60);
/// How long a watch lasts when the client names no time; kube-apiserver: 30 to 60 minutes.
const DEFAULT_TIMEOUT: u64 = 2400;

struct Watcher {
    call: Arc<Call>,
    selection: Selection,
    shared: bool,
    /// Everything up to this version has been delivered or queued.
    version: u64,
    queue: VecDeque<Bytes>,
    changed: Receiver<u64>,
    bookmarks: bool,
    next_bookmark: Instant,
    deadline: Instant,
    columns_sent: bool,
    ended: bool,
}

pub(crate) fn watch(call: &Arc<Call>) -> Result<Reply, ApiError> {
    let selection = Selection::of(call)?;
    let bookmarks = call.query.flag("allowWatchBookmarks");
    let asked = call.query.number::<u64>("resourceVersion")?;
    let initial_events = initial_events(call)?;
    let store = &call.core.store;
    refuse_unmade(asked, store.version())?;
    // Subscribed before the state is read, so that no event falls between.
    let changed = store.subscribe(&call.kind.storage_key);
    let seconds = call.query.number::<u64>("timeoutSeconds")?.filter(|seconds| *seconds > 0).unwrap_or(DEFAULT_TIMEOUT);
    let now = Instant::now();
    let mut watcher = Watcher {
        call: Arc::clone(call),
        selection,
        shared: read::is_shared(call),
        version: asked.unwrap_or(0),
        queue: VecDeque::new(),
        changed,
        bookmarks,
        next_bookmark: now + BOOKMARK_EVERY,
        deadline: now + Duration::from_secs(seconds.min(86_400)),
        columns_sent: false,
        ended: false,
    };
    let from_state = initial_events.unwrap_or(asked.unwrap_or(0) == 0);
    if from_state {
        let (objects, version) = store.list(&call.kind.storage_key, collection(call));
        let selection = watcher.selection.clone();
        for stored in objects.iter().filter(|stored| selection.matches(&call.kind, stored)) {
            let line = watcher.line("ADDED", stored)?;
            watcher.queue.push_back(line);
        }
        watcher.version = version;
        if initial_events == Some(true) && bookmarks {
            let line = watcher.bookmark(true);
            watcher.queue.push_back(line);
        }
    } else if let Some(version) = asked.filter(|version| *version > 0) {
        store.events_after(&call.kind.storage_key, version).map_err(|old| ApiError::expired(version, old.oldest))?;
    } else {
        watcher.version = store.version();
    }
    let stream = futures::stream::unfold(watcher, |mut watcher| async move {
        let bytes = watcher.next().await?;
        Some((Ok::<_, std::io::Error>(Frame::data(bytes)), watcher))
    });
    let mut response = super::whole(200, "application/json", Bytes::new());
    *response.body_mut() = StreamBody::new(stream).boxed_unsync();
    Ok(Reply::Response(response))
}

fn refuse_unmade(asked: Option<u64>, current: u64) -> Result<(), ApiError> {
    read::refuse_future(asked.unwrap_or(0), current)
}

/// `sendInitialEvents` with the rules of `ListOptions` validation.
fn initial_events(call: &Call) -> Result<Option<bool>, ApiError> {
    let wanted = call.query.has("sendInitialEvents").then(|| call.query.flag("sendInitialEvents"));
    let matching = call.query.get("resourceVersionMatch");
    let refuse = |message: &str| {
        let error = FieldError {
            reason: "FieldValueForbidden",
            field: "resourceVersionMatch".to_owned(),
            message: format!("Forbidden: {message}"),
        };
        Err(ApiError::invalid("meta.k8s.io", "ListOptions", "", &[error]))
    };
    match (wanted, matching) {
        (None, "") => Ok(None),
        (None, _) => refuse("resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided"),
        (Some(wanted), "NotOlderThan") => Ok(Some(wanted)),
        (Some(_), _) => refuse("sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"),
    }
}

impl Watcher {
    /// The next bytes to send; none ends the stream.
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(bytes) = self.take_queued() {
                return Some(bytes);
            }
            if self.ended {
                return None;
            }
            self.changed.mark_unchanged();
            self.read_events();
            if !self.queue.is_empty() {
                continue;
            }
            let closing = self.call.core.closing.clone();
            let wake = if self.bookmarks { self.next_bookmark.min(self.deadline) } else { self.deadline };
            tokio::select! {
                changed = self.changed.changed() => self.ended = changed.is_err(),
                () = closing.cancelled() => self.ended = true,
                () = tokio::time::sleep_until(wake) => self.timer(),
            }
        }
    }

    /// What is queued, joined into pieces of some 64 KiB.
    fn take_queued(&mut self) -> Option<Bytes> {
        let first = self.queue.pop_front()?;
        if self.queue.is_empty() {
            return Some(first);
        }
        let mut joined = first.to_vec();
        while joined.len() < 65_536
            && let Some(next) = self.queue.pop_front()
        {
            joined.extend_from_slice(&next);
        }
        Some(Bytes::from(joined))
    }

    fn timer(&mut self) {
        if Instant::now() >= self.deadline {
            self.ended = true;
            if self.bookmarks {
                let line = self.bookmark(false);
                self.queue.push_back(line);
            }
            return;
        }
        let line = self.bookmark(false);
        self.queue.push_back(line);
    }

    fn read_events(&mut self) {
        let result = self.call.core.store.events_after(&self.call.kind.storage_key, self.version);
        let (events, upto) = match result {
            Ok(found) => found,
            Err(old) => {
                let status = ApiError::expired(self.version, old.oldest).status();
                self.queue.push_back(Bytes::from(format!("{}\n", json!({"type": "ERROR", "object": status}))));
                self.ended = true;
                return;
            }
        };
        for event in events {
            match self.event_line(&event) {
                Ok(line) => self.queue.extend(line),
                Err(error) => tracing::warn!(%error, "an event could not be sent to a watcher"),
            }
        }
        self.version = upto;
    }

    /// The event as this watcher's selectors see it: an object that stops matching is deleted for it.
    fn event_line(&mut self, event: &Event) -> Result<Option<Bytes>, ApiError> {
        if let Some(namespace) = collection(&self.call)
            && *event.object.key.namespace != *namespace
        {
            return Ok(None);
        }
        let all = self.selection.is_all();
        let matches = |stored: &Stored| all || self.selection.matches(&self.call.kind, stored);
        let now = event.kind != EventKind::Deleted && matches(&event.object);
        let before = event.previous.as_deref().is_some_and(matches);
        let kind = match (before, now) {
            (false, false) => return Ok(None),
            (false, true) => "ADDED",
            (true, true) => "MODIFIED",
            (true, false) => "DELETED",
        };
        // An object that left the selection is shown as it was, at the version of the change.
        if kind == "DELETED"
            && event.kind != EventKind::Deleted
            && let Some(previous) = &event.previous
        {
            let mut object = read::parsed(&self.call.kind, previous)?;
            meta::set_meta(&mut object, "resourceVersion", event.version.to_string().into());
            return Ok(Some(self.value_line(kind, &object)?));
        }
        Ok(Some(self.line(kind, &event.object)?))
    }

    fn line(&mut self, kind: &str, stored: &Stored) -> Result<Bytes, ApiError> {
        if self.call.accept.form != Form::Object {
            let object = read::parsed(&self.call.kind, stored)?;
            return self.value_line(kind, &object);
        }
        let text = read::text(&self.call.kind, self.shared, stored)?;
        let mut line = Vec::with_capacity(text.len() + 40);
        line.extend_from_slice(format!("{{\"type\":\"{kind}\",\"object\":").as_bytes());
        line.extend_from_slice(&text);
        line.extend_from_slice(b"}\n");
        Ok(Bytes::from(line))
    }

    fn value_line(&mut self, kind: &str, object: &Value) -> Result<Bytes, ApiError> {
        let shown = match self.call.accept.form {
            Form::Object => object.clone(),
            Form::Metadata => render::partial(object),
            Form::Table => {
                let row = render::row(&self.call, object, &meta::now())?;
                let head = json!({"resourceVersion": meta::meta(object, "resourceVersion")});
                let columns = !std::mem::replace(&mut self.columns_sent, true);
                render::table(&self.call.kind, vec![row], head, columns)
            }
        };
        Ok(Bytes::from(format!("{}\n", json!({"type": kind, "object": shown}))))
    }

    fn bookmark(&mut self, initial_end: bool) -> Bytes {
        self.next_bookmark = Instant::now() + BOOKMARK_EVERY;
        let mut metadata = json!({"resourceVersion": self.version.to_string()});
        if initial_end {
            meta::as_map(&mut metadata).insert("annotations".to_owned(), json!({"k8s.io/initial-events-end": "true"}));
        } else {
            // As kube-apiserver's encoding of an object without a creation time.
            meta::as_map(&mut metadata).insert("creationTimestamp".to_owned(), Value::Null);
        }
        let (kind, version) = (self.call.kind.gvk.kind.to_string(), self.call.api_version());
        let object = match self.call.accept.form {
            Form::Object => json!({"kind": kind, "apiVersion": version, "metadata": metadata}),
            Form::Metadata => render::partial(&json!({"metadata": metadata})),
            Form::Table => {
                let columns = !std::mem::replace(&mut self.columns_sent, true);
                render::table(&self.call.kind, Vec::new(), metadata, columns)
            }
        };
        Bytes::from(format!("{}\n", json!({"type": "BOOKMARK", "object": object})))
    }
}
