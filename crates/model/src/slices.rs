//! EndpointSlices by their own name, and by the Service that they are of: with tens of thousands of them, a change of one Service looks
//! at no other's.

use std::collections::BTreeMap;
use std::ops::Deref;

use crate::{EndpointSlice, NamespacedName};

/// All slices. Read as the map that it is; written by [`Slices::insert`] and [`Slices::remove`], which keep the index.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Slices {
    by_name: BTreeMap<NamespacedName, EndpointSlice>,
    /// Sorted lists: most have one name, and the least tree has room for eleven.
    by_service: BTreeMap<NamespacedName, Vec<NamespacedName>>,
}

impl Slices {
    /// Puts one in; the one that had the name.
    pub fn insert(&mut self, name: NamespacedName, slice: EndpointSlice) -> Option<EndpointSlice> {
        let former = self.remove(&name);
        list(&mut self.by_service, &slice.service, &name);
        self.by_name.insert(name, slice);
        former
    }

    /// Takes one out.
    pub fn remove(&mut self, name: &NamespacedName) -> Option<EndpointSlice> {
        let former = self.by_name.remove(name)?;
        if let Some(names) = self.by_service.get_mut(&former.service) {
            names.retain(|other| other != name);
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

fn list(
    by_service: &mut BTreeMap<NamespacedName, Vec<NamespacedName>>,
    service: &NamespacedName,
    name: &NamespacedName,
) {
    match by_service.get_mut(service) {
        Some(names) => {
            if let Err(at) = names.binary_search(name) {
                names.insert(at, name.clone());
            }
        }
        None => drop(by_service.insert(service.clone(), vec![name.clone()])),
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
        slices.into_iter().collect::<BTreeMap<_, _>>().into()
    }
}

impl<const N: usize> From<[(NamespacedName, EndpointSlice); N]> for Slices {
    fn from(slices: [(NamespacedName, EndpointSlice); N]) -> Self {
        slices.into_iter().collect()
    }
}

impl From<BTreeMap<NamespacedName, EndpointSlice>> for Slices {
    fn from(by_name: BTreeMap<NamespacedName, EndpointSlice>) -> Self {
        let mut by_service = BTreeMap::new();
        for (name, slice) in &by_name {
            list(&mut by_service, &slice.service, name);
        }
        Self { by_name, by_service }
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
