use std::net::IpAddr;

use towpath_model::desired::{PodSets, Verdict};
use towpath_model::{Enforcement, NetworkPolicy, Tier};

use super::*;

fn policy(name: &str) -> PolicyRef {
    PolicyRef::Namespaced(NamespacedName::new("shop", name))
}

/// A world in which these NetworkPolicies of one namespace are audited.
fn world(names: &[&str]) -> World {
    let audited = |name: &str| NetworkPolicy {
        enforcement: Enforcement::Audited,
        ..NetworkPolicy::deny_all(NamespacedName::new("shop", name))
    };
    let policies = names.iter().map(|name| audited(name)).map(|policy| (policy.name.clone(), policy));
    World { policies: policies.collect(), ..World::default() }
}

/// An image in which a set of ingress is audited because of these, and has a rule 7 of another policy.
fn image(set: u32, names: &[&str]) -> PolicyImage {
    let mut image = PolicyImage::default();
    let (set, audited) = (SetId(set), names.iter().map(|name| policy(name)).collect());
    image.audited.insert(set, audited);
    image.isolating.insert(set, names.iter().map(|name| NamespacedName::new("shop", *name)).collect());
    image.pods.insert(IpAddr::from([10, 0, 0, 1]), PodSets { audit_ingress: set, ..PodSets::default() });
    let protocol = RowProtocol::Other;
    let key = RowKey { set, class: LocalClass(0), protocol, port: 0, port_bits: 0 };
    image.rows.insert(key, Row { verdict: Verdict::Deny, rule: RuleId(7) });
    let info = RuleInfo {
        policy: PolicyRef::Cluster { tier: Tier::Admin, name: "guard".to_owned() },
        direction: Direction::Ingress,
        rule: 2,
        name: String::new(),
        peer: None,
        port: None,
    };
    image.rules.insert(RuleId(7), info);
    image
}

fn counted(set: u32, rule: RuleId, connections: u64) -> Audited {
    Audited { set: SetId(set), rule, connections, last: SystemTime::UNIX_EPOCH + Duration::from_secs(1000) }
}

fn totals(ledger: &Ledger) -> Vec<(String, u64)> {
    ledger.policies().into_iter().map(|policy| (policy.policy, policy.connections)).collect()
}

const DEFAULT: RuleId = RuleId::DEFAULT_DENY;
const START: SystemTime = SystemTime::UNIX_EPOCH;

#[test]
fn a_policy_that_would_deny_nothing_is_there_with_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(dir.path(), &[]);
    assert!(!ledger.is_in_use());
    ledger.follow(&image(5, &["a"]), &world(&["a"]), START);
    assert!(ledger.is_in_use());
    let [only] = ledger.policies().try_into().unwrap();
    assert_eq!(
        (only.policy.as_str(), only.connections, only.since.as_str()),
        ("NetworkPolicy shop/a", 0, "1970-01-01T00:00:00Z")
    );
}

#[test]
fn what_is_counted_is_added_to_who_would_deny_and_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(dir.path(), &[]);
    ledger.follow(&image(5, &["a", "b"]), &world(&["a", "b"]), START);
    assert!(ledger.read(&[counted(5, DEFAULT, 3)], START).is_empty());
    ledger.read(&[counted(5, DEFAULT, 4), counted(5, RuleId(7), 1)], START);
    ledger.read(&[counted(5, DEFAULT, 4), counted(5, RuleId(7), 1)], START);
    assert_eq!(totals(&ledger), [("NetworkPolicy shop/a".to_owned(), 5), ("NetworkPolicy shop/b".to_owned(), 5)]);
    let denials = ledger.policies().remove(0).denials;
    let said: Vec<(&str, u64)> = denials.iter().map(|denial| (denial.rule.as_str(), denial.connections)).collect();
    // The second is another's rule, to which an audited policy would pass it on.
    assert_eq!(said, [("no rule allows it", 4), ("ClusterNetworkPolicy admin/guard: spec.ingress[2]", 1)]);
    assert_eq!(denials[0].last, "1970-01-01T00:16:40Z");
}

#[test]
fn an_agent_that_starts_again_goes_on_where_the_one_before_it_was_killed() {
    let dir = tempfile::tempdir().unwrap();
    let (image, world) = (image(5, &["a"]), world(&["a"]));
    let mut first = Ledger::open(dir.path(), &[]);
    first.follow(&image, &world, START);
    first.read(&[counted(5, DEFAULT, 3)], START);
    // Not written: too soon after the last time, and then it was killed. The kernel went on counting.
    first.read(&[counted(5, DEFAULT, 9)], SystemTime::now());
    drop(first);
    let mut second = Ledger::open(dir.path(), &[counted(5, DEFAULT, 11)]);
    assert_eq!(totals(&second), [("NetworkPolicy shop/a".to_owned(), 11)]);
    // Until its first image, pods have the sets of the one before it.
    assert!(second.read(&[counted(5, DEFAULT, 11)], START).is_empty() && second.sets.contains_key(&SetId(5)));
    // It gives the policy another set, and what the old one still counts is not lost.
    let mut after = super::tests::image(8, &["a"]);
    after.isolating.remove(&SetId(5));
    second.follow(&after, &world, START + Duration::from_secs(100));
    let gone = second.read(&[counted(5, DEFAULT, 12), counted(8, DEFAULT, 2)], START);
    assert_eq!(gone, [(SetId(5), DEFAULT)]);
    assert_eq!(totals(&second), [("NetworkPolicy shop/a".to_owned(), 14)]);
    assert_eq!(second.policies()[0].since, "1970-01-01T00:00:00Z");
    second.forgotten(&gone);
    assert!(second.read(&[counted(8, DEFAULT, 2)], START).is_empty());
    assert!(!second.sets.contains_key(&SetId(5)));
    // Before they went, they were on disk.
    drop(second);
    assert_eq!(
        totals(&Ledger::open(dir.path(), &[counted(5, DEFAULT, 12), counted(8, DEFAULT, 2)])),
        [("NetworkPolicy shop/a".to_owned(), 14)]
    );
}

#[test]
fn a_node_that_starts_anew_counts_from_nothing_and_forgets_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (image, world) = (image(5, &["a"]), world(&["a"]));
    let mut first = Ledger::open(dir.path(), &[]);
    first.follow(&image, &world, START);
    first.read(&[counted(5, DEFAULT, 3), counted(5, RuleId(7), 1)], SystemTime::now() + EVERY);
    drop(first);
    let mut second = Ledger::open(dir.path(), &[]);
    second.follow(&image, &world, START);
    // The same numbers mean the same again, by chance; five were counted since.
    second.read(&[counted(5, DEFAULT, 5)], START);
    assert_eq!(totals(&second), [("NetworkPolicy shop/a".to_owned(), 9)]);
}

#[test]
fn a_policy_that_says_something_else_or_was_enforced_begins_at_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut ledger = Ledger::open(dir.path(), &[]);
    ledger.follow(&image(5, &["a"]), &world(&["a"]), START);
    ledger.read(&[counted(5, DEFAULT, 3)], START);
    let mut changed = world(&["a"]);
    changed.policies.values_mut().for_each(|policy| policy.egress = None);
    // What the set of the old text still counts is not the new text's.
    let mut both = image(6, &["a"]);
    both.isolating.insert(SetId(5), BTreeSet::new());
    ledger.follow(&both, &changed, START + Duration::from_secs(7));
    ledger.read(&[counted(5, DEFAULT, 4), counted(6, DEFAULT, 1)], START);
    assert_eq!(totals(&ledger), [("NetworkPolicy shop/a".to_owned(), 1)]);
    assert_eq!(ledger.policies()[0].since, "1970-01-01T00:00:07Z");
    let mut enforced = changed.clone();
    enforced.enforce_all();
    let mut image = both.clone();
    image.audited.clear();
    ledger.follow(&image, &enforced, START);
    assert!(ledger.policies().is_empty());
    // A policy that selects no pod here for a while is still the same.
    ledger.follow(&both, &changed, START);
    ledger.read(&[counted(6, DEFAULT, 2)], START);
    image.isolating.clear();
    ledger.follow(&image, &changed, START);
    assert_eq!(totals(&ledger), [("NetworkPolicy shop/a".to_owned(), 1)]);
}

#[test]
fn a_file_that_is_damaged_or_of_another_version_counts_as_absent() {
    let dir = tempfile::tempdir().unwrap();
    for text in ["", "{", r#"{"format":99,"sets":{},"rules":{},"read":[],"accounts":[]}"#] {
        std::fs::write(dir.path().join("audited.json"), text).unwrap();
        let mut ledger = Ledger::open(dir.path(), &[counted(5, DEFAULT, 3)]);
        assert!(ledger.policies().is_empty() && !ledger.is_in_use());
        assert!(ledger.read(&[counted(5, DEFAULT, 3)], START).is_empty(), "pods may have that set still");
        ledger.follow(&PolicyImage::default(), &World::default(), START);
        assert_eq!(ledger.read(&[counted(5, DEFAULT, 3)], START), [(SetId(5), DEFAULT)], "nobody knows what it means");
    }
}
