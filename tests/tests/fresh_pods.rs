//! A pod is known to the policies of other nodes from its ADD on, before its kubelet has reported its address: here its kubelet never
//! does, because the pod waits for a volume that is not there, and its sandbox is made by hand. (How soon: `towpath-bench --only fresh`.)

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::json;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::libcni::{Libcni, Sandbox, address_of};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::server;

const ANSWER: Duration = Duration::from_secs(5);
/// A try that is dropped is over after this.
const TRY: Duration = Duration::from_millis(200);
const PATIENCE: Duration = Duration::from_secs(10);

const RULES: &str = r#"---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress:
    - from: [{podSelector: {matchLabels: {app: friend}}}]
"#;

/// The servers, and whom they serve.
fn servers() -> String {
    [server("web-2", "n2", "app: web"), server("web-3", "n3", "app: web"), RULES.to_owned()].concat()
}

/// A pod that its kubelet does not start.
fn waiting(name: &str, label: &str) -> String {
    format!(
        r#"---
apiVersion: v1
kind: Pod
metadata: {{name: {name}, labels: {{app: {label}}}}}
spec:
  nodeName: n1
  volumes: [{{name: never, configMap: {{name: never-there}}}}]
  containers:
    - {{name: c, image: busybox, command: [sleep, "1"], volumeMounts: [{{name: never, mountPath: /never}}]}}
"#
    )
}

struct Fresh {
    cni: Libcni,
    sandbox: Sandbox,
    place: Place,
    ip: String,
}

impl Fresh {
    fn add(cluster: &Cluster, pod: &str, sandbox: &'static str) -> Result<Self> {
        let uid = field(&cluster.get("pod", pod)?, "/metadata/uid");
        let (cni, sandbox) = (Libcni::of_node(cluster, "n1")?.for_pod(pod, &uid), Sandbox::make(sandbox)?);
        let ip = address_of(&cni.succeed("ADD", Some(&sandbox), "1.1.0", &json!({}))?)?;
        let place = Place::of_netns(pod, &sandbox.netns())?;
        Ok(Self { cni, sandbox, place, ip })
    }

    fn is_let_in(&self, to: SocketAddr) -> Result<bool> {
        self.place.enter(|| Ok(Session::open(to, TRY).is_ok_and(|mut session| session.ask(ANSWER).is_ok())))
    }

    fn delete(&self) -> Result<()> {
        self.cni.succeed("DEL", Some(&self.sandbox), "1.1.0", &json!({})).map(drop)
    }
}

#[test]
fn a_new_pod_is_known_to_other_nodes_policies_before_its_kubelet_reports_it() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-fresh", 3, Families::Ipv4)?;
    cluster.apply_text(&format!("{}{}{}", servers(), waiting("friend", "friend"), waiting("stranger", "stranger")))?;
    let servers = [cluster.wait_pod("web-2")?, cluster.wait_pod("web-3")?];
    let servers = servers.map(|pod| address(&pod.ip).map(|ip| SocketAddr::new(ip, 80)));
    let (friend, stranger) =
        (Fresh::add(&cluster, "friend", "e2e-fresh-friend")?, Fresh::add(&cluster, "stranger", "e2e-fresh-stranger")?);
    for server in servers {
        let server = server?;
        wait(&format!("{server} to let the friend in"), PATIENCE, || match friend.is_let_in(server)? {
            true => Ok(()),
            false => bail!("dropped"),
        })?;
        ensure!(!stranger.is_let_in(server)?, "{server} let the stranger in");
    }
    for (pod, fresh) in [("friend", &friend), ("stranger", &stranger)] {
        let reported = field(&cluster.get("pod", pod)?, "/status/podIP");
        ensure!(reported.is_empty(), "kubelet reported {reported}: the test shows nothing");
        let given = cluster.get("nodenetwork", "n1")?.to_string();
        ensure!(given.contains(&fresh.ip), "{} is not in the node's object: {given}", fresh.ip);
    }
    friend.delete()?;
    stranger.delete()?;
    wait("the addresses to be taken back", PATIENCE, || {
        let given = cluster.get("nodenetwork", "n1")?.to_string();
        if given.contains(&friend.ip) || given.contains(&stranger.ip) { bail!("{given}") } else { Ok(()) }
    })?;
    cluster.down()
}
