//! Envelopes of who is no node, at a node whose tunnel device is Flannel's still: whichever address of the node they are for, the pods
//! behind that device see nothing of them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_model::flannel::parse_mac;
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, address};

use crate::Walk;
use crate::flannel::{Backend, in_underlay, on_node};

/// What an inner packet that should not arrive has this long for.
const SILENCE: Duration = Duration::from_millis(500);
const PORT: u16 = 9999;

fn v4(text: &str) -> Result<Ipv4Addr> {
    match address(text)? {
        IpAddr::V4(v4) => Ok(v4),
        IpAddr::V6(v6) => bail!("{v6} is no IPv4 address"),
    }
}

/// The sum of a header's 16-bit words, folded and inverted (RFC 1071).
fn checksum(header: &[u8]) -> u16 {
    let words = header.chunks(2).map(|word| word.iter().fold(0_u32, |sum, byte| sum << 8 | u32::from(*byte)));
    let sum = words.sum::<u32>();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).unwrap_or(0)
}

/// A VXLAN header with identifier 1 (RFC 7348), and behind it a UDP packet between pods.
fn envelope(macs: [[u8; 6]; 2], from: Ipv4Addr, to: Ipv4Addr, text: &[u8]) -> Result<Vec<u8>> {
    let udp = u16::try_from(8 + text.len())?;
    let mut ip = vec![0x45, 0];
    ip.extend((20 + udp).to_be_bytes());
    ip.extend([0, 0, 0, 0, 64, 17, 0, 0]);
    ip.extend(from.octets());
    ip.extend(to.octets());
    let sum = checksum(&ip);
    ip.splice(10..12, sum.to_be_bytes());
    let mut bytes = vec![8, 0, 0, 0, 0, 0, 1, 0];
    bytes.extend(macs.concat());
    bytes.extend([8, 0]);
    bytes.extend(ip);
    // No checksum: allowed over IPv4 (RFC 768).
    for field in [4000, PORT, udp, 0] {
        bytes.extend(field.to_be_bytes());
    }
    bytes.extend(text);
    Ok(bytes)
}

/// A pod of Flannel's on n1 that waits for what comes in envelopes.
struct Listener {
    socket: UdpSocket,
    macs: [[u8; 6]; 2],
    ends: [Ipv4Addr; 2],
    sent: u32,
}

impl Listener {
    fn on_n1(walk: &Walk) -> Result<Self> {
        let (place, pod) = walk.place("old-n1")?;
        let socket = place.enter(|| Ok(UdpSocket::bind(("0.0.0.0", PORT))?))?;
        socket.set_read_timeout(Some(SILENCE))?;
        let mac = |node: &str| {
            let found = walk.nodes.iter().find(|n| n.name == node).context("no such node")?;
            parse_mac(&found.mac).with_context(|| format!("{node} has MAC address {:?}", found.mac))
        };
        let ends = [v4(&walk.place("old-n2")?.1.ip)?, v4(&pod.ip)?];
        Ok(Self { socket, macs: [mac("n1")?, mac("n2")?], ends, sent: 0 })
    }

    /// Whether a packet as from a pod of n2 arrives that `from` puts into an envelope for this address.
    fn hears(&mut self, from: &Place, to: &str) -> Result<bool> {
        self.sent += 1;
        let text = format!("{} {to} {}", from.name(), self.sent);
        let bytes = envelope(self.macs, self.ends[0], self.ends[1], text.as_bytes())?;
        let to = SocketAddr::new(address(to)?, 8472);
        from.enter(|| Ok(UdpSocket::bind(("0.0.0.0", 0))?.send_to(&bytes, to)?))?;
        let mut buffer = [0; 256];
        match self.socket.recv(&mut buffer) {
            Ok(length) if buffer.get(..length) == Some(text.as_bytes()) => Ok(true),
            Ok(length) => bail!("something else arrived: {:?}", buffer.get(..length)),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

#[test]
fn a_strangers_envelopes_are_taken_at_no_address_of_the_node() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new("e2e-mgst", Backend::Vxlan)?;
    let (main, further, inner) = ("192.168.255.11", "192.168.255.111", "10.200.0.1");
    let more = format!("ip addr add {further}/24 dev eth0\nip addr add {inner}/32 dev lo");
    on_node(&walk.cluster, "n1", &more)?;
    in_underlay(&walk.cluster, &format!("ip route add {inner}/32 via {main}"))?;
    let underlay = Path::new("/run/netns").join(format!("tp-{}-underlay", walk.cluster.name()));
    let stranger = Place::of_netns("the underlay's router", &underlay)?;
    let node = Place::of_node(&walk.cluster, "n2")?;
    let mut pod = Listener::on_n1(&walk)?;
    for to in [main, further, inner] {
        ensure!(pod.hears(&stranger, to)?, "Flannel takes what anybody sends to {to}, or this test shows nothing");
    }
    walk.take_over("n1")?;
    walk.run("new-n1", "n1")?;
    let (new, _) = walk.place("new-n1")?;
    for to in [main, further, inner] {
        ensure!(!pod.hears(&stranger, to)?, "a stranger's envelope for {to} is opened\n{}", walk.states());
        ensure!(!pod.hears(&new, to)?, "a pod's envelope for {to} is opened\n{}", walk.states());
    }
    ensure!(pod.hears(&node, main)?, "a node's envelope is not taken\n{}", walk.states());
    // When Flannel's device has gone, our own judges.
    walk.recreate("old-n1", "young-n1", "n1")?;
    Ok(())
}
