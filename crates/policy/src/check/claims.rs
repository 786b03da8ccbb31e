//! Who says which address is his, so that a change of one pod has only its own addresses looked at: where it is, and where it was.
//!
//! Who of several holds an address is not decided here but by [`Holders`], among those who say it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{NamespacedName, Pod, PodIps, World};

use crate::compile::Touched;
use crate::pod_name::{PodName, name_of, text};
use crate::view::{Holders, View};

/// Pods of one address: mostly one.
#[derive(Clone, Debug)]
enum Claimants {
    One(PodName),
    Several(Vec<PodName>),
}

impl Claimants {
    fn list(&self) -> &[PodName] {
        match self {
            Self::One(name) => std::slice::from_ref(name),
            Self::Several(names) => names,
        }
    }
}

/// What pods' statuses say, and what the node has given.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims {
    by_pod: BTreeMap<PodName, PodIps>,
    by_address: BTreeMap<IpAddr, Claimants>,
    given: BTreeMap<NamespacedName, Vec<IpAddr>>,
    dns: Vec<IpAddr>,
}

impl Claims {
    pub(super) fn of(view: &View<'_>) -> Self {
        let pods = view.world.pods.values().filter(|pod| claims_any(pod));
        let by_pod: BTreeMap<PodName, PodIps> = pods.map(|pod| (text(&pod.name).into(), pod.ips.clone())).collect();
        // Sorted first: trees grow several times faster so.
        let mut pairs: Vec<(IpAddr, &PodName)> =
            by_pod.iter().flat_map(|(name, addresses)| addresses.iter().map(move |address| (*address, name))).collect();
        pairs.sort_by_key(|(address, _)| *address);
        let same = pairs.chunk_by(|(one, _), (other, _)| one == other).filter_map(|same| {
            let address = same.first().map(|(address, _)| *address)?;
            let claimants = match same {
                [(_, name)] => Claimants::One((*name).clone()),
                several => Claimants::Several(several.iter().map(|(_, name)| (*name).clone()).collect()),
            };
            Some((address, claimants))
        });
        let by_address = same.collect();
        Self { by_pod, by_address, given: view.pod_ips.clone(), dns: view.dns.to_vec() }
    }

    /// Takes up what changed, and says of which addresses the holder may be another: all that somebody of whom something changed says is his,
    /// or said.
    pub(super) fn follow(&mut self, view: &View<'_>, touched: &Touched) -> BTreeSet<IpAddr> {
        let mut doubtful = BTreeSet::new();
        for name in &touched.pods {
            doubtful.extend(&self.remove(name));
            if let Some(pod) = view.world.pods.get(name) {
                doubtful.extend(pod.ips.iter().copied());
                self.add(pod);
            }
            // Its labels may have changed, and it is where the node says, whatever its status does.
            doubtful.extend(self.given.get(name).into_iter().flatten().copied());
        }
        if self.given != *view.pod_ips {
            let names: BTreeSet<&NamespacedName> = self.given.keys().chain(view.pod_ips.keys()).collect();
            for name in names.into_iter().filter(|name| self.given.get(*name) != view.pod_ips.get(*name)) {
                let given = [&self.given, view.pod_ips].map(|given| given.get(name).map(Vec::as_slice));
                doubtful.extend(given.into_iter().flatten().flatten().copied());
                // What its status says counts only while nothing is given.
                doubtful.extend(view.world.pods.get(name).into_iter().flat_map(|pod| &pod.ips).copied());
            }
            self.given.clone_from(view.pod_ips);
        }
        if self.dns != view.dns {
            doubtful.extend(self.dns.iter().chain(view.dns).copied());
            self.dns = view.dns.to_vec();
        }
        doubtful
    }

    fn add(&mut self, pod: &Pod) {
        if !claims_any(pod) {
            return;
        }
        let name = PodName::from(text(&pod.name));
        for address in &pod.ips {
            match self.by_address.get_mut(address) {
                None => drop(self.by_address.insert(*address, Claimants::One(name.clone()))),
                Some(claimants) => {
                    let others = claimants.list().iter().filter(|other| **other != name);
                    *claimants = Claimants::Several(others.cloned().chain([name.clone()]).collect());
                }
            }
        }
        self.by_pod.insert(name, pod.ips.clone());
    }

    /// Forgets a pod: the addresses that it said.
    fn remove(&mut self, name: &NamespacedName) -> PodIps {
        let name = text(name);
        let addresses = self.by_pod.remove(name.as_str()).unwrap_or_default();
        for address in &addresses {
            let others = self.by_address.get(address).into_iter().flat_map(Claimants::list);
            let mut others: Vec<_> = others.filter(|other| ***other != *name).cloned().collect();
            match (others.pop(), others.is_empty()) {
                (None, _) => drop(self.by_address.remove(address)),
                (Some(one), true) => drop(self.by_address.insert(*address, Claimants::One(one))),
                (Some(last), false) => {
                    others.push(last);
                    self.by_address.insert(*address, Claimants::Several(others));
                }
            }
        }
        addresses
    }

    /// Who holds these addresses.
    pub(super) fn holders<'a>(&self, view: &View<'a>, asked: &BTreeSet<IpAddr>) -> Holders<'a> {
        let names = asked.iter().filter_map(|address| self.by_address.get(address)).flat_map(Claimants::list);
        let names: BTreeSet<&str> = names.map(|name| &**name).collect();
        let world: &'a World = view.world;
        Holders::among(
            view,
            |address| asked.contains(&address),
            names.into_iter().filter_map(|name| world.pods.get(&name_of(name))),
        )
    }
}

fn claims_any(pod: &Pod) -> bool {
    pod.on_pod_network() && !pod.ips.is_empty()
}
