//! Names of pods as one text each: compiler and check keep one of every pod of the cluster, and two texts take twice as much.

use std::sync::Arc;

use towpath_model::NamespacedName;

/// A pod's namespace and name in one text. They sort as the names do.
pub(crate) type PodName = Arc<str>;

/// The text of a name.
pub(crate) fn text(name: &NamespacedName) -> String {
    format!("{}\0{}", name.namespace, name.name)
}

/// The name of a text.
pub(crate) fn name_of(text: &str) -> NamespacedName {
    let (namespace, name) = text.split_once('\0').unwrap_or_default();
    NamespacedName::new(namespace, name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_the_names_and_sort_as_they_do() {
        let mut names =
            [("a", "z"), ("a-b", "a"), ("a.b", "a"), ("ab", ""), ("a", "")].map(|(n, p)| NamespacedName::new(n, p));
        names.sort();
        let mut texts: Vec<String> = names.iter().map(text).collect();
        assert_eq!(texts.iter().map(|text| name_of(text)).collect::<Vec<_>>(), names);
        texts.sort();
        assert_eq!(texts, names.iter().map(text).collect::<Vec<_>>());
    }
}
