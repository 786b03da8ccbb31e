//! Who gets which address.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{
    AddressRange, BalancedService, Family, FamilyPolicy, Labels, LoadBalancerRequest, NamespacedName, Wish, family_of,
};

use super::pools::Source;
use super::{Plan, Refusal, View, may_share};

/// What every Service's status should hold, as things are.
pub fn plan(view: &View) -> Plan {
    let own: Vec<AddressRange> =
        view.own_ranges.iter().chain(&view.node_ranges).map(|net| AddressRange::from(*net)).collect();
    let mut allocation = Allocation {
        view,
        sources: sources(view, &own),
        reserved: BTreeMap::new(),
        standing: BTreeMap::new(),
        given: BTreeMap::new(),
        plan: Plan::default(),
    };
    allocation.note_what_stands();
    let asking = allocation.asking();
    for (service, request) in &asking {
        allocation.keep(service, request);
    }
    // Who names an address comes before who takes any: else the address might be given away a moment before.
    let names_one = |request: &LoadBalancerRequest| matches!(request.wish, Wish::Addresses(_));
    for (service, request) in asking.iter().filter(|(_, request)| names_one(request)) {
        allocation.give(service, request);
    }
    for (service, request) in asking.iter().filter(|(_, request)| !names_one(request)) {
        allocation.give(service, request);
    }
    allocation.finish()
}

/// Pools that are for some Services only come first: they were made for them.
fn sources<'a>(view: &'a View, own: &[AddressRange]) -> Vec<Source<'a>> {
    let mut sources: Vec<Source<'a>> = view.pools.values().map(|pool| Source::new(pool, own)).collect();
    sources.sort_by_key(|source| !source.pool.is_selective());
    sources
}

type Asking<'a> = (&'a BalancedService, &'a LoadBalancerRequest);

struct Allocation<'a> {
    view: &'a View,
    sources: Vec<Source<'a>>,
    /// Addresses that are not given: Services' cluster addresses, their external ones where those mean anything, and those of other
    /// implementations.
    reserved: BTreeMap<IpAddr, &'a NamespacedName>,
    /// Whose status holds an address now.
    standing: BTreeMap<IpAddr, BTreeSet<&'a NamespacedName>>,
    /// Who has it by this plan.
    given: BTreeMap<IpAddr, BTreeSet<&'a NamespacedName>>,
    plan: Plan,
}

impl<'a> Allocation<'a> {
    fn note_what_stands(&mut self) {
        for (name, service) in &self.view.services {
            let allowed = |address: &&IpAddr| self.view.external_ranges.iter().any(|range| range.contains(*address));
            let external = service.external_ips.iter().filter(allowed);
            self.reserved.extend(service.cluster_ips.iter().chain(external).map(|address| (*address, name)));
            if service.request.is_none() && !service.standing_is_ours {
                self.reserved.extend(service.standing.iter().map(|address| (*address, name)));
                continue;
            }
            for address in &service.standing {
                self.standing.entry(*address).or_default().insert(name);
            }
            self.plan.addresses.insert(name.clone(), BTreeSet::new());
        }
    }

    /// Those that ask, the oldest first.
    fn asking(&self) -> Vec<Asking<'a>> {
        let mut asking: Vec<Asking<'a>> =
            self.view.services.values().filter_map(|service| Some((service, service.request.as_ref()?))).collect();
        asking.sort_by_key(|(service, _)| (service.created, &service.name));
        asking
    }

    fn request_of(&self, name: &NamespacedName) -> Option<&'a LoadBalancerRequest> {
        self.view.services.get(name)?.request.as_ref()
    }

    /// Another Service that has the address, by the plan or (`or_standing`) by its status, and may not share it.
    fn in_the_way(
        &self,
        name: &NamespacedName,
        request: &LoadBalancerRequest,
        address: IpAddr,
        or_standing: bool,
    ) -> Option<&'a NamespacedName> {
        let standing = self.standing.get(&address).filter(|_| or_standing);
        let holders = self.given.get(&address).into_iter().chain(standing).flatten().copied();
        let mut others = holders.filter(|other| *other != name).peekable();
        others.peek()?;
        let across = self.view.is_shared_across_namespaces(address);
        others.find(|other| {
            !self.request_of(other).is_some_and(|theirs| may_share((name, request), (other, theirs), across))
        })
    }

    fn namespace(&self, service: &BalancedService) -> Option<&'a Labels> {
        self.view.namespaces.get(&service.name.namespace)
    }

    /// Indexes of the pools that are for it. `by_itself`: those that give without being named.
    fn admitting(&self, service: &BalancedService, request: &LoadBalancerRequest, by_itself: bool) -> Vec<usize> {
        let Some(namespace) = self.namespace(service) else { return Vec::new() };
        let named = |name: &str| request.pool.as_deref().is_none_or(|wanted| wanted == name);
        let is_for = |source: &Source<'_>| {
            let pool = source.pool;
            let gives = pool.auto_assign || !by_itself || request.pool.is_some();
            named(&pool.name) && gives && pool.admits(&service.labels, namespace)
        };
        self.sources.iter().enumerate().filter(|(_, source)| is_for(source)).map(|(index, _)| index).collect()
    }

    /// Whether what has the address may go on with it: it is in one of these pools, and not in a range of the cluster's own. That
    /// somebody else claims it (a node in its status, another Service) takes it from nobody.
    fn held(&self, pools: &[usize], address: IpAddr) -> bool {
        let contains = |index: &usize| self.sources.get(*index).is_some_and(|source| source.pool.contains(address));
        pools.iter().any(contains) && !self.view.own_ranges.iter().any(|range| range.contains(&address))
    }

    fn offered(&self, pools: &[usize], address: IpAddr) -> bool {
        pools.iter().any(|index| self.sources.get(*index).is_some_and(|source| source.offers(address)))
    }

    fn is_own(&self, name: &NamespacedName, address: IpAddr) -> bool {
        let reserved = self.reserved.get(&address).is_some_and(|owner| *owner != name);
        reserved || self.view.node_addresses.contains(&address)
    }

    fn record(&mut self, service: &'a BalancedService, address: IpAddr) {
        self.given.entry(address).or_default().insert(&service.name);
        self.plan.addresses.entry(service.name.clone()).or_default().insert(address);
    }

    /// What of its status it may go on with: at most one address a family.
    fn keep(&mut self, service: &'a BalancedService, request: &'a LoadBalancerRequest) {
        // That something is not known says nothing against what was given before.
        let unknown = self.namespace(service).is_none() || self.view.some_pool_is_unclear;
        let pools = self.admitting(service, request, false);
        let mut families: BTreeSet<Family> = BTreeSet::new();
        for address in &service.standing {
            let wished = match &request.wish {
                Wish::Addresses(wanted) => wanted.contains(address),
                // What was given stays until it is clear what is wanted instead.
                Wish::Any | Wish::Unclear(_) => true,
            };
            let fits = wished
                && (unknown || self.held(&pools, *address))
                && request.families.contains(&family_of(*address))
                && self.in_the_way(&service.name, request, *address, false).is_none();
            if fits && families.insert(family_of(*address)) {
                self.record(service, *address);
            }
        }
    }

    /// What it lacks.
    fn give(&mut self, service: &'a BalancedService, request: &'a LoadBalancerRequest) {
        if request.leaving {
            return;
        }
        let has = self.plan.addresses.get(&service.name).cloned().unwrap_or_default();
        let lacking = |family: &Family| !has.iter().any(|address| family_of(*address) == *family);
        let outcome = match &request.wish {
            Wish::Unclear(reason) => Err(Refusal::Unclear(reason.clone())),
            Wish::Addresses(wanted) => self.requested(service, request, wanted),
            Wish::Any => {
                let families: Vec<Family> = request.families.iter().copied().filter(lacking).collect();
                self.any(service, request, &families, !has.is_empty())
            }
        };
        match outcome {
            Ok(addresses) => addresses.into_iter().for_each(|address| self.record(service, address)),
            Err(refusal) => drop(self.plan.refused.insert(service.name.clone(), refusal)),
        }
    }

    /// The pools it may be given from, or why there is none.
    fn pools_for(
        &self,
        service: &BalancedService,
        request: &LoadBalancerRequest,
        by_itself: bool,
    ) -> Result<Vec<usize>, Refusal> {
        if let Some(name) = &request.pool
            && !self.view.pools.contains_key(name)
        {
            return Err(Refusal::UnknownPool(name.clone()));
        }
        if self.view.pools.is_empty() {
            return Err(Refusal::NoPool { explicit: request.explicit });
        }
        if self.namespace(service).is_none() {
            return Err(Refusal::NoNamespace);
        }
        let pools = self.admitting(service, request, by_itself);
        if !pools.is_empty() {
            return Ok(pools);
        }
        let by_name = self.admitting(service, request, false).first().and_then(|index| self.sources.get(*index));
        let pools = match &request.pool {
            Some(named) => vec![named.clone()],
            None => self.view.pools.keys().cloned().collect(),
        };
        Err(Refusal::NotAdmitted { pools, by_name: by_name.map(|source| source.pool.name.clone()) })
    }

    /// The addresses that it names, all or none.
    fn requested(
        &self,
        service: &BalancedService,
        request: &LoadBalancerRequest,
        wanted: &BTreeSet<IpAddr>,
    ) -> Result<Vec<IpAddr>, Refusal> {
        let pools = self.pools_for(service, request, false)?;
        if let (FamilyPolicy::RequireDual, Some(only), true) = (request.policy, wanted.first(), wanted.len() < 2) {
            return Err(Refusal::NeedsBoth(*only));
        }
        let has = self.plan.addresses.get(&service.name);
        for address in wanted.iter().filter(|address| !has.is_some_and(|has| has.contains(address))) {
            if !request.families.contains(&family_of(*address)) {
                return Err(Refusal::WrongFamily(*address));
            }
            let in_pool = self.view.pools.values().find(|pool| pool.contains(*address));
            if self.is_own(&service.name, *address) {
                return Err(Refusal::ClusterOwn(*address));
            }
            if !self.offered(&pools, *address) {
                let is_for = in_pool.is_some_and(|pool| {
                    pools
                        .iter()
                        .filter_map(|index| self.sources.get(*index))
                        .any(|source| source.pool.name == pool.name)
                });
                if is_for {
                    return Err(Refusal::ClusterOwn(*address));
                }
                return Err(Refusal::NotInPool { address: *address, pool: in_pool.map(|pool| pool.name.clone()) });
            }
            if let Some(by) = self.in_the_way(&service.name, request, *address, true) {
                return Err(Refusal::Taken { address: *address, by: by.clone() });
            }
        }
        Ok(wanted.iter().copied().collect())
    }

    /// An address of each family, from any pool that gives by itself. `has_one`: it goes on with what it has if there is no other.
    fn any(
        &mut self,
        service: &BalancedService,
        request: &LoadBalancerRequest,
        families: &[Family],
        has_one: bool,
    ) -> Result<Vec<IpAddr>, Refusal> {
        if families.is_empty() {
            return Ok(Vec::new());
        }
        let pools = self.pools_for(service, request, true)?;
        let mut found: Vec<IpAddr> = Vec::new();
        let mut refusal = None;
        for family in families {
            match self.one(service, request, &pools, *family) {
                Ok(address) => found.push(address),
                Err(reason) => drop(refusal.get_or_insert(reason)),
            }
        }
        match refusal {
            None => Ok(found),
            // One of two is what PreferDualStack is content with.
            Some(_) if request.policy == FamilyPolicy::PreferDual && (has_one || !found.is_empty()) => Ok(found),
            Some(refusal) => {
                for address in found {
                    self.sources.iter_mut().for_each(|source| source.give_back(address));
                }
                Err(refusal)
            }
        }
    }

    fn one(
        &mut self,
        service: &BalancedService,
        request: &LoadBalancerRequest,
        pools: &[usize],
        family: Family,
    ) -> Result<IpAddr, Refusal> {
        if let Some(shared) = self.shared(service, request, pools, family) {
            return Ok(shared);
        }
        let names = |pools: Vec<&Source<'_>>| pools.into_iter().map(|source| source.pool.name.clone()).collect();
        let mut full = false;
        for index in pools {
            let (standing, given, reserved) = (&self.standing, &self.given, &self.reserved);
            let nodes = &self.view.node_addresses;
            let taken = |address: IpAddr| {
                standing.contains_key(&address)
                    || given.contains_key(&address)
                    || reserved.contains_key(&address)
                    || nodes.contains(&address)
            };
            let Some(source) = self.sources.get_mut(*index) else { continue };
            full |= source.has(family);
            if let Some(address) = source.take(family, taken) {
                return Ok(address);
            }
        }
        let of = pools.iter().filter_map(|index| self.sources.get(*index));
        let with_range: Vec<&Source<'_>> = of.clone().filter(|source| source.has(family)).collect();
        Err(match full {
            true => Refusal::Full { family, pools: names(with_range) },
            false => Refusal::NoRange { family, pools: names(of.collect()) },
        })
    }

    /// The address of another Service with the same key.
    fn shared(
        &self,
        service: &BalancedService,
        request: &LoadBalancerRequest,
        pools: &[usize],
        family: Family,
    ) -> Option<IpAddr> {
        request.sharing_key.as_ref()?;
        let held = self.given.keys().copied().filter(|address| family_of(*address) == family);
        held.into_iter().find(|address| {
            self.offered(pools, *address)
                && !self.is_own(&service.name, *address)
                && self.in_the_way(&service.name, request, *address, true).is_none()
        })
    }

    fn finish(mut self) -> Plan {
        let assigned: BTreeSet<IpAddr> = self.given.keys().copied().collect();
        let mut taken = assigned.clone();
        taken.extend(self.standing.keys().chain(self.reserved.keys()).chain(&self.view.node_addresses));
        let states =
            self.sources.iter().map(|source| (source.pool.name.clone(), source.state(self.view, &assigned, &taken)));
        self.plan.pools = states.collect();
        self.plan
    }
}
