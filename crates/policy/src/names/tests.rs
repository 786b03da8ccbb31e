use super::*;
use proptest::prelude::*;

fn patterns(texts: &[&str]) -> Vec<DomainName> {
    texts.iter().map(|text| DomainName::parse(text).unwrap()).collect()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

proptest! {
    /// The order by labels from the right finds what asking every name finds.
    #[test]
    fn a_pattern_has_the_addresses_of_all_names_that_it_stands_for(
        lessons in prop::collection::vec(("[ab-]{1,2}(\\.[ab-]{1,2}){1,3}", 0u8..4), 0..40),
        asked in prop::collection::vec("(\\*\\.)?[ab]{1,2}(\\.[ab]{1,2}){1,2}", 1..6),
    ) {
        let asked: Vec<DomainName> = asked.iter().filter_map(|text| DomainName::parse(text)).collect();
        let mut learned = Learned::new(Limits::default());
        let mut pairs: BTreeSet<(String, IpAddr)> = BTreeSet::new();
        for (name, last) in lessons {
            let address = IpAddr::from([192, 0, 2, last]);
            learned.learn(&name, [address], at(1), &asked);
            if asked.iter().any(|pattern| pattern.matches(&name)) {
                pairs.insert((name, address));
            }
        }
        prop_assert_eq!(learned.len(), pairs.len());
        prop_assert_eq!(learned.iter().count(), pairs.len());
        for pattern in &asked {
            let of_names: BTreeSet<IpAddr> = pairs.iter().filter(|(name, _)| pattern.matches(name)).map(|(_, a)| *a).collect();
            let found = learned.of(std::slice::from_ref(pattern));
            prop_assert_eq!(&found, &of_names, "{}", pattern);
            for last in 0..4 {
                let address = IpAddr::from([192, 0, 2, last]);
                let named = learned.name_of(std::slice::from_ref(pattern), address);
                prop_assert_eq!(named.is_some(), of_names.contains(&address));
                prop_assert!(named.is_none_or(|name| pattern.matches(name)));
            }
        }
    }

    /// Who follows a table by what it says has changed knows what it holds; and who comes from another table is told that he does not.
    #[test]
    fn what_came_since_a_moment_is_all_that_did(
        steps in prop::collection::vec((0u8..3, 0u16..12, 0u8..8, 0u64..20), 1..60), limits in (1usize..4, 1usize..12),
    ) {
        let asked = patterns(&["*.example.com", "h1.example.com"]);
        let mut learned = Learned::new(Limits { of_name: limits.0, all: limits.1 });
        let mut followed: BTreeSet<IpAddr> = BTreeSet::new();
        let mut mark = Mark::default();
        for (what, host, last, until) in steps {
            let address = IpAddr::from([192, 0, 2, last]);
            match what {
                0 => drop(learned.forget_overdue(at(until), &BTreeSet::from([address]))),
                1 => drop(learned.keep_addresses(|known| known != address)),
                _ => drop(learned.learn(&format!("h{host}.example.com"), [address], at(until), &asked)),
            }
            for address in learned.since(mark).unwrap() {
                match learned.stand_for(&asked, address) {
                    true => followed.insert(address),
                    false => followed.remove(&address),
                };
            }
            mark = learned.mark();
            prop_assert_eq!(learned.since(mark), Some(BTreeSet::new()));
            prop_assert_eq!(&followed, &learned.of(&asked));
        }
        // Two that were one table go their own ways.
        let mut other = learned.clone();
        other.learn("h99.example.com", [ip("198.51.100.99")], at(99), &asked);
        learned.learn("h98.example.com", [ip("198.51.100.98")], at(99), &asked);
        prop_assert_eq!(learned.since(other.mark()), None);
        prop_assert!(other.since(mark).is_some_and(|came| came.contains(&ip("198.51.100.99"))));
    }

    /// However many names are invented, the bounds hold, and only names under the wildcard pay.
    #[test]
    fn bounds_hold_and_a_flood_takes_from_its_own_pattern(flood in prop::collection::vec((0u16..200, 0u8..8, 0u64..50), 1..300)) {
        let asked = patterns(&["*.example.com", "api.example.org"]);
        let mut learned = Learned::new(Limits { of_name: 3, all: 10 });
        learned.learn("api.example.org", [ip("198.51.100.1"), ip("198.51.100.2")], at(0), &asked);
        for (host, last, until) in flood {
            learned.learn(&format!("h{host}.example.com"), [IpAddr::from([192, 0, 2, last])], at(until), &asked);
            prop_assert!(learned.len() <= 10);
            prop_assert_eq!(learned.iter().count(), learned.len());
            prop_assert_eq!(learned.of(&asked[1..]).len(), 2, "the other pattern's addresses stay, old as they are");
        }
    }
}

#[test]
fn what_nobody_asks_for_is_not_learned_and_what_nobody_asks_for_any_more_is_forgotten() {
    let asked = patterns(&["*.example.com", "example.org"]);
    let mut learned = Learned::new(Limits::default());
    assert_eq!(learned.learn("example.com", [ip("192.0.2.1")], at(9), &asked), Lesson::default(), "not below itself");
    assert_eq!(learned.learn("a.example.com", [ip("192.0.2.1")], at(9), &asked).new, 1);
    assert_eq!(learned.learn("a.b.example.com", [ip("192.0.2.2")], at(9), &asked).new, 1);
    assert_eq!(learned.learn("example.org", [ip("192.0.2.3"), ip("2001:db8::1")], at(9), &asked).new, 2);
    assert_eq!(learned.keep_asked(&patterns(&["*.b.example.com"])), 3);
    assert_eq!(learned.iter().map(|pair| pair.name).collect::<Vec<_>>(), ["a.b.example.com"]);
    assert_eq!(learned.keep_addresses(|address| address != ip("192.0.2.2")), 1);
    assert!(learned.is_empty() && learned == Learned::new(Limits::default()), "nothing is left behind");
}

#[test]
fn what_is_said_again_is_good_for_longer_and_never_for_less() {
    let asked = patterns(&["a.example"]);
    let mut learned = Learned::new(Limits::default());
    assert_eq!(learned.learn("a.example", [ip("192.0.2.1")], at(10), &asked).new, 1);
    assert_eq!(learned.learn("a.example", [ip("192.0.2.1"), ip("192.0.2.2")], at(20), &asked).new, 1);
    assert_eq!(learned.learn("a.example", [ip("192.0.2.1")], at(5), &asked), Lesson::default());
    assert!(learned.overdue(at(19)).is_empty());
    assert_eq!(learned.next_overdue(), Some(at(20)));
}

#[test]
fn what_is_overdue_goes_unless_somebody_is_connected_to_it() {
    let asked = patterns(&["a.example", "b.example"]);
    let mut learned = Learned::new(Limits::default());
    learned.learn("a.example", [ip("192.0.2.1"), ip("192.0.2.2")], at(10), &asked);
    learned.learn("b.example", [ip("192.0.2.2")], at(30), &asked);
    assert_eq!(learned.overdue(at(10)), [ip("192.0.2.1"), ip("192.0.2.2")].into());
    assert_eq!(learned.forget_overdue(at(10), &[ip("192.0.2.1")].into()), 1);
    assert_eq!(learned.of(&asked[..1]), [ip("192.0.2.1")].into(), "a connection keeps its address for the name");
    assert_eq!(learned.of(&asked[1..]), [ip("192.0.2.2")].into(), "the other name's time is not over");
    assert_eq!(learned.forget_overdue(at(30), &BTreeSet::new()), 2);
    assert!(learned.is_empty());
}

#[test]
fn a_name_with_too_many_addresses_keeps_the_newest() {
    let asked = patterns(&["a.example"]);
    let mut learned = Learned::new(Limits { of_name: 2, all: 10 });
    learned.learn("a.example", [ip("192.0.2.1")], at(10), &asked);
    learned.learn("a.example", [ip("192.0.2.2")], at(20), &asked);
    assert_eq!(learned.learn("a.example", [ip("192.0.2.3")], at(15), &asked), Lesson { new: 1, evicted: 1 });
    assert_eq!(learned.of(&asked), [ip("192.0.2.2"), ip("192.0.2.3")].into());
    let many = (0..100).map(|last| IpAddr::from([198, 51, 100, last]));
    assert_eq!(learned.learn("a.example", many, at(30), &asked), Lesson { new: 2, evicted: 2 });
    assert_eq!(learned.len(), 2);
}

#[test]
fn addresses_that_no_host_outside_has_are_special() {
    for text in [
        "0.0.0.0",
        "0.1.2.3",
        "127.0.0.1",
        "127.255.0.1",
        "169.254.169.254",
        "224.0.0.1",
        "239.1.1.1",
        "255.255.255.255",
        "240.0.0.1",
        "::",
        "::1",
        "fe80::1",
        "febf::1",
        "ff02::1",
        "::ffff:192.0.2.1",
        "::192.0.2.1",
    ] {
        assert!(is_special(ip(text)), "{text}");
    }
    for text in
        ["10.0.0.1", "192.168.0.1", "100.64.0.1", "8.8.8.8", "223.255.255.255", "2001:db8::1", "fd00::1", "fec0::1"]
    {
        assert!(!is_special(ip(text)), "{text}");
    }
}

#[test]
fn who_is_very_far_behind_is_told_so() {
    let asked = patterns(&["*.example.com"]);
    let mut learned = Learned::new(Limits { of_name: 1, all: 8 });
    learned.learn("a.example.com", [ip("192.0.2.1")], at(1), &asked);
    let mark = learned.mark();
    for turn in 0..=REMEMBERED {
        learned.learn("b.example.com", [IpAddr::from([192, 0, 3, u8::from(turn % 2 == 0)])], at(1), &asked);
        let known = learned.since(mark);
        assert_eq!(known.is_none(), 2 * turn + 1 > REMEMBERED, "each turn is two changes, but for the first: {turn}");
    }
    assert!(learned.since(learned.mark()).is_some());
}
