//! What is watched: the kinds, and how the index keeps the nouns of each, what it believes of objects that it cannot understand, and whom it names to those
//! who compile policies.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::api::networking::v1 as networking;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde::Serialize;
use serde::de::DeserializeOwned;
use towpath_model::cluster_policy::object;
use towpath_model::{
    ClusterNetworkPolicy, EndpointSlice, Invalid, Namespace, NamespacedName, NetworkPolicy, Node, NodeName, Pod,
    Service, Sharing, Uid, World,
};
use towpath_policy::compile::Touched;
use tracing::warn;

use super::Index;

/// A kind the agent watches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Nodes.
    Node,
    /// Namespaces.
    Namespace,
    /// Pods.
    Pod,
    /// Services.
    Service,
    /// EndpointSlices.
    EndpointSlice,
    /// NetworkPolicies.
    NetworkPolicy,
    /// ClusterNetworkPolicies. Where the kind is not installed there are none.
    ClusterNetworkPolicy,
    /// What other nodes say of their new pods. Nothing waits for it: where it is not known, or not installed, pods are known by
    /// their status.
    NodeNetwork,
    /// Ranges of Service addresses. Nothing waits for them: until they are known, the ranges are those that were in force last.
    ServiceCidr,
    /// CoreDNS's and kube-dns's configuration. Nothing waits for it: until it is known, DNS is answered as before.
    DnsConfig,
    /// ip-masq-agent's configuration. Nothing waits for it: until it is known, what it said last holds.
    IpMasqAgent,
}

impl Kind {
    /// All that must be known before anything is planned.
    pub const ALL: [Kind; 7] = [
        Kind::Node,
        Kind::Namespace,
        Kind::Pod,
        Kind::Service,
        Kind::EndpointSlice,
        Kind::NetworkPolicy,
        Kind::ClusterNetworkPolicy,
    ];
}

/// A noun of the model as the index stores it.
pub trait Noun: Sized + PartialEq + Send + Serialize + DeserializeOwned + 'static {
    /// The Kubernetes object it is parsed from.
    type Object;
    /// What it is found by.
    type Key: Ord + Clone + Send + std::fmt::Display + Serialize + DeserializeOwned + 'static;
    /// Its kind.
    const KIND: Kind;
    /// Whether the API server may not have the kind.
    const OPTIONAL: bool = false;

    /// The key that an object's metadata say, if they do.
    fn key(meta: &ObjectMeta) -> Option<Self::Key>;
    /// The noun, or why the object is none.
    ///
    /// # Errors
    /// The object says something impossible.
    fn parse(object: &Self::Object) -> Result<Self, Invalid>;
    /// Whether it stays in force though the API server no longer has it.
    fn outlives(_index: &mut Index, _key: &Self::Key) -> bool {
        false
    }
    /// The API server has it.
    fn is_there(_index: &mut Index, _key: &Self::Key) {}
    /// Its object was heard of, or is gone, and it is kept as it was heard of; none: of all.
    fn heard_of(_index: &mut Index, _key: Option<&Self::Key>) {}
    /// As its object says it, where something closed stands for it in the world.
    fn as_written<'i>(_index: &'i Index, _key: &Self::Key) -> Option<&'i Self> {
        None
    }
    /// Adds what stays in force though a full list no longer has it.
    fn with_outliving(_index: &mut Index, all: BTreeMap<Self::Key, Self>) -> BTreeMap<Self::Key, Self> {
        all
    }
    /// What stands for an object that cannot even be read; none: it counts as absent.
    fn unreadable(_key: &Self::Key) -> Option<Self> {
        None
    }
    /// Forgets what nothing here depends on, and shares what others say alike. Asked of every object before it is kept.
    fn slim(&mut self, _sharing: &mut Sharing) {}
    /// All that the world has.
    fn all(world: &World) -> &BTreeMap<Self::Key, Self>;
    /// Puts one into the world; the one that had the key.
    fn put(world: &mut World, key: Self::Key, noun: Self) -> Option<Self>;
    /// Takes one out of it.
    fn take(world: &mut World, key: &Self::Key) -> Option<Self>;
    /// Puts these in the place of all.
    fn replace(world: &mut World, all: BTreeMap<Self::Key, Self>);
    /// Names it to whoever compiles policies.
    fn touch(_key: &Self::Key, _touched: &mut Touched) {}
    /// Takes over what follows from others, as it was settled last, from the one that had the key: until it is [settled](Noun::settle) anew it holds.
    fn inherit(&mut self, _before: &Self) {}
    /// Works out what follows from all of them together, after one changed.
    fn settle(_index: &mut Index) {}
    /// `metadata.uid` of kinds whose names are given again while what had them before is still heard of; empty: not known.
    fn uid(&self) -> Uid {
        Uid::default()
    }
    /// Whether policies see no difference.
    fn is_same_to_policies(&self, _other: &Self) -> bool {
        false
    }
    /// The Service whose plan it is part of.
    fn service(&self) -> Option<&NamespacedName> {
        None
    }
}

/// Where the world keeps nouns of a kind.
macro_rules! kept_in {
    ($table:ident, $key:ty) => {
        fn all(world: &World) -> &BTreeMap<$key, Self> {
            &world.$table
        }
        fn put(world: &mut World, key: $key, noun: Self) -> Option<Self> {
            world.$table.insert(key, noun)
        }
        fn take(world: &mut World, key: &$key) -> Option<Self> {
            world.$table.remove(key)
        }
        fn replace(world: &mut World, all: BTreeMap<$key, Self>) {
            world.$table = all.into();
        }
    };
}

macro_rules! noun {
    ($noun:ty, $object:ty, $key:ty, $kind:expr, $table:ident, $find:expr, $touch:expr $(, $service:expr, $slim:expr)?) => {
        impl Noun for $noun {
            type Object = $object;
            type Key = $key;
            const KIND: Kind = $kind;
            fn key(meta: &ObjectMeta) -> Option<$key> {
                let find: fn(&ObjectMeta) -> Option<$key> = $find;
                find(meta)
            }
            fn parse(object: &$object) -> Result<Self, Invalid> {
                Self::try_from(object)
            }
            fn touch(key: &$key, touched: &mut Touched) {
                let touch: fn(&$key, &mut Touched) = $touch;
                touch(key, touched);
            }
            kept_in!($table, $key);
            $(fn service(&self) -> Option<&NamespacedName> {
                let part: fn(&$noun) -> &NamespacedName = $service;
                Some(part(self))
            }
            fn slim(&mut self, sharing: &mut Sharing) {
                let slim: fn(&mut $noun, &mut Sharing) = $slim;
                slim(self, sharing);
            })?
        }
    };
}

fn namespaced(meta: &ObjectMeta) -> Option<NamespacedName> {
    Some(NamespacedName::new(meta.namespace.as_ref()?, meta.name.as_ref()?))
}

/// Policies do not look at it.
fn untouched(_: &NamespacedName, _: &mut Touched) {}

#[allow(clippy::ptr_arg, reason = "the kind of key it has in the index")]
fn namespace_touched(name: &String, touched: &mut Touched) {
    touched.namespace(name.clone());
}

fn slim_service(service: &mut Service, _: &mut Sharing) {
    service.slim();
}

impl Noun for Node {
    type Object = core::Node;
    type Key = NodeName;
    const KIND: Kind = Kind::Node;

    fn key(meta: &ObjectMeta) -> Option<NodeName> {
        meta.name.clone().map(NodeName::new)
    }

    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        Self::try_from(object)
    }

    /// Its ranges and addresses decide who may hold an address: of anybody.
    fn touch(_: &NodeName, touched: &mut Touched) {
        touched.all();
    }

    fn inherit(&mut self, before: &Self) {
        self.put_in_force(before.added.in_force.clone());
    }

    fn settle(index: &mut Index) {
        index.settle_pod_ranges();
    }

    /// One that is no longer ready is where it was.
    fn is_same_to_policies(&self, other: &Self) -> bool {
        let seen = |node: &Self| Self { ready: true, flannel: None, added: Default::default(), ..node.clone() };
        seen(self) == seen(other)
    }

    kept_in!(nodes, NodeName);
}

noun!(Namespace, core::Namespace, String, Kind::Namespace, namespaces, |m| m.name.clone(), namespace_touched);

impl Noun for Pod {
    type Object = core::Pod;
    type Key = NamespacedName;
    const KIND: Kind = Kind::Pod;

    fn key(meta: &ObjectMeta) -> Option<NamespacedName> {
        namespaced(meta)
    }

    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        Self::try_from(object)
    }

    fn touch(key: &NamespacedName, touched: &mut Touched) {
        touched.pod(key.clone());
    }

    fn uid(&self) -> Uid {
        self.uid.clone()
    }

    fn slim(&mut self, sharing: &mut Sharing) {
        self.slim(sharing);
    }

    kept_in!(pods, NamespacedName);
}

noun!(
    Service,
    core::Service,
    NamespacedName,
    Kind::Service,
    services,
    namespaced,
    untouched,
    |s| &s.name,
    slim_service
);
noun!(
    EndpointSlice,
    discovery::EndpointSlice,
    NamespacedName,
    Kind::EndpointSlice,
    slices,
    namespaced,
    untouched,
    |s| &s.service,
    |s, sharing| s.slim(&mut sharing.nodes)
);
impl Noun for NetworkPolicy {
    type Object = networking::NetworkPolicy;
    type Key = NamespacedName;
    const KIND: Kind = Kind::NetworkPolicy;

    fn key(meta: &ObjectMeta) -> Option<NamespacedName> {
        namespaced(meta)
    }

    /// Fails closed as far as can be known: nobody talks to the pods of its namespace until it can be read.
    fn unreadable(key: &NamespacedName) -> Option<Self> {
        Some(Self::deny_all(key.clone()))
    }

    /// Fails closed: what cannot be understood admits nobody, and is said.
    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        let (policy, problems) = Self::fail_closed(object)?;
        for problem in problems {
            warn!(%problem, "this part of the policy is not understood: it admits nobody");
        }
        Ok(policy)
    }

    fn touch(key: &NamespacedName, touched: &mut Touched) {
        touched.policy(key.clone());
    }

    fn outlives(index: &mut Index, key: &NamespacedName) -> bool {
        index.world.policies.contains_key(key) && index.outliving.is_deleted(&index.world, &index.synced, key)
    }

    fn is_there(index: &mut Index, key: &NamespacedName) {
        index.outliving.is_there(key);
    }

    fn heard_of(index: &mut Index, key: Option<&NamespacedName>) {
        index.aside.heard_of_policy(key);
    }

    fn as_written<'i>(index: &'i Index, key: &NamespacedName) -> Option<&'i Self> {
        index.aside.policy(key)
    }

    fn with_outliving(index: &mut Index, mut all: BTreeMap<NamespacedName, Self>) -> BTreeMap<NamespacedName, Self> {
        let outliving = index.outliving.missing_from(&all, &index.world, &index.synced);
        all.extend(outliving);
        all
    }

    kept_in!(policies, NamespacedName);
}

impl Noun for ClusterNetworkPolicy {
    type Object = object::ClusterNetworkPolicy;
    type Key = String;
    const KIND: Kind = Kind::ClusterNetworkPolicy;
    const OPTIONAL: bool = true;

    fn key(meta: &ObjectMeta) -> Option<String> {
        meta.name.clone()
    }

    /// Fails closed, and what cannot be understood is said.
    fn parse(object: &Self::Object) -> Result<Self, Invalid> {
        let (policy, problems) = Self::fail_closed(object)?;
        for problem in problems {
            warn!(%problem, "this part of the policy is not understood: it accepts nothing, and denies what it might deny");
        }
        Ok(policy)
    }

    fn touch(_: &String, touched: &mut Touched) {
        touched.cluster_policies();
    }

    fn heard_of(index: &mut Index, key: Option<&String>) {
        index.aside.heard_of_cluster_policy(key);
    }

    fn as_written<'i>(index: &'i Index, key: &String) -> Option<&'i Self> {
        index.aside.cluster_policy(key)
    }

    kept_in!(cluster_policies, String);
}
