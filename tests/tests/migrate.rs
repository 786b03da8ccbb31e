//! Nodes of Flannel are taken over one by one, on a running cluster, and one goes back: at every step every pod reaches every other,
//! and between pods that nobody recreates not a packet is lost. Pods are made by the lab's kubelets through whatever CNI
//! configuration a node has at that moment.

#[path = "migrate/agent.rs"]
mod agent;
#[path = "migrate/flannel.rs"]
mod flannel;
#[path = "migrate/strangers.rs"]
mod strangers;
#[path = "migrate/traffic.rs"]
mod traffic;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, Pod, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};

use agent::{Agent, PATIENCE, log_of, node_command, ready, status};
use flannel::{Backend, Files, FlannelNode, conf_dir, on_node, run_dir, state_dir};
use traffic::Traffic;

const ANSWER: Duration = Duration::from_secs(3);

/// A cluster of Flannel's with a pod on every node.
struct Walk {
    cluster: Cluster,
    backend: Backend,
    nodes: Vec<FlannelNode>,
    agents: BTreeMap<String, Agent>,
    pods: BTreeMap<String, Pod>,
    ips: BTreeMap<String, Vec<String>>,
    _files: Files,
}

impl Walk {
    fn new(name: &str, backend: Backend) -> Result<Self> {
        let towpath = towpath_walkthrough::cluster::towpath_binary()?;
        let files = Files::new(name, &towpath, backend)?;
        let cluster = files.lab(name, 3, backend.families())?;
        let nodes = flannel::start(&cluster, backend)?;
        let mut walk = Self {
            cluster,
            backend,
            nodes,
            agents: BTreeMap::new(),
            pods: BTreeMap::new(),
            ips: BTreeMap::new(),
            _files: files,
        };
        for node in ["n1", "n2", "n3"] {
            walk.run(&format!("old-{node}"), node)?;
        }
        Ok(walk)
    }

    /// A pod that serves, by whichever network the node has now.
    fn run(&mut self, name: &str, node: &str) -> Result<Pod> {
        self.cluster.apply_text(&format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: {name}}}}}\nspec:\n  nodeName: {node}\n  \
             terminationGracePeriodSeconds: 0\n  containers: [{{name: web, image: nginx, ports: [{{containerPort: 80}}]}}]\n"
        ))?;
        let pod = self.cluster.wait_pod(name).with_context(|| log_of(&self.cluster, node))?;
        let ips: Vec<String> = pod.ips.iter().map(ToString::to_string).collect();
        let expected = if self.backend.families() == Families::Dual { 2 } else { 1 };
        ensure!(ips.len() == expected, "{name} has addresses {ips:?}");
        self.ips.insert(name.to_owned(), ips);
        self.pods.insert(name.to_owned(), pod.clone());
        Ok(pod)
    }

    fn delete(&mut self, name: &str) -> Result<()> {
        let out = self.cluster.try_kubectl(&["delete", "pod", name, "--wait=true"])?;
        ensure!(out.status.success(), "delete {name}: {}", String::from_utf8_lossy(&out.stderr));
        self.pods.remove(name);
        Ok(())
    }

    fn place(&self, pod: &str) -> Result<(Place, Pod)> {
        let pod = self.pods.get(pod).with_context(|| format!("no pod {pod}"))?;
        Ok((Place::of_pod(&self.cluster, pod)?, pod.clone()))
    }

    /// Every pod asks every other and every node, and every node asks every pod.
    fn everybody_reaches_everybody(&self, when: &str) -> Result<()> {
        let mut from = Vec::new();
        for name in self.pods.keys() {
            from.push((name.clone(), self.place(name)?.0));
        }
        for node in &self.nodes {
            from.push((node.name.clone(), Place::of_node(&self.cluster, &node.name)?));
        }
        let mut targets = Vec::new();
        for pod in self.pods.values() {
            targets.push((pod, self.addresses(&pod.name)?));
        }
        for (name, place) in from.iter().filter(|(name, _)| self.pods.contains_key(name)) {
            for node in &self.nodes {
                for ip in std::iter::once(&node.ip).chain(node.v6.as_ref().map(|v6| &v6.ip)) {
                    let answered = place.enter(|| traffic::answers(ip))?;
                    ensure!(answered, "{when}: {name} to node {} ({ip})\n{}", node.name, self.states());
                }
            }
        }
        for (name, place) in &from {
            for (pod, ips) in targets.iter().filter(|(pod, _)| pod.name != *name) {
                for ip in *ips {
                    let to = SocketAddr::new(address(ip)?, 80);
                    let answer = place.enter(|| Session::open(to, ANSWER)?.ask(ANSWER));
                    answer.with_context(|| {
                        format!("{when}: {name} to {} ({ip}, {})\n{}", pod.name, pod.node, self.states())
                    })?;
                }
            }
        }
        Ok(())
    }

    /// All addresses of a pod.
    fn addresses(&self, pod: &str) -> Result<&[String]> {
        self.ips.get(pod).map(Vec::as_slice).with_context(|| format!("no pod {pod}"))
    }

    fn states(&self) -> String {
        let mut text = String::new();
        for node in &self.nodes {
            let said = self.cluster.node(
                &node.name,
                "ip -br addr; ip route; ip -6 route; ip neigh; ip -6 neigh show proxy; bridge fdb show dev flannel.1",
            );
            text += &format!("--- {}\n{}\n", node.name, said.map(|said| said.all()).unwrap_or_default());
            if let Ok(status) = status(&self.cluster, &node.name) {
                text += &format!("{status}\n");
            }
            if self.agents.contains_key(&node.name) {
                text += &log_of(&self.cluster, &node.name);
            }
        }
        text
    }

    /// Pings and connections between all pods of these names while something is done.
    fn under_traffic<T>(&mut self, when: &str, pods: &[&str], work: impl FnOnce(&mut Self) -> Result<T>) -> Result<T> {
        let mut traffic = Traffic::default();
        for from in pods {
            let (place, _) = self.place(from)?;
            for to in pods.iter().filter(|to| to != &from) {
                for ip in self.addresses(to)? {
                    traffic.between(&place, to, ip)?;
                }
            }
        }
        let done = work(self);
        let lost = traffic.end();
        let done = done.with_context(|| when.to_owned())?;
        let lost = lost.with_context(|| when.to_owned())?;
        ensure!(lost.is_empty(), "{when}: {}\n{}", lost.join("\n"), self.states());
        Ok(done)
    }

    fn take_over(&mut self, node: &str) -> Result<Value> {
        let agent = Agent::start(&self.cluster, node, 1)?;
        self.agents.insert(node.to_owned(), agent);
        ready(&self.cluster, node)
    }
}

fn conf_files(lab: &str, node: &str) -> Vec<String> {
    let entries = std::fs::read_dir(conf_dir(lab, node)).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect();
    names.sort();
    names
}

impl Walk {
    fn migrate(&self, node: &str, arguments: &[&str]) -> Result<(bool, String)> {
        let config = Agent::config(&self.cluster, node, 1)?.display().to_string();
        let mut all = vec!["migrate", "--config", &config];
        all.extend(arguments);
        node_command(&self.cluster, node, &all)
    }

    fn uninstall(&self, node: &str) -> Result<(bool, String)> {
        let lab = self.cluster.name();
        let (state, run) = (state_dir(lab, node), run_dir(lab, node));
        let text = |path: PathBuf| path.display().to_string();
        let (bin, conf, bpffs) = (text(state.join("no-plugins")), text(conf_dir(lab, node)), text(run.join("bpf")));
        let (run, state) = (text(run.join("towpath")), text(state.join("towpath")));
        let directories = [
            "uninstall",
            "--bin-dir",
            &bin,
            "--conf-dir",
            &conf,
            "--bpffs",
            &bpffs,
            "--run-dir",
            &run,
            "--state-dir",
            &state,
        ];
        node_command(&self.cluster, node, &directories)
    }

    /// Addresses that `host-local` has given on a node.
    fn leases(&self, node: &str) -> Vec<String> {
        let dir = state_dir(self.cluster.name(), node).join("cni/networks").join(self.backend.network());
        let names = std::fs::read_dir(dir).into_iter().flatten().flatten();
        let names = names.map(|e| e.file_name().to_string_lossy().into_owned());
        let mut addresses: Vec<String> = names.filter(|name| address(name).is_ok()).collect();
        addresses.sort();
        addresses
    }

    fn pods_of_predecessor(&self, node: &str, expected: &Value) -> Result<()> {
        wait(&format!("status of {node} to name {expected} as pods that are still Flannel's"), PATIENCE, || {
            let status = self::status(&self.cluster, node)?;
            let pods = status.pointer("/podsOfPredecessor").cloned().unwrap_or_else(|| json!([]));
            if pods == *expected { Ok(()) } else { bail!("{status}") }
        })
    }

    /// A pod in the place of another.
    fn recreate(&mut self, name: &str, successor: &str, node: &str) -> Result<()> {
        let before = self.pods.get(name).map(|pod| pod.ip.clone()).unwrap_or_default();
        self.delete(name)?;
        let pod = self.run(successor, node)?;
        ensure!(pod.ip != before, "{before} is used again at once");
        Ok(())
    }

    /// A policy of a pod here names pods that are Flannel's, on this node's bridge and behind Flannel's tunnel, by their labels.
    fn policy_knows_old_pods(&self) -> Result<()> {
        let policy = |peer: &str| {
            format!(
                "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: friends}}\nspec:\n  podSelector: \
                 {{matchLabels: {{app: kept-n1}}}}\n  ingress: [{{from: [{{podSelector: {{matchLabels: {{app: {peer}}}}}}}]}}]\n"
            )
        };
        let to = SocketAddr::new(address(&self.place("kept-n1")?.1.ip)?, 80);
        let reaches = |pod: &str| -> Result<bool> {
            let (place, _) = self.place(pod)?;
            place.enter(|| Ok(Session::open(to, Duration::from_millis(500)).is_ok()))
        };
        let all = ["old-n1", "old-n2", "old-n3"];
        for friend in all {
            self.cluster.apply_text(&policy(friend))?;
            wait(&format!("only {friend} to reach the pod"), PATIENCE, || {
                for pod in all {
                    ensure!(reaches(pod)? == (pod == friend), "{pod}, while {friend} is the friend");
                }
                Ok(())
            })?;
        }
        let out = self.cluster.try_kubectl(&["delete", "networkpolicy", "friends"])?;
        ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        wait("everybody to reach the pod again", PATIENCE, || {
            for pod in all {
                ensure!(reaches(pod)?, "{pod} does not");
            }
            Ok(())
        })
    }

    fn no_address_twice(&self) -> Result<()> {
        for pod in self.pods.values() {
            let same = self.pods.values().filter(|other| other.ip == pod.ip).count();
            ensure!(same == 1, "{} is given {same} times", pod.ip);
        }
        Ok(())
    }
}

fn walk(name: &str, backend: Backend) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new(name, backend)?;
    walk.everybody_reaches_everybody("before")?;
    let mut staying = vec!["old-n1", "old-n2", "old-n3"];
    let nodes = [("n1", "new-n1"), ("n2", "new-n2"), ("n3", "new-n3")];
    for (step, (node, new)) in nodes.into_iter().enumerate() {
        // The agent comes; nothing that runs notices.
        let status = walk.under_traffic(&format!("taking {node} over"), &staying, |walk| walk.take_over(node))?;
        ensure!(conf_files(name, node).contains(&"10-towpath.conflist".to_owned()), "no configuration of ours");
        ensure!(!conf_files(name, node).contains(&backend.conflist().to_owned()), "Flannel's is still read");
        walk.pods_of_predecessor(node, &json!([format!("default/old-{node}")]))?;
        let peers = status.pointer("/peers").and_then(Value::as_array).into_iter().flatten();
        let flannels =
            peers.filter(|peer| peer.get("network") == Some(&json!("flannel"))).filter_map(|peer| peer.get("node"));
        let flannels: Vec<&str> = flannels.filter_map(Value::as_str).collect();
        let still = nodes.iter().skip(step + 1).map(|(node, _)| *node);
        for other in still {
            ensure!(flannels.contains(&other), "{other} is not said to be Flannel's: {status}");
        }
        ensure!(!flannels.contains(&node), "{node} is said to be Flannel's: {status}");
        let problems = status.pointer("/problems").and_then(Value::as_array).into_iter().flatten();
        let problems: Vec<&str> = problems.filter_map(Value::as_str).filter(|p| !p.contains("recreate it")).collect();
        ensure!(problems.is_empty(), "{node}: {problems:?}\n{}", walk.states());
        walk.everybody_reaches_everybody(&format!("{node} taken over"))?;
        // A new pod comes beside the old one, with an address of its own.
        walk.under_traffic(&format!("a new pod on {node}"), &staying, |walk| walk.run(new, node))?;
        walk.no_address_twice()?;
        staying.push(new);
        walk.everybody_reaches_everybody(&format!("a new pod on {node}"))?;
        // It is not the time to take anything away, and the agent may come and go.
        let (done, said) = walk.migrate(node, &["--clean"])?;
        ensure!(!done && said.contains(&format!("default/old-{node}")), "cleaning under a pod: {said}");
        if backend == Backend::Canal {
            let address = &walk.place(&format!("old-{node}"))?.1.ip;
            ensure!(said.contains(&format!(" of default/old-{node} ({address})")), "whose device is it? {said}");
        }
        walk.under_traffic(&format!("the agent of {node} starts again"), &staying, |walk| {
            walk.agents.get_mut(node).context("no agent")?.stop()?;
            walk.take_over(node)
        })?;
    }
    clean_up(&mut walk)
}

/// A container of Canal's that Kubernetes does not know: what `--clean` would take from it is named, and taken only by force.
fn a_stray_of_canals(walk: &Walk, node: &str) -> Result<()> {
    let address = walk.nodes.iter().find(|n| n.name == node).context("no such node")?.network.replace(".0", ".99");
    let script = format!(
        "ip link add cali00c0ffee00 type veth peer name stray0\nip link set cali00c0ffee00 up\n\
         ip route add {address}/32 dev cali00c0ffee00"
    );
    on_node(&walk.cluster, node, &script)?;
    let (done, said) = walk.migrate(node, &["--clean"])?;
    ensure!(!done && said.contains(&format!("cali00c0ffee00 of a container without a lease ({address})")), "{said}");
    let (done, said) = walk.migrate(node, &["--clean", "--force"])?;
    ensure!(done && said.contains("is gone"), "by force: {said}\n{}", log_of(&walk.cluster, node));
    Ok(())
}

/// The old pods are recreated, node after node, and what Flannel left is taken away under the traffic of the others.
fn clean_up(walk: &mut Walk) -> Result<()> {
    let new = ["new-n1", "new-n2", "new-n3"];
    let name = walk.cluster.name().to_owned();
    for (node, old, young) in [("n1", "old-n1", "young-n1"), ("n2", "old-n2", "young-n2"), ("n3", "old-n3", "young-n3")]
    {
        ensure!(!walk.leases(node).is_empty(), "leases of {node}: {:?}", walk.leases(node));
        walk.under_traffic(&format!("{old} is recreated"), &new, |walk| walk.recreate(old, young, node))?;
        walk.no_address_twice()?;
        wait("the lease of a pod that is gone to go", PATIENCE, || {
            if walk.leases(node).is_empty() { Ok(()) } else { bail!("{:?}", walk.leases(node)) }
        })?;
        walk.pods_of_predecessor(node, &json!([]))?;
        walk.under_traffic(&format!("cleaning {node}"), &new, |walk| {
            if walk.backend == Backend::Canal && node == "n1" {
                return a_stray_of_canals(walk, node);
            }
            let (done, said) = walk.migrate(node, &["--clean"])?;
            ensure!(done, "cleaning {node}: {said}\n{}", log_of(&walk.cluster, node));
            Ok(())
        })?;
        let left =
            on_node(&walk.cluster, node, "ip -o link show; ip route; nft list ruleset; iptables-save 2>/dev/null")?;
        for what in ["flannel", "FLANNEL", "cni0", "cali"] {
            ensure!(!left.contains(what), "{what} is still on {node}:\n{left}");
        }
        ensure!(left.contains("towpath-vx"), "no tunnel device of ours on {node}:\n{left}");
        ensure!(conf_files(&name, node) == ["10-towpath.conflist"], "{:?}", conf_files(&name, node));
        let (done, said) = walk.migrate(node, &["--check"])?;
        ensure!(done && said.contains("taken over"), "{said}");
        walk.everybody_reaches_everybody(&format!("{node} cleaned"))?;
    }
    // Nobody needs the annotations any more.
    walk.under_traffic("the annotations go", &new, |walk| {
        for node in ["n1", "n2", "n3"] {
            let gone =
                ["backend-type", "backend-data", "public-ip", "kube-subnet-manager", "backend-v6-data", "public-ipv6"]
                    .map(|key| format!("flannel.alpha.coreos.com/{key}-"));
            let mut arguments = vec!["annotate", "node", node];
            arguments.extend(gone.iter().map(String::as_str));
            let out = walk.cluster.try_kubectl(&arguments)?;
            ensure!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        }
        std::thread::sleep(Duration::from_secs(1));
        Ok(())
    })?;
    walk.everybody_reaches_everybody("without annotations")?;
    for node in ["n1", "n2", "n3"] {
        let problems = status(&walk.cluster, node)?.pointer("/problems").cloned();
        ensure!(problems == Some(json!([])), "{node}: {problems:?}");
    }
    Ok(())
}

#[test]
fn nodes_of_flannels_vxlan_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgvx", Backend::Vxlan)
}

#[test]
fn nodes_of_flannels_host_gw_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mggw", Backend::HostGw)
}

#[test]
fn nodes_of_canal_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgca", Backend::Canal)
}

#[test]
fn nodes_of_flannels_vxlan_of_both_families_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgds", Backend::Dual)
}

#[test]
fn nodes_of_flannels_vxlan_with_direct_routing_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgdr", Backend::Direct)
}

#[test]
fn nodes_of_flannels_vxlan_over_another_card_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgif", Backend::Card)
}

#[test]
fn nodes_of_flannels_host_gw_over_another_card_are_taken_over_one_by_one() -> Result<()> {
    walk("e2e-mgig", Backend::CardHostGw)
}

/// One node is taken over, and goes back to Flannel: pods that were there all the time notice nothing.
fn back(name: &str, backend: Backend) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new(name, backend)?;
    let old = ["old-n1", "old-n2", "old-n3"];
    let before = on_node(&walk.cluster, "n1", "ip route show table main | grep -v veth; ip -o link | cut -d: -f2")?;
    walk.under_traffic("there", &old, |walk| walk.take_over("n1"))?;
    walk.run("new-n1", "n1")?;
    walk.everybody_reaches_everybody("there")?;
    walk.under_traffic("and back", &old, |walk| {
        let (done, said) = walk.uninstall("n1")?;
        ensure!(!done && said.contains("agent runs"), "under a running agent: {said}");
        walk.agents.get_mut("n1").context("no agent")?.stop()?;
        walk.agents.remove("n1");
        let (done, said) = walk.uninstall("n1")?;
        ensure!(!done && said.contains("new-n1"), "under a pod: {said}");
        // Without an agent its DEL waits on disk; the pod goes with --force, as documented, or after the agent did it.
        walk.take_over("n1")?;
        walk.delete("new-n1")?;
        // The object is gone at once, its sandbox a little later.
        let leases = state_dir(name, "n1").join("towpath/leases");
        wait("the pod's lease to be given back", PATIENCE, || {
            let names = std::fs::read_dir(&leases)?.flatten().map(|e| e.file_name().to_string_lossy().into_owned());
            let left: Vec<String> = names.filter(|name| name.ends_with(".lease")).collect();
            if left.is_empty() { Ok(()) } else { bail!("{left:?}") }
        })?;
        walk.agents.get_mut("n1").context("no agent")?.stop()?;
        walk.agents.remove("n1");
        let (done, said) = walk.uninstall("n1")?;
        ensure!(done && said.contains("10-flannel.conflist"), "{said}");
        Ok(())
    })?;
    ensure!(conf_files(name, "n1") == ["10-flannel.conflist"], "{:?}", conf_files(name, "n1"));
    let after = on_node(&walk.cluster, "n1", "ip route show table main | grep -v veth; ip -o link | cut -d: -f2")?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    let pod = walk.under_traffic("a pod of Flannel's", &old, |walk| walk.run("again-n1", "n1"))?;
    ensure!(walk.leases("n1").contains(&pod.ip), "{} is no lease of Flannel's", pod.ip);
    walk.no_address_twice()?;
    walk.everybody_reaches_everybody("back")
}

#[test]
fn a_node_goes_back_to_flannels_vxlan() -> Result<()> {
    back("e2e-mgbv", Backend::Vxlan)
}

#[test]
fn a_node_goes_back_to_flannels_host_gw() -> Result<()> {
    back("e2e-mgbg", Backend::HostGw)
}

/// A node from which everything of Flannel's is gone lives beside nodes of Flannel's, and so does one that Flannel never knew.
#[test]
fn a_clean_node_lives_beside_flannels() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new("e2e-mgcl", Backend::Vxlan)?;
    walk.take_over("n1")?;
    walk.run("kept-n1", "n1")?;
    walk.policy_knows_old_pods()?;
    walk.recreate("old-n1", "new-n1", "n1")?;
    walk.pods_of_predecessor("n1", &json!([]))?;
    walk.everybody_reaches_everybody("recreated")?;
    let (done, said) = walk.migrate("n1", &["--clean"])?;
    ensure!(done, "{said}\n{}", log_of(&walk.cluster, "n1"));
    walk.everybody_reaches_everybody("clean, and known by its old MAC address")?;
    let gone = ["backend-type", "backend-data", "public-ip", "kube-subnet-manager"]
        .map(|key| format!("flannel.alpha.coreos.com/{key}-"));
    let mut arguments = vec!["annotate", "node", "n1"];
    arguments.extend(gone.iter().map(String::as_str));
    walk.cluster.try_kubectl(&arguments)?;
    let data = wait("the agent to tell Flannel how to reach its node", PATIENCE, || {
        let node = walk.cluster.get("node", "n1")?;
        let annotations = node.pointer("/metadata/annotations").cloned().unwrap_or_default();
        let get = |key: &str| {
            annotations.get(format!("flannel.alpha.coreos.com/{key}")).and_then(Value::as_str).map(str::to_owned)
        };
        ensure!(get("public-ip").as_deref() == Some("192.168.255.11"), "{annotations}");
        get("backend-data").context("no backend-data")
    })?;
    let data: Value = serde_json::from_str(&data)?;
    let mac = data.get("VtepMAC").and_then(Value::as_str).context("no VtepMAC")?.to_owned();
    let mut nodes = walk.nodes.clone();
    for node in nodes.iter_mut().filter(|node| node.name == "n1") {
        ensure!(node.mac != mac, "{mac} is the device's that is gone");
        node.mac.clone_from(&mac);
    }
    for node in nodes.iter().filter(|node| node.name != "n1") {
        flannel::learn(&walk.cluster, node, &nodes, Backend::Vxlan)?;
    }
    walk.everybody_reaches_everybody("known by its own MAC address")
}

/// An agent with another tunnel than Flannel's says what is wrong, and changes nothing.
#[test]
fn a_node_whose_tunnel_does_not_fit_stays_flannels() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new("e2e-mgno", Backend::Vxlan)?;
    let look = "ip -o link | cut -d: -f2-; ip route; nft list tables; sysctl net.ipv4.conf.cni0.proxy_arp";
    let before = on_node(&walk.cluster, "n1", look)?;
    walk.under_traffic("an agent that does not fit", &["old-n1", "old-n2", "old-n3"], |walk| {
        let _agent = Agent::start(&walk.cluster, "n1", 116)?;
        wait("the agent to say what is wrong", PATIENCE, || {
            let log = log_of(&walk.cluster, "n1");
            ensure!(log.contains("identifier 1, and ours is 116") && log.contains("spec.vxlan.vni"), "{log}");
            Ok(())
        })
    })?;
    ensure!(conf_files("e2e-mgno", "n1") == ["10-flannel.conflist"], "{:?}", conf_files("e2e-mgno", "n1"));
    let after = on_node(&walk.cluster, "n1", look)?;
    ensure!(before == after, "before:\n{before}\nafter:\n{after}");
    walk.run("again-n1", "n1")?;
    walk.everybody_reaches_everybody("as before")
}

/// What kube-proxy does for pods of the network before goes on: a connection that it translated, and new ones.
#[test]
fn pods_of_flannels_keep_their_services() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut walk = Walk::new("e2e-mgsv", Backend::Vxlan)?;
    let backend = walk.place("old-n2")?.1.ip;
    let rule = format!(
        "iptables -t nat -A PREROUTING -d 10.96.77.7/32 -p tcp --dport 80 -j DNAT --to-destination {backend}:80"
    );
    on_node(&walk.cluster, "n1", &rule)?;
    let (place, _) = walk.place("old-n1")?;
    let service = SocketAddr::from(([10, 96, 77, 7], 80));
    let mut open = place.enter(|| Session::open(service, ANSWER))?;
    ensure!(open.ask(ANSWER)?.contains("old-n2"), "the Service leads elsewhere");
    walk.take_over("n1")?;
    walk.pods_of_predecessor("n1", &json!(["default/old-n1"]))?;
    for _ in 0..3 {
        open.ask(ANSWER).context("over the connection from before")?;
        place.enter(|| Session::open(service, ANSWER)?.ask(ANSWER)).context("a new connection")?;
    }
    Ok(())
}
