//! The groups of IPv6 that are asked for addresses (solicited-node multicast, RFC 4291 §2.7.1), joined on one device, also where a switch or
//! a card filters groups.
//!
//! A socket has room for so many memberships only (`net.core.optmem_max`), so there are as many sockets as it takes.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv6Addr, UdpSocket};

/// Memberships of one socket: well within `optmem_max` as kernels have it (20 KiB and more).
const OF_A_SOCKET: usize = 64;

/// A socket and what it has joined.
#[derive(Debug)]
struct Member {
    socket: UdpSocket,
    joined: BTreeSet<Ipv6Addr>,
}

/// Memberships on one device. Dropping it ends them.
#[derive(Debug)]
pub struct Groups {
    device: u32,
    members: Vec<Member>,
}

/// The group in which an address is asked for.
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., high, low] = address.segments();
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | (high & 0xff), low)
}

impl Groups {
    /// The device.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// None yet, on that device.
    pub fn on(device: u32) -> Self {
        Self { device, members: Vec::new() }
    }

    /// Is in these groups and in no others; what could not be joined, with the reason. Those are tried again at the next call.
    pub fn follow(&mut self, wanted: &BTreeSet<Ipv6Addr>) -> Vec<(Ipv6Addr, io::Error)> {
        for member in &mut self.members {
            for group in member.joined.difference(wanted) {
                if let Err(error) = member.socket.leave_multicast_v6(group, self.device) {
                    tracing::debug!(%group, device = self.device, %error, "not left");
                }
            }
            member.joined.retain(|group| wanted.contains(group));
        }
        self.members.retain(|member| !member.joined.is_empty());
        let lacking: Vec<Ipv6Addr> =
            wanted.iter().filter(|group| !self.members.iter().any(|m| m.joined.contains(group))).copied().collect();
        let joined = lacking.into_iter().map(|group| (group, self.join(group)));
        joined.filter_map(|(group, outcome)| Some((group, outcome.err()?))).collect()
    }

    fn join(&mut self, group: Ipv6Addr) -> io::Result<()> {
        let roomy = self.members.iter_mut().find(|member| member.joined.len() < OF_A_SOCKET);
        if let Some(member) = roomy
            && member.socket.join_multicast_v6(&group, self.device).is_ok()
        {
            member.joined.insert(group);
            return Ok(());
        }
        // None has room, or less than was thought.
        let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0))?;
        socket.join_multicast_v6(&group, self.device)?;
        self.members.push(Member { socket, joined: BTreeSet::from([group]) });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Groups that the kernel has on the loopback device.
    fn joined() -> usize {
        let text = std::fs::read_to_string("/proc/net/igmp6").unwrap_or_default();
        text.lines().filter(|line| line.contains(" ff0200000000000000000001ff7e")).count()
    }

    #[test]
    fn more_groups_are_joined_than_one_socket_has_room_for_and_left_again() {
        let wanted = |count: u16| -> BTreeSet<Ipv6Addr> {
            (0..count).map(|last| Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff7e, last)).collect()
        };
        let mut groups = Groups::on(1);
        if UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_err() {
            return;
        }
        assert!(groups.follow(&wanted(500)).is_empty());
        assert_eq!((joined(), groups.members.len()), (500, 500_usize.div_ceil(OF_A_SOCKET)));
        assert!(groups.follow(&wanted(3)).is_empty());
        assert_eq!((joined(), groups.members.len()), (3, 1));
        assert!(groups.follow(&wanted(200)).is_empty());
        drop(groups);
        assert_eq!(joined(), 0);
    }

    #[test]
    fn what_cannot_be_joined_is_said_and_the_rest_is_joined() {
        let mut groups = Groups::on(u32::MAX);
        let wanted = BTreeSet::from([Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff7d, 1)]);
        assert_eq!(groups.follow(&wanted).len(), 1, "there is no such device");
    }
}
