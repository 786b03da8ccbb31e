//! Pods' devices: attach, detach, check, adopt, repair.
//!
//! Order when attaching: the pair is made with both sides down, programs and the pod's map entry are in place, then the host
//! side comes up, and the pod's side last. So no packet of a pod ever passes unjudged.
//!
//! All but the pod's side is done on the data path's thread, one pod after the other; the pod's side by others ([`super::finish`]), so that
//! many pods that come at once do not wait for each other there.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::time::Duration;

use towpath_model::Bandwidth;
use towpath_model::desired::{LocalPod, TranslatedAt};

use super::Node;
use super::finish::{Begun, Finishing};
use super::reaper::Remains;
use crate::bpf::Isolation;
use crate::error::Error;
use crate::net::link::{self, Link, Veth};
use crate::net::pod::Mtu;
use crate::net::{self, MAIN_TABLE, mac, neighbour, netns, pod, route};
use crate::records::Record;
use crate::requests::{Applied, AttachRequest, CheckRequest, PodSurvey};
use crate::worker::Worker;

/// When a device that goes is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Removal {
    /// On return.
    Now,
    /// Soon: routes and programs no longer know the pod on return.
    Soon,
}

/// What a request asks for, checked.
#[derive(Debug)]
struct Described {
    pod: LocalPod,
    mtu: u32,
    /// Addresses with their gateways.
    pairs: Vec<(IpAddr, IpAddr)>,
}

/// Deleting what is left of a batch of pods takes a fraction of a second.
const REAPER_PATIENCE: Duration = Duration::from_secs(5);
/// Smallest MTU that IPv6 allows (RFC 8200 §5).
const MTU_MIN_V6: u32 = 1280;
/// Smallest MTU that IPv4 allows (RFC 791).
const MTU_MIN_V4: u32 = 68;

/// The smallest MTU that a device with these addresses may have.
pub(super) fn least_mtu(addresses: &[IpAddr]) -> u32 {
    if addresses.iter().any(IpAddr::is_ipv6) { MTU_MIN_V6 } else { MTU_MIN_V4 }
}

/// See [`crate::Datapath::attach_pod`]. It has its place on the data path's thread when this returns.
pub(crate) fn attach_pod(
    worker: &Worker<Node>,
    request: AttachRequest,
) -> impl Future<Output = Result<LocalPod, Error>> + Send + use<> {
    let worker = worker.clone();
    let begun = worker.submit(move |node| node.begin_attach(request));
    async move {
        let Finishing { pod, outcome } = begun.await?;
        let Err(error) = outcome.await.unwrap_or(Err(Error::Stopped)) else { return Ok(pod) };
        let name = pod.name.to_string();
        if let Err(left) = worker.call(move |node| node.take_back(&pod)).await {
            tracing::error!(pod = name, error = %left, "taking back a half-attached pod failed; DEL or GC will try again");
        }
        Err(Error::Pod { pod: name, source: Box::new(error) })
    }
}

impl Node {
    /// Makes a pod's device all but for the pod's side, which somebody else finishes; see [`attach_pod`].
    pub(crate) fn begin_attach(&mut self, request: AttachRequest) -> Result<Finishing, Error> {
        let begun = self.begun(request)?;
        let pod = begun.pod.clone();
        Ok(Finishing { outcome: self.finishers.finish(begun), pod })
    }

    fn begun(&mut self, request: AttachRequest) -> Result<Begun, Error> {
        let device = pod::host_device(&request.container_id, &request.ifname);
        let name = request.pod.to_string();
        self.begin(&device, request).map_err(|(made, error)| {
            if made {
                self.remove_unfinished(&name, &device);
            }
            Error::Pod { pod: name, source: Box::new(error) }
        })
    }

    /// On failure also whether something was made that has to be taken back.
    fn begin(&mut self, device: &str, request: AttachRequest) -> Result<Begun, (bool, Error)> {
        let refused = |error: Error| (false, error);
        let Described { pod, mtu, pairs } = self.describe(device, &request).map_err(refused)?;
        self.remove(device, Removal::Now).map_err(refused)?;
        self.reaper.settle(&request.addresses, REAPER_PATIENCE).map_err(refused)?;
        let veth = Veth {
            host_name: device,
            host_mac: pod.host_mac,
            pod_name: &request.ifname,
            pod_mac: pod.mac,
            pod_netns: request.netns.as_fd(),
            mtu,
        };
        let mut made = link::create_veth(&mut self.netlink, &veth);
        if made.as_ref().is_err_and(net::Error::is_present) {
            // Perhaps a former device of the same sandbox that is still to be deleted.
            self.reaper.settle(&[], REAPER_PATIENCE).map_err(refused)?;
            made = link::create_veth(&mut self.netlink, &veth);
        }
        made.map_err(|e| refused(e.into()))?;
        let pod = self.connect(pod, &request, mtu).map_err(|error| (true, error))?;
        let Mtu { device: _, elsewhere, cluster } = self.mtu_of(mtu);
        let cluster = cluster.to_vec();
        let sends = request.bandwidth.egress.map(|rate| self.bucket(rate, mtu));
        Ok(Begun { pod, netns: request.netns, ifname: request.ifname, pairs, mtu, elsewhere, cluster, sends })
    }

    fn remove_unfinished(&mut self, name: &str, device: &str) {
        if let Err(left) = self.remove(device, Removal::Now) {
            tracing::error!(pod = name, device, error = %left, "taking back a half-attached pod failed; DEL or GC will try again");
        }
    }

    /// See [`crate::Datapath::take_back_pod`].
    pub(crate) fn take_back(&mut self, pod: &LocalPod) -> Result<(), Error> {
        let still = self.records.get(&pod.host_device).is_some_and(|record| record.pod.ifindex == pod.ifindex);
        if still { self.remove(&pod.host_device, Removal::Now) } else { Ok(()) }
    }

    /// Checks the request, and what the pod will be; its indexes are filled in when the device is there.
    fn describe(&mut self, device: &str, request: &AttachRequest) -> Result<Described, Error> {
        pod::check_name(&request.ifname)?;
        let pairs = pod::with_gateways(&request.addresses, &self.config.settings.pod_cidrs)?;
        let other =
            |r: &&Record| r.pod.host_device != device && r.pod.addresses.iter().any(|a| request.addresses.contains(a));
        if let Some(other) = self.records.iter().find(other) {
            return Err(net::Error::Refused(format!(
                "an address of {:?} is in use by pod {} (container {}); its DEL was lost, or a lease was given twice",
                request.addresses, other.pod.name, other.pod.container_id
            ))
            .into());
        }
        if let Some(same) = self.records.get(device).filter(|r| r.pod.container_id != request.container_id) {
            let other = &same.pod.container_id;
            return Err(net::Error::Refused(format!(
                "device name {device} is in use by container {other}; recreate the pod"
            ))
            .into());
        }
        let mtu = request.mtu.unwrap_or(self.pod_mtu());
        let least = least_mtu(&request.addresses);
        if mtu < least {
            return Err(net::Error::Refused(format!(
                "MTU {mtu} is below the least that the pod's addresses allow, {least}"
            ))
            .into());
        }
        let netns_cookie = netns::within(request.netns.as_fd(), netns::cookie)?;
        if netns_cookie == self.facts.netns_cookie {
            return Err(net::Error::Refused(
                "the pod's network namespace is the node's own: host-network pods get no device".to_owned(),
            )
            .into());
        }
        let first = request.addresses.first().copied().unwrap_or(self.facts.tunnel_address);
        let computed = mac::of_pod(first);
        if let Some(mac) = request.mac.filter(|mac| *mac != computed) {
            self.may_have_mac(mac, device)?;
        }
        let pod = LocalPod {
            name: request.pod.clone(),
            container_id: request.container_id.clone(),
            addresses: request.addresses.clone(),
            host_device: device.to_owned(),
            ifindex: 0,
            mac: request.mac.unwrap_or(computed),
            host_mac: mac::HOST_SIDE,
            netns_cookie,
            pod_id: 0,
        };
        Ok(Described { pod, mtu, pairs })
    }

    /// Whether a pod may have a MAC address that somebody chose: of no group, no one's of this node, and as far as it has heard of nobody on its
    /// uplink's link, where it is seen if pods are there (the backend may change while the pod runs).
    fn may_have_mac(&mut self, mac: [u8; 6], device: &str) -> Result<(), Error> {
        let refused = |why: String| {
            let text = mac::text(mac);
            Err(Error::Choice(format!("MAC address {text} is asked for, and {why}: choose another")))
        };
        if mac[0] & 1 == 1 || mac == [0; 6] {
            return refused("is none that a device can have".to_owned());
        }
        if mac::is_ours(mac) {
            return refused("is one that this network gives by itself".to_owned());
        }
        if let Some(other) = self.records.iter().find(|r| r.pod.mac == mac && r.pod.host_device != device) {
            return refused(format!("pod {} has it", other.pod.name));
        }
        if let Some(link) = link::list(&mut self.netlink)?.iter().find(|link| link.mac == Some(mac)) {
            return refused(format!("device {} of the node has it", link.name));
        }
        match neighbour::with_mac(&mut self.netlink, self.facts.uplink_ifindex, mac)? {
            Some(address) => refused(format!("{address} has it, beside the node at device {}", self.facts.uplink)),
            None => Ok(()),
        }
    }

    /// Programs, entries and the host side of a pair that was made.
    fn connect(&mut self, mut pod: LocalPod, request: &AttachRequest, mtu: u32) -> Result<LocalPod, Error> {
        let link = link::existing(&mut self.netlink, &pod.host_device)?;
        // An index is unique while the device lives, and never 0.
        (pod.ifindex, pod.pod_id) = (link.index, link.index);
        let AttachRequest { ifname, bandwidth, runtime_bandwidth, .. } = request;
        let (ifname, bandwidth, runtime_bandwidth) = (ifname.clone(), *bandwidth, *runtime_bandwidth);
        self.records.put(Record { pod: pod.clone(), ifname, bandwidth, runtime_bandwidth })?;
        let quiet = link::no_link_local(link.index, &pod.host_device);
        match self.netlink.request(quiet) {
            // A kernel without IPv6.
            Err(error) if matches!(error.errno(), Some(libc::EAFNOSUPPORT | libc::EOPNOTSUPP)) => {}
            other => drop(other?),
        }
        let isolation = request.sets.map_or(Isolation::HostOnly, Isolation::Sets);
        self.attach_programs(link.index, &pod.host_device)?;
        if let Some(programs) = &mut self.programs {
            programs.enter_pod(&pod, isolation, request.translated_at)?;
        }
        if bandwidth.ingress.is_some() {
            self.ensure_receives(&pod, mtu, bandwidth.ingress)?;
        }
        let nodes = &self.config.settings.addresses;
        let requests = pod::host_side(link.index, &pod.host_device, pod.mac, &pod.addresses, nodes);
        self.netlink.batch(requests).into_iter().collect::<Result<(), _>>()?;
        self.answer_for(&pod.addresses)?;
        self.let_pod_in(&pod)?;
        Ok(pod)
    }

    /// See [`crate::Datapath::detach_pod`].
    pub(crate) fn detach_pod(&mut self, container_id: &str, ifname: &str) -> Result<(), Error> {
        self.remove(&pod::host_device(container_id, ifname), Removal::Soon)
    }

    /// Removes whatever there is of a pod's device; errors are collected, the rest is removed. A pod that programs no longer
    /// know sends and receives nothing through them, so the device may outlive its entry for a moment.
    fn remove(&mut self, device: &str, removal: Removal) -> Result<(), Error> {
        let mut errors: Vec<Error> = Vec::new();
        let link = match link::by_name(&mut self.netlink, device) {
            Ok(link) => link,
            // It may well be there, and must not lose its programs.
            Err(error) if removal == Removal::Now => return Err(error.into()),
            Err(error) => {
                errors.push(error.into());
                None
            }
        };
        let known = self.records.get(device).map(|r| r.pod.clone());
        if let Some(index) = link.as_ref().map(|l| l.index).or(known.as_ref().map(|p| p.ifindex)) {
            self.unlinked.remove(&index);
        }
        if let (Some(pod), Some(link)) = (&known, &link) {
            let nodes = &self.config.settings.addresses;
            let routes = pod.addresses.iter().map(|a| pod::host_route(link.index, *a, nodes).delete()).collect();
            let failed = self.netlink.batch(routes).into_iter().filter_map(Result::err).filter(|e| !e.is_absent());
            errors.extend(failed.map(Error::from));
        }
        if let Some(pod) = &known {
            self.no_longer_answer_for(&pod.addresses);
            self.keep_pod_out(pod);
        }
        match removal {
            Removal::Now => errors.extend(self.remove_now(device, link.as_ref(), known.as_ref())),
            Removal::Soon => errors.extend(self.remove_soon(device, link.as_ref(), known.as_ref()).err()),
        }
        Error::collect(errors)
    }

    fn remove_now(&mut self, device: &str, link: Option<&Link>, known: Option<&LocalPod>) -> Vec<Error> {
        let mut errors: Vec<Error> = Vec::new();
        // The device first: while it is there, nothing of the pod may pass unjudged, so its programs stay with it.
        if let Some(link) = link {
            errors.extend(link::delete(&mut self.netlink, link.index, device).err().map(Error::from));
        }
        let stays = !errors.is_empty();
        if let Some(programs) = &mut self.programs {
            let index = link.map(|l| l.index).or(known.map(|p| p.ifindex)).filter(|_| !stays);
            errors.extend(index.and_then(|i| programs.detach_device(i).err()).map(Error::from));
            errors.extend(known.and_then(|p| programs.remove_pod(p).err()).map(Error::from));
        }
        if errors.is_empty() {
            errors.extend(self.records.remove(device).err());
        }
        errors
    }

    /// While the device is there its programs stay; [`Node::forget_buried`] unpins those of one that is gone.
    fn remove_soon(&mut self, device: &str, link: Option<&Link>, known: Option<&LocalPod>) -> Result<(), Error> {
        if let (Some(programs), Some(pod)) = (&mut self.programs, known) {
            programs.forget_pod(pod)?;
        }
        let (tombstone, addresses) = match self.records.bury(device)? {
            Some((path, record)) => (Some(path), record.pod.addresses),
            None => (None, Vec::new()),
        };
        let index = link.map(|l| l.index);
        self.buried.extend(index.or(known.map(|p| p.ifindex)));
        self.reaper.bury(Remains { device: device.to_owned(), index, addresses, tombstone });
        Ok(())
    }

    /// See [`crate::Datapath::apply_translated_at`].
    pub(crate) fn apply_translated_at(&mut self, at_device: &BTreeSet<IpAddr>) -> Result<usize, Error> {
        let Some(programs) = &mut self.programs else { return Ok(0) };
        let (mut changed, mut errors) = (0, Vec::new());
        for Record { pod, .. } in self.records.iter() {
            let device = pod.addresses.iter().any(|address| at_device.contains(address));
            let where_to = if device { TranslatedAt::Device } else { TranslatedAt::Sockets };
            match programs.set_translated_at(pod, where_to) {
                Ok(different) => changed += usize::from(different),
                Err(error) => errors.push(Error::Pod { pod: pod.name.to_string(), source: Box::new(error.into()) }),
            }
        }
        Error::collect(errors).map(|()| changed)
    }

    /// After a restart: what a former process had not yet taken away. Devices without a record are found by
    /// [`Node::ensure_pods`].
    pub(super) fn bury_again(&mut self) {
        for (path, record) in self.records.take_tombstones() {
            let (device, addresses) = (record.pod.host_device, record.pod.addresses);
            self.reaper.bury(Remains { device, index: None, addresses, tombstone: Some(path) });
        }
    }

    /// See [`crate::Datapath::check_pod`].
    pub(crate) fn check_pod(&mut self, request: &CheckRequest) -> Result<(), Error> {
        let device = pod::host_device(&request.container_id, &request.ifname);
        let wrong = |what: String| Err(net::Error::Refused(format!("device {device} on the node: {what}")).into());
        let Some(Record { pod, .. }) = self.records.get(&device).cloned() else {
            return wrong(format!("container {} was never given one", request.container_id));
        };
        let Some(link) = link::by_name(&mut self.netlink, &device)? else { return wrong("missing".to_owned()) };
        if !link.up {
            return wrong("down".to_owned());
        }
        let routes = route::list(&mut self.netlink, MAIN_TABLE)?;
        for address in &pod.addresses {
            if !routes.contains(&pod::host_route(link.index, *address, &self.config.settings.addresses)) {
                return wrong(format!("the route to {address} is missing or changed"));
            }
        }
        let pairs = pod::with_gateways(&pod.addresses, &self.config.settings.pod_cidrs)?;
        Ok(pod::check_inside(request.netns.as_fd(), &request.ifname, pod.mac, &pairs)?)
    }

    /// See [`crate::Datapath::list_pods`].
    pub(crate) fn list_pods(&mut self) -> Result<Vec<(LocalPod, String)>, Error> {
        let present: BTreeSet<String> = link::list(&mut self.netlink)?.into_iter().map(|l| l.name).collect();
        let there = self.records.iter().filter(|r| present.contains(&r.pod.host_device));
        Ok(there.map(|r| (r.pod.clone(), r.ifname.clone())).collect())
    }

    /// See [`crate::Datapath::survey_pods`].
    pub(crate) fn survey_pods(&mut self) -> Result<PodSurvey, Error> {
        let devices = self.pod_links()?.into_iter().filter(|(_, link)| !self.buried.contains(&link.index));
        let devices = devices.map(|(name, link)| (name, link.index)).collect();
        let records: Vec<_> = self.records.iter().map(|record| (record.pod.clone(), record.ifname.clone())).collect();
        let entries = match &self.programs {
            Some(programs) => {
                programs.snapshot()?.pods.into_iter().map(|(address, pod)| (address, pod.ifindex)).collect()
            }
            None => records.iter().flat_map(|(pod, _)| pod.addresses.iter().map(|a| (*a, pod.ifindex))).collect(),
        };
        Ok(PodSurvey { devices, records, entries, pod_mtu: self.facts.pod_mtu })
    }

    /// See [`crate::Datapath::repair_pods`].
    pub(crate) fn repair_pods(&mut self) -> Applied {
        let mut applied = self.audit();
        let known: Vec<LocalPod> = self.records.iter().map(|record| record.pod.clone()).collect();
        match self.programs.as_mut().map_or(Ok(0), |programs| programs.retain_pods(&known)) {
            Ok(0) => {}
            Ok(count) => applied.changes.push(format!("forget {count} addresses of pods without a device")),
            Err(error) => applied.problems.push(error.to_string()),
        }
        applied
    }

    /// After a restart: pods whose devices are there keep what they have, with our programs; records without a device and
    /// devices without a record go.
    pub(super) fn adopt_pods(&mut self) -> Result<(), Error> {
        let links = self.pod_links()?;
        let gone = |r: &&Record| links.get(&r.pod.host_device).is_none_or(|l| l.index != r.pod.ifindex);
        let gone: Vec<String> = self.records.iter().filter(gone).map(|r| r.pod.host_device.clone()).collect();
        for device in gone {
            tracing::info!(device, "forgetting a pod whose device is gone");
            self.remove(&device, Removal::Soon)?;
        }
        let mut applied = Applied::default();
        self.ensure_pods(&mut applied);
        for problem in applied.problems {
            tracing::warn!(problem, "adopting a pod's device");
        }
        let known: Vec<LocalPod> = self.records.iter().map(|r| r.pod.clone()).collect();
        if let Some(programs) = &mut self.programs {
            programs.retain_pods(&known)?;
        }
        Ok(())
    }

    /// Unpins the program links of devices that were buried and are gone.
    pub(super) fn forget_buried(&mut self) -> Result<(), Error> {
        if self.buried.is_empty() {
            return Ok(());
        }
        let present: BTreeSet<u32> = self.pod_links()?.values().map(|l| l.index).collect();
        for index in self.buried.difference(&present).copied().collect::<Vec<_>>() {
            if let Some(programs) = &mut self.programs {
                programs.detach_device(index)?;
            }
            self.buried.remove(&index);
        }
        Ok(())
    }

    /// Devices that are named as host sides of pods.
    pub(super) fn pod_links(&mut self) -> Result<BTreeMap<String, Link>, Error> {
        let links = link::list(&mut self.netlink)?.into_iter().filter(|l| pod::is_host_device(&l.name));
        Ok(links.map(|l| (l.name.clone(), l)).collect())
    }

    /// Programs, routes and neighbours on the host side of every pod's device. A device that is gone is left to CNI: the
    /// runtime deletes the pod, or CHECK says so.
    pub(super) fn ensure_pods(&mut self, applied: &mut Applied) {
        let links = match self.pod_links() {
            Ok(links) => links,
            Err(error) => return applied.problems.push(error.to_string()),
        };
        for unfinished in links.values().filter(|l| self.records.get(&l.name).is_none()) {
            applied.changes.push(format!("delete device {} of a pod that was never finished", unfinished.name));
            self.buried.insert(unfinished.index);
            self.reaper.bury(Remains {
                device: unfinished.name.clone(),
                index: Some(unfinished.index),
                addresses: Vec::new(),
                tombstone: None,
            });
        }
        let pods: Vec<(LocalPod, Bandwidth)> = self.records.iter().map(|r| (r.pod.clone(), r.bandwidth)).collect();
        let mut wanted = Vec::new();
        for (pod, bandwidth) in &pods {
            match links.get(&pod.host_device).filter(|l| l.index == pod.ifindex) {
                Some(link) => {
                    applied.note(self.ensure_pod(pod, link));
                    applied.note(self.ensure_received(pod, link.mtu, *bandwidth));
                    let nodes = &self.config.settings.addresses;
                    wanted.extend(pod.addresses.iter().map(|a| pod::host_route(pod.ifindex, *a, nodes)));
                }
                None => {
                    let what = format!("pod {}: its device {} is gone; delete the pod", pod.name, pod.host_device);
                    applied.problems.push(what);
                }
            }
        }
        self.ensure_sent(applied);
        let mine: BTreeSet<u32> = pods.iter().map(|(pod, _)| pod.ifindex).collect();
        match route::ensure(&mut self.netlink, MAIN_TABLE, |r| mine.contains(&r.device), &wanted) {
            Ok((changes, failed)) => {
                applied.changes.extend(changes);
                applied.problems.extend(failed.iter().map(ToString::to_string));
            }
            Err(error) => applied.problems.push(error.to_string()),
        }
    }

    fn ensure_pod(&mut self, pod: &LocalPod, link: &Link) -> Result<Vec<String>, Error> {
        self.ensure_attached(link)?;
        if let Some(programs) = &mut self.programs {
            programs.adopt_pod(pod)?;
        }
        let mut changes = Vec::new();
        if !link.up {
            let request = link::up(link.index, &link.name);
            changes.push(request.operation.clone());
            self.netlink.request(request)?;
        }
        let neighbours = pod.addresses.iter().map(|a| (*a, pod.mac)).collect();
        changes.extend(neighbour::ensure(&mut self.netlink, link.index, &link.name, &neighbours)?);
        Ok(changes)
    }
}
