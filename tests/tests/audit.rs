//! A policy with `towpath.dev/audit: "true"` is judged and reported, and not enforced: with real packets, by every tool that tells of it, over the
//! death of an agent; and what another policy forbids stays forbidden while it is audited and enforced in turns.

use std::io::{BufRead, BufReader};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const SOON: Duration = Duration::from_secs(20);
const ANSWER: Duration = Duration::from_secs(5);

/// `audit` as YAML has it.
fn friends_only(audit: &str) -> String {
    format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
         metadata: {{name: friends-only, annotations: {{towpath.dev/audit: \"{audit}\"}}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: web}}}}\n  \
         ingress: [{{from: [{{podSelector: {{matchLabels: {{app: friend}}}}}}]}}]\n"
    )
}

const NEVER: &str = r#"---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: never}
spec:
  tier: Admin
  priority: 5
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: web}}}}
  ingress: [{action: Deny, from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: never}}}}]}]
"#;

struct Scene {
    cluster: Cluster,
    web: SocketAddr,
    friend: Place,
    stranger: Place,
    neighbour: Place,
    never: Place,
}

fn set_up(name: &str) -> Result<Scene> {
    let cluster = Cluster::up(name, 2, Families::Ipv4)?;
    let pods = [
        server("web", "n1", "app: web"),
        shell("friend", "n2", "app: friend"),
        shell("stranger", "n2", "app: stranger"),
        shell("neighbour", "n1", "app: stranger"),
        shell("never", "n2", "app: never"),
    ];
    cluster.apply_text(&pods.concat())?;
    let web = SocketAddr::new(address(&cluster.wait_pod("web")?.ip)?, 80);
    let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
    let (friend, stranger, neighbour, never) =
        (place("friend")?, place("stranger")?, place("neighbour")?, place("never")?);
    Ok(Scene { web, friend, stranger, neighbour, never, cluster })
}

fn is_open(place: &Place, to: SocketAddr) -> Result<bool> {
    place.enter(|| Ok(Session::open(to, Duration::from_millis(500)).is_ok()))
}

/// Waits until exactly these can connect.
fn settles(what: &str, expected: &[(&Place, SocketAddr, bool)]) -> Result<()> {
    wait(what, SOON, || {
        for (place, to, wanted) in expected {
            let open = is_open(place, *to)?;
            ensure!(open == *wanted, "{} → {to}: open is {open}", place.name());
        }
        Ok(())
    })
}

impl Scene {
    /// Only the audited policy tells friends from strangers.
    fn settles(&self, what: &str, strangers: bool) -> Result<()> {
        let web = self.web;
        let all =
            [(&self.friend, true), (&self.stranger, strangers), (&self.neighbour, strangers), (&self.never, false)];
        settles(what, &all.map(|(place, open)| (place, web, open)))
    }

    fn towpath(&self, args: &[&str]) -> Result<String> {
        let out =
            Command::new(self.cluster.towpath()).args(args).env("KUBECONFIG", self.cluster.kubeconfig()).output()?;
        Ok(String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr))
    }

    /// What the node of `web` says of its audited policies: name and connections.
    fn audited(&self) -> Result<Vec<(String, u64)>> {
        let said = self.towpath(&["status", "--lab", self.cluster.name(), "-o", "json"])?;
        let nodes: Value = serde_json::from_str(&said).with_context(|| said.clone())?;
        let n1 = nodes.as_array().into_iter().flatten().find(|node| field(node, "/node") == "n1");
        let n1 = n1.context("no answer of n1")?;
        ensure!(n1.get("error").is_none(), "{n1}");
        let audited = n1.pointer("/status/audited").and_then(Value::as_array).cloned().unwrap_or_default();
        let of =
            |a: &Value| (field(a, "/policy"), a.pointer("/connections").and_then(Value::as_u64).unwrap_or_default());
        Ok(audited.iter().map(of).collect())
    }

    /// Waits until it is so many connections.
    fn counts(&self, what: &str, wanted: impl Fn(u64) -> bool) -> Result<u64> {
        wait(what, SOON, || match self.audited()?.as_slice() {
            [(policy, count)] if policy == "NetworkPolicy default/friends-only" && wanted(*count) => Ok(*count),
            other => bail!("{other:?}"),
        })
    }
}

/// The first thing that `towpath observe --audit` tells while `work` is done.
fn observed(scene: &Scene, work: impl Fn() -> Result<()>) -> Result<Value> {
    let mut command = Command::new(scene.cluster.towpath());
    command.env("KUBECONFIG", scene.cluster.kubeconfig());
    command.args(["observe", "--audit", "-l", "app=stranger", "--count", "1", "--duration", "30", "-o", "json"]);
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let (out, err) = (child.stdout.take().context("its output")?, child.stderr.take().context("its errors")?);
    let (said, listening) = mpsc::channel();
    std::thread::spawn(move || BufReader::new(err).lines().map_while(Result::ok).all(|line| said.send(line).is_ok()));
    for _ in 0..2 {
        let line = listening.recv_timeout(SOON).context("it does not listen")?;
        ensure!(line.contains("listening to node"), "it said: {line}");
    }
    work()?;
    let mut line = String::new();
    BufReader::new(out).read_line(&mut line)?;
    child.wait()?;
    serde_json::from_str(&line).with_context(|| format!("not JSON: {line:?}"))
}

#[test]
fn what_is_audited_passes_and_every_tool_says_what_would_not() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = set_up("e2e-audit")?;
    let cluster = &scene.cluster;
    cluster.apply_text(NEVER)?;
    let mut open = scene.stranger.enter(|| Session::open(scene.web, ANSWER))?;
    open.ask(ANSWER)?;
    scene.settles("the other policy", true)?;
    cluster.apply_text(&friends_only("true"))?;
    scene.counts("nothing counted yet", |_| true)?;
    scene.settles("everything as it was", true)?;
    // The open connection is judged again, and counted: it is what enforcing would cut.
    open.ask(ANSWER)?;
    let before = scene.counts("what enforcing would cut", |count| count >= 1)?;

    let told = observed(&scene, || {
        ensure!(is_open(&scene.neighbour, scene.web)?, "an audited policy denies");
        Ok(())
    })?;
    ensure!(field(&told, "/verdict") == "AUDITED" && field(&told, "/reason") == "audit_ingress", "{told}");
    ensure!(field(&told, "/source/is/name") == "neighbour" && field(&told, "/node") == "n1", "{told}");
    ensure!(told["policy"]["policies"] == serde_json::json!(["NetworkPolicy default/friends-only"]), "{told}");
    scene.counts("one more", |count| count > before)?;
    // Who is allowed anyway, and who is denied anyway, count for nothing.
    let before = scene.counts("a count", |_| true)?;
    ensure!(is_open(&scene.friend, scene.web)? && !is_open(&scene.never, scene.web)?, "other verdicts changed");
    std::thread::sleep(Duration::from_millis(2500));
    ensure!(scene.counts("a count", |_| true)? == before, "what enforcing would not change was counted");

    let said = scene.towpath(&["explain", "pod/stranger", "pod/web", "80"])?;
    let would = "denied if NetworkPolicy default/friends-only, which is only audited, were enforced:";
    ensure!(said.contains(would) && said.trim_end().ends_with("allowed"), "explain says {said}");
    let said = scene.towpath(&["verify", "audit", "--live"])?;
    ensure!(said.contains("newly denied") && said.contains("stranger"), "verify audit says {said}");
    let said = scene.towpath(&["status", "--lab", cluster.name()])?;
    ensure!(said.contains("n1: NetworkPolicy default/friends-only (audited) would have denied"), "status says {said}");
    ensure!(said.contains("Ingress, no rule allows it:"), "status says {said}");

    let said = scene.towpath(&["policy", "audit", "--lab", cluster.name()])?;
    let row = said.lines().find(|line| line.contains("NetworkPolicy default/friends-only")).unwrap_or_default();
    ensure!(
        row.contains("Ingress") && row.contains("no rule allows it") && row.contains("n1"),
        "policy audit says {said}"
    );

    // A restarted agent goes on counting where the one before it was killed.
    let before = scene.counts("a count", |_| true)?;
    machine::kill(machine::lab_agent(cluster.name(), "n1")?)?;
    ensure!(is_open(&scene.stranger, scene.web)?, "the kernel goes on without the agent");
    scene.counts("what was counted before the kill and after it", |count| count > before)?;

    // What cannot be read is enforced, and said.
    cluster.apply_text(&friends_only("yes"))?;
    scene.settles("an annotation that is not understood to count as absent", false)?;
    ensure!(scene.audited()?.is_empty(), "it is not audited any more");
    wait("an Event on the policy", Duration::from_secs(40), || {
        let out = cluster.try_kubectl(&["get", "events", "-o", "json"])?;
        let events: Value = serde_json::from_slice(&out.stdout)?;
        let all = events.get("items").and_then(Value::as_array).cloned().unwrap_or_default();
        let about = |event: &&Value| {
            let object = if event.get("involvedObject").is_some() { "/involvedObject" } else { "/regarding" };
            field(event, &format!("{object}/kind")) == "NetworkPolicy"
                && field(event, &format!("{object}/name")) == "friends-only"
        };
        let found = all.iter().find(about).context("none")?;
        let note = field(found, "/message") + &field(found, "/note");
        ensure!(note.contains("\"yes\" is neither"), "{found}");
        Ok(())
    })?;
    cluster.apply_text(&friends_only("true"))?;
    scene.settles("the audit to be back", true)?;
    scene.cluster.down()
}

/// Each datagram from a socket of its own: a flow that nobody has judged before.
fn send(place: &Place, to: SocketAddr, done: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    place.enter(|| {
        while !done.load(Ordering::Relaxed) {
            let any: IpAddr = [0, 0, 0, 0].into();
            if UdpSocket::bind((any, 0))?.send_to(b"forbidden", to).is_ok() {
                sent.fetch_add(1, Ordering::Relaxed);
            }
            std::thread::sleep(Duration::from_micros(300));
        }
        Ok(())
    })
}

const TURNS: usize = 12;

#[test]
fn what_is_forbidden_stays_so_while_a_policy_is_audited_and_enforced_in_turns() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = set_up("e2e-auditturn")?;
    let cluster = &scene.cluster;
    cluster.apply_text(NEVER)?;
    cluster.apply_text(&friends_only("true"))?;
    scene.settles("the policies", true)?;
    let web = cluster.wait_pod("web")?;
    let to = SocketAddr::new(scene.web.ip(), 7777);
    let socket = Place::of_pod(cluster, &web)?.enter(|| Ok(UdpSocket::bind(to)?))?;
    socket.set_read_timeout(Some(Duration::from_millis(200)))?;
    let (done, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    let arrived = std::thread::scope(|scope| -> Result<u64> {
        let sender = scope.spawn(|| send(&scene.never, to, &done, &sent));
        let receiver = scope.spawn(|| {
            let (mut arrived, mut buffer) = (0_u64, [0_u8; 64]);
            while !done.load(Ordering::Relaxed) {
                arrived += u64::from(socket.recv_from(&mut buffer).is_ok());
            }
            arrived
        });
        let turns = (0..TURNS).try_for_each(|turn| {
            let audited = turn % 2 == 1;
            cluster.apply_text(&friends_only(if audited { "true" } else { "false" }))?;
            if turn == TURNS / 2 {
                machine::kill(machine::lab_agent(cluster.name(), "n1")?)?;
            }
            settles("the turn", &[(&scene.friend, scene.web, true), (&scene.stranger, scene.web, audited)])
        });
        done.store(true, Ordering::Relaxed);
        let arrived = receiver.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))?;
        sender.join().map_err(|_| anyhow::anyhow!("the sender panicked"))??;
        turns?;
        Ok(arrived)
    })?;
    let sent = sent.load(Ordering::Relaxed);
    println!("{TURNS} turns: {sent} forbidden datagrams sent, {arrived} arrived");
    ensure!(sent > 1000, "only {sent} were sent");
    ensure!(arrived == 0, "{arrived} of {sent} forbidden datagrams arrived");
    scene.cluster.down()
}
