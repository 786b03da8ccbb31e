//! What leaves a pod by its device, as a packet socket inside the pod sees it: the address that is really sent to, whatever the socket
//! believes.

use std::collections::BTreeSet;
use std::io::Read;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::Result;
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use towpath_walkthrough::place::Place;

pub(crate) struct Tap(Socket);

impl Tap {
    pub(crate) fn in_pod(place: &Place) -> Result<Self> {
        place.enter(|| {
            let all = i32::from((libc::ETH_P_ALL as u16).to_be());
            let socket = Socket::new(Domain::PACKET, Type::RAW, Some(Protocol::from(all)))?;
            socket.set_nonblocking(true)?;
            socket.set_recv_buffer_size(4 << 20)?;
            Ok(Self(socket))
        })
    }

    /// Where packets from this port went since it was last asked; TCP and UDP.
    pub(crate) fn went_from(&mut self, port: u16) -> BTreeSet<SocketAddr> {
        self.went().into_iter().filter(|(from, _)| *from == port).map(|(_, to)| to).collect()
    }

    /// Source ports and destinations of all packets since it was last asked.
    pub(crate) fn went(&mut self) -> BTreeSet<(u16, SocketAddr)> {
        let mut buffer = [0; 2048];
        let mut all = BTreeSet::new();
        while let Ok(count) = self.0.read(&mut buffer) {
            all.extend(buffer.get(..count).and_then(ends));
        }
        all
    }
}

/// Source port and destination of a frame with TCP or UDP.
fn ends(frame: &[u8]) -> Option<(u16, SocketAddr)> {
    let packet = frame.get(14..)?;
    let (protocol, to, transport): (u8, IpAddr, &[u8]) = match frame.get(12..14)? {
        [0x08, 0x00] => {
            let header = usize::from(packet.first()? & 0xf) * 4;
            let to: [u8; 4] = packet.get(16..20)?.try_into().ok()?;
            (*packet.get(9)?, Ipv4Addr::from(to).into(), packet.get(header..)?)
        }
        [0x86, 0xdd] => {
            let to: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
            (*packet.get(6)?, Ipv6Addr::from(to).into(), packet.get(40..)?)
        }
        _ => return None,
    };
    let port = |at: usize| Some(u16::from_be_bytes(transport.get(at..at + 2)?.try_into().ok()?));
    matches!(protocol, 6 | 17).then_some((port(0)?, SocketAddr::new(to, port(2)?)))
}
