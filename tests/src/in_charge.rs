//! Who is in charge of Services and DNS in a lab, by what its agents and its controller say.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::cluster::{Cluster, field, wait};

/// A `NetworkConfig` with this spec, in YAML.
pub fn network_config(spec: &str) -> String {
    format!("apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {spec}\n")
}

/// Every agent's status, as `towpath status -o json` has it; null of one that does not answer.
fn statuses(cluster: &Cluster) -> Result<Vec<Value>> {
    let output =
        Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?.stdout;
    let answers: Vec<Value> = serde_json::from_slice(&output).context("towpath status -o json")?;
    Ok(answers.into_iter().map(|mut answer| answer.get_mut("status").map(Value::take).unwrap_or_default()).collect())
}

/// What `towpath status` says, for people.
///
/// # Errors
/// It cannot be run.
pub fn status_text(cluster: &Cluster) -> Result<String> {
    let said = Command::new(cluster.towpath()).args(["status", "--lab", cluster.name()]).output()?;
    Ok(String::from_utf8_lossy(&said.stdout).into_owned())
}

/// Gives a pod's annotation a value, or takes it away.
///
/// # Errors
/// The API server refuses.
pub fn annotate_pod(cluster: &Cluster, pod: &str, annotation: &str, value: Option<&str>) -> Result<()> {
    let change = value.map_or_else(|| format!("{annotation}-"), |value| format!("{annotation}={value}"));
    let out = cluster.try_kubectl(&["annotate", "pod", pod, &change, "--overwrite"])?;
    ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    Ok(())
}

/// The status of one node's agent.
///
/// # Errors
/// There is none, or nothing that can be read.
pub fn status_of(cluster: &Cluster, node: &str) -> Result<Value> {
    let found = statuses(cluster)?.into_iter().find(|one| field(one, "/node") == node);
    found.with_context(|| format!("no status of {node}"))
}

/// A field of every agent's status.
///
/// # Errors
/// It says nothing that can be read.
pub fn said_by_nodes(cluster: &Cluster, field_name: &str) -> Result<Vec<String>> {
    Ok(statuses(cluster)?.iter().map(|status| field(status, &format!("/{field_name}"))).collect())
}

/// Waits until packets go from every node to every other by this backend.
///
/// # Errors
/// They do not in time.
pub fn all_send_by(cluster: &Cluster, backend: &str) -> Result<()> {
    wait(&format!("all nodes to send by {backend}"), Duration::from_secs(30), || {
        let (all, nodes) = (statuses(cluster)?, cluster.nodes()?.len());
        ensure!(all.len() == nodes, "{} of {nodes} nodes answer", all.len());
        for status in all {
            let node = field(&status, "/node");
            ensure!(field(&status, "/ready") == "true", "{node} is not ready");
            let peers = status.get("peers").and_then(Value::as_array).cloned().unwrap_or_default();
            let ways: Vec<String> = peers.iter().map(|peer| field(peer, "/backend")).collect();
            ensure!(ways.len() == nodes - 1 && ways.iter().all(|way| way == backend), "{node} sends by {ways:?}");
        }
        Ok(())
    })
}

/// Waits until every node says that `who` is in charge (`serviceProxy`, `dns`); how long that took.
///
/// # Errors
/// It is not so in time.
pub fn in_charge(cluster: &Cluster, field_name: &str, who: &str) -> Result<Duration> {
    let begun = Instant::now();
    wait(&format!("{who} to be in charge"), Duration::from_secs(60), || {
        let now = said_by_nodes(cluster, field_name)?;
        if now.iter().all(|is| is == who) { Ok(()) } else { bail!("{field_name}: {now:?}") }
    })?;
    Ok(begun.elapsed())
}

/// Waits until the controller says so of the `NetworkConfig`, in its present generation.
///
/// # Errors
/// It does not in time.
pub fn config_says(cluster: &Cluster, condition: &str, status: &str, words: &str) -> Result<()> {
    wait(&format!("NetworkConfig's {condition}={status}"), Duration::from_secs(15), || {
        let config = cluster.get("networkconfig", "default")?;
        let generation = (field(&config, "/metadata/generation"), field(&config, "/status/observedGeneration"));
        let conditions = config.pointer("/status/conditions").and_then(Value::as_array).cloned().unwrap_or_default();
        let found = conditions.iter().find(|c| field(c, "/type") == condition);
        let right = found.is_some_and(|c| field(c, "/status") == status && field(c, "/message").contains(words));
        if right && generation.0 == generation.1 { Ok(()) } else { bail!("{generation:?} {conditions:?}") }
    })
}
