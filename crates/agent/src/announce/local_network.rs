//! Announces addresses on the nodes' own network: answers ARP and neighbour solicitations for them at every device that leads out, and
//! says so to everybody when it begins to.
//!
//! The addresses are on no device, so the kernel answers for none of them. What is heard is filtered in the kernel; with no address to
//! answer for, no socket is open.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr, UdpSocket};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use nix::errno::Errno;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};
use tokio_util::task::AbortOnDropHandle;
use towpath_datapath::Datapath;
use towpath_datapath::net::netlink::Netlink;
use towpath_datapath::net::packet::{Listen, PacketSocket};
use towpath_datapath::net::{address, link};
use tracing::{debug, info, warn};

use super::Announcer;
use super::frames::{self, Mac};

/// When everybody is told, after an announcement began: a frame may be lost, and a switch may just be learning.
const TOLD_AT: [Duration; 6] = [
    Duration::ZERO,
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Devices come and go: they are looked at so often.
const LOOK: Duration = Duration::from_secs(5);
/// Another that claims an address of ours is answered so often at most (RFC 5227 §2.4).
const DEFEND_EVERY: Duration = Duration::from_secs(1);
/// Longer than any frame that is read.
const FRAME: usize = 2048;

/// Whether an address is answered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    Silent,
    Until(Instant),
    Always,
}

impl Standing {
    fn answers(self, now: Instant) -> bool {
        match self {
            Self::Silent => false,
            Self::Until(end) => now < end,
            Self::Always => true,
        }
    }
}

#[derive(Debug)]
struct Entry {
    standing: Standing,
    /// When the announcement began, and how often it was told; none: nothing is left to tell.
    telling: Option<(Instant, usize)>,
    /// Who else was last heard to have it.
    rival: Option<(Mac, Instant)>,
    defended: Option<Instant>,
    probe: bool,
}

impl Entry {
    const NEW: Self = Self { standing: Standing::Silent, telling: None, rival: None, defended: None, probe: false };

    /// When something is to be sent.
    fn due(&self) -> Option<Instant> {
        let (began, told) = self.telling?;
        Some(began + *TOLD_AT.get(told)?)
    }
}

/// What the sockets' tasks and the elections share.
#[derive(Debug, Default)]
struct Table {
    entries: BTreeMap<IpAddr, Entry>,
    own_macs: BTreeSet<Mac>,
}

#[derive(Debug, Default)]
struct Shared {
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
        let now = Instant::now();
        let table = shared.table();
        table.entries.iter().filter(|(_, entry)| entry.standing.answers(now)).map(|(address, _)| *address).collect()
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
        let serving = Serving { shared: shared.clone(), datapath, devices: BTreeMap::new(), complained: String::new() };
        let task = AbortOnDropHandle::new(tokio::spawn(serving.run()));
        Self { shared, _task: Arc::new(task) }
    }

    /// What it announces.
    pub fn announced(&self) -> Announced {
        Announced(Arc::downgrade(&self.shared))
    }

    fn change(&self, address: IpAddr, change: impl FnOnce(&mut Entry)) {
        change(self.shared.table().entries.entry(address).or_insert(Entry::NEW));
        self.shared.changed.notify_one();
    }
}

impl Announcer for LocalNetwork {
    fn prepare(&self, address: IpAddr) {
        self.change(address, |_| {});
    }

    fn announce(&self, address: IpAddr, until: Option<Instant>) {
        let now = Instant::now();
        self.change(address, |entry| {
            if !entry.standing.answers(now) {
                entry.telling = Some((now, 0));
            }
            entry.standing = until.map_or(Standing::Always, Standing::Until);
        });
    }

    fn withdraw(&self, address: IpAddr) {
        self.change(address, |entry| {
            entry.standing = Standing::Silent;
            entry.telling = None;
        });
    }

    fn probe(&self, address: IpAddr) {
        self.change(address, |entry| entry.probe = true);
    }

    fn is_contested_since(&self, address: IpAddr, since: Instant) -> bool {
        let rival = self.shared.table().entries.get(&address).and_then(|entry| entry.rival);
        rival.is_some_and(|(_, heard)| heard >= since)
    }

    fn forget(&self, address: IpAddr) {
        self.shared.table().entries.remove(&address);
        self.shared.changed.notify_one();
    }
}

/// A device that leads out, with its sockets.
struct Device {
    name: String,
    mac: Mac,
    /// Where our messages of IPv6 come from.
    own: Option<Ipv6Addr>,
    /// What is sent leaves by it; whoever hears holds it, too.
    arp: Arc<AsyncFd<PacketSocket>>,
    /// Holds the memberships; none where there is no IPv6.
    groups: Option<UdpSocket>,
    joined: BTreeSet<Ipv6Addr>,
    hearing: [AbortOnDropHandle<()>; 2],
}

/// What is known of a device.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Found {
    index: u32,
    name: String,
    mac: Mac,
    own: Option<Ipv6Addr>,
}

struct Serving {
    shared: Arc<Shared>,
    datapath: Datapath,
    devices: BTreeMap<u32, Device>,
    complained: String,
}

impl Serving {
    async fn run(mut self) {
        let mut look_at = Instant::now();
        loop {
            let wanted = !self.shared.table().entries.is_empty();
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
            let same = |found: &&Found| found.index == *index && found.mac == device.mac && found.own == device.own;
            found.iter().any(|now| same(&now)) && !device.hearing.iter().any(AbortOnDropHandle::is_finished)
        });
        self.shared.table().own_macs = found.iter().map(|device| device.mac).collect();
        let mut complaint = String::new();
        for device in found {
            if self.devices.contains_key(&device.index) {
                continue;
            }
            match open(&device, &self.shared) {
                Ok(opened) => drop(self.devices.insert(device.index, opened)),
                Err(error) => {
                    complaint = format!("addresses cannot be announced at device {}: {error}", device.name);
                }
            }
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
            Some(Found { index: link.index, mac: link.mac?, name: link.name, own })
        });
        Ok(found.collect())
    }

    /// Hears what is asked of the groups that the addresses belong to, also where a switch or a card filters groups.
    fn join_groups(&mut self) {
        let addresses: Vec<IpAddr> = self.shared.table().entries.keys().copied().collect();
        let wanted: BTreeSet<Ipv6Addr> = addresses
            .into_iter()
            .filter_map(|address| match address {
                IpAddr::V6(address) => Some(frames::solicited_node(address)),
                IpAddr::V4(_) => None,
            })
            .collect();
        for (index, device) in &mut self.devices {
            let Some(groups) = &device.groups else { continue };
            for group in device.joined.difference(&wanted) {
                if let Err(error) = groups.leave_multicast_v6(group, *index) {
                    debug!(%group, device = device.name, %error, "not left");
                }
            }
            device.joined.retain(|group| wanted.contains(group));
            for group in &wanted {
                if device.joined.contains(group) {
                    continue;
                }
                match groups.join_multicast_v6(group, *index) {
                    Ok(()) => drop(device.joined.insert(*group)),
                    Err(error) => debug!(%group, device = device.name, %error, "not joined"),
                }
            }
        }
    }

    /// Tells everybody what is due; when the next is.
    fn send_what_is_due(&self) -> Option<Instant> {
        let now = Instant::now();
        let (mut told, mut probes, mut next) = (Vec::new(), Vec::new(), None::<Instant>);
        for (address, entry) in &mut self.shared.table().entries {
            if std::mem::take(&mut entry.probe) {
                probes.push(*address);
            }
            if let Some((began, times)) = entry.telling
                && entry.due().is_some_and(|due| due <= now)
            {
                if entry.standing.answers(now) {
                    told.push(*address);
                }
                entry.telling = Some((began, times + 1));
            }
            next = entry.due().into_iter().chain(next).min();
        }
        for device in self.devices.values() {
            let frames = told
                .iter()
                .flat_map(|address| frames::announcement(*address, device.mac, device.own))
                .chain(probes.iter().map(|address| frames::probe(*address, device.mac, device.own)));
            for frame in frames {
                if let Err(error) = device.arp.get_ref().send(&frame) {
                    debug!(device = device.name, %error, "not sent");
                }
            }
        }
        next
    }
}

fn open(device: &Found, shared: &Arc<Shared>) -> Result<Device, String> {
    let socket = |listen| {
        let socket = PacketSocket::open(device.index, listen).and_then(PacketSocket::watched);
        socket.map(Arc::new).map_err(|error| error.to_string())
    };
    let (arp, discovery) = (socket(Listen::Arp)?, socket(Listen::NeighbourDiscovery)?);
    let groups = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))
        .inspect_err(|error| debug!(device = device.name, %error, "no groups of IPv6 here"))
        .ok();
    let hear = |socket: &Arc<AsyncFd<PacketSocket>>| {
        let hearing = hear(socket.clone(), shared.clone(), device.clone());
        AbortOnDropHandle::new(tokio::spawn(hearing))
    };
    let hearing = [hear(&arp), hear(&discovery)];
    info!(device = device.name, "answers for load balancers' addresses here");
    Ok(Device {
        name: device.name.clone(),
        mac: device.mac,
        own: device.own,
        arp,
        groups,
        joined: BTreeSet::new(),
        hearing,
    })
}

/// Reads and answers until the device is gone.
async fn hear(socket: Arc<AsyncFd<PacketSocket>>, shared: Arc<Shared>, device: Found) {
    let mut buffer = vec![0_u8; FRAME];
    loop {
        let Ok(mut ready) = socket.readable().await else { return };
        loop {
            match socket.get_ref().receive(&mut buffer) {
                Ok(Some(length)) => {
                    let heard = frames::read(buffer.get(..length).unwrap_or_default());
                    if let Some(answer) = answer(&shared, &heard, &device, Instant::now())
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

/// What is to be said to what was heard.
fn answer(shared: &Shared, heard: &frames::Heard, device: &Found, now: Instant) -> Option<Vec<u8>> {
    let mut table = shared.table();
    if let Some((address, mac)) = heard.claims
        && !table.own_macs.contains(&mac)
        && let Some(entry) = table.entries.get_mut(&address)
    {
        entry.rival = Some((mac, now));
        if entry.standing == Standing::Always {
            // No Lease says that it is ours, and another node says that it is its.
            entry.standing = Standing::Silent;
            entry.telling = None;
        } else if entry.standing.answers(now) && entry.defended.is_none_or(|last| now - last >= DEFEND_EVERY) {
            entry.defended = Some(now);
            entry.telling = Some((now, 0));
            shared.changed.notify_one();
            let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
            warn!(%address, mac, device = device.name, "another device claims this load balancer's address: is it in use elsewhere?");
        }
    }
    let question = heard.asks?;
    let entry = table.entries.get(&question.target)?;
    entry.standing.answers(now).then(|| frames::answer(&question, device.mac, device.own))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::frames::{Heard, Question};

    const THEIRS: Mac = [2, 0, 0, 0, 0, 9];

    fn device() -> Found {
        Found { index: 2, name: "eth0".to_owned(), mac: [2, 0, 0, 0, 0, 1], own: None }
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn shared(standing: Standing) -> Shared {
        let shared = Shared::default();
        shared.table().entries.insert(ip("192.0.2.1"), Entry { standing, ..Entry::NEW });
        shared.table().own_macs.insert(device().mac);
        shared
    }

    fn asks(target: &str) -> Heard {
        Heard { asks: Some(Question { target: ip(target), mac: THEIRS, from: Some(ip("192.0.2.9")) }), claims: None }
    }

    fn claims(mac: Mac) -> Heard {
        Heard { asks: None, claims: Some((ip("192.0.2.1"), mac)) }
    }

    #[test]
    fn an_address_is_answered_for_while_its_lease_holds_and_no_other_is() {
        let now = Instant::now();
        let shared = shared(Standing::Until(now + Duration::from_secs(1)));
        assert!(answer(&shared, &asks("192.0.2.1"), &device(), now).is_some());
        assert!(answer(&shared, &asks("192.0.2.2"), &device(), now).is_none());
        let later = now + Duration::from_secs(1);
        assert!(answer(&shared, &asks("192.0.2.1"), &device(), later).is_none(), "whoever else thinks it still holds");
    }

    #[test]
    fn who_goes_on_without_a_lease_is_silent_as_soon_as_another_is_heard() {
        let shared = shared(Standing::Always);
        let now = Instant::now();
        answer(&shared, &claims(device().mac), &device(), now);
        assert!(answer(&shared, &asks("192.0.2.1"), &device(), now).is_some(), "it heard itself");
        answer(&shared, &claims(THEIRS), &device(), now);
        assert!(answer(&shared, &asks("192.0.2.1"), &device(), now).is_none());
        assert!(shared.table().entries[&ip("192.0.2.1")].rival.is_some_and(|(_, heard)| heard == now));
    }

    #[test]
    fn who_has_the_lease_says_so_again_when_another_claims_the_address_but_not_for_ever() {
        let now = Instant::now();
        let shared = shared(Standing::Until(now + Duration::from_secs(60)));
        let told = || shared.table().entries.get_mut(&ip("192.0.2.1")).unwrap().telling.take().is_some();
        answer(&shared, &claims(THEIRS), &device(), now);
        assert!(told());
        answer(&shared, &claims(THEIRS), &device(), now);
        assert!(!told(), "two that defend themselves against each other would never stop");
        answer(&shared, &claims(THEIRS), &device(), now + DEFEND_EVERY);
        assert!(told() && answer(&shared, &asks("192.0.2.1"), &device(), now).is_some());
    }
}
