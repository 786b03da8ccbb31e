//! What many objects say alike, kept once: names of nodes, and of pods their labels and named ports.
//!
//! A node keeps every pod and every endpoint of the cluster. The pods of one template say the same but for their names and addresses, and what
//! they say takes several times as much room as those.

use std::collections::HashSet;
use std::hash::Hash;

use towpath_wire::shared::Shared;

use crate::{Labels, NamedPort, NodeNames};

/// With fewer values it is not looked which of them are still said.
const LEAST: usize = 64;

/// What was said so far, by kind of what it is.
#[derive(Debug, Default)]
pub struct Sharing {
    /// Names of nodes.
    pub nodes: NodeNames,
    /// Labels of pods.
    pub labels: Pool<Labels>,
    /// Named ports of pods.
    pub named_ports: Pool<Vec<NamedPort>>,
}

/// Values that are kept once while anybody says them.
#[derive(Debug)]
pub struct Pool<T> {
    known: HashSet<Shared<T>>,
    /// With so many it is looked which of them are still said.
    most: usize,
}

impl<T> Default for Pool<T> {
    fn default() -> Self {
        Self { known: HashSet::new(), most: LEAST }
    }
}

impl<T: Eq + Hash> Pool<T> {
    /// Has `value` be the one that the others have who say the same.
    pub fn share(&mut self, value: &mut Shared<T>) {
        if let Some(known) = self.known.get(value) {
            value.clone_from(known);
            return;
        }
        if self.known.len() >= self.most {
            self.known.retain(|known| !known.is_alone());
            self.most = (self.known.len() * 2).max(LEAST);
        }
        self.known.insert(value.clone());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_alike_is_kept_once_and_only_while_it_is_said() {
        let mut pool: Pool<String> = Pool::default();
        let mut said: Vec<Shared<String>> = (0..1000).map(|n| format!("v{}", n % 10).into()).collect();
        said.iter_mut().for_each(|value| pool.share(value));
        assert_eq!(pool.known.len(), 10);
        assert!(said.iter().all(|value| std::ptr::eq(&**value, &**pool.known.get(value).unwrap())));
        drop(said);
        (0..10_000).for_each(|n| pool.share(&mut format!("gone{n}").into()));
        assert!(pool.known.len() <= LEAST, "{}", pool.known.len());
    }
}
