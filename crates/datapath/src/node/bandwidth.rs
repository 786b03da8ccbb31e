//! How much pods may receive and send.
//!
//! What a pod receives waits in a token bucket at the node's side of its device, to which programs then hand it over instead of putting it into the pod's
//! namespace past it ([`crate::bpf::Programs::set_waits`]). What it sends waits at the pod's own side, where its sockets feel that they are too fast, and which
//! is the pod's: who may administer its network can take the bucket away until the next full check.
//!
//! A limit is on record before it holds, and leaves the record when it is gone, so that whoever dies in between leaves it to be put right.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use towpath_model::desired::LocalPod;
use towpath_model::{AskedBandwidth, Bandwidth, NamespacedName, Rate};

use super::Node;
use crate::error::Error;
use crate::net::bucket::{self, Bucket};
use crate::net::link;
use crate::net::netlink::Netlink;
use crate::records::Record;
use crate::requests::Applied;

/// One device inside a pod, and what it is to have.
struct Inside {
    pod: NamespacedName,
    /// Name of the node's side.
    device: String,
    ifname: String,
    wanted: Option<Bucket>,
}

impl Node {
    /// For packets of a pod whose device has this MTU, or any that it may be given while it runs.
    pub(super) fn bucket(&self, rate: Rate, mtu: u32) -> Bucket {
        Bucket::of(rate, mtu.max(self.facts.uplink_mtu).max(self.pod_mtu()))
    }

    /// Pods that have a limit, by their names.
    pub(super) fn limited(&self) -> Vec<(NamespacedName, Bandwidth)> {
        let limited = self.records.iter().filter(|record| !record.bandwidth.is_unlimited());
        let mut limited: Vec<_> = limited.map(|record| (record.pod.name.clone(), record.bandwidth)).collect();
        limited.sort_by(|(one, _), (other, _)| one.cmp(other));
        limited
    }

    /// See [`crate::Datapath::apply_bandwidth`].
    pub(crate) fn apply_bandwidth(&mut self, asked: &BTreeMap<IpAddr, AskedBandwidth>) -> Result<Applied, Error> {
        let mut changed: Vec<(Record, Bandwidth)> = Vec::new();
        for record in self.records.iter() {
            let Some(asked) = record.pod.addresses.iter().find_map(|address| asked.get(address)) else { continue };
            let wanted = asked.over(record.bandwidth, record.runtime_bandwidth);
            if wanted != record.bandwidth {
                changed.push((record.clone(), wanted));
            }
        }
        let mut applied = Applied::default();
        if changed.is_empty() {
            return Ok(applied);
        }
        let links = self.pod_links()?;
        let (mut inside, mut later) = (BTreeMap::new(), Vec::new());
        for (record, wanted) in changed {
            let Some(link) = links.get(&record.pod.host_device).filter(|l| l.index == record.pod.ifindex) else {
                continue;
            };
            let (mtu, was) = (link.mtu, record.bandwidth);
            match self.change(&record, wanted, mtu) {
                Ok(()) => {}
                Err(error) => {
                    applied.problems.push(format!("pod {} keeps its limit ({was}): {error}", record.pod.name));
                    continue;
                }
            }
            if wanted.egress != was.egress {
                let wanted = wanted.egress.map(|rate| self.bucket(rate, mtu));
                let one = Inside::of(&record, wanted);
                inside.entry(record.pod.netns_cookie).or_insert_with(Vec::new).push(one);
            }
            applied.changes.push(format!("pod {}: {wanted} (it was: {was})", record.pod.name));
            later.push((Record { bandwidth: wanted, ..record }, was));
        }
        let failed = self.change_inside_of(inside, &mut applied);
        for (mut record, was) in later {
            // What could not be taken away is still there.
            if failed.contains(&record.pod.host_device) {
                record.bandwidth.egress = record.bandwidth.egress.or(was.egress);
            }
            if let Err(error) = self.records.put(record) {
                applied.problems.push(error.to_string());
            }
        }
        Ok(applied)
    }

    /// The node's side of a pod's new limits, and its record, in which a limit that ends stays until the caller takes it out.
    fn change(&mut self, record: &Record, wanted: Bandwidth, mtu: u32) -> Result<(), Error> {
        let Record { pod, bandwidth: was, .. } = record;
        let both = Bandwidth { ingress: wanted.ingress.or(was.ingress), egress: wanted.egress.or(was.egress) };
        self.records.put(Record { bandwidth: both, ..record.clone() })?;
        if wanted.ingress == was.ingress {
            return Ok(());
        }
        let changed = self.ensure_receives(pod, mtu, wanted.ingress).map(drop);
        if changed.is_err() {
            self.records.put(record.clone())?;
        }
        changed
    }

    /// Has what a pod receives wait, or not: programs hand over to a bucket that is there. What was changed, in words.
    pub(super) fn ensure_receives(
        &mut self,
        pod: &LocalPod,
        mtu: u32,
        rate: Option<Rate>,
    ) -> Result<Vec<String>, Error> {
        let wanted = rate.map(|rate| self.bucket(rate, mtu));
        let mut changes = Vec::new();
        if wanted.is_none() {
            self.hand_over(pod, false)?;
        }
        changes.extend(bucket::ensure(&mut self.netlink, pod.ifindex, &pod.host_device, wanted)?);
        if wanted.is_some() && self.hand_over(pod, true)? {
            changes.push(format!("hand what is for pod {} over to its device's queue", pod.name));
        }
        Ok(changes)
    }

    fn hand_over(&mut self, pod: &LocalPod, waits: bool) -> Result<bool, Error> {
        match &mut self.programs {
            Some(programs) => Ok(programs.set_waits(pod, waits)?),
            None => Ok(false),
        }
    }

    /// The same as the record has it; a pod without a limit costs nothing.
    pub(super) fn ensure_received(
        &mut self,
        pod: &LocalPod,
        mtu: u32,
        bandwidth: Bandwidth,
    ) -> Result<Vec<String>, Error> {
        match bandwidth.ingress {
            None => self.hand_over(pod, false).map(|_| Vec::new()),
            rate => self.ensure_receives(pod, mtu, rate),
        }
    }

    /// What pods send waits where their records have it.
    pub(super) fn ensure_sent(&mut self, applied: &mut Applied) {
        if self.records.iter().all(|record| record.bandwidth.egress.is_none()) {
            return;
        }
        let links = match self.pod_links() {
            Ok(links) => links,
            Err(error) => return applied.problems.push(error.to_string()),
        };
        let mut inside: BTreeMap<u64, Vec<Inside>> = BTreeMap::new();
        for record in self.records.iter() {
            let (Some(rate), Some(link)) = (record.bandwidth.egress, links.get(&record.pod.host_device)) else {
                continue;
            };
            let wanted = Some(self.bucket(rate, link.mtu));
            let one = Inside::of(record, wanted);
            inside.entry(record.pod.netns_cookie).or_default().push(one);
        }
        self.change_inside_of(inside, applied);
    }

    /// Buckets in pods' namespaces, by the cookies of these; the devices where that failed, by their names on the node.
    fn change_inside_of(&mut self, inside: BTreeMap<u64, Vec<Inside>>, applied: &mut Applied) -> BTreeSet<String> {
        let mut failed = BTreeSet::new();
        let cookies: BTreeSet<u64> = inside.keys().copied().collect();
        let mut problems: Vec<String> = Vec::new();
        let missing = self.namespaces.within(&cookies, |cookie| {
            for one in inside.get(&cookie).into_iter().flatten() {
                match one.ensure() {
                    Ok(Some(change)) => tracing::info!(pod = %one.pod, change, "what the pod sends"),
                    Ok(None) => {}
                    Err(error) => {
                        problems.push(format!("pod {} sends as before: {error}", one.pod));
                        failed.insert(one.device.clone());
                    }
                }
            }
        });
        applied.problems.extend(problems);
        match missing {
            Ok(missing) => {
                for one in missing.iter().flat_map(|cookie| inside.get(cookie).into_iter().flatten()) {
                    let why = "its network namespace is not found (/run/netns, or its processes)";
                    applied.problems.push(format!("pod {} sends as before: {why}", one.pod));
                    failed.insert(one.device.clone());
                }
            }
            Err(error) => {
                applied.problems.push(error.to_string());
                failed.extend(inside.into_values().flatten().map(|one| one.device));
            }
        }
        failed
    }
}

impl Inside {
    fn of(record: &Record, wanted: Option<Bucket>) -> Self {
        Self {
            pod: record.pod.name.clone(),
            device: record.pod.host_device.clone(),
            ifname: record.ifname.clone(),
            wanted,
        }
    }

    /// In the pod's namespace.
    fn ensure(&self) -> Result<Option<String>, crate::net::Error> {
        let mut netlink = Netlink::open()?;
        let link = link::existing(&mut netlink, &self.ifname)?;
        bucket::ensure(&mut netlink, link.index, &self.ifname, self.wanted)
    }
}
