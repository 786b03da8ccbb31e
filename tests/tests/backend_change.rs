//! The backend of a running cluster is changed, and nobody notices: connections between pods and through Services stay open and new ones open,
//! and of the datagrams that pods send each other all the while every one arrives, also while agents are killed in the middle of the change.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::in_charge::network_config;
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::{can_run_labs, kill, lab_agent};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::server;
use towpath_walkthrough::traffic::{Clock, Flow, Heard, Receiver, Sender, Sent};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const SOON: Duration = Duration::from_secs(30);
/// How long it goes on each way.
const STAY: Duration = Duration::from_secs(2);
const PORT: u16 = 5300;
/// Between the datagrams of a flow.
const PACE: Duration = Duration::from_millis(4);

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{port: 8080, targetPort: 80}]\n";

struct Pods {
    places: Vec<Arc<Place>>,
    ips: Vec<Vec<String>>,
}

fn pods(cluster: &Cluster) -> Result<Pods> {
    let texts = NODES.map(|node| server(&format!("web-{node}"), node, "app: web"));
    cluster.apply_text(&(texts.concat() + SERVICE))?;
    let (mut places, mut ips) = (Vec::new(), Vec::new());
    for node in NODES {
        let name = format!("web-{node}");
        let pod = cluster.wait_pod(&name)?;
        places.push(Arc::new(Place::of_pod(cluster, &pod)?));
        let object = cluster.get("pod", &name)?;
        let all = object.pointer("/status/podIPs").and_then(Value::as_array).context("no podIPs")?;
        ips.push(all.iter().filter_map(|ip| ip.get("ip")?.as_str().map(str::to_owned)).collect());
    }
    Ok(Pods { places, ips })
}

/// Datagrams from each pod to each other one, over every family.
struct Datagrams {
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
}

impl Datagrams {
    fn start(pods: &Pods) -> Result<Self> {
        let clock = Clock::default();
        let (mut receivers, mut senders, mut flow) = (Vec::new(), Vec::new(), 0);
        let mut targets = Vec::new();
        for (place, ips) in pods.places.iter().zip(&pods.ips) {
            for ip in ips {
                let at = SocketAddr::new(address(ip)?, PORT);
                receivers.push(Receiver::at(place, at, clock)?);
                targets.push((place.name().to_owned(), at));
            }
        }
        for (sender, place) in (0..).zip(&pods.places) {
            let mut flows = Vec::new();
            for (_, to) in targets.iter().filter(|(name, _)| name != place.name()) {
                flow += 1;
                flows.push(Flow { number: flow, to: *to, fresh: false, every: 1 });
            }
            senders.push(Sender::start(place.clone(), sender, flows, PACE, clock));
        }
        Ok(Self { receivers, senders })
    }

    /// How many were sent; all of them arrived, once.
    fn end(self) -> Result<usize> {
        let sent: Vec<Sent> =
            self.senders.into_iter().map(Sender::end).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        std::thread::sleep(Duration::from_millis(300));
        let heard: Vec<Heard> =
            self.receivers.into_iter().map(Receiver::end).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
        let mut times: BTreeMap<(u32, u32), usize> = BTreeMap::new();
        heard.iter().for_each(|heard| *times.entry((heard.packet.flow, heard.packet.number)).or_default() += 1);
        let lost: Vec<_> =
            sent.iter().filter(|sent| !times.contains_key(&(sent.packet.flow, sent.packet.number))).collect();
        let when: Vec<String> = lost
            .iter()
            .take(20)
            .map(|sent| {
                format!(
                    "flow {} number {} after {:.3} s",
                    sent.packet.flow,
                    sent.packet.number,
                    sent.packet.sent as f64 / 1e9
                )
            })
            .collect();
        ensure!(lost.is_empty(), "{} of {} datagrams were lost: {}", lost.len(), sent.len(), when.join(", "));
        ensure!(times.values().all(|count| *count == 1), "some arrived twice");
        Ok(sent.len())
    }
}

/// What an agent says of itself.
fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    let output =
        Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?.stdout;
    let answers: Vec<Value> = serde_json::from_slice(&output).context("towpath status -o json")?;
    let mut all = answers.into_iter().filter_map(|mut answer| Some(answer.get_mut("status")?.take()));
    all.find(|one| one.get("node").and_then(Value::as_str) == Some(node))
        .with_context(|| format!("no status of {node}"))
}

/// Waits until packets go from every node to every other by this backend.
fn by(cluster: &Cluster, backend: &str) -> Result<()> {
    wait(&format!("all nodes to send by {backend}"), SOON, || {
        for node in NODES {
            let status = status(cluster, node)?;
            ensure!(status.get("ready") == Some(&Value::Bool(true)), "{node} is not ready");
            let peers = status.get("peers").and_then(Value::as_array).cloned().unwrap_or_default();
            let ways: Vec<_> = peers.iter().filter_map(|peer| peer.get("backend")?.as_str()).collect();
            ensure!(
                ways.len() == NODES.len() - 1 && ways.iter().all(|way| *way == backend),
                "{node} sends by {ways:?}"
            );
        }
        Ok(())
    })
}

/// How many packets a node sent and opened in envelopes, and sent as they are.
fn counters(cluster: &Cluster, node: &str) -> Result<[u64; 2]> {
    let status = status(cluster, node)?;
    Ok(["tunnel_out", "host_out"]
        .map(|name| status.pointer(&format!("/counters/{name}")).and_then(Value::as_u64).unwrap_or_default()))
}

fn change(cluster: &Cluster, backend: &str) -> Result<()> {
    cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))
}

#[test]
fn from_vxlan_to_host_gw_and_back_no_packet_is_lost() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-backend", 3, Families::Dual)?;
    let pods = pods(&cluster)?;
    // While one end has changed and the other has not, packets come by another device than the routes lead back by.
    for node in NODES {
        let strict = "for file in /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/eth0/rp_filter; do echo 1 > $file; done";
        let said = cluster.node(node, strict)?;
        ensure!(said.ok, "{node}: {}", said.all());
    }
    by(&cluster, "vxlan")?;
    let agent = lab_agent(cluster.name(), "n1")?;
    let mut to = Vec::new();
    for ips in &pods.ips {
        for ip in ips {
            to.push(SocketAddr::new(address(ip)?, 80));
        }
    }
    let service = cluster.get("service", "web")?;
    let service = service.pointer("/spec/clusterIP").and_then(Value::as_str).context("no clusterIP")?;
    to.push(SocketAddr::new(address(service)?, 8080));
    let load = Load::default();
    let sent = std::thread::scope(|scope| -> Result<usize> {
        for place in &pods.places {
            let sessions = Load::sessions(place, &to, 35)?;
            let (load, to) = (&load, &to);
            scope.spawn(move || {
                place.enter(|| {
                    load.keep("between pods", sessions, Duration::from_millis(200));
                    Ok(())
                })
            });
            scope.spawn(move || {
                place.enter(|| {
                    load.open("between pods", to, 40);
                    Ok(())
                })
            });
        }
        let done = (|| -> Result<usize> {
            let datagrams = Datagrams::start(&pods)?;
            std::thread::sleep(STAY);
            change(&cluster, "host-gw")?;
            by(&cluster, "host-gw")?;
            let [before, plain] = counters(&cluster, "n1")?;
            std::thread::sleep(STAY);
            let [after, gone] = counters(&cluster, "n1")?;
            println!("host-gw: {} packets in envelopes, {} as they are", after - before, gone - plain);
            ensure!(gone > plain + 500, "packets do not go as they are: {plain} before, {gone} after");
            // Back, with an agent killed in the middle; and there and back again faster than anybody can follow.
            change(&cluster, "vxlan")?;
            kill(wait("an agent", SOON, || lab_agent(cluster.name(), "n2"))?)?;
            by(&cluster, "vxlan")?;
            std::thread::sleep(STAY);
            for backend in ["host-gw", "vxlan", "host-gw", "vxlan", "host-gw"] {
                change(&cluster, backend)?;
                std::thread::sleep(Duration::from_millis(400));
            }
            kill(wait("an agent", SOON, || lab_agent(cluster.name(), "n3"))?)?;
            by(&cluster, "host-gw")?;
            std::thread::sleep(STAY);
            change(&cluster, "vxlan")?;
            by(&cluster, "vxlan")?;
            std::thread::sleep(STAY);
            datagrams.end()
        })();
        load.ends();
        done
    })?;
    println!("{sent} datagrams, all of them heard");
    ensure!(sent > 10_000, "only {sent} datagrams were sent");
    load.judge(500, 1000)?;
    // For whoever watches over it, an agent that follows its configuration does not end: no back-off ever holds it up.
    ensure!(lab_agent(cluster.name(), "n1")? == agent, "the agent of n1 ended");
    cluster.down()
}
