//! What single Services are given, and what they are told when they are given nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::{
    AddressPool, BalancedService, Family, FamilyPolicy, LoadBalancerRequest, NamespacedName, Protocol, Selector,
    TrafficPolicy, Wish,
};

use super::{Plan, View, plan};

pub(super) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

pub(super) fn named(name: &str) -> NamespacedName {
    NamespacedName::new("default", name)
}

pub(super) fn pool(name: &str, ranges: &[&str]) -> AddressPool {
    AddressPool {
        name: name.to_owned(),
        uid: format!("uid-{name}"),
        ranges: ranges.iter().map(|range| range.parse().unwrap()).collect(),
        auto_assign: true,
        services: Selector::everything(),
        namespaces: Selector::everything(),
        shared_across_namespaces: false,
        nodes: Selector::everything(),
    }
}

pub(super) fn request(families: &[Family]) -> LoadBalancerRequest {
    LoadBalancerRequest {
        explicit: false,
        leaving: false,
        families: families.to_vec(),
        policy: FamilyPolicy::Single,
        wish: Wish::Any,
        pool: None,
        sharing_key: None,
        ports: BTreeSet::from([(Protocol::Tcp, 80)]),
        external_policy: TrafficPolicy::Cluster,
        selector: BTreeMap::from([("app".to_owned(), "web".to_owned())]),
    }
}

pub(super) fn service(name: &str, created: i64, request: Option<LoadBalancerRequest>) -> BalancedService {
    BalancedService {
        name: named(name),
        created,
        labels: BTreeMap::new(),
        request,
        standing: BTreeSet::new(),
        standing_is_ours: false,
        is_marked: true,
        cluster_ips: BTreeSet::new(),
        external_ips: BTreeSet::new(),
    }
}

/// A view with pools and Services of IPv4, the first the oldest.
fn view(pools: &[AddressPool], names: &[&str]) -> View {
    let mut view = View {
        pools: pools.iter().map(|pool| (pool.name.clone(), pool.clone())).collect(),
        namespaces: BTreeMap::from([("default".to_owned(), BTreeMap::new())]),
        ..View::default()
    };
    for (age, name) in names.iter().enumerate() {
        view.services.insert(named(name), service(name, age as i64, Some(request(&[Family::V4]))));
    }
    view
}

fn ask(view: &mut View, name: &str, change: impl FnOnce(&mut LoadBalancerRequest)) {
    change(view.services.get_mut(&named(name)).unwrap().request.as_mut().unwrap());
}

/// Writes what was planned, as the controller does.
pub(super) fn write(view: &mut View, plan: &Plan) {
    for (name, addresses) in &plan.addresses {
        let service = view.services.get_mut(name).unwrap();
        service.standing.clone_from(addresses);
        service.standing_is_ours = !addresses.is_empty();
        service.is_marked = true;
    }
}

fn has(plan: &Plan, name: &str) -> Vec<String> {
    plan.addresses.get(&named(name)).into_iter().flatten().map(ToString::to_string).collect()
}

fn why(plan: &Plan, name: &str) -> String {
    plan.refused.get(&named(name)).map(ToString::to_string).unwrap_or_default()
}

#[test]
fn the_oldest_gets_the_lowest_and_the_last_is_told_which_pool_is_full() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.2"])], &["a", "b", "c"]);
    let first = plan(&view);
    assert_eq!((has(&first, "a"), has(&first, "b")), (vec!["192.0.2.1".to_owned()], vec!["192.0.2.2".to_owned()]));
    assert!(why(&first, "c").contains("AddressPool p") && why(&first, "c").contains("in use"), "{}", why(&first, "c"));
    assert_eq!((first.pools["p"].total, first.pools["p"].assigned, first.pools["p"].available), (2, 2, 0));
    write(&mut view, &first);
    view.services.remove(&named("a"));
    assert_eq!(has(&plan(&view), "c"), ["192.0.2.1"], "what is freed is given to who waits");
}

#[test]
fn what_stands_counts_before_anything_new_is_given() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.9"])], &["old", "young"]);
    let young = view.services.get_mut(&named("young")).unwrap();
    young.standing = [ip("192.0.2.1")].into();
    young.standing_is_ours = true;
    let plan = plan(&view);
    assert_eq!((has(&plan, "young"), has(&plan, "old")), (vec!["192.0.2.1".to_owned()], vec!["192.0.2.2".to_owned()]));
}

#[test]
fn an_address_that_still_stands_elsewhere_is_given_a_round_later() {
    let mut view = view(&[pool("p", &["192.0.2.1"])], &["leaves", "waits"]);
    let first = plan(&view);
    write(&mut view, &first);
    view.services.get_mut(&named("leaves")).unwrap().request = None;
    let second = plan(&view);
    assert_eq!(has(&second, "leaves"), Vec::<String>::new(), "its status is cleared");
    assert_eq!(has(&second, "waits"), Vec::<String>::new(), "not before that is written");
    write(&mut view, &second);
    assert_eq!(has(&plan(&view), "waits"), ["192.0.2.1"]);
}

#[test]
fn two_that_have_one_address_are_set_right_and_the_older_keeps_it() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.2"])], &["old", "young"]);
    for name in ["old", "young"] {
        view.services.get_mut(&named(name)).unwrap().standing = [ip("192.0.2.1")].into();
    }
    let first = plan(&view);
    assert_eq!(
        (has(&first, "old"), has(&first, "young")),
        (vec!["192.0.2.1".to_owned()], vec!["192.0.2.2".to_owned()])
    );
}

#[test]
fn both_families_are_given_as_the_policy_says() {
    let pools = [pool("four", &["192.0.2.1-192.0.2.3"]), pool("six", &["2001:db8::1"])];
    let mut view = view(&pools, &["must", "may", "must-too"]);
    for (name, policy) in [
        ("must", FamilyPolicy::RequireDual),
        ("may", FamilyPolicy::PreferDual),
        ("must-too", FamilyPolicy::RequireDual),
    ] {
        ask(&mut view, name, |request| {
            request.families = vec![Family::V4, Family::V6];
            request.policy = policy;
        });
    }
    let plan = plan(&view);
    assert_eq!(has(&plan, "must"), ["192.0.2.1", "2001:db8::1"]);
    assert_eq!(has(&plan, "may"), ["192.0.2.2"], "one is better than none");
    assert_eq!(has(&plan, "must-too"), Vec::<String>::new());
    assert!(why(&plan, "must-too").contains("AddressPool six: every IPv6"), "{}", why(&plan, "must-too"));
    assert_eq!(plan.pools["four"].assigned, 2, "half of a pair is not kept back");
}

#[test]
fn requested_addresses_are_given_or_it_is_said_why_not() {
    let mut narrow = pool("narrow", &["198.51.100.1-198.51.100.9"]);
    narrow.services = Selector::equals([("tier", "gold")]);
    let mut view =
        view(&[pool("p", &["192.0.2.1-192.0.2.9"]), narrow], &["any", "five", "five-too", "out", "gold", "six"]);
    let want = |view: &mut View, name: &str, address: &str| {
        ask(view, name, |request| request.wish = Wish::Addresses([ip(address)].into()));
    };
    want(&mut view, "five", "192.0.2.1");
    want(&mut view, "five-too", "192.0.2.1");
    want(&mut view, "out", "203.0.113.1");
    want(&mut view, "gold", "198.51.100.1");
    want(&mut view, "six", "2001:db8::1");
    let plan = plan(&view);
    assert_eq!(has(&plan, "five"), ["192.0.2.1"], "who names it comes before the older one who takes any");
    assert_eq!(has(&plan, "any"), ["192.0.2.2"]);
    for (name, said) in [
        ("five-too", "in use by Service default/five"),
        ("out", "in no AddressPool"),
        ("gold", "AddressPool narrow, which is not for this Service"),
        ("six", "ipFamilies"),
    ] {
        assert!(why(&plan, name).contains(said), "{name}: {}", why(&plan, name));
    }
}

#[test]
fn a_request_that_changes_moves_the_service_and_an_unclear_one_changes_nothing() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.9"])], &["web"]);
    let first = plan(&view);
    write(&mut view, &first);
    ask(&mut view, "web", |request| request.wish = Wish::Unclear("no address".to_owned()));
    let unclear = plan(&view);
    assert_eq!(has(&unclear, "web"), ["192.0.2.1"]);
    assert!(why(&unclear, "web").contains("no address"));
    ask(&mut view, "web", |request| request.wish = Wish::Addresses([ip("192.0.2.7")].into()));
    assert_eq!(has(&plan(&view), "web"), ["192.0.2.7"]);
}

#[test]
fn an_address_is_shared_by_the_same_key_disjoint_ports_and_under_local_the_same_pods() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.9"])], &["http", "dns", "clash", "local", "stranger"]);
    for name in ["http", "dns", "clash", "local"] {
        ask(&mut view, name, |request| request.sharing_key = Some("key".to_owned()));
    }
    ask(&mut view, "dns", |request| request.ports = [(Protocol::Udp, 80)].into());
    ask(&mut view, "local", |request| {
        request.ports = [(Protocol::Tcp, 443)].into();
        request.external_policy = TrafficPolicy::Local;
    });
    let together = plan(&view);
    assert_eq!(
        (has(&together, "http"), has(&together, "dns")),
        (vec!["192.0.2.1".to_owned()], vec!["192.0.2.1".to_owned()])
    );
    let alone: BTreeSet<Vec<String>> = ["clash", "local", "stranger"].map(|name| has(&together, name)).into();
    assert!(alone.len() == 3 && !alone.contains(&vec!["192.0.2.1".to_owned()]), "{alone:?}");
    assert_eq!(together.pools["p"].assigned, 4, "a shared address counts once");
    write(&mut view, &together);
    ask(&mut view, "http", |request| request.external_policy = TrafficPolicy::Local);
    ask(&mut view, "dns", |request| request.external_policy = TrafficPolicy::Local);
    assert_eq!(has(&plan(&view), "dns"), ["192.0.2.1"], "the same pods");
    ask(&mut view, "dns", |request| drop(request.selector.insert("app".to_owned(), "dns".to_owned())));
    assert_ne!(has(&plan(&view), "dns"), ["192.0.2.1"], "other pods, so perhaps on other nodes");
}

#[test]
fn a_named_pool_is_the_only_one_and_one_that_gives_by_name_only_says_so() {
    let mut quiet = pool("quiet", &["198.51.100.1"]);
    quiet.auto_assign = false;
    let mut view = view(&[quiet, pool("p", &["192.0.2.1"])], &["named", "lost", "any"]);
    ask(&mut view, "named", |request| request.pool = Some("quiet".to_owned()));
    ask(&mut view, "lost", |request| request.pool = Some("nowhere".to_owned()));
    let first = plan(&view);
    assert_eq!(
        (has(&first, "named"), has(&first, "any")),
        (vec!["198.51.100.1".to_owned()], vec!["192.0.2.1".to_owned()])
    );
    assert!(why(&first, "lost").contains("no AddressPool nowhere"));
    view.pools.remove("p");
    let second = plan(&view);
    assert!(why(&second, "any").contains("AddressPool quiet has autoAssign: false"), "{}", why(&second, "any"));
}

#[test]
fn without_a_pool_everything_is_given_back_and_said() {
    let mut view = view(&[pool("p", &["192.0.2.1"])], &["web"]);
    let first = plan(&view);
    write(&mut view, &first);
    view.pools.clear();
    let plan = plan(&view);
    assert_eq!(has(&plan, "web"), Vec::<String>::new());
    assert_eq!(plan.changes(&view).len(), 1, "its status is cleared");
    assert!(why(&plan, "web").contains("there is no AddressPool"));
}

#[test]
fn a_pool_for_some_comes_first_and_selectors_that_stop_matching_take_back() {
    let mut team = pool("team", &["198.51.100.1"]);
    team.namespaces = Selector::equals([("team", "a")]);
    let mut view = view(&[pool("all", &["192.0.2.1"]), team], &["web"]);
    view.namespaces.insert("default".to_owned(), BTreeMap::from([("team".to_owned(), "a".to_owned())]));
    let first = plan(&view);
    assert_eq!(has(&first, "web"), ["198.51.100.1"]);
    write(&mut view, &first);
    view.namespaces.remove("default");
    assert_eq!(has(&plan(&view), "web"), ["198.51.100.1"], "a namespace that is not known says nothing");
    view.namespaces.insert("default".to_owned(), BTreeMap::new());
    assert_eq!(has(&plan(&view), "web"), ["192.0.2.1"]);
}

#[test]
fn what_is_the_clusters_own_is_never_given_and_the_pool_says_so() {
    let mut view = view(&[pool("p", &["192.0.2.0/29"]), pool("q", &["192.0.2.6-192.0.2.9"])], &["web"]);
    view.own_ranges = vec!["192.0.2.0/30".parse().unwrap()];
    view.node_addresses = [ip("192.0.2.4")].into();
    view.services.get_mut(&named("web")).unwrap().cluster_ips = [ip("10.96.0.1")].into();
    let mut other = service("other", 9, None);
    other.cluster_ips = [ip("192.0.2.5")].into();
    view.services.insert(named("other"), other);
    let first = plan(&view);
    assert_eq!(has(&first, "web"), ["192.0.2.6"]);
    let state = &first.pools["p"];
    assert_eq!((state.total, state.assigned, state.available), (4, 1, 1));
    assert!(state.overlaps_pools[0].contains("192.0.2.6-192.0.2.9 of AddressPool q"), "{:?}", state.overlaps_pools);
    assert_eq!(state.overlaps_cluster.len(), 2, "{:?}", state.overlaps_cluster);
    for (wanted, said) in
        [("192.0.2.1", "node's, a pod's"), ("192.0.2.4", "node's, a pod's"), ("192.0.2.5", "another Service's")]
    {
        ask(&mut view, "web", |request| request.wish = Wish::Addresses([ip(wanted)].into()));
        assert!(why(&plan(&view), "web").contains(said), "{wanted}: {}", why(&plan(&view), "web"));
    }
}

#[test]
fn another_implementations_address_is_left_alone_and_not_given_again() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.2"])], &["web"]);
    let mut theirs = service("theirs", 0, None);
    theirs.standing = [ip("192.0.2.1")].into();
    view.services.insert(named("theirs"), theirs);
    let plan = plan(&view);
    assert_eq!(has(&plan, "web"), ["192.0.2.2"]);
    assert!(!plan.addresses.contains_key(&named("theirs")), "its status is not ours to write");
}

#[test]
fn a_service_that_is_being_deleted_keeps_what_it_has_and_gets_nothing_new() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.2"])], &["has", "has-not"]);
    view.services.get_mut(&named("has")).unwrap().standing = [ip("192.0.2.2")].into();
    for name in ["has", "has-not"] {
        ask(&mut view, name, |request| request.leaving = true);
    }
    let plan = plan(&view);
    assert_eq!((has(&plan, "has"), has(&plan, "has-not")), (vec!["192.0.2.2".to_owned()], Vec::new()));
}

#[test]
fn who_merely_claims_an_address_takes_it_from_nobody() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.4"])], &["web"]);
    let first = plan(&view);
    write(&mut view, &first);
    assert_eq!(has(&first, "web"), ["192.0.2.1"]);
    let mut thief = service("thief", 9, None);
    thief.external_ips = [1, 2, 3, 4].map(|last| ip(&format!("192.0.2.{last}"))).into();
    view.services.insert(named("thief"), thief);
    view.services.insert(named("waits"), service("waits", 10, Some(request(&[Family::V4]))));
    let second = plan(&view);
    assert_eq!(
        (has(&second, "web"), has(&second, "waits")),
        (vec!["192.0.2.1".to_owned()], vec!["192.0.2.2".to_owned()]),
        "external addresses mean nothing where none are allowed"
    );
    assert_eq!(second.pools["p"].available, 2);
    view.external_ranges = vec!["192.0.2.0/30".parse().unwrap()];
    let third = plan(&view);
    assert_eq!(
        (has(&third, "web"), has(&third, "waits")),
        (vec!["192.0.2.1".to_owned()], vec!["192.0.2.4".to_owned()])
    );
    view.external_ranges.clear();
    // Nor do a node's status, its ranges, or another Service's cluster address.
    view.node_addresses = [ip("192.0.2.1")].into();
    assert_eq!(has(&plan(&view), "web"), ["192.0.2.1"]);
    view.node_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    let all_claimed = plan(&view);
    assert_eq!((has(&all_claimed, "web"), has(&all_claimed, "waits")), (vec!["192.0.2.1".to_owned()], Vec::new()));
    view.services.get_mut(&named("thief")).unwrap().cluster_ips = [ip("192.0.2.1")].into();
    assert_eq!(has(&plan(&view), "web"), ["192.0.2.1"]);
    view.own_ranges = vec!["192.0.2.0/24".parse().unwrap()];
    assert_eq!(has(&plan(&view), "web"), Vec::<String>::new(), "who runs the cluster says what is its own");
}

#[test]
fn a_key_is_good_in_its_namespace_only_unless_the_pool_says_otherwise() {
    let mut shared = pool("p", &["192.0.2.1-192.0.2.9"]);
    let mut view = view(&[shared.clone()], &["web"]);
    ask(&mut view, "web", |request| request.sharing_key = Some("key".to_owned()));
    let guest = NamespacedName::new("other", "guest");
    let mut guessed = service("guest", 9, Some(request(&[Family::V4])));
    guessed.name = guest.clone();
    let asks = guessed.request.as_mut().unwrap();
    asks.sharing_key = Some("key".to_owned());
    asks.ports = [(Protocol::Tcp, 443)].into();
    view.services.insert(guest.clone(), guessed);
    view.namespaces.insert("other".to_owned(), BTreeMap::new());
    assert_eq!(plan(&view).addresses[&guest], [ip("192.0.2.2")].into());
    shared.shared_across_namespaces = true;
    view.pools.insert("p".to_owned(), shared.clone());
    let together = plan(&view);
    assert_eq!(together.addresses[&guest], [ip("192.0.2.1")].into());
    write(&mut view, &together);
    view.pools.clear();
    view.some_pool_is_unclear = true;
    assert_eq!(plan(&view).addresses[&guest], [ip("192.0.2.1")].into(), "a mistake in the pool parts nobody");
    view.some_pool_is_unclear = false;
    view.pools.insert("p".to_owned(), shared);
    // The same selector selects other pods in another namespace.
    ask(&mut view, "web", |request| request.external_policy = TrafficPolicy::Local);
    view.services.get_mut(&guest).unwrap().request.as_mut().unwrap().external_policy = TrafficPolicy::Local;
    assert_ne!(plan(&view).addresses[&guest], [ip("192.0.2.1")].into());
}

#[test]
fn under_local_services_without_a_selector_share_nothing() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.9"])], &["a", "b"]);
    for (name, port) in [("a", 80), ("b", 443)] {
        ask(&mut view, name, |request| {
            request.sharing_key = Some("key".to_owned());
            request.ports = [(Protocol::Tcp, port)].into();
            request.external_policy = TrafficPolicy::Local;
            request.selector.clear();
        });
    }
    let plan = plan(&view);
    assert_ne!(has(&plan, "a"), has(&plan, "b"), "whose endpoints are made by hand may be anywhere");
}

#[test]
fn what_lacks_a_mark_of_ours_is_written_again() {
    let mut view = view(&[pool("p", &["192.0.2.1-192.0.2.9"])], &["web"]);
    let first = plan(&view);
    write(&mut view, &first);
    assert_eq!(plan(&view).changes(&view), []);
    view.services.get_mut(&named("web")).unwrap().is_marked = false;
    let again = plan(&view);
    assert_eq!(again.changes(&view), [(&named("web"), &BTreeSet::from([ip("192.0.2.1")]))]);
}

#[test]
fn of_two_families_one_stays_when_the_others_pool_goes_and_that_is_said() {
    let mut view = view(&[pool("four", &["192.0.2.1"]), pool("six", &["2001:db8::1"])], &["web"]);
    ask(&mut view, "web", |request| {
        request.families = vec![Family::V4, Family::V6];
        request.policy = FamilyPolicy::RequireDual;
    });
    let both = plan(&view);
    write(&mut view, &both);
    view.pools.remove("six");
    let left = plan(&view);
    assert_eq!(has(&left, "web"), ["192.0.2.1"], "clients of one family need not suffer for the other's pool");
    assert!(why(&left, "web").contains("no IPv6 range"), "{}", why(&left, "web"));
}
