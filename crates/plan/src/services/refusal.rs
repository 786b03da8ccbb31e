//! What Services and pods ask for and do not get.

use std::fmt;

use towpath_model::NamespacedName;

/// Who asks for what is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Asks {
    /// A Service.
    Service,
    /// A pod, for its host ports.
    Pod,
    /// A NetworkPolicy.
    NetworkPolicy,
    /// A ClusterNetworkPolicy, whose name has no namespace.
    ClusterNetworkPolicy,
}

impl Asks {
    /// The kind, as Kubernetes names it.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::Pod => "Pod",
            Self::NetworkPolicy => "NetworkPolicy",
            Self::ClusterNetworkPolicy => "ClusterNetworkPolicy",
        }
    }

    /// Its group and version, as `apiVersion` has them.
    pub fn api_version(self) -> &'static str {
        match self {
            Self::Service | Self::Pod => "v1",
            Self::NetworkPolicy => "networking.k8s.io/v1",
            Self::ClusterNetworkPolicy => towpath_model::cluster_policy::object::API_VERSION,
        }
    }
}

/// What it is that is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RefusedPart {
    /// An endpoint that no Service may lead to.
    Endpoint,
    /// An address or port that another has, or nobody may have.
    Frontend,
    /// A field or annotation that says nothing that is known.
    Field,
    /// A pod's host port.
    HostPort,
    /// What a full table of the kernel has no room for.
    Room,
}

/// Something that is asked for and not given.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Refusal {
    /// What asks.
    pub asks: Asks,
    /// Its name.
    pub name: NamespacedName,
    /// What is refused.
    pub part: RefusedPart,
    /// What and why, for people.
    pub reason: String,
}

impl Refusal {
    /// Kind and name, for people.
    pub fn object(&self) -> String {
        match self.name.namespace.as_str() {
            "" => format!("{} {}", self.asks.kind(), self.name.name),
            _ => format!("{} {}", self.asks.kind(), self.name),
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object(), self.reason)
    }
}
