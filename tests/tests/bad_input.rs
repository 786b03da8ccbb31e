//! What an agent is given that it cannot use is named in its log, in `towpath status`, in its readiness, and on the Node object where the
//! API server can be reached; and nothing is half-installed.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::status_text;
use towpath_walkthrough::machine::can_run_labs;

/// Where the extra agents serve health: the lab's own have 9116.
const HEALTH: &str = "127.0.0.1:9216";

/// An agent with directories of its own, in a node's network namespace.
struct Odd<'a> {
    cluster: &'a Cluster,
    place: PathBuf,
    child: Option<Child>,
}

impl<'a> Odd<'a> {
    fn new(cluster: &'a Cluster, name: &str) -> Result<Self> {
        let place = std::env::temp_dir().join(format!("towpath-odd-{name}-{}", std::process::id()));
        for directory in ["run", "state", "net.d", "bpf"] {
            std::fs::create_dir_all(place.join(directory))?;
        }
        Ok(Self { cluster, place, child: None })
    }

    fn kubeconfig(&self) -> PathBuf {
        let credentials = format!("/var/lib/towpath/lab/{}/credentials", self.cluster.name());
        Path::new(&credentials).join("agent-n1.kubeconfig")
    }

    fn command(&self, extra: &Value) -> Result<Command> {
        let mut config = json!({
            "nodeName": "n1", "kubeconfig": self.kubeconfig(), "metricsListen": HEALTH, "kubeProxyHealth": false,
            "runDir": self.place.join("run"), "stateDir": self.place.join("state"),
            "cniConfDir": self.place.join("net.d"), "bpffs": self.place.join("bpf"),
        });
        for (name, value) in extra.as_object().into_iter().flatten() {
            config.as_object_mut().into_iter().for_each(|config| drop(config.insert(name.clone(), value.clone())));
        }
        let file = self.place.join("agent.json");
        std::fs::write(&file, config.to_string())?;
        let towpath = self.cluster.towpath();
        let mut command = Command::new(towpath);
        command.args(["lab", "exec", "--name", self.cluster.name(), "n1", "--"]).arg(towpath);
        command.args(["agent", "--config"]).arg(file).stdin(Stdio::null());
        Ok(command)
    }

    /// One that must end by itself; what it said.
    fn fails(&self, extra: &Value) -> Result<String> {
        let output = self.command(extra)?.output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "it ended well: {said}");
        self.nothing_installed()?;
        // Nobody answers any more, and why is still known.
        let status = self.status()?;
        let last = said.lines().last().unwrap_or_default().trim_start_matches("towpath: ").to_owned();
        ensure!(status.contains(&last), "status says {status}, the log {said}");
        Ok(said)
    }

    /// One that goes on waiting.
    fn start(&mut self, extra: &Value) -> Result<()> {
        let log = std::fs::File::create(self.place.join("log"))?;
        self.child = Some(self.command(extra)?.stdout(Stdio::null()).stderr(log).spawn()?);
        Ok(())
    }

    /// Waits until the status, the readiness and the log all say this.
    fn waits_and_says(&self, wanted: &str) -> Result<()> {
        wait(&format!("{wanted:?} in status, readiness and log"), Duration::from_secs(20), || {
            let status = self.status()?;
            ensure!(status.contains(wanted), "status: {status}");
            let ready =
                self.cluster.node("n1", &format!("curl -sS -m 3 -w ' %{{http_code}}' http://{HEALTH}/readyz"))?;
            ensure!(ready.out.contains(wanted) && ready.out.ends_with(" 503"), "readyz: {}", ready.all());
            let log = std::fs::read_to_string(self.place.join("log"))?;
            ensure!(log.contains(wanted), "log: {log}");
            Ok(())
        })?;
        self.nothing_installed()
    }

    fn status(&self) -> Result<String> {
        let mut command = Command::new(self.cluster.towpath());
        let output = command.args(["status", "--socket"]).arg(self.place.join("run/agent.sock")).output()?;
        ensure!(!output.status.success(), "towpath status sees no problem");
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    fn nothing_installed(&self) -> Result<()> {
        for directory in ["net.d", "bpf"] {
            let path = self.place.join(directory);
            ensure!(std::fs::read_dir(&path)?.next().is_none(), "something is in {}", path.display());
        }
        Ok(())
    }
}

impl Drop for Odd<'_> {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
        let _ = std::fs::remove_dir_all(&self.place);
    }
}

/// Notes of the Events on a Node object.
fn events(cluster: &Cluster, node: &str) -> Result<Vec<String>> {
    let output = cluster.try_kubectl(&["get", "events", "-o", "json"])?;
    let list: Value = serde_json::from_slice(&output.stdout).context("no list of events")?;
    let of_node =
        |event: &&Value| field(event, "/involvedObject/kind") == "Node" && field(event, "/involvedObject/name") == node;
    let items = list.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
    Ok(items.iter().filter(of_node).filter_map(|event| event.get("message")?.as_str().map(str::to_owned)).collect())
}

fn event(cluster: &Cluster, node: &str, wanted: &str) -> Result<()> {
    wait(&format!("an Event on node {node} with {wanted:?}"), Duration::from_secs(45), || {
        let events = events(cluster, node)?;
        if events.iter().any(|note| note.contains(wanted)) { Ok(()) } else { bail!("{events:?}") }
    })
}

fn has(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    Ok(())
}

#[test]
fn an_agent_that_cannot_run_says_why_and_leaves_nothing() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-bad-ends", 1, Families::Ipv4)?;
    let odd = Odd::new(&cluster, "ends")?;
    let missing = odd.fails(&json!({"kubeconfig": "/no/such/kubeconfig"}))?;
    has(&missing, &["/no/such/kubeconfig", "agent's configuration"])?;
    std::fs::write(odd.place.join("nonsense"), "clusters: 7")?;
    has(&odd.fails(&json!({"kubeconfig": odd.place.join("nonsense")}))?, &["nonsense"])?;
    let overlap = odd.fails(&json!({"clusterCidrs": ["10.244.0.0/16"], "serviceCidrs": ["10.244.128.0/20"]}))?;
    has(&overlap, &["10.244.0.0/16", "10.244.128.0/20", "disjoint"])?;

    // A second agent of a node: the first goes on.
    let second =
        odd.command(&json!({"runDir": format!("/run/towpath/lab/{}/nodes/n1/towpath", cluster.name())}))?.output()?;
    ensure!(!second.status.success(), "a second agent ran");
    has(&String::from_utf8_lossy(&second.stderr), &["another agent runs on this node", "agent.lock"])?;
    let mut status = Command::new(cluster.towpath());
    let first = status.args(["status", "--lab", cluster.name()]).output()?;
    ensure!(first.status.success(), "{}", String::from_utf8_lossy(&first.stdout));
    event(&cluster, "n1", "another agent runs on this node")?;

    // A node whose pod range lies in the network between the nodes.
    let n1 = cluster.nodes()?.first().map(|(_, ip)| ip.clone()).context("no node")?;
    cluster.apply_text("apiVersion: v1\nkind: Node\nmetadata: {name: odd}\nspec: {podCIDR: 192.168.255.128/25, podCIDRs: [192.168.255.128/25]}\n")?;
    let addresses = json!({"status": {"addresses": [{"type": "InternalIP", "address": n1}]}}).to_string();
    let patched =
        cluster.try_kubectl(&["patch", "node", "odd", "--subresource=status", "--type=merge", "-p", &addresses]);
    let patched = patched?;
    ensure!(patched.status.success(), "{}", String::from_utf8_lossy(&patched.stderr));
    let underlay = odd.fails(&json!({"nodeName": "odd"}))?;
    has(&underlay, &["192.168.255.128/25", "192.168.255.0/24", "--cluster-cidr"])?;
    event(&cluster, "odd", "overlaps the node's own network")?;
    drop(odd);
    cluster.down()
}

#[test]
fn an_agent_that_waits_says_for_what_and_leaves_nothing() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-bad-waits", 1, Families::Ipv4)?;
    let good = std::fs::read_to_string(Odd::new(&cluster, "x")?.kubeconfig())?;
    let changed = |odd: &Odd<'_>, from: &str, to: &str| -> Result<Value> {
        let line = good.lines().find(|line| line.trim_start().trim_start_matches("- ").starts_with(from));
        let line = line.with_context(|| format!("no {from} in {good}"))?;
        let indent = line.split(from).next().unwrap_or_default();
        let path = odd.place.join("kubeconfig");
        std::fs::write(&path, good.replace(line, &format!("{indent}{from} {to}")))?;
        Ok(json!({"kubeconfig": path}))
    };

    let mut unreachable = Odd::new(&cluster, "unreachable")?;
    let config = changed(&unreachable, "server:", "https://127.0.0.1:1")?;
    unreachable.start(&config)?;
    unreachable.waits_and_says("waiting for the API server's list of nodes")?;
    drop(unreachable);

    let mut unauthorized = Odd::new(&cluster, "unauthorized")?;
    let config = changed(&unauthorized, "token:", "nobody")?;
    unauthorized.start(&config)?;
    unauthorized.waits_and_says("Unauthorized")?;
    drop(unauthorized);

    let mut unknown = Odd::new(&cluster, "unknown")?;
    unknown.start(&json!({"nodeName": "nowhere"}))?;
    unknown.waits_and_says("node nowhere is not registered yet")?;
    drop(unknown);

    let mut overlap = Odd::new(&cluster, "overlap")?;
    overlap.start(&json!({"clusterCidrs": ["10.99.0.0/16"], "serviceCidrs": ["10.244.0.0/16"]}))?;
    overlap.waits_and_says("overlaps the Service range 10.244.0.0/16")?;
    event(&cluster, "n1", "overlaps the Service range 10.244.0.0/16")?;
    drop(overlap);
    cluster.down()
}

#[test]
fn leftovers_of_others_and_missing_definitions_are_named_while_the_network_goes_on() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-bad-else", 1, Families::Ipv4)?;
    let readyz = || cluster.node("n1", "curl -sS -m 3 -w ' %{http_code}' http://127.0.0.1:9116/readyz");
    let leftover = format!("/run/towpath/lab/{}/nodes/n1/cni/net.d/05-foreign.conflist", cluster.name());
    std::fs::write(&leftover, r#"{"cniVersion":"1.0.0","name":"foreign","plugins":[{"type":"bridge"}]}"#)?;
    let gone = cluster.try_kubectl(&["delete", "crd", "nodenetworks.towpath.dev"])?;
    ensure!(gone.status.success(), "{}", String::from_utf8_lossy(&gone.stderr));
    // A firewall that drops what no rule of it knows, as distributions set one up.
    let firewall = cluster.node(
        "n1",
        "nft add table inet hostfw && nft 'add chain inet hostfw inp { type filter hook input priority 0; policy drop; }' && \
         nft add rule inet hostfw inp ct state established,related accept && \
         nft 'add rule inet hostfw inp iifname { \"lo\", \"eth0\" } accept'",
    )?;
    ensure!(firewall.ok, "{}", firewall.all());
    wait("the leftover to be named", Duration::from_secs(45), || {
        has(&status_text(&cluster)?, &["05-foreign.conflist before ours"])?;
        let ready = readyz()?;
        ensure!(ready.out.contains("05-foreign.conflist") && ready.out.ends_with(" 503"), "{}", ready.all());
        Ok(())
    })?;
    wait("the missing kind to be named", Duration::from_secs(45), || {
        has(&status_text(&cluster)?, &["does not know the kind NodeNetwork"])
    })?;
    event(&cluster, "n1", "05-foreign.conflist before ours")?;
    event(&cluster, "n1", "does not know the kind NodeNetwork")?;
    let named = ["queries to the node's DNS server", "policy of nftables chain inet hostfw inp", "not Towpath's"];
    wait("the firewall to be named", Duration::from_secs(45), || has(&status_text(&cluster)?, &named))?;
    std::fs::remove_file(&leftover)?;
    wait("the agent to be ready again", Duration::from_secs(45), || {
        let ready = readyz()?;
        ensure!(ready.out.ends_with(" 200"), "{}", ready.all());
        Ok(())
    })?;
    cluster.down()
}
