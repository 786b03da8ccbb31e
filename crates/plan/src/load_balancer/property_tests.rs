//! Any history of Services, pools and half-done writes: never two owners, nothing lost, and it settles.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use towpath_model::{Family, FamilyPolicy, Protocol, TrafficPolicy, Wish};

use super::tests::{ip, named, pool, request, service, write};
use super::{Plan, Refusal, View, may_share, plan};
use towpath_model::NamespacedName;

/// Something that happens to the cluster.
#[derive(Clone, Debug)]
enum Event {
    /// A Service is made or changed: number, key, port, Local, selector, families, wish.
    Service { number: u8, key: u8, port: u16, local: bool, selector: u8, families: u8, wish: Option<u8> },
    /// It becomes one without a load balancer.
    Plain(u8),
    /// It is deleted.
    Delete(u8),
    /// A pool is made or changed to hold so many addresses from there on.
    Pool { number: u8, first: u8, length: u8 },
    /// A pool is deleted.
    DeletePool(u8),
    /// A plan is made, and of its writes those of which the bit is set are done.
    Write(u16),
}

fn event() -> impl Strategy<Value = Event> {
    let made = (0..8_u8, 0..3_u8, 1..4_u16, any::<bool>(), 0..2_u8, 0..5_u8, proptest::option::weighted(0.3, 0..12_u8));
    prop_oneof![
        4 => made.prop_map(|(number, key, port, local, selector, families, wish)| Event::Service {
            number, key, port, local, selector, families, wish
        }),
        1 => (0..8_u8).prop_map(Event::Plain),
        2 => (0..8_u8).prop_map(Event::Delete),
        2 => (0..2_u8, 0..8_u8, 1..5_u8).prop_map(|(number, first, length)| Event::Pool { number, first, length }),
        1 => (0..2_u8).prop_map(Event::DeletePool),
        4 => any::<u16>().prop_map(Event::Write),
    ]
}

fn happen(view: &mut View, clock: i64, event: &Event) {
    match event {
        Event::Service { number, key, port, local, selector, families, wish } => {
            let name = format!("s{number}");
            let (of, policy) = match families {
                0 | 1 => (vec![Family::V4], FamilyPolicy::Single),
                2 => (vec![Family::V6], FamilyPolicy::Single),
                3 => (vec![Family::V4, Family::V6], FamilyPolicy::PreferDual),
                _ => (vec![Family::V6, Family::V4], FamilyPolicy::RequireDual),
            };
            let mut asked = request(&of);
            asked.policy = policy;
            asked.sharing_key = (*key > 0).then(|| format!("key{key}"));
            asked.ports = [(Protocol::Tcp, *port)].into();
            asked.external_policy = if *local { TrafficPolicy::Local } else { TrafficPolicy::Cluster };
            asked.selector = BTreeMap::from([("app".to_owned(), selector.to_string())]);
            asked.wish = wish.map_or(Wish::Any, |last| Wish::Addresses([ip(&format!("192.0.2.{last}"))].into()));
            let fresh = service(&name, clock, None);
            view.services.entry(named(&name)).or_insert(fresh).request = Some(asked);
        }
        Event::Plain(number) => {
            if let Some(service) = view.services.get_mut(&named(&format!("s{number}"))) {
                service.request = None;
            }
        }
        Event::Delete(number) => drop(view.services.remove(&named(&format!("s{number}")))),
        Event::Pool { number, first, length } => {
            let name = format!("p{number}");
            let four = format!("192.0.2.{first}-192.0.2.{}", first + length);
            let six = format!("2001:db8::{first:x}-2001:db8::{:x}", first + length / 2);
            view.pools.insert(name.clone(), pool(&name, &[&four, &six]));
        }
        Event::DeletePool(number) => drop(view.pools.remove(&format!("p{number}"))),
        Event::Write(done) => {
            let planned = plan(view);
            let some: BTreeMap<_, _> = planned
                .changes(view)
                .into_iter()
                .enumerate()
                .filter(|(index, _)| done & (1 << (index % 16)) != 0)
                .map(|(_, (name, addresses))| (name.clone(), addresses.clone()))
                .collect();
            grants_are_safe(view, &planned);
            write(view, &Plan { addresses: some, ..Plan::default() });
        }
    }
}

/// Whichever of the plan's writes are done, in whatever order: nobody is given what another has, by the plan or still by its status,
/// unless both may share it.
fn grants_are_safe(view: &View, plan: &Plan) {
    let share = |a: &NamespacedName, b: &NamespacedName, address| {
        let of = |name| view.services[name].request.as_ref();
        let across = view.is_shared_across_namespaces(address);
        of(a).zip(of(b)).is_some_and(|(of_a, of_b)| may_share((a, of_a), (b, of_b), across))
    };
    for (name, addresses) in &plan.addresses {
        for address in addresses {
            for (other, theirs) in plan.addresses.iter().filter(|(other, _)| *other != name) {
                assert!(
                    !theirs.contains(address) || share(name, other, *address),
                    "{name} and {other} both have {address}"
                );
                let stands = view.services[other].standing.contains(address);
                let new = !view.services[name].standing.contains(address);
                assert!(
                    !(stands && new) || share(name, other, *address),
                    "{name} is given {address}, which {other} still has"
                );
            }
        }
    }
}

/// A full pool has no free address, and what everybody has is of a pool, of a family of theirs, one a family.
fn nothing_is_lost(view: &View, plan: &Plan) {
    let used: BTreeSet<_> = plan.addresses.values().flatten().copied().collect();
    for refusal in plan.refused.values() {
        if let Refusal::Full { family, pools } = refusal {
            for range in
                pools.iter().flat_map(|name| &view.pools[name].ranges).filter(|range| range.family() == *family)
            {
                let mut next = Some(range.first());
                while let Some(address) = next {
                    assert!(used.contains(&address), "{address} is free, and {refusal}");
                    next = range.after(address);
                }
            }
        }
    }
    for (name, addresses) in &plan.addresses {
        let Some(request) = &view.services[name].request else {
            assert!(addresses.is_empty(), "{name} asks for nothing");
            continue;
        };
        assert!(addresses.iter().all(|address| view.pools.values().any(|pool| pool.contains(*address))));
        let families: Vec<Family> = addresses.iter().map(|a| towpath_model::family_of(*a)).collect();
        assert!(families.iter().all(|family| request.families.contains(family)) && families.len() <= 2);
        assert_eq!(families.iter().map(|f| format!("{f:?}")).collect::<BTreeSet<_>>().len(), families.len());
        if let Wish::Addresses(wanted) = &request.wish {
            assert!(addresses.is_subset(wanted));
        }
        if addresses.is_empty() {
            assert!(plan.refused.contains_key(name), "{name} gets nothing and is not told why");
        }
    }
    for state in plan.pools.values() {
        assert!(state.assigned + state.available <= state.total, "{state:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn never_two_owners_nothing_lost_and_it_settles(events in proptest::collection::vec(event(), 1..40)) {
        let mut view = View::default();
        view.namespaces.insert("default".to_owned(), BTreeMap::new());
        for (clock, event) in events.iter().enumerate() {
            happen(&mut view, clock as i64, event);
        }
        // Left alone, three rounds are enough: one to take back, one to give, one that changes nothing.
        for _ in 0..3 {
            let planned = plan(&view);
            grants_are_safe(&view, &planned);
            write(&mut view, &planned);
        }
        let settled = plan(&view);
        prop_assert!(settled.changes(&view).is_empty(), "{:?}", settled.changes(&view));
        nothing_is_lost(&view, &settled);
    }
}
