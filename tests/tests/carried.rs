//! The backend `udp` while those die and are replaced who have packets carried and who carry them, and while nodes come and go: over IPv4, and over
//! IPv6, where whoever carries has to be told of every node.

use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_datapath::udp_names::mac_of;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::{all_send_by, network_config, status_of};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{another_agent, can_run_labs, command_line, kill, lab_agent, lab_carry};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;
use towpath_walkthrough::traffic::{Clock, Flow, Receiver, Sender};

const PORT: u16 = 5300;
const PACE: Duration = Duration::from_millis(4);
const SOON: Duration = Duration::from_secs(20);
/// How long traffic goes on when nothing happens.
const STAY: Duration = Duration::from_secs(1);

struct Pod {
    place: Arc<Place>,
    ips: Vec<IpAddr>,
}

fn pod(cluster: &Cluster, name: &str) -> Result<Pod> {
    let pod = cluster.wait_pod(name)?;
    Ok(Pod { place: Arc::new(Place::of_pod(cluster, &pod)?), ips: pod.ips })
}

struct Scene {
    cluster: Cluster,
    pods: [Pod; 2],
    /// n1 itself, whose packets the kernel's routes lead.
    node: Arc<Place>,
}

impl Scene {
    fn status(&self, counter: &str) -> Result<u64> {
        let status = status_of(&self.cluster, "n1")?;
        Ok(status.pointer("/counters").and_then(|all| all.get(counter)).and_then(Value::as_u64).unwrap_or_default())
    }

    /// How n1 reaches a node, and why so.
    fn way(&self, node: &str) -> Result<(String, String)> {
        let status = status_of(&self.cluster, "n1")?;
        let peers = status.get("peers").and_then(Value::as_array).context("no peers")?;
        let peer = peers.iter().find(|peer| field(peer, "/node") == node).with_context(|| format!("no peer {node}"))?;
        Ok((field(peer, "/backend"), field(peer, "/why")))
    }

    fn goes(&self, node: &str, backend: &str, why: Option<&str>) -> Result<()> {
        wait(&format!("{node} to be reached by {backend}"), SOON, || {
            let (by, because) = self.way(node)?;
            ensure!(by == backend && why.is_none_or(|why| why == because), "by {by}: {because}");
            Ok(())
        })
    }

    /// How many packets the kernel's routes led into n1's tunnel.
    fn by_the_tunnel(&self) -> Result<u64> {
        let said = self.cluster.node("n1", "ip -s -j link show towpath-vx")?;
        let device: Value = serde_json::from_str(&said.out).with_context(|| said.all())?;
        device.pointer("/0/stats64/tx/packets").and_then(Value::as_u64).context("no count of packets")
    }

    /// Datagrams between the pods in both directions and from n1 to the pod of n2 while something happens, small ones and large ones: every one
    /// arrives, and by user space.
    fn loses_nothing(&self, what: &str, happens: impl FnOnce() -> Result<()>) -> Result<()> {
        self.sends(happens).with_context(|| what.to_owned())
    }

    fn sends(&self, happens: impl FnOnce() -> Result<()>) -> Result<()> {
        let (clock, before) = (Clock::default(), ["udp_out", "tunnel_out"].map(|name| self.status(name)));
        let tunnel_before = self.by_the_tunnel()?;
        let [one, two] = &self.pods;
        let receivers =
            [one, two].into_iter().flat_map(|pod| pod.ips.iter().map(move |ip| (pod, SocketAddr::new(*ip, PORT))));
        let receivers: Vec<Receiver> =
            receivers.map(|(pod, at)| Receiver::at(&pod.place, at, clock)).collect::<Result<_>>()?;
        let sender = |number: u32, from: &Arc<Place>, to: &Pod| {
            let at = to.ips.iter().flat_map(|ip| [0, 1200].map(|size| (SocketAddr::new(*ip, PORT), size)));
            let flow = |(to, size), at| Flow { number: 100 * (number + 1) + at, to, fresh: false, every: 1, size };
            let flows = at.zip(0..).map(|(what, at)| flow(what, at)).collect();
            Sender::start(Arc::clone(from), number, flows, PACE, clock)
        };
        let senders = vec![sender(0, &one.place, two), sender(1, &two.place, one), sender(2, &self.node, two)];
        let happened = happens();
        std::thread::sleep(STAY);
        let sent: Vec<_> = senders.into_iter().map(Sender::end).collect::<Result<Vec<_>>>()?.concat();
        std::thread::sleep(Duration::from_millis(300));
        let heard: Vec<_> = receivers.into_iter().map(Receiver::end).collect::<Result<Vec<_>>>()?.concat();
        happened?;
        let arrived: std::collections::BTreeSet<_> =
            heard.iter().map(|heard| (heard.packet.flow, heard.packet.number)).collect();
        let lost: Vec<_> = sent
            .iter()
            .filter(|sent| !arrived.contains(&(sent.packet.flow, sent.packet.number)))
            .map(|sent| (sent.packet.flow, sent.packet.number, sent.packet.sent / 1_000_000))
            .collect();
        ensure!(lost.is_empty(), "{} of {} were lost (flow, number, ms): {:?}", lost.len(), sent.len(), lost.get(..20));
        ensure!(sent.len() > 500, "only {} were sent", sent.len());
        let [by_udp, by_tunnel] = before;
        let (by_udp, by_tunnel) = (self.status("udp_out")? - by_udp?, self.status("tunnel_out")? - by_tunnel?);
        let by_tunnel = by_tunnel + self.by_the_tunnel()? - tunnel_before;
        println!("{} datagrams, all of them heard; n1 sent {by_udp} by udp and {by_tunnel} in envelopes", sent.len());
        let pods = sent.iter().filter(|sent| sent.packet.sender == 0).count() as u64;
        ensure!(by_udp >= pods && by_tunnel < 20, "not by udp: {by_udp} of {pods}, {by_tunnel}");
        Ok(())
    }

    fn kill_agent(&self) -> Result<()> {
        let agent = lab_agent(self.cluster.name(), "n1")?;
        kill(agent)?;
        another_agent(self.cluster.name(), "n1", agent)?;
        all_send_by(&self.cluster, "udp")
    }
}

/// Whether a process carries packets: it has threads for that.
fn carries(pid: i32) -> Result<bool> {
    let mut found = false;
    for thread in std::fs::read_dir(format!("/proc/{pid}/task")).with_context(|| format!("process {pid} is gone"))? {
        let name = std::fs::read_to_string(thread?.path().join("comm")).unwrap_or_default();
        found |= name.starts_with("udp-in");
    }
    Ok(found)
}

fn come_to_carry(pid: i32, other: i32) -> Result<()> {
    wait(&format!("process {pid} to carry, and no longer {other}"), SOON, || {
        let now = (carries(pid)?, carries(other).unwrap_or(false));
        ensure!(now == (true, false), "they do: {now:?}");
        Ok(())
    })
}

/// Starts the successor of who carries on n1, as the rollout of a DaemonSet does.
fn successor(scene: &Scene, carry: i32) -> Result<i32> {
    let command = command_line(carry).join(" ");
    let said = scene.cluster.node("n1", &format!("setsid {command} >/dev/null 2>&1 </dev/null & echo $!"))?;
    let pid: i32 = said.out.trim().parse().with_context(|| said.all())?;
    come_to_carry(pid, carry)?;
    Ok(pid)
}

fn goes_on(name: &str, families: Families) -> Result<Option<Scene>> {
    if !can_run_labs()? {
        return Ok(None);
    }
    let cluster = Cluster::up(name, 2, families)?;
    cluster.apply_text(&(shell("one", "n1", "app: one") + &shell("two", "n2", "app: two")))?;
    let pods = [pod(&cluster, "one")?, pod(&cluster, "two")?];
    cluster.apply_text(&network_config("{backend: udp}"))?;
    all_send_by(&cluster, "udp")?;
    let node = Arc::new(Place::of_node(&cluster, "n1")?);
    let scene = Scene { cluster, pods, node };
    scene.loses_nothing("nothing happens", || Ok(()))?;
    scene.loses_nothing("the agent is killed", || scene.kill_agent())?;
    let carry = lab_carry(scene.cluster.name(), "n1")?;
    let mut next = 0;
    scene.loses_nothing("who carries is replaced", || {
        next = successor(&scene, carry)?;
        Ok(())
    })?;
    scene.loses_nothing("the agent is killed then", || scene.kill_agent())?;
    // What was in its hands is lost; who carried before takes it all back.
    kill(next)?;
    come_to_carry(carry, next)?;
    all_send_by(&scene.cluster, "udp")?;
    scene.loses_nothing("who carried before carries again", || Ok(()))?;
    kill(carry)?;
    let next = wait("another process that carries", SOON, || {
        let next = lab_carry(scene.cluster.name(), "n1")?;
        ensure!(next != carry && carries(next)?, "not yet");
        Ok(next)
    })?;
    all_send_by(&scene.cluster, "udp")?;
    scene.loses_nothing("another process carries", || Ok(()))?;
    scene.loses_nothing("the agent is killed in the end", || scene.kill_agent())?;
    ensure!(lab_carry(scene.cluster.name(), "n1")? == next, "who carries ended with the agent");
    Ok(Some(scene))
}

#[test]
fn packets_are_carried_on_whoever_dies_or_is_replaced() -> Result<()> {
    match goes_on("e2e-carried", Families::Dual)? {
        Some(scene) => scene.cluster.down(),
        None => Ok(()),
    }
}

/// A machine that nobody has built: its Node object only.
fn ghost(name: &str, ip: IpAddr, range: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: '{range}', podCIDRs: ['{range}']}}\nstatus:\n  \
         addresses: [{{type: InternalIP, address: '{ip}'}}, {{type: Hostname, address: {name}}}]\n"
    )
}

/// An address that begins so, and goes by what `other` goes by on the device: what a search for it finds (`bpf/addr.h` has the hash).
fn same_name(first: u64, other: Ipv6Addr) -> Result<Ipv6Addr> {
    const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;
    let mix = |hash: u64, word: u64| {
        let product = (hash ^ word).wrapping_mul(FACTOR);
        product ^ product >> 29
    };
    // As the machine reads the bytes.
    let words = |address: Ipv6Addr| {
        let bits = u128::from_be_bytes(address.octets());
        [(bits >> 64) as u64, bits as u64].map(|word| u64::from_ne_bytes(word.to_be_bytes()))
    };
    let [high, low] = words(other);
    let product = (mix(0, high) ^ low).wrapping_mul(FACTOR);
    let inverse = (0..6).fold(FACTOR, |x, _| x.wrapping_mul(2_u64.wrapping_sub(FACTOR.wrapping_mul(x))));
    let own = u64::from_ne_bytes(first.to_be_bytes());
    let last = (product ^ 1).wrapping_mul(inverse) ^ mix(0, own);
    let last = u64::from_be_bytes(last.to_ne_bytes());
    let found = Ipv6Addr::from(u128::from(first) << 64 | u128::from(last));
    ensure!(
        mac_of(found.into()) == mac_of(other.into()) && found != other,
        "{found} and {other} go by different names"
    );
    Ok(found)
}

#[test]
fn nor_is_anything_lost_over_ipv6_also_while_nodes_come_and_go() -> Result<()> {
    let Some(scene) = goes_on("e2e-carried6", Families::Ipv6)? else { return Ok(()) };
    let IpAddr::V6(n2) = address(&scene.cluster.node_ip("n2")?)? else { bail!("n2 has no IPv6 address") };
    let (log, delete) =
        (Log::new(Voice::Plain), |name: &str| ["delete".to_owned(), "node".to_owned(), name.to_owned()]);
    let remove = |name: &str| scene.cluster.kubectl(&log, &delete(name).each_ref().map(String::as_str)).map(drop);
    // Others come and go; one goes by what n2 goes by, and has a higher address.
    let above = same_name(0xfdff_0000_0000_0001, n2)?;
    scene.loses_nothing("nodes come and go", || {
        let others = [("g1", "fdee::1".parse()?, "fdcc:1::/64"), ("g2", IpAddr::V6(above), "fdcc:2::/64")];
        for (name, ip, range) in others {
            scene.cluster.apply_text(&ghost(name, ip, range))?;
        }
        scene.goes("g2", "vxlan", Some("SameName"))?;
        scene.goes("g1", "vxlan", Some("Silent"))?;
        scene.goes("n2", "udp", None)?;
        remove("g1")?;
        remove("g2")
    })?;
    // One that does, and has a lower one: n2 is sent envelopes, and sends such, until it is gone.
    let below = same_name(0xfc00_0000_0000_0001, n2)?;
    scene.cluster.apply_text(&ghost("g3", below.into(), "fdcc:3::/64"))?;
    scene.goes("n2", "vxlan", Some("SameName"))?;
    wait("packets in envelopes", SOON, || {
        let (udp, tunnel) = (scene.status("udp_out")?, scene.status("tunnel_out")?);
        scene.pods[0].place.enter(|| {
            let socket = std::net::UdpSocket::bind("[::]:0")?;
            socket.send_to(b"x", SocketAddr::new(*scene.pods[1].ips.first().context("no address")?, PORT))?;
            Ok(())
        })?;
        let now = (scene.status("udp_out")? - udp, scene.status("tunnel_out")? - tunnel);
        ensure!(now.0 == 0 && now.1 > 0, "by udp and in envelopes: {now:?}");
        Ok(())
    })?;
    remove("g3")?;
    all_send_by(&scene.cluster, "udp")?;
    scene.loses_nothing("nobody else goes by that", || Ok(()))?;
    scene.cluster.down()
}
