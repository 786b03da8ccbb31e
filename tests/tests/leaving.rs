//! Whose address the outside sees of what pods send: the node's or the pod's own, a family and a destination at a time, as it is configured while
//! everything runs.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::in_charge::network_config;
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::Place;

const SOON: Duration = Duration::from_secs(30);
const PORT: u16 = 7099;

const POD: &str = "apiVersion: v1
kind: Pod
metadata: {name: client}
spec:
  nodeName: n1
  terminationGracePeriodSeconds: 0
  containers: [{name: client, image: busybox, command: [sleep, '86400']}]
";

fn ip_masq_agent(config: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: ip-masq-agent, namespace: kube-system}}\ndata:\n  config: {}\n",
        serde_json::json!(config)
    )
}

/// Addresses of a namespace that others reach, as `ip` says them.
fn addresses_of(namespace: &str) -> Result<Vec<IpAddr>> {
    let said = Command::new("ip").args(["-n", namespace, "-j", "address", "show", "scope", "global"]).output()?;
    let links: Vec<Value> = serde_json::from_slice(&said.stdout).context("ip -j address")?;
    Ok(links.iter().flat_map(|link| listed(link, "/addr_info", "local")).collect())
}

/// Addresses in a list of an object's.
fn listed(object: &Value, list: &str, field: &str) -> Vec<IpAddr> {
    let items = object.pointer(list).and_then(Value::as_array).into_iter().flatten();
    items.filter_map(|item| item.get(field)?.as_str()?.parse().ok()).collect()
}

/// The first of each family.
fn both(all: Vec<IpAddr>) -> Result<[IpAddr; 2]> {
    let first =
        |v4| all.iter().copied().find(|a| a.is_ipv4() == v4).with_context(|| format!("one of each family in {all:?}"));
    Ok([first(true)?, first(false)?])
}

/// A pod that says something, and somebody outside who hears whose it is.
struct Fixture {
    pod: Place,
    outside: Place,
    /// Where it is heard.
    at: [IpAddr; 2],
}

impl Fixture {
    /// The source that the outside sees, of each family.
    fn seen(&self) -> Result<[IpAddr; 2]> {
        let mut seen = self.at;
        for seen in &mut seen {
            let to = SocketAddr::new(*seen, PORT);
            let ear = self.outside.enter(|| {
                let ear = UdpSocket::bind(to)?;
                ear.set_read_timeout(Some(Duration::from_secs(2)))?;
                Ok(ear)
            })?;
            self.pod.enter(|| {
                let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
                UdpSocket::bind((any, 0))?.send_to(b"who am I?", to).context("send")
            })?;
            *seen = ear.recv_from(&mut [0; 64]).with_context(|| format!("nothing came to {to}"))?.1.ip();
        }
        Ok(seen)
    }

    fn comes_to_see(&self, wanted: [IpAddr; 2], why: &str) -> Result<()> {
        wait(why, SOON, || {
            let seen = self.seen()?;
            ensure!(seen == wanted, "{why}: {wanted:?} should be seen, not {seen:?}");
            Ok(())
        })
    }
}

#[test]
fn a_family_and_a_destination_see_the_pods_own_address_where_that_is_configured() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-leaving", 1, Families::Dual)?;
    cluster.apply_text(POD)?;
    let pod = cluster.wait_pod("client")?;
    let outside = format!("tp-{}-outside", cluster.name());
    let at = both(addresses_of(&outside)?)?;
    let node = both(listed(&cluster.get("node", "n1")?, "/status/addresses", "address"))?;
    let own = both(pod.ips.clone())?;
    let path = Path::new("/run/netns").join(&outside);
    let fixture = Fixture { pod: Place::of_pod(&cluster, &pod)?, outside: Place::of_netns("outside", &path)?, at };

    fixture.comes_to_see(node, "both families are masqueraded")?;
    cluster.apply_text(&network_config("{masquerade: {ipv6: false}}"))?;
    fixture.comes_to_see([node[0], own[1]], "IPv6 is not masqueraded")?;
    cluster.apply_text(&network_config("{masquerade: {ipv4: false, ipv6: true}}"))?;
    fixture.comes_to_see([own[0], node[1]], "IPv4 is not masqueraded")?;
    cluster.apply_text(&network_config("{}"))?;
    fixture.comes_to_see(node, "both are again")?;

    // As ip-masq-agent is configured.
    let named = format!("nonMasqueradeCIDRs: [\"{}/32\"]\nresyncInterval: 60s\n", at[0]);
    cluster.apply_text(&ip_masq_agent(&named))?;
    fixture.comes_to_see([own[0], node[1]], "the ConfigMap names an IPv4 destination")?;
    // What cannot be understood changes nothing.
    cluster.apply_text(&ip_masq_agent("nonMasqueradeCIDRs: [nonsense]"))?;
    std::thread::sleep(Duration::from_secs(2));
    ensure!(fixture.seen()? == [own[0], node[1]], "nonsense is not followed");
    cluster.apply_text(&ip_masq_agent(&format!("{{\"nonMasqueradeCIDRs\": [\"{}/128\"]}}", at[1])))?;
    fixture.comes_to_see([node[0], own[1]], "the ConfigMap names an IPv6 destination")?;
    let deleted = cluster.try_kubectl(&["delete", "configmap", "ip-masq-agent", "-n", "kube-system"])?;
    ensure!(deleted.status.success(), "{deleted:?}");
    fixture.comes_to_see(node, "there is no ConfigMap")?;
    cluster.down()
}
