//! Backends: each of them carries what the rows before tried, and changing them loses nothing.

use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};

use super::{fetch, ping};
use crate::cluster::{Cluster, Said, field, host};
use crate::in_charge::network_config;
use crate::log::Log;
use crate::place::Place;

/// Those that there are; the one that clusters begin with last, for the rows behind these.
const BACKENDS: [&str; 4] = ["host-gw", "ipip", "macvlan", "vxlan"];

/// Asks for a backend and watches until all nodes have followed.
fn change(cluster: &Cluster, log: &mut Log, backend: &str) -> Result<()> {
    let manifest = network_config(&format!("{{backend: {backend}}}"));
    log.command(&format!("kubectl apply -f - <<EOF\n{manifest}EOF"));
    cluster.apply_text(&manifest)?;
    log.command("towpath status --watch");
    let mut watch = Command::new(cluster.towpath());
    let said = Said::from(watch.args(["status", "--watch", "--timeout", "90", "--lab", cluster.name()]).output()?);
    let all = cluster.nodes()?;
    let named = all.iter().all(|(node, _)| said.out.contains(&format!("{node}: done")));
    log.expect(format!("all nodes have followed to {backend}"), said.ok && named, said.all());
    Ok(())
}

/// How many packets a node sent by a backend.
fn sent(cluster: &Cluster, node: &str, backend: &str) -> Result<u64> {
    let counter = match backend {
        "host-gw" => "host_out",
        "ipip" => "ipip_out",
        "macvlan" => "link_out",
        _ => "tunnel_out",
    };
    let output = Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?;
    let answers: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).context("towpath status -o json")?;
    let answer = answers.iter().find(|answer| field(answer, "/node") == node);
    Ok(answer.and_then(|answer| answer.pointer(&format!("/status/counters/{counter}"))?.as_u64()).unwrap_or(0))
}

pub(super) fn w20(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let server = cluster.wait_pod("echo")?;
    let far = cluster.wait_pod("far")?;
    for backend in BACKENDS {
        change(cluster, log, backend)?;
        let before = sent(cluster, &far.node, backend)?;
        let said = cluster.exec("far", &ping(&server.ip))?;
        log.expect(format!("{backend}: ping across nodes"), said.ok, said.all());
        let said = cluster.exec("far", &fetch(&format!("http://{}/", host(&server.ip))))?;
        let right = said.ok && said.out.contains(&far.ip);
        log.expect(
            format!("{backend}: HTTP across nodes, and the server sees the client's own address"),
            right,
            said.all(),
        );
        let said = cluster.exec("far", &fetch("http://httpd-svc:8080/"))?;
        log.expect(format!("{backend}: a Service by its name"), said.ok, said.all());
        for (node, _) in cluster.nodes()? {
            let said = cluster.node(&node, &ping(&server.ip))?;
            log.expect(format!("{backend}: ping from node {node}"), said.ok, said.all());
        }
        let after = sent(cluster, &far.node, backend)?;
        log.expect(format!("{backend}: packets went by it"), after > before, format!("{before}, {after}"));
    }
    Ok(())
}

/// A ping that goes on in a pod, a hundred a second.
fn pinging(place: &Place, to: &str) -> Result<Child> {
    place.enter(|| {
        let ping = Command::new("ping").args(["-i", "0.01", "-q", to]).stdout(Stdio::piped()).spawn();
        ping.context("ping")
    })
}

pub(super) fn w21(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let server = cluster.wait_pod("echo")?;
    let far = Place::of_pod(cluster, &cluster.wait_pod("far")?)?;
    log.command(&format!("ping -i 0.01 {}   # in pod far, all the while", server.ip));
    let ping = pinging(&far, &server.ip)?;
    for backend in BACKENDS {
        change(cluster, log, backend)?;
    }
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(ping.id())?), nix::sys::signal::Signal::SIGINT)?;
    let said = Said::from(ping.wait_with_output()?);
    let (sent, heard) = counts(&said.out).unwrap_or_default();
    // The last one may still be on its way when it is told to end.
    let right = sent > 100 && heard + 1 >= sent;
    log.expect(format!("of {sent} packets during {} changes not one was lost", BACKENDS.len()), right, said.all());
    Ok(())
}

/// How many packets a ping sent, and how many were answered.
fn counts(said: &str) -> Option<(u64, u64)> {
    let line = said.lines().find(|line| line.contains(" packets transmitted"))?;
    let mut numbers = line.split(", ").map_while(|part| part.split(' ').next()?.parse().ok());
    Some((numbers.next()?, numbers.next()?))
}
