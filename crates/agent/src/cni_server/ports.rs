//! What the CNI server needs of the rest of the agent: who a pod is ([`PodIndex`]) and its device ([`PodPlumber`]).

use std::future::Future;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use towpath_datapath::PodSurvey;
use towpath_model::desired::LocalPod;
use towpath_model::{Bandwidth, NamespacedName};
use towpath_wire::cni::Attachment;

use crate::ipam::check::KnownPod;

/// Whether ADD can be served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Readiness {
    /// Not yet, and why, for people: `waiting for the node's podCIDR`.
    Starting(String),
    /// The first full sync is in the kernel.
    Ready,
}

/// What an ADD needs to know of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodFacts {
    /// `metadata.uid`; none where it says nothing about the sandbox: the API's mirror of a static pod has a uid of its own
    /// (annotation `kubernetes.io/config.mirror`).
    pub uid: Option<String>,
    /// What it asks for, as far as its namespace lets it.
    pub choice: Choice,
}

/// The addresses that a pod gets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Any.
    #[default]
    Any,
    /// These.
    These {
        /// At most one a family; of the other any.
        addresses: Vec<IpAddr>,
        /// MAC address of its device; none: as computed.
        mac: Option<[u8; 6]>,
    },
    /// None, and why.
    Refused(String),
}

/// What asking the API server once brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fetched {
    /// The pod; it is in the index now.
    Found(PodFacts),
    /// The API server does not know it.
    Absent,
    /// The API server could not be asked, and why.
    Unreachable(String),
}

/// The agent's view of pods.
pub trait PodIndex: Send + Sync + 'static {
    /// The pod as watched.
    fn lookup(&self, pod: &NamespacedName) -> Option<PodFacts>;

    /// Asks the API server once (the caller bounds the time) and puts what it says into the index, so that a policy compiled
    /// from then on knows the pod.
    fn fetch(&self, pod: &NamespacedName) -> impl Future<Output = Fetched> + Send;

    /// Whether pods of a namespace may choose their addresses, as far as is known.
    fn pods_choose(&self, namespace: &str) -> bool;

    /// This node's pods that are on the pod network and have not ended; none: not all are known, or they are an earlier run's.
    fn of_this_node(&self) -> Option<Vec<KnownPod>>;

    /// Whether the policies that are known are an earlier run's: what the API server says now of a pod they may not cover.
    fn policies_are_recalled(&self) -> bool {
        false
    }
}

/// What holds for a pod's packets from the first one on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Isolation {
    /// Its labels are known: what the policies say.
    Policy,
    /// Its labels are not known yet: everything is denied but its own node, until they are.
    HostOnly,
    /// No pod of Kubernetes, so that no policy selects it.
    NotAPod,
}

/// Make a pod's device.
#[derive(Debug)]
pub struct AttachRequest {
    /// Container and interface.
    pub attachment: Attachment,
    /// The pod; of a container that Kubernetes does not know, the container id in the namespace `""`.
    pub pod: NamespacedName,
    /// Its addresses, at most one a family.
    pub addresses: Vec<IpAddr>,
    /// MAC address of its device; none: as computed.
    pub mac: Option<[u8; 6]>,
    /// Gateways, one a family of `addresses`, in their order.
    pub gateways: Vec<IpAddr>,
    /// Its network namespace.
    pub netns: OwnedFd,
    /// What holds for its packets.
    pub isolation: Isolation,
    /// Limits that the runtime asks for: those of the pod's own annotations come before them.
    pub bandwidth: Bandwidth,
}

/// A device that was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// The pod as the kernel has it.
    pub pod: LocalPod,
    /// MTU of its device in bytes.
    pub mtu: u32,
}

/// Remove a pod's device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DetachRequest {
    /// Container and interface.
    pub attachment: Attachment,
    /// The addresses it had, as far as they are known.
    pub addresses: Vec<IpAddr>,
    /// The pod as it was attached, if ADD got that far.
    pub attached: Option<LocalPod>,
}

/// A pod device that the kernel really has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Device {
    /// Name of the host side: what [`PodPlumber::device_name`] says of its attachment.
    pub name: String,
    /// The addresses it has, from its routes or the pod map.
    pub addresses: Vec<IpAddr>,
}

/// Why a device could not be made, removed or compared.
#[derive(Debug, thiserror::Error)]
pub enum PlumbError {
    /// A transient condition: the runtime is told to try again.
    #[error("{0}")]
    Again(String),
    /// The container's network namespace is gone or is none.
    #[error("{0}")]
    Namespace(String),
    /// The pod asks for something that nobody can give it.
    #[error("{0}")]
    Asked(String),
    /// CHECK: the device is not as it was made.
    #[error("{0}")]
    Mismatch(String),
    /// The pod cannot have what it asks for.
    #[error("{0}")]
    Choice(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// Makes and removes pod devices in the kernel.
pub trait PodPlumber: Send + Sync + 'static {
    /// Name of the host side of an attachment's device.
    fn device_name(&self, attachment: &Attachment) -> String;

    /// Makes the device, with the pod's isolation in the kernel before the device is up: it returns only when both are there.
    /// A failure leaves nothing behind. A device of that name that is there already is replaced.
    fn attach(&self, request: AttachRequest) -> impl Future<Output = Result<Attached, PlumbError>> + Send;

    /// Removes the device and everything in the kernel that refers to it. What is gone already is no error.
    fn detach(&self, request: DetachRequest) -> impl Future<Output = Result<(), PlumbError>> + Send;

    /// Compares the device with what was made.
    fn check(
        &self,
        pod: &LocalPod,
        ifname: &str,
        netns: OwnedFd,
    ) -> impl Future<Output = Result<(), PlumbError>> + Send;

    /// What there is of pods' devices, by each of those who should agree.
    fn survey(&self) -> impl Future<Output = Result<PodSurvey, PlumbError>> + Send;

    /// The full check of devices and of what programs know of pods; what was changed, in words.
    fn repair(&self) -> impl Future<Output = Result<Vec<String>, PlumbError>> + Send;

    /// All pod devices of this node.
    fn list(&self) -> impl Future<Output = Result<Vec<Device>, PlumbError>> + Send;
}
