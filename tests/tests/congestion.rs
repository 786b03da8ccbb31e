//! Marks of congestion (ECN, RFC 3168) go through the envelopes between nodes in both directions of the layers (RFC 6040): what a pod says that it understands
//! stands on the outside, what the network between nodes marks there reaches the pod, and what cannot be marked is lost.

use std::net::{SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, socket};
use towpath_walkthrough::cluster::{Cluster, Families};
use towpath_walkthrough::in_charge::{all_send_by, network_config};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::Place;
use towpath_walkthrough::pods::shell;

const PORT: u16 = 7272;
/// By then a datagram has arrived.
const ARRIVED: Duration = Duration::from_millis(300);
const NONE: u8 = 0;
const UNDERSTOOD: u8 = 2;
const MET: u8 = 3;

/// A mark of what a network does with what comes by, as nftables has it.
const TABLE: &str = "table bridge congested";
const TABLE_NAME: &str = "bridge congested";

struct Scene {
    underlay: Place,
    from: Place,
    tap: OwnedFd,
    number: std::cell::Cell<u32>,
}

fn run(place: &Place, command: &str) -> Result<()> {
    place.enter(|| {
        let said = Command::new("sh").args(["-c", command]).output()?;
        ensure!(said.status.success(), "{command}: {}", String::from_utf8_lossy(&said.stderr));
        Ok(())
    })
}

/// The mark of the IP packet in a frame that ends with these bytes.
fn mark_of(frame: &[u8], end: &[u8]) -> Option<u8> {
    let packet = frame.get(14..)?.strip_suffix(end)?;
    match packet.first()? >> 4 {
        4 => Some(packet.get(1)? & 3),
        _ => Some(packet.get(1)? >> 4 & 3),
    }
}

impl Scene {
    /// Has the link between the nodes do this with the outside of what comes by.
    fn link(&self, rules: &[&str]) -> Result<()> {
        let chain = format!(
            "add {TABLE}; delete {TABLE}; add {TABLE}; add chain {TABLE_NAME} c {{ type filter hook forward priority 0; }}"
        );
        let rules = rules.iter().map(|rule| format!("; add rule {TABLE_NAME} c {rule}"));
        run(&self.underlay, &format!("nft '{chain}{}'", rules.collect::<String>()))
    }

    /// The mark with which a datagram arrives that leaves its pod with `mark`; none: it does not arrive.
    fn arrives(&self, to: SocketAddr, mark: u8) -> Result<Option<u8>> {
        self.number.set(self.number.get() + 1);
        let payload = format!("congestion {:08}", self.number.get());
        self.from.enter(|| {
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            let socket = socket2::Socket::from(socket);
            if to.is_ipv4() {
                socket.set_tos_v4(u32::from(mark))?
            } else {
                socket.set_tclass_v6(u32::from(mark))?
            }
            socket.send_to(payload.as_bytes(), &to.into())?;
            Ok(())
        })?;
        let deadline = Instant::now() + ARRIVED;
        let mut frame = [0; 2048];
        while Instant::now() < deadline {
            match recv(self.tap.as_raw_fd(), &mut frame, MsgFlags::empty()) {
                Ok(count) => {
                    if let Some(mark) = frame.get(..count).and_then(|frame| mark_of(frame, payload.as_bytes())) {
                        return Ok(Some(mark));
                    }
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
        Ok(None)
    }
}

#[test]
fn marks_of_congestion_go_into_envelopes_and_come_out_of_them() -> Result<()> {
    marks_go_through("e2e-congestion", Families::Dual)
}

#[test]
fn marks_of_congestion_go_into_envelopes_over_ipv6_too() -> Result<()> {
    marks_go_through("e2e-congestion6", Families::Ipv6)
}

/// Envelopes go over IPv4 where nodes have such addresses.
fn marks_go_through(name: &str, families: Families) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up(name, 2, families)?;
    let outside = if families == Families::Ipv6 { "ip6" } else { "ip" };
    cluster.apply_text(&(shell("from", "n1", "app: from") + &shell("to", "n2", "app: to")))?;
    let pod = cluster.wait_pod("to")?;
    let (from, to) = (Place::of_pod(&cluster, &cluster.wait_pod("from")?)?, Place::of_pod(&cluster, &pod)?);
    let ips = pod.ips;
    let tap = to.enter(|| {
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        Ok(socket(AddressFamily::Packet, SockType::Raw, flags, SockProtocol::EthAll)?)
    })?;
    let path = Path::new("/run/netns").join(format!("tp-{}-underlay", cluster.name()));
    let underlay = Place::of_netns("underlay", &path)?;
    let scene = Scene { underlay, from, tap, number: std::cell::Cell::default() };
    for backend in ["vxlan", "ipip", "udp"] {
        cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        all_send_by(&cluster, backend)?;
        for ip in &ips {
            let to = SocketAddr::new(*ip, PORT);
            let comes = |mark: u8| scene.arrives(to, mark).with_context(|| format!("{backend} to {to}"));
            let expect = |what: &str, came: Option<u8>, wanted: Option<u8>| {
                ensure!(came == wanted, "{backend} to {to}, {what}: {wanted:?} should have come, not {came:?}");
                Ok(())
            };
            scene.link(&[])?;
            for mark in [NONE, 1, UNDERSTOOD, MET] {
                expect("a link that marks nothing", comes(mark)?, Some(mark))?;
            }
            // Only what says outside that it is understood.
            let rules = ["ect0", "ect1"].map(|mark| format!("{outside} ecn {mark} {outside} ecn set ce"));
            scene.link(&rules.each_ref().map(String::as_str))?;
            expect("a link that marks what may be marked", comes(NONE)?, Some(NONE))?;
            for mark in [1, UNDERSTOOD, MET] {
                expect("a link that marks what may be marked", comes(mark)?, Some(MET))?;
            }
            scene.link(&[&format!("{outside} ecn set ce")])?;
            expect("a link that marks everything", comes(UNDERSTOOD)?, Some(MET))?;
            expect("a link that marks everything", comes(NONE)?, None)?;
        }
        scene.link(&[])?;
    }
    drop(scene);
    cluster.down()
}
