//! What a node still lacks of what is wanted.

use std::fmt;

use anyhow::Result;
use serde::{Serialize, Serializer};
use towpath_wire::policy::InForce;

use super::wanted::{Object, Wanted};

/// One object that a node does not enforce as it should.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Behind {
    /// The agent's kernel has nothing of it.
    Absent(Object),
    /// It has an older version.
    Older(Object),
    /// It was deleted, and holds.
    Deleted(Object),
    /// The node has no room for its rules, and closes the pods that it selects.
    Aside(Object),
}

impl Behind {
    /// Whether it is one of the objects that are wanted.
    pub(super) fn is_wanted(&self) -> bool {
        !matches!(self, Self::Deleted(_))
    }
}

impl fmt::Display for Behind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent(object) => write!(f, "{object} is not in force yet"),
            Self::Older(object) => write!(f, "{object} is in force as it was before"),
            Self::Deleted(object) => write!(f, "{object} is deleted and still in force"),
            Self::Aside(object) => write!(
                f,
                "{object} asks for more than the node has room for: nobody is admitted where it isolates (`towpath status` says what is full)"
            ),
        }
    }
}

impl Serialize for Behind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A node, and what it lacks.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct NodeView {
    /// Its name.
    pub(super) node: String,
    /// Why it did not answer, or cannot enforce.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) failing: Option<String>,
    /// What it lacks.
    pub(super) behind: Vec<Behind>,
    /// Deleted policies that hold on purpose.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) outliving: Vec<String>,
}

impl NodeView {
    /// What an answer, or none, means against what is wanted.
    pub(super) fn of(node: String, answer: Result<InForce>, wanted: &Wanted) -> Self {
        match answer {
            Ok(answer) => {
                let failing = Some(answer.failing.clone()).filter(|why| !why.is_empty());
                Self { node, failing, behind: behind(&answer, wanted), outliving: answer.outliving }
            }
            Err(error) => Self {
                node,
                failing: Some(format!("{error:#}")),
                behind: wanted.objects.keys().cloned().map(Behind::Absent).collect(),
                outliving: Vec::new(),
            },
        }
    }

    /// Whether the node enforces what is wanted.
    pub(super) fn is_in_force(&self) -> bool {
        self.failing.is_none() && self.behind.is_empty()
    }
}

fn behind(answer: &InForce, wanted: &Wanted) -> Vec<Behind> {
    let mut all: Vec<Behind> = Vec::new();
    for (object, version) in &wanted.objects {
        let of_kind = answer.kinds.get(object.kind.name());
        let in_force = match of_kind {
            // Of a kind that is not named, everything up to the newest.
            Some(kind) => kind.objects.as_ref().map_or(Some(kind.newest), |named| named.get(&object.name).copied()),
            None => None,
        };
        let aside = answer.aside.iter().any(|aside| aside.split_once(' ') == Some((object.kind.name(), &object.name)));
        match in_force {
            Some(_) if aside => all.push(Behind::Aside(object.clone())),
            Some(in_force) if in_force >= *version => {}
            Some(_) => all.push(Behind::Older(object.clone())),
            None => all.push(Behind::Absent(object.clone())),
        }
    }
    for (kind, at) in &wanted.complete {
        let named = answer.kinds.get(kind.name()).and_then(|of_kind| of_kind.objects.as_ref());
        for (name, version) in named.into_iter().flatten() {
            let object = Object { kind: *kind, name: name.clone() };
            // What is newer than the list was made since; what outlives its object does so on purpose.
            if !wanted.objects.contains_key(&object) && version <= at && !answer.outliving.contains(name) {
                all.push(Behind::Deleted(object));
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use towpath_wire::policy::KindInForce;

    use super::super::wanted::Kind;
    use super::*;

    fn policy(name: &str) -> Object {
        Object { kind: Kind::NetworkPolicy, name: name.to_owned() }
    }

    fn wanted(complete: bool) -> Wanted {
        let pod = Object { kind: Kind::Pod, name: "a/web".to_owned() };
        Wanted {
            objects: BTreeMap::from([(policy("a/p"), 7), (policy("a/q"), 9), (pod, 20)]),
            complete: complete.then_some((Kind::NetworkPolicy, 15)).into_iter().collect(),
        }
    }

    fn answer(policies: &[(&str, u64)], pods: u64) -> InForce {
        let objects = policies.iter().map(|(name, version)| ((*name).to_owned(), *version)).collect();
        let policies = KindInForce { newest: 0, objects: Some(objects) };
        let pods = KindInForce { newest: pods, objects: None };
        let kinds = [("NetworkPolicy".to_owned(), policies), ("Pod".to_owned(), pods)].into();
        InForce { kinds, ..InForce::default() }
    }

    fn said(answer: InForce, complete: bool) -> Vec<String> {
        NodeView::of("n1".to_owned(), Ok(answer), &wanted(complete)).behind.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn a_node_is_behind_by_what_is_older_absent_or_deleted() {
        assert!(said(answer(&[("a/p", 7), ("a/q", 10)], 20), true).is_empty());
        assert_eq!(
            said(answer(&[("a/p", 6), ("a/q", 9)], 20), true),
            ["networkpolicy/a/p is in force as it was before"]
        );
        assert_eq!(said(answer(&[("a/p", 7)], 20), true), ["networkpolicy/a/q is not in force yet"]);
        assert_eq!(said(answer(&[("a/p", 7), ("a/q", 9)], 19), true), ["pod/a/web is in force as it was before"]);
        let gone = answer(&[("a/p", 7), ("a/q", 9), ("a/gone", 15)], 20);
        assert_eq!(said(gone.clone(), true), ["networkpolicy/a/gone is deleted and still in force"]);
        let outliving = InForce { outliving: vec!["a/gone".to_owned()], ..gone.clone() };
        assert!(said(outliving, true).is_empty(), "its namespace ends");
        assert!(said(gone, false).is_empty(), "nobody asked about others");
        assert!(said(answer(&[("a/p", 7), ("a/q", 9), ("a/made-since", 16)], 20), true).is_empty());
        let aside =
            ["NetworkPolicy a/q", "NetworkPolicy a/other", "ClusterNetworkPolicy a/p"].map(str::to_owned).into();
        let aside = said(InForce { aside, ..answer(&[("a/p", 7), ("a/q", 9)], 20) }, true);
        assert!(aside.len() == 1 && aside[0].starts_with("networkpolicy/a/q asks for more than"), "{aside:?}");
    }

    #[test]
    fn a_node_that_does_not_answer_or_cannot_write_is_not_in_force() {
        let silent = NodeView::of("n1".to_owned(), Err(anyhow::anyhow!("no agent")), &wanted(false));
        assert_eq!((silent.behind.len(), silent.is_in_force()), (3, false));
        let failing = InForce { failing: "no room".to_owned(), ..answer(&[("a/p", 7), ("a/q", 9)], 20) };
        assert!(!NodeView::of("n1".to_owned(), Ok(failing), &wanted(false)).is_in_force());
        let nothing = NodeView::of("n1".to_owned(), Ok(InForce::default()), &wanted(false));
        assert_eq!(nothing.behind.len(), 3, "an agent that has listed nothing enforces nothing of it");
    }
}
