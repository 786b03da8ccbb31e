//! Who is in charge of Services and DNS in a lab, by what its agents and its controller say.

use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cluster::{Cluster, field, wait};

/// A `NetworkConfig` with this spec, in YAML.
pub fn network_config(spec: &str) -> String {
    format!("apiVersion: towpath.dev/v1alpha1\nkind: NetworkConfig\nmetadata: {{name: default}}\nspec: {spec}\n")
}

/// A field of every agent's status, as `towpath status -o json` has it.
///
/// # Errors
/// It says nothing that can be read.
pub fn said_by_nodes(cluster: &Cluster, field_name: &str) -> Result<Vec<String>> {
    let output =
        Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?.stdout;
    let answers: Vec<Value> = serde_json::from_slice(&output).context("towpath status -o json")?;
    Ok(answers.iter().map(|answer| field(answer, &format!("/status/{field_name}"))).collect())
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
