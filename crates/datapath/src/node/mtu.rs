//! The MTU of pods that run: both sides of their devices, and the routes in them.
//!
//! A pod's network namespace is found by its cookie, wherever the container runtime keeps it. One that is not found keeps what it has, which is told; the
//! kernel then says to it what is too big. Nothing of a pod is interrupted.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::Node;
use super::pods::least_mtu;
use crate::error::Error;
use crate::net::link::{self, Link};
use crate::net::pod::{self, Mtu};
use crate::net::{self, netlink::Request};
use crate::records::Record;
use crate::requests::{Applied, PodMtu};

/// One device to change.
struct Todo {
    record: Record,
    host: Link,
    gateways: Vec<IpAddr>,
    /// What it gets.
    mtu: u32,
    /// What became of the pod's side.
    outcome: Result<(), net::Error>,
}

impl Todo {
    fn grows(&self) -> bool {
        self.mtu > self.host.mtu
    }

    fn host_side(&self, mtu: u32) -> Request {
        link::set_mtu(self.host.index, &self.host.name, mtu)
    }
}

impl Node {
    /// What new pods get now.
    pub(super) fn pod_mtu(&self) -> u32 {
        self.pod_mtu.unwrap_or(self.facts.pod_mtu)
    }

    /// The MTU of a pod whose device has this one.
    pub(super) fn mtu_of(&self, device: u32) -> Mtu<'_> {
        Mtu { device, elsewhere: device.min(self.facts.tunnel_mtu), cluster: &self.config.settings.cluster_cidrs }
    }

    /// See [`crate::Datapath::widest_pod`].
    pub(crate) fn widest_pod(&mut self) -> Result<Option<u32>, Error> {
        let links = self.pod_links()?;
        Ok(self.records.iter().filter_map(|r| links.get(&r.pod.host_device)).map(|link| link.mtu).max())
    }

    /// See [`crate::Datapath::apply_pod_mtu`].
    pub(crate) fn apply_pod_mtu(&mut self, wanted: PodMtu) -> Result<Applied, Error> {
        let new = match wanted {
            PodMtu::Exactly(mtu) => mtu,
            PodMtu::AtMost(mtu) => self.pod_mtu().min(mtu),
        };
        self.pod_mtu = Some(new);
        self.facts.pod_mtu = new;
        let mut applied = Applied::default();
        let mut todo = self.pods_to_change(wanted, &mut applied)?;
        if todo.is_empty() {
            return Ok(applied);
        }
        // Who gets more: the node's side first, else it would drop what the pod may send already; who gets less: last.
        let larger: Vec<Request> = todo.iter().filter(|one| one.grows()).map(|one| one.host_side(one.mtu)).collect();
        self.note_batch(larger, &mut applied);
        self.change_inside(&mut todo)?;
        let smaller: Vec<Request> = todo
            .iter()
            .filter_map(|one| match (one.grows(), one.outcome.is_ok()) {
                (true, false) => Some(one.host_side(one.host.mtu)),
                (false, true) => Some(one.host_side(one.mtu)),
                _ => None,
            })
            .collect();
        self.note_batch(smaller, &mut applied);
        for Todo { record, host, mtu, outcome, .. } in todo {
            let name = &record.pod.name;
            match outcome {
                Ok(()) => applied.changes.push(format!("pod {name}: MTU {mtu} in place of {}", host.mtu)),
                Err(error) => {
                    applied.problems.push(format!("pod {name} keeps MTU {} in place of {mtu}: {error}", host.mtu));
                }
            }
        }
        Ok(applied)
    }

    fn pods_to_change(&mut self, wanted: PodMtu, applied: &mut Applied) -> Result<Vec<Todo>, Error> {
        let links = self.pod_links()?;
        let ranges = &self.config.settings.pod_cidrs;
        let mut todo = Vec::new();
        for record in self.records.iter() {
            let Some(host) = links.get(&record.pod.host_device).filter(|l| l.index == record.pod.ifindex) else {
                continue;
            };
            let (mtu, stays) = match wanted {
                PodMtu::Exactly(mtu) => (mtu, host.mtu == mtu),
                PodMtu::AtMost(mtu) => (mtu, host.mtu <= mtu),
            };
            if stays {
                continue;
            }
            let least = least_mtu(&record.pod.addresses);
            if mtu < least {
                applied.problems.push(format!(
                    "pod {} keeps MTU {}: its addresses need {least} at least, not {mtu}",
                    record.pod.name, host.mtu
                ));
                continue;
            }
            let pairs = pod::with_gateways(&record.pod.addresses, ranges)?;
            let gateways = pairs.into_iter().map(|(_, gateway)| gateway).collect();
            let outcome = Err(net::Error::Refused(
                "its network namespace is not found (/run/netns, or its processes)".to_owned(),
            ));
            todo.push(Todo { record: record.clone(), host: host.clone(), gateways, mtu, outcome });
        }
        Ok(todo)
    }

    /// The pods' sides; what came of each is noted in it.
    fn change_inside(&mut self, todo: &mut [Todo]) -> Result<(), Error> {
        let cluster = &self.config.settings.cluster_cidrs;
        let envelope = self.facts.tunnel_mtu;
        let cookies: BTreeSet<u64> = todo.iter().map(|one| one.record.pod.netns_cookie).collect();
        let mut by_namespace: BTreeMap<u64, Vec<&mut Todo>> = BTreeMap::new();
        for one in todo {
            by_namespace.entry(one.record.pod.netns_cookie).or_default().push(one);
        }
        self.namespaces.within(&cookies, |cookie| {
            for one in by_namespace.get_mut(&cookie).into_iter().flatten() {
                let mtu = Mtu { device: one.mtu, elsewhere: one.mtu.min(envelope), cluster };
                one.outcome = pod::change_mtu_inside(&one.record.ifname, &one.gateways, mtu);
            }
        })?;
        Ok(())
    }

    fn note_batch(&mut self, requests: Vec<Request>, applied: &mut Applied) {
        let failed =
            self.netlink.batch(requests).into_iter().filter_map(Result::err).filter(|error| !error.is_absent());
        applied.problems.extend(failed.map(|error| error.to_string()));
    }
}
