//! Which resources are served: the built-in ones and those of the custom resource definitions.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, PoisonError, RwLock};

use crate::resource::ResourceKind;

/// The served resources at one moment.
#[derive(Default)]
pub(crate) struct Served {
    /// In the order of discovery: built-in groups first, then custom ones; a group's preferred version first.
    pub(crate) kinds: Vec<Arc<ResourceKind>>,
    by_path: HashMap<(String, String, String), Arc<ResourceKind>>,
}

impl Served {
    fn new(kinds: Vec<Arc<ResourceKind>>) -> Self {
        let by_path = kinds
            .iter()
            .map(|kind| {
                let key = (kind.gvk.group.to_string(), kind.gvk.version.to_string(), kind.plural.to_string());
                (key, Arc::clone(kind))
            })
            .collect();
        Self { kinds, by_path }
    }

    /// The resource at `/apis/GROUP/VERSION/PLURAL`.
    pub(crate) fn get(&self, group: &str, version: &str, plural: &str) -> Option<Arc<ResourceKind>> {
        self.by_path.get(&(group.to_owned(), version.to_owned(), plural.to_owned())).cloned()
    }

    /// The first served version of a resource.
    pub(crate) fn any_version(&self, group: &str, plural: &str) -> Option<Arc<ResourceKind>> {
        self.kinds.iter().find(|kind| kind.gvk.group == group && kind.plural == plural).cloned()
    }

    /// Groups in order, each with its versions, the preferred one first. Core is the empty group.
    pub(crate) fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for kind in &self.kinds {
            let (group, version) = (kind.gvk.group.to_string(), kind.gvk.version.to_string());
            match groups.iter_mut().find(|(have, _)| *have == group) {
                Some((_, versions)) if versions.contains(&version) => {}
                Some((_, versions)) => versions.push(version),
                None => groups.push((group, vec![version])),
            }
        }
        groups
    }

    /// The resources of one group-version.
    pub(crate) fn of_version(&self, group: &str, version: &str) -> Vec<Arc<ResourceKind>> {
        let matches = |kind: &&Arc<ResourceKind>| kind.gvk.group == group && kind.gvk.version == version;
        self.kinds.iter().filter(matches).cloned().collect()
    }
}

/// The registry; readers take a snapshot.
pub(crate) struct Registry {
    builtin: Vec<Arc<ResourceKind>>,
    custom: RwLock<BTreeMap<String, Vec<Arc<ResourceKind>>>>,
    served: RwLock<Arc<Served>>,
}

impl Registry {
    pub(crate) fn new(builtin: Vec<ResourceKind>) -> Self {
        let builtin: Vec<Arc<ResourceKind>> = builtin.into_iter().map(Arc::new).collect();
        let served = RwLock::new(Arc::new(Served::new(builtin.clone())));
        Self { builtin, custom: RwLock::default(), served }
    }

    /// What is served now.
    pub(crate) fn served(&self) -> Arc<Served> {
        Arc::clone(&self.served.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a group has built-in resources, so that no custom one may take it over.
    pub(crate) fn is_builtin_group(&self, group: &str) -> bool {
        self.builtin.iter().any(|kind| kind.gvk.group == group)
    }

    /// Replaces the resources of one definition; none removes them.
    pub(crate) fn set_custom(&self, definition: &str, kinds: Vec<ResourceKind>) {
        let mut custom = self.custom.write().unwrap_or_else(PoisonError::into_inner);
        if kinds.is_empty() {
            custom.remove(definition);
        } else {
            custom.insert(definition.to_owned(), kinds.into_iter().map(Arc::new).collect());
        }
        let mut all = self.builtin.clone();
        let mut added: Vec<Arc<ResourceKind>> = custom.values().flatten().cloned().collect();
        added.sort_by(|a, b| {
            let order = |kind: &ResourceKind| (kind.gvk.group.to_string(), version_rank(&kind.gvk.version));
            order(a).cmp(&order(b))
        });
        all.extend(added);
        *self.served.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(Served::new(all));
    }
}

/// Kubernetes' version priority: v2 before v1 before v1beta2 before v1alpha1 before anything else.
pub(crate) fn version_rank(version: &str) -> (u8, std::cmp::Reverse<u32>, std::cmp::Reverse<u32>, String) {
    use std::cmp::Reverse;
    let parsed = version.strip_prefix('v').and_then(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
        let (major, stage) = rest.split_at_checked(digits)?;
        let major: u32 = major.parse().ok()?;
        let number = |text: &str| text.parse::<u32>().ok();
        match stage {
            "" => Some((0, Reverse(major), Reverse(0))),
            _ if stage.starts_with("beta") => Some((1, Reverse(major), Reverse(number(stage.get(4..)?)?))),
            _ if stage.starts_with("alpha") => Some((2, Reverse(major), Reverse(number(stage.get(5..)?)?))),
            _ => None,
        }
    });
    match parsed {
        Some((stage, major, minor)) => (stage, major, minor, String::new()),
        None => (3, Reverse(0), Reverse(0), version.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::version_rank;

    #[test]
    fn versions_sort_as_kubernetes_prefers_them() {
        let mut versions = ["v1alpha1", "foo", "v1", "v2beta1", "v11", "v1beta2", "v2"];
        versions.sort_by_key(|version| version_rank(version));
        assert_eq!(versions, ["v11", "v2", "v1", "v2beta1", "v1beta2", "v1alpha1", "foo"]);
    }
}
