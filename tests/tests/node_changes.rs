//! Nodes that come, go, come back as another, say that they are somebody else, or get another network card: after five seconds nothing of
//! what was is left on the others, and who is there notices nothing.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::{all_send_by, network_config, status_text};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::traffic::{Clock, Flow, Receiver, Sender};

/// How soon nothing is left.
const SOON: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);

/// A machine that nobody has built: its Node object only.
fn node(name: &str, ip: &str, range: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDR: {range}, podCIDRs: [{range}]}}\nstatus:\n  \
         addresses: [{{type: InternalIP, address: {ip}}}, {{type: Hostname, address: {name}}}]\n"
    )
}

/// What n1's kernel has of a range or an address: routes, and neighbours. Not those that it asked for on the link: whom it looked for in vain leads
/// nowhere, and who answered is forgotten by its own clock.
fn knows(cluster: &Cluster, what: &str) -> Result<String> {
    let said = cluster.node("n1", "ip route; ip -6 route; ip neigh; ip -6 neigh")?;
    ensure!(said.ok, "{}", said.all());
    let asked = |line: &&str| {
        [" FAILED", " INCOMPLETE", " REACHABLE", " STALE", " DELAY", " PROBE"].iter().any(|state| line.contains(state))
    };
    let known = said.out.lines().filter(|line| line.contains(what) && !asked(line));
    Ok(known.collect::<Vec<_>>().join("\n"))
}

fn has_not(cluster: &Cluster, what: &str) -> Result<()> {
    wait(&format!("nothing to be left of {what}"), SOON, || {
        let left = knows(cluster, what)?;
        if left.is_empty() { Ok(()) } else { bail!("{left}") }
    })
}

struct Scene {
    cluster: Cluster,
    near: Place,
    web: SocketAddr,
    /// First three numbers of the nodes' addresses.
    link: String,
}

impl Scene {
    fn log(&self) -> Log {
        Log::new(Voice::Plain)
    }

    fn remove(&self, node: &str) -> Result<()> {
        self.cluster.kubectl(&self.log(), &["delete", "node", node]).map(drop)
    }

    fn has(&self, range: &str, by: &str, limit: Duration) -> Result<()> {
        wait(&format!("a route to {range} by {by}"), limit, || {
            let routes = knows(&self.cluster, range)?;
            if routes.contains(by) { Ok(()) } else { bail!("{routes:?}") }
        })
    }

    fn has_not(&self, what: &str) -> Result<()> {
        has_not(&self.cluster, what)
    }

    fn is_refused(&self, words: &[&str]) -> Result<()> {
        wait(&format!("towpath status to say {words:?}"), PATIENCE, || {
            let said = status_text(&self.cluster)?;
            if words.iter().all(|word| said.contains(word)) { Ok(()) } else { bail!("{said}") }
        })
    }

    /// One that comes, and comes back as another while n1's agent hears nothing of it.
    fn comes_and_comes_back(&self) -> Result<()> {
        let (first, second) = (format!("{}.99", self.link), format!("{}.98", self.link));
        self.cluster.apply_text(&node("n9", &first, "10.244.99.0/24"))?;
        self.has("10.244.99.0/24", &first, PATIENCE)?;
        let dead = machine::lab_agent(self.cluster.name(), "n1")?;
        let frozen = machine::freeze(dead)?;
        self.remove("n9")?;
        self.cluster.apply_text(&node("n9", &second, "10.244.97.0/24"))?;
        machine::kill(dead)?;
        drop(frozen);
        machine::another_agent(self.cluster.name(), "n1", dead)?;
        self.has("10.244.97.0/24", &second, PATIENCE)?;
        self.has_not("10.244.99.0/24")?;
        self.has_not(&first)?;
        // And while everybody listens.
        self.remove("n9")?;
        self.has_not("10.244.97.0/24")?;
        self.has_not(&second)?;
        self.cluster.apply_text(&node("n9", &first, "10.244.99.0/24"))?;
        self.has("10.244.99.0/24", &first, SOON)?;
        let patch = format!(r#"{{"status":{{"addresses":[{{"type":"InternalIP","address":"{second}"}}]}}}}"#);
        let arguments = ["patch", "node", "n9", "--subresource=status", "--type=merge", "-p", &patch];
        self.cluster.kubectl(&self.log(), &arguments)?;
        self.has("10.244.99.0/24", &second, SOON)?;
        self.has_not(&first)?;
        self.remove("n9")?;
        self.has_not("10.244.99.0/24")
    }

    /// Those that say they are n2, or have its pods, or n1's.
    fn says_it_is_another(&self) -> Result<()> {
        let (n1, n2) = (self.cluster.node_ip("n1")?, self.cluster.node_ip("n2")?);
        let fresh = format!("{}.97", self.link);
        let range = |node: &str| -> Result<String> { Ok(field(&self.cluster.get("node", node)?, "/spec/podCIDR")) };
        let (range1, range2) = (range("n1")?, range("n2")?);
        // Its name comes before theirs.
        for (ip, range, words) in [
            (&n2, "10.244.96.0/24", format!("address {n2} already belongs to node n2")),
            (&n1, "10.244.96.0/24", format!("address {n1} already belongs to node n1")),
            (&fresh, range2.as_str(), format!("overlaps {range2} of node n2")),
            (&fresh, range1.as_str(), format!("overlaps {range1} of node n1")),
            (&fresh, "10.244.0.0/16", "overlaps".to_owned()),
        ] {
            self.cluster.apply_text(&node("a9", ip, range))?;
            self.is_refused(&["a9", &words])?;
            self.has(&range2, &n2, SOON)?;
            ensure!(knows(&self.cluster, "10.244.96.0/24")?.is_empty(), "a refused node is reached");
            self.remove("a9")?;
        }
        // The agent that starts while somebody says so decides as the others do.
        self.cluster.apply_text(&node("a9", &n2, "10.244.96.0/24"))?;
        let dead = machine::lab_agent(self.cluster.name(), "n1")?;
        machine::kill(dead)?;
        machine::another_agent(self.cluster.name(), "n1", dead)?;
        self.is_refused(&["a9", &format!("address {n2} already belongs to node n2")])?;
        self.has(&range2, &n2, SOON)?;
        self.remove("a9")
    }
}

#[test]
fn nodes_come_back_as_others_or_say_that_they_are_and_nobody_notices() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-nodes", 2, Families::Ipv4)?;
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("near", "n1", "")))?;
    let web = SocketAddr::new(address(&cluster.wait_pod("web")?.ip)?, 80);
    let near = Place::of_pod(&cluster, &cluster.wait_pod("near")?)?;
    let n2 = cluster.node_ip("n2")?;
    let link = n2.rsplit_once('.').map(|(link, _)| link.to_owned()).unwrap_or_default();
    let scene = Scene { cluster, near, web, link };
    let kept = Load::sessions(&scene.near, &[scene.web], 5)?;
    let load = Load::default();
    let done = std::thread::scope(|scope| {
        let (load, scene) = (&load, &scene);
        scope.spawn(|| load.keep("while nodes come and go", kept, Duration::from_millis(200)));
        let opener = scope.spawn(move || {
            scene.near.enter(|| {
                load.open("a pod", &[scene.web], 20);
                Ok(())
            })
        });
        let done = scene.comes_and_comes_back().and_then(|()| scene.says_it_is_another());
        load.ends();
        opener.join().map_err(|_| anyhow!("a thread panicked"))??;
        done
    });
    let judged = load.judge(100, 100);
    done.and(judged)?;
    scene.cluster.down()
}

#[test]
fn a_node_with_another_mac_address_is_reached_again_within_five_seconds() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-mac", 2, Families::Dual)?;
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("near", "n1", "")))?;
    let ips = cluster.wait_pod("web")?.ips;
    ensure!(ips.len() == 2, "both families: {ips:?}");
    let near = Place::of_pod(&cluster, &cluster.wait_pod("near")?)?;
    for backend in ["vxlan", "host-gw", "ipip"] {
        cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        all_send_by(&cluster, backend)?;
        let mut sessions = Vec::new();
        for ip in &ips {
            let to = SocketAddr::new(*ip, 80);
            sessions.push(near.enter(|| {
                let mut session = Session::open(to, ANSWER)?;
                session.ask(ANSWER)?;
                Ok(session)
            })?);
        }
        let mac = format!("02:00:00:00:{:02x}:01", backend.len());
        let said = cluster.node("n2", &format!("ip link set dev eth0 address {mac}"))?;
        ensure!(said.ok, "{}", said.all());
        for mut session in sessions {
            near.enter(|| session.ask(ANSWER))?;
        }
    }
    cluster.down()
}

/// What a machine that joins finds and leaves behind.
struct Machines {
    cluster: Cluster,
    near: Arc<Place>,
    web: Arc<Place>,
    /// Of the pod `web`.
    ips: Vec<IpAddr>,
}

impl Machines {
    /// A machine joins right after the change to a backend was asked for: soon all send by it, and its pods reach and are reached.
    fn joins(&self, backend: &str) -> Result<()> {
        self.cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        self.cluster.add_node()?;
        self.cluster.apply_text(&server("far", "n3", "app: far"))?;
        let pod = self.cluster.wait_pod("far")?;
        let far = Place::of_pod(&self.cluster, &pod)?;
        // At once: while some may still send as before.
        for (from, to) in [(self.near.as_ref(), &pod.ips), (self.web.as_ref(), &pod.ips), (&far, &self.ips)] {
            ensure!(to.len() == 2, "both families: {to:?}");
            let to: Vec<SocketAddr> = to.iter().map(|ip| SocketAddr::new(*ip, 80)).collect();
            Load::sessions(from, &to, 2).with_context(|| format!("from {} to {to:?}, by {backend}", from.name()))?;
        }
        all_send_by(&self.cluster, backend)
    }

    /// It is switched off right after the change to another was asked for: nothing is left of it.
    fn leaves(&self, backend: &str) -> Result<()> {
        let node = self.cluster.get("node", "n3")?;
        let list = |path: &str, of: &str| -> Vec<String> {
            let all = node.pointer(path).and_then(Value::as_array).into_iter().flatten();
            all.map(|one| if of.is_empty() { one.as_str().unwrap_or_default().to_owned() } else { field(one, of) })
                .collect()
        };
        let (addresses, ranges) = (list("/status/addresses", "/address"), list("/spec/podCIDRs", ""));
        ensure!(addresses.len() == 3 && ranges.len() == 2, "{addresses:?} {ranges:?}");
        self.cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        self.cluster.delete_node("n3")?;
        for of_it in addresses.iter().filter(|address| *address != "n3").chain(&ranges) {
            has_not(&self.cluster, of_it)?;
        }
        ensure!(self.cluster.get("pod", "far").is_err(), "its pod is still there");
        all_send_by(&self.cluster, backend)
    }
}

#[test]
fn machines_join_and_leave_in_the_middle_of_changes_of_the_backend_and_nobody_notices() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-machines", 2, Families::Dual)?;
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("near", "n1", "")))?;
    let pod = cluster.wait_pod("web")?;
    let web = Arc::new(Place::of_pod(&cluster, &pod)?);
    let near = Arc::new(Place::of_pod(&cluster, &cluster.wait_pod("near")?)?);
    let machines = Machines { cluster, near, web, ips: pod.ips };
    let to: Vec<SocketAddr> = machines.ips.iter().map(|ip| SocketAddr::new(*ip, 80)).collect();
    let kept = Load::sessions(&machines.near, &to, 6)?;
    let clock = Clock::default();
    let heard: Vec<Receiver> = to
        .iter()
        .map(|to| Receiver::at(&machines.web, SocketAddr::new(to.ip(), 5300), clock))
        .collect::<Result<_>>()?;
    let flow = |(number, to): (u32, &SocketAddr)| Flow {
        number,
        to: SocketAddr::new(to.ip(), 5300),
        fresh: false,
        every: 1,
        size: 1200,
    };
    let sender =
        Sender::start(machines.near.clone(), 1, (0..).zip(&to).map(flow).collect(), Duration::from_millis(2), clock);
    let load = Load::default();
    let done = std::thread::scope(|scope| {
        let (load, machines, to) = (&load, &machines, &to);
        scope.spawn(|| load.keep("while machines come and go", kept, Duration::from_millis(200)));
        let opener = scope.spawn(move || {
            machines.near.enter(|| {
                load.open("a pod", to, 20);
                Ok(())
            })
        });
        let done = (|| {
            machines.joins("host-gw")?;
            machines.leaves("udp")?;
            // As another machine: of its name and its addresses, and not of its MAC address.
            machines.joins("ipip")?;
            machines.leaves("vxlan")?;
            machines.joins("vxlan")
        })();
        load.ends();
        opener.join().map_err(|_| anyhow!("a thread panicked"))??;
        done
    });
    let sent = sender.end()?.len();
    std::thread::sleep(Duration::from_millis(300));
    let heard = heard.into_iter().map(Receiver::end).collect::<Result<Vec<_>>>()?.concat().len();
    let judged = load.judge(100, 100);
    done.and(judged)?;
    ensure!(sent == heard && sent > 1000, "{heard} of {sent} datagrams arrived");
    machines.cluster.down()
}
