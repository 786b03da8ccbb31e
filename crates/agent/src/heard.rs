//! Which state of the cluster the index has, in the API server's own terms: the versions of objects (`metadata.resourceVersion`).
//!
//! What the index knew when a plan began is in force when that plan stands in the kernel: so a person can ask whether the policy that they
//! have just written holds on every node (`towpath policy wait`), also one that they deleted.

use std::collections::BTreeMap;
use std::sync::Arc;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use towpath_wire::policy::KindInForce;

use crate::index::Kind;

/// Kinds whose objects are kept by name: few enough, and the ones that people ask for. Of pods only the newest version is known.
const NAMED: [Kind; 3] = [Kind::Namespace, Kind::NetworkPolicy, Kind::ClusterNetworkPolicy];

/// What the API server said last of each kind that it has listed. Copies share what did not change since.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heard {
    kinds: BTreeMap<Kind, OfKind>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct OfKind {
    newest: u64,
    objects: Arc<BTreeMap<String, u64>>,
}

/// The version of an object or of an event; none: it is no number, which no version of Kubernetes has.
pub(crate) fn version(metadata: &ObjectMeta) -> Option<u64> {
    metadata.resource_version.as_ref()?.parse().ok()
}

impl Heard {
    /// The full list of a kind: each object with its version.
    pub(crate) fn list(&mut self, kind: Kind, objects: BTreeMap<String, u64>) {
        let newest = objects.values().copied().max().unwrap_or_default();
        let objects = if NAMED.contains(&kind) { objects } else { BTreeMap::new() };
        self.kinds.insert(kind, OfKind { newest, objects: Arc::new(objects) });
    }

    /// An event of an object; `there`: it is not deleted.
    pub(crate) fn event(&mut self, kind: Kind, name: String, version: Option<u64>, there: bool) {
        let Some(of_kind) = self.kinds.get_mut(&kind) else { return };
        of_kind.newest = of_kind.newest.max(version.unwrap_or_default());
        if !NAMED.contains(&kind) {
            return;
        }
        match version.filter(|_| there) {
            Some(version) => drop(Arc::make_mut(&mut of_kind.objects).insert(name, version)),
            None => drop(Arc::make_mut(&mut of_kind.objects).remove(&name)),
        }
    }

    /// The newest version of a kind that was heard of; 0: none.
    pub(crate) fn newest(&self, kind: Kind) -> u64 {
        self.kinds.get(&kind).map_or(0, |of_kind| of_kind.newest)
    }

    /// As it is told to others, of the kinds that decide over packets.
    pub(crate) fn told(&self) -> BTreeMap<String, KindInForce> {
        let told = |kind: &Kind| [&NAMED[..], &[Kind::Pod]].concat().contains(kind);
        let kinds = self.kinds.iter().filter(|(kind, _)| told(kind));
        kinds
            .map(|(kind, of_kind)| {
                let objects = NAMED.contains(kind).then(|| of_kind.objects.as_ref().clone());
                (format!("{kind:?}"), KindInForce { newest: of_kind.newest, objects })
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(objects: &[(&str, u64)]) -> Option<BTreeMap<String, u64>> {
        Some(objects.iter().map(|(name, version)| ((*name).to_owned(), *version)).collect())
    }

    #[test]
    fn a_kind_is_told_once_it_is_listed_and_then_as_events_have_it() {
        let mut heard = Heard::default();
        heard.event(Kind::NetworkPolicy, "a/early".to_owned(), Some(3), true);
        assert!(heard.told().is_empty(), "what comes before the list says nothing of the rest");
        heard.list(Kind::NetworkPolicy, named(&[("a/old", 5), ("a/gone", 7)]).unwrap());
        heard.event(Kind::NetworkPolicy, "a/new".to_owned(), Some(9), true);
        let before = heard.clone();
        heard.event(Kind::NetworkPolicy, "a/gone".to_owned(), Some(11), false);
        let told = |heard: &Heard| heard.told().remove("NetworkPolicy").unwrap();
        assert_eq!(told(&heard), KindInForce { newest: 11, objects: named(&[("a/old", 5), ("a/new", 9)]) });
        let all = named(&[("a/old", 5), ("a/gone", 7), ("a/new", 9)]);
        assert_eq!(told(&before), KindInForce { newest: 9, objects: all }, "a copy stays as it was");
    }

    #[test]
    fn of_pods_the_newest_version_is_known_and_no_names() {
        let mut heard = Heard::default();
        heard.list(Kind::Pod, named(&[("a/web", 5)]).unwrap());
        heard.event(Kind::Pod, "a/web".to_owned(), Some(8), false);
        heard.event(Kind::Pod, "a/late".to_owned(), Some(7), true);
        assert_eq!(heard.told()["Pod"], KindInForce { newest: 8, objects: None });
    }

    #[test]
    fn a_version_that_is_no_number_is_not_guessed() {
        let of = |text: &str| version(&ObjectMeta { resource_version: Some(text.to_owned()), ..ObjectMeta::default() });
        assert_eq!((of("42"), of("0x2a"), of("")), (Some(42), None, None));
        let mut heard = Heard::default();
        heard.list(Kind::Namespace, named(&[("a", 5)]).unwrap());
        heard.event(Kind::Namespace, "a".to_owned(), None, true);
        assert_eq!(heard.told()["Namespace"].objects, named(&[]), "it is not said to be known");
    }
}
