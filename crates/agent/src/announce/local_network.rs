//! Announces addresses on the nodes' own network: answers ARP and neighbour solicitations for them at every device that leads out, and
//! says so to everybody when it begins to.
//!
//! The addresses are on no device, so the kernel answers for none of them. What is heard is filtered in the kernel; with no address to
//! answer for, no socket is open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;
use towpath_datapath::net::groups::Groups;
use towpath_datapath::net::netlink::Netlink;
use towpath_datapath::net::packet::{Listen, PacketSocket};
use towpath_datapath::net::{address, link};
use tracing::{debug, info, warn};

use super::Announcer;
use super::frames;
use super::table::{Entry, Speaker, Standing, Table};

/// Devices come and go: they are looked at so often.
const LOOK: Duration = Duration::from_secs(5);
/// Longer than any frame that is read.
const FRAME: usize = 2048;
/// So many frames are read before others have their turn: whoever floods the network is not to have all of this node's agent.
const AT_ONCE: usize = 64;

#[derive(Debug, Default)]
struct Shared {
    /// What the sockets' tasks and the elections share.
    table: Mutex<Table>,
    changed: Notify,
}

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is announced at the moment, for whoever reports it. Keeps nothing running.
#[derive(Clone, Debug, Default)]
pub struct Announced(Weak<Shared>);

impl Announced {
    /// The addresses that this node answers for now.
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        let Some(shared) = self.0.upgrade() else { return BTreeSet::new() };
        shared.table().answered(Instant::now())
    }
}

/// A handle on the announcer; the last one that is dropped ends it.
#[derive(Clone, Debug)]
pub struct LocalNetwork {
    shared: Arc<Shared>,
    _task: Arc<AbortOnDropHandle<()>>,
}

impl LocalNetwork {
    /// Starts it on the devices that lead out of this node.
    pub fn start(datapath: Datapath) -> Self {
        let shared: Arc<Shared> = Arc::default();
        let serving = Serving {
            shared: shared.clone(),
            datapath,
            devices: BTreeMap::new(),
            complained: String::new(),
            unjoined: String::new(),
        };
        let task = AbortOnDropHandle::new(tokio::spawn(serving.run()));
        Self { shared, _task: Arc::new(task) }
    }

    /// What it announces.
    pub fn announced(&self) -> Announced {
        Announced(Arc::downgrade(&self.shared))
    }

    fn change(&self, address: IpAddr, change: impl FnOnce(&mut Entry)) {
        change(self.shared.table().entry(address));
        self.shared.changed.notify_one();
    }
}

impl Announcer for LocalNetwork {
    fn prepare(&self, address: IpAddr) {
        self.change(address, |_| {});
    }

    fn announce(&self, address: IpAddr, until: Option<Instant>) {
        let standing = until.map_or(Standing::Always, Standing::Until);
        self.change(address, |entry| entry.announce(standing, Instant::now()));
    }

    fn withdraw(&self, address: IpAddr) {
        self.change(address, Entry::withdraw);
    }

    fn probe(&self, address: IpAddr) {
        self.change(address, Entry::probe);
    }

    fn is_contested_since(&self, address: IpAddr, since: Instant) -> bool {
        self.shared.table().get(address).is_some_and(|entry| entry.is_contested_since(since))
    }

    fn forget(&self, address: IpAddr) {
        self.shared.table().forget(address);
        self.shared.changed.notify_one();
    }
}

/// A device that leads out, with its sockets.
struct Device {
    speaker: Speaker,
    /// What is sent leaves by it; whoever hears holds it, too.
    arp: Arc<AsyncFd<PacketSocket>>,
    groups: Groups,
    hearing: [AbortOnDropHandle<()>; 2],
}

/// What is known of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    index: u32,
    speaker: Speaker,
}

struct Serving {
    shared: Arc<Shared>,
    datapath: Datapath,
    devices: BTreeMap<u32, Device>,
    complained: String,
    /// Why groups could not be joined, so that it is said once.
    unjoined: String,
}

impl Serving {
    async fn run(mut self) {
        let mut look_at = Instant::now();
        loop {
            let wanted = !self.shared.table().is_empty();
            if !wanted {
                self.devices.clear();
                look_at = Instant::now();
                self.shared.changed.notified().await;
                continue;
            }
            if Instant::now() >= look_at {
                self.look().await;
                look_at = Instant::now() + LOOK;
            }
            self.join_groups();
            let next = self.send_what_is_due();
            let next = next.map_or(look_at, |next| next.min(look_at));
            tokio::select! {
                () = self.shared.changed.notified() => {}
                () = sleep_until(next) => {}
            }
        }
    }

    /// Has sockets on the devices that there are now.
    async fn look(&mut self) {
        let found = match self.find().await {
            Ok(found) => found,
            Err(error) => return self.complain(format!("devices that lead out cannot be listed: {error}")),
        };
        self.devices.retain(|index, device| {
            let same = |found: &&Found| found.index == *index && found.speaker == device.speaker;
            found.iter().any(|now| same(&now)) && !device.hearing.iter().any(AbortOnDropHandle::is_finished)
        });
        self.shared.table().own_macs = found.iter().map(|device| device.speaker.mac).collect();
        let mut complaint = String::new();
        let mut opened_one = false;
        for device in found {
            if self.devices.contains_key(&device.index) {
                continue;
            }
            match open(&device, &self.shared) {
                Ok(opened) => {
                    self.devices.insert(device.index, opened);
                    opened_one = true;
                }
                Err(error) => {
                    complaint = format!("addresses cannot be announced at device {}: {error}", device.speaker.name);
                }
            }
        }
        // Who learnt a device's former address, or sits behind a device that was down, is told now.
        if opened_one {
            self.shared.table().tell_again(Instant::now());
        }
        self.complain(complaint);
    }

    /// Once for each thing that is wrong.
    fn complain(&mut self, complaint: String) {
        if !complaint.is_empty() && complaint != self.complained {
            warn!("load balancers: {complaint}; trying again");
        }
        self.complained = complaint;
    }

    async fn find(&self) -> Result<Vec<Found>, String> {
        let outside = self.datapath.facts().await.map_err(|error| error.to_string())?.outside;
        let list = move || -> Result<_, towpath_datapath::net::Error> {
            let mut netlink = Netlink::open()?;
            Ok((link::list(&mut netlink)?, address::list(&mut netlink)?))
        };
        let listed = tokio::task::spawn_blocking(list).await.map_err(|error| error.to_string())?;
        let (links, addresses) = listed.map_err(|error| error.to_string())?;
        let usable = links.into_iter().filter(|link| link.up && outside.iter().any(|(index, _)| *index == link.index));
        let found = usable.filter_map(|link| {
            let of_device = addresses.iter().filter(|a| a.device == link.index && !a.tentative && !a.ours);
            let sixes = of_device.filter_map(|a| match a.address {
                IpAddr::V6(v6) => Some(v6),
                IpAddr::V4(_) => None,
            });
            // RFC 4861 §4.4 takes any address of the device; its link-local one is there whatever becomes of the others.
            let own = sixes.max_by_key(Ipv6Addr::is_unicast_link_local);
            Some(Found { index: link.index, speaker: Speaker { name: link.name, mac: link.mac?, own } })
        });
        Ok(found.collect())
    }

    /// Hears what is asked of the groups that the addresses belong to.
    fn join_groups(&mut self) {
        let sixes = |address| match address {
            IpAddr::V6(address) => Some(frames::solicited_node(address)),
            IpAddr::V4(_) => None,
        };
        let wanted: BTreeSet<Ipv6Addr> = self.shared.table().addresses().filter_map(sixes).collect();
        let mut unjoined = String::new();
        for device in self.devices.values_mut() {
            let failed = device.groups.follow(&wanted);
            if let Some((group, error)) = failed.first() {
                let (count, device) = (failed.len(), &device.speaker.name);
                unjoined = format!(
                    "{count} groups of IPv6 could not be joined at device {device}, {group} among them: {error}"
                );
            }
        }
        if !unjoined.is_empty() && unjoined != self.unjoined {
            warn!("load balancers: {unjoined}; where switches filter groups, who asks for an address is not heard");
        }
        self.unjoined = unjoined;
    }

    /// Tells everybody what is due; when the next is.
    fn send_what_is_due(&self) -> Option<Instant> {
        let due = self.shared.table().take_due(Instant::now());
        for Device { speaker, arp, .. } in self.devices.values() {
            let told = due.told.iter().flat_map(|address| frames::announcement(*address, speaker.mac, speaker.own));
            let probes = due.probes.iter().map(|address| frames::probe(*address, speaker.mac, speaker.own));
            for frame in told.chain(probes) {
                if let Err(error) = arp.get_ref().send(&frame) {
                    debug!(device = speaker.name, %error, "not sent");
                }
            }
        }
        due.next
    }
}

fn open(device: &Found, shared: &Arc<Shared>) -> Result<Device, String> {
    let socket = |listen| {
        let socket = PacketSocket::open(device.index, listen).and_then(PacketSocket::watched);
        socket.map(Arc::new).map_err(|error| error.to_string())
    };
    let (arp, discovery) = (socket(Listen::Arp)?, socket(Listen::NeighbourDiscovery)?);
    let hear = |socket: &Arc<AsyncFd<PacketSocket>>| {
        let hearing = hear(socket.clone(), shared.clone(), device.speaker.clone());
        AbortOnDropHandle::new(tokio::spawn(hearing))
    };
    let hearing = [hear(&arp), hear(&discovery)];
    info!(device = device.speaker.name, "answers for load balancers' addresses here");
    Ok(Device { speaker: device.speaker.clone(), arp, groups: Groups::on(device.index), hearing })
}

/// Reads and answers until the device is gone.
async fn hear(socket: Arc<AsyncFd<PacketSocket>>, shared: Arc<Shared>, device: Speaker) {
    let mut buffer = vec![0_u8; FRAME];
    loop {
        let Ok(mut ready) = socket.readable().await else { return };
        let mut read = 0_usize;
        loop {
            read += 1;
            if read.is_multiple_of(AT_ONCE) {
                tokio::task::yield_now().await;
            }
            match socket.get_ref().receive(&mut buffer) {
                Ok(Some(length)) => {
                    let heard = frames::read(buffer.get(..length).unwrap_or_default());
                    let (answer, is_due) = shared.table().answer(&heard, &device, Instant::now());
                    if is_due {
                        shared.changed.notify_one();
                    }
                    if let Some(answer) = answer
                        && let Err(error) = socket.get_ref().send(&answer)
                    {
                        debug!(device = device.name, %error, "not answered");
                    }
                }
                Ok(None) => break,
                Err(error) if error.errno() == Some(Errno::ENETDOWN as i32) => {
                    // Said once; it is heard again when it is up.
                    debug!(device = device.name, "down");
                    break;
                }
                Err(error) => {
                    warn!(device = device.name, %error, "load balancers' addresses are not answered for here any more; trying again");
                    return;
                }
            }
        }
        ready.clear_ready();
    }
}
