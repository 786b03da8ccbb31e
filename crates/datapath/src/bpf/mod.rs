//! The kernel programs of `bpf/`: loaded once, pinned, adopted after a restart, replaced in place, and fed by difference.
//!
//! [`Programs`] promises: opening never detaches or empties anything that works; an `apply_*` writes in an order that is
//! never less safe than before or after, and what it could not write it tries again at its next call. It touches nothing
//! but BPF objects and the pin directory. Devices are named by index and looked up in the calling thread's network
//! namespace.

mod address;
mod adopt;
mod audited;
mod budget;
mod config;
mod drops;
mod error;
mod features;
mod held;
mod inherit;
mod layout;
mod links;
mod map;
mod mirror;
mod node;
mod object;
mod observe;
mod policy;
mod purge;
mod services;
mod steer;
mod translations;
mod wire;

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use libbpf_rs::Object;
use towpath_model::desired::{
    LocalPod, NodePeer, PolicyChanges, PolicyImage, RuleId, ServiceChanges, ServiceTable, SetId, TranslatedAt,
};

use crate::abi::{self, Addr, Ct, CtKey, Removed, Tuple};
use audited::AuditMap;
use budget::Accounts;
use inherit::Inheritance;
use links::Links;
use map::Map;
use node::NodeMaps;
use object::PinDir;
use policy::PolicyMaps;
use services::ServiceMaps;
use wire::Wire;

pub use adopt::Adopted;
pub use audited::Audited;
pub use budget::{Held, Holder};
pub use config::{BpfConfig, Changes, Hook, Isolation, Limits, NodeConfig, Surroundings};
pub use drops::{Dropped, DropsEar, Place};
pub use error::{Error, Result};
pub(crate) use features::takes_ipv6_out_of_ipv4;
pub use features::{Feature, needed_here as needed_features};
pub use held::{HeldSocket, HeldSockets};
#[cfg(test)]
pub(crate) use inherit::lay_out_as_the_next_version;
pub use observe::{Connection, Count, End, Judged, MapUsage, Reason};
pub use purge::Purger;
pub use services::{LeftOut, ServicesApplied, UdpTarget};
pub(crate) use steer::queue_of_flows;
pub use translations::{Translation, Translations};

/// The loaded programs and maps of one node.
#[derive(Debug)]
pub struct Programs {
    config: BpfConfig,
    object: Object,
    pins: PinDir,
    links: Links,
    /// None until it is to run somewhere.
    wire: Option<Wire>,
    testing: bool,
    /// What another version left, until nothing of it is at work any more.
    inheritance: Option<Inheritance>,
    node: NodeMaps,
    policy: PolicyMaps,
    services: ServiceMaps,
    connections: Map<CtKey, Ct>,
    translations: Map<Tuple, abi::Nat>,
    snat: Map<Tuple, abi::Snat>,
    audited: AuditMap,
    accounts: Accounts,
    /// Peers were written, perhaps not all of them, and the revision was not raised for it; perhaps by a process before this one.
    unraised: bool,
    collected: Option<Instant>,
}

/// How often [`Programs::sweep`] runs the collector: well within the time after which the kernel does it by itself.
const COLLECT_EVERY: Duration = Duration::from_secs(10);

/// How often, and after what time, the collector's timer is tried to be armed.
const ARM_TRIES: u32 = 10;
const ARM_PAUSE: Duration = Duration::from_millis(5);

/// What the maps hold, for status and tests.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// The node's own facts, if they were ever written.
    pub node: Option<abi::NodeConfig>,
    /// The revision under which verdicts are made.
    pub revision: u32,
    /// Pods of this node by address.
    pub pods: Vec<(IpAddr, abi::Pod)>,
    /// Prefixes of all nodes.
    pub peers: Vec<(IpNet, abi::Peer)>,
    /// Service entries: frontends and address marks.
    pub services: Vec<(abi::ServiceKey, abi::Service)>,
}

impl Programs {
    /// Loads the programs, adopting the maps that an earlier run pinned, or another version ([`inherit`]). Also reads what the maps hold (the mirror that the
    /// `apply_*` compare with) and arms the collector. Attaches nothing; existing links go on running the old program until
    /// [`Programs::attach_device`] or [`Programs::attach_cgroup`] replaces it in place.
    pub fn open(config: BpfConfig) -> Result<Self> {
        Self::load(config, false)
    }

    /// As [`Programs::open`], with the programs' test hooks compiled in: redirects are recorded in `tp_trace`.
    #[doc(hidden)]
    pub fn open_for_tests(config: BpfConfig) -> Result<Self> {
        Self::load(config, true)
    }

    fn load(config: BpfConfig, testing: bool) -> Result<Self> {
        let pins = PinDir::create(&config.pin_dir, &config.limits)?;
        let (object, inheritance) = object::load(&config, &pins, testing)?;
        let inheritance = Some(inheritance).filter(|_| pins.has_former());
        let policy = PolicyMaps::open(&object)?;
        let connections: Map<CtKey, Ct> = Map::open(&object, "tp_ct")?;
        let accounts = Accounts::open(&object, connections.limit(), policy.pods().values().map(|pod| pod.pod_id))?;
        let programs = Self {
            links: Links::new(pins.links(), pins.former_links()?),
            wire: None,
            testing,
            node: NodeMaps::open(&object)?,
            policy,
            services: ServiceMaps::open(&object, Instant::now())?,
            connections,
            audited: AuditMap::open(&object)?,
            accounts,
            inheritance,
            translations: Map::open(&object, "tp_nat")?,
            snat: Map::open(&object, "tp_snat")?,
            unraised: true,
            collected: None,
            config,
            object,
            pins,
        };
        if programs.node.revision()? == 0 {
            programs.node.raise_revision()?;
        }
        // The kernel allocates the timer without waiting for a lock, and fails where another CPU has it just then (Linux 6.18).
        let arm = || object::call(&programs.object, "tp_arm", &mut 0u64);
        let mut step = arm()?;
        for _ in 1..ARM_TRIES {
            if step != 0 {
                std::thread::sleep(ARM_PAUSE);
                step = arm()?;
            }
        }
        match step {
            0 => Ok(programs),
            step => Err(Error::Invalid {
                object: format!("the collector's timer (step {step})"),
                reason: "the kernel did not take it",
            }),
        }
    }

    /// Whether another version was at work when these programs were loaded, and has not gone since. Its links stay until
    /// [`Programs::take_over`]; where they are, attaching does nothing.
    pub fn has_former(&self) -> bool {
        self.inheritance.is_some() || self.links.has_former()
    }

    /// Puts our programs in the place of another version's, older or newer: link by link, each between two packets. To be called
    /// when the maps hold what they should. Whatever fails stays at work, and the next call tries again. How many links there
    /// were.
    pub fn take_over(&mut self) -> Result<usize> {
        let (object, wire) = (&self.object, self.wire.as_ref());
        let find = |name: &str| {
            let wire = wire.filter(|_| name == Hook::FromWire.program());
            let program = wire.map_or_else(|| object::program(object, name), Wire::program);
            program.ok()?.as_fd().try_clone_to_owned().ok()
        };
        self.links.take_over(find)
    }

    /// Ends what [`Programs::take_over`] began, when no program of the other version is at work any more: what those entered at
    /// last is carried over, and their maps go.
    pub fn end_take_over(&mut self) -> Result<()> {
        let Some(inheritance) = &self.inheritance else { return Ok(()) };
        let recount = inheritance.copy_late(&self.object)?;
        // They may have come back with the copy. A pod that has one of these addresses by now opens its first connections again.
        self.purger()?.purge(inheritance.gone())?;
        if recount {
            self.accounts.recount(&self.object, &self.connections)?;
        }
        self.pins.remove_former()?;
        self.inheritance = None;
        Ok(())
    }

    /// Whether the kernel attaches programs to devices by links (tcx, Linux 6.6). Where not, a device's hooks are for the caller to
    /// run as filters ([`crate::net::filter`]); socket hooks are links on every kernel.
    pub fn has_device_links(&self) -> Result<bool> {
        let program = object::program(&self.object, Hook::FromUplink.program())?;
        Ok(links::has_tcx(object::descriptor(&program)))
    }

    /// Whether a link is on the device for that hook, ours or another version's.
    pub fn is_linked(&self, ifindex: u32, hook: Hook) -> Result<bool> {
        self.links.is_linked(ifindex, hook)
    }

    /// A descriptor of a hook's program, to attach it in another way than by a link.
    pub fn descriptor(&self, hook: Hook) -> Result<OwnedFd> {
        let program = object::program(&self.object, hook.program())?;
        let copied = program.as_fd().try_clone_to_owned();
        copied.map_err(|e| Error::kernel("copy the descriptor of", hook.program(), e))
    }

    /// Attaches a hook's program to a device, or replaces the program of the link that is there. Does nothing where another
    /// version's link is (see [`Programs::take_over`]). Idempotent.
    pub fn attach_device(&mut self, ifindex: u32, hook: Hook) -> Result<()> {
        let program = object::program(&self.object, hook.program())?;
        self.links.attach_device(ifindex, hook, object::descriptor(&program))
    }

    /// Loads the program of XDP, if it is not loaded, for a device with that MAC; attaches nothing.
    ///
    /// # Errors
    /// The kernel refuses the program.
    pub fn prepare_wire(&mut self, ifindex: u32, mac: [u8; 6]) -> Result<()> {
        if self.wire.is_none() {
            self.wire = Some(Wire::load(&self.object, self.testing)?);
        }
        self.wire.as_ref().map_or(Ok(()), |wire| wire.set_mac(ifindex, mac))
    }

    /// As [`Programs::attach_device`], for the program of XDP, in the device's driver: see [`Programs::prepare_wire`].
    ///
    /// # Errors
    /// The driver cannot run such programs, or not with this device's settings; or it runs somebody else's.
    pub fn attach_wire(&mut self, ifindex: u32) -> Result<()> {
        let Some(wire) = &self.wire else {
            return Err(Error::Invalid {
                object: format!("device {ifindex}"),
                reason: "the program of XDP is not loaded",
            });
        };
        self.links.attach_device(ifindex, Hook::FromWire, object::descriptor(&wire.program()?))
    }

    /// Detaches the program of XDP from every device but these.
    ///
    /// # Errors
    /// Pins cannot be listed or removed.
    pub fn retain_wires(&mut self, devices: &[u32]) -> Result<Vec<u32>> {
        let mut gone = self.links.devices_of(Hook::FromWire)?;
        gone.retain(|device| !devices.contains(device));
        gone.iter().try_for_each(|device| self.links.detach_hook(*device, Hook::FromWire))?;
        Ok(gone)
    }

    /// Detaches all hooks of a device. Idempotent; the device may be gone.
    pub fn detach_device(&mut self, ifindex: u32) -> Result<()> {
        self.links.detach_device(ifindex)
    }

    /// Attaches the socket programs to a cgroup directory, or replaces them in place; not where another version's are.
    /// Idempotent.
    pub fn attach_cgroup(&mut self, cgroup: &Path) -> Result<()> {
        let dir = fs::File::open(cgroup).map_err(|e| Error::kernel("open cgroup", cgroup.display().to_string(), e))?;
        for (name, kind) in links::SOCKET_PROGRAMS {
            let program = object::program(&self.object, name)?;
            self.links.attach_cgroup(&dir, cgroup, name, kind, object::descriptor(&program))?;
        }
        Ok(())
    }

    /// Detaches the socket programs. Idempotent.
    pub fn detach_cgroup(&mut self) -> Result<()> {
        self.links.detach_cgroup()
    }

    /// Removes pinned links whose device or cgroup is gone; the number removed.
    pub fn sweep_links(&mut self) -> Result<usize> {
        self.links.sweep()
    }

    /// Device hooks that are attached, by what the kernel says of the pinned links.
    pub fn attached(&self) -> Result<Vec<(u32, Hook)>> {
        self.links.attached()
    }

    /// Removes every pin of this node, other versions' too: links (which detaches) and maps.
    pub fn unpin_all(self) -> Result<()> {
        self.links.remove_all()?;
        self.pins.remove()
    }

    /// The node's own facts.
    pub fn apply_node(&mut self, node: &NodeConfig) -> Result<Changes> {
        self.node.apply_node(node)
    }

    /// What besides the tunnel packets come by; the next [`Programs::apply_peers`] writes it.
    pub fn surround(&mut self, surroundings: Surroundings) {
        self.node.surround(surroundings);
    }

    /// At which addresses of nodes NodePorts do not answer; the next [`Programs::apply_peers`] writes it.
    pub fn silence(&mut self, silent: BTreeSet<IpAddr>) {
        self.node.silence(silent);
    }

    /// Ranges and addresses of all nodes, this one included.
    pub fn apply_peers(&mut self, peers: &[NodePeer]) -> Result<Changes> {
        let before = std::mem::replace(&mut self.unraised, true);
        let changes = self.node.apply_peers(peers)?;
        if before || changes != Changes::default() {
            self.node.raise_revision()?;
        }
        self.unraised = false;
        Ok(changes)
    }

    /// Services: new backend lists are written whole, entries flip, old lists go at a later [`Programs::sweep`].
    pub fn apply_services(&mut self, table: &ServiceTable, now: Instant) -> Result<ServicesApplied> {
        self.services.apply(table, now)
    }

    /// What became different in the Services since [`Programs::apply_services`], or since this. After a failure only the whole
    /// table may follow.
    pub fn apply_service_changes(&mut self, changes: &ServiceChanges, now: Instant) -> Result<ServicesApplied> {
        self.services.apply_changes(changes, now)
    }

    /// Policy, including the sets of the pods that [`Programs::set_pod`] named. The revision is raised last.
    pub fn apply_policy(&mut self, image: &PolicyImage) -> Result<Changes> {
        let node = &self.node;
        self.policy.apply(image, || node.raise_revision())
    }

    /// What became different in the policy since [`Programs::apply_policy`], or since this. After a failure only the whole image may
    /// follow.
    pub fn apply_policy_changes(&mut self, changes: &PolicyChanges) -> Result<Changes> {
        let node = &self.node;
        self.policy.apply_changes(changes, || node.raise_revision())
    }

    /// Takes all rules out of the tables, for policies that do not fit beside those before. Until the next [`Programs::apply_policy`] the pods that had
    /// any are closed to all but their node; the others stay as they are.
    pub fn vacate_policy(&mut self) -> Result<Changes> {
        let node = &self.node;
        self.policy.vacate(|| node.raise_revision())
    }

    /// Makes a pod known whose sockets are translated. To be called before its device is up. Idempotent.
    pub fn set_pod(&mut self, pod: &LocalPod, isolation: Isolation) -> Result<()> {
        self.enter_pod(pod, isolation, TranslatedAt::Sockets)
    }

    /// Makes a pod known. To be called before its device is up. Idempotent.
    pub fn enter_pod(&mut self, pod: &LocalPod, isolation: Isolation, translated_at: TranslatedAt) -> Result<()> {
        self.accounts.add(pod.pod_id)?;
        let (changes, reused) = self.policy.set_pod(pod, isolation, translated_at)?;
        for address in reused {
            self.purge(&[address])?;
        }
        if changes != Changes::default() {
            self.node.raise_revision()?;
        }
        Ok(())
    }

    /// Makes a pod known that an earlier process attached: its sets stay as the pinned entry has them, so nothing opens or
    /// closes before the first [`Programs::apply_policy`]. Without an entry everything is denied but its node. Where its Services are
    /// translated stays, too.
    pub fn adopt_pod(&mut self, pod: &LocalPod) -> Result<()> {
        let (isolation, translated_at) = (self.policy.isolation_of(pod), self.policy.translated_at(pod));
        self.enter_pod(pod, isolation, translated_at)
    }

    /// Where what a pod sends to Services is translated from now on; whether that is a change. Its open connections go on as they are.
    pub fn set_translated_at(&mut self, pod: &LocalPod, translated_at: TranslatedAt) -> Result<bool> {
        self.policy.set_translated_at(pod, translated_at)
    }

    /// Whether what is for a pod waits in the queue of its device from now on, or goes past it; whether that is a change. Open connections follow at their
    /// next packets.
    pub fn set_waits(&mut self, pod: &LocalPod, waits: bool) -> Result<bool> {
        let outcome = self.policy.set_waits(pod, waits);
        // Also of one that came no further than one of its addresses: the next call finds nothing different there.
        if !matches!(outcome, Ok(false)) {
            self.node.raise_revision()?;
        }
        outcome
    }

    /// Forgets every pod that is not among these and purges its connections; how many addresses there were.
    pub fn retain_pods(&mut self, known: &[LocalPod]) -> Result<usize> {
        let gone = self.policy.retain_pods(known)?;
        self.purge(&gone)?;
        Ok(gone.len())
    }

    /// Forgets a pod and purges its connections. Idempotent; a pod whose address now belongs to another loses only what is
    /// its own.
    pub fn remove_pod(&mut self, pod: &LocalPod) -> Result<()> {
        let gone = self.policy.remove_pod(pod)?;
        self.purge(&gone)
    }

    fn purge(&mut self, addresses: &[Addr]) -> Result<()> {
        self.note_gone(addresses);
        let addresses: Vec<IpAddr> = addresses.iter().map(|a| a.ip()).collect();
        self.purger()?.purge(&addresses).map(drop)
    }

    fn note_gone(&mut self, addresses: &[Addr]) {
        if let Some(inheritance) = &mut self.inheritance {
            inheritance.note_gone(addresses.iter().map(|a| a.ip()));
        }
    }

    /// As [`Programs::remove_pod`], but leaves its connections, which cost tens of milliseconds to find, to a [`Purger`].
    /// Until they are gone none of its addresses may be given to another pod. They carry nothing any more: the revision is
    /// raised, and who looks at their ends again finds no pod.
    pub fn forget_pod(&mut self, pod: &LocalPod) -> Result<()> {
        let gone = self.policy.remove_pod(pod)?;
        self.note_gone(&gone);
        if !gone.is_empty() {
            self.node.raise_revision()?;
        }
        Ok(())
    }

    /// A handle that deletes connections from any thread.
    pub fn purger(&self) -> Result<Purger> {
        Purger::new(&self.object)
    }

    /// Iterators over the sockets that the hooks translated, usable from any thread.
    ///
    /// # Errors
    /// This kernel has none.
    pub fn held_sockets(&self) -> Result<HeldSockets> {
        HeldSockets::open(&self.object)
    }

    /// A handle on the translations of UDP, usable from any thread.
    pub fn translations(&self) -> Result<Translations> {
        Translations::open(&self.object)
    }

    /// Where UDP flows may go, of every frontend that the kernel has.
    pub fn udp_targets(&self) -> impl Iterator<Item = UdpTarget> {
        self.services.udp_targets()
    }

    /// Whether UDP flows may be held to what their Service no longer has, since this was asked last; yes at the first time.
    pub fn take_udp_left(&mut self) -> bool {
        self.services.take_udp_left()
    }

    /// Deletes what a grace period protected (old backend lists, backends that left the table and what was pinned to
    /// them, accounts of pods that are gone) and, every ten seconds, idle connections. Call every second or so; the entries
    /// removed.
    pub fn sweep(&mut self, now: Instant) -> Result<usize> {
        let (mut removed, backends_went) = self.services.sweep(now)?;
        if backends_went {
            let mut released = Removed::default();
            object::call(&self.object, "tp_release", &mut released)?;
            removed += released.translations as usize;
        }
        if self.collected.is_none_or(|last| now.saturating_duration_since(last) >= COLLECT_EVERY) {
            let idle = self.collect()?;
            removed += (idle.connections + idle.translations) as usize;
            self.collected = Some(now);
        }
        let pods: HashSet<u32> = self.policy.pods().values().map(|pod| pod.pod_id).collect();
        removed += self.accounts.sweep(&pods, now)?;
        Ok(removed)
    }

    /// One run of the collector; the entries removed. When nobody asks for 30 seconds, the kernel runs it by itself.
    pub fn collect(&mut self) -> Result<Removed> {
        let mut removed = Removed::default();
        object::call(&self.object, "tp_collect", &mut removed)?;
        Ok(removed)
    }

    /// Counters of what the programs did and why they dropped.
    pub fn counters(&self) -> Result<Vec<Count>> {
        observe::counters(&self.object)
    }

    /// Makes the programs tell what they drop, from now on until the answer is gone.
    pub fn listen_to_drops(&self) -> Result<DropsEar> {
        DropsEar::open(&self.object)
    }

    /// What policies that are only audited would have denied.
    pub fn audited(&self) -> Result<Vec<Audited>> {
        self.audited.counts()
    }

    /// Takes counts away whose sets no pod has any more.
    pub fn forget_audited(&self, keys: &[(SetId, RuleId)]) -> Result<()> {
        self.audited.forget(keys)
    }

    /// Every tracked connection, those with backends that are no pods included. Reads the whole tables: milliseconds for 100,000.
    pub fn connections(&self) -> Result<Vec<Connection>> {
        observe::connections(&self.connections, &self.snat)
    }

    /// How the connection table is held by pods.
    pub fn held(&self) -> Result<Held> {
        self.accounts.held(self.policy.pods())
    }

    /// How full the maps are. Reads the table of translations.
    pub fn usage(&self) -> Result<Vec<MapUsage>> {
        let tracked = [
            ("tp_ct", self.accounts.all()? as usize, self.connections.limit()),
            ("tp_nat", self.translations.entries()?.len(), self.translations.limit()),
            ("tp_snat", self.snat.entries()?.len(), self.snat.limit()),
            self.audited.usage()?,
        ];
        let mirrored = self.node.usage().into_iter().chain(self.policy.usage()).chain(self.services.usage());
        Ok(mirrored.chain(tracked).map(|(map, entries, limit)| MapUsage { map, entries, limit }).collect())
    }

    /// What the maps hold, by the mirror that is compared with.
    pub fn snapshot(&self) -> Result<Snapshot> {
        Ok(Snapshot {
            node: self.node.config().copied(),
            revision: self.node.revision()?,
            pods: self.policy.pods().iter().map(|(address, pod)| (address.ip(), *pod)).collect(),
            peers: self.node.peers().iter().filter_map(|(key, peer)| Some((key.net()?, *peer))).collect(),
            services: self.services.services().iter().map(|(key, service)| (*key, *service)).collect(),
        })
    }

    /// The loaded object, for fixtures that run programs by themselves.
    #[doc(hidden)]
    pub fn object(&self) -> &Object {
        &self.object
    }

    /// The program of XDP's object, as [`Programs::object`], once it is loaded.
    #[doc(hidden)]
    pub fn wire_object(&self) -> Option<&Object> {
        self.wire.as_ref().map(Wire::object)
    }

    /// Whether the programs have pods on the link ([`NodeConfig::on_link`]).
    pub(crate) fn is_on_link(&self) -> bool {
        self.node.config().is_some_and(|config| config.flags & crate::abi::TP_NODE_ON_LINK != 0)
    }

    /// Where this node's pins are.
    pub fn config(&self) -> &BpfConfig {
        &self.config
    }
}
