//! What is wrong with this node's network, as Events on its Node object, where `kubectl describe node` shows them.
//!
//! A problem that `towpath status` names is written once when it has stood for a while ([`SETTLE`]); again only if it went away and
//! came back. An Event that cannot be written is no problem of its own: the log and the status say the same.

pub(crate) mod announced;
pub(crate) mod refusals;

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::watch;
use tokio::time::Instant;
use towpath_model::NodeName;
use tracing::debug;

use crate::cni_server::Readiness;
use crate::status::{self, SharedSources};

/// How often problems are looked for.
const LOOK: Duration = Duration::from_secs(10);
/// What passes by itself, as at every start, is nobody's business.
const SETTLE: Duration = Duration::from_secs(20);
/// So many Events at one look, at most: the status has them all.
const AT_ONCE: usize = 8;
/// `note` may have 1024 characters (events.k8s.io/v1).
const LONGEST: usize = 1000;

/// Writes Events on one node's object.
pub struct NodeEvents {
    client: kube::Client,
    reporter: Reporter,
    node: ObjectReference,
}

impl NodeEvents {
    /// As the agent of this node.
    pub fn new(client: kube::Client, node: &NodeName) -> Self {
        let reporter = Reporter { controller: "towpath-agent".to_owned(), instance: Some(node.to_string()) };
        let node = ObjectReference {
            api_version: Some("v1".to_owned()),
            kind: Some("Node".to_owned()),
            name: Some(node.to_string()),
            // As kubelet has it: where the uid of a node's Events is asked for, it is the name.
            uid: Some(node.to_string()),
            ..ObjectReference::default()
        };
        Self { client, reporter, node }
    }

    /// A warning.
    pub async fn warn(&self, reason: &str, note: &str) {
        let event = Event {
            type_: EventType::Warning,
            reason: reason.to_owned(),
            note: Some(note.chars().take(LONGEST).collect()),
            action: "ConfigureNetwork".to_owned(),
            secondary: None,
        };
        // A recorder counts what has the same reason as one Event, whatever the note says: each note gets its own.
        let recorder = Recorder::new(self.client.clone(), self.reporter.clone());
        if let Err(error) = recorder.publish(&event, &self.node).await {
            debug!(%error, note, "event not written");
        }
    }
}

/// Problems that were seen: since when, and whether they were written.
#[derive(Debug, Default)]
struct Seen(BTreeMap<String, (Instant, bool)>);

impl Seen {
    /// Takes the problems of now; those to write.
    fn look(&mut self, problems: &[String], now: Instant) -> Vec<String> {
        let keys: Vec<String> = problems.iter().map(|problem| shape(problem)).collect();
        self.0.retain(|key, _| keys.contains(key));
        let mut due = Vec::new();
        for (key, problem) in keys.into_iter().zip(problems) {
            let (since, written) = self.0.entry(key).or_insert((now, false));
            if !*written && now.duration_since(*since) >= SETTLE && due.len() < AT_ONCE {
                *written = true;
                due.push(problem.clone());
            }
        }
        due
    }
}

/// A problem without its numbers, which may change while it is the same.
fn shape(problem: &str) -> String {
    problem.chars().filter(|c| !c.is_ascii_digit()).collect()
}

/// Writes an Event for every problem that stays. Runs for ever.
pub async fn announce_problems(
    client: kube::Client,
    node: NodeName,
    sources: SharedSources,
    readiness: watch::Receiver<Readiness>,
) {
    let events = NodeEvents::new(client, &node);
    let mut seen = Seen::default();
    loop {
        tokio::time::sleep(LOOK).await;
        let ready = *readiness.borrow() == Readiness::Ready;
        let problems = status::collect(node.as_str(), &sources, &readiness).await.problems;
        for problem in seen.look(&problems, Instant::now()) {
            events.warn(if ready { "NetworkProblem" } else { "NetworkNotReady" }, &problem).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stays_is_written_once_and_what_passes_is_not() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        let stays = |n: u32| vec![format!("map tp_ct holds {n} of 100 entries")];
        assert!(seen.look(&stays(91), start).is_empty(), "not at once");
        assert_eq!(seen.look(&stays(95), start + SETTLE), stays(95), "another number is the same problem");
        assert!(seen.look(&stays(96), start + SETTLE * 2).is_empty(), "once");
        assert!(seen.look(&[], start + SETTLE * 3).is_empty());
        assert!(seen.look(&stays(91), start + SETTLE * 4).is_empty(), "it came back: a new one");
        assert_eq!(seen.look(&stays(91), start + SETTLE * 5), stays(91));
    }

    #[test]
    fn many_at_once_are_written_a_few_at_a_time() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        let many: Vec<String> = ('a'..='z').map(|c| format!("node {c}: refused")).collect();
        seen.look(&many, start);
        let first = seen.look(&many, start + SETTLE);
        let second = seen.look(&many, start + SETTLE);
        assert_eq!((first.len(), second.len()), (AT_ONCE, AT_ONCE));
        assert!(first.iter().all(|problem| !second.contains(problem)));
    }
}
