//! A node whose pod range is full gets another by an annotation while it runs, with real packets: a pod that waits for an address starts by itself, is
//! reached by every backend and from everywhere, and policies and Services hold for it, while open connections of the pods before go on. What is
//! another's is refused and said, and its owner unharmed. A range that is taken away stays until its last pod is gone, and is nobody else's until then.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, Pod, Said, field, host, wait};
use towpath_walkthrough::in_charge::{network_config, status_text};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::{another_agent, can_run_labs, kill, lab_agent};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::shell;

const SOON: Duration = Duration::from_secs(40);
/// How soon other nodes know of a range, and that it is gone.
const SECONDS: Duration = Duration::from_secs(10);
const RANGES: &str = "towpath.dev/pod-cidrs";
const ADDED: [&str; 2] = ["10.244.7.0/24", "fd00:10:244:7::/64"];
const PORT: u16 = 7098;

fn document(object: &Value) -> String {
    format!("---\n{object}\n")
}

/// A web server, of the Service of that name if it is to be; `addresses` it asks for.
fn server(name: &str, node: &str, app: &str, addresses: &str) -> String {
    let annotations = if addresses.is_empty() { json!({}) } else { json!({"towpath.dev/ip-addresses": addresses}) };
    document(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "labels": {"app": app}, "annotations": annotations},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "web", "image": "nginx", "ports": [{"containerPort": 80}]}],
        },
    }))
}

const SERVICE: &str = "---
apiVersion: v1
kind: Service
metadata: {name: added}
spec: {selector: {app: added}, ipFamilyPolicy: RequireDualStack, ports: [{port: 80}]}
";

const POLICY: &str = "---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: only-far}
spec:
  podSelector: {matchLabels: {app: added}}
  policyTypes: [Ingress]
  ingress: [{from: [{podSelector: {matchLabels: {app: far}}}]}]
";

fn listed(object: &Value, list: &str, name: &str) -> Vec<IpAddr> {
    let items = object.pointer(list).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(|item| item.get(name)?.as_str()?.parse().ok()).collect()
}

fn both(all: &[IpAddr]) -> Result<[IpAddr; 2]> {
    let first =
        |v4| all.iter().copied().find(|a| a.is_ipv4() == v4).with_context(|| format!("one of each family in {all:?}"));
    Ok([first(true)?, first(false)?])
}

struct Scene {
    cluster: Cluster,
}

impl Scene {
    fn pod(&self, name: &str) -> Result<(Place, [IpAddr; 2])> {
        wait(&format!("pod {name} ready"), SOON, || {
            let pod = Pod::from_json(&self.cluster.get("pod", name)?);
            ensure!(pod.ready, "{pod:?}; {:?}", self.events(name)?);
            Ok((Place::of_pod(&self.cluster, &pod)?, both(&pod.ips)?))
        })
    }

    fn events(&self, pod: &str) -> Result<Vec<String>> {
        let output = self.cluster.try_kubectl(&["get", "events", "-o", "json"])?;
        let list: Value = serde_json::from_slice(&output.stdout).context("no list of events")?;
        let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let of_pod = items.iter().filter(|event| field(event, "/involvedObject/name") == pod);
        Ok(of_pod.map(|event| field(event, "/message")).collect())
    }

    fn is_told(&self, pod: &str, words: &str) -> Result<()> {
        wait(&format!("pod {pod} to be told {words:?}"), SOON, || {
            let events = self.events(pod)?;
            ensure!(events.iter().any(|event| event.contains(words)), "{events:?}");
            Ok(())
        })
    }

    fn delete(&self, pods: &[&str]) -> Result<()> {
        let deleted = Said::from(self.cluster.try_kubectl(&[&["delete", "pod"], pods].concat())?);
        ensure!(deleted.ok, "{}", deleted.all());
        Ok(())
    }

    /// Has a node's annotation say these ranges; none: there is no annotation.
    fn annotate(&self, node: &str, ranges: &[&str]) -> Result<()> {
        let value = if ranges.is_empty() { Value::Null } else { json!(ranges.join(", ")) };
        let patch = json!({"metadata": {"annotations": {RANGES: value}}}).to_string();
        let said = Said::from(self.cluster.try_kubectl(&["patch", "node", node, "--type=merge", "-p", &patch])?);
        ensure!(said.ok, "{}", said.all());
        Ok(())
    }

    fn says(&self, words: &[&str]) -> Result<()> {
        wait(&format!("towpath status to say {words:?}"), SOON, || {
            let said = status_text(&self.cluster)?;
            ensure!(said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{said}");
            Ok(())
        })
    }

    fn says_not(&self, words: &[&str]) -> Result<()> {
        wait(&format!("towpath status not to say {words:?}"), SOON, || {
            let said = status_text(&self.cluster)?;
            ensure!(!said.lines().any(|line| words.iter().all(|word| line.contains(word))), "{said}");
            Ok(())
        })
    }

    /// How many addresses of a node's first range are left.
    fn room(&self, node: &str) -> Result<u64> {
        let mut command = Command::new(self.cluster.towpath());
        let out =
            command.args(["ipam", "check", "--lab", self.cluster.name(), "-o", "json", "--node", node]).output()?;
        let said: Value = serde_json::from_slice(&out.stdout).context("ipam check")?;
        ensure!(out.status.success(), "{said:#}");
        let number = |at: &str| said.pointer(&format!("/0/ranges/0/{at}")).and_then(Value::as_u64);
        number("size").zip(number("taken")).map(|(size, taken)| size - taken).with_context(|| format!("{said:#}"))
    }

    /// Whether a node routes a range to another.
    fn routes(&self, node: &str, range: &str, wanted: bool) -> Result<()> {
        wait(&format!("node {node} to route {range}: {wanted}"), SECONDS, || {
            let said = self.cluster.node(node, "ip route; ip -6 route")?;
            ensure!(said.ok && said.out.lines().any(|line| line.starts_with(range)) == wanted, "{}", said.all());
            Ok(())
        })
    }
}

/// Who answers at an address, and whom it sees.
fn asks(place: &Place, at: IpAddr) -> Result<String> {
    let script = format!("curl -sS -g -m 5 http://{}:80/", host(&at.to_string()));
    let said = place.enter(|| Ok(Said::from(Command::new("sh").args(["-c", &script]).output().context("sh")?)))?;
    ensure!(said.ok, "{} → {at}: {}", place.name(), said.all());
    Ok(said.out)
}

fn is_shut_out(place: &Place, at: IpAddr) -> Result<()> {
    let to = SocketAddr::new(at, 80);
    let open = place.enter(|| Ok(std::net::TcpStream::connect_timeout(&to, Duration::from_secs(1)).is_ok()))?;
    ensure!(!open, "{} → {at} is open", place.name());
    Ok(())
}

/// Whose address somebody outside sees.
fn seen_outside(cluster: &Cluster, pod: &Place) -> Result<[IpAddr; 2]> {
    let name = format!("tp-{}-outside", cluster.name());
    let said = Command::new("ip").args(["-n", &name, "-j", "address", "show", "scope", "global"]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&said.stdout).context("ip -j address")?;
    let all: Vec<IpAddr> = links.iter().flat_map(|link| listed(link, "/addr_info", "local")).collect();
    let outside = Place::of_netns("outside", &Path::new("/run/netns").join(&name))?;
    let mut seen = both(&all)?;
    for seen in &mut seen {
        let to = SocketAddr::new(*seen, PORT);
        let ear = outside.enter(|| {
            let ear = UdpSocket::bind(to)?;
            ear.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(ear)
        })?;
        pod.enter(|| {
            let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
            UdpSocket::bind((any, 0))?.send_to(b"who am I?", to).context("send")
        })?;
        *seen = ear.recv_from(&mut [0; 64]).with_context(|| format!("nothing came to {to}"))?.1.ip();
    }
    Ok(seen)
}

/// Pods of the scene, with their addresses.
struct Ends {
    far: (Place, [IpAddr; 2]),
    late: (Place, [IpAddr; 2]),
    chosen: (Place, [IpAddr; 2]),
    service: [IpAddr; 2],
}

impl Ends {
    /// Pods with addresses of the second ranges are reached from the other node, its pods, through a Service and by their own node, and reach them,
    /// under their own addresses.
    fn reach(&self, scene: &Scene) -> Result<()> {
        let (there, here) = (Place::of_node(&scene.cluster, "n2")?, Place::of_node(&scene.cluster, "n1")?);
        let (far, late, chosen) = (self.far.1, self.late.1, self.chosen.1);
        for ((far, service), (late, chosen)) in far.into_iter().zip(self.service).zip(late.into_iter().zip(chosen)) {
            for (pod, own) in [(&self.late.0, late), (&self.chosen.0, chosen)] {
                ensure!(asks(&self.far.0, own)?.contains(&far.to_string()), "{own} does not see who asks");
                ensure!(asks(pod, far)?.contains(&own.to_string()), "{far} does not see {own}");
                asks(&there, own)?;
                asks(&here, own)?;
            }
            asks(&self.far.0, service).context("the Service, from the other node")?;
            asks(&self.late.0, service).context("the Service, from its own pod")?;
            asks(&self.late.0, chosen).context("its neighbour")?;
        }
        Ok(())
    }

    /// The policy holds, and nothing is left of it when it is gone.
    fn are_judged(&self, scene: &Scene, near: &Place) -> Result<()> {
        let all = || [&self.late, &self.chosen].into_iter().flat_map(|(_, ips)| *ips);
        all().try_for_each(|ip| asks(near, ip).map(drop))?;
        scene.cluster.apply_text(POLICY)?;
        wait("the policy to hold", SOON, || all().try_for_each(|ip| is_shut_out(near, ip)))?;
        all().try_for_each(|ip| asks(&self.far.0, ip).map(drop)).context("whom the policy lets in")?;
        let gone = Said::from(scene.cluster.try_kubectl(&["delete", "networkpolicy", "only-far"])?);
        ensure!(gone.ok, "{}", gone.all());
        wait("the policy to be gone", SOON, || all().try_for_each(|ip| asks(near, ip).map(drop)))
    }
}

/// From the full range to the end of the second.
fn story(scene: &Scene) -> Result<()> {
    let cluster = &scene.cluster;
    // Whoever needs an address now gets none, and is told so.
    cluster.apply_text(&server("late", "n1", "added", ""))?;
    scene.is_told("late", "no free address in 10.244.0.0/29: 5 of 5 are taken")?;

    // Until the node has another range.
    scene.annotate("n1", &[ADDED[0], "nonsense", ADDED[1]])?;
    let late = scene.pod("late")?;
    let texts = late.1.map(|ip| ip.to_string());
    ensure!(texts[0].starts_with("10.244.7.") && texts[1].starts_with("fd00:10:244::"), "{texts:?}");
    scene.says(&["n1", "annotation towpath.dev/pod-cidrs: \"nonsense\" is no range"])?;
    scene.says(&["n1: addresses of 10.244.0.0/29: 5 of 5"])?;
    scene.says(&["n1: addresses of 10.244.7.0/24: 1 of 253"])?;
    scene.says(&["n2 → n1", "10.244.0.0/29, fd00:10:244::/64, 10.244.7.0/24, fd00:10:244:7::/64"])?;
    cluster.apply_text(&(server("chosen", "n1", "added", "fd00:10:244:7::99") + SERVICE))?;
    let chosen = scene.pod("chosen")?;
    let texts = chosen.1.map(|ip| ip.to_string());
    ensure!(texts[0].starts_with("10.244.7.") && texts[1] == "fd00:10:244:7::99", "{texts:?}");
    let service = both(&serde_json::from_value::<Vec<IpAddr>>(
        cluster.get("service", "added")?.pointer("/spec/clusterIPs").cloned().unwrap_or_default(),
    )?)?;
    let ends = Ends { far: scene.pod("far")?, late, chosen, service };
    wait("the Service to know its pods", SOON, || ends.reach(scene))?;
    let node = both(&listed(&cluster.get("node", "n1")?, "/status/addresses", "address"))?;
    for pod in [&ends.late.0, &ends.chosen.0] {
        ensure!(seen_outside(cluster, pod)? == node, "the outside does not see the node");
    }
    ends.are_judged(scene, &scene.pod("near")?.0)?;

    // By every backend.
    for backend in ["ipip", "udp", "macvlan", "host-gw"] {
        cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
        wait(&format!("the nodes to send by {backend}"), SOON, || {
            let said = status_text(&scene.cluster)?;
            ensure!(said.matches(&format!("({backend})")).count() >= 2, "{said}");
            Ok(())
        })?;
        wait("all to be reached", SECONDS, || ends.reach(scene)).with_context(|| backend.to_owned())?;
    }
    let nobodys = cluster.node("n1", "ip route; ip -6 route")?;
    let refused = ADDED.map(|range| format!("unreachable {range} "));
    ensure!(refused.iter().all(|route| nobodys.out.contains(route)), "what no pod has: {}", nobodys.all());

    taken(scene, &ends)?;
    taken_away(scene, &ends)
}

/// What others have is refused.
fn taken(scene: &Scene, ends: &Ends) -> Result<()> {
    scene.annotate("n2", &["10.244.7.128/25", "10.244.0.0/28", "10.96.9.0/24", "10.250.3.0/24", "10.244.9.0/24"])?;
    for words in [
        "10.244.7.128/25 (towpath.dev/pod-cidrs): it overlaps 10.244.7.0/24 of node n1",
        "10.244.0.0/28 (towpath.dev/pod-cidrs): it overlaps 10.244.0.",
        "10.96.9.0/24 (towpath.dev/pod-cidrs): it overlaps a Service range",
        "10.250.3.0/24 (towpath.dev/pod-cidrs): it is not inside the cluster's pod ranges (10.244.0.0/16",
    ] {
        scene.says(&["n1: node n2", words])?;
        scene.says(&["n2: node n2", words])?;
    }
    scene.routes("n1", "10.244.9.0/24", true)?;
    for range in ["10.244.7.128/25", "10.96.9.0/24", "10.250.3.0/24", "10.244.0.0/28"] {
        scene.routes("n1", range, false)?;
    }
    scene.routes("n2", ADDED[0], true)?;
    ends.reach(scene).context("who had it before")?;
    // An agent that starts while somebody says so decides as the others do.
    let agent = lab_agent(scene.cluster.name(), "n1")?;
    kill(agent)?;
    another_agent(scene.cluster.name(), "n1", agent)?;
    scene.says(&["n1: node n2", "it overlaps 10.244.7.0/24 of node n1"])?;
    ends.reach(scene).context("with another agent")?;
    // What was refused is taken when the reason is gone: the cluster has another range.
    let more = "{backend: host-gw, clusterCIDRs: [10.244.0.0/16, \"fd00:10:244::/56\", 10.250.0.0/16]}";
    scene.cluster.apply_text(&network_config(more))?;
    wait("the range to be routed", SOON, || scene.routes("n1", "10.250.3.0/24", true))?;
    scene.says(&["n2: addresses of 10.250.3.0/24: 0 of 253"])?;
    ends.reach(scene).context("with another range of the cluster")
}

/// What is nobody's wish any more goes with its last pod, and is nobody else's until then.
fn taken_away(scene: &Scene, ends: &Ends) -> Result<()> {
    let cluster = &scene.cluster;
    scene.annotate("n1", &[])?;
    scene.annotate("n2", &[ADDED[0]])?;
    scene.says(&["n1: addresses of 10.244.7.0/24: 2 of 253, gives no more"])?;
    scene.says(&["n2: node n2", "it overlaps 10.244.7.0/24 of node n1, whose pods still have addresses of it"])?;
    cluster.apply_text(&server("later", "n1", "later", ""))?;
    scene.is_told("later", "no free address in 10.244.0.0/29: 5 of 5 are taken")?;
    ends.reach(scene).context("pods of a range that was taken away")?;
    for node in ["n1", "n2"] {
        let agent = lab_agent(cluster.name(), node)?;
        kill(agent)?;
        another_agent(cluster.name(), node, agent)?;
    }
    scene.says(&["n1: addresses of 10.244.7.0/24: 2 of 253, gives no more"])?;
    wait("n2 to be back", SOON, || ends.reach(scene)).context("by agents that never heard of the wish")?;
    scene.says(&["n2: node n2", "whose pods still have addresses of it"])?;

    scene.delete(&["late"])?;
    scene.says(&["n1: addresses of 10.244.7.0/24: 1 of 253, gives no more"])?;
    scene.delete(&["chosen"])?;
    scene.says_not(&["n1: addresses of 10.244.7.0/24"])?;
    scene.routes("n2", ADDED[1], false)?;
    // Who waited has it.
    scene.routes("n1", ADDED[0], true)?;
    scene.says(&["n2: addresses of 10.244.7.0/24: 0 of 253"])?;
    cluster.apply_text(&server("heir", "n2", "heir", "10.244.7.77"))?;
    let (_, heir) = scene.pod("heir")?;
    ensure!(heir[0] == address("10.244.7.77")?, "{heir:?}");
    let old = scene.pod("old")?.0;
    heir.iter().try_for_each(|ip| asks(&old, *ip).map(drop)).context("the heir, from n1")
}

#[test]
fn a_full_node_gets_a_second_range_while_it_runs_and_nobody_gets_anothers() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up_with("e2e-pod-ranges", 2, Families::Dual, &["--node-cidr-mask-size", "29"])?;
    let scene = Scene { cluster };
    let lets_choose = json!({
        "apiVersion": "v1", "kind": "Namespace",
        "metadata": {"name": "default", "annotations": {"towpath.dev/pod-addresses": "chosen"}},
    });
    let first = [document(&lets_choose), server("old", "n1", "old", ""), server("far", "n2", "far", "")];
    scene.cluster.apply_text(&(first.concat() + &shell("near", "n2", "app: near")))?;
    let (_, old) = scene.pod("old")?;
    let (far, _) = scene.pod("far")?;
    let fill: Vec<String> = (0..scene.room("n1")?).map(|n| server(&format!("fill{n}"), "n1", "fill", "")).collect();
    scene.cluster.apply_text(&fill.concat())?;
    wait("n1's range to be full", SOON, || if scene.room("n1")? == 0 { Ok(()) } else { bail!("it has room") })?;

    // Open connections, and new ones, to a pod that was there before all of it.
    let all = old.map(|ip| SocketAddr::new(ip, 80));
    let kept = Load::sessions(&far, &all, 8)?;
    let load = Load::default();
    let done = std::thread::scope(|scope| {
        let (load, far, scene) = (&load, &far, &scene);
        scope.spawn(|| load.keep("while ranges come and go", kept, Duration::from_millis(200)));
        let opener = scope.spawn(move || {
            far.enter(|| {
                load.open("a pod of the first range", &all, 20);
                Ok(())
            })
        });
        let done = story(scene);
        load.ends();
        opener.join().map_err(|_| anyhow!("a thread panicked"))??;
        done
    });
    let judged = load.judge(100, 100);
    done.and(judged)?;
    scene.cluster.down()
}
