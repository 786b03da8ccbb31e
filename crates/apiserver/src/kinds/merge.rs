//! How the fields of built-in types merge, read from `merge.txt`.

use std::borrow::Cow;
use std::collections::{HashMap, HashSet};

use crate::resource::{FieldMerge, ListMerge};

static TABLE: &str = include_str!("merge.txt");

/// A field that is no list and merges field by field.
pub(crate) const GRANULAR: FieldMerge =
    FieldMerge { list: None, atomic_map: false, patch_merge_key: None, patch_merge: false, retain_keys: false };

/// What the table says.
pub(crate) struct MergeTable {
    fields: HashMap<(&'static str, &'static str), Vec<&'static str>>,
    atomic_types: HashSet<&'static str>,
}

impl MergeTable {
    /// Reads the table.
    pub(crate) fn read() -> MergeTable {
        let mut table = MergeTable { fields: HashMap::new(), atomic_types: HashSet::new() };
        let mut owner = "";
        for line in TABLE.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                owner = name;
                continue;
            }
            let mut words = line.split_whitespace();
            match words.next() {
                Some("*") => {
                    table.atomic_types.insert(owner);
                }
                Some(field) => {
                    table.fields.insert((owner, field), words.collect());
                }
                None => {}
            }
        }
        table
    }

    /// How the field `name` of the type with full name `owner` merges; `target` is the type of the field when it is an object.
    pub(crate) fn field(&self, owner: &str, name: &str, target: Option<&str>, is_list: bool) -> FieldMerge {
        let mut merge = FieldMerge { list: is_list.then_some(ListMerge::Atomic), ..GRANULAR };
        merge.atomic_map = target.is_some_and(|target| self.atomic_types.contains(short(target)));
        let words = self.fields.get(&(short(owner), name)).map(Vec::as_slice).unwrap_or_default();
        for word in words {
            let (word, keys) = match word.split_once('(') {
                Some((word, keys)) => (word, keys.trim_end_matches(')')),
                None => (*word, ""),
            };
            match word {
                "set" => merge.list = Some(ListMerge::Set),
                "map" => {
                    merge.list = Some(ListMerge::Map(keys.split(',').map(|key| Cow::Owned(key.to_owned())).collect()))
                }
                "atomic" => merge.atomic_map = true,
                "merge" => {
                    merge.patch_merge = true;
                    merge.patch_merge_key = (!keys.is_empty()).then(|| Cow::Owned(keys.to_owned()));
                }
                "retainKeys" => merge.retain_keys = true,
                _ => {}
            }
        }
        merge
    }

    /// Whether objects of this type are owned and replaced whole.
    pub(crate) fn is_atomic(&self, name: &str) -> bool {
        self.atomic_types.contains(short(name))
    }
}

/// `core.v1.Pod` of `io.k8s.api.core.v1.Pod`: the last three words.
fn short(name: &str) -> &str {
    let mut dots = name.rmatch_indices('.').map(|(place, _)| place).skip(2);
    dots.next().and_then(|place| name.get(place + 1..)).unwrap_or(name)
}
