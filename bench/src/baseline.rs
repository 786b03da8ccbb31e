//! What Towpath is compared with, made by hand from the kernel's own parts, in namespaces of our own.

use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::cluster::{MEASURED, address};
use crate::load::{Cpus, Ends};
use crate::netns::Netns;
use crate::place::Place;
use crate::rulesets::Ruleset;
use crate::worker;

/// Two ends and the network between them; all gone when dropped.
#[derive(Debug)]
pub(crate) struct Baseline {
    /// Server and client.
    pub(crate) ends: Ends,
    /// The server's address.
    pub(crate) to: IpAddr,
    _network: Vec<Netns>,
    _carriers: Vec<Carrier>,
}

/// A process that carries packets; ends when dropped.
#[derive(Debug)]
struct Carrier(Child);

impl Drop for Carrier {
    fn drop(&mut self) {
        // Asked to end, it takes its device and its socket with it. It may have ended by itself.
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let until = Instant::now() + DEVICE_PATIENCE;
        while matches!(self.0.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Baseline {
    fn start(
        title: &str,
        cpus: Cpus,
        network: Vec<Netns>,
        client: &Place,
        server: &Place,
        to: [u8; 4],
    ) -> Result<Self> {
        let ends = Ends::start(title, client, server, cpus)?;
        Ok(Self { ends, to: Ipv4Addr::from(to).into(), _network: network, _carriers: Vec::new() })
    }

    /// Two namespaces and one veth pair: the least that a packet between two pods can meet.
    ///
    /// # Errors
    /// Not root, or a command of `ip` failed.
    pub(crate) fn veth(name: &str, cpus: Cpus) -> Result<Self> {
        let (a, b) = (Netns::new(&format!("{name}-a"))?, Netns::new(&format!("{name}-b"))?);
        a.ip(&format!("link add eth0 type veth peer name eth0 netns {}", b.pid()))?;
        for (netns, last) in [(&a, 1), (&b, 2)] {
            netns.ip(&format!("addr add 10.210.0.{last}/24 dev eth0\nlink set eth0 up"))?;
        }
        let (client, server) = (a.place(), b.place());
        Self::start("the bare veth pair", cpus, vec![a, b], &client, &server, [10, 210, 0, 2])
    }

    /// Two namespaces on a Linux bridge in a third, with connection tracking of what it forwards, as on any node with kube-proxy
    /// (`br_netfilter`).
    ///
    /// # Errors
    /// As [`Baseline::veth`], or the kernel has no `br_netfilter`.
    pub(crate) fn bridge(cpus: Cpus) -> Result<Self> {
        let hub = Netns::new("bridge")?;
        hub.ip("link add br0 type bridge\nlink set br0 up")?;
        hub.sysctl("bridge/bridge-nf-call-iptables", "1")?;
        hub.nft("table inet track { chain forward { type filter hook forward priority 0; ct state established,related accept; }; };\n")?;
        let a = plug("bridge-a", &hub, "br0", "port-a", "10.210.0.1/24")?;
        let b = plug("bridge-b", &hub, "br0", "port-b", "10.210.0.2/24")?;
        let (client, server) = (a.place(), b.place());
        Self::start("the Linux bridge", cpus, vec![a, b, hub], &client, &server, [10, 210, 0, 2])
    }

    /// A node with two pods behind veth pairs, a host route each, that forwards between them by rules for `services` Services shaped as
    /// kube-proxy's; and how long the rules took to load. No bridge: what a pod network costs besides is not counted against them.
    ///
    /// # Errors
    /// As [`Baseline::veth`], or the rules are refused.
    pub(crate) fn kube_proxy(ruleset: Ruleset, services: usize, cpus: Cpus) -> Result<(Self, Duration)> {
        let node = Netns::new("kube-proxy")?;
        node.sysctl("ipv4/ip_forward", "1")?;
        let a = routed_pod("kube-proxy-a", &node, 2)?;
        let b = routed_pod("kube-proxy-b", &node, 3)?;
        let took = ruleset.load(&node, services, Ipv4Addr::new(10, 213, 0, 3).into())?;
        let (client, server) = (a.place(), b.place());
        let to = address(MEASURED).octets();
        let baseline = Self::start(ruleset.title(), cpus, vec![a, b, node], &client, &server, to)?;
        Ok((baseline, took))
    }

    /// Two bare nodes on the same kind of underlay as the lab's: a bridge between their `eth0`.
    ///
    /// # Errors
    /// As [`Baseline::veth`].
    pub(crate) fn underlay(name: &str, cpus: Cpus) -> Result<Self> {
        let (hub, one, two) = nodes(name)?;
        let (client, server) = (one.place(), two.place());
        Self::start("the bare underlay", cpus, vec![one, two, hub], &client, &server, [192, 168, 255, 12])
    }

    /// A pod on each of two nodes, laid out as flannel does: a bridge on each node, kernel routes, kernel VXLAN with fixed
    /// neighbours. No connection tracking and no masquerading.
    ///
    /// # Errors
    /// As [`Baseline::veth`].
    pub(crate) fn vxlan(cpus: Cpus) -> Result<Self> {
        let (hub, one, two) = nodes("vxlan")?;
        let a = vxlan_node(&one, "vxlan-a", 1, 2)?;
        let b = vxlan_node(&two, "vxlan-b", 2, 1)?;
        let (client, server) = (a.place(), b.place());
        Self::start("kernel VXLAN", cpus, vec![a, b, one, two, hub], &client, &server, [10, 211, 2, 10])
    }
}

/// How long WireGuard may take to make its device.
const DEVICE_PATIENCE: Duration = Duration::from_secs(5);

impl Baseline {
    /// Two bare nodes with WireGuard in user space between them, as who has no other tunnel would use it; none where it is not installed.
    ///
    /// # Errors
    /// As [`Baseline::veth`].
    pub(crate) fn wireguard(cpus: Cpus) -> Result<Option<Self>> {
        if ["wireguard-go", "wg"].iter().any(|program| !is_installed(program)) {
            return Ok(None);
        }
        let (hub, one, two) = nodes("wireguard")?;
        let keys = [Keys::new()?, Keys::new()?];
        let mut carriers = Vec::new();
        for (node, own, peer) in [(&one, 0, 1), (&two, 1, 0)] {
            // Both speak to `wg` by sockets in one directory, named as their devices.
            let device = format!("tpbwg{own}");
            carriers.push(user_space_wireguard(node, &device)?);
            let (Some(mine), Some(theirs)) = (keys.get(own), keys.get(peer)) else { continue };
            let config = format!(
                "[Interface]\nPrivateKey = {}\nListenPort = 51820\n\
                 [Peer]\nPublicKey = {}\nAllowedIPs = 10.214.0.0/24\nEndpoint = 192.168.255.1{}:51820\n",
                mine.private,
                theirs.public,
                peer + 1
            );
            node.feed(&["wg", "setconf", &device, "/dev/stdin"], &config)?;
            node.ip(&format!("addr add 10.214.0.{}/24 dev {device}\nlink set {device} mtu 1420 up", own + 1))?;
        }
        let (client, server) = (one.place(), two.place());
        let mut baseline =
            Self::start("WireGuard in user space", cpus, vec![one, two, hub], &client, &server, [10, 214, 0, 2])?;
        baseline.ends = baseline.ends.carried_by(carriers.iter().map(|carrier| carrier.0.id()).collect());
        baseline._carriers = carriers;
        Ok(Some(baseline))
    }
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|dir| dir.join(program).is_file())
}

/// A pair of keys.
struct Keys {
    private: String,
    public: String,
}

impl Keys {
    fn new() -> Result<Self> {
        let private = wg(&["genkey"], "")?;
        Ok(Self { public: wg(&["pubkey"], &private)?, private })
    }
}

fn wg(arguments: &[&str], input: &str) -> Result<String> {
    let mut child =
        Command::new("wg").args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().context("start wg")?;
    if let Some(mut stdin) = child.stdin.take() {
        // One that ends early says why itself.
        let _ = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().context("wait for wg")?;
    if !output.status.success() {
        bail!("wg {}: {}", arguments.join(" "), output.status);
    }
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// WireGuard's process with a device in a namespace.
fn user_space_wireguard(node: &Netns, device: &str) -> Result<Carrier> {
    let child = worker::command(&node.place(), &["run", "--", "wireguard-go", "-f", device])?
        // It warns of itself where the kernel has WireGuard, and goes on with this.
        .env("WG_PROCESS_FOREGROUND", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start wireguard-go")?;
    let carrier = Carrier(child);
    let deadline = Instant::now() + DEVICE_PATIENCE;
    while node.feed(&["wg", "show", device], "").is_err() {
        if Instant::now() > deadline {
            bail!("wireguard-go made no device {device} within {} s", DEVICE_PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(carrier)
}

/// A namespace with an `eth0` into a bridge.
fn plug(name: &str, hub: &Netns, bridge: &str, port: &str, address: &str) -> Result<Netns> {
    let netns = Netns::new(name)?;
    hub.ip(&format!(
        "link add name {port} type veth peer name eth0 netns {}\nlink set {port} master {bridge}\nlink set {port} up",
        netns.pid()
    ))?;
    netns.ip(&format!("addr add {address} dev eth0\nlink set eth0 up"))?;
    Ok(netns)
}

/// A pod behind a veth pair, with a host route on its node.
fn routed_pod(name: &str, node: &Netns, last: u8) -> Result<Netns> {
    let pod = Netns::new(name)?;
    node.ip(&format!(
        "link add name pod-{last} type veth peer name eth0 netns {}\n\
         link set pod-{last} up\n\
         addr add 10.213.0.1/32 dev pod-{last}\n\
         route add 10.213.0.{last}/32 dev pod-{last}",
        pod.pid()
    ))?;
    pod.ip(&format!(
        "addr add 10.213.0.{last}/32 dev eth0\n\
         link set eth0 up\n\
         route add 10.213.0.1/32 dev eth0\n\
         route add default via 10.213.0.1"
    ))?;
    Ok(pod)
}

fn nodes(name: &str) -> Result<(Netns, Netns, Netns)> {
    let hub = Netns::new(&format!("{name}-underlay"))?;
    hub.ip("link add br0 type bridge\nlink set br0 up")?;
    let one = plug(&format!("{name}-n1"), &hub, "br0", "n1", "192.168.255.11/24")?;
    let two = plug(&format!("{name}-n2"), &hub, "br0", "n2", "192.168.255.12/24")?;
    Ok((hub, one, two))
}

/// Makes a node of kernel VXLAN; its pod.
fn vxlan_node(node: &Netns, pod: &str, own: u8, peer: u8) -> Result<Netns> {
    node.sysctl("ipv4/ip_forward", "1")?;
    node.ip(&format!(
        "link add flannel.1 address 02:00:00:00:00:0{own} type vxlan id 1 local 192.168.255.1{own} dev eth0 dstport 8472 nolearning\n\
         addr add 10.211.{own}.0/32 dev flannel.1\n\
         link set flannel.1 mtu 1450 up\n\
         neigh add 10.211.{peer}.0 lladdr 02:00:00:00:00:0{peer} dev flannel.1 nud permanent\n\
         route add 10.211.{peer}.0/24 via 10.211.{peer}.0 dev flannel.1 onlink\n\
         link add cni0 mtu 1450 type bridge\n\
         addr add 10.211.{own}.1/24 dev cni0\n\
         link set cni0 up"
    ))?;
    let fdb = format!("fdb append 02:00:00:00:00:0{peer} dev flannel.1 dst 192.168.255.1{peer}");
    node.bridge(&fdb)?;
    let netns = plug(pod, node, "cni0", "pod", &format!("10.211.{own}.10/24"))?;
    netns.ip(&format!("link set eth0 mtu 1450\nroute add default via 10.211.{own}.1"))?;
    node.ip("link set pod mtu 1450")?;
    Ok(netns)
}
