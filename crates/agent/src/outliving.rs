//! NetworkPolicies that outlive their objects: a namespace that is being deleted keeps its policies until its pods are gone.
//!
//! Kubernetes deletes what is in a namespace in no order that holds everywhere (before its `OrderedNamespaceDeletion`: CVE-2024-7598), and a pod
//! may go on for its whole grace period after the policies that isolated it are gone. So an agent goes on enforcing the policy that
//! the API server no longer has while the policy's namespace ends and has pods left.
//!
//! The end of a namespace is another watch's news and may come later than the deletion of its policies. So a policy that is deleted while its
//! namespace is not known to end stays until the API server was asked once for that namespace ([`answer`]): this is asked for namespaces with pods
//! of this node only, once for all policies that went together. What it enforced before an agent's restart, that agent's successor reads from disk.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound::{Included, Unbounded};
use std::time::Duration;

use k8s_openapi::api::core::v1 as core;
use kube::api::{Api, ListParams};
use tokio::sync::mpsc;
use towpath_model::{NamespacedName, NetworkPolicy, NodeName, Pod, World};
use tracing::{debug, info, warn};

use crate::index::Kind;
use crate::watch::Update;

/// How long the API server may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// After a failure it is asked again so soon.
const AGAIN: Duration = Duration::from_millis(500);

/// A question: does this namespace end? An answer says to which of them it belongs: what was deleted since may belong to a later one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The namespace.
    pub namespace: String,
    /// Counts the questions about all namespaces.
    pub number: u64,
}

/// Whom to ask, and about whose pods.
#[derive(Clone, Debug)]
struct Asker {
    node: NodeName,
    questions: mpsc::UnboundedSender<Question>,
}

/// What is known of a policy that the API server no longer has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Known {
    /// That it was deleted.
    Deleted,
    /// The API server is asked, by this question or a later one.
    Asked(u64),
    /// Its namespace did not end when it was deleted.
    ByItself,
}

/// Which policies stay though the API server no longer has them, and why.
#[derive(Debug, Default)]
pub(crate) struct Outliving {
    kept: BTreeMap<NamespacedName, Known>,
    questions: u64,
    asker: Option<Asker>,
    /// What an earlier run enforced, until the first list.
    former: BTreeMap<NamespacedName, NetworkPolicy>,
    /// What became of those is not decided yet.
    starting: bool,
}

impl Outliving {
    /// From now on the API server is asked about namespaces with pods of `node`.
    pub(crate) fn ask(&mut self, node: NodeName, questions: mpsc::UnboundedSender<Question>) {
        self.asker = Some(Asker { node, questions });
    }

    /// What an earlier run enforced, perhaps some seconds before it ended.
    pub(crate) fn remember(&mut self, former: BTreeMap<NamespacedName, NetworkPolicy>) {
        self.starting = !former.is_empty();
        self.former = former;
    }

    /// Whether an answer must be waited for before anything is planned: what an earlier run remembered last may have been deleted, by itself,
    /// before that run ended, and must not come into force again.
    pub(crate) fn holds_up(&self) -> bool {
        self.starting && self.kept.values().any(|known| matches!(known, Known::Asked(_)))
    }

    /// The policies that stay.
    pub(crate) fn kept(&self) -> impl Iterator<Item = &NamespacedName> {
        self.kept.keys()
    }

    /// Those of them that hold because their namespaces end; of the others it is not known yet.
    pub(crate) fn of_ending(&self) -> BTreeSet<NamespacedName> {
        self.kept.iter().filter(|(_, known)| **known == Known::Deleted).map(|(policy, _)| policy.clone()).collect()
    }

    /// The API server has this one.
    pub(crate) fn is_there(&mut self, policy: &NamespacedName) {
        self.kept.remove(policy);
    }

    /// The API server no longer has it. Whether it stays.
    pub(crate) fn is_deleted(&mut self, world: &World, listed: &BTreeSet<Kind>, policy: &NamespacedName) -> bool {
        self.kept.insert(policy.clone(), Known::Deleted);
        let stays = self.stays(world, listed, policy);
        if stays {
            info!(%policy, "deleted with pods of its namespace left: it holds until the namespace is known not to end, or they are gone");
        } else {
            self.kept.remove(policy);
        }
        stays
    }

    /// What stays of those that a full list no longer has.
    pub(crate) fn missing_from(
        &mut self,
        all: &BTreeMap<NamespacedName, NetworkPolicy>,
        world: &World,
        listed: &BTreeSet<Kind>,
    ) -> Vec<(NamespacedName, NetworkPolicy)> {
        self.kept.retain(|policy, _| !all.contains_key(policy));
        let mut missing = std::mem::take(&mut self.former);
        missing.extend(world.policies.iter().map(|(name, policy)| (name.clone(), policy.clone())));
        let gone = missing.into_iter().filter(|(name, _)| !all.contains_key(name));
        gone.filter(|(name, _)| self.kept.contains_key(name) || self.is_deleted(world, listed, name)).collect()
    }

    /// Those that have nothing to stay for any more, after news of pods or namespaces.
    pub(crate) fn over(&mut self, world: &World, listed: &BTreeSet<Kind>) -> Vec<NamespacedName> {
        let mut over: Vec<NamespacedName> = self.kept.keys().cloned().collect();
        over.retain(|policy| !self.stays(world, listed, policy));
        for policy in &over {
            info!(%policy, "was deleted, and does not hold any more");
            self.kept.remove(policy);
        }
        self.starting &= !(listed.contains(&Kind::NetworkPolicy) && decidable(listed)) || self.holds_up();
        over
    }

    /// The API server answered the question: these policies were deleted before it was asked.
    pub(crate) fn answered(&mut self, question: &Question) {
        for (policy, known) in &mut self.kept {
            if policy.namespace == question.namespace
                && matches!(known, Known::Asked(number) if *number <= question.number)
            {
                *known = Known::ByItself;
            }
        }
    }

    /// Whether it stays, as far as is known; asks if that cannot be said.
    fn stays(&mut self, world: &World, listed: &BTreeSet<Kind>, policy: &NamespacedName) -> bool {
        // Before pods and namespaces are listed nothing is known, and nothing goes.
        if !decidable(listed) {
            return true;
        }
        let namespace = &policy.namespace;
        if !has_pods(world, namespace, |_| true) {
            return false;
        }
        // Its object goes when everything in it is gone: news of its pods are late.
        if world.namespaces.get(namespace).is_none_or(|namespace| namespace.terminating) {
            self.kept.insert(policy.clone(), Known::Deleted);
            return true;
        }
        match self.kept.get(policy) {
            Some(Known::Asked(_)) => true,
            Some(Known::ByItself) | None => false,
            Some(Known::Deleted) => match self.question(world, namespace) {
                Some(number) => self.kept.insert(policy.clone(), Known::Asked(number)).is_some(),
                None => false,
            },
        }
    }

    /// Asks, if there is anybody to ask and pods here, or on no node yet, that it would matter to.
    fn question(&mut self, world: &World, namespace: &str) -> Option<u64> {
        let asker = self.asker.as_ref()?;
        let matters = |pod: &Pod| pod.node.as_ref().is_none_or(|node| *node == asker.node);
        if !has_pods(world, namespace, matters) {
            return None;
        }
        self.questions += 1;
        let question = Question { namespace: namespace.to_owned(), number: self.questions };
        asker.questions.send(question).is_ok().then_some(self.questions)
    }
}

/// Whether pods and namespaces are known.
fn decidable(listed: &BTreeSet<Kind>) -> bool {
    listed.contains(&Kind::Namespace) && listed.contains(&Kind::Pod)
}

/// Whether a namespace has such a pod on the pod network.
fn has_pods(world: &World, namespace: &str, such: impl Fn(&Pod) -> bool) -> bool {
    let first = NamespacedName::new(namespace, "");
    let pods = world.pods.range((Included(first), Unbounded)).take_while(|(name, _)| name.namespace == namespace);
    pods.map(|(_, pod)| pod).any(|pod| pod.on_pod_network() && such(pod))
}

/// Asks the API server what is asked, until it is dropped. It is asked by a list held to one name, which needs no right that the watch does
/// not need.
pub(crate) async fn answer(
    client: kube::Client,
    mut questions: mpsc::UnboundedReceiver<Question>,
    updates: mpsc::Sender<Update>,
) {
    while let Some(first) = questions.recv().await {
        // The last one of each namespace: it was asked after all that was deleted before.
        let mut open = BTreeMap::from([(first.namespace, first.number)]);
        while let Ok(next) = questions.try_recv() {
            open.insert(next.namespace, next.number);
        }
        for (namespace, number) in open {
            let ends = ends_for_sure(&client, &namespace).await;
            let question = Question { namespace, number };
            if updates.send(Box::new(move |index| index.namespace_ends(&question, ends))).await.is_err() {
                return;
            }
        }
    }
}

/// What the API server says, however often it must be asked.
async fn ends_for_sure(client: &kube::Client, namespace: &str) -> bool {
    let api: Api<core::Namespace> = Api::all(client.clone());
    let only = ListParams::default().fields(&format!("metadata.name={namespace}"));
    let mut complained = false;
    loop {
        let asked = tokio::time::timeout(PATIENCE, api.list_metadata(&only)).await;
        let error = match asked {
            Ok(Ok(list)) => {
                return list.items.first().is_none_or(|namespace| namespace.metadata.deletion_timestamp.is_some());
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", PATIENCE.as_secs()),
        };
        debug!(namespace, error, "whether the namespace ends is not known");
        if !std::mem::replace(&mut complained, true) {
            warn!(
                namespace,
                error,
                "a NetworkPolicy was deleted, and whether its namespace ends is not known: it holds until the API server says"
            );
        }
        tokio::time::sleep(AGAIN).await;
    }
}

#[cfg(test)]
mod tests;
