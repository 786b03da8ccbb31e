//! Names of nodes and of namespaced objects.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A node's name (DNS-1123 subdomain, checked by the API server). Its copies share one text: each endpoint says one.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeName(Arc<str>);

impl Serialize for NodeName {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for NodeName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::new)
    }
}

impl NodeName {
    /// Wraps a name that an API object carries.
    pub fn new(name: impl Into<String>) -> Self {
        Self(name.into().into())
    }

    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Names of nodes that many objects say: each text is kept once. What nobody says any more is forgotten now and then.
#[derive(Debug, Default)]
pub struct NodeNames {
    known: BTreeSet<NodeName>,
    /// With so many it is looked which of them are still said.
    most: usize,
}

impl NodeNames {
    /// The same name, with the text that the others have.
    pub fn shared(&mut self, name: &NodeName) -> NodeName {
        if let Some(known) = self.known.get(name) {
            return known.clone();
        }
        if self.known.len() >= self.most {
            self.known.retain(|known| Arc::strong_count(&known.0) > 1);
            self.most = (self.known.len() * 2).max(64);
        }
        self.known.insert(name.clone());
        name.clone()
    }
}

/// Namespace and name of an object, shown as `namespace/name`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NamespacedName {
    /// The namespace.
    pub namespace: String,
    /// The name within it.
    pub name: String,
}

impl NamespacedName {
    /// Both parts.
    pub fn new(namespace: impl Into<String>, name: impl Into<String>) -> Self {
        Self { namespace: namespace.into(), name: name.into() }
    }
}

impl fmt::Display for NamespacedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_kept_once_and_only_while_it_is_said() {
        let mut names = NodeNames::default();
        let said: Vec<NodeName> = (0..1000).map(|n| names.shared(&NodeName::new(format!("n{}", n % 10)))).collect();
        assert_eq!(names.known.len(), 10);
        assert!(said.iter().all(|name| Arc::ptr_eq(&name.0, &names.known.get(name).unwrap().0)));
        drop(said);
        (0..10_000).for_each(|n| drop(names.shared(&NodeName::new(format!("gone{n}")))));
        assert!(names.known.len() <= 64, "{}", names.known.len());
    }

    #[test]
    fn a_node_name_is_written_as_its_text() {
        let name = NodeName::new("n1");
        assert_eq!(serde_json::to_string(&name).unwrap(), "\"n1\"");
        assert_eq!(serde_json::from_str::<NodeName>("\"n1\"").unwrap(), name);
    }
}
