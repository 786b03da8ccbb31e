//! `towpath ipam check` and its repair, against what really gets lost: a lease, a network namespace, a device that is nobody's.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::libcni::{Libcni, Sandbox, address_of};
use towpath_walkthrough::machine::{self, can_run_labs};

const PATIENCE: Duration = Duration::from_secs(30);

/// What the check says of the only node, and whether it ended well.
fn check(cluster: &Cluster, options: &[&str]) -> Result<(Value, bool)> {
    let mut command = Command::new(cluster.towpath());
    command.args(["ipam", "check", "--lab", cluster.name(), "-o", "json"]).args(options);
    let out = command.output()?;
    let said: Value = serde_json::from_slice(&out.stdout)
        .with_context(|| format!("ipam check: {}", String::from_utf8_lossy(&out.stderr)))?;
    Ok((said.get(0).cloned().unwrap_or_default(), out.status.success()))
}

fn kinds(node: &Value) -> Vec<String> {
    node["findings"].as_array().into_iter().flatten().map(|finding| field(finding, "/kind")).collect()
}

fn well(cluster: &Cluster, options: &[&str]) -> Result<Value> {
    let (node, ended_well) = check(cluster, options)?;
    ensure!(ended_well && kinds(&node).is_empty(), "{node:#}");
    Ok(node)
}

#[test]
fn what_is_lost_is_found_and_repaired_under_a_running_pod() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-ipam", 1, Families::Dual)?;
    let cni = Libcni::of_node(&cluster, "n1")?;
    let none = json!({});
    cluster.try_kubectl(&["run", "web", "--image=nginx", "--port=80"])?;
    let web = cluster.wait_pod("web")?;
    let (kept, lost) = (Sandbox::make("e2e-ipam-kept")?, Sandbox::make("e2e-ipam-lost")?);
    let address = address_of(&cni.succeed("ADD", Some(&kept), "1.1.0", &none)?)?;
    cni.succeed("ADD", Some(&lost), "1.1.0", &none)?;
    let all = well(&cluster, &[])?;
    ensure!(all["leases"].as_u64() >= Some(3), "{all:#}");

    // A lease is lost under a running container, and the agent starts anew.
    let lease = Path::new("/var/lib/towpath/lab/e2e-ipam/nodes/n1/towpath/leases/e2e-ipam-kept@eth0.lease");
    fs::remove_file(lease)?;
    let agent = machine::lab_agent("e2e-ipam", "n1")?;
    machine::kill(agent)?;
    wait("another agent to be ready", PATIENCE, || {
        ensure!(machine::lab_agent("e2e-ipam", "n1")? != agent, "not gone yet");
        cni.agent_is_ready()
    })?;
    let (found, ended_well) = check(&cluster, &["--node", "n1"])?;
    ensure!(!ended_well && kinds(&found) == ["deviceWithoutLease"], "{found:#}");
    ensure!(found["findings"][0]["addresses"][0] == json!(address), "{found:#}");
    let repaired = well(&cluster, &["--repair"])?;
    ensure!(repaired["repaired"].as_array().is_some_and(|done| !done.is_empty()), "{repaired:#}");
    ensure!(lease.exists(), "the lease is not written again");
    let answers = |address: &str| Ok::<_, anyhow::Error>(cluster.node("n1", &format!("ping -c 1 -W 2 {address}"))?.ok);
    ensure!(answers(&address)?, "{address} does not answer after the repair");

    // A device that is nobody's, unless the agent's own check takes it away before it is seen.
    wait("a stray device to be found", PATIENCE, || {
        let _ = cluster.node("n1", "ip link add tp0123456789a type veth peer name stray")?;
        let (found, _) = check(&cluster, &[])?;
        if kinds(&found) == ["deviceWithoutOwner"] { Ok(()) } else { bail!("{found:#}") }
    })?;
    well(&cluster, &["--repair"])?;
    wait("it to be gone", PATIENCE, || {
        ensure!(!cluster.node("n1", "ip link show tp0123456789a")?.ok, "still there");
        Ok(())
    })?;

    // A namespace that goes without a DEL: the agent, or the repair, gives the address back.
    drop(lost);
    wait("the address to be given back", PATIENCE, || {
        let node = well(&cluster, &["--repair"])?;
        ensure!(node["leases"].as_u64() == all["leases"].as_u64().map(|leases| leases - 1), "{node:#}");
        Ok(())
    })?;
    ensure!(answers(&address)? && answers(&web.ip)?, "a repair took something away from a running pod");
    cni.succeed("DEL", Some(&kept), "1.1.0", &none)?;
    well(&cluster, &[])?;

    let silent =
        Command::new(cluster.towpath()).args(["ipam", "check", "--lab", "e2e-ipam", "--node", "n9"]).output()?;
    ensure!(!silent.status.success(), "a node that is not there is no success");
    cluster.down()
}
