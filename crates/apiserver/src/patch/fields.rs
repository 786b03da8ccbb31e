//! Sets of fields as `FieldsV1` writes them: `f:name`, `k:{"key":value}`, `v:value`.
//!
//! The meaning follows `sigs.k8s.io/structured-merge-diff`: a member is a field that is owned as a whole (a scalar, an
//! atomic list or map, or the existence of a list item or map); children are what lies below.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use crate::resource::{FieldMerge, ListMerge, Strategy};

/// A set of fields below one place.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct FieldSet {
    /// The place itself is a member.
    pub(crate) member: bool,
    /// By path element, in `FieldsV1` spelling.
    pub(crate) children: BTreeMap<String, FieldSet>,
}

impl FieldSet {
    pub(crate) fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(Self::is_empty)
    }

    pub(crate) fn parse(value: &Value) -> Self {
        let mut set = Self::default();
        let Some(map) = value.as_object() else { return set };
        for (key, below) in map {
            if key == "." {
                set.member = true;
                continue;
            }
            let mut child = Self::parse(below);
            child.member |= below.as_object().is_none_or(Map::is_empty);
            set.children.insert(key.clone(), child);
        }
        set
    }

    pub(crate) fn to_value(&self) -> Value {
        let mut map = Map::new();
        let children: Vec<(&String, &Self)> = self.children.iter().filter(|(_, child)| !child.is_empty()).collect();
        if self.member && !children.is_empty() {
            map.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (key, child) in children {
            map.insert(key.clone(), child.to_value());
        }
        Value::Object(map)
    }

    pub(crate) fn child(&mut self, element: &str) -> &mut Self {
        self.children.entry(element.to_owned()).or_default()
    }

    pub(crate) fn union(&mut self, other: &Self) {
        self.member |= other.member;
        for (key, child) in &other.children {
            self.child(key).union(child);
        }
    }

    /// Removes the members of the other set.
    pub(crate) fn subtract(&mut self, other: &Self) {
        self.member &= !other.member;
        for (key, child) in &other.children {
            if let Some(mine) = self.children.get_mut(key) {
                mine.subtract(child);
                if mine.is_empty() {
                    self.children.remove(key);
                }
            }
        }
    }

    /// The members that both have.
    pub(crate) fn intersection(&self, other: &Self) -> Self {
        let mut both = Self { member: self.member && other.member, children: BTreeMap::new() };
        for (key, child) in &self.children {
            if let Some(theirs) = other.children.get(key) {
                let common = child.intersection(theirs);
                if !common.is_empty() {
                    both.children.insert(key.clone(), common);
                }
            }
        }
        both
    }

    /// The members as paths for people: `.spec.containers[name="a"].image`.
    pub(crate) fn paths(&self) -> Vec<String> {
        let mut out = Vec::new();
        self.collect_paths("", &mut out);
        out
    }

    fn collect_paths(&self, prefix: &str, out: &mut Vec<String>) {
        if self.member {
            out.push(prefix.to_owned());
        }
        for (key, child) in &self.children {
            child.collect_paths(&format!("{prefix}{}", readable(key)), out);
        }
    }

    /// Fields that no manager owns: identity and what the server sets.
    pub(crate) fn strip_identity(&mut self) {
        self.children.remove("f:apiVersion");
        self.children.remove("f:kind");
        if let Some(metadata) = self.children.get_mut("f:metadata") {
            metadata.member = false;
            for field in [
                "name",
                "namespace",
                "creationTimestamp",
                "selfLink",
                "uid",
                "generation",
                "managedFields",
                "resourceVersion",
                "deletionTimestamp",
                "deletionGracePeriodSeconds",
            ] {
                metadata.children.remove(&format!("f:{field}"));
            }
        }
        self.children.retain(|_, child| !child.is_empty());
        self.member = false;
    }
}

fn readable(element: &str) -> String {
    match element.split_at_checked(2) {
        Some(("f:", name)) => format!(".{name}"),
        Some(("k:", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let pairs: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", pairs.join(","))
        }
        Some(("v:", value)) => format!("[={value}]"),
        Some(("i:", index)) => format!("[{index}]"),
        _ => format!(".{element}"),
    }
}

/// A place in an object: the field names from the root; list items are not named.
pub(crate) struct Place<'a> {
    strategy: &'a dyn Strategy,
    names: Vec<&'a str>,
}

impl<'a> Place<'a> {
    pub(crate) fn root(strategy: &'a dyn Strategy) -> Self {
        Self { strategy, names: Vec::new() }
    }

    pub(crate) fn field<'b>(&'b self, name: &'b str) -> Place<'b> {
        let mut names: Vec<&'b str> = self.names.clone();
        names.push(name);
        Place { strategy: self.strategy, names }
    }

    pub(crate) fn merge(&self) -> FieldMerge {
        if self.names.is_empty() {
            return FieldMerge {
                list: None,
                atomic_map: false,
                patch_merge_key: None,
                patch_merge: false,
                retain_keys: false,
            };
        }
        self.strategy.merge(&self.names)
    }

    /// Whether `managedFields` of an update notes the existence of a map at this place: not of the structs that always are.
    fn notes_map(&self) -> bool {
        self.names.len() > 1 && !matches!(self.names.last(), Some(&("template" | "spec" | "metadata" | "status")))
    }
}

/// How a value's inside is owned.
pub(crate) enum Shape<'v> {
    /// As a whole.
    Leaf,
    /// Field by field.
    Map(&'v Map<String, Value>),
    /// Item by item: the element of each, and the item when it has an inside.
    Items(Vec<(String, &'v Value, bool)>),
}

pub(crate) fn shape<'v>(place: &Place<'_>, value: &'v Value) -> Shape<'v> {
    match value {
        Value::Object(map) if !map.is_empty() => {
            if place.merge().atomic_map {
                Shape::Leaf
            } else {
                Shape::Map(map)
            }
        }
        Value::Array(items) => match place.merge().list {
            Some(ListMerge::Set) => Shape::Items(items.iter().map(|item| (format!("v:{item}"), item, false)).collect()),
            Some(ListMerge::Map(keys)) if items.iter().all(Value::is_object) => {
                Shape::Items(items.iter().map(|item| (item_element(&keys, item), item, true)).collect())
            }
            _ => Shape::Leaf,
        },
        _ => Shape::Leaf,
    }
}

/// `k:{"containerPort":80,"protocol":"TCP"}`.
pub(crate) fn item_element(keys: &[std::borrow::Cow<'static, str>], item: &Value) -> String {
    let mut names: Vec<&str> = keys.iter().map(AsRef::as_ref).collect();
    names.sort_unstable();
    let mut map = Map::new();
    for name in names {
        match item.get(name) {
            Some(value) => {
                map.insert(name.to_owned(), value.clone());
            }
            // The only list key with a default in the built-in schemas.
            None if name == "protocol" => {
                map.insert(name.to_owned(), "TCP".into());
            }
            None => {}
        }
    }
    format!("k:{}", Value::Object(map))
}

/// The fields of an applied configuration.
pub(crate) fn fields_of(place: &Place<'_>, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    match shape(place, value) {
        Shape::Leaf => set.member = true,
        Shape::Map(map) => {
            for (name, below) in map {
                set.children.insert(format!("f:{name}"), fields_of(&place.field(name), below));
            }
        }
        Shape::Items(items) => {
            for (element, item, inside) in items {
                let mut child = if inside { fields_of(place, item) } else { FieldSet::default() };
                child.member = true;
                set.children.insert(element, child);
            }
        }
    }
    set
}

/// Every field of a value with the existence of its maps and items: what an update that adds the value owns.
fn fields_with_maps(place: &Place<'_>, value: &Value) -> FieldSet {
    let mut set = FieldSet::default();
    match shape(place, value) {
        Shape::Leaf => set.member = true,
        Shape::Map(map) => {
            set.member = place.notes_map();
            for (name, below) in map {
                set.children.insert(format!("f:{name}"), fields_with_maps(&place.field(name), below));
            }
        }
        Shape::Items(items) => {
            for (element, item, inside) in items {
                let mut child = if inside { fields_with_maps(place, item) } else { FieldSet::default() };
                child.member = true;
                set.children.insert(element, child);
            }
        }
    }
    set
}

/// What differs between two states: added or changed fields, and removed ones.
#[derive(Debug, Default)]
pub(crate) struct Difference {
    pub(crate) changed: FieldSet,
    pub(crate) removed: FieldSet,
}

impl Difference {
    pub(crate) fn between(strategy: &dyn Strategy, old: &Value, new: &Value) -> Self {
        let mut difference = Self::default();
        diff(&Place::root(strategy), Some(old), Some(new), &mut difference.changed, &mut difference.removed);
        difference.changed.strip_identity();
        difference.removed.strip_identity();
        difference
    }
}

fn diff(place: &Place<'_>, old: Option<&Value>, new: Option<&Value>, changed: &mut FieldSet, removed: &mut FieldSet) {
    let (old, new) = match (old, new) {
        (None, None) => return,
        (None, Some(new)) => return changed.union(&fields_with_maps(place, new)),
        (Some(old), None) => return removed.union(&fields_with_maps(place, old)),
        (Some(old), Some(new)) => (old, new),
    };
    if old == new {
        return;
    }
    match (shape(place, old), shape(place, new)) {
        (Shape::Map(old), Shape::Map(new)) => diff_maps(place, old, new, changed, removed),
        (Shape::Items(old), Shape::Items(new)) => {
            let (old, new): (BTreeMap<_, _>, BTreeMap<_, _>) = (by_element(old), by_element(new));
            for element in old.keys().chain(new.keys().filter(|key| !old.contains_key(*key))) {
                let (was, is) = (old.get(element), new.get(element));
                let (mut inner, mut gone) = (FieldSet::default(), FieldSet::default());
                match (was, is) {
                    (Some((was, true)), Some((is, true))) => {
                        diff(place, Some(was), Some(is), &mut inner, &mut gone);
                    }
                    (None, Some((is, inside))) => {
                        inner = if *inside { fields_with_maps(place, is) } else { FieldSet::default() };
                        inner.member = true;
                    }
                    (Some((was, inside)), None) => {
                        gone = if *inside { fields_with_maps(place, was) } else { FieldSet::default() };
                        gone.member = true;
                    }
                    _ => {}
                }
                merge_child(changed, element, inner);
                merge_child(removed, element, gone);
            }
        }
        // An empty map or list that gets content, or loses all of it.
        (Shape::Leaf, Shape::Map(_) | Shape::Items(_)) => changed.union(&fields_with_maps(place, new)),
        (Shape::Map(_) | Shape::Items(_), Shape::Leaf) => {
            removed.union(&fields_with_maps(place, old));
            changed.member = true;
        }
        _ => changed.member = true,
    }
}

fn by_element(items: Vec<(String, &Value, bool)>) -> BTreeMap<String, (&Value, bool)> {
    items.into_iter().map(|(element, item, inside)| (element, (item, inside))).collect()
}

fn diff_maps(
    place: &Place<'_>,
    old: &Map<String, Value>,
    new: &Map<String, Value>,
    changed: &mut FieldSet,
    removed: &mut FieldSet,
) {
    for name in old.keys().chain(new.keys().filter(|name| !old.contains_key(*name))) {
        let (mut inner, mut gone) = (FieldSet::default(), FieldSet::default());
        diff(&place.field(name), old.get(name), new.get(name), &mut inner, &mut gone);
        let element = format!("f:{name}");
        merge_child(changed, &element, inner);
        merge_child(removed, &element, gone);
    }
}

fn merge_child(set: &mut FieldSet, element: &str, child: FieldSet) {
    if !child.is_empty() {
        set.child(element).union(&child);
    }
}
