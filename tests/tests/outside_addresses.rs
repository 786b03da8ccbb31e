//! Addresses by which the outside knows a Service: external ones where they are allowed, and a load balancer's for the clients that
//! it is for. The endpoint is on another node than the one that the packets come to, and sees the client's own address.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::pods::{server, shell};

const EXTERNAL: &str = "203.0.113.7";
const BALANCED: &str = "203.0.113.8";
const PATIENCE: Duration = Duration::from_secs(20);

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: external}
spec:
  selector: {app: web}
  externalIPs: [203.0.113.7]
  ports: [{port: 8080, targetPort: 80}]
---
# A load balancer of somebody else's, who has given it an address.
apiVersion: v1
kind: Service
metadata: {name: balanced}
spec:
  type: LoadBalancer
  loadBalancerClass: example.com/other
  selector: {app: web}
  ports: [{port: 8080, targetPort: 80, nodePort: 30080}]
"#;

struct Fixture {
    cluster: Cluster,
    log: Log,
    outside: String,
}

impl Fixture {
    fn patch(&self, patch: &str, more: &[&str]) -> Result<()> {
        let arguments = [&["patch", "service", "balanced", "--type", "merge", "-p", patch], more].concat();
        self.cluster.kubectl(&self.log, &arguments).map(|_| ())
    }

    fn answers(&self, what: &str, ask: impl Fn() -> Result<String>) -> Result<String> {
        wait(what, PATIENCE, || {
            let said = ask()?;
            if said.contains("pod: web\n") { Ok(said) } else { bail!("{said}") }
        })
    }

    fn is_silent(&self, address: &str) -> Result<()> {
        wait(&format!("{address} to be silent"), PATIENCE, || {
            let said = self.cluster.outside(&curl(address))?.all();
            if said.contains("pod: ") { bail!("{said}") } else { Ok(()) }
        })
    }
}

fn curl(address: &str) -> String {
    format!("curl -sS -m 2 http://{address}:8080/")
}

#[test]
fn the_outside_reaches_what_it_may() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-outside", 2, Families::Ipv4)?;
    if cluster.driver() == towpath_walkthrough::cluster::Driver::Lab {
        println!("skipped: a Service's status is patched with kubectl");
        return cluster.down();
    }
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("near", "n1", "") + OBJECTS))?;
    cluster.wait_pod("web")?;
    cluster.wait_pod("near")?;
    let n1 = cluster.node_ip("n1")?;
    // The router between the nodes and the outside brings both addresses to n1.
    let router = format!("tp-{}-underlay", cluster.name());
    for address in [EXTERNAL, BALANCED] {
        let routed = Command::new("ip").args(["-n", &router, "route", "replace", address, "via", &n1]).output()?;
        ensure!(routed.status.success(), "{}", String::from_utf8_lossy(&routed.stderr));
    }
    let asked = cluster.outside(&format!("ip -o route get {n1}"))?.out;
    let outside = asked.split_whitespace().skip_while(|word| *word != "src").nth(1).context("a source")?.to_owned();
    let fixture = Fixture { cluster, log: Log::new(Voice::Plain), outside };
    external(&fixture)?;
    balanced(&fixture)?;
    fixture.cluster.down()
}

fn external(fixture: &Fixture) -> Result<()> {
    let cluster = &fixture.cluster;
    fixture.is_silent(EXTERNAL)?;
    cluster.apply_text(
        "apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {name: default}\nspec: {externalCIDRs: [203.0.113.0/24]}\n",
    )?;
    let said = fixture.answers("the external address from outside", || Ok(cluster.outside(&curl(EXTERNAL))?.all()))?;
    ensure!(said.contains(&format!("client: {}:", fixture.outside)), "the client's address is not kept: {said}");
    let by_wget = format!("timeout 4 wget -q -O - http://{EXTERNAL}:8080/");
    fixture.answers("from a pod", || Ok(cluster.exec("near", &by_wget)?.all()))?;
    fixture.answers("from a node", || Ok(cluster.node("n1", &curl(EXTERNAL))?.all()))?;
    cluster.apply_text(
        "apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {name: default}\nspec: {externalCIDRs: [198.51.100.0/24]}\n",
    )?;
    fixture.is_silent(EXTERNAL)
}

fn balanced(fixture: &Fixture) -> Result<()> {
    let cluster = &fixture.cluster;
    let ingress = |mode: &str| {
        format!(r#"{{"status": {{"loadBalancer": {{"ingress": [{{"ip": "{BALANCED}", "ipMode": "{mode}"}}]}}}}}}"#)
    };
    fixture.patch(&ingress("VIP"), &["--subresource=status"])?;
    let ask = || Ok(cluster.outside(&curl(BALANCED))?.all());
    let said = fixture.answers("the load balancer's address", ask)?;
    ensure!(said.contains(&format!("client: {}:", fixture.outside)), "the client's address is not kept: {said}");

    let for_clients = |range: &str| format!(r#"{{"spec": {{"loadBalancerSourceRanges": ["{range}"]}}}}"#);
    fixture.patch(&for_clients("192.0.2.0/28"), &[])?;
    fixture.is_silent(BALANCED)?;
    let from_pod = cluster.exec("near", &format!("timeout 4 wget -q -O - http://{BALANCED}:8080/ 2>&1"))?;
    ensure!(!from_pod.ok && from_pod.all().contains("not permitted"), "{}", from_pod.all());
    let n1 = cluster.node_ip("n1")?;
    let node_port = cluster.outside(&format!("curl -sS -m 2 http://{n1}:30080/"))?.all();
    ensure!(node_port.contains("pod: web\n"), "its NodePort is for all: {node_port}");
    fixture.patch(&for_clients(&format!("{}/32", fixture.outside)), &[])?;
    fixture.answers("a client that it is for", ask)?;

    fixture.patch(&ingress("Proxy"), &["--subresource=status"])?;
    fixture.is_silent(BALANCED)
}
