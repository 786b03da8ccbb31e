//! Addresses and MAC addresses that pods ask for, with real packets: a pod of a namespace that lets its pods choose gets what it asks for and keeps it;
//! whoever may not have what he asks for does not start, is told why where people look, and leaves nothing behind. (On the link of the nodes, with the
//! backend `macvlan`: `backend_macvlan.rs`.)

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, Pod, Said, field, host, wait};
use towpath_walkthrough::machine::{another_agent, can_run_labs, kill, lab_agent};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::server;

const SOON: Duration = Duration::from_secs(30);
const ADDRESSES: &str = "towpath.dev/ip-addresses";
const MAC: &str = "towpath.dev/mac-address";
const CALICOS: &str = "cni.projectcalico.org/ipAddrs";
const CHOSEN: &str = "02:00:5e:10:00:01";

fn document(object: &Value) -> String {
    format!("---\n{object}\n")
}

/// A namespace, whose pods may choose or not.
fn namespace(name: &str, lets_choose: bool) -> String {
    let annotations = if lets_choose { json!({"towpath.dev/pod-addresses": "chosen"}) } else { json!({}) };
    document(&json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "annotations": annotations}}))
}

/// A web server that asks, by annotations.
fn asking(name: &str, node: &str, annotations: &[(&str, &str)]) -> String {
    let (namespace, name) = name.split_once('/').unwrap_or(("default", name));
    let annotations: serde_json::Map<String, Value> =
        annotations.iter().map(|(name, value)| ((*name).to_owned(), json!(value))).collect();
    document(&json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"namespace": namespace, "name": name, "annotations": annotations},
        "spec": {
            "nodeName": node,
            "terminationGracePeriodSeconds": 0,
            "containers": [{"name": "web", "image": "nginx", "ports": [{"containerPort": 80}]}],
        },
    }))
}

/// The addresses of a node's ranges, by their number.
struct Ranges([IpAddr; 2]);

impl Ranges {
    fn of(cluster: &Cluster, node: &str) -> Result<Self> {
        let node = cluster.get("node", node)?;
        let first =
            |at: usize| address(field(&node, &format!("/spec/podCIDRs/{at}")).split('/').next().unwrap_or_default());
        Ok(Self([first(0)?, first(1)?]))
    }

    fn at(&self, number: u8) -> [String; 2] {
        self.0.map(|first| match first {
            IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits() + u32::from(number)).to_string(),
            IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() + u128::from(number)).to_string(),
        })
    }
}

fn object(cluster: &Cluster, pod: &str) -> Result<Value> {
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let got = Said::from(cluster.try_kubectl(&["get", "pod", name, "-n", namespace, "-o", "json"])?);
    serde_json::from_str(&got.out).with_context(|| format!("pod {pod}: {}", got.all()))
}

fn addresses(pod: &Value) -> Vec<String> {
    let ips = pod.pointer("/status/podIPs").and_then(Value::as_array);
    ips.into_iter().flatten().map(|ip| field(ip, "/ip")).collect()
}

/// A pod, when it is ready, and its addresses.
fn ready(cluster: &Cluster, name: &str, limit: Duration) -> Result<(Pod, Vec<String>)> {
    wait(&format!("pod {name} ready"), limit, || {
        let object = object(cluster, name)?;
        let pod = Pod::from_json(&object);
        if pod.ready { Ok((pod, addresses(&object))) } else { bail!("{:?}; {:?}", pod, events(cluster, name)?) }
    })
}

/// What the kubelet says of a pod whose network cannot be set up.
fn events(cluster: &Cluster, pod: &str) -> Result<Vec<String>> {
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let output = cluster.try_kubectl(&["get", "events", "-n", namespace, "-o", "json"])?;
    let list: Value = serde_json::from_slice(&output.stdout).context("no list of events")?;
    let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    let of_pod = |event: &&Value| {
        field(event, "/involvedObject/name") == name && field(event, "/reason") == "FailedCreatePodSandBox"
    };
    Ok(items.iter().filter(of_pod).map(|event| field(event, "/message")).collect())
}

/// A pod does not start, and its Events say why.
fn is_told(cluster: &Cluster, pod: &str, words: &str) -> Result<()> {
    wait(&format!("pod {pod} to be told {words:?}"), SOON, || {
        let events = events(cluster, pod)?;
        ensure!(events.iter().any(|event| event.contains(words)), "{events:?}");
        let object = object(cluster, pod)?;
        ensure!(!Pod::from_json(&object).ready && addresses(&object).is_empty(), "it has an address: {object:#}");
        Ok(())
    })
}

/// How many leases there are, when nothing is found that is wrong.
fn leases(cluster: &Cluster) -> Result<u64> {
    let mut command = Command::new(cluster.towpath());
    let out = command.args(["ipam", "check", "--lab", cluster.name(), "-o", "json"]).output()?;
    let said: Value = serde_json::from_slice(&out.stdout)
        .with_context(|| format!("ipam check: {}", String::from_utf8_lossy(&out.stderr)))?;
    ensure!(out.status.success(), "{said:#}");
    let nodes = said.as_array().context("no list of nodes")?;
    let found = nodes.iter().any(|node| node["findings"].as_array().is_none_or(|findings| !findings.is_empty()));
    ensure!(!found, "{said:#}");
    Ok(nodes.iter().filter_map(|node| node["leases"].as_u64()).sum())
}

fn has_leases(cluster: &Cluster, count: u64) -> Result<()> {
    wait(&format!("{count} leases and nothing wrong"), SOON, || {
        let leases = leases(cluster)?;
        ensure!(leases == count, "{leases}");
        Ok(())
    })
}

fn delete(cluster: &Cluster, pod: &str) -> Result<()> {
    let (namespace, name) = pod.split_once('/').unwrap_or(("default", pod));
    let deleted = Said::from(cluster.try_kubectl(&["delete", "pod", name, "-n", namespace])?);
    ensure!(deleted.ok, "{}", deleted.all());
    Ok(())
}

/// How many ADDs of a node ended so.
fn ended(cluster: &Cluster, node: &str, outcome: &str) -> Result<u64> {
    let metrics = cluster.node(node, "curl -sS -m 3 http://127.0.0.1:9116/metrics")?;
    let name = format!("towpath_cni_requests_total{{verb=\"ADD\",outcome=\"{outcome}\"}} ");
    let count = metrics.out.lines().find_map(|line| line.strip_prefix(&name));
    count.with_context(|| format!("no {name}: {}", metrics.all()))?.parse().context("no number")
}

fn done(place: &Place, script: &str) -> Result<String> {
    let said = place.enter(|| Ok(Said::from(Command::new("sh").args(["-c", script]).output().context("sh")?)))?;
    ensure!(said.ok, "{}: {script}: {}", place.name(), said.all());
    Ok(said.out)
}

/// A web server answers at an address.
fn asks(place: &Place, at: &str) -> Result<String> {
    done(place, &format!("curl -sS -g -m 5 http://{}:80/", host(at)))
}

#[test]
fn pods_get_the_addresses_that_they_may_choose_and_nobody_gets_anothers() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-chosen", 2, Families::Dual)?;
    let namespaces = [("default", true), ("other", true), ("closed", false)].map(|(name, lets)| namespace(name, lets));
    cluster.apply_text(&(namespaces.concat() + &server("far", "n2", "")))?;
    let (here, there) = (Ranges::of(&cluster, "n1")?, Ranges::of(&cluster, "n2")?);
    let far = cluster.wait_pod("far")?;
    let (far, far_ips) = (Place::of_pod(&cluster, &far)?, addresses(&object(&cluster, "far")?));
    let before = leases(&cluster)?;

    // Both families and a MAC; one family, as Calico writes it, and any of the other.
    let [v4, v6] = here.at(200);
    let wished = format!("{v6},{v4}");
    let half = here.at(201);
    cluster.apply_text(
        &[
            asking("fixed", "n1", &[(ADDRESSES, &wished), (MAC, CHOSEN)]),
            asking("half", "n1", &[(CALICOS, &format!("[\"{}\"]", half[1]))]),
        ]
        .concat(),
    )?;
    let (fixed, ips) = ready(&cluster, "fixed", SOON)?;
    ensure!(ips == [v4.clone(), v6.clone()], "{ips:?}");
    let place = Place::of_pod(&cluster, &fixed)?;
    let link = done(&place, "ip -o link show eth0")?;
    ensure!(link.contains(CHOSEN), "{link}");
    let (_, halfs) = ready(&cluster, "half", SOON)?;
    ensure!(halfs[1] == half[1] && halfs[0] != half[0] && halfs[0] != v4, "{halfs:?}");
    let both_ways = || -> Result<()> {
        for (own, other) in ips.iter().zip(&far_ips) {
            ensure!(asks(&far, own)?.contains(other.as_str()), "{own} does not see who asks");
            ensure!(asks(&place, other)?.contains(own.as_str()), "{other} does not see who asks");
        }
        halfs.iter().try_for_each(|ip| asks(&place, ip).map(drop))
    };
    both_ways()?;
    has_leases(&cluster, before + 2)?;

    // An agent that dies changes none of it.
    let mut session = far.enter(|| Session::open(SocketAddr::new(address(&v4)?, 80), SOON))?;
    session.ask(SOON)?;
    let agent = lab_agent(cluster.name(), "n1")?;
    kill(agent)?;
    both_ways().context("while there is no agent")?;
    another_agent(cluster.name(), "n1", agent)?;
    has_leases(&cluster, before + 2)?;
    both_ways().context("with another agent")?;
    session.ask(SOON).context("the connection that was open")?;
    ensure!(addresses(&object(&cluster, "fixed")?) == ips, "the pod has other addresses");

    refused(&cluster, &here, &there, before + 2)?;

    // Once its namespace lets it, the pod that waits starts by itself.
    cluster.apply_text(&namespace("closed", true))?;
    let (_, later) = ready(&cluster, "closed/asks", SOON)?;
    ensure!(later[0] == here.at(210)[0], "{later:?}");

    // Who waits for an address of another pod of its namespace gets it as soon as that is gone; its MAC too.
    delete(&cluster, "fixed")?;
    let (taken, now) = ready(&cluster, "taken", SOON)?;
    ensure!(now == ips, "{now:?}");
    let link = done(&Place::of_pod(&cluster, &taken)?, "ip -o link show eth0")?;
    ensure!(link.contains(CHOSEN), "{link}");
    ips.iter().try_for_each(|ip| asks(&far, ip).map(drop)).context("the pod that waited")?;

    // One of another namespace not before everybody has forgotten whose it was.
    delete(&cluster, "taken")?;
    cluster.apply_text(&asking("other/heir", "n1", &[(ADDRESSES, &v4)]))?;
    is_told(&cluster, "other/heir", "somebody of another namespace had it")?;
    let (_, inherited) = ready(&cluster, "other/heir", SOON * 3)?;
    ensure!(inherited[0] == v4, "{inherited:?}");
    asks(&far, &v4).context("the heir")?;

    for pod in ["half", "closed/asks", "other/heir"] {
        delete(&cluster, pod)?;
    }
    has_leases(&cluster, before)?;
    cluster.down()
}

/// A pod, its node, what it asks for, and what its Events say.
type Case<'a> = (&'a str, &'a str, &'a [(&'a str, &'a str)], &'a str);

/// Pods that ask for what they cannot have. `taken` and `closed/asks` stay; the others are deleted.
fn refused(cluster: &Cluster, here: &Ranges, there: &Ranges, leased: u64) -> Result<()> {
    let [v4, v6] = here.at(200);
    let uplink = done(&Place::of_node(cluster, "n1")?, "ip -o link show eth0")?;
    let uplink = uplink.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context("no MAC")?;
    let node = cluster.node_ip("n1")?;
    let both = format!("{v4},{v6}");
    let calicos = format!("[\"{}\"]", here.at(211)[0]);
    let opens = "kubectl annotate namespace closed towpath.dev/pod-addresses=chosen";
    let numbered = |number: u8| here.at(number);
    let ([network, _], [gateway, gateway6], [broadcast, _]) = (numbered(0), numbered(1), numbered(255));
    let cases: [Case<'_>; 14] = [
        ("taken", "n1", &[(ADDRESSES, &both), (MAC, CHOSEN)], "has it: choose another, or wait until that is gone"),
        ("elsewhere", "n1", &[(ADDRESSES, &there.at(200)[0])], "is in no pod range of this node"),
        ("network", "n1", &[(ADDRESSES, &network)], "the network's, the gateway's or the broadcast address"),
        ("gateway", "n1", &[(ADDRESSES, &gateway)], "the network's, the gateway's or the broadcast address"),
        ("gateway6", "n1", &[(ADDRESSES, &gateway6)], "the network's, the gateway's or the broadcast address"),
        ("broadcast", "n1", &[(ADDRESSES, &broadcast)], "the network's, the gateway's or the broadcast address"),
        ("node", "n1", &[(ADDRESSES, &node)], "is in no pod range of this node"),
        (
            "invalid",
            "n1",
            &[(ADDRESSES, "10.0.0.300")],
            "annotation towpath.dev/ip-addresses: \"10.0.0.300\" is no IP address",
        ),
        ("mac-taken", "n1", &[(MAC, CHOSEN)], "pod default/fixed has it"),
        ("mac-elsewhere", "n2", &[(MAC, CHOSEN)], "pod default/fixed on another node has it"),
        ("mac-node", "n1", &[(MAC, uplink)], "device eth0 of the node has it"),
        ("mac-group", "n1", &[(MAC, "01:00:5e:00:00:01")], "is the MAC address of a group"),
        ("closed/asks", "n1", &[(ADDRESSES, &here.at(210)[0])], opens),
        ("closed/calicos", "n1", &[(CALICOS, &calicos)], opens),
    ];
    let (refused, failed) = (ended(cluster, "n1", "refused")?, ended(cluster, "n1", "error")?);
    cluster.apply_text(&cases.iter().map(|(name, node, wishes, _)| asking(name, node, wishes)).collect::<String>())?;
    for (name, _, _, words) in &cases {
        is_told(cluster, name, words)?;
    }
    has_leases(cluster, leased)?;
    // It is their makers' trouble, and not the node's: nobody is woken.
    let now = (ended(cluster, "n1", "refused")?, ended(cluster, "n1", "error")?);
    ensure!(now.0 >= refused + 13 && now.1 == failed, "{now:?}");
    for (name, ..) in cases.iter().filter(|(name, ..)| !["taken", "closed/asks"].contains(name)) {
        delete(cluster, name)?;
    }
    has_leases(cluster, leased).context("those that were refused are gone")
}
