//! `domainNames` with real DNS and real packets: the first packet after an answer passes, whatever a hostile server says opens nothing of the cluster,
//! and what was learned survives its agent.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

/// The host outside that serves DNS for `example.test`, and all else.
const OUTSIDE: &str = "192.168.26.10";
/// What it listens on at all of its addresses.
const PORT: u16 = 8080;
/// Fresh names that are asked for one after the other.
const FRESH: u8 = 40;
/// Less than what TCP waits before it sends the first packet again: a connection that takes less lost none.
const FIRST_PACKET: Duration = Duration::from_millis(900);

fn host(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 26, last)
}

/// Only DNS, and what the names stand for.
const POLICY: &str = r#"---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: names-only}
spec:
  tier: Admin
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: client}}}}
  egress:
    - name: dns
      action: Accept
      to: [{pods: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: kube-system}}, podSelector: {matchLabels: {k8s-app: kube-dns}}}}]
      protocols: [{udp: {destinationPort: {number: 53}}}, {tcp: {destinationPort: {number: 53}}}]
    - name: names
      action: Accept
      to: [{domainNames: ["api.example.test", "*.wild.example.test"]}]
      protocols: [{tcp: {destinationPort: {number: 8080}}}]
    - name: rest
      action: Deny
      to: [{networks: ["0.0.0.0/0", "::/0"]}]
"#;

/// The towpath's own DNS asks the host outside for `example.test`.
fn stub_domain() -> String {
    serde_json::json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-dns", "namespace": "kube-system"},
        "data": {"stubDomains": format!("{{\"example.test\": [\"{OUTSIDE}\"]}}")},
    })
    .to_string()
}

/// What a name is answered with.
#[derive(Clone, Debug)]
struct Record {
    alias: Option<&'static str>,
    addresses: Vec<Ipv4Addr>,
    ttl: u32,
}

/// A world outside: DNS, and a web server at every address.
#[derive(Default)]
struct World {
    over: AtomicBool,
    names: Mutex<BTreeMap<String, Record>>,
}

impl World {
    fn say(&self, name: &str, addresses: &[Ipv4Addr], ttl: u32) {
        let record = Record { alias: None, addresses: addresses.to_vec(), ttl };
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), record);
    }

    fn say_alias(&self, name: &str, alias: &'static str, address: Ipv4Addr) {
        let record = Record { alias: Some(alias), addresses: vec![address], ttl: 300 };
        self.names.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), record);
    }

    fn goes_on(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
    }

    fn answer(&self, query: &[u8]) -> Option<Vec<u8>> {
        let (name, end) = name_at(query)?;
        let known = self.names.lock().unwrap_or_else(PoisonError::into_inner).get(&name.to_ascii_lowercase()).cloned();
        let wants_v4 = query.get(end..end + 2)? == [0, 1];
        let mut reply = query.get(..end + 4)?.to_vec();
        let code = if known.is_some() { 0 } else { 3 };
        let mut records = Vec::new();
        if let Some(record) = known.filter(|_| wants_v4) {
            let mut owner = vec![0xc0, 12];
            if let Some(alias) = record.alias {
                let target = wire(alias);
                records.push(resource(&owner, 5, record.ttl, &target));
                owner = target;
            }
            records.extend(record.addresses.iter().map(|ip| resource(&owner, 1, record.ttl, &ip.octets())));
        }
        let count = u8::try_from(records.len()).ok()?;
        for (at, value) in [(2, 0x85), (3, 0x80 | code), (7, count), (9, 0), (11, 0)] {
            *reply.get_mut(at)? = value;
        }
        reply.extend(records.concat());
        Some(reply)
    }

    fn serve_dns(&self) -> Result<()> {
        let socket = UdpSocket::bind((OUTSIDE, 53))?;
        socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut buffer = [0u8; 1500];
        while self.goes_on() {
            let Ok((length, from)) = socket.recv_from(&mut buffer) else { continue };
            if let Some(reply) = self.answer(buffer.get(..length).unwrap_or_default()) {
                socket.send_to(&reply, from)?;
            }
        }
        Ok(())
    }

    /// Answers HTTP on connections that stay open.
    fn serve_web(&self) -> Result<()> {
        let listener = TcpListener::bind(("0.0.0.0", PORT))?;
        listener.set_nonblocking(true)?;
        std::thread::scope(|scope| {
            while self.goes_on() {
                match listener.accept() {
                    Ok((stream, _)) => drop(scope.spawn(move || self.talk(stream))),
                    Err(_) => std::thread::sleep(Duration::from_millis(2)),
                }
            }
        });
        Ok(())
    }

    fn talk(&self, mut stream: TcpStream) -> Result<()> {
        stream.set_nonblocking(false)?;
        stream.set_read_timeout(Some(Duration::from_millis(100)))?;
        let mut buffer = [0u8; 1024];
        while self.goes_on() {
            match stream.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(_) => stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 7\r\n\r\noutside")?,
                Err(error) if matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut) => {
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }
}

fn wire(name: &str) -> Vec<u8> {
    let labels = name.split('.').flat_map(|label| std::iter::once(label.len() as u8).chain(label.bytes()));
    labels.chain([0]).collect()
}

fn resource(owner: &[u8], kind: u8, ttl: u32, data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap_or_default();
    [owner, &[0, kind, 0, 1], &ttl.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

/// The name asked for, and where it ends.
fn name_at(query: &[u8]) -> Option<(String, usize)> {
    let (mut at, mut labels) = (12, Vec::new());
    loop {
        let length = usize::from(*query.get(at)?);
        if length == 0 {
            return Some((labels.join("."), at + 1));
        }
        labels.push(String::from_utf8_lossy(query.get(at + 1..at + 1 + length)?).into_owned());
        at += 1 + length;
    }
}

/// Asks for a name's address; how long the answer took.
fn ask(socket: &UdpSocket, server: SocketAddr, name: &str, id: u16) -> Result<Duration> {
    let question = [&id.to_be_bytes()[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0], &wire(name), &[0, 1, 0, 1]].concat();
    let begun = Instant::now();
    socket.send_to(&question, server)?;
    let mut buffer = [0u8; 1500];
    loop {
        let (length, _) = socket.recv_from(&mut buffer).with_context(|| format!("{name} is not answered"))?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answer.get(..2) == Some(id.to_be_bytes().as_slice()) {
            let counts = (answer.get(3).map(|byte| byte & 15), answer.get(7).copied());
            ensure!(matches!(counts, (Some(0), Some(1..))), "{name}: code and count {counts:?}");
            return Ok(begun.elapsed());
        }
    }
}

fn connects(to: SocketAddr, limit: Duration) -> bool {
    TcpStream::connect_timeout(&to, limit).is_ok()
}

struct Stage<'a> {
    cluster: &'a Cluster,
    world: &'a World,
    client: Place,
    other: Place,
    dns: SocketAddr,
}

impl Stage<'_> {
    fn socket(&self) -> Result<UdpSocket> {
        let socket = UdpSocket::bind("0.0.0.0:0")?;
        socket.set_read_timeout(Some(Duration::from_secs(5)))?;
        Ok(socket)
    }

    /// In the client's pod: asks for a name once.
    fn ask(&self, name: &str) -> Result<Duration> {
        self.client.enter(|| ask(&self.socket()?, self.dns, name, 7))
    }

    fn reaches(&self, place: &Place, last: u8) -> Result<bool> {
        place.enter(|| Ok(connects(SocketAddr::new(host(last).into(), PORT), FIRST_PACKET)))
    }

    /// What the node's agent says that it learned.
    fn learned(&self) -> Result<Value> {
        let out = std::process::Command::new(self.cluster.towpath())
            .args(["dns", "names", "--lab", self.cluster.name(), "-o", "json"])
            .output()?;
        let nodes: Value =
            serde_json::from_slice(&out.stdout).with_context(|| String::from_utf8_lossy(&out.stderr).into_owned())?;
        nodes.pointer("/0").cloned().context("no node answers")
    }

    fn names_asked(&self) -> Result<()> {
        wait("the agent to know the policy", Duration::from_secs(10), || {
            let asked = self.learned()?.pointer("/asked").and_then(Value::as_array).map_or(0, Vec::len);
            if asked == 2 { Ok(()) } else { bail!("{asked} names are asked for") }
        })?;
        // And carry, from the agent: a name that is told of says so.
        self.world.say("first.wild.example.test", &[host(20)], 300);
        wait("answers to be told", Duration::from_secs(10), || {
            self.ask("first.wild.example.test")?;
            let learned = self.learned()?.to_string();
            if learned.contains("first.wild") { Ok(()) } else { bail!("{learned}") }
        })
    }

    fn first_packets_pass(&self) -> Result<()> {
        for number in 0..FRESH {
            self.world.say(&format!("w{number}.wild.example.test"), &[host(60 + number)], 300);
            self.world.say(&format!("w{number}.else.example.test"), &[host(60 + number)], 300);
        }
        let (mut fresh, mut known, mut plain) = (Vec::new(), Vec::new(), Vec::new());
        self.client.enter(|| {
            let socket = self.socket()?;
            for number in 0..FRESH {
                let to = SocketAddr::new(host(60 + number).into(), PORT);
                // A name that no policy asks for leads there, too, and opens nothing.
                plain.push(ask(&socket, self.dns, &format!("w{number}.else.example.test"), u16::from(number))?);
                if number % 8 == 0 {
                    ensure!(!connects(to, Duration::from_millis(150)), "{to} is open before its name was asked for");
                }
                let name = format!("w{number}.wild.example.test");
                fresh.push(ask(&socket, self.dns, &name, 1000 + u16::from(number))?);
                // From another port than any before: a flow that nobody has judged.
                ensure!(connects(to, FIRST_PACKET), "the first packet to {to} after {name} was lost");
                known.push(ask(&socket, self.dns, &name, 2000 + u16::from(number))?);
            }
            Ok(())
        })?;
        for (what, times) in [("not asked for", &mut plain), ("fresh", &mut fresh), ("known", &mut known)] {
            times.sort_unstable();
            let at = |part: usize| times.get((times.len() - 1) * part / 100).copied().unwrap_or_default();
            println!("names {what}: answered in {:?} (p50), {:?} (p99)", at(50), at(99));
        }
        Ok(())
    }

    fn only_what_is_asked_for_opens(&self) -> Result<()> {
        self.world.say("api.example.test", &[host(30), host(31)], 300);
        self.world.say("wild.example.test", &[host(32)], 300);
        self.world.say("www.api.example.test", &[host(33)], 300);
        self.world.say_alias("alias.wild.example.test", "far.elsewhere.test", host(34));
        for name in ["api.example.test", "wild.example.test", "www.api.example.test", "alias.wild.example.test"] {
            self.ask(name)?;
        }
        for (last, open) in [(30, true), (31, true), (32, false), (33, false), (34, true)] {
            ensure!(self.reaches(&self.client, last)? == open, "{}: open should be {open}", host(last));
            ensure!(self.reaches(&self.other, last)?, "no policy is about the other pod");
        }
        let closed = SocketAddr::new(host(30).into(), PORT + 1);
        ensure!(!self.client.enter(|| Ok(connects(closed, FIRST_PACKET)))?, "the rule has one port");
        Ok(())
    }

    /// Whoever answers for the name says that it is what the policy must keep the pod from.
    fn hostile_answers_open_nothing(&self, web: &str) -> Result<()> {
        let node = self.cluster.nodes()?.into_iter().next().context("no node")?.1;
        let service = "10.96.0.1";
        let bad: Vec<Ipv4Addr> = [web, &node, service, "127.0.0.1", "169.254.169.254"]
            .iter()
            .map(|text| text.parse().with_context(|| (*text).to_owned()))
            .collect::<Result<_>>()?;
        let at_node = Place::of_node(self.cluster, "n1")?.enter(|| Ok(TcpListener::bind((node.as_str(), PORT))?))?;
        let web_port = SocketAddr::new(address(web)?, PORT);
        let at_web =
            Place::of_pod(self.cluster, &self.cluster.wait_pod("web")?)?.enter(|| Ok(TcpListener::bind(web_port)?))?;
        for listener in [&at_node, &at_web] {
            let to = listener.local_addr()?;
            ensure!(self.other.enter(|| Ok(connects(to, FIRST_PACKET)))?, "{to} listens");
        }
        self.world.say("evil.wild.example.test", &[bad.as_slice(), &[host(40)]].concat(), 300);
        self.ask("evil.wild.example.test")?;
        ensure!(self.reaches(&self.client, 40)?, "the one address outside is good");
        for listener in [&at_node, &at_web] {
            let to = listener.local_addr()?;
            ensure!(!self.client.enter(|| Ok(connects(to, FIRST_PACKET)))?, "an answer opened {to}");
        }
        let learned = self.learned()?;
        let refused = learned.pointer("/refused").and_then(Value::as_array).cloned().unwrap_or_default();
        ensure!(refused.len() == bad.len(), "refused: {refused:?}");
        Ok(())
    }

    fn explain_knows_the_name(&self) -> Result<()> {
        let explain = |to: u8| -> Result<String> {
            let said = std::process::Command::new(self.cluster.towpath())
                .args(["explain", "pod/client", &host(to).to_string(), &PORT.to_string()])
                .env("KUBECONFIG", self.cluster.kubeconfig())
                .output()?;
            Ok(String::from_utf8_lossy(&said.stdout).into_owned() + &String::from_utf8_lossy(&said.stderr))
        };
        let open = explain(30)?;
        let by_rule = "allowed: ClusterNetworkPolicy admin/names-only: spec.egress[1] \"names\" to[0] protocols[0]";
        ensure!(open.contains(by_rule) && open.contains("192.168.26.30 is api.example.test"), "{open}");
        let closed = explain(33)?;
        ensure!(closed.contains("spec.egress[2] \"rest\""), "{closed}");
        Ok(())
    }

    fn agent(&self) -> Result<i32> {
        let system = machine::lab_cgroup(self.cluster.name())?.join("nodes").join("n1").join("system");
        let is_agent = |pid: &i32| machine::command_line(*pid).get(1).is_some_and(|word| word == "agent");
        machine::processes_below(&system).into_iter().find(is_agent).context("no agent runs")
    }

    /// An agent dies: connections by name go on, DNS goes on, and what was answered meanwhile is open when an agent is back.
    fn an_agent_dies(&self) -> Result<()> {
        let to = SocketAddr::new(host(30).into(), PORT);
        let mut open = self.client.enter(|| Session::open(to, Duration::from_secs(2)))?;
        open.ask(Duration::from_secs(2))?;
        let before = self.agent()?;
        let stop = AtomicBool::new(false);
        self.world.say("away.wild.example.test", &[host(50)], 300);
        std::thread::scope(|scope| -> Result<()> {
            let traffic = scope.spawn(|| -> Result<u32> {
                let mut asked = 0;
                while !stop.load(Ordering::Relaxed) {
                    open.ask(Duration::from_secs(2)).with_context(|| format!("after {asked} requests"))?;
                    asked += 1;
                    std::thread::sleep(Duration::from_millis(5));
                }
                Ok(asked)
            });
            let outcome = (|| -> Result<()> {
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(before), nix::sys::signal::Signal::SIGKILL)?;
                let took = self.ask("away.wild.example.test")?;
                println!("with its agent dead, a fresh name is answered in {took:?}");
                wait("the agent to be back, with what was answered meanwhile", Duration::from_secs(20), || {
                    if self.reaches(&self.client, 50)? { Ok(()) } else { bail!("{} is closed", host(50)) }
                })?;
                ensure!(self.agent()? != before, "it was not killed");
                ensure!(self.reaches(&self.client, 31)?, "what was learned before is forgotten");
                Ok(())
            })();
            // What the new agent's first images leave behind them is gone only now.
            std::thread::sleep(Duration::from_millis(500));
            stop.store(true, Ordering::Relaxed);
            let asked = traffic.join().map_err(|_| anyhow!("panicked"))?;
            outcome?;
            println!("a connection by name answered {} requests over its agent's death", asked?);
            Ok(())
        })
    }
}

fn outside_is(cluster: &Cluster, work: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    let place = Place::of_node(cluster, "outside")?;
    let add: String = (20..=110).map(|last| format!("ip addr add {}/24 dev eth0; ", host(last))).collect();
    let added = cluster.outside(&add)?;
    ensure!(added.ok, "{}", added.all());
    let world = World::default();
    std::thread::scope(|scope| {
        let (place, world) = (&place, &world);
        let servers = [
            scope.spawn(move || place.enter(|| world.serve_dns())),
            scope.spawn(move || place.enter(|| world.serve_web())),
        ];
        let done = work(world);
        world.over.store(true, Ordering::Relaxed);
        for server in servers {
            server.join().map_err(|_| anyhow!("a server panicked"))??;
        }
        done
    })
}

#[test]
fn the_first_packet_after_an_answer_passes_and_nothing_else_does() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-names", 1, Families::Ipv4)?;
    let pods =
        [shell("client", "n1", "app: client"), shell("other", "n1", "app: other"), server("web", "n1", "app: web")];
    cluster.apply_text(&pods.concat())?;
    cluster.apply_text(&stub_domain())?;
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (client, other) = (place("client")?, place("other")?);
    let web = cluster.wait_pod("web")?.ip;
    let listed = cluster.try_kubectl(&["get", "svc", "kube-dns", "-n", "kube-system", "-o", "json"])?;
    let service: Value = serde_json::from_slice(&listed.stdout)?;
    let dns = SocketAddr::new(address(&field(&service, "/spec/clusterIP"))?, 53);
    outside_is(&cluster, |world| {
        let stage = Stage { cluster: &cluster, world, client, other, dns };
        world.say("early.wild.example.test", &[host(21)], 300);
        wait("the stub domain", Duration::from_secs(15), || stage.ask("early.wild.example.test").map(drop))?;
        ensure!(stage.reaches(&stage.client, 21)?, "nothing is closed yet");
        cluster.apply_text(POLICY)?;
        wait("the policy", Duration::from_secs(15), || {
            if stage.reaches(&stage.client, 22)? { bail!("{} is open", host(22)) } else { Ok(()) }
        })?;
        stage.names_asked()?;
        ensure!(stage.reaches(&stage.client, 21)?, "what was answered before the policy came counts");
        stage.first_packets_pass()?;
        stage.only_what_is_asked_for_opens()?;
        stage.hostile_answers_open_nothing(&web)?;
        stage.explain_knows_the_name()?;
        stage.an_agent_dies()?;
        let out = cluster.try_kubectl(&["delete", "clusternetworkpolicy", "names-only"])?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        wait("nothing to be asked for", Duration::from_secs(10), || {
            let left = stage.learned()?;
            let none = |field: &str| left.pointer(field).and_then(Value::as_array).is_none_or(Vec::is_empty);
            if none("/asked") && none("/names") { Ok(()) } else { bail!("{left}") }
        })
    })?;
    cluster.down()
}
