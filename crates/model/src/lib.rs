//! Validated nouns, parsed once from Kubernetes objects at the edge, and the desired state of a node.
//!
//! Every type here is made by `TryFrom` a Kubernetes object (or by a planner) and cannot hold nonsense: whoever has a
//! [`Pod`] or a [`NetworkPolicy`] needs no further check. Objects are trimmed to what the network needs. Nothing here reads a
//! clock, a file or the network.
#![forbid(unsafe_code)]

pub mod added_ranges;
pub mod address_pool;
pub mod bandwidth;
pub mod chosen;
pub mod cluster_policy;
pub mod custom;
pub mod desired;
pub mod domain_name;
pub mod endpoints;
pub mod enforcement;
pub mod error;
pub mod flannel;
pub mod labels;
pub mod load_balancer;
pub mod name;
pub mod namespace;
pub mod netpol;
pub mod node;
pub mod node_port_addresses;
pub mod pod;
pub mod pod_ips;
pub mod protocol;
pub mod readable;
mod selector_text;
pub mod service;
pub mod service_cidr;
pub mod sharing;
pub mod slices;
pub mod socket_services;
pub mod uid;
pub mod world;

pub use added_ranges::{AddedRanges, POD_CIDRS_ANNOTATION};
pub use address_pool::{AddressPool, AddressRange};
pub use bandwidth::{AskedBandwidth, Bandwidth, Rate};
pub use chosen::Chosen;
pub use cluster_policy::{Action, ClusterNetworkPolicy, ClusterPeer, ClusterRule, ProtocolMatch, Subject, Tier};
pub use domain_name::{DomainName, DomainNames};
pub use endpoints::{Conditions, Endpoint, EndpointPort, EndpointSlice, Hints};
pub use enforcement::{AUDIT_ANNOTATION, Enforcement};
pub use error::Invalid;
pub use labels::{Labels, Selector};
pub use load_balancer::{BalancedService, FamilyPolicy, LoadBalancerRequest, Wish};
pub use name::{NamespacedName, NodeName, NodeNames};
pub use namespace::Namespace;
pub use netpol::{Direction, NetworkPolicy, Peer, PolicyPort, PolicyRule, PortMatch};
pub use node::Node;
pub use node_port_addresses::NodePortAddresses;
pub use pod::{HostPort, NamedPort, Phase, Pod};
pub use pod_ips::PodIps;
pub use protocol::{Family, Protocol, canonical, family_of};
pub use readable::Readable;
pub use selector_text::NoSelector;
pub use service::{ALGORITHM_ANNOTATION, Service, ServiceKind, ServicePort, TargetPort, TrafficPolicy};
pub use service_cidr::ServiceCidr;
pub use sharing::{Pool, Sharing};
pub use slices::Slices;
pub use socket_services::{SOCKET_SERVICES_ANNOTATION, SocketServices};
pub use towpath_wire::shared::Shared;
pub use uid::Uid;
pub use world::World;
