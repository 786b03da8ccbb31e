//! A policy that asks for more than a node holds costs the pods that it selects, and nobody else: they are closed, and said to be; what others
//! write is enforced as ever, over an agent's death too; and as soon as it asks for less, it is enforced as it is written. Policies that fill a node's
//! table to its last entry, all of it in force, hold up no change.

use std::fmt::Write as _;
use std::net::SocketAddr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(5);
const SOON: Duration = Duration::from_secs(40);
/// Far from what is compiled at most, so that a policy can be too large for the one and not for the other.
const LIMITS: &str = r#"limits={"rules":40000}"#;

/// Lets in `app: friend`, and so many blocks of addresses at so many ports: a row for each of both.
fn asking(name: &str, app: &str, blocks: usize, ports: usize) -> String {
    let mut text = format!(
        "---\napiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {{name: {name}}}\nspec:\n  \
         podSelector: {{matchLabels: {{app: {app}}}}}\n  ingress:\n  - from: [{{podSelector: {{matchLabels: {{app: friend}}}}}}]\n"
    );
    if blocks * ports > 0 {
        text.push_str("  - from:\n");
        for n in 0..blocks {
            let _ = writeln!(text, "    - ipBlock: {{cidr: 198.18.{}.{}/32}}", n / 100, 2 * (n % 100));
        }
        text.push_str("    ports:\n");
        for n in 0..ports {
            let _ = writeln!(text, "    - port: {}", 1001 + 2 * n);
        }
    }
    text
}

struct Scene {
    cluster: Cluster,
    friend: Place,
    stranger: Place,
    web: SocketAddr,
    other: SocketAddr,
}

impl Scene {
    fn towpath(&self, args: &[&str]) -> Result<(bool, String)> {
        let mut command = Command::new(self.cluster.towpath());
        let out = command.args(args).env("KUBECONFIG", self.cluster.kubeconfig()).output()?;
        let said = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
        Ok((out.status.success(), said))
    }

    /// Waits until exactly these can connect: the friend and the stranger, to a server.
    fn settles(&self, what: &str, to: SocketAddr, expected: [bool; 2]) -> Result<()> {
        wait(what, SOON, || {
            for (place, wanted) in [&self.friend, &self.stranger].into_iter().zip(expected) {
                let open = place.enter(|| Ok(Session::open(to, Duration::from_millis(500)).is_ok()))?;
                ensure!(open == wanted, "{} → {to}: open is {open}", place.name());
            }
            Ok(())
        })
    }

    fn is_said(&self, policy: &str, words: &[&str]) -> Result<()> {
        wait(&format!("an Event on {policy}"), SOON, || {
            let events = self.cluster.list("events", "")?;
            let about = events.iter().filter(|event| {
                let named = [field(event, "/involvedObject/name"), field(event, "/regarding/name")];
                named.contains(&policy.to_owned()) && field(event, "/reason") == "TableFull"
            });
            let notes: Vec<String> = about.map(|e| [field(e, "/note"), field(e, "/message")].concat()).collect();
            let says = |note: &String| words.iter().all(|word| note.contains(word));
            if notes.iter().any(says) { Ok(()) } else { bail!("{notes:?}") }
        })
    }

    /// What somebody else writes meanwhile: enforced, and a new pod of theirs starts isolated.
    fn others_go_on(&self, round: usize) -> Result<()> {
        let isolated = asking(&format!("others-{round}"), "other", 0, 0);
        self.settles("the other pods to be open", self.other, [true, true])?;
        self.cluster.apply_text(&isolated)?;
        self.enforces(&format!("others-{round}"))?;
        self.settles("the others' policy to be enforced", self.other, [true, false])?;
        let late = format!("late-{round}");
        self.cluster.apply_text(&server(&late, "n1", "app: other"))?;
        let late = SocketAddr::new(address(&self.cluster.wait_pod(&late)?.ip)?, 80);
        self.settles("a new pod of theirs", late, [true, false])?;
        self.cluster.kubectl(&Log::new(Voice::Plain), &["delete", "networkpolicy", &format!("others-{round}")])?;
        Ok(())
    }

    /// One that is too large, for the compiler or for the table.
    fn crowds(&self, round: usize, policy: &str, because: &str) -> Result<()> {
        self.cluster.apply_text(policy)?;
        self.settles("the pods that it selects to be closed", self.web, [false, false])?;
        self.is_said("crowd", &["nobody is admitted", because])?;
        let (done, said) = self.towpath(&["policy", "wait", "networkpolicy/crowd", "--timeout", "3"])?;
        ensure!(
            !done && said.contains("networkpolicy/default/crowd asks for more than the node has room for"),
            "policy wait says {said}"
        );
        let (_, said) = self.towpath(&["status", "--lab", self.cluster.name()])?;
        ensure!(said.contains("NetworkPolicy default/crowd") && said.contains(because), "status says {said}");
        self.others_go_on(round)
    }
}

impl Scene {
    /// Two servers on one node, and on the other a friend and a stranger.
    fn up(name: &str, limits: &str) -> Result<Self> {
        let cluster = Cluster::up_with(name, 2, Families::Ipv4, &["--agent-config", limits])?;
        let pods = [
            server("web", "n1", "app: web"),
            server("other", "n1", "app: other"),
            shell("friend", "n2", "app: friend"),
            shell("stranger", "n2", "app: stranger"),
        ];
        cluster.apply_text(&pods.concat())?;
        let server = |name: &str| Ok::<_, anyhow::Error>(SocketAddr::new(address(&cluster.wait_pod(name)?.ip)?, 80));
        let (web, other) = (server("web")?, server("other")?);
        let place = |name: &str| Place::of_pod(&cluster, &cluster.wait_pod(name)?);
        let (friend, stranger) = (place("friend")?, place("stranger")?);
        Ok(Self { friend, stranger, web, other, cluster })
    }

    /// Entries of the table of rules on the servers' node.
    fn rules(&self) -> Result<usize> {
        let page = self.cluster.node("n1", "curl -sS -m 3 http://127.0.0.1:9116/metrics")?;
        let entries = page.out.lines().find_map(|line| line.strip_prefix("towpath_map_entries{map=\"tp_rules\"} "));
        Ok(entries.context("the table of rules is in the metrics")?.trim().parse::<f64>()? as usize)
    }

    /// Waits until the table has so many entries, which nobody adds to.
    fn rules_are(&self, wanted: usize) -> Result<()> {
        wait("entries of the table of rules", SOON, || {
            let rules = self.rules()?;
            ensure!(rules == wanted, "{rules}, not {wanted}");
            Ok(())
        })
    }

    /// Waits until a policy is in force on all nodes.
    fn enforces(&self, policy: &str) -> Result<()> {
        let (done, said) = self.towpath(&["policy", "wait", &format!("networkpolicy/{policy}"), "--timeout", "30"])?;
        ensure!(done, "policy wait says {said}");
        Ok(())
    }
}

/// Who is no friend reaches no pod of this label.
const DENIES: &str = "---
apiVersion: policy.networking.k8s.io/v1alpha2
kind: ClusterNetworkPolicy
metadata: {name: no-strangers}
spec:
  tier: Admin
  priority: 10
  subject: {pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: open}}}}
  ingress:
  - action: Deny
    from: [{pods: {namespaceSelector: {}, podSelector: {matchLabels: {app: stranger}}}}]
";

/// A little more than [`asking`] for twenty blocks at thirty ports, twice.
const FEW: usize = 1300;

#[test]
fn a_table_that_is_full_to_its_last_entry_takes_the_next_change() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = Scene::up("e2e-full", &format!(r#"limits={{"rules":{FEW}}}"#))?;
    let cluster = &scene.cluster;
    cluster.apply_text(&server("open", "n1", "app: open"))?;
    let open = SocketAddr::new(address(&cluster.wait_pod("open")?.ip)?, 80);
    let mut kept = scene.friend.enter(|| Session::open(open, ANSWER))?;

    cluster.apply_text(&asking("web", "web", 20, 30))?;
    scene.enforces("web")?;
    let with_web = scene.rules()?;
    let small = 100;
    cluster.apply_text(&asking("other", "other", 1, small))?;
    scene.enforces("other")?;
    let with_both = scene.rules()?;
    ensure!(with_web > 600 && with_both > with_web + small && with_both < FEW, "{with_web}, {with_both}");
    cluster.kubectl(&Log::new(Voice::Plain), &["delete", "networkpolicy", "other"])?;
    scene.rules_are(with_web)?;
    // A port more is a row more.
    let ports = small + FEW - with_both;
    cluster.apply_text(&asking("other", "other", 1, ports))?;
    scene.rules_are(FEW)?;
    scene.enforces("other")?;
    scene.settles("both to be enforced", scene.web, [true, false])?;
    scene.settles("both to be enforced", scene.other, [true, false])?;

    // A row more, for which no policy that steps back makes room: pods are held to what is there until the new is.
    scene.settles("a pod of no policy to be open", open, [true, true])?;
    cluster.apply_text(DENIES)?;
    scene.settles("the change to be enforced", open, [true, false])?;
    scene.settles("the one that asks for most to stand aside, closed", scene.other, [false, false])?;
    scene.is_said("other", &["nobody is admitted", "tp_rules"])?;
    scene.settles("the next one to be enforced as before", scene.web, [true, false])?;

    cluster.apply_text(&asking("other", "other", 1, small))?;
    scene.enforces("other")?;
    scene.settles("it to be enforced again", scene.other, [true, false])?;
    scene.settles("the others still to be", scene.web, [true, false])?;
    scene.settles("the others still to be", open, [true, false])?;
    kept.ask(ANSWER)?;
    scene.cluster.down()
}

#[test]
fn a_policy_that_asks_for_too_much_costs_only_the_pods_that_it_selects() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = Scene::up("e2e-large", LIMITS)?;
    let (cluster, web, other) = (&scene.cluster, scene.web, scene.other);

    let small = asking("crowd", "web", 20, 20);
    cluster.apply_text(&small)?;
    scene.settles("what fits to be enforced", web, [true, false])?;
    let mut kept = scene.friend.enter(|| Session::open(other, ANSWER))?;

    scene.crowds(1, &asking("crowd", "web", 1500, 1500), "peers times ports")?;
    let dead = machine::lab_agent(cluster.name(), "n1")?;
    machine::kill(dead)?;
    machine::another_agent(cluster.name(), "n1", dead)?;
    scene.others_go_on(2)?;
    scene.settles("the pods that it selects to be closed still", web, [false, false])?;

    cluster.apply_text(&small)?;
    scene.settles("it to be enforced again when it asks for less", web, [true, false])?;
    scene.crowds(3, &asking("crowd", "web", 250, 250), "tp_rules")?;

    // An audited policy closes nobody.
    let audit = ["annotate", "networkpolicy", "crowd", "towpath.dev/audit=true"];
    cluster.kubectl(&Log::new(Voice::Plain), &audit)?;
    scene.settles("one that is only audited to close nobody", web, [true, true])?;
    cluster.kubectl(&Log::new(Voice::Plain), &["delete", "networkpolicy", "crowd"])?;
    wait("nothing to be left of it", SOON, || {
        let (_, said) = scene.towpath(&["status", "--lab", cluster.name()])?;
        if said.contains("crowd") { bail!("status says {said}") } else { Ok(()) }
    })?;
    kept.ask(ANSWER)?;
    scene.cluster.down()
}
