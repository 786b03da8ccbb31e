//! Ranges of Service addresses that are added, held and taken back while nodes run (`ServiceCIDR`, KEP-1880): what no Service has in
//! them is refused on the node, a Service gets an address from them, and a range that would swallow the cluster's own changes nothing.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Driver, Families, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::pods::{server, shell};

const PATIENCE: Duration = Duration::from_secs(20);
/// In the added range; nobody has it.
const NOBODY: &str = "10.222.7.9";
/// In the added range; the Service asks for it.
const ADDED: &str = "10.222.7.10";

const RANGE: &str = r#"
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: more}
spec: {cidrs: [10.222.0.0/16]}
"#;

const SERVICE: &str = r#"
apiVersion: v1
kind: Service
metadata: {name: added}
spec:
  clusterIP: 10.222.7.10
  selector: {app: web}
  ports: [{port: 8080, targetPort: 80}]
"#;

fn from_node(cluster: &Cluster, url: &str) -> Result<String> {
    Ok(cluster.node("n1", &format!("timeout 3 busybox wget -q -O - http://{url}/ 2>&1"))?.all())
}

fn from_pod(cluster: &Cluster, url: &str) -> Result<String> {
    Ok(cluster.exec("asks", &format!("timeout 3 wget -q -O - http://{url}/ 2>&1"))?.all())
}

fn status(cluster: &Cluster, node: &str) -> Result<Value> {
    let output = Command::new(cluster.towpath()).args(["status", "--lab", cluster.name(), "-o", "json"]).output()?;
    let all: Value = serde_json::from_slice(&output.stdout).context("towpath status")?;
    let own = |answer: &&Value| answer.get("node").and_then(Value::as_str) == Some(node);
    all.as_array().into_iter().flatten().find(own).cloned().context("no such node")
}

fn are_refused(cluster: &Cluster, urls: &[&str]) -> Result<()> {
    for url in urls {
        wait(&format!("{url} to be refused on the node"), PATIENCE, || {
            for said in [from_node(cluster, url)?, from_pod(cluster, url)?] {
                ensure!(said.to_lowercase().contains("refused"), "{said}");
            }
            Ok(())
        })?;
    }
    Ok(())
}

fn answers(cluster: &Cluster) -> Result<()> {
    let url = format!("{ADDED}:8080");
    wait("the Service at an address of the added range", PATIENCE, || {
        for said in [from_node(cluster, &url)?, from_pod(cluster, &url)?] {
            ensure!(said.contains("pod: web\n"), "{said}");
        }
        Ok(())
    })
}

#[test]
fn ranges_come_and_go_while_nodes_run() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-ranges", 2, Families::Ipv4)?;
    if cluster.driver() == Driver::Lab {
        println!("skipped: ServiceCIDRs are deleted with kubectl");
        return cluster.down();
    }
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("asks", "n1", "")))?;
    cluster.wait_pod("asks")?;
    let web = cluster.wait_pod("web")?;
    let first = cluster.get("servicecidr", "kubernetes")?;
    ensure!(first.pointer("/status/conditions/0/status") == Some(&Value::from("True")), "{first}");
    let before = from_node(&cluster, NOBODY)?;
    ensure!(!before.to_lowercase().contains("refused"), "nobody's business before: {before}");
    ensure!(cluster.apply_text(SERVICE).is_err(), "no range has this address yet");

    cluster.apply_text(RANGE)?;
    are_refused(&cluster, &[NOBODY])?;
    cluster.apply_text(SERVICE)?;
    answers(&cluster)?;
    are_refused(&cluster, &[&format!("{ADDED}:8081")])?;
    let said = status(&cluster, "n1")?;
    ensure!(said.pointer("/status/serviceRanges").is_some_and(|r| r.to_string().contains("10.222.0.0/16")), "{said}");
    let address = cluster.get("ipaddress", ADDED)?;
    ensure!(address.pointer("/spec/parentRef/name") == Some(&Value::from("added")), "{address}");

    swallows_nothing(&cluster, &web.ip)?;

    // It stays, and counts, until the Service gives its address back.
    cluster.try_kubectl(&["delete", "servicecidr", "more", "--wait=false"])?;
    wait("the range to wait for its Service", PATIENCE, || {
        let object = cluster.get("servicecidr", "more")?;
        let conditions = object.pointer("/status/conditions").map(Value::to_string).unwrap_or_default();
        if conditions.contains("Terminating") { Ok(()) } else { bail!("{conditions}") }
    })?;
    answers(&cluster)?;
    are_refused(&cluster, &[NOBODY])?;
    cluster.try_kubectl(&["delete", "service", "added"])?;
    wait("the range to be nobody's business again", PATIENCE, || {
        let gone = cluster.get("servicecidr", "more").is_err() && cluster.get("ipaddress", ADDED).is_err();
        let said = from_node(&cluster, NOBODY)?;
        ensure!(gone && !said.to_lowercase().contains("refused"), "gone: {gone}; {said}");
        Ok(())
    })?;
    cluster.down()
}

/// A range that holds the pods themselves: refused by name, and pods are no less endpoints than before.
fn swallows_nothing(cluster: &Cluster, pod: &str) -> Result<()> {
    cluster.apply_text(
        "apiVersion: networking.k8s.io/v1\nkind: ServiceCIDR\nmetadata: {name: odd}\nspec: {cidrs: [10.0.0.0/8]}\n",
    )?;
    wait("the odd range to be named", PATIENCE, || {
        let said = status(cluster, "n1")?.pointer("/status/problems").map(Value::to_string).unwrap_or_default();
        if said.contains("ServiceCIDR odd: 10.0.0.0/8 overlaps the pod range") { Ok(()) } else { bail!("{said}") }
    })?;
    for said in [from_node(cluster, pod)?, from_pod(cluster, pod)?] {
        ensure!(said.contains("pod: web\n"), "{said}");
    }
    answers(cluster)?;
    cluster.try_kubectl(&["delete", "servicecidr", "odd", "--wait=false"])?;
    Ok(())
}
