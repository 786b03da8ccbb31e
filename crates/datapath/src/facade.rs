//! The door to the kernel: an async, cloneable handle on the node's data path thread.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use towpath_model::AskedBandwidth;
use towpath_model::desired::{
    LocalPod, NodePeer, PolicyChanges, PolicyImage, RuleId, ServiceChanges, ServiceTable, SetId,
};

use crate::bpf::{
    Adopted, Audited, Changes, Connection, Count, DropsEar, Held, MapUsage, Programs, ServicesApplied, Snapshot,
};
use crate::error::Error;
use crate::net::address_news::{AddressNews, Ear};
use crate::node::{Node, pods};
use crate::requests::{
    Applied, AttachRequest, CheckRequest, DatapathConfig, NodeFacts, NodeStatus, PodMtu, PodSurvey, ServiceFlows,
    UdpEnds,
};
use crate::worker::Worker;

/// The data path of one node. Calls are carried out one after the other, in the order in which they were made, on a thread
/// of its own in the network namespace of the thread that called [`Datapath::open`]. Dropping it changes nothing in the
/// kernel: what is attached goes on working, and the next `open` adopts it.
#[derive(Clone, Debug)]
pub struct Datapath {
    worker: Worker<Node>,
}

impl Datapath {
    /// Loads or adopts programs and maps, finds the uplink, makes or adopts the tunnel device, addresses and nftables
    /// table, and adopts the pods whose devices are there. Policies, Services and peers stay as they are until the first
    /// `apply_*` of each. Leftovers of pods that were never finished are removed.
    pub async fn open(config: DatapathConfig) -> Result<Self, Error> {
        Ok(Self { worker: Worker::start(move || Node::open(config), Node::link_next).await? })
    }

    /// Removes everything of ours from the kernel: pods' devices, tunnel, routes, rules, addresses, the nftables table,
    /// pinned programs and maps. Sysctls stay. Errors are collected; the rest is removed.
    pub async fn uninstall(self) -> Result<(), Error> {
        self.worker.call(|node| node.uninstall()).await
    }

    /// What opening found out or made.
    pub async fn facts(&self) -> Result<NodeFacts, Error> {
        self.worker.call(|node| Ok(node.facts().clone())).await
    }

    /// How long the call under way has taken; none: there is none. Answered at once, whatever hangs.
    pub fn busy_for(&self) -> Option<Duration> {
        self.worker.busy_for()
    }

    /// Facts and counts for `towpath status`.
    pub async fn status(&self) -> Result<NodeStatus, Error> {
        self.worker.call(|node| Ok(node.status())).await
    }

    /// Gives a pod its device. When the answer is there, the pod is connected and isolated as its policy sets say, and it was never
    /// connected without them. On failure nothing is left. A device of an earlier attempt with the same container id and
    /// name is replaced.
    ///
    /// What is called after this has returned is carried out when the pod's entry is there, also before the answer. Whoever
    /// does not wait for the answer removes the device himself if there is one.
    pub fn attach_pod(&self, request: AttachRequest) -> impl Future<Output = Result<LocalPod, Error>> + Send + use<> {
        pods::attach_pod(&self.worker, request)
    }

    /// Takes a pod's device away that was just made; not one that was made since under the same name.
    pub async fn take_back_pod(&self, pod: LocalPod) -> Result<(), Error> {
        self.worker.call(move |node| node.take_back(&pod)).await
    }

    /// Takes a pod's device away, with its connections and routes. Fine when there is none, or only parts of one.
    pub async fn detach_pod(&self, container_id: &str, ifname: &str) -> Result<(), Error> {
        let (container_id, ifname) = (container_id.to_owned(), ifname.to_owned());
        self.worker.call(move |node| node.detach_pod(&container_id, &ifname)).await
    }

    /// Compares a pod's device, addresses and routes with what `attach_pod` made; the error names the first difference.
    pub async fn check_pod(&self, request: CheckRequest) -> Result<(), Error> {
        self.worker.call(move |node| node.check_pod(&request)).await
    }

    /// The pods that have a device now, by what the kernel says; with the name of the device inside each.
    pub async fn list_pods(&self) -> Result<Vec<(LocalPod, String)>, Error> {
        self.worker.call(|node| node.list_pods()).await
    }

    /// What there is of pods' devices, by each of those who should agree. Reads all of the programs' tables of pods and Services.
    pub async fn survey_pods(&self) -> Result<PodSurvey, Error> {
        self.worker.call(|node| node.survey_pods()).await
    }

    /// The full check, and pods that the programs know and that have no device are forgotten.
    pub async fn repair_pods(&self) -> Result<Applied, Error> {
        self.worker.call(|node| Ok(node.repair_pods())).await
    }

    /// All nodes, this one included: the tunnel's peers, routes, rules, masquerade exceptions.
    pub async fn apply_peers(&self, peers: Vec<NodePeer>) -> Result<Applied, Error> {
        self.worker.call(move |node| node.apply_peers(peers)).await
    }

    /// The MTU of pods that run, and of new ones: both sides of their devices, while they run, and the routes in them. What goes to pods of the cluster may
    /// be as large as that; what goes elsewhere, as an envelope carries. Pods whose namespaces are not found keep what they have, and are named.
    pub async fn apply_pod_mtu(&self, mtu: PodMtu) -> Result<Applied, Error> {
        self.worker.call(move |node| node.apply_pod_mtu(mtu)).await
    }

    /// The largest MTU that a pod of this node has; none: there is no pod.
    pub async fn widest_pod(&self) -> Result<Option<u32>, Error> {
        self.worker.call(|node| node.widest_pod()).await
    }

    /// Addresses in this node's ranges that pods of another network hold, which was here before: they are reached through the
    /// kernel's stack, and may speak to pods here by the device that the kernel's routes lead to.
    pub async fn apply_elsewhere(&self, addresses: Vec<IpAddr>) -> Result<Applied, Error> {
        self.worker.call(move |node| node.apply_elsewhere(addresses)).await
    }

    /// Removes the tunnel devices that Flannel lent, and puts our own in their place; nothing where there are none.
    pub async fn take_tunnel(&self) -> Result<Applied, Error> {
        self.worker.call(|node| node.take_tunnel()).await
    }

    /// Whether other nodes' packets are taken by way of user space (`udp`): makes the device for them and says its index, or takes it away. Before it is called, one that is there stays.
    pub async fn take_udp(&self, wanted: bool) -> Result<Option<u32>, Error> {
        self.worker.call(move |node| node.take_udp(wanted)).await
    }

    /// What carries packets between that device and other nodes, by datagrams of this address, where this node's tunnel has to end: for who reads and writes them.
    pub async fn open_udp(&self, address: IpAddr, count: usize) -> Result<UdpEnds, Error> {
        self.worker.call(move |node| node.open_udp(address, count)).await
    }

    /// Whether the device of `udp` sends: a while after the first queue of it was opened.
    pub async fn udp_works(&self) -> Result<bool, Error> {
        self.worker.call(|node| node.udp_works()).await
    }

    /// All Services. New backend lists are written whole before a Service points to them.
    pub async fn apply_services(&self, table: ServiceTable) -> Result<ServicesApplied, Error> {
        self.worker.call(move |node| node.apply_services(&table)).await
    }

    /// What became different in the Services since [`Datapath::apply_services`], or since this. After a failure only the whole table may
    /// follow.
    pub async fn apply_service_changes(&self, changes: ServiceChanges) -> Result<ServicesApplied, Error> {
        self.worker.call(move |node| node.apply_service_changes(&changes)).await
    }

    /// The ranges of Service addresses: what no Service has there is refused on the node. Nothing is written when they are the same.
    pub async fn follow_service_ranges(&self, ranges: Vec<IpNet>) -> Result<(), Error> {
        self.worker.call(move |node| node.follow_service_ranges(ranges)).await
    }

    /// Destinations outside the cluster that see pods' own addresses, in place of those that were named before.
    pub async fn follow_non_masquerade(&self, destinations: Vec<IpNet>) -> Result<(), Error> {
        self.worker.call(move |node| node.follow_non_masquerade(destinations)).await
    }

    /// The compiled policy, with the sets of the pods that are attached.
    pub async fn apply_policy(&self, image: PolicyImage) -> Result<Changes, Error> {
        self.worker.call(move |node| node.apply_policy(&image)).await
    }

    /// What became different in the policy since [`Datapath::apply_policy`], or since this. After a failure only the whole image may follow.
    pub async fn apply_policy_changes(&self, changes: PolicyChanges) -> Result<Changes, Error> {
        self.worker.call(move |node| node.apply_policy_changes(&changes)).await
    }

    /// Takes all rules out of the kernel's tables, for policies that do not fit there beside those before. Until the next [`Datapath::apply_policy`] the
    /// pods that had any are closed to all but their node; the others stay as they are.
    pub async fn vacate_policy(&self) -> Result<Changes, Error> {
        self.worker.call(|node| node.vacate_policy()).await
    }

    /// The pods of this node with these addresses have what they send to Services translated at their device, all others in their sockets;
    /// how many that is a change for. Open connections go on as they are.
    pub async fn apply_translated_at(&self, device: BTreeSet<IpAddr>) -> Result<usize, Error> {
        self.worker.call(move |node| node.apply_translated_at(&device)).await
    }

    /// How much pods of this node may receive and send, by what the annotations of those with these addresses ask for; others stay as they are, and so does a
    /// limit of which an annotation means nothing. Each is followed while the pod runs. Pods whose namespaces are not found go on sending as they
    /// did, and are named; the next full check tries again.
    pub async fn apply_bandwidth(&self, asked: BTreeMap<IpAddr, AskedBandwidth>) -> Result<Applied, Error> {
        self.worker.call(move |node| node.apply_bandwidth(&asked)).await
    }

    /// Deletes what a grace period protected. Call it every second or so.
    pub async fn sweep(&self) -> Result<usize, Error> {
        self.worker.call(|node| node.sweep(Instant::now())).await
    }

    /// Counters of what the programs did and why they dropped.
    pub async fn counters(&self) -> Result<Vec<Count>, Error> {
        self.worker.call(|node| node.observe(Programs::counters)).await
    }

    /// Makes the programs tell what they drop, until the answer is gone; none where no programs are. It is for a thread of its own.
    pub async fn listen_to_drops(&self) -> Result<Option<DropsEar>, Error> {
        self.worker.call(|node| node.observe(|programs| programs.listen_to_drops().map(Some))).await
    }

    /// What policies that are only audited would have denied.
    pub async fn audited(&self) -> Result<Vec<Audited>, Error> {
        self.worker.call(|node| node.observe(Programs::audited)).await
    }

    /// Takes such counts away, when no pod has their sets any more and they were read.
    pub async fn forget_audited(&self, keys: Vec<(SetId, RuleId)>) -> Result<(), Error> {
        self.worker.call(move |node| node.observe(|programs| programs.forget_audited(&keys))).await
    }

    /// Every tracked connection. Reads the whole table: milliseconds for 100,000.
    pub async fn connections(&self) -> Result<Vec<Connection>, Error> {
        self.worker.call(|node| node.observe(Programs::connections)).await
    }

    /// Open connections by Service address and backend. Reads the whole table, and every socket that was translated.
    pub async fn service_flows(&self) -> Result<ServiceFlows, Error> {
        self.worker.call(|node| node.service_flows()).await
    }

    /// How the connection table is held by pods.
    pub async fn held(&self) -> Result<Held, Error> {
        self.worker.call(|node| node.observe(Programs::held)).await
    }

    /// How full the maps are. Reads the table of translations.
    pub async fn usage(&self) -> Result<Vec<MapUsage>, Error> {
        self.worker.call(|node| node.observe(Programs::usage)).await
    }

    /// Ids that an earlier run of the agent gave out.
    pub async fn adopted(&self) -> Result<Adopted, Error> {
        self.worker.call(|node| node.observe(Programs::adopted)).await
    }

    /// What the maps hold: node, pods, peers, Services.
    pub async fn snapshot(&self) -> Result<Snapshot, Error> {
        self.worker.call(|node| node.observe(Programs::snapshot)).await
    }

    /// Hears of addresses that come to the node and go: then call [`Datapath::follow_addresses`].
    pub async fn address_news(&self) -> Result<AddressNews, Error> {
        Ok(self.worker.call(|_| Ok(Ear::open()?)).await?.into_news()?)
    }

    /// Looks which of the node's addresses and devices the world outside has, without the rest of the full check.
    pub async fn follow_addresses(&self) -> Result<Applied, Error> {
        self.worker.call(|node| node.follow_addresses()).await
    }

    /// The slow full check: compares everything of ours with what should be and repairs it (routes or devices deleted by
    /// hand, a flushed nftables table, an uplink that came back with another index).
    pub async fn audit(&self) -> Result<Applied, Error> {
        self.worker.call(|node| Ok(node.audit())).await
    }
}
