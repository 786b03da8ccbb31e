//! What an operator runs on the second day: `towpath connectivity test` passes on a network that works, finds one that does not
//! carry large packets, and leaves nothing when it is interrupted; `towpath sysdump` has what is needed, and no secret.

use std::collections::BTreeSet;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, wait};
use towpath_walkthrough::machine::can_run_labs;

const NAMESPACE: &str = "towpath-connectivity";

fn connectivity(cluster: &Cluster, args: &[&str]) -> Command {
    let mut command = Command::new(cluster.towpath());
    command.args(["connectivity", "test", "--kubeconfig"]).arg(cluster.kubeconfig()).args(args).stdin(Stdio::null());
    command
}

fn gone(cluster: &Cluster) -> Result<()> {
    let found = cluster.get("namespace", NAMESPACE);
    ensure!(found.is_err(), "namespace {NAMESPACE} is still there: {found:?}");
    Ok(())
}

fn checks(output: &Output) -> Result<Vec<Value>> {
    let said = String::from_utf8_lossy(&output.stderr);
    let document: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("no JSON; it said {said}"))?;
    Ok(document.get("checks").and_then(Value::as_array).cloned().unwrap_or_default())
}

fn names(checks: &[Value], status: &str) -> Vec<String> {
    let those = checks.iter().filter(|check| check["status"] == status);
    those.filter_map(|check| check["name"].as_str().map(str::to_owned)).collect()
}

#[test]
fn a_network_that_works_passes_every_check_in_both_families() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-day-two", 2, Families::Dual)?;
    let junit = std::env::temp_dir().join(format!("towpath-e2e-day-two-{}.xml", std::process::id()));
    let file = junit.to_string_lossy().into_owned();
    let output = connectivity(&cluster, &["--json", "--junit", &file]).output()?;
    let xml = std::fs::read_to_string(&junit).context("no JUnit file was written");
    let _ = std::fs::remove_file(&junit);
    let checks = checks(&output)?;
    ensure!(output.status.success(), "failed: {:?}", names(&checks, "failed"));
    // What would be skipped is the count of drops, and the lab's agents do serve metrics.
    ensure!(names(&checks, "skipped").is_empty(), "skipped: {:?}", names(&checks, "skipped"));
    for kind in
        ["pod-to-pod/full-packet/other-node", "hairpin/udp", "policy/default-deny/other-node", "policy/drop-is-counted"]
    {
        ensure!(names(&checks, "passed").iter().any(|name| name == kind), "{kind} was not tried");
    }
    let six = checks.iter().filter(|check| check["to"].as_str().is_some_and(|to| to.contains("[fd"))).count();
    ensure!(six > 20 && six < checks.len(), "{six} of {} checks are of IPv6", checks.len());
    let xml = xml?;
    ensure!(xml.matches("<testcase ").count() == checks.len() && !xml.contains("<failure"), "{xml}");
    gone(&cluster)?;
    cluster.down()
}

#[test]
fn an_mtu_that_the_path_does_not_carry_is_found_and_named() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-day-two-mtu", 2, Families::Ipv4)?;
    // What a virtual network between the nodes does that carries less than they think.
    let said = cluster.node("n2", "ip link set eth0 mtu 1300")?;
    ensure!(said.ok, "{}", said.all());
    let output = connectivity(&cluster, &["--json", "--only", "pod-to-pod"]).output()?;
    ensure!(output.status.code() == Some(1), "exit {:?}", output.status.code());
    let checks = checks(&output)?;
    let failed = names(&checks, "failed");
    ensure!(failed.iter().any(|name| name == "pod-to-pod/full-packet/other-node"), "failed: {failed:?}");
    ensure!(failed.iter().all(|name| name.ends_with("/other-node")), "one node is well by itself: {failed:?}");
    ensure!(names(&checks, "passed").iter().any(|name| name == "pod-to-pod/tcp/other-node"), "small packets pass");
    let found = checks.iter().find(|check| check["name"] == "pod-to-pod/full-packet/other-node");
    let next = found.map(|check| check["next"].to_string()).unwrap_or_default();
    ensure!(next.contains("less than pods' MTU") && next.contains("towpath explain"), "next: {next}");
    gone(&cluster)?;
    cluster.down()
}

/// Ends it when the test does.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn who_interrupts_it_finds_nothing_left_and_nothing_of_others_is_taken() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-day-two-int", 1, Families::Ipv4)?;
    let child = connectivity(&cluster, &[]).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let mut running = Running(child);
    wait("its namespace", Duration::from_secs(20), || cluster.get("namespace", NAMESPACE).map(drop))?;
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT)?;
    let status = wait("its end", Duration::from_secs(60), || running.0.try_wait()?.context("it still runs"))?;
    ensure!(status.code() == Some(130), "exit {status:?}");
    gone(&cluster)?;

    // A namespace of that name that somebody else made is not taken, and not removed.
    let theirs = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    cluster.apply_text(&theirs)?;
    let output = connectivity(&cluster, &["--replace"]).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    if output.status.success() || !said.contains("--namespace") {
        bail!("it took what is not its own: {said}");
    }
    cluster.get("namespace", NAMESPACE).context("it removed what is not its own")?;
    cluster.down()
}

/// What must not be in a sysdump, wherever it was.
const PLANTED: &str = "planted0secret";

const OBJECTS_WITH_SECRETS: &str = r#"
apiVersion: v1
kind: Secret
metadata: {name: mine, namespace: kube-system}
stringData: {password: planted0secret}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: towpath, namespace: kube-system, annotations: {note: planted0secret}}
data: {agent.yaml: "kubeconfig: /x\ntoken: planted0secret\n"}
---
apiVersion: v1
kind: Service
metadata: {name: web, annotations: {example.com/key: planted0secret}}
spec: {ports: [{port: 80}]}
---
apiVersion: v1
kind: Pod
metadata: {name: towpath-x, namespace: kube-system, labels: {app.kubernetes.io/name: towpath}}
spec:
  nodeName: n1
  containers:
    - name: talks
      image: busybox
      env: [{name: DB_PASSWORD, value: planted0secret}]
      command: [sh, -c, "echo got token=planted0secret from $DB_PASSWORD_FILE; echo Bearer planted0secret; echo all is well; sleep 86400"]
"#;

#[test]
fn a_sysdump_has_what_is_needed_and_no_secret_that_was_planted() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-sysdump", 2, Families::Ipv4)?;
    cluster.apply_text(OBJECTS_WITH_SECRETS)?;
    let log = |wanted: &str| -> Result<()> {
        let said = cluster.try_kubectl(&["-n", "kube-system", "logs", "towpath-x"])?;
        ensure!(String::from_utf8_lossy(&said.stdout).contains(wanted), "{said:?}");
        Ok(())
    };
    wait("the pod to talk", Duration::from_secs(20), || log("all is well"))?;
    log(PLANTED)?;
    let net_d = format!("/run/towpath/lab/{}/nodes/n1/cni/net.d", cluster.name());
    let foreign =
        format!(r#"{{"name":"other","plugins":[{{"type":"x","kubernetes":{{"k8sAuthToken":"{PLANTED}"}}}}]}}"#);
    std::fs::write(format!("{net_d}/90-other.conflist"), foreign)?;
    std::fs::write(format!("{net_d}/other-kubeconfig"), format!("users: [{{user: {{token: {PLANTED}}}}}]"))?;

    let place = std::env::temp_dir().join(format!("towpath-e2e-sysdump-{}", std::process::id()));
    std::fs::create_dir_all(&place)?;
    let file = place.join("dump.tar.gz");
    let mut dump = Command::new(cluster.towpath());
    let output = dump.args(["sysdump", "--lab", cluster.name(), "--output"]).arg(&file).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let untar = Command::new("tar").arg("xzf").arg(&file).arg("-C").arg(&place).output()?;
    ensure!(untar.status.success(), "{}", String::from_utf8_lossy(&untar.stderr));
    std::fs::remove_file(&file)?;

    let root = place.join("towpath-sysdump");
    let grep = Command::new("grep").args(["-rl", PLANTED]).arg(&place).output()?;
    ensure!(grep.stdout.is_empty(), "a secret is in {}", String::from_utf8_lossy(&grep.stdout));
    let read = |path: &str| std::fs::read_to_string(root.join(path)).with_context(|| path.to_owned());
    for (path, wanted) in [
        ("MANIFEST.json", "nodes/n2/agent/status.json"),
        ("cluster/nodes.json", "podCIDRs"),
        ("cluster/services.json", "\"web\""),
        ("towpath/nodenetworks.json", "tunnelAddress"),
        ("logs/towpath-x/talks.log", "all is well"),
        ("logs/n1/agent.log", "ready"),
        ("nodes/n1/agent/status.json", "\"ready\": true"),
        ("nodes/n1/agent/metrics.txt", "towpath_drop_packets_total"),
        ("nodes/n1/carry/counters.json", "udpQueries"),
        ("nodes/n1/bpf/pins.txt", "tp_"),
        ("nodes/n1/bpf/features.txt", "yes BPF_PROG_TYPE_SCHED_CLS"),
        ("nodes/n1/cni/10-towpath.conflist", "towpath-cni"),
        ("nodes/n1/cni/90-other.conflist", "k8sAuthToken"),
        ("nodes/n2/net/devices.txt", "192.168.255.12/24"),
        ("nodes/n1/net/nftables.json", "towpath"),
    ] {
        ensure!(read(path)?.contains(wanted), "{path} lacks {wanted}: {}", read(path)?);
    }
    // What is missing is said: the lab runs no DaemonSet.
    ensure!(read("MANIFEST.json")?.contains("towpath/daemonset.json"), "{}", read("MANIFEST.json")?);
    std::fs::remove_dir_all(&place)?;
    cluster.down()
}

/// Names of our metrics in a text of queries, and what `by (…)` and matchers expect of their labels is left to people.
fn metric_names(text: &str) -> BTreeSet<String> {
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let words = text.split(|c: char| !part(c));
    words.filter(|word| word.starts_with("towpath_")).map(str::to_owned).collect()
}

/// Every expression of a document, wherever it is.
fn expressions(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(fields) => {
            found.extend(fields.get("expr").and_then(Value::as_str).map(str::to_owned));
            fields.values().for_each(|value| expressions(value, found));
        }
        Value::Array(list) => list.iter().for_each(|value| expressions(value, found)),
        _ => {}
    }
}

#[test]
fn what_dashboard_alerts_and_documents_ask_for_is_what_agents_serve() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-metrics", 1, Families::Ipv4)?;
    cluster.apply_text("apiVersion: v1\nkind: Pod\nmetadata: {name: a}\nspec: {containers: [{name: a, image: busybox, command: [sleep, \"86400\"]}]}\n")?;
    cluster.wait_pod("a")?;
    let said = cluster.node("n1", "curl -sS -i -m 3 http://127.0.0.1:9116/metrics")?;
    ensure!(said.out.contains("application/openmetrics-text"), "{}", said.all());
    ensure!(said.out.trim_end().ends_with("# EOF"), "the exposition has no end: {}", said.out);
    let samples = said.out.lines().filter(|line| line.starts_with("towpath_"));
    let mut served: BTreeSet<String> =
        samples.filter_map(|line| line.split(['{', ' ']).next()).map(str::to_owned).collect();
    // A family without samples yet (nothing has gone wrong) is declared.
    for line in said.out.lines().filter_map(|line| line.strip_prefix("# TYPE ")) {
        if let Some((name, "counter")) = line.split_once(' ') {
            served.insert(format!("{name}_total"));
        }
    }
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let read = |path: &str| std::fs::read_to_string(root.join(path)).with_context(|| path.to_owned());
    let dashboard: Value = serde_json::from_str(&read("deploy/monitoring/dashboard.json")?)?;
    let mut asked = Vec::new();
    expressions(&dashboard, &mut asked);
    ensure!(asked.len() > 30, "{} expressions in the dashboard", asked.len());
    let alerts = read("deploy/monitoring/alerts.yaml")?;
    asked.extend(alerts.lines().filter_map(|line| line.trim().strip_prefix("expr: ")).map(str::to_owned));
    for expression in &asked {
        for name in metric_names(expression) {
            ensure!(served.contains(&name), "{name} of {expression:?} is not served: {served:?}");
        }
    }
    // Reasons that an alert names are reasons.
    let reasons = alerts.split("reason=~\"").nth(1).and_then(|rest| rest.split('"').next()).context("no reasons")?;
    for reason in reasons.split('|') {
        ensure!(said.out.contains(&format!("reason=\"{reason}\"")), "no drop has the reason {reason}");
    }
    // And what is served is explained: by its whole name, or without the prefix in a row of its kind.
    let operations = read("docs/operations.md")?;
    for name in &served {
        let name = ["_bucket", "_sum", "_count"]
            .iter()
            .fold(name.as_str(), |name, end| name.strip_suffix(end).unwrap_or(name));
        let short = name.strip_prefix("towpath").unwrap_or(name);
        ensure!(operations.contains(short), "docs/operations.md does not explain {name}");
    }
    cluster.down()
}
