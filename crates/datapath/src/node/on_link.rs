//! Pods on the link of the uplink, with MAC addresses of their own (the backend `macvlan`; `bpf/link.h` has what the programs do for it).
//!
//! What is done here is that the card lets their frames in, and that switches which filter groups have this node hear who asks for an IPv6 address of
//! theirs. The former outlives agents; the latter comes back with the next one, and meanwhile matters only to who has not asked before.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use towpath_model::desired::{LocalPod, Reach};

use super::Node;
use crate::bpf::Programs;
use crate::error::Error;
use crate::net::groups::{self, Groups};
use crate::net::{card, mac};

/// A pod's own, and that of each of its addresses.
fn macs(pod: &LocalPod) -> Vec<[u8; 6]> {
    pod.addresses.iter().map(|address| mac::of_pod(*address)).chain([pod.mac]).collect()
}

impl Node {
    /// Whether pods are on the link; before the peers are known, as a former agent left it.
    pub(super) fn is_on_link(&self) -> bool {
        if self.peers_known {
            return self.planned.iter().any(|peer| peer.local && peer.reach == Reach::Link);
        }
        self.programs.as_ref().is_some_and(Programs::is_on_link)
    }

    /// Has the programs and the card do what the plan says.
    pub(super) fn ensure_on_link(&mut self) -> Result<Vec<String>, Error> {
        if !self.peers_known {
            return Ok(Vec::new());
        }
        let on_link = self.is_on_link();
        let (device, name) = (self.facts.uplink_ifindex, self.facts.uplink.clone());
        let chosen = self.records.iter().map(|record| record.pod.mac).collect();
        let mut had = card::ours(&mut self.netlink, device, &chosen)?;
        had.append(&mut self.let_in);
        let pods = self.records.iter().filter(|_| on_link).flat_map(|record| macs(&record.pod));
        let wanted: BTreeSet<[u8; 6]> = pods.collect();
        let come = wanted.iter().map(|mac| card::let_in(device, &name, *mac));
        let gone = had.difference(&wanted).map(|mac| card::keep_out(device, &name, *mac));
        let mut changes: Vec<String> = wanted.difference(&had).map(|mac| format!("let {mac:02x?} in")).collect();
        changes.extend(gone.clone().map(|request| request.operation));
        let requests = come.chain(gone).collect();
        let failed =
            self.netlink.batch(requests).into_iter().filter_map(Result::err).filter(|error| !error.is_absent());
        let mut errors: Vec<Error> = failed.map(Error::from).collect();
        self.let_in = wanted;
        self.join_groups(on_link);
        if self.programs.as_ref().is_some_and(|programs| programs.is_on_link() != on_link) {
            changes.push(format!("pods are {} the link of {name}", if on_link { "on" } else { "no longer on" }));
            errors.extend(self.ensure_programs().err());
        }
        Error::collect(errors).map(|()| changes)
    }

    /// Hears what is asked of the groups that pods' addresses belong to.
    fn join_groups(&mut self, on_link: bool) {
        let device = self.facts.uplink_ifindex;
        if self.groups.device() != device {
            self.groups = Groups::on(device);
        }
        let addresses = self.records.iter().filter(|_| on_link).flat_map(|record| &record.pod.addresses);
        let wanted: BTreeSet<Ipv6Addr> = addresses
            .filter_map(|address| if let IpAddr::V6(v6) = address { Some(groups::solicited_node(*v6)) } else { None })
            .collect();
        for (group, error) in self.groups.follow(&wanted) {
            tracing::warn!(%group, %error, device = self.facts.uplink, "not joined: where switches filter groups, who asks for a pod's IPv6 address is not heard");
        }
    }

    /// The same for a pod that comes.
    pub(super) fn let_pod_in(&mut self, pod: &LocalPod) -> Result<(), Error> {
        if !self.is_on_link() {
            return Ok(());
        }
        let (device, name) = (self.facts.uplink_ifindex, &self.facts.uplink);
        let requests = macs(pod).into_iter().map(|mac| card::let_in(device, name, mac)).collect();
        self.netlink.batch(requests).into_iter().collect::<Result<(), _>>()?;
        self.let_in.extend(macs(pod));
        if pod.addresses.iter().any(IpAddr::is_ipv6) {
            self.join_groups(true);
        }
        Ok(())
    }

    /// And for one that goes, whose record may be there still.
    pub(super) fn keep_pod_out(&mut self, pod: &LocalPod) {
        let (device, name) = (self.facts.uplink_ifindex, self.facts.uplink.clone());
        // Until the peers are known, what a former agent let in is not all known either.
        let before = !self.peers_known && self.is_on_link();
        let gone = macs(pod).into_iter().filter(|mac| self.let_in.remove(mac) || before);
        let requests = gone.map(|mac| card::keep_out(device, &name, mac)).collect();
        let failed = self.netlink.batch(requests).into_iter().filter_map(Result::err);
        for error in failed.filter(|error| !error.is_absent()) {
            tracing::warn!(%error, "the MAC address of a pod that is gone is still let in");
        }
    }
}
