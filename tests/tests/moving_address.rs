//! A virtual address moves from node to node, as keepalived moves it: a NodePort answers there within a second, wherever it is.

use std::net::SocketAddr;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::server;

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80, nodePort: 30080}]
"#;

/// How soon it answers; the full check comes every 30 s.
const SOON: Duration = Duration::from_secs(1);
const ANSWER: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

/// The virtual addresses, one a family.
const VIPS: [(&str, &str); 2] = [("192.168.255.200", "24"), ("fd00:255::200", "64")];

fn holds(cluster: &Cluster, node: &str, verb: &str) -> Result<()> {
    for (vip, length) in VIPS {
        let flags = if vip.contains(':') && verb == "add" { " nodad" } else { "" };
        let said = cluster.node(node, &format!("ip addr {verb} {vip}/{length} dev eth0{flags}"))?;
        ensure!(said.ok, "{verb} {vip} on {node}: {}", said.all());
    }
    Ok(())
}

#[test]
fn node_ports_answer_at_a_virtual_address_as_soon_as_a_node_has_it() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-vip", 2, Families::Dual)?;
    cluster.apply_text(&(server("web", "n1", "app: web") + OBJECTS))?;
    cluster.wait_pod("web")?;
    let outside = Place::of_node(&cluster, "outside")?;
    let router = Path::new("/run/netns").join(format!("tp-{}-underlay", cluster.name()));
    let router = Place::of_netns("the router", &router)?;
    let ask = |to: &str| -> Result<String> {
        let to = SocketAddr::new(address(to)?, 30080);
        outside.enter(|| Session::open(to, ANSWER)?.ask(ANSWER))
    };
    // By addresses that the nodes always had.
    for (node, ip) in cluster.nodes()? {
        wait(&format!("the NodePort at {node}"), PATIENCE, || ask(&ip))?;
    }
    for (step, (from, to)) in [("", "n1"), ("n1", "n2"), ("n2", "n1")].into_iter().enumerate() {
        if !from.is_empty() {
            holds(&cluster, from, "del")?;
        }
        holds(&cluster, to, "add")?;
        // What keepalived does by gratuitous ARP and unsolicited neighbour advertisements.
        let flush = "ip neigh flush dev nodes0; ip -6 neigh flush dev nodes0";
        let flushed = router.enter(|| Ok(Command::new("sh").args(["-c", flush]).status()?))?;
        ensure!(flushed.success(), "{flush}");
        // The address is there when it answers pings: neighbour discovery may need a second try, a second later.
        for (vip, _) in VIPS {
            wait(&format!("step {step}: a ping to {vip} at {to}"), PATIENCE, || {
                let said =
                    router.enter(|| Ok(Command::new("ping").args(["-n", "-c", "1", "-W", "1", vip]).output()?))?;
                ensure!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
                Ok(())
            })?;
        }
        let begun = Instant::now();
        for (vip, _) in VIPS {
            let answer = wait(&format!("step {step}: {vip} at {to}"), PATIENCE, || ask(vip))?;
            ensure!(answer.contains("web"), "{answer}");
        }
        let took = begun.elapsed();
        println!("step {step}: answered at {to} after {took:?}");
        ensure!(took < SOON, "step {step}: {to} answers after {took:?} only");
    }
    // And not at who has it no more.
    holds(&cluster, "n1", "del")?;
    wait("n1 to have forgotten the address", SOON, || {
        let said = cluster.node("n1", "nft list table inet towpath")?;
        for (vip, _) in VIPS {
            ensure!(!said.out.contains(vip), "{vip} is still this node's: {}", said.out);
        }
        Ok(())
    })
    .context("the masquerading rules name it")?;
    cluster.down()
}
