//! How devices get their programs: a pod's as filters when the device is made, as links when nobody waits; the node's own as links.
//!
//! A filter is there in a fraction of a millisecond, a link after an RCU grace period with the lock of all network configuration
//! held ([`crate::net::filter`]). Both run the same program, and a link's verdict ends the chain, so a device whose filters give way
//! to links is judged by one of them at every packet. Until then it is in [`Node::unlinked`].
//!
//! Where the kernel has no links for devices (before 6.6), every hook is a filter and stays one ([`Attachment::Filters`]): it outlives
//! the agent, which has it run a new program in one step. What is lost is the owner: a filter that somebody takes away is missing
//! until the next full check.
//!
//! Another version of the programs goes on working on the devices it is on until every kind of desired state was applied once;
//! then all devices change over together.

use std::collections::BTreeSet;
use std::os::fd::AsFd;

use super::Node;
use crate::bpf::{Hook, Programs};
use crate::error::Error;
use crate::net::filter::{self, Direction, Filter, Present};
use crate::net::link::{self, Link, TUNNEL_DEVICE};
use crate::net::pod::is_host_device;
use crate::net::tap::UDP_DEVICE;

/// The hooks of a pod's device.
const POD_HOOKS: [(Hook, Direction); 2] = [(Hook::FromPod, Direction::Ingress), (Hook::ToPod, Direction::Egress)];

/// The hooks of a device that leads out.
const OUTSIDE_HOOKS: [(Hook, Direction); 2] =
    [(Hook::FromUplink, Direction::Ingress), (Hook::ToUplink, Direction::Egress)];

/// What devices end with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attachment {
    /// Links (tcx).
    Links,
    /// Filters, on a kernel that has no links for devices.
    Filters,
}

impl Attachment {
    /// What the kernel can do; what is lost is said once.
    pub(super) fn of_kernel(programs: &Programs) -> Result<Self, Error> {
        if programs.has_device_links()? {
            return Ok(Self::Links);
        }
        tracing::warn!(
            "this kernel has no tcx (Linux 6.6): programs run as clsact filters of their devices; one that somebody removes \
             with `tc` is missing until the next full check"
        );
        Ok(Self::Filters)
    }
}

/// What has to be applied before another version's programs can go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Part {
    Peers,
    Services,
    Policy,
}

impl Part {
    /// All of them, when another version's programs are there.
    pub(super) fn awaited(programs: Option<&Programs>) -> BTreeSet<Self> {
        let all = [Self::Peers, Self::Services, Self::Policy];
        all.into_iter().filter(|_| programs.is_some_and(Programs::has_former)).collect()
    }
}

/// Does something with the filters that run our programs for these hooks.
fn with_filters<R>(
    programs: &Programs,
    hooks: &[(Hook, Direction)],
    work: impl FnOnce(&[Filter<'_>]) -> R,
) -> Result<R, Error> {
    let mut loaded = Vec::new();
    for (hook, direction) in hooks {
        loaded.push((programs.descriptor(*hook)?, *direction, hook.program()));
    }
    let filters: Vec<Filter<'_>> = loaded
        .iter()
        .map(|(program, direction, name)| Filter { direction: *direction, program: program.as_fd(), name })
        .collect();
    Ok(work(&filters))
}

impl Node {
    /// Programs for a device that was just made and is down.
    pub(super) fn attach_programs(&mut self, index: u32, device: &str) -> Result<(), Error> {
        let Some(programs) = &mut self.programs else { return Ok(()) };
        let netlink = &mut self.netlink;
        match with_filters(programs, &POD_HOOKS, |filters| filter::attach(netlink, index, device, filters))? {
            // It is without a program, and goes again.
            Err(error) if self.attachment == Attachment::Filters => Err(error.into()),
            Ok(()) if self.attachment == Attachment::Filters => Ok(()),
            Ok(()) => {
                self.unlinked.insert(index, device.to_owned());
                Ok(())
            }
            Err(error) => {
                tracing::debug!(device, %error, "the kernel takes no filters; attaching links at once");
                link_all(programs, index)?;
                Ok(filter::detach(netlink, index, device)?)
            }
        }
    }

    /// Has the device of an adopted pod run our programs, in the way that it runs those of an earlier process.
    pub(super) fn ensure_attached(&mut self, link: &Link) -> Result<(), Error> {
        if self.attachment == Attachment::Filters {
            return self.ensure_filters(link.index, &link.name, &POD_HOOKS);
        }
        let Some(programs) = &mut self.programs else { return Ok(()) };
        let mut linked = true;
        for (hook, _) in POD_HOOKS {
            linked = linked && programs.is_linked(link.index, hook)?;
        }
        if linked {
            return link_all(programs, link.index);
        }
        if !self.awaited.is_empty() && !self.unlinked.contains_key(&link.index) {
            // Perhaps another version's filters: they stay for now.
            return Ok(());
        }
        let netlink = &mut self.netlink;
        if with_filters(programs, &POD_HOOKS, |filters| filter::replace(netlink, link.index, &link.name, filters))?? {
            self.unlinked.insert(link.index, link.name.clone());
            return Ok(());
        }
        // The device may be up, and then has no time for filters: their qdisc would stop its queues.
        link_all(programs, link.index)
    }

    /// Has a device run our programs as filters. Another version's stay until everything was applied once.
    fn ensure_filters(&mut self, index: u32, device: &str, hooks: &[(Hook, Direction)]) -> Result<(), Error> {
        let Some(programs) = &self.programs else { return Ok(()) };
        let present = if self.awaited.is_empty() { Present::Updated } else { Present::Stays };
        let netlink = &mut self.netlink;
        with_filters(programs, hooks, |filters| filter::ensure(netlink, index, device, filters, present))??;
        Ok(())
    }

    /// Has the tunnel device and what leads out run our programs, and what does not lead out any more not.
    pub(super) fn ensure_node_hooks(&mut self) -> Result<(), Error> {
        let facts = &self.facts;
        let outside = facts.outside.clone();
        let tunnel = (facts.tunnel_ifindex, TUNNEL_DEVICE.to_owned(), (Hook::FromTunnel, Direction::Ingress));
        let udp = (facts.udp_ifindex, UDP_DEVICE.to_owned(), (Hook::FromTunnel, Direction::Ingress));
        let udp = Some(udp).filter(|(index, ..)| *index > 0);
        let (tunnel_ifindex, udp_ifindex) = (facts.tunnel_ifindex, facts.udp_ifindex);
        let outside_hooks =
            outside.iter().flat_map(|(index, device)| OUTSIDE_HOOKS.map(|hook| (*index, device.clone(), hook)));
        let hooks: Vec<_> = [tunnel].into_iter().chain(udp).chain(outside_hooks).collect();
        self.leave_devices(&outside)?;
        for (index, device, (hook, direction)) in hooks {
            if self.lent.is_some()
                && index != udp_ifindex
                && (index == tunnel_ifindex || self.is_too_early(index, hook)?)
            {
                continue;
            }
            match (self.attachment, &mut self.programs) {
                (Attachment::Filters, _) => self.ensure_filters(index, &device, &[(hook, direction)])?,
                (Attachment::Links, Some(programs)) => programs.attach_device(index, hook)?,
                (Attachment::Links, None) => {}
            }
        }
        self.ensure_wires()
    }

    /// Where another network's tunnel is at work (whose device says nothing of outer sources, and is not ours to judge), the uplink's
    /// program would take its packets for a stranger's until the peers are known. One that a former agent left knows them.
    fn is_too_early(&self, index: u32, hook: Hook) -> Result<bool, Error> {
        let Some(programs) = &self.programs else { return Ok(false) };
        Ok(!self.peers_known && !programs.is_linked(index, hook)?)
    }

    /// Takes the uplink's program off devices that are not among those that lead out.
    fn leave_devices(&mut self, outside: &[(u32, String)]) -> Result<(), Error> {
        let Some(programs) = &mut self.programs else { return Ok(()) };
        if self.attachment == Attachment::Filters {
            let hooked = match self.hooked.take() {
                Some(hooked) => hooked,
                // A filter has no owner: whatever may have led out is looked at once.
                None => {
                    let all = link::list(&mut self.netlink)?.into_iter();
                    all.filter(|l| l.name != TUNNEL_DEVICE && l.name != UDP_DEVICE && !is_host_device(&l.name))
                        .map(|l| (l.index, l.name))
                        .collect()
                }
            };
            for (index, device) in hooked.iter().filter(|held| !outside.contains(held)) {
                filter::detach(&mut self.netlink, *index, device)?;
            }
            self.hooked = Some(outside.to_vec());
            return Ok(());
        }
        let hooked =
            programs.attached()?.into_iter().filter(|(_, hook)| OUTSIDE_HOOKS.iter().any(|(ours, _)| ours == hook));
        let gone: BTreeSet<u32> =
            hooked.map(|(index, _)| index).filter(|i| !outside.iter().any(|(o, _)| o == i)).collect();
        Ok(gone.into_iter().try_for_each(|index| programs.detach_device(index))?)
    }

    /// Attaches the next link that a device lacks; whether there may be another. For times when nobody waits.
    pub(crate) fn link_next(&mut self) -> bool {
        let Some((index, device)) = self.unlinked.pop_first() else { return false };
        match self.link_step(index, &device) {
            Ok(true) => {}
            Ok(false) => {
                self.unlinked.insert(index, device);
            }
            // The pod's namespace has ended, and the DEL is to come.
            Err(_) if link::by_name(&mut self.netlink, &device).is_ok_and(|found| found.is_none()) => {}
            // Its filters go on, and the full check tries again.
            Err(error) => tracing::warn!(device, %error, "a pod's device keeps its filters instead of links"),
        }
        !self.unlinked.is_empty()
    }

    /// One grace period at most; whether the device has all its links.
    fn link_step(&mut self, index: u32, device: &str) -> Result<bool, Error> {
        let Some(programs) = &mut self.programs else { return Ok(true) };
        if self.records.get(device).is_none_or(|record| record.pod.ifindex != index) {
            return Ok(true);
        }
        for (hook, _) in POD_HOOKS {
            if !programs.is_linked(index, hook)? {
                programs.attach_device(index, hook)?;
                return Ok(false);
            }
        }
        link_all(programs, index)?;
        filter::detach(&mut self.netlink, index, device)?;
        Ok(true)
    }

    /// Notes that a part of the desired state is in the maps. After the last one, another version's programs go.
    pub(super) fn applied_part(&mut self, part: Part) {
        if self.awaited.remove(&part) && self.awaited.is_empty() {
            for problem in self.take_over() {
                tracing::error!(problem, "another version's programs are still at work; the full check tries again");
            }
        }
    }

    /// Puts our programs in the place of another version's, if everything was applied; what could not be done.
    pub(super) fn take_over(&mut self) -> Vec<String> {
        if !self.awaited.is_empty() || !self.programs.as_ref().is_some_and(Programs::has_former) {
            return Vec::new();
        }
        let mut problems = Vec::new();
        match self.programs.as_mut().map_or(Ok(0), Programs::take_over) {
            Ok(links) => tracing::info!(links, "took over from another version of the programs"),
            Err(error) => problems.push(error.to_string()),
        }
        let pods: Vec<_> = self.records.iter().map(|r| r.pod.clone()).collect();
        match self.pod_links() {
            Ok(links) => {
                for link in pods.iter().filter_map(|p| links.get(&p.host_device).filter(|l| l.index == p.ifindex)) {
                    problems.extend(self.ensure_attached(link).err().map(|e| e.to_string()));
                }
            }
            Err(error) => problems.push(error.to_string()),
        }
        // What only this version attaches.
        problems.extend(self.ensure_programs().err().map(|e| e.to_string()));
        if problems.is_empty() {
            problems.extend(self.programs.as_mut().and_then(|p| p.end_take_over().err()).map(|e| e.to_string()));
        }
        problems
    }
}

/// Links for both hooks, made or brought up to date.
fn link_all(programs: &mut Programs, index: u32) -> Result<(), Error> {
    Ok(POD_HOOKS.iter().try_for_each(|(hook, _)| programs.attach_device(index, *hook))?)
}
