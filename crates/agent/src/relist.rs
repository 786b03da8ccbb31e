//! Watches that are patient: an API server that refuses is asked again after growing, jittered delays, whatever it refuses.
//!
//! The library's own back-off starts anew whenever a list is *begun*, so that a server in trouble would be asked once a second by each
//! watch of each node, for ever. Here only what the server really answered counts as success.

use std::fmt::Debug;
use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use kube::Resource;
use kube::api::Api;
use kube::runtime::watcher::{self, Event};
use serde::de::DeserializeOwned;

use crate::backoff::Backoff;

/// The first delay, before jitter.
const FIRST: Duration = Duration::from_millis(500);
/// The longest, before jitter: a node is without news for so long at most after the API server is back.
const LONGEST: Duration = Duration::from_secs(30);

/// A watch that never ends: what it cannot have now it asks for again.
pub(crate) struct Watch<K> {
    start: Box<dyn Fn() -> BoxStream<'static, Result<Event<K>, watcher::Error>> + Send + Sync>,
    events: BoxStream<'static, Result<Event<K>, watcher::Error>>,
    delays: Backoff,
    jitter: RandomState,
    /// Before the server is asked again.
    wait: Option<Duration>,
    asked: u64,
}

impl<K: Resource + Clone + DeserializeOwned + Debug + Send + Sync + 'static> Watch<K> {
    /// Watches what `config` selects.
    pub(crate) fn new(api: Api<K>, config: watcher::Config) -> Self {
        let start = move || watcher::watcher(api.clone(), config.clone()).boxed();
        let events = start();
        let (delays, jitter) = (Backoff::between(FIRST, LONGEST), RandomState::new());
        Self { start: Box::new(start), events, delays, jitter, wait: None, asked: 0 }
    }

    /// The next event, or why there is none for a while. The delay is at the next call.
    pub(crate) async fn next(&mut self) -> Result<Event<K>, watcher::Error> {
        if let Some(wait) = self.wait.take() {
            tokio::time::sleep(wait).await;
        }
        loop {
            match self.events.next().await {
                Some(Ok(event)) => {
                    if !matches!(event, Event::Init) {
                        self.delays.worked();
                    }
                    return Ok(event);
                }
                Some(Err(error)) => {
                    if must_list_again(&error) {
                        self.events = (self.start)();
                    }
                    self.wait = Some(self.delay());
                    return Err(error);
                }
                None => self.events = (self.start)(),
            }
        }
    }

    /// Between half and all of what is due: nodes that lost the server together do not come back together.
    fn delay(&mut self) -> Duration {
        self.asked += 1;
        let share = self.jitter.hash_one(self.asked) % 1000;
        self.delays.failed().mul_f64(0.5 + share as f64 / 2000.0)
    }
}

/// A watch that is refused with 410 (Gone) would be asked for again from the same version, for ever: the library lists again only
/// when an event of a watch says so.
fn must_list_again(error: &watcher::Error) -> bool {
    use watcher::Error::{WatchFailed, WatchStartFailed};
    matches!(error, WatchStartFailed(kube::Error::Api(status)) | WatchFailed(kube::Error::Api(status)) if status.code == 410)
}
