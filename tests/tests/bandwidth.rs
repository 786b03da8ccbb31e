//! `kubernetes.io/ingress-bandwidth` and `kubernetes.io/egress-bandwidth`: measured with real transfers from the same node, another node and outside, in
//! both directions; what policy denies stays denied; limits outlive the agent, change and go while the pod runs, and nonsense is refused by name.

use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::in_charge::{annotate_pod, network_config, status_text};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;

const INGRESS: &str = "kubernetes.io/ingress-bandwidth";
const EGRESS: &str = "kubernetes.io/egress-bandwidth";

/// Where servers listen in pods.
const PORT: u16 = 7000;
const NODE_PORT: u16 = 30070;
/// No single step of a transfer takes longer.
const LIMIT: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_secs(20);
/// What programs write on packets that were judged.
const MARK: u32 = 0x7470_d311;
/// Who may have more than this has no limit: twice the largest that is given here, and little enough for a busy machine.
const FREE: f64 = 80.0;

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: slow}
spec:
  type: NodePort
  selector: {app: slow}
  ports:
  - {name: tcp, port: 7000, nodePort: 30070}
  - {name: udp, port: 7000, nodePort: 30070, protocol: UDP}
";

const GUARD: &str = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: guard}
spec:
  podSelector: {matchLabels: {app: slow}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
";

fn asking(pod: &str, annotations: &str) -> String {
    pod.replacen("metadata: {", &format!("metadata: {{annotations: {{{annotations}}}, "), 1)
}

/// Who sends: the one that connects, or the one that listens.
#[derive(Clone, Copy, Debug)]
enum Way {
    Up,
    Down,
}

fn any(like: SocketAddr) -> IpAddr {
    if like.is_ipv4() { [0; 4].into() } else { [0; 16].into() }
}

/// Connects to `to`, where `server` listens under this address or another one.
fn connected(client: &Place, to: SocketAddr, server: &Place) -> Result<(TcpStream, TcpStream)> {
    let listener = server.enter(|| Ok(TcpListener::bind((any(to), PORT))?))?;
    let stream = client.enter(|| {
        TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("{} connects to {to}", client.name()))
    })?;
    let (served, _) = listener.accept()?;
    for stream in [&stream, &served] {
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
    }
    Ok((stream, served))
}

/// Megabits of payload a second.
fn tcp(client: &Place, to: SocketAddr, server: &Place, way: Way, bytes: usize) -> Result<f64> {
    let (stream, served) = connected(client, to, server)?;
    let (mut sender, mut receiver) = match way {
        Way::Up => (stream, served),
        Way::Down => (served, stream),
    };
    let begun = Instant::now();
    let sending = std::thread::spawn(move || sender.write_all(&vec![7; bytes]).map(|()| sender));
    let (mut got, mut buffer) = (0, vec![0; 1 << 16]);
    while got < bytes {
        match receiver.read(&mut buffer).with_context(|| format!("after {got} of {bytes} bytes"))? {
            0 => bail!("{to} ended after {got} of {bytes} bytes"),
            n => got += n,
        }
    }
    let took = begun.elapsed();
    let _sender = sending.join().ok().context("the sender panicked")??;
    Ok(bytes as f64 * 8.0 / took.as_secs_f64() / 1e6)
}

/// The same of what gets through of datagrams that are sent for a second at some `offered` megabits a second.
fn udp(from: &Place, to: SocketAddr, at: &Place, offered: f64) -> Result<f64> {
    const PAYLOAD: usize = 1200;
    const SENDING: Duration = Duration::from_secs(1);
    let receiver = at.enter(|| Ok(UdpSocket::bind((any(to), PORT))?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(500)))?;
    let sender = from.enter(|| Ok(UdpSocket::bind((any(to), 0))?))?;
    sender.set_write_timeout(Some(LIMIT))?;
    let begun = Instant::now();
    let sending = std::thread::spawn(move || {
        let mut sent = 0.0;
        while begun.elapsed() < SENDING {
            if sent > begun.elapsed().as_secs_f64() * offered * 1e6 / 8.0 {
                std::thread::sleep(Duration::from_millis(2));
                continue;
            }
            // It waits where the queue is on this node; a full one elsewhere drops.
            let _dropped = sender.send_to(&[7; PAYLOAD], to);
            sent += PAYLOAD as f64;
        }
    });
    let (mut first, mut last, mut count) = (None, begun, 0_usize);
    let mut buffer = [0; 2048];
    while begun.elapsed() < LIMIT {
        match receiver.recv(&mut buffer) {
            Ok(_) => {
                last = Instant::now();
                count += usize::from(first.is_some());
                first.get_or_insert(last);
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                if begun.elapsed() > SENDING || first.is_some() {
                    break;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    sending.join().ok().context("the sender panicked")?;
    let first = first.with_context(|| format!("{}: no datagram got to {to}", from.name()))?;
    Ok((count * PAYLOAD) as f64 * 8.0 / (last - first).as_secs_f64() / 1e6)
}

fn near(what: &str, measured: f64, limit: f64) -> Result<()> {
    println!("{what}: {measured:.2} Mbit/s of {limit}");
    ensure!((limit * 0.7..=limit * 1.1).contains(&measured), "{what}: {measured:.2} Mbit/s, the limit is {limit}");
    Ok(())
}

struct Scene {
    cluster: Cluster,
    /// Receives 20M and sends 8M, on n1, and its addresses.
    slow: Place,
    slow_ips: Vec<IpAddr>,
    /// Without limits, on n1 and on n2, with their addresses.
    near: (Place, Vec<IpAddr>),
    far: (Place, Vec<IpAddr>),
    /// Those whom the policy denies, on n1 and on n2.
    strangers: [Place; 2],
    outside: Place,
    /// Addresses of n1 and n2.
    nodes: Vec<IpAddr>,
}

fn ips(cluster: &Cluster, pod: &str) -> Result<Vec<IpAddr>> {
    Ok(cluster.wait_pod(pod)?.ips)
}

impl Scene {
    fn up() -> Result<Self> {
        let cluster = Cluster::up("e2e-bandwidth", 2, Families::Dual)?;
        let pods = [
            asking(&shell("slow", "n1", "app: slow"), &format!("{INGRESS}: 20M, {EGRESS}: 8M")),
            shell("near", "n1", "app: friend"),
            shell("far", "n2", "app: friend"),
            shell("stranger", "n1", "app: stranger"),
            shell("foe", "n2", "app: stranger"),
        ];
        cluster.apply_text(SERVICE)?;
        cluster.apply_text(&pods.concat())?;
        let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
        let slow = place("slow")?;
        let (near, far, strangers) = (place("near")?, place("far")?, [place("stranger")?, place("foe")?]);
        let nodes = cluster.nodes()?.iter().map(|(_, ip)| address(ip)).collect::<Result<_>>()?;
        Ok(Self {
            slow,
            slow_ips: ips(&cluster, "slow")?,
            near: (near, ips(&cluster, "near")?),
            far: (far, ips(&cluster, "far")?),
            strangers,
            outside: Place::of_node(&cluster, "outside")?,
            nodes,
            cluster,
        })
    }

    fn slow_at(&self) -> Result<SocketAddr> {
        Ok((*self.slow_ips.first().context("no address")?, PORT).into())
    }

    /// What `towpath status` says of limits on n1 comes to be this.
    fn comes_to_say(&self, limits: &str) -> Result<()> {
        wait("status to tell the limits", SOON, || {
            let status = status_text(&self.cluster)?;
            let line = status.lines().find(|line| line.contains("limited bandwidth")).unwrap_or_default();
            ensure!(line.strip_prefix("n1: limited bandwidth: ").unwrap_or(line) == limits, "{status}");
            Ok(())
        })
    }

    /// Waits for an Event on a pod with this reason that says all of these; none other counts.
    fn comes_to_tell(&self, pod: &str, reason: &str, words: &[&str]) -> Result<()> {
        wait("an Event", Duration::from_secs(30), || {
            let events = self.cluster.list("events", "")?;
            let about = |event: &Value| {
                let at = |path: &str| event.pointer(path).and_then(Value::as_str).unwrap_or_default().to_owned();
                let said = at("/note") + &at("/message");
                at("/regarding/name") + &at("/involvedObject/name") == pod
                    && at("/reason") == reason
                    && words.iter().all(|word| said.contains(word))
            };
            ensure!(events.iter().any(about), "{events:?}");
            Ok(())
        })
    }
}

#[test]
fn a_pod_receives_and_sends_what_its_annotations_allow_and_policy_still_holds() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = Scene::up()?;
    scene.comes_to_say("default/slow (receives 20M, sends 8M)")?;
    limits_hold_between_pods(&scene)?;
    limits_hold_for_clients_outside(&scene)?;
    others_are_not_slowed(&scene)?;
    hold_by_every_backend(&scene)?;
    policy_holds(&scene)?;
    outlives_the_agent(&scene)?;
    changes_live(&scene)?;
    nonsense_is_refused(&scene)?;
    leaves_with_the_pod(&scene)?;
    let Scene { cluster, .. } = scene;
    cluster.down()
}

fn limits_hold_between_pods(scene: &Scene) -> Result<()> {
    for (who, (other, others)) in [("a pod of its node", &scene.near), ("one of another node", &scene.far)] {
        for (ip, back) in scene.slow_ips.iter().zip(others) {
            let (to, back): (SocketAddr, SocketAddr) = ((*ip, PORT).into(), (*back, PORT).into());
            near(&format!("TCP to it from {who}, {to}"), tcp(other, to, &scene.slow, Way::Up, 2_000_000)?, 20.0)?;
            near(&format!("TCP from it to {who}, {back}"), tcp(&scene.slow, back, other, Way::Up, 1_000_000)?, 8.0)?;
            near(&format!("its answers to {who}, {to}"), tcp(other, to, &scene.slow, Way::Down, 1_000_000)?, 8.0)?;
            near(&format!("UDP to it from {who}, {to}"), udp(other, to, &scene.slow, 50.0)?, 20.0)?;
            near(&format!("UDP from it to {who}, {back}"), udp(&scene.slow, back, other, 30.0)?, 8.0)?;
        }
    }
    // By the node's own stack.
    let node = Place::of_node(&scene.cluster, "n1")?;
    near("TCP to it from its node itself", tcp(&node, scene.slow_at()?, &scene.slow, Way::Up, 2_000_000)?, 20.0)
}

fn limits_hold_for_clients_outside(scene: &Scene) -> Result<()> {
    let (outside, slow) = (&scene.outside, &scene.slow);
    for node in &scene.nodes {
        let to: SocketAddr = (*node, NODE_PORT).into();
        wait("the NodePort to answer", SOON, || connected(outside, to, slow).map(drop))?;
        near(&format!("TCP to it by {to}"), tcp(outside, to, slow, Way::Up, 2_000_000)?, 20.0)?;
        near(&format!("TCP from it by {to}"), tcp(outside, to, slow, Way::Down, 1_000_000)?, 8.0)?;
        near(&format!("UDP to it by {to}"), udp(outside, to, slow, 50.0)?, 20.0)?;
    }
    Ok(())
}

fn others_are_not_slowed(scene: &Scene) -> Result<()> {
    let ((place, ips), (far, far_ips)) = (&scene.near, &scene.far);
    for (what, client, ip, server) in [("to", far, ips, place), ("from", place, far_ips, far)] {
        let to: SocketAddr = (*ip.first().context("no address")?, PORT).into();
        let speed = tcp(client, to, server, Way::Up, 20_000_000)?;
        println!("{what} a pod without limits on the same node: {speed:.0} Mbit/s");
        ensure!(speed > FREE, "{what} a pod without limits: {speed:.1} Mbit/s");
    }
    Ok(())
}

/// Packets of another node come by other ways, pods' MTU becomes another, and agents begin anew.
fn hold_by_every_backend(scene: &Scene) -> Result<()> {
    let (far, far_ips) = &scene.far;
    for backend in ["host-gw", "ipip", "udp", "macvlan", "vxlan"] {
        scene.cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        wait(&format!("nodes to send by {backend}"), SOON, || {
            let status = status_text(&scene.cluster)?;
            ensure!(status.matches(&format!(" ({backend}): ")).count() == 2, "{status}");
            Ok(())
        })?;
        for (ip, back) in scene.slow_ips.iter().zip(far_ips) {
            let (to, back): (SocketAddr, SocketAddr) = ((*ip, PORT).into(), (*back, PORT).into());
            near(&format!("by {backend}, TCP to it, {to}"), tcp(far, to, &scene.slow, Way::Up, 2_000_000)?, 20.0)?;
            near(&format!("by {backend}, TCP from it, {back}"), tcp(&scene.slow, back, far, Way::Up, 1_000_000)?, 8.0)?;
        }
    }
    Ok(())
}

/// Whether a datagram gets through, sent with the mark of what was judged: by the one who may write it, in the namespace that he has.
fn gets_through(from: &Place, to: SocketAddr, at: &Place) -> Result<bool> {
    let receiver = at.enter(|| Ok(UdpSocket::bind((any(to), PORT))?))?;
    receiver.set_read_timeout(Some(Duration::from_millis(700)))?;
    let sender = from.enter(|| Ok(UdpSocket::bind((any(to), 0))?))?;
    nix::sys::socket::setsockopt(&sender, nix::sys::socket::sockopt::Mark, &MARK)?;
    sender.send_to(b"marked", to)?;
    Ok(receiver.recv(&mut [0; 64]).is_ok())
}

fn policy_holds(scene: &Scene) -> Result<()> {
    let (slow, to) = (&scene.slow, scene.slow_at()?);
    let port: SocketAddr = (*scene.nodes.first().context("no node")?, NODE_PORT).into();
    let [here, there] = &scene.strangers;
    let mut open = [connected(here, to, slow)?, connected(there, to, slow)?];
    for place in [here, there] {
        ensure!(gets_through(place, to, slow)?, "{}: no policy yet", place.name());
    }
    let log = Log::new(Voice::Plain);
    scene.cluster.apply_text(GUARD)?;
    let refused = |place: &Place, to: SocketAddr| {
        place.enter(|| Ok(TcpStream::connect_timeout(&to, Duration::from_millis(700)).is_err()))
    };
    // So that who gets through is answered.
    let listener = slow.enter(|| Ok(TcpListener::bind((any(to), PORT))?))?;
    wait("the policy", SOON, || {
        ensure!(refused(here, to)? && refused(there, to)?, "a stranger still connects");
        Ok(())
    })?;
    for (place, to) in [(here, to), (there, to), (&scene.outside, port)] {
        ensure!(refused(place, to)?, "{} connects to {to}", place.name());
    }
    for place in [&scene.near.0, &scene.far.0] {
        ensure!(!refused(place, to)?, "{} may connect", place.name());
    }
    drop(listener);
    let far_node = Place::of_node(&scene.cluster, "n2")?;
    for (place, to) in [(here, to), (there, to), (&far_node, to), (&scene.outside, port)] {
        for _ in 0..3 {
            ensure!(!gets_through(place, to, slow)?, "{} gets through with a mark", place.name());
        }
    }
    ensure!(gets_through(&scene.near.0, to, slow)?, "who may, may with a mark too");
    // What was open carries nothing in either direction any more.
    for (asks, answers) in &mut open {
        asks.write_all(b"question")?;
        answers.write_all(b"answer")?;
        for (stream, what) in [(answers, "a question"), (asks, "an answer")] {
            stream.set_read_timeout(Some(Duration::from_millis(700)))?;
            ensure!(stream.read(&mut [0; 64]).is_err(), "{what} got through an open connection that is denied");
        }
    }
    near("TCP to it from who may", tcp(&scene.near.0, to, slow, Way::Up, 2_000_000)?, 20.0)?;
    scene.cluster.kubectl(&log, &["delete", "networkpolicy", "guard"])?;
    for (asks, answers) in &mut open {
        for (stream, said) in [(answers, "question"), (asks, "answer")] {
            stream.set_read_timeout(Some(SOON))?;
            let mut heard = vec![0; said.len()];
            stream.read_exact(&mut heard).context("an open connection goes on when it may again")?;
            ensure!(heard == said.as_bytes(), "{heard:?}");
        }
    }
    Ok(())
}

fn outlives_the_agent(scene: &Scene) -> Result<()> {
    let lab = scene.cluster.name();
    let (slow, to) = (&scene.slow, scene.slow_at()?);
    let pid = machine::lab_agent(lab, "n1")?;
    machine::kill(pid)?;
    near("TCP to it while there is no agent", tcp(&scene.far.0, to, slow, Way::Up, 2_000_000)?, 20.0)?;
    machine::another_agent(lab, "n1", pid)?;
    scene.comes_to_say("default/slow (receives 20M, sends 8M)")?;
    near("TCP to it with another agent", tcp(&scene.far.0, to, slow, Way::Up, 2_000_000)?, 20.0)?;
    near("TCP from it with another agent", tcp(&scene.far.0, to, slow, Way::Down, 1_000_000)?, 8.0)
}

fn changes_live(scene: &Scene) -> Result<()> {
    let (slow, to) = (&scene.slow, scene.slow_at()?);
    // Open all the while.
    let (mut asks, mut answers) = connected(&scene.far.0, to, slow)?;
    annotate_pod(&scene.cluster, "slow", INGRESS, Some("40M"))?;
    annotate_pod(&scene.cluster, "slow", EGRESS, Some("16M"))?;
    scene.comes_to_say("default/slow (receives 40M, sends 16M)")?;
    near("TCP to it with a limit that was raised", tcp(&scene.near.0, to, slow, Way::Up, 4_000_000)?, 40.0)?;
    near("TCP from it with a limit that was raised", tcp(&scene.far.0, to, slow, Way::Down, 2_000_000)?, 16.0)?;

    annotate_pod(&scene.cluster, "slow", INGRESS, Some("fast"))?;
    scene.comes_to_tell("slow", "FieldNotUnderstood", &[INGRESS, "\"fast\"", "from 1k to 1P", "stays"])?;
    let status = status_text(&scene.cluster)?;
    ensure!(status.contains("Pod default/slow: annotation kubernetes.io/ingress-bandwidth: \"fast\""), "{status}");
    scene.comes_to_say("default/slow (receives 40M, sends 16M)")?;
    near("TCP to it with nonsense", tcp(&scene.near.0, to, slow, Way::Up, 4_000_000)?, 40.0)?;

    // Another device begins to have a limit, and loses it again.
    let (other, ips) = &scene.near;
    let there: SocketAddr = (*ips.first().context("no address")?, PORT).into();
    annotate_pod(&scene.cluster, "near", INGRESS, Some("10M"))?;
    scene.comes_to_say("default/near (receives 10M), default/slow (receives 40M, sends 16M)")?;
    near("TCP to a pod whose limit came", tcp(&scene.far.0, there, other, Way::Up, 1_000_000)?, 10.0)?;
    annotate_pod(&scene.cluster, "near", INGRESS, None)?;
    annotate_pod(&scene.cluster, "slow", INGRESS, None)?;
    scene.comes_to_say("default/slow (sends 16M)")?;
    for (what, to, server) in [("slow", to, slow), ("near", there, other)] {
        let speed = tcp(&scene.far.0, to, server, Way::Up, 20_000_000)?;
        ensure!(speed > FREE, "{what} has no limit any more: {speed:.1} Mbit/s");
    }
    annotate_pod(&scene.cluster, "slow", EGRESS, None)?;
    scene.comes_to_say("")?;
    let speed = tcp(&scene.far.0, to, slow, Way::Down, 20_000_000)?;
    ensure!(speed > FREE, "nor of what it sends: {speed:.1} Mbit/s");
    let queues = scene.cluster.node("n1", "tc qdisc show")?;
    ensure!(queues.ok && !queues.out.contains("7470:"), "{}", queues.all());

    asks.write_all(b"still?")?;
    let mut heard = [0; 6];
    answers.read_exact(&mut heard).context("over the connection from before all that")?;
    ensure!(&heard == b"still?", "{heard:?}");
    Ok(())
}

fn nonsense_is_refused(scene: &Scene) -> Result<()> {
    let wrong = asking(&shell("wrong", "n1", ""), &format!("{EGRESS}: 10Mbit"));
    scene.cluster.apply_text(&wrong)?;
    let words = ["pod default/wrong", EGRESS, "\"10Mbit\"", "from 1k to 1P"];
    scene.comes_to_tell("wrong", "FailedCreatePodSandBox", &words)?;
    annotate_pod(&scene.cluster, "wrong", EGRESS, Some("10M"))?;
    wait("the pod, asking for something that there is", Duration::from_secs(60), || {
        scene.cluster.wait_pod("wrong").map(drop)
    })?;
    scene.comes_to_say("default/wrong (sends 10M)")
}

fn leaves_with_the_pod(scene: &Scene) -> Result<()> {
    annotate_pod(&scene.cluster, "slow", INGRESS, Some("20M"))?;
    scene.comes_to_say("default/slow (receives 20M), default/wrong (sends 10M)")?;
    let queues = scene.cluster.node("n1", "tc qdisc show")?;
    ensure!(queues.out.contains("tbf 7470:"), "{}", queues.all());
    let log = Log::new(Voice::Plain);
    scene.cluster.kubectl(&log, &["delete", "pod", "slow", "wrong"])?;
    scene.comes_to_say("")?;
    wait("its device to go", SOON, || {
        let queues = scene.cluster.node("n1", "tc qdisc show")?;
        ensure!(queues.ok && !queues.out.contains("7470:"), "{}", queues.all());
        Ok(())
    })
}
