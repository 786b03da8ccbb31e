//! The device of the backend `udp`, by which user space gets and gives packets: made when other nodes may send so, taken away when none does.
//!
//! It outlives agents, and who reads it: its index, program and routes stay, so that whoever carries next goes on at once.

use std::net::{IpAddr, SocketAddr};

use super::Node;
use crate::bpf;
use crate::datagrams;
use crate::error::Error;
use crate::net::link::{self, Link};
use crate::net::tap::{self, UDP_DEVICE};
use crate::net::{self, sysctl};
use crate::requests::UdpEnds;
use crate::udp_names;

impl Node {
    /// See [`crate::Datapath::take_udp`].
    pub(crate) fn take_udp(&mut self, wanted: bool) -> Result<Option<u32>, Error> {
        let before = self.facts.udp_ifindex;
        if self.udp_wanted != Some(wanted) || (before > 0) != wanted {
            self.udp_wanted = Some(wanted);
            for change in self.ensure_node()? {
                tracing::info!(change, "backend udp");
            }
        }
        Ok(Some(self.facts.udp_ifindex).filter(|index| *index > 0))
    }

    /// The device as it should be, but down if it is new; none: it is not wanted.
    pub(super) fn ensure_udp_device(&mut self, changes: &mut Vec<String>) -> Result<Option<Link>, Error> {
        let mut present = link::by_name(&mut self.netlink, UDP_DEVICE)?;
        self.facts.udp_ifindex = 0;
        if self.udp_wanted == Some(false) {
            if let Some(gone) = present {
                self.forget_udp_device(&gone)?;
                changes.push(format!("delete device {UDP_DEVICE}"));
            }
            return Ok(None);
        }
        if present.is_none() && self.udp_wanted == Some(true) {
            tap::make(UDP_DEVICE)?;
            changes.push(format!("make device {UDP_DEVICE}"));
            present = Some(link::existing(&mut self.netlink, UDP_DEVICE)?);
        }
        let Some(device) = present else { return Ok(None) };
        let (mac, mtu) = (udp_names::mac_of(self.facts.tunnel_address), self.facts.tunnel_mtu);
        let mut requests = Vec::new();
        if !device.up {
            requests.push(link::no_link_local(device.index, UDP_DEVICE));
        }
        if device.mac != Some(mac) {
            requests.push(link::set_mac(device.index, UDP_DEVICE, mac));
        }
        if device.mtu != mtu {
            requests.push(link::set_mtu(device.index, UDP_DEVICE, mtu));
        }
        if device.queue != tap::WAITING {
            requests.push(link::set_queue(device.index, UDP_DEVICE, tap::WAITING));
        }
        changes.extend(requests.iter().map(|request| request.operation.clone()));
        self.netlink.batch(requests).into_iter().collect::<Result<(), _>>()?;
        // As at the tunnel device.
        let filter = format!("ipv4/conf/{UDP_DEVICE}/rp_filter");
        if sysctl::set_if_known(&filter, "0")? {
            changes.push(format!("set sysctl {filter} to 0"));
        }
        self.facts.udp_ifindex = device.index;
        Ok(Some(device))
    }

    /// The programs forget the device before it goes: nothing is sent there any more.
    fn forget_udp_device(&mut self, device: &Link) -> Result<(), Error> {
        self.ensure_programs()?;
        link::delete(&mut self.netlink, device.index, UDP_DEVICE)?;
        if let Some(programs) = &mut self.programs {
            programs.detach_device(device.index)?;
        }
        Ok(())
    }

    /// See [`crate::Datapath::open_udp`].
    pub(crate) fn open_udp(&mut self, address: IpAddr, count: usize) -> Result<UdpEnds, Error> {
        if self.facts.udp_ifindex == 0 {
            return Err(net::Error::Refused(format!("device {UDP_DEVICE} is not there")).into());
        }
        if address != self.facts.tunnel_address {
            let other = format!(
                "datagrams are to go from {address}, and this node's tunnel ends at {}",
                self.facts.tunnel_address
            );
            return Err(net::Error::Refused(other).into());
        }
        let at = SocketAddr::new(address, self.config.settings.udp_port);
        let queues = tap::open(UDP_DEVICE, count)?;
        if let Some(queue) = queues.queues.first() {
            tap::steer(UDP_DEVICE, queue, &bpf::queue_of_flows()?)?;
        }
        Ok(UdpEnds {
            receivers: (0..count).map(|_| datagrams::receiver(at)).collect::<Result<_, _>>()?,
            senders: (0..count).map(|_| datagrams::sender(address)).collect::<Result<_, _>>()?,
            queues,
        })
    }

    /// See [`crate::Datapath::udp_works`].
    pub(crate) fn udp_works(&mut self) -> Result<bool, Error> {
        Ok(link::by_name(&mut self.netlink, UDP_DEVICE)?.is_some_and(|device| device.operational))
    }
}
