//! The backend `macvlan` with real packets: pods, those that were there before and new ones, are on the link of the nodes with MAC addresses of their own; they
//! reach each other, their nodes and Services as with any backend, other hosts of the link find them by ARP and neighbour discovery, and policy holds
//! for all of it, also while agents are gone. Nobody is on the link with another's address.

use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_datapath::net::mac;
use towpath_walkthrough::cluster::{Cluster, Families, Pod, Said, host, wait};
use towpath_walkthrough::in_charge::{all_send_by, network_config, status_of};
use towpath_walkthrough::machine::{can_run_labs, kill, lab_agent};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::server;

const SOON: Duration = Duration::from_secs(30);
const NODES: [&str; 2] = ["n1", "n2"];

const SERVICE: &str = "---\napiVersion: v1\nkind: Service\nmetadata: {name: web}\nspec:\n  type: NodePort\n  ipFamilyPolicy: PreferDualStack\n  \
                       selector: {app: far}\n  ports: [{port: 8080, targetPort: 80, nodePort: 30080}]\n";

/// Who may come in to pods `app: guarded`, and whom they may ask.
const POLICY: &str = "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: guard}\nspec:\n  podSelector: {matchLabels: {app: guarded}}\n  \
                      policyTypes: [Ingress, Egress]\n  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]\n  egress: [{to: [{podSelector: {matchLabels: {app: friend}}}]}]\n";

/// A pod as the test needs it.
struct Stand {
    name: String,
    node: String,
    ips: Vec<String>,
    mac: String,
    place: Place,
}

fn stand(cluster: &Cluster, name: &str) -> Result<Stand> {
    let pod: Pod = cluster.wait_pod(name)?;
    let ips = pod.ips.iter().map(ToString::to_string).collect();
    let place = Place::of_pod(cluster, &pod)?;
    let link = said(&place, "ip -o link show eth0")?.out;
    let mac = link.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context("no MAC")?.to_owned();
    Ok(Stand { name: name.to_owned(), node: pod.node, ips, mac, place })
}

/// A shell command with the machine's tools, where somebody stands.
fn said(place: &Place, script: &str) -> Result<Said> {
    place.enter(|| Ok(Said::from(Command::new("sh").args(["-c", script]).output().context("sh")?)))
}

fn done(place: &Place, script: &str) -> Result<String> {
    let said = said(place, script)?;
    ensure!(said.ok, "{}: {script}: {}", place.name(), said.all());
    Ok(said.out)
}

/// Whether a web server answers at an address, and as whom it sees the client.
fn asks(place: &Place, at: &str, port: u16) -> Result<String> {
    done(place, &format!("curl -sS -g -m 5 http://{}:{port}/", host(at)))
}

fn is_silent(place: &Place, at: &str) -> Result<()> {
    let said = said(place, &format!("curl -sS -g -m 1 http://{}:80/", host(at)))?;
    ensure!(!said.ok, "{} reaches {at}: {}", place.name(), said.out);
    Ok(())
}

/// How often a node has counted something; what it has not counted yet it does not name.
fn count(cluster: &Cluster, node: &str, counter: &str) -> Result<u64> {
    let found = status_of(cluster, node)?.pointer(&format!("/counters/{counter}")).and_then(Value::as_u64);
    Ok(found.unwrap_or_default())
}

fn change(cluster: &Cluster, backend: &str) -> Result<()> {
    cluster.apply_text(&network_config(&format!("{{backend: {backend}}}")))?;
    all_send_by(cluster, backend)
}

/// Every pod reaches every other one and every node, and every node every pod; servers see who asks.
fn all_reach_all(cluster: &Cluster, pods: &[Stand]) -> Result<()> {
    for to in pods {
        for ip in &to.ips {
            let v4 = !ip.contains(':');
            for from in pods.iter().filter(|from| from.name != to.name) {
                let own = from.ips.iter().find(|own| own.contains(':') != v4).context("no address of the family")?;
                let answer = asks(&from.place, ip, 80)?;
                ensure!(answer.contains(own.as_str()), "{} is seen by {} as {answer}", from.name, to.name);
            }
            for node in NODES {
                asks(&Place::of_node(cluster, node)?, ip, 80).with_context(|| format!("node {node} to {}", to.name))?;
            }
        }
    }
    for from in pods {
        for (node, ip) in cluster.nodes()? {
            done(&from.place, &format!("ping -c 1 -W 3 {ip}"))
                .with_context(|| format!("{} to node {node}", from.name))?;
        }
    }
    Ok(())
}

/// The MAC address that a pod's address has on the link.
fn on_link(ip: &str) -> Result<String> {
    Ok(mac::text(mac::of_pod(address(ip)?)))
}

/// The switch has heard each address's MAC at the port of the pod's node.
fn own_macs_are_heard(link: &Place, pods: &[Stand]) -> Result<()> {
    let table = done(link, "bridge fdb show br nodes0")?;
    for pod in pods {
        for ip in &pod.ips {
            let entry = format!("{} dev {} ", on_link(ip)?, pod.node);
            ensure!(table.contains(&entry), "{} ({ip}) is not heard as {entry}: {table}", pod.name);
        }
    }
    Ok(())
}

/// A host of the link finds pods by asking for them there, as a host of their own subnet does.
fn hosts_of_the_link_find_pods(link: &Place, pods: &[Stand]) -> Result<()> {
    for pod in pods {
        for ip in &pod.ips {
            done(link, &format!("ip route replace {ip} dev nodes0"))?;
            asks(link, ip, 80)?;
            let neighbour = done(link, &format!("ip neigh show dev nodes0 to {ip}"))?;
            ensure!(neighbour.contains(&on_link(ip)?), "{} is {neighbour:?} on the link", pod.name);
        }
    }
    Ok(())
}

/// Has a pod's device another MAC, and all as it was besides: the kernel forgets neighbours, permanent ones too, when it changes.
fn takes_mac(pod: &Stand, mac: &str) -> Result<()> {
    let script = format!(
        "kept=$(ip neigh show dev eth0 nud permanent | awk '{{print $1, $3}}'); ip link set eth0 address {mac}; \
         echo \"$kept\" | while read to at; do ip neigh replace $to lladdr $at dev eth0 nud permanent; done"
    );
    done(&pod.place, &script).map(drop)
}

/// A pod takes another's MAC, the node's and another's address: none of it leaves, and it is counted.
fn nobody_is_another(cluster: &Cluster, pod: &Stand, other: &Stand) -> Result<()> {
    let ip = other.ips.iter().find(|ip| !ip.contains(':')).context("no IPv4 address")?;
    let uplink = done(&Place::of_node(cluster, &pod.node)?, "ip -o link show eth0")?;
    let uplink =
        uplink.split_whitespace().skip_while(|word| *word != "link/ether").nth(1).context("no MAC")?.to_owned();
    for mac in [&other.mac, &uplink] {
        let before = count(cluster, &pod.node, "drop.source_mac")?;
        takes_mac(pod, mac)?;
        let answered = said(&pod.place, &format!("ping -c 1 -W 1 {ip}"))?.ok;
        takes_mac(pod, &pod.mac)?;
        ensure!(!answered && count(cluster, &pod.node, "drop.source_mac")? > before, "{} is {mac}", pod.name);
    }
    let before = count(cluster, &pod.node, "drop.source_address")?;
    let node = cluster.node_ip("n2")?;
    done(
        &pod.place,
        &format!("ip addr add {ip}/32 dev eth0; ping -c 1 -W 1 -I {ip} {node}; ip addr del {ip}/32 dev eth0"),
    )?;
    ensure!(count(cluster, &pod.node, "drop.source_address")? > before, "{} is {ip}", pod.name);
    wait("the pod to be itself again", SOON, || done(&pod.place, &format!("ping -c 1 -W 1 {ip}")).map(drop))
}

#[test]
fn pods_are_on_the_link_with_macs_of_their_own_and_all_else_holds() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-macvlan", 2, Families::Dual)?;
    let link = Place::of_node(&cluster, "underlay")?;
    let manifests = [server("old1", "n1", "app: friend"), server("old2", "n2", "app: far")].concat() + SERVICE;
    cluster.apply_text(&manifests)?;
    let mut pods = vec![stand(&cluster, "old1")?, stand(&cluster, "old2")?];
    is_silent(&link, &pods[0].ips[0]).context("with envelopes nobody is on the link")?;
    // An open connection goes on through every change.
    let to = SocketAddr::new(address(&pods[1].ips[0])?, 80);
    let mut session = pods[0].place.enter(|| Session::open(to, SOON))?;
    session.ask(SOON)?;

    change(&cluster, "macvlan")?;
    session.ask(SOON).context("the connection that was open")?;
    cluster.apply_text(&[server("new1", "n1", "app: guarded"), server("new2", "n2", "app: far")].concat())?;
    pods.extend([stand(&cluster, "new1")?, stand(&cluster, "new2")?]);
    let before = count(&cluster, "n1", "link_out")?;
    all_reach_all(&cluster, &pods)?;
    ensure!(count(&cluster, "n1", "link_out")? > before + 20, "packets do not go by the link");
    own_macs_are_heard(&link, &pods)?;
    hosts_of_the_link_find_pods(&link, &pods)?;
    let problems = status_of(&cluster, "n1")?.get("problems").cloned();
    ensure!(problems.as_ref().and_then(Value::as_array).is_none_or(Vec::is_empty), "n1 has problems: {problems:?}");

    services_lead_there(&cluster, &pods)?;
    nobody_is_another(&cluster, &pods[0], &pods[2])?;

    // With a policy, and with agents that are gone: what there is goes on, and hosts of the link are answered.
    cluster.apply_text(POLICY)?;
    policy_holds(&cluster, &link, &pods)?;
    for node in NODES {
        kill(wait("an agent", SOON, || lab_agent(cluster.name(), node))?)?;
    }
    policy_holds(&cluster, &link, &pods)?;
    hosts_of_the_link_find_pods(&link, &pods[..2])?;
    session.ask(SOON).context("the connection that was open, with agents that were killed")?;
    all_send_by(&cluster, "macvlan")?;
    policy_holds(&cluster, &link, &pods)?;
    let deleted = cluster.try_kubectl(&["delete", "networkpolicy", "guard"])?;
    ensure!(deleted.status.success(), "{}", Said::from(deleted).all());

    // A pod that is gone is not let in at the card any more.
    let uplink = Place::of_node(&cluster, "n2")?;
    let gone = pods.pop().context("no pod")?;
    let lets_in = |mac: &str| Ok::<_, anyhow::Error>(done(&uplink, "bridge fdb show dev eth0")?.contains(mac));
    ensure!(lets_in(&gone.mac)?, "the card does not let {} in", gone.mac);
    let deleted = cluster.try_kubectl(&["delete", "pod", "new2"])?;
    ensure!(deleted.status.success(), "{}", Said::from(deleted).all());
    wait("the card to let it in no longer", SOON, || if lets_in(&gone.mac)? { bail!("it does") } else { Ok(()) })?;

    // And back: everybody goes on reaching everybody, and after the time in which somebody might still send so, nobody is on the link.
    change(&cluster, "vxlan")?;
    session.ask(SOON).context("the connection that was open, with envelopes again")?;
    all_reach_all(&cluster, &pods)?;
    wait("pods to be off the link", SOON * 3, || {
        done(&link, "ip neigh flush dev nodes0")?;
        is_silent(&link, &pods[0].ips[0])
    })?;
    ensure!(!done(&uplink, "bridge fdb show dev eth0")?.contains("06:74:"), "the card still lets pods in");
    all_reach_all(&cluster, &pods)?;
    cluster.down()
}

#[test]
fn a_cluster_of_ipv6_alone_is_on_the_link_too() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-macvlan6", 2, Families::Ipv6)?;
    let link = Place::of_node(&cluster, "underlay")?;
    let manifests = [server("old1", "n1", "app: friend"), server("old2", "n2", "app: far")].concat() + SERVICE;
    cluster.apply_text(&manifests)?;
    change(&cluster, "macvlan")?;
    cluster.apply_text(&[server("new1", "n1", "app: guarded"), server("new2", "n2", "app: far")].concat())?;
    let pods = ["old1", "old2", "new1", "new2"].map(|name| stand(&cluster, name));
    let pods = pods.into_iter().collect::<Result<Vec<_>>>()?;
    let before = count(&cluster, "n1", "link_out")?;
    all_reach_all(&cluster, &pods)?;
    ensure!(count(&cluster, "n1", "link_out")? > before + 10, "packets do not go by the link");
    own_macs_are_heard(&link, &pods)?;
    hosts_of_the_link_find_pods(&link, &pods)?;
    cluster.apply_text(POLICY)?;
    policy_holds(&cluster, &link, &pods)?;
    cluster.down()
}

/// A web server with addresses and a MAC address that it chose.
fn choosing(name: &str, node: &str, addresses: &str, mac: &str) -> String {
    let annotations = format!(
        "metadata: {{annotations: {{towpath.dev/ip-addresses: '{addresses}', towpath.dev/mac-address: '{mac}'}}, "
    );
    server(name, node, "").replacen("metadata: {", &annotations, 1)
}

/// Addresses of a node's ranges, as an annotation has them.
fn numbered(cluster: &Cluster, node: &str, number: &str) -> Result<String> {
    let ranges = cluster.get("node", node)?;
    let ranges = ranges.pointer("/spec/podCIDRs").and_then(Value::as_array).context("no podCIDRs")?;
    let first = ranges.iter().filter_map(|range| range.as_str()?.split('/').next());
    let at = |first: &str| format!("{}{number}", if first.contains(':') { first } else { first.trim_end_matches('0') });
    Ok(first.map(at).collect::<Vec<_>>().join(","))
}

/// Neighbours of a pod that chose its MAC see and reach it at that; nodes go on sending to the one that follows from each address, and the switch hears both.
fn chosen_macs_are_seen(link: &Place, pods: &[&Stand]) -> Result<()> {
    for pod in pods {
        for ip in &pod.ips {
            done(link, &format!("ip route replace {ip} dev nodes0; ip neigh flush dev nodes0 to {ip}"))?;
            asks(link, ip, 80)?;
            let neighbour = done(link, &format!("ip neigh show dev nodes0 to {ip}"))?;
            ensure!(neighbour.contains(&pod.mac), "{} is {neighbour:?} on the link", pod.name);
        }
        let table = done(link, "bridge fdb show br nodes0")?;
        for mac in pod.ips.iter().map(|ip| on_link(ip)).chain([Ok(pod.mac.clone())]) {
            let entry = format!("{} dev {} ", mac?, pod.node);
            ensure!(table.contains(&entry), "{} is not heard as {entry}: {table}", pod.name);
        }
    }
    Ok(())
}

#[test]
fn a_mac_that_a_pod_chose_is_its_own_on_the_link_and_nodes_need_not_ask_for_it() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-macvlan-c", 2, Families::Dual)?;
    let link = Place::of_node(&cluster, "underlay")?;
    let lets = "---\napiVersion: v1\nkind: Namespace\nmetadata: {name: default, annotations: {towpath.dev/pod-addresses: chosen}}\n";
    let (old, new) = ("02:00:5e:10:00:01", "02:00:5e:10:00:02");
    let (first, second) = (numbered(&cluster, "n1", "66")?, numbered(&cluster, "n1", "67")?);
    cluster.apply_text(&[lets, &choosing("old", "n1", &first, old), &server("far", "n2", "")].concat())?;
    let (olds, far) = (stand(&cluster, "old")?, stand(&cluster, "far")?);
    change(&cluster, "macvlan")?;
    cluster.apply_text(&choosing("new", "n1", &second, new))?;
    let pods = [olds, far, stand(&cluster, "new")?];
    let [olds, _, news] = &pods;
    ensure!((olds.mac.as_str(), news.mac.as_str()) == (old, new), "{} and {}", olds.mac, news.mac);
    ensure!(olds.ips.join(",") == first && news.ips.join(",") == second, "{:?} and {:?}", olds.ips, news.ips);
    let before = count(&cluster, "n1", "link_out")?;
    all_reach_all(&cluster, &pods)?;
    ensure!(count(&cluster, "n1", "link_out")? > before + 5, "packets do not go by the link");
    chosen_macs_are_seen(&link, &[olds, news])?;
    hosts_of_the_link_find_pods(&link, &pods[1..2])?;

    // With no agent, and with the next one.
    kill(wait("an agent", SOON, || lab_agent(cluster.name(), "n1"))?)?;
    chosen_macs_are_seen(&link, &[olds, news])?;
    all_send_by(&cluster, "macvlan")?;
    chosen_macs_are_seen(&link, &[olds, news])?;
    all_reach_all(&cluster, &pods)?;

    // The card lets the MAC of a pod in no longer that went while there was no agent, and nobody's when pods are off the link.
    let uplink = Place::of_node(&cluster, "n1")?;
    let lets_in = |mac: &str| Ok::<_, anyhow::Error>(done(&uplink, "bridge fdb show dev eth0")?.contains(mac));
    ensure!(lets_in(old)? && lets_in(new)?, "the card does not let them in");
    kill(wait("an agent", SOON, || lab_agent(cluster.name(), "n1"))?)?;
    let deleted = cluster.try_kubectl(&["delete", "pod", "new"])?;
    ensure!(deleted.status.success(), "{}", Said::from(deleted).all());
    wait("the card to let it in no longer", SOON, || if lets_in(new)? { bail!("it does") } else { Ok(()) })?;
    ensure!(lets_in(old)?, "the other one either");
    change(&cluster, "vxlan")?;
    wait("the card to let nobody in", SOON * 3, || if lets_in(old)? { bail!("it does") } else { Ok(()) })?;
    all_reach_all(&cluster, &pods[..2])?;
    cluster.down()
}

/// By the Service's own address, from a pod and from a node, and by NodePorts from outside, where the client is seen as itself.
fn services_lead_there(cluster: &Cluster, pods: &[Stand]) -> Result<()> {
    let service = cluster.get("service", "web")?;
    let addresses = service.pointer("/spec/clusterIPs").and_then(Value::as_array).context("no clusterIPs")?;
    for address in addresses.iter().filter_map(Value::as_str) {
        for from in pods {
            let asked = cluster.exec(&from.name, &format!("timeout 5 wget -q -O - http://{}:8080/", host(address)))?;
            ensure!(asked.ok, "{} asks {address} through its socket: {}", from.name, asked.all());
            asks(&from.place, address, 8080).with_context(|| format!("{} asks at its device", from.name))?;
        }
        for node in NODES {
            let asked = cluster.node(node, &format!("curl -sS -g -m 5 http://{}:8080/", host(address)))?;
            ensure!(asked.ok, "node {node} asks {address}: {}", asked.all());
        }
    }
    for (node, ip) in cluster.nodes()? {
        let asked = cluster.outside(&format!("curl -sS -g -m 5 http://{}:30080/", host(&ip)))?;
        ensure!(asked.ok && asked.out.contains("192.168.26.10"), "by the NodePort of {node}: {}", asked.all());
    }
    Ok(())
}

/// `new1` is guarded: one friend, on its own node, comes in; a pod of its node's and of the other, a host of the link and a node's do not, and it asks nobody else.
fn policy_holds(cluster: &Cluster, link: &Place, pods: &[Stand]) -> Result<()> {
    let [friend, old, guarded, new] = pods else { bail!("other pods") };
    for (mine, other) in guarded.ips.iter().zip(&new.ips) {
        wait("the policy", SOON, || is_silent(&old.place, mine))?;
        is_silent(&new.place, mine)?;
        is_silent(link, mine)?;
        is_silent(&guarded.place, other)?;
        asks(&friend.place, mine, 80)?;
        asks(&Place::of_node(cluster, "n1")?, mine, 80).context("its own node")?;
        ensure!(asks(&Place::of_node(cluster, "n2")?, mine, 80).is_err(), "another node reaches it");
        asks(link, other, 80).context("who is not guarded")?;
    }
    for ip in &friend.ips {
        asks(&guarded.place, ip, 80)?;
    }
    Ok(())
}
