//! Random clusters under random policies: what the network does against what the documentation says it should do.
//!
//! The seed is printed; `TOWPATH_SEED` repeats a run.

#![allow(clippy::indexing_slicing, reason = "indexes come from the dice, below the length")]

use std::fmt::Write as _;
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_oracle::{Cluster as Objects, Traffic, allowed};
use towpath_walkthrough::cluster::{Cluster, Families, Pod, field, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, address};

const SEED: u64 = 0x70_77_70_61_74_68;
const ROUNDS: usize = 5;
const SPACES: [&str; 3] = ["red", "green", "blue"];
const PODS_EACH: usize = 3;
const SAMPLE: usize = 60;
/// Named `web`, named `admin`, and a UDP port.
const TCP: [u16; 2] = [80, 8080];
const UDP: u16 = 9000;

/// SplitMix64 (Steele, Lea, Flood 2014): small, and the same on every machine.
struct Dice(u64);

impl Dice {
    fn roll(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.roll() % limit as u64) as usize
    }

    fn one_in(&mut self, chances: usize) -> bool {
        self.below(chances) == 0
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }

    fn labels(&mut self) -> String {
        format!("tier={} app={}", self.pick(&["front", "back"]), self.pick(&["x", "v", "z"]))
    }

    fn pod_selector(&mut self) -> String {
        match self.below(5) {
            0 => "{}".to_owned(),
            1 | 2 => format!("{{matchLabels: {{tier: {}}}}}", self.pick(&["front", "back"])),
            3 => format!("{{matchLabels: {{app: {}}}}}", self.pick(&["x", "v", "z"])),
            _ => format!(
                "{{matchExpressions: [{{key: app, operator: {}, values: [\"{}\", \"{}\"]}}]}}",
                self.pick(&["In", "NotIn"]),
                self.pick(&["x", "v"]),
                self.pick(&["v", "z"]),
            ),
        }
    }

    fn namespace_selector(&mut self) -> String {
        match self.below(4) {
            0 => "{}".to_owned(),
            1 => format!("{{matchLabels: {{kubernetes.io/metadata.name: {}}}}}", self.pick(&SPACES)),
            2 => "{matchExpressions: [{key: warm, operator: Exists}]}".to_owned(),
            _ => "{matchExpressions: [{key: warm, operator: DoesNotExist}]}".to_owned(),
        }
    }

    fn peer(&mut self, pods: &[Pod]) -> String {
        match self.below(4) {
            0 => format!("{{podSelector: {}}}", self.pod_selector()),
            1 => format!("{{namespaceSelector: {}}}", self.namespace_selector()),
            2 => format!("{{namespaceSelector: {}, podSelector: {}}}", self.namespace_selector(), self.pod_selector()),
            _ => {
                let (one, other) = (self.below(pods.len()), self.below(pods.len()));
                let wide = ["10.244.0.0/16", "10.244.0.0/24", "10.244.1.0/24", "0.0.0.0/0"];
                let narrow = format!("{}/32", pods[one].ip);
                let cidr = if self.one_in(2) { narrow } else { self.pick(&wide).to_owned() };
                let inside = cidr == "0.0.0.0/0" || cidr == "10.244.0.0/16";
                if inside && self.one_in(2) {
                    format!("{{ipBlock: {{cidr: {cidr}, except: [{}/32]}}}}", pods[other].ip)
                } else {
                    format!("{{ipBlock: {{cidr: {cidr}}}}}")
                }
            }
        }
    }

    fn port(&mut self) -> String {
        match self.below(7) {
            0 => "{port: 80}".to_owned(),
            1 => "{port: web}".to_owned(),
            2 => "{port: admin}".to_owned(),
            3 => "{port: 79, endPort: 8079}".to_owned(),
            4 => "{protocol: UDP}".to_owned(),
            5 => "{protocol: UDP, port: 9000}".to_owned(),
            _ => "{protocol: TCP}".to_owned(),
        }
    }

    fn rules(&mut self, side: &str, pods: &[Pod]) -> String {
        let rules: Vec<String> = (0..self.below(3))
            .map(|_| {
                let peers: Vec<String> = (0..self.below(3)).map(|_| self.peer(pods)).collect();
                let ports: Vec<String> = (0..self.below(3)).map(|_| self.port()).collect();
                let mut parts = Vec::new();
                if !peers.is_empty() {
                    parts.push(format!("{side}: [{}]", peers.join(", ")));
                }
                if !ports.is_empty() {
                    parts.push(format!("ports: [{}]", ports.join(", ")));
                }
                format!("{{{}}}", parts.join(", "))
            })
            .collect();
        format!("[{}]", rules.join(", "))
    }

    fn policy(&mut self, number: usize, pods: &[Pod]) -> String {
        let (space, selector) = (self.pick(&SPACES), self.pod_selector());
        let types = self.pick(&["Ingress", "Egress", "Ingress, Egress"]);
        let mut text = format!(
            "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: policy-{number}, namespace: {space}}}\n\
             spec:\n  podSelector: {selector}\n  policyTypes: [{types}]\n"
        );
        for (side, peers) in [("ingress", "from"), ("egress", "to")] {
            if types.to_lowercase().contains(side) {
                let _ = writeln!(text, "  {side}: {}", self.rules(peers, pods));
            }
        }
        text
    }

    fn cluster_peer(&mut self, side: &str, pods: &[Pod]) -> String {
        match self.below(if side == "ingress" { 3 } else { 5 }) {
            0 => format!("{{namespaces: {}}}", self.namespace_selector()),
            1 | 2 => {
                let (spaces, selector) = (self.namespace_selector(), self.pod_selector());
                format!("{{pods: {{namespaceSelector: {spaces}, podSelector: {selector}}}}}")
            }
            3 => {
                let one = self.below(pods.len());
                let wide = self.pick(&["10.244.0.0/16", "10.244.1.0/24", "0.0.0.0/0"]);
                format!("{{networks: [\"{}/32\", \"{wide}\"]}}", pods[one].ip)
            }
            _ => "{nodes: {}}".to_owned(),
        }
    }

    fn cluster_rule(&mut self, side: &str, pods: &[Pod]) -> String {
        let peers: Vec<String> = (0..1 + self.below(2)).map(|_| self.cluster_peer(side, pods)).collect();
        let named = !peers.iter().any(|peer| peer.contains("networks") || peer.contains("nodes"));
        let protocols = match self.below(if named { 6 } else { 4 }) {
            0 | 1 => "",
            2 => ", protocols: [{tcp: {destinationPort: {number: 80}}}]",
            3 => ", protocols: [{udp: {destinationPort: {range: {start: 1, end: 65535}}}}]",
            4 => ", protocols: [{destinationNamedPort: web}]",
            _ => {
                ", protocols: [{destinationNamedPort: admin}, {tcp: {destinationPort: {range: {start: 79, end: 8079}}}}]"
            }
        };
        let (action, key) = (self.pick(&["Accept", "Deny", "Pass"]), if side == "ingress" { "from" } else { "to" });
        format!("{{action: {action}, {key}: [{}]{protocols}}}", peers.join(", "))
    }

    fn cluster_policy(&mut self, number: usize, pods: &[Pod]) -> String {
        let (tier, priority) = (self.pick(&["Admin", "Baseline"]), self.below(3));
        let (spaces, selector) = (self.namespace_selector(), self.pod_selector());
        let mut text = format!(
            "---\napiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: cluster-{number}}}\n\
             spec:\n  tier: {tier}\n  priority: {priority}\n  \
             subject: {{pods: {{namespaceSelector: {spaces}, podSelector: {selector}}}}}\n"
        );
        for side in ["ingress", "egress"] {
            let rules: Vec<String> = (0..self.below(3)).map(|_| self.cluster_rule(side, pods)).collect();
            let _ = writeln!(text, "  {side}: [{}]", rules.join(", "));
        }
        text
    }
}

fn kubectl(cluster: &Cluster, args: &[&str]) -> Result<String> {
    let out = cluster.try_kubectl(args)?;
    ensure!(out.status.success(), "kubectl {}: {}", args.join(" "), String::from_utf8_lossy(&out.stderr));
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

fn everything<T: serde::de::DeserializeOwned>(cluster: &Cluster, kind: &str) -> Result<Vec<T>> {
    let out = kubectl(cluster, &["get", kind, "--all-namespaces", "-o", "json"])?;
    let mut list: Value = serde_json::from_str(&out)?;
    serde_json::from_value(list["items"].take()).with_context(|| format!("understand the {kind}"))
}

fn objects(cluster: &Cluster) -> Result<Objects> {
    Ok(Objects {
        nodes: everything(cluster, "nodes")?,
        namespaces: everything(cluster, "namespaces")?,
        pods: everything(cluster, "pods")?,
        policies: everything(cluster, "networkpolicies")?,
        cluster_policies: everything(cluster, "clusternetworkpolicies")?,
        names: Vec::new(),
    })
}

fn pods(cluster: &Cluster) -> Result<Vec<Pod>> {
    let all: Vec<Value> = everything(cluster, "pods")?;
    let ours = all.iter().filter(|pod| SPACES.contains(&field(pod, "/metadata/namespace").as_str()));
    let found: Vec<Pod> = ours.map(Pod::from_json).collect();
    let ready = found.iter().filter(|pod| pod.ready).count();
    if ready == SPACES.len() * PODS_EACH { Ok(found) } else { bail!("{ready} pods are ready") }
}

/// One question to the network.
#[derive(Clone, Debug)]
struct Question {
    from: usize,
    to: IpAddr,
    protocol: &'static str,
    port: u16,
}

/// Whether it goes through. Nothing is answered late on purpose, so what does not come within the limit was dropped; a second
/// and third try take the blame off a busy machine.
fn goes_through(question: &Question) -> Result<bool> {
    let to = SocketAddr::new(question.to, question.port);
    for limit in [200, 400, 800].map(Duration::from_millis) {
        let answered = if question.protocol == "TCP" {
            TcpStream::connect_timeout(&to, limit).is_ok()
        } else {
            let socket = UdpSocket::bind("0.0.0.0:0")?;
            socket.set_read_timeout(Some(limit))?;
            socket.connect(to)?;
            // A rejected datagram may come back as an error of the next call.
            socket.send(b"question").is_ok() && socket.recv(&mut [0; 64]).is_ok()
        };
        if answered {
            return Ok(true);
        }
    }
    Ok(false)
}

/// What the network and the documentation disagree about.
fn differences(
    objects: &Objects,
    pods: &[Pod],
    places: &[Place],
    questions: &[Question],
) -> Result<(usize, Vec<String>)> {
    let answers: Result<Vec<bool>> = std::thread::scope(|scope| {
        let asked: Vec<_> =
            questions.iter().map(|q| scope.spawn(move || places[q.from].enter(|| goes_through(q)))).collect();
        asked.into_iter().map(|a| a.join().map_err(|_| anyhow::anyhow!("panicked"))?).collect()
    });
    let mut yes = 0;
    let mut found = Vec::new();
    for (question, answer) in questions.iter().zip(answers?) {
        let from = address(&pods[question.from].ip)?;
        let traffic = Traffic { from, to: question.to, protocol: question.protocol, port: question.port };
        let expected = allowed(objects, &traffic);
        yes += usize::from(expected);
        if answer != expected {
            found.push(format!(
                "{} → {} {} {}: the documentation says {expected}, the network {answer}",
                pods[question.from].name, question.to, question.protocol, question.port
            ));
        }
    }
    Ok((yes, found))
}

#[test]
fn the_network_does_what_the_documentation_says() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let seed = std::env::var("TOWPATH_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(SEED);
    println!("TOWPATH_SEED={seed}");
    let mut dice = Dice(seed);
    let cluster = Cluster::up("e2e-oracle", 2, Families::Ipv4)?;
    let mut manifests = String::new();
    for space in SPACES {
        let warm = if space == "red" { "{warm: \"yes\"}" } else { "{}" };
        let _ =
            writeln!(manifests, "---\napiVersion: v1\nkind: Namespace\nmetadata: {{name: {space}, labels: {warm}}}");
        for number in 0..PODS_EACH {
            // The same name for different numbers in different pods.
            let (web, admin) = if dice.one_in(2) { (80, 8080) } else { (8080, 80) };
            let node = dice.pick(&["n1", "n2"]);
            let _ = writeln!(
                manifests,
                "---\napiVersion: v1\nkind: Pod\nmetadata: {{name: {space}-{number}, namespace: {space}}}\nspec:\n  nodeName: {node}\n  \
                 containers: [{{name: web, image: nginx, ports: [{{name: web, containerPort: {web}}}, \
                 {{name: admin, containerPort: {admin}}}, {{containerPort: {UDP}, protocol: UDP}}]}}]"
            );
        }
    }
    cluster.apply_text(&manifests)?;
    let pods = wait("all pods to be ready", Duration::from_secs(30), || pods(&cluster))?;
    let places = pods.iter().map(|pod| Place::of_pod(&cluster, pod)).collect::<Result<Vec<_>>>()?;
    let (mut asked, mut went) = (0, 0);
    for round in 0..ROUNDS {
        for pod in &pods {
            let space = pod.name.split('-').next().unwrap_or_default();
            let labels = dice.labels();
            let mut args = vec!["label", "--overwrite", "-n", space, "pod", &pod.name];
            args.extend(labels.split(' '));
            kubectl(&cluster, &args)?;
        }
        let mut policies: String = (0..1 + dice.below(6)).map(|number| dice.policy(number, &pods)).collect();
        policies.extend((0..dice.below(4)).map(|number| dice.cluster_policy(number, &pods)));
        kubectl(&cluster, &["delete", "clusternetworkpolicies", "--all"])?;
        for space in SPACES {
            kubectl(&cluster, &["delete", "networkpolicies", "--all", "-n", space])?;
        }
        cluster.apply_text(&policies)?;
        let objects = objects(&cluster)?;
        let questions: Vec<Question> = (0..SAMPLE)
            .map(|_| {
                let protocol = dice.pick(&["TCP", "TCP", "UDP"]);
                let port = if protocol == "UDP" { UDP } else { dice.pick(&TCP) };
                let to = dice.below(pods.len());
                Ok(Question { from: dice.below(pods.len()), to: address(&pods[to].ip)?, protocol, port })
            })
            .collect::<Result<_>>()?;
        // The kernel may still be on its way to the new policies at first; then it must stay there.
        let settled = wait("the network to agree with the documentation", Duration::from_secs(3), || {
            let (yes, found) = differences(&objects, &pods, &places, &questions)?;
            if found.is_empty() { Ok(yes) } else { bail!("{}", found.join("\n")) }
        });
        let yes = settled.with_context(|| format!("seed {seed}, round {round}, policies:\n{policies}"))?;
        let (_, found) = differences(&objects, &pods, &places, &questions)?;
        ensure!(found.is_empty(), "seed {seed}, round {round}: agreed, then not:\n{}\n{policies}", found.join("\n"));
        (asked, went) = (asked + questions.len(), went + yes);
    }
    println!("{asked} questions, {went} of them allowed");
    ensure!(went > asked / 20 && went < asked - asked / 20, "{went} of {asked} allowed: such policies show little");
    cluster.down()
}
