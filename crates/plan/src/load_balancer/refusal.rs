//! Why a Service does not get an address, and what to do about it, as it is shown on the Service.

use std::fmt;
use std::net::IpAddr;

use towpath_model::load_balancer::POOL_ANNOTATION;
use towpath_model::{Family, NamespacedName};

/// Why a Service does not get all it asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no pool at all. `explicit`: nor can anybody else give it one.
    NoPool {
        /// Whether its class names us.
        explicit: bool,
    },
    /// It names a pool that is not there.
    UnknownPool(String),
    /// No pool is for it; those that there are.
    NotAdmitted {
        /// All pools.
        pools: Vec<String>,
        /// Whether one of them would be for it if the Service named it: it gives nothing by itself.
        by_name: Option<String>,
    },
    /// The pools that are for it have no address of the family in any range.
    NoRange {
        /// The family.
        family: Family,
        /// Those pools.
        pools: Vec<String>,
    },
    /// All addresses of the pools that are for it are taken.
    Full {
        /// The family.
        family: Family,
        /// Those pools.
        pools: Vec<String>,
    },
    /// What it asks for cannot be understood.
    Unclear(String),
    /// It asks for an address of a family that it has not.
    WrongFamily(IpAddr),
    /// It asks for one address and must have both families.
    NeedsBoth(IpAddr),
    /// The address that it asks for is in no pool that is for it.
    NotInPool {
        /// The address.
        address: IpAddr,
        /// The pool that has it but is not for it.
        pool: Option<String>,
    },
    /// The address that it asks for is the cluster's own.
    ClusterOwn(IpAddr),
    /// The address that it asks for is another Service's, with which it may not share it.
    Taken {
        /// The address.
        address: IpAddr,
        /// The other one.
        by: NamespacedName,
    },
    /// Its namespace is not known yet.
    NoNamespace,
}

fn family(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn named(pools: &[String]) -> String {
    let kind = if pools.len() == 1 { "AddressPool" } else { "AddressPools" };
    format!("{kind} {}", pools.join(", "))
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoPool { explicit: true } => {
                write!(f, "there is no AddressPool: create one with addresses that are free on the nodes' network")
            }
            Self::NoPool { explicit: false } => write!(
                f,
                "there is no AddressPool, so Towpath gives no address: create one, unless another implementation of load balancers serves \
                 this Service"
            ),
            Self::UnknownPool(pool) => write!(
                f,
                "there is no AddressPool {pool}, which the annotation {POOL_ANNOTATION} names: create it, or name another \
                 (kubectl get addresspools)"
            ),
            Self::NotAdmitted { by_name: Some(pool), .. } => write!(
                f,
                "no AddressPool is for this Service by itself; AddressPool {pool} has autoAssign: false: name it with the annotation \
                 {POOL_ANNOTATION}"
            ),
            Self::NotAdmitted { pools, by_name: None } => write!(
                f,
                "{}: none is for this Service: change its labels, or the pool's serviceSelector or namespaceSelector",
                named(pools)
            ),
            Self::NoRange { family: of, pools } => {
                let of = family(*of);
                write!(f, "{}: no {of} range: add one to spec.addresses", named(pools))
            }
            Self::Full { family: of, pools } => write!(
                f,
                "{}: every {} address is in use: add a range to spec.addresses, or delete a Service that has one",
                named(pools),
                family(*of)
            ),
            Self::Unclear(reason) => write!(f, "{reason}: correct it"),
            Self::WrongFamily(address) => {
                write!(f, "the requested address {address} is of a family that is not in the Service's ipFamilies")
            }
            Self::NeedsBoth(address) => write!(
                f,
                "only {address} is requested, and ipFamilyPolicy is RequireDualStack: request an address of each family, or none"
            ),
            Self::NotInPool { address, pool: None } => {
                write!(f, "the requested address {address} is in no AddressPool: add it to one, or request another")
            }
            Self::NotInPool { address, pool: Some(pool) } => write!(
                f,
                "the requested address {address} is in AddressPool {pool}, which is not for this Service: see its selectors and \
                 the annotation {POOL_ANNOTATION}"
            ),
            Self::ClusterOwn(address) => {
                write!(
                    f,
                    "the requested address {address} is a node's, a pod's or another Service's own: request another"
                )
            }
            Self::Taken { address, by } => write!(
                f,
                "the requested address {address} is in use by Service {by}: request another, or let both share it \
                 (towpath.dev/allow-shared-ip on both, in one namespace, with ports that differ)"
            ),
            Self::NoNamespace => write!(f, "its namespace is not known yet: it is tried again"),
        }
    }
}
