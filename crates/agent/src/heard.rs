//! Which state of the cluster the index has, in the API server's own terms: the versions of objects (`metadata.resourceVersion`).
//!
//! What the index knew when a plan began is in force when that plan stands in the kernel: so a person can ask whether the policy that they
//! have just written holds on every node (`towpath policy wait`), also one that they deleted.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
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
    objects: Arc<Objects>,
}

/// Objects are kept in so many parts.
const PARTS: usize = 256;

/// Versions by name, in parts by the name's hash. The loop keeps a copy of what it planned with, so a change finds what it changes shared: it
/// copies one part, not the thousands of names that a cluster has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Objects(Vec<Arc<BTreeMap<String, u64>>>);

impl Default for Objects {
    fn default() -> Self {
        Self(vec![Arc::default(); PARTS])
    }
}

impl FromIterator<(String, u64)> for Objects {
    fn from_iter<I: IntoIterator<Item = (String, u64)>>(objects: I) -> Self {
        let mut all = Self::default();
        objects.into_iter().for_each(|(name, version)| all.set(name, Some(version)));
        all
    }
}

impl Objects {
    /// None: there is none of this name.
    fn set(&mut self, name: String, version: Option<u64>) {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let part = usize::try_from(hasher.finish() % PARTS as u64).unwrap_or_default();
        let Some(part) = self.0.get_mut(part).map(Arc::make_mut) else { return };
        match version {
            Some(version) => drop(part.insert(name, version)),
            None => drop(part.remove(&name)),
        }
    }

    fn all(&self) -> BTreeMap<String, u64> {
        self.0.iter().flat_map(|part| part.iter()).map(|(name, version)| (name.clone(), *version)).collect()
    }
}

/// Versions of a full list, as it comes in.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    newest: u64,
    objects: Vec<(String, u64)>,
}

impl Listed {
    /// Of these objects.
    #[cfg(test)]
    pub(crate) fn of(kind: Kind, objects: &[(&str, u64)]) -> Self {
        let mut listed = Self::default();
        objects.iter().for_each(|(name, version)| listed.add(kind, name, *version));
        listed
    }

    /// One more object of a kind. Its name is kept if it is asked for: of the tens of thousands of pods it is not.
    pub(crate) fn add(&mut self, kind: Kind, name: impl ToString, version: u64) {
        self.newest = self.newest.max(version);
        if NAMED.contains(&kind) {
            self.objects.push((name.to_string(), version));
        }
    }
}

/// The version of an object or of an event; none: it is no number, which no version of Kubernetes has.
pub(crate) fn version(metadata: &ObjectMeta) -> Option<u64> {
    metadata.resource_version.as_ref()?.parse().ok()
}

impl Heard {
    /// The full list of a kind: each object with its version.
    pub(crate) fn list(&mut self, kind: Kind, Listed { newest, objects }: Listed) {
        self.kinds.insert(kind, OfKind { newest, objects: Arc::new(objects.into_iter().collect()) });
    }

    /// An event of an object; `there`: it is not deleted.
    pub(crate) fn event(&mut self, kind: Kind, name: String, version: Option<u64>, there: bool) {
        let Some(of_kind) = self.kinds.get_mut(&kind) else { return };
        of_kind.newest = of_kind.newest.max(version.unwrap_or_default());
        if !NAMED.contains(&kind) {
            return;
        }
        Arc::make_mut(&mut of_kind.objects).set(name, version.filter(|_| there));
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
                let objects = NAMED.contains(kind).then(|| of_kind.objects.all());
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
        heard.list(Kind::NetworkPolicy, Listed::of(Kind::NetworkPolicy, &[("a/old", 5), ("a/gone", 7)]));
        heard.event(Kind::NetworkPolicy, "a/new".to_owned(), Some(9), true);
        let before = heard.clone();
        heard.event(Kind::NetworkPolicy, "a/gone".to_owned(), Some(11), false);
        let told = |heard: &Heard| heard.told().remove("NetworkPolicy").unwrap();
        assert_eq!(told(&heard), KindInForce { newest: 11, objects: named(&[("a/old", 5), ("a/new", 9)]) });
        let all = named(&[("a/old", 5), ("a/gone", 7), ("a/new", 9)]);
        assert_eq!(told(&before), KindInForce { newest: 9, objects: all }, "a copy stays as it was");
    }

    #[test]
    fn a_change_copies_a_small_part_of_what_a_copy_shares() {
        let names: Vec<String> = (0..10_000).map(|n| format!("a/p{n}")).collect();
        let mut all = Listed::default();
        names.iter().for_each(|name| all.add(Kind::NetworkPolicy, name, 1));
        let mut heard = Heard::default();
        heard.list(Kind::NetworkPolicy, all);
        let before = heard.clone();
        heard.event(Kind::NetworkPolicy, "a/p7".to_owned(), Some(2), true);
        let parts = |heard: &Heard| heard.kinds[&Kind::NetworkPolicy].objects.0.clone();
        let (now, then) = (parts(&heard), parts(&before));
        let copied: Vec<usize> =
            now.iter().zip(&then).filter(|(one, other)| !Arc::ptr_eq(one, other)).map(|(part, _)| part.len()).collect();
        assert!(copied.len() == 1 && copied[0] < 200, "{copied:?}");
        assert_eq!(heard.told()["NetworkPolicy"].objects.as_ref().unwrap().len(), names.len());
    }

    #[test]
    fn of_pods_the_newest_version_is_known_and_no_names() {
        let mut heard = Heard::default();
        heard.list(Kind::Pod, Listed::of(Kind::Pod, &[("a/web", 5)]));
        heard.event(Kind::Pod, "a/web".to_owned(), Some(8), false);
        heard.event(Kind::Pod, "a/late".to_owned(), Some(7), true);
        assert_eq!(heard.told()["Pod"], KindInForce { newest: 8, objects: None });
    }

    #[test]
    fn a_version_that_is_no_number_is_not_guessed() {
        let of = |text: &str| version(&ObjectMeta { resource_version: Some(text.to_owned()), ..ObjectMeta::default() });
        assert_eq!((of("42"), of("0x2a"), of("")), (Some(42), None, None));
        let mut heard = Heard::default();
        heard.list(Kind::Namespace, Listed::of(Kind::Namespace, &[("a", 5)]));
        heard.event(Kind::Namespace, "a".to_owned(), None, true);
        assert_eq!(heard.told()["Namespace"].objects, named(&[]), "it is not said to be known");
    }
}
