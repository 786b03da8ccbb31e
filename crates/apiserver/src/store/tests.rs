//! Versions, windows, durability and restarts of the store.

use serde_json::json;

use super::*;
use crate::resource::GroupVersionKind;

fn object(name: &str, label: &str) -> Value {
    json!({"metadata": {"name": name, "namespace": "a", "labels": {"l": label}}})
}

fn open(dir: &tempfile::TempDir) -> Store {
    Store::open(&dir.path().join("objects.redb"), Durability::Synced).unwrap()
}

#[tokio::test]
async fn a_restart_keeps_objects_and_never_reuses_a_version() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let key = Key::new("a", "x");
    let written = store.put("t", &key, object("x", "1"), Expect::Absent).unwrap();
    store.wait_durable(written.version).await.unwrap();
    store.close();
    drop(store);
    let store = open(&dir);
    assert!(store.version() > written.version);
    let found = store.get("t", &key).unwrap();
    assert_eq!(found.version, written.version);
    assert_eq!(found.labels.len(), 1);
    assert!(store.events_after("t", written.version).is_err(), "events before the restart are gone");
}

#[tokio::test]
async fn writes_are_refused_when_the_object_changed() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let key = Key::new("a", "x");
    let first = store.put("t", &key, object("x", "1"), Expect::Absent).unwrap().version;
    assert!(matches!(store.put("t", &key, object("x", "2"), Expect::Absent), Err(WriteRefused::Exists)));
    let second = store.put("t", &key, object("x", "2"), Expect::Version(first)).unwrap().version;
    assert!(matches!(store.put("t", &key, object("x", "3"), Expect::Version(first)), Err(WriteRefused::Changed)));
    assert!(matches!(store.remove("t", &key, object("x", "3"), first), Err(WriteRefused::Changed)));
    store.remove("t", &key, object("x", "2"), second).unwrap();
    assert!(matches!(store.put("t", &key, object("x", "3"), Expect::Version(second)), Err(WriteRefused::Absent)));
}

#[tokio::test]
async fn watchers_see_all_events_in_order_and_only_durable_ones() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let mut changed = store.subscribe("t");
    let start = store.version();
    let mut last = 0;
    for n in 0..20 {
        last = store.put("t", &Key::new("a", &format!("x{n}")), object("x", "1"), Expect::Absent).unwrap().version;
    }
    changed.wait_for(|version| *version >= last).await.unwrap();
    let (events, upto) = store.events_after("t", start).unwrap();
    assert_eq!(upto, last);
    let versions: Vec<u64> = events.iter().map(|event| event.version).collect();
    assert_eq!(versions, (start + 1..=last).collect::<Vec<_>>());
}

#[tokio::test]
async fn a_list_at_an_earlier_version_shows_that_state() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let (x, y) = (Key::new("a", "x"), Key::new("a", "y"));
    let first = store.put("t", &x, object("x", "1"), Expect::Absent).unwrap().version;
    let second = store.put("t", &y, object("y", "1"), Expect::Absent).unwrap().version;
    let third = store.put("t", &x, object("x", "2"), Expect::Version(first)).unwrap().version;
    store.remove("t", &y, object("y", "1"), second).unwrap();
    let names = |version| -> Vec<(String, u64)> {
        let list = store.list_at("t", Some("a"), version).unwrap();
        list.iter().map(|stored| (stored.key.name.to_string(), stored.version)).collect()
    };
    assert_eq!(names(second), [("x".to_owned(), first), ("y".to_owned(), second)]);
    assert_eq!(names(third), [("x".to_owned(), third), ("y".to_owned(), second)]);
    assert_eq!(names(third + 1), [("x".to_owned(), third)]);
}

#[tokio::test]
async fn a_watcher_that_fell_out_of_the_window_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let start = store.version();
    let key = Key::new("a", "x");
    let mut version = store.put("t", &key, object("x", "0"), Expect::Absent).unwrap().version;
    for n in 0..2100 {
        version = store.put("t", &key, object("x", &n.to_string()), Expect::Version(version)).unwrap().version;
    }
    store.wait_durable(version).await.unwrap();
    let oldest = store.events_after("t", start).unwrap_err().oldest;
    assert!(store.events_after("t", oldest).is_ok());
}

#[tokio::test]
async fn a_list_of_a_table_that_was_never_written_can_be_watched_from_its_version() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let listed = store.version();
    store.put("busy", &Key::new("a", "x"), object("x", "1"), Expect::Absent).unwrap();
    // The first watcher comes after others have moved the version on.
    drop(store.subscribe("quiet"));
    assert!(store.events_after("quiet", listed).is_ok_and(|(events, _)| events.is_empty()));
}

#[tokio::test]
async fn a_field_is_looked_for_once_in_each_version_of_a_kind_and_anew_when_the_object_is_another() {
    let dir = tempfile::tempdir().unwrap();
    let store = open(&dir);
    let key = Key::new("a", "x");
    let kind = |group: &'static str| GroupVersionKind { group: group.into(), version: "v1".into(), kind: "K".into() };
    let never = || -> String { panic!("it is known") };
    let version = store.put("t", &key, object("x", "1"), Expect::Absent).unwrap().version;
    let first = store.get("t", &key).unwrap();
    assert!(first.field_is(&kind("one"), "spec.node", "n1", || "n1".to_owned()));
    assert!(
        first.field_is(&kind("one"), "spec.node", "n1", never)
            && !first.field_is(&kind("one"), "spec.node", "n2", never)
    );
    assert!(first.field_is(&kind("two"), "spec.node", "n2", || "n2".to_owned()), "as another group has it");
    assert!(first.field_is(&kind("one"), "status.phase", "Running", || "Running".to_owned()));
    store.put("t", &key, object("x", "2"), Expect::Version(version)).unwrap();
    let second = store.get("t", &key).unwrap();
    assert!(second.field_is(&kind("one"), "spec.node", "n3", || "n3".to_owned()));
    assert!(first.field_is(&kind("one"), "spec.node", "n1", never), "as it was");
}
