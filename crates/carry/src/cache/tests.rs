use std::sync::Arc;
use std::time::Duration;

use tokio::time::Instant;

use super::{Cache, Key, MAX_BYTES, STALE_FOR};
use crate::message::{Response, response};

fn key(name: &str) -> Key {
    Key { name: name.to_owned(), qtype: 1, dnssec_ok: false, checking_disabled: false }
}

/// An answer of about `size` bytes that may be kept for `ttl` seconds.
fn answer(ttl: u32, size: usize) -> Arc<Response> {
    let mut bytes = vec![0, 1, 0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 16, 0, 1];
    bytes.extend_from_slice(&[0, 0, 16, 0, 1]);
    bytes.extend_from_slice(&ttl.to_be_bytes());
    bytes.extend_from_slice(&u16::try_from(size).unwrap().to_be_bytes());
    bytes.resize(bytes.len() + size, 0);
    Arc::new(response::parse(&bytes, 1, &[0], 16).unwrap())
}

#[test]
fn an_answer_is_fresh_for_its_time_stale_for_a_while_and_then_gone() {
    let (mut cache, start) = (Cache::default(), Instant::now());
    cache.insert(key("a"), answer(60, 4), 3600, start);
    let at = |seconds| start + Duration::from_secs(seconds);
    let hit = cache.get(&key("a"), at(59)).unwrap();
    assert_eq!((hit.age, hit.stale), (59, false));
    assert!(cache.get(&key("a"), at(60)).unwrap().stale);
    assert!(cache.get(&key("a"), at(60) + STALE_FOR).is_none());
    assert!(cache.get(&Key { dnssec_ok: true, ..key("a") }, start).is_none(), "another question");
}

#[test]
fn an_answer_that_may_not_be_kept_is_not() {
    let mut cache = Cache::default();
    cache.insert(key("a"), answer(0, 4), 3600, Instant::now());
    assert_eq!(cache.size(), (0, 0));
}

#[test]
fn memory_is_bounded_and_the_oldest_make_room() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    for round in 0..20_000 {
        cache.insert(key(&format!("name-{round}")), answer(60, 1000), 3600, now);
        assert!(cache.size().1 <= MAX_BYTES);
    }
    assert!(cache.get(&key("name-0"), now).is_none());
    assert!(cache.get(&key("name-19999"), now).is_some());
    assert!(cache.size().0 > 1000);
}

#[test]
fn replacing_an_answer_again_and_again_does_not_grow_anything() {
    let (mut cache, now) = (Cache::default(), Instant::now());
    for _ in 0..10_000 {
        cache.insert(key("a"), answer(60, 1000), 3600, now);
    }
    assert_eq!(cache.size().0, 1);
    assert!(cache.size().1 < 2000 && cache.order.len() < 100);
}
