//! The promises of the pool, by example and for random sequences.

use std::collections::{BTreeMap, HashSet};

use proptest::prelude::*;

use super::*;

fn owner(n: u32) -> Attachment {
    Attachment::new(&format!("c{n}"), "eth0").unwrap()
}

fn pool(ranges: &[&str]) -> Pool {
    Pool::new(&ranges.iter().map(|r| r.parse().unwrap()).collect::<Vec<IpNet>>()).unwrap()
}

fn at(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn one(pool: &mut Pool, n: u32, now: Duration) -> IpAddr {
    pool.allocate(&owner(n), &[], now).unwrap().addresses[0]
}

fn release(pool: &mut Pool, n: u32, now: Duration) {
    pool.release(&Holder::Attachment(owner(n)), now);
}

#[test]
fn network_gateway_and_broadcast_are_never_given() {
    let mut pool = pool(&["10.244.1.0/29"]);
    let given: Vec<String> = (0..5).map(|n| one(&mut pool, n, at(0)).to_string()).collect();
    assert_eq!(given, ["10.244.1.2", "10.244.1.3", "10.244.1.4", "10.244.1.5", "10.244.1.6"]);
    assert_eq!(gateway_of(&"10.244.1.0/29".parse().unwrap()).to_string(), "10.244.1.1");
    assert_eq!(gateway_of(&"fd00:10:244:1::/64".parse().unwrap()).to_string(), "fd00:10:244:1::1");
}

#[test]
fn a_full_range_says_how_full() {
    let mut pool = pool(&["10.244.1.0/29"]);
    for n in 0..5 {
        one(&mut pool, n, at(0));
    }
    let error = pool.allocate(&owner(9), &[], at(0)).unwrap_err();
    assert_eq!(error.to_string(), "no free address in 10.244.1.0/29: 5 of 5 are taken");
    assert_eq!(pool.usage()[0].taken, 5);
}

#[test]
fn the_same_owner_gets_the_same_again() {
    let mut pool = pool(&["10.244.1.0/24"]);
    assert_eq!(one(&mut pool, 1, at(0)), one(&mut pool, 1, at(99)));
    assert_eq!(pool.usage()[0].taken, 1);
}

#[test]
fn both_families_or_none() {
    let mut pool = pool(&["10.244.1.0/30", "fd00::/64"]);
    assert_eq!(
        pool.allocate(&owner(1), &[], at(0)).unwrap().addresses,
        ["10.244.1.2".parse::<IpAddr>().unwrap(), "fd00::2".parse().unwrap()]
    );
    assert!(matches!(pool.allocate(&owner(2), &[], at(0)), Err(IpamError::Exhausted { .. })));
    assert_eq!(pool.usage().iter().map(|u| u.taken).collect::<Vec<_>>(), [1, 1]);
    assert_eq!(pool.held_by(&Holder::Attachment(owner(2))), None);
}

#[test]
fn a_failed_allocation_does_not_use_up_addresses_of_the_other_family() {
    let mut pool = pool(&["fd00::/64", "10.244.1.0/30"]);
    pool.allocate(&owner(1), &[], at(0)).unwrap();
    for n in 2..50 {
        assert!(pool.allocate(&owner(n), &[], at(0)).is_err());
    }
    release(&mut pool, 1, at(1));
    assert_eq!(pool.allocate(&owner(60), &[], at(100)).unwrap().addresses[0].to_string(), "fd00::3");
}

#[test]
fn released_addresses_come_last_and_the_longest_released_first() {
    let mut pool = pool(&["10.244.1.0/29"]);
    let first = one(&mut pool, 1, at(0));
    let second = one(&mut pool, 2, at(0));
    release(&mut pool, 2, at(1));
    release(&mut pool, 1, at(2));
    let fresh: HashSet<IpAddr> = (10..13).map(|n| one(&mut pool, n, at(3))).collect();
    assert!(!fresh.contains(&first) && !fresh.contains(&second), "fresh ones go first: {fresh:?}");
    let hurried = pool.allocate(&owner(20), &[], at(3)).unwrap();
    assert_eq!((hurried.addresses[0], hurried.hurried), (second, Some(at(2))));
    let rested = pool.allocate(&owner(21), &[], at(40)).unwrap();
    assert_eq!((rested.addresses[0], rested.hurried), (first, None));
}

#[test]
fn a_huge_range_does_not_remember_every_address_it_ever_gave() {
    let mut pool = pool(&["fd00::/64"]);
    for n in 0..20_000u32 {
        one(&mut pool, n, at(u64::from(n)));
        release(&mut pool, n, at(u64::from(n)));
    }
    assert!(pool.resting.len() <= RESTING_LIMIT + 1 && pool.rested.len() == pool.resting.len());
}

#[test]
fn ranges_that_hold_no_pod_are_refused() {
    for small in ["10.0.0.0/31", "10.0.0.0/32", "fd00::/127", "fd00::/128"] {
        assert!(matches!(Pool::new(&[small.parse().unwrap()]), Err(IpamError::TooSmall(_))), "{small}");
    }
    assert!(matches!(
        Pool::new(&["10.0.0.0/24".parse().unwrap(), "10.0.0.128/25".parse().unwrap()]),
        Err(IpamError::Overlap(_, _))
    ));
    assert_eq!(pool(&[]).allocate(&owner(1), &[], at(0)), Err(IpamError::NoRange));
}

#[test]
fn the_extremes_of_the_number_space_are_ranges_like_any_other() {
    for (range, size) in
        [("0.0.0.0/0", (1u128 << 32) - 3), ("255.255.255.248/29", 5), ("::/0", u128::MAX - 1), ("ffff::/126", 2)]
    {
        let mut pool = pool(&[range]);
        assert_eq!(pool.usage()[0].size, size, "{range}");
        for n in 0..2 {
            assert!(range.parse::<IpNet>().unwrap().contains(&one(&mut pool, n, at(0))));
        }
    }
    let mut last = pool(&["ffff:ffff:ffff:ffff:ffff:ffff:ffff:fffc/126"]);
    assert_eq!((0..2).map(|n| one(&mut last, n, at(0))).collect::<HashSet<_>>().len(), 2);
    assert!(last.allocate(&owner(9), &[], at(0)).is_err());
}

#[test]
fn adopted_addresses_are_not_given_and_may_lie_outside_the_range() {
    let mut pool = pool(&["10.244.1.0/29"]);
    let adopted: Vec<IpAddr> = vec!["10.244.1.2".parse().unwrap()];
    pool.adopt(Holder::Device("tp0".into()), &adopted).unwrap();
    pool.adopt(Holder::Attachment(owner(7)), &["192.168.0.9".parse().unwrap()]).unwrap();
    let error = pool.adopt(Holder::Attachment(owner(8)), &adopted).unwrap_err();
    assert_eq!(error.to_string(), "10.244.1.2 is held by device tp0 and cannot also belong to eth0 of container c8");
    assert_eq!(one(&mut pool, 1, at(0)).to_string(), "10.244.1.3");
    pool.release(&Holder::Device("tp0".into()), at(1));
    let rest: Vec<String> = (2..6).map(|n| one(&mut pool, n, at(2)).to_string()).collect();
    assert_eq!(rest, ["10.244.1.4", "10.244.1.5", "10.244.1.6", "10.244.1.2"]);
}

#[test]
fn another_range_leaves_holders_alone() {
    let mut pool = pool(&["10.244.1.0/30"]);
    let old = one(&mut pool, 1, at(0));
    pool.set_ranges(&["10.244.2.0/24".parse().unwrap()]).unwrap();
    assert_eq!(one(&mut pool, 1, at(0)), old);
    assert_eq!(one(&mut pool, 2, at(0)).to_string(), "10.244.2.2");
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// What somebody gets who asks for these.
fn chosen(pool: &mut Pool, n: u32, addresses: &[&str]) -> Result<Vec<String>, IpamError> {
    let addresses: Vec<IpAddr> = addresses.iter().map(|address| ip(address)).collect();
    let given = pool.allocate(&owner(n), &addresses, at(0))?;
    Ok(given.addresses.iter().map(ToString::to_string).collect())
}

#[test]
fn who_asks_for_addresses_gets_them_and_of_the_other_family_any() {
    let mut pool = pool(&["10.244.1.0/24", "fd00::/64"]);
    assert_eq!(
        chosen(&mut pool, 1, &["fd00::99", "10.244.1.99"]).unwrap(),
        ["10.244.1.99", "fd00::99"],
        "the ranges' order"
    );
    assert_eq!(chosen(&mut pool, 2, &["fd00::2"]).unwrap(), ["10.244.1.2", "fd00::2"]);
    assert_eq!(
        chosen(&mut pool, 3, &["10.244.1.254"]).unwrap(),
        ["10.244.1.254", "fd00::3"],
        "those that are chosen are passed over"
    );
    assert_eq!(chosen(&mut pool, 1, &["10.244.1.7"]).unwrap(), ["10.244.1.99", "fd00::99"], "who has some keeps them");
    assert_eq!(pool.holder(ip("10.244.1.7")), None);
}

#[test]
fn what_cannot_be_given_is_refused_with_the_reason_and_nothing_is_taken() {
    let mut pool = pool(&["10.244.1.0/24", "fd00::/64"]);
    chosen(&mut pool, 1, &["10.244.1.9"]).unwrap();
    pool.adopt(Holder::Predecessor(ip("10.244.1.8")), &[ip("10.244.1.8")]).unwrap();
    pool.adopt(Holder::Device("tp0".into()), &[ip("fd00::8")]).unwrap();
    let before: Vec<u128> = pool.usage().iter().map(|usage| usage.taken).collect();
    for (address, words) in [
        ("10.244.2.9", "is in no pod range of this node (10.244.1.0/24, fd00::/64)"),
        ("fd00:0:0:1::9", "is in no pod range"),
        ("127.0.0.1", "is in no pod range"),
        ("224.0.0.1", "is in no pod range"),
        ("::", "is in no pod range"),
        ("10.244.1.0", "the network's, the gateway's or the broadcast address of 10.244.1.0/24"),
        ("10.244.1.1", "the gateway's"),
        ("10.244.1.255", "broadcast"),
        ("fd00::", "the gateway's"),
        ("fd00::1", "the gateway's"),
        ("10.244.1.9", "eth0 of container c1 has it"),
        ("10.244.1.8", "a container of the network before"),
        ("fd00::8", "device tp0 has it"),
    ] {
        // Beside one that could be had.
        let free = if address.contains(':') { "10.244.1.50" } else { "fd00::50" };
        for wanted in [[address, free], [free, address]] {
            let error = chosen(&mut pool, 2, &wanted).unwrap_err().to_string();
            assert!(error.starts_with(&format!("{address} is asked for")) && error.contains(words), "{error}");
        }
        assert_eq!(pool.usage().iter().map(|usage| usage.taken).collect::<Vec<_>>(), before, "{address}");
        assert_eq!(pool.held_by(&Holder::Attachment(owner(2))), None);
    }
    let mut v4 = Pool::new(&["10.244.1.0/24".parse().unwrap()]).unwrap();
    assert!(
        matches!(chosen(&mut v4, 1, &["fd00::9"]), Err(IpamError::Elsewhere { .. })),
        "a family that the node has not"
    );
    assert_eq!(chosen(&mut Pool::default(), 1, &["10.244.1.9"]), Err(IpamError::NoRange));
}

#[test]
fn an_address_that_is_chosen_may_rest_and_rests_when_it_is_released() {
    let mut pool = pool(&["10.244.1.0/29"]);
    assert_eq!(one(&mut pool, 1, at(0)), ip("10.244.1.2"));
    release(&mut pool, 1, at(5));
    assert_eq!(pool.resting_since(ip("10.244.1.2")), Some(at(5)));
    assert_eq!(chosen(&mut pool, 2, &["10.244.1.2"]).unwrap(), ["10.244.1.2"]);
    assert_eq!(pool.resting_since(ip("10.244.1.2")), None);
    assert_eq!(chosen(&mut pool, 3, &["10.244.1.4"]).unwrap(), ["10.244.1.4"]);
    release(&mut pool, 3, at(6));
    let rest: Vec<String> = (10..14).map(|n| one(&mut pool, n, at(7)).to_string()).collect();
    assert_eq!(rest, ["10.244.1.3", "10.244.1.5", "10.244.1.6", "10.244.1.4"], "as any that was released");
}

#[test]
fn the_first_range_that_has_room_gives_and_a_full_family_names_all_its_ranges() {
    let mut pool = pool(&["10.244.1.0/30", "fd00::/64", "10.245.1.0/30"]);
    let given = |pool: &mut Pool, n, now| {
        let given = pool.allocate(&owner(n), &[], now).unwrap().addresses;
        given.iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(given(&mut pool, 1, at(0)), ["10.244.1.2", "fd00::2"]);
    assert_eq!(given(&mut pool, 2, at(0)), ["10.245.1.2", "fd00::3"]);
    let full = pool.allocate(&owner(3), &[], at(0)).unwrap_err().to_string();
    assert_eq!(full, "no free address in 10.244.1.0/30, 10.245.1.0/30: 2 of 2 are taken");
    assert_eq!(pool.usage().iter().map(|usage| usage.taken).collect::<Vec<_>>(), [1, 2, 1]);
    // Released longest ago, whichever range it is of.
    release(&mut pool, 2, at(1));
    release(&mut pool, 1, at(2));
    assert_eq!(given(&mut pool, 4, at(50))[0], "10.245.1.2");
    assert_eq!(given(&mut pool, 5, at(50))[0], "10.244.1.2");
    release(&mut pool, 5, at(51));
    pool.set_ranges(&["10.244.1.0/30", "fd00::/64", "10.245.1.0/29"].map(|range| range.parse().unwrap())).unwrap();
    assert_eq!(given(&mut pool, 6, at(52))[0], "10.245.1.3", "fresh before what rests in an earlier range");
}

#[test]
fn an_address_that_is_chosen_may_be_of_any_range() {
    let mut pool = pool(&["10.244.1.0/24", "fd00::/64", "10.245.1.0/24", "fd00:0:0:5::/64"]);
    assert_eq!(chosen(&mut pool, 1, &["10.245.1.9"]).unwrap(), ["10.245.1.9", "fd00::2"]);
    assert_eq!(chosen(&mut pool, 2, &["fd00:0:0:5::9", "10.244.1.9"]).unwrap(), ["10.244.1.9", "fd00:0:0:5::9"]);
    assert!(matches!(chosen(&mut pool, 3, &["10.245.1.1"]), Err(IpamError::Reserved { .. })));
    assert!(matches!(chosen(&mut pool, 3, &["fd00:0:0:5::9"]), Err(IpamError::Taken { .. })));
}

#[test]
fn a_range_that_is_closed_gives_nothing_and_who_has_of_it_keeps_it() {
    let mut pool = pool(&["10.244.1.0/30", "10.245.1.0/24"]);
    one(&mut pool, 1, at(0));
    assert_eq!(one(&mut pool, 2, at(0)), ip("10.245.1.2"));
    pool.close(&["10.245.1.0/24".parse().unwrap()]);
    assert_eq!(one(&mut pool, 2, at(0)), ip("10.245.1.2"), "who asks again");
    let full = pool.allocate(&owner(3), &[], at(0)).unwrap_err().to_string();
    assert_eq!(full, "no free address in 10.244.1.0/30: 1 of 1 are taken");
    let elsewhere = chosen(&mut pool, 3, &["10.245.1.9"]).unwrap_err().to_string();
    assert!(elsewhere.contains("(10.244.1.0/30)"), "{elsewhere}");
    assert_eq!(
        pool.usage().iter().map(|usage| (usage.taken, usage.closed)).collect::<Vec<_>>(),
        [(1, false), (1, true)]
    );
    release(&mut pool, 2, at(1));
    assert!(pool.allocate(&owner(3), &[], at(99)).is_err(), "nor what rests");
    pool.close(&[]);
    assert_eq!(one(&mut pool, 4, at(99)), ip("10.245.1.3"));
    pool.close(&["10.244.1.0/30", "10.245.1.0/24"].map(|range| range.parse().unwrap()));
    assert_eq!(pool.allocate(&owner(9), &[], at(99)), Err(IpamError::NoRange));
}

#[derive(Clone, Debug)]
enum Step {
    Allocate(u32),
    /// The address of that number, of IPv4.
    Choose(u32, u8),
    Release(u32),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u32..12).prop_map(Step::Allocate),
        3 => (0u32..12, 0u8..18).prop_map(|(n, host)| Step::Choose(n, host)),
        3 => (0u32..12).prop_map(Step::Release),
        1 => (0u64..40).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..120)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Against a model that knows only who holds what and when each address was released.
    #[test]
    fn any_sequence_keeps_the_promises(steps in steps(), parts in 1usize..4) {
        // The same addresses in one range or in several, of which each has a network, a gateway and a broadcast address.
        let (ranges, without): (&[&str], &[u8]) = match parts {
            1 => (&["10.0.0.0/28", "fd00::/124"], &[]),
            2 => (&["10.0.0.8/29", "fd00::/124", "10.0.0.0/29"], &[7, 8, 9]),
            _ => (&["10.0.0.0/29", "10.0.0.8/29", "fd00::/125", "fd00::8/125"], &[7, 8, 9]),
        };
        let mut pool = pool(ranges);
        let usable: Vec<IpAddr> = (2..15u8).filter(|n| !without.contains(n)).map(|n| IpAddr::from([10, 0, 0, n])).collect();
        let mut held: BTreeMap<u32, Vec<IpAddr>> = BTreeMap::new();
        let mut released: BTreeMap<IpAddr, Duration> = BTreeMap::new();
        let mut now = at(0);
        for step in steps {
            match step {
                Step::Wait(seconds) => now += at(seconds),
                Step::Release(n) => {
                    let gone = pool.release(&Holder::Attachment(owner(n)), now);
                    prop_assert_eq!(&gone, &held.remove(&n).unwrap_or_default());
                    released.extend(gone.into_iter().map(|address| (address, now)));
                }
                Step::Choose(n, host) => {
                    let address = IpAddr::from([10, 0, 0, host]);
                    let got = pool.allocate(&owner(n), &[address], now);
                    if let Some(before) = held.get(&n) {
                        prop_assert_eq!(&got.unwrap().addresses, before);
                    } else if host >= 16 {
                        prop_assert!(matches!(got, Err(IpamError::Elsewhere { .. })), "{got:?}");
                    } else if !usable.contains(&address) {
                        prop_assert!(matches!(got, Err(IpamError::Reserved { .. })), "{got:?}");
                    } else if held.values().flatten().any(|taken| *taken == address) {
                        prop_assert!(matches!(got, Err(IpamError::Taken { .. })), "{got:?}");
                    } else {
                        let got = got.unwrap().addresses;
                        prop_assert_eq!(got[0], address);
                        prop_assert!(got.len() == 2 && held.values().flatten().all(|taken| *taken != got[1]), "given twice");
                        for address in &got {
                            released.remove(address);
                        }
                        held.insert(n, got);
                    }
                }
                Step::Allocate(n) => {
                    let got = pool.allocate(&owner(n), &[], now);
                    if !held.contains_key(&n) && held.len() == usable.len() {
                        prop_assert!(matches!(got, Err(IpamError::Exhausted { .. })), "{got:?}");
                        continue;
                    }
                    let got = got.unwrap().addresses;
                    if let Some(before) = held.get(&n) {
                        prop_assert_eq!(&got, before);
                        continue;
                    }
                    prop_assert_eq!(got.len(), 2);
                    prop_assert!(usable.contains(&got[0]));
                    prop_assert!(held.values().flatten().all(|taken| !got.contains(taken)), "given twice");
                    let free = |a: &&IpAddr| held.values().flatten().all(|taken| taken != *a);
                    if let Some(when) = released.get(&got[0]) {
                        for other in usable.iter().filter(free) {
                            let before = released.get(other);
                            prop_assert!(before.is_some(), "{other} is fresh");
                            prop_assert!(before >= Some(when), "{other} was released earlier");
                        }
                    }
                    for address in &got {
                        released.remove(address);
                    }
                    held.insert(n, got);
                }
            }
            let v4 = pool.usage().into_iter().filter(|usage| usage.range.addr().is_ipv4());
            prop_assert_eq!(v4.map(|usage| usage.taken).sum::<u128>(), held.len() as u128);
        }
    }
}
