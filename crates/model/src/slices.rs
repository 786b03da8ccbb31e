//! EndpointSlices by their own name, and by the Service that they are of: with tens of thousands of them, a change of one Service looks
//! at no other's.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Deref;

use crate::{EndpointSlice, NamespacedName};

/// All slices. Read as the map that it is; written by [`Slices::insert`] and [`Slices::remove`], which keep the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slices {
    by_name: BTreeMap<NamespacedName, EndpointSlice>,
    by_service: BTreeMap<NamespacedName, BTreeSet<NamespacedName>>,
}

impl Slices {
    /// Puts one in; the one that had the name.
    pub fn insert(&mut self, name: NamespacedName, slice: EndpointSlice) -> Option<EndpointSlice> {
        let former = self.remove(&name);
        self.by_service.entry(slice.service.clone()).or_default().insert(name.clone());
        self.by_name.insert(name, slice);
        former
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &NamespacedName) -> Option<EndpointSlice> {
        let former = self.by_name.remove(name)?;
        if let Some(names) = self.by_service.get_mut(&former.service) {
            names.remove(name);
            if names.is_empty() {
                self.by_service.remove(&former.service);
            }
        }
        Some(former)
    }

    /// Those of a Service, by name.
    pub fn of<'a>(&'a self, service: &NamespacedName) -> impl Iterator<Item = &'a EndpointSlice> {
        self.by_service.get(service).into_iter().flatten().filter_map(|name| self.by_name.get(name))
    }
}

impl Deref for Slices {
    type Target = BTreeMap<NamespacedName, EndpointSlice>;

    fn deref(&self) -> &Self::Target {
        &self.by_name
    }
}

impl FromIterator<(NamespacedName, EndpointSlice)> for Slices {
    fn from_iter<I: IntoIterator<Item = (NamespacedName, EndpointSlice)>>(slices: I) -> Self {
        let mut all = Self::default();
        for (name, slice) in slices {
            all.insert(name, slice);
        }
        all
    }
}

impl<const N: usize> From<[(NamespacedName, EndpointSlice); N]> for Slices {
    fn from(slices: [(NamespacedName, EndpointSlice); N]) -> Self {
        slices.into_iter().collect()
    }
}

impl From<BTreeMap<NamespacedName, EndpointSlice>> for Slices {
    fn from(slices: BTreeMap<NamespacedName, EndpointSlice>) -> Self {
        slices.into_iter().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(name: &str) -> NamespacedName {
        NamespacedName::new("a", name)
    }

    fn slice(of: &str) -> EndpointSlice {
        EndpointSlice { name: name("x"), service: name(of), endpoints: Vec::new(), ports: Vec::new(), headless: false }
    }

    #[test]
    fn slices_are_found_by_their_service_as_they_come_move_and_go() {
        let mut slices = Slices::from([(name("1"), slice("web")), (name("2"), slice("web")), (name("3"), slice("db"))]);
        let of = |slices: &Slices, service: &str| slices.of(&name(service)).count();
        assert_eq!((of(&slices, "web"), of(&slices, "db"), slices.len()), (2, 1, 3));
        assert_eq!(slices.insert(name("2"), slice("db")).unwrap().service, name("web"));
        assert_eq!((of(&slices, "web"), of(&slices, "db"), slices.len()), (1, 2, 3));
        slices.remove(&name("1"));
        assert_eq!((of(&slices, "web"), slices.remove(&name("1"))), (0, None));
        assert_eq!(
            slices,
            Slices::from([(name("3"), slice("db")), (name("2"), slice("db"))]),
            "nothing is left of what went"
        );
    }
}
