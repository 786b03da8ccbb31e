//! The backend of a running cluster is changed, and nobody notices: connections between pods and through Services stay open and new ones open,
//! and of the datagrams that pods send each other all the while, small and as large as they may be, every one arrives, also while agents are killed in the middle of the change.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::in_charge::{all_send_by, network_config, status_of};
use towpath_walkthrough::load::Load;
use towpath_walkthrough::machine::{can_run_labs, kill, lab_agent};
use towpath_walkthrough::place::{Place, address};
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::traffic::{Bulk, Clock, Flow, Heard, Receiver, Sender, Sent};

const NODES: [&str; 3] = ["n1", "n2", "n3"];
const SOON: Duration = Duration::from_secs(30);
/// How long it goes on each way at least, and the last time.
const STAY: Duration = Duration::from_millis(500);
const LAST_STAY: Duration = Duration::from_secs(2);
/// So many packets of a node show that they go by a backend; that many are sent within a second where the machine is not busy.
const ENOUGH: u64 = 500;
const ENOUGH_WITHIN: Duration = Duration::from_secs(10);
const PORT: u16 = 5300;
/// Between the datagrams of a flow.
const PACE: Duration = Duration::from_millis(4);

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  selector: {app: web}\n  ports: [{port: 8080, targetPort: 80}]\n";

struct Pods {
    places: Vec<Arc<Place>>,
    ips: Vec<Vec<IpAddr>>,
    /// Pods that ask the Service. They are not the same ones: a client that is translated at its device has one port for a server, by whichever
    /// address it asks it, and is refused the second time (docs/services.md).
    askers: Vec<Place>,
}

fn pods(cluster: &Cluster) -> Result<Pods> {
    let servers = NODES.map(|node| server(&format!("web-{node}"), node, "app: web"));
    let askers = NODES.map(|node| shell(&format!("asker-{node}"), node, "app: asker"));
    cluster.apply_text(&(servers.concat() + &askers.concat() + SERVICE))?;
    let (mut places, mut ips, mut askers) = (Vec::new(), Vec::new(), Vec::new());
    for node in NODES {
        let name = format!("web-{node}");
        let pod = cluster.wait_pod(&name)?;
        places.push(Arc::new(Place::of_pod(cluster, &pod)?));
        ips.push(pod.ips);
        askers.push(Place::of_pod(cluster, &cluster.wait_pod(&format!("asker-{node}"))?)?);
    }
    Ok(Pods { places, ips, askers })
}

/// Datagrams from each pod to each other one, over every family, small ones and ones as large as the pods' MTU lets them be; and bytes without
/// an end from each to the next.
struct Traffic {
    receivers: Vec<Receiver>,
    senders: Vec<Sender>,
    bulk: Vec<Bulk>,
}

impl Traffic {
    /// `mtu`: of the pods, in bytes.
    fn start(pods: &Pods, mtu: usize) -> Result<Self> {
        let clock = Clock::default();
        let (mut receivers, mut senders, mut bulk, mut number) = (Vec::new(), Vec::new(), Vec::new(), 0);
        let mut targets = Vec::new();
        for (place, ips) in pods.places.iter().zip(&pods.ips) {
            for ip in ips {
                let at = SocketAddr::new(*ip, PORT);
                receivers.push(Receiver::at(place, at, clock)?);
                targets.push((place, at));
            }
        }
        for (sender, place) in (0..).zip(&pods.places) {
            let mut flows = Vec::new();
            for (_, to) in targets.iter().filter(|(other, _)| other.name() != place.name()) {
                let headers = if to.is_ipv4() { 28 } else { 48 };
                for size in [0, mtu - headers] {
                    number += 1;
                    flows.push(Flow { number, to: *to, fresh: false, every: 1, size });
                }
            }
            senders.push(Sender::start(place.clone(), sender, flows, PACE, clock));
        }
        let next = pods.places.iter().zip(&pods.ips).cycle().skip(1);
        for (from, (to, ips)) in pods.places.iter().zip(next) {
            for ip in ips {
                bulk.push(Bulk::start(from, to, SocketAddr::new(*ip, PORT))?);
            }
        }
        Ok(Self { receivers, senders, bulk })
    }

    /// How many datagrams were sent; all of them arrived, once. And the bytes that went without an end, of which none is missing either.
    fn end(self) -> Result<(usize, u64)> {
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
        let bytes = self.bulk.into_iter().map(Bulk::end).sum::<Result<u64>>()?;
        Ok((sent.len(), bytes))
    }
}

/// How many packets a node sent by each backend.
fn counters(cluster: &Cluster, node: &str) -> Result<BTreeMap<&'static str, u64>> {
    let status = status_of(cluster, node)?;
    let count = |name: &str| status.pointer(&format!("/counters/{name}")).and_then(Value::as_u64).unwrap_or_default();
    let names = [
        ("vxlan", "tunnel_out"),
        ("host-gw", "host_out"),
        ("ipip", "ipip_out"),
        ("udp", "udp_out"),
        ("macvlan", "link_out"),
    ];
    Ok(names.map(|(backend, name)| (backend, count(name))).into())
}

fn change(cluster: &Cluster, backend: &str) -> Result<()> {
    cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))
}

/// Sees that packets go by this backend for a while, `at_least` so long.
fn stays(cluster: &Cluster, backend: &str, at_least: Duration) -> Result<()> {
    all_send_by(cluster, backend)?;
    let before = counters(cluster, "n1")?;
    std::thread::sleep(at_least);
    let gone = wait(&format!("packets by {backend}"), ENOUGH_WITHIN, || {
        let after = counters(cluster, "n1")?;
        let gone: BTreeMap<_, _> =
            after.iter().zip(before.values()).map(|((name, after), before)| (*name, after - before)).collect();
        ensure!(gone.get(backend).is_some_and(|count| *count > ENOUGH), "packets do not go by {backend}: {gone:?}");
        Ok(gone)
    })?;
    println!("{backend}: packets by {gone:?}");
    Ok(())
}

/// What the backend becomes, one after the other; it is vxlan before.
struct Course<'a> {
    /// Every ordered pair, with an agent killed in the middle of every other change.
    pairs: &'a [&'a str],
    /// Faster than anybody can follow, with an agent that dies on the way. Ends with ipip.
    fast: &'a [&'a str],
}

#[test]
fn from_each_backend_to_each_other_no_packet_is_lost() -> Result<()> {
    let first = ["host-gw", "ipip", "vxlan", "ipip", "host-gw", "vxlan"];
    goes(
        "e2e-backend",
        Families::Dual,
        &Course {
            pairs: &[
                first.as_slice(),
                &["udp", "host-gw", "udp", "ipip", "udp", "vxlan"],
                &["macvlan", "host-gw", "macvlan", "ipip", "macvlan", "udp", "macvlan", "vxlan"],
            ]
            .concat(),
            fast: &["host-gw", "udp", "macvlan", "vxlan", "udp", "macvlan", "host-gw", "udp", "ipip"],
        },
    )
}

#[test]
fn nor_is_one_where_nodes_have_ipv6_addresses_only() -> Result<()> {
    goes(
        "e2e-backend6",
        Families::Ipv6,
        &Course {
            pairs: &[
                ["host-gw", "ipip", "vxlan", "ipip", "host-gw", "vxlan"].as_slice(),
                &["udp", "host-gw", "udp", "ipip", "udp", "vxlan"],
                &["macvlan", "host-gw", "macvlan", "ipip", "macvlan", "udp", "macvlan", "vxlan"],
            ]
            .concat(),
            fast: &["host-gw", "udp", "macvlan", "vxlan", "udp", "macvlan", "host-gw", "udp", "ipip"],
        },
    )
}

fn goes(name: &str, families: Families, course: &Course<'_>) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up(name, 3, families)?;
    let pods = pods(&cluster)?;
    // While one end has changed and the other has not, packets come by another device than the routes lead back by.
    for node in NODES {
        let strict = "for file in /proc/sys/net/ipv4/conf/all/rp_filter /proc/sys/net/ipv4/conf/eth0/rp_filter; do echo 1 > $file; done";
        let said = cluster.node(node, strict)?;
        ensure!(said.ok, "{node}: {}", said.all());
    }
    all_send_by(&cluster, "vxlan")?;
    let agent = lab_agent(cluster.name(), "n1")?;
    let mtu = status_of(&cluster, "n1")?.get("podMtu").and_then(Value::as_u64).context("no podMtu")?;
    let to: Vec<SocketAddr> = pods.ips.iter().flatten().map(|ip| SocketAddr::new(*ip, 80)).collect();
    let service = cluster.get("service", "web")?;
    let service = service.pointer("/spec/clusterIP").and_then(Value::as_str).context("no clusterIP")?;
    let service = [SocketAddr::new(address(service)?, 8080)];
    let load = Load::default();
    let (sent, bytes) = std::thread::scope(|scope| -> Result<(usize, u64)> {
        let direct = pods.places.iter().map(|place| (place.as_ref(), "between pods", to.as_slice(), 30, 34));
        let through = pods.askers.iter().map(|place| (place, "through the Service", service.as_slice(), 5, 6));
        for (place, what, to, kept, per_second) in direct.chain(through) {
            let sessions = Load::sessions(place, to, kept)?;
            let load = &load;
            scope.spawn(move || {
                place.enter(|| {
                    load.keep(what, sessions, Duration::from_millis(200));
                    Ok(())
                })
            });
            scope.spawn(move || {
                place.enter(|| {
                    load.open(what, to, per_second);
                    Ok(())
                })
            });
        }
        let done = (|| -> Result<(usize, u64)> {
            let traffic = Traffic::start(&pods, usize::try_from(mtu)?)?;
            stays(&cluster, "vxlan", STAY)?;
            // In turns: an agent that did not live ten seconds is started again later each time.
            let victims = [None, Some("n2"), None, Some("n3")].into_iter().cycle();
            for (backend, victim) in course.pairs.iter().zip(victims) {
                change(&cluster, backend)?;
                if let Some(victim) = victim {
                    kill(wait("an agent", SOON, || lab_agent(cluster.name(), victim))?)?;
                }
                stays(&cluster, backend, STAY)?;
            }
            for backend in course.fast {
                change(&cluster, backend)?;
                std::thread::sleep(Duration::from_millis(400));
            }
            kill(wait("an agent", SOON, || lab_agent(cluster.name(), "n3"))?)?;
            stays(&cluster, "ipip", LAST_STAY)?;
            traffic.end()
        })();
        load.ends();
        done
    })?;
    println!("{sent} datagrams, all of them heard, and {} MiB", bytes >> 20);
    ensure!(sent > 10_000 && bytes > 100 << 20, "only {sent} datagrams and {bytes} bytes were sent");
    load.judge(500, 1000)?;
    // For whoever watches over it, an agent that follows its configuration does not end: no back-off ever holds it up.
    ensure!(lab_agent(cluster.name(), "n1")? == agent, "the agent of n1 ended");
    cluster.down()
}
