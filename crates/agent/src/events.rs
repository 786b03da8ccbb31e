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

/// Problems that were seen, by their words without amounts.
#[derive(Debug, Default)]
struct Seen(BTreeMap<String, Vec<Stands>>);

/// A problem that stands.
#[derive(Debug)]
struct Stands {
    /// As it was told last.
    text: String,
    since: Instant,
    written: bool,
}

impl Seen {
    /// Takes the problems of now; those to write.
    fn look(&mut self, problems: &[String], now: Instant) -> Vec<String> {
        let mut before = std::mem::take(&mut self.0);
        let mut alike: BTreeMap<String, Vec<&String>> = BTreeMap::new();
        for problem in problems {
            let texts = alike.entry(without_amounts(problem)).or_default();
            if !texts.contains(&problem) {
                texts.push(problem);
            }
        }
        for (words, texts) in alike {
            let former = before.remove(&words).unwrap_or_default();
            self.0.insert(words, same_or_new(former, &texts, now));
        }
        let settled = |known: &&mut Stands| !known.written && now.duration_since(known.since) >= SETTLE;
        let due = self.0.values_mut().flatten().filter(settled).take(AT_ONCE);
        due.map(|known| {
            known.written = true;
            known.text.clone()
        })
        .collect()
    }
}

/// Of problems that differ in amounts at most: one that was told in the same words is the same, and where one is gone and another came, its
/// amounts have changed. As many as are there now stay.
fn same_or_new(mut former: Vec<Stands>, texts: &[&String], now: Instant) -> Vec<Stands> {
    let (mut stand, mut changed) = (Vec::new(), Vec::new());
    for text in texts {
        match former.iter().position(|known| known.text == **text) {
            Some(at) => stand.push(former.remove(at)),
            None => changed.push((*text).clone()),
        }
    }
    let mut former = former.into_iter();
    stand.extend(changed.into_iter().map(|text| match former.next() {
        Some(known) => Stands { text, ..known },
        None => Stands { text, since: now, written: false },
    }));
    stand
}

/// A problem without the numbers that stand by themselves, as amounts do, which may change while it is the same. Numbers in names and
/// addresses say what it is about.
fn without_amounts(problem: &str) -> String {
    let is_amount = |word: &&str| {
        let bare = word.trim_matches(|c: char| c.is_ascii_punctuation());
        !bare.is_empty() && bare.bytes().all(|b| b.is_ascii_digit())
    };
    problem.split(' ').filter(|word| !is_amount(word)).collect::<Vec<_>>().join(" ")
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
    fn problems_of_two_objects_are_two_however_alike_their_names_and_addresses() {
        let (mut seen, start) = (Seen::default(), Instant::now());
        let of = |node: u32| format!("node n{node}: its address 10.0.0.{node} is another's");
        let port = |port: u32| format!("pod a/b: host port {port} is another's");
        let all = [of(1), of(2), port(80), port(81)];
        seen.look(&all, start);
        let told = seen.look(&all, start + SETTLE);
        assert!(all.iter().all(|problem| told.contains(problem)), "{told:?}");
        // One goes and another comes, later than the first was told.
        let next = [of(3), of(2), port(80), port(81)];
        assert!(seen.look(&next, start + SETTLE * 2).is_empty());
        assert_eq!(seen.look(&next, start + SETTLE * 3), [of(3)]);
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
