//! How large pods' packets may be follows the backend while they run: datagrams that are as large as each pod's device takes at that moment, which nobody may
//! cut, and streams go on through every change and none is lost. A node whose agent comes late, a change in the middle of another, and agents that are killed
//! are nothing special; `towpath status --watch` says all the while who is where, and why.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::network_config;
use towpath_walkthrough::machine::{can_run_labs, freeze, kill, lab_agent};
use towpath_walkthrough::place::Place;
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::traffic::{Bulk, Clock, Packet, Receiver};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const SOON: Duration = Duration::from_secs(30);
/// What the lab's nodes have between them, and what an envelope leaves of it.
const WIDE: usize = 1500;
const NARROW: usize = 1450;
const PORT: u16 = 5300;
const PACE: Duration = Duration::from_millis(4);

struct Pod {
    place: Arc<Place>,
    ips: Vec<IpAddr>,
}

fn pod(cluster: &Cluster, name: &str) -> Result<Pod> {
    let pod = cluster.wait_pod(name)?;
    Ok(Pod { place: Arc::new(Place::of_pod(cluster, &pod)?), ips: pod.ips })
}

/// Runs a command where a pod stands; what it says.
fn say(place: &Place, command: &str) -> Result<String> {
    place.enter(|| {
        let output = Command::new("sh").args(["-c", command]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr))
    })
}

/// The MTU that a line of `ip` names.
fn mtu_in(text: &str) -> Option<usize> {
    text.split(" mtu ").nth(1)?.split_whitespace().next()?.parse().ok()
}

fn device_mtu(pod: &Pod) -> Result<usize> {
    let text = say(&pod.place, "ip -o link show eth0")?;
    mtu_in(&text).with_context(|| format!("no MTU in {text:?}"))
}

/// Waits until the devices of these pods have an MTU, and sees that packets as large as that go to and fro between all of them, and none that is larger.
fn have(pods: &[Pod], mtu: usize) -> Result<()> {
    wait(&format!("MTU {mtu} in all pods"), SOON, || {
        for pod in pods {
            let now = device_mtu(pod)?;
            ensure!(now == mtu, "{} has {now}", pod.place.name());
        }
        Ok(())
    })?;
    for from in pods {
        for (to, ip) in pods.iter().flat_map(|to| to.ips.iter().map(move |ip| (to, ip))) {
            if from.place.name() == to.place.name() {
                continue;
            }
            let headers = if ip.is_ipv4() { 28 } else { 48 };
            let said = say(&from.place, &format!("ping -M do -c1 -W2 -s {} {ip}", mtu - headers))?;
            ensure!(said.contains(" 0% packet loss"), "{} to {}: {said}", from.place.name(), to.place.name());
            let said = say(&from.place, &format!("ping -M do -c1 -W1 -s {} {ip} || true", mtu - headers + 1))?;
            ensure!(said.contains("too long"), "{}: {said}", from.place.name());
        }
        // What is answered to clients outside may have to go in an envelope.
        for outside in ["ip route get 203.0.113.9", "ip -6 route get 2001:db8:77::9"] {
            let said = say(&from.place, outside)?;
            let routed = mtu_in(&said).unwrap_or(mtu);
            ensure!(routed == mtu.min(NARROW), "{}: {said}", from.place.name());
        }
    }
    Ok(())
}

/// Sends, over every family, datagrams as large as the sender's device takes, in one piece or not at all.
struct Full {
    over: Arc<AtomicBool>,
    wide: Arc<AtomicUsize>,
    thread: JoinHandle<Result<Vec<Packet>>>,
}

impl Full {
    fn start(from: &Pod, sender: u32, to: Vec<SocketAddr>, clock: Clock) -> Self {
        let (over, wide, place) = (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), from.place.clone());
        let (ended, large) = (over.clone(), wide.clone());
        let thread = std::thread::spawn(move || {
            place.enter(|| {
                let mut sockets = Vec::new();
                for to in to {
                    sockets.push((whole(to)?, to, 0_u32));
                }
                let mut sent = Vec::new();
                while !ended.load(Ordering::Relaxed) {
                    for (flow, (socket, to, number)) in (0..).zip(&mut sockets) {
                        let packet = Packet { sender, flow, number: *number, sent: clock.now() };
                        large.fetch_add(usize::from(send_full(socket, *to, &packet)?), Ordering::Relaxed);
                        sent.push(packet);
                        *number += 1;
                    }
                    std::thread::sleep(PACE);
                }
                Ok(sent)
            })
        });
        Self { over, wide, thread }
    }
}

/// A socket whose datagrams nobody may cut.
fn whole(to: SocketAddr) -> Result<UdpSocket> {
    use rustix::net::sockopt::{
        Ipv4PathMtuDiscovery, Ipv6PathMtuDiscovery, set_ip_mtu_discover, set_ipv6_mtu_discover,
    };
    if to.is_ipv4() {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        set_ip_mtu_discover(&socket, Ipv4PathMtuDiscovery::DO)?;
        return Ok(socket);
    }
    let socket = UdpSocket::bind("[::]:0")?;
    set_ipv6_mtu_discover(&socket, Ipv6PathMtuDiscovery::DO)?;
    Ok(socket)
}

/// As large as it can be; whether that was the larger of the two.
fn send_full(socket: &UdpSocket, to: SocketAddr, packet: &Packet) -> Result<bool> {
    let headers = if to.is_ipv4() { 28 } else { 48 };
    for mtu in [WIDE, NARROW] {
        let mut bytes = packet.bytes().to_vec();
        bytes.resize(mtu - headers, 0);
        match socket.send_to(&bytes, to) {
            Ok(_) => return Ok(mtu == WIDE),
            Err(error) if mtu == WIDE && error.raw_os_error() == Some(nix::libc::EMSGSIZE) => {}
            Err(error) => return Err(error).with_context(|| format!("send {} bytes to {to}", bytes.len())),
        }
    }
    Err(anyhow!("not even {NARROW} bytes can be sent to {to}"))
}

struct Traffic {
    receivers: Vec<Receiver>,
    senders: Vec<Full>,
    bulk: Vec<Bulk>,
}

impl Traffic {
    fn start(pods: &[Pod]) -> Result<Self> {
        let clock = Clock::default();
        let (mut receivers, mut senders, mut bulk) = (Vec::new(), Vec::new(), Vec::new());
        for pod in pods {
            for ip in &pod.ips {
                receivers.push(Receiver::at(&pod.place, SocketAddr::new(*ip, PORT), clock)?);
            }
        }
        for (number, from) in (0..).zip(pods) {
            let others = pods.iter().filter(|to| to.place.name() != from.place.name());
            let to = others.flat_map(|to| to.ips.iter().map(|ip| SocketAddr::new(*ip, PORT))).collect();
            senders.push(Full::start(from, number, to, clock));
        }
        for (from, to) in pods.iter().zip(pods.iter().cycle().skip(1)) {
            for ip in &to.ips {
                bulk.push(Bulk::start(&from.place, &to.place, SocketAddr::new(*ip, PORT))?);
            }
        }
        Ok(Self { receivers, senders, bulk })
    }

    /// How many of the larger datagrams each pod has sent so far.
    fn wide(&self) -> Vec<usize> {
        self.senders.iter().map(|sender| sender.wide.load(Ordering::Relaxed)).collect()
    }

    /// Sees whether pods send the larger ones now.
    fn sends_wide(&self, expected: bool) -> Result<()> {
        let before = self.wide();
        std::thread::sleep(Duration::from_millis(500));
        let grown: Vec<usize> = self.wide().iter().zip(&before).map(|(now, before)| now - before).collect();
        ensure!(grown.iter().all(|count| (*count > 50) == expected && (*count == 0) != expected), "{grown:?}");
        Ok(())
    }

    /// Datagrams, larger ones among them, and bytes of streams; nothing of it was lost.
    fn end(self) -> Result<(usize, usize, u64)> {
        let wide = self.wide().iter().sum();
        let mut sent = Vec::new();
        for sender in self.senders {
            sender.over.store(true, Ordering::Relaxed);
            sent.extend(sender.thread.join().map_err(|_| anyhow!("a sender panicked"))??);
        }
        std::thread::sleep(Duration::from_millis(300));
        let mut times: BTreeMap<(u32, u32, u32), usize> = BTreeMap::new();
        for receiver in self.receivers {
            for heard in receiver.end()? {
                let Packet { sender, flow, number, .. } = heard.packet;
                *times.entry((sender, flow, number)).or_default() += 1;
            }
        }
        let lost: Vec<String> = sent
            .iter()
            .filter(|packet| !times.contains_key(&(packet.sender, packet.flow, packet.number)))
            .map(|packet| format!("{}/{} after {:.3} s", packet.sender, packet.flow, packet.sent as f64 / 1e9))
            .collect();
        ensure!(
            lost.is_empty(),
            "{} of {} were lost: {:?}",
            lost.len(),
            sent.len(),
            lost.iter().take(20).collect::<Vec<_>>()
        );
        ensure!(times.values().all(|count| *count == 1), "some arrived twice");
        let bytes = self.bulk.into_iter().map(Bulk::end).sum::<Result<u64>>()?;
        Ok((sent.len(), wide, bytes))
    }
}

fn change(cluster: &Cluster, backend: &str) -> Result<()> {
    cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))
}

/// `towpath status --watch`: whether it was a success, and what it said.
fn watch(cluster: &Cluster, options: &[&str]) -> Result<(bool, String)> {
    let output =
        Command::new(cluster.towpath()).args(["status", "--watch", "--lab", cluster.name()]).args(options).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    Ok((output.status.success(), said))
}

/// Waits, as a person would, until it is done.
fn done(cluster: &Cluster, backend: &str) -> Result<Duration> {
    let begun = Instant::now();
    let (success, said) = watch(cluster, &["--timeout", "60"])?;
    ensure!(success, "{backend}: {said}");
    for node in NODES {
        let last = said.lines().rfind(|line| line.starts_with(&format!("{node}: "))).context("a node is not shown")?;
        let right = last.contains(&format!("done; sends by {backend}")) && last.contains("2 of 2 nodes");
        ensure!(right, "{backend}: {said}");
    }
    println!("{backend}: done after {:?}", begun.elapsed());
    Ok(begun.elapsed())
}

/// What a node's own object says of a condition.
fn condition(cluster: &Cluster, node: &str, kind: &str) -> Result<Value> {
    let object = cluster.get("nodenetwork", node)?;
    let all = object.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
    all.into_iter().find(|one| one["type"] == kind).with_context(|| format!("{node} has no condition {kind}: {object}"))
}

/// A node whose agent comes late, of which nobody has heard before: it holds up its own pairs alone, and is named.
fn late(cluster: &Cluster, pods: &[Pod], traffic: &Traffic) -> Result<()> {
    let frozen = freeze(lab_agent(cluster.name(), "n3")?)?;
    let said = cluster.try_kubectl(&["delete", "nodenetwork", "n3", "--wait=false"])?;
    ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stderr));
    change(cluster, "host-gw")?;
    let (success, said) = watch(cluster, &["--timeout", "8"])?;
    ensure!(!success && said.contains("n3: silent") && said.contains("to n3 by vxlan: it has said nothing"), "{said}");
    let object = cluster.get("nodenetwork", "n1")?;
    let behind = object.pointer("/status/peersBehind").cloned().unwrap_or_default();
    ensure!(
        behind == serde_json::json!([{"node": "n3", "backend": "vxlan", "reason": "Silent"}]),
        "{}: {behind}",
        object.pointer("/status").unwrap_or(&Value::Null)
    );
    ensure!(field(&condition(cluster, "n1", "Settled")?, "/status") == "False", "n3 may come at any time");
    have(pods, NARROW).context("one is still reached in envelopes")?;
    traffic.sends_wide(false)?;
    drop(frozen);
    done(cluster, "host-gw")?;
    have(pods, WIDE)
}

/// A change in the middle of another, with agents that are killed, more than once.
fn again(cluster: &Cluster, pods: &[Pod]) -> Result<()> {
    for (backend, killed) in [("vxlan", "n1"), ("host-gw", "n2"), ("ipip", "n3"), ("vxlan", "n2"), ("host-gw", "n1")] {
        change(cluster, backend)?;
        std::thread::sleep(Duration::from_millis(500));
        kill(wait("an agent", SOON, || lab_agent(cluster.name(), killed))?)?;
    }
    done(cluster, "host-gw")?;
    have(pods, WIDE)
}

fn changes(cluster: &Cluster, pods: &mut Vec<Pod>, traffic: &Traffic) -> Result<()> {
    change(cluster, "host-gw")?;
    done(cluster, "host-gw")?;
    have(pods, WIDE)?;
    traffic.sends_wide(true)?;
    cluster.apply_text(&shell("new-n1", "n1", "app: new"))?;
    pods.push(pod(cluster, "new-n1")?);
    have(pods, WIDE).context("with a new pod")?;
    // An agent that starts anew finds pods as they are, and leaves them so.
    kill(lab_agent(cluster.name(), "n1")?)?;
    let first = pods.first().context("no pods")?;
    for _ in 0..20 {
        ensure!(device_mtu(first)? == WIDE, "it was lowered because an agent started");
        std::thread::sleep(Duration::from_millis(100));
    }
    done(cluster, "host-gw")?;
    change(cluster, "ipip")?;
    done(cluster, "ipip")?;
    have(pods, NARROW)?;
    traffic.sends_wide(false)?;
    change(cluster, "vxlan")?;
    done(cluster, "vxlan")?;
    have(pods, NARROW)?;
    late(cluster, pods, traffic)?;
    again(cluster, pods)?;
    traffic.sends_wide(true)?;
    change(cluster, "vxlan")?;
    done(cluster, "vxlan")?;
    have(pods, NARROW)
}

#[test]
fn pods_send_what_the_ways_carry_through_every_change_and_nothing_is_lost() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-mtu", 3, Families::Dual)?;
    let servers = NODES.map(|node| server(&format!("web-{node}"), node, "app: web"));
    cluster.apply_text(&servers.concat())?;
    let mut pods = NODES.iter().map(|node| pod(&cluster, &format!("web-{node}"))).collect::<Result<Vec<_>>>()?;
    change(&cluster, "vxlan")?;
    done(&cluster, "vxlan")?;
    have(&pods, NARROW)?;
    let traffic = Traffic::start(&pods)?;
    traffic.sends_wide(false)?;
    changes(&cluster, &mut pods, &traffic)?;
    let (sent, wide, bytes) = traffic.end()?;
    println!("{sent} datagrams, {wide} of them of {WIDE} bytes, all heard; {} MiB", bytes >> 20);
    ensure!(sent > 50_000 && wide > 5_000 && bytes > 500 << 20, "only {sent}, {wide}, {bytes}");
    // Whoever reads it by machine gets all nodes at once.
    let (success, said) = watch(&cluster, &["-o", "json"])?;
    let views: Vec<Value> = serde_json::from_str(said.lines().last().unwrap_or_default()).context(said.clone())?;
    let names: BTreeSet<&str> = views.iter().filter_map(|view| view["node"].as_str()).collect();
    ensure!(success && names == BTreeSet::from(NODES) && views.iter().all(|view| view["state"] == "done"), "{said}");
    ensure!(views.iter().all(|view| view["podMTU"] == NARROW && view["backend"] == "vxlan"), "{said}");
    cluster.down()
}

/// The agents' answers on their status sockets, by node.
fn statuses(cluster: &Cluster) -> Result<BTreeMap<String, Value>> {
    let output = Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?;
    let answers: Vec<Value> = serde_json::from_slice(&output.stdout).context("towpath status -o json")?;
    let named = |answer: Value| {
        Some((answer.pointer("/status/node")?.as_str()?.to_owned(), answer.pointer("/status")?.clone()))
    };
    Ok(answers.into_iter().filter_map(named).collect())
}

#[test]
fn a_path_that_carries_less_than_assumed_is_found_named_and_fitted_to() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up_with("e2e-mtu-path", 3, Families::Dual, &["--agent-config", "pathRoundSeconds=3"])?;
    let servers = NODES.map(|node| server(&format!("web-{node}"), node, "app: web"));
    cluster.apply_text(&servers.concat())?;
    let pods = NODES.iter().map(|node| pod(&cluster, &format!("web-{node}"))).collect::<Result<Vec<_>>>()?;
    wait("the first round", SOON, || {
        for node in NODES {
            let fit = condition(&cluster, node, "PathsFit")?;
            ensure!(fit["status"] == "True", "{fit}");
        }
        Ok(())
    })?;
    // The nodes' own devices know nothing of it, and nobody says that anything is too big.
    let underlay = Place::of_netns("underlay", format!("/run/netns/tp-{}-underlay", cluster.name()).as_ref())?;
    let port = say(&underlay, "ip -br link | cut -d@ -f1 | cut -d' ' -f1 | grep n3")?;
    say(&underlay, &format!("ip link set {} mtu 1300", port.trim()))?;
    let small = |node: &str| -> Result<BTreeSet<(String, u64, u64)>> {
        let status = statuses(&cluster)?.remove(node).with_context(|| format!("{node} says nothing"))?;
        let all = status["smallPaths"].as_array().cloned().unwrap_or_default();
        let problems = status["problems"].to_string();
        ensure!(all.is_empty() != problems.contains("the path to node"), "{problems}");
        // A virtual link takes four bytes more than it says (a VLAN tag), in one of its directions.
        let carries =
            |path: &Value| path["carries"].as_u64().map(|size| if size <= 1304 { size.min(1300) } else { size });
        let one = |path: &Value| Some((path["node"].as_str()?.to_owned(), carries(path)?, path["needed"].as_u64()?));
        Ok(all.iter().filter_map(one).collect())
    };
    let to = |node: &str| (node.to_owned(), 1300, 1500);
    wait("the path to be named", Duration::from_secs(100), || {
        for (node, expected) in [("n1", vec![to("n3")]), ("n2", vec![to("n3")]), ("n3", vec![to("n1"), to("n2")])] {
            let found = small(node)?;
            ensure!(found == expected.into_iter().collect(), "{node} found {found:?}");
        }
        Ok(())
    })?;
    wait("the condition to say so", SOON, || {
        let fit = condition(&cluster, "n1", "PathsFit")?;
        let right =
            fit["status"] == "False" && fit["reason"] == "TooSmall" && fit["message"].to_string().contains("n3");
        ensure!(right, "{fit}");
        Ok(())
    })?;
    let metrics = cluster.node("n1", "curl -sS -m 3 http://127.0.0.1:9116/metrics | grep path")?;
    ensure!(metrics.out.contains("node=\"n3\"") && metrics.out.contains(" 1300"), "{}", metrics.all());
    let lost = say(&pods[0].place, &format!("ping -M do -c1 -W1 -s 1300 {}", pods[2].ips[0]))?;
    ensure!(lost.contains("100% packet loss"), "what is larger is lost indeed: {lost}");

    // What it says helps: pods that run follow, and everything fits.
    cluster.apply_text(&network_config("{backend: host-gw, mtu: 1280}"))?;
    done(&cluster, "host-gw").context("with an MTU that is said")?;
    let devices = pods.iter().map(device_mtu).collect::<Result<Vec<_>>>()?;
    ensure!(devices == [1280; 3], "{devices:?}");
    for pod in &pods[..2] {
        for (ip, headers) in pods[2].ips.iter().zip([28, 48]) {
            let said = say(&pod.place, &format!("ping -M do -c2 -i 0.2 -W2 -s {} {ip}", 1280 - headers))?;
            ensure!(said.contains(" 0% packet loss"), "{said}");
        }
    }
    say(&underlay, &format!("ip link set {} mtu 1330", port.trim()))?;
    wait("nothing to be named", Duration::from_secs(100), || {
        for node in NODES {
            let found = small(node)?;
            ensure!(found.is_empty(), "{node}: {found:?}");
        }
        Ok(())
    })?;
    cluster.down()
}
