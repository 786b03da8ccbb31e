//! The API server is gone and an agent starts again meanwhile: connections, policies, Services and names go on, and a pod whose
//! sandbox kubelet makes anew has an address and its policy. When the API server is back, so is everything else.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::in_charge::status_text;
use towpath_walkthrough::libcni::{Libcni, Sandbox, address_of};
use towpath_walkthrough::machine::{self, can_run_labs};
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};

const ANSWER: Duration = Duration::from_secs(5);
const REFUSED: Duration = Duration::from_millis(400);

const RULES: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: friends-only}
spec:
  podSelector: {matchLabels: {app: web}}
  ingress: [{from: [{podSelector: {matchLabels: {app: friend}}}]}]
"#;

/// Everything that is applied.
fn objects() -> String {
    [
        server("web", "n1", "app: web"),
        shell("friend", "n2", "app: friend"),
        shell("stranger", "n2", "app: stranger"),
        RULES.to_owned(),
    ]
    .concat()
}

/// The agent's configuration on a node.
fn configuration(cluster: &Cluster, node: &str) -> Result<Value> {
    let path = PathBuf::from("/run/towpath/lab").join(cluster.name()).join("nodes").join(node).join("agent.json");
    Ok(serde_json::from_slice(&std::fs::read(&path).with_context(|| path.display().to_string())?)?)
}

/// Address of the API server as a node's agent has it.
fn api_server(cluster: &Cluster, node: &str) -> Result<String> {
    let said = cluster.node(node, "ss -Htn state established '( dport = :6443 )' | head -1")?;
    let peer = said.out.split_whitespace().last().with_context(|| format!("no connection to it: {}", said.all()))?;
    Ok(peer.rsplit_once(':').context("no port")?.0.to_owned())
}

/// Packets to the API server leave the node and reach nobody.
fn cut_off(cluster: &Cluster, node: &str, server: &str) -> Result<()> {
    let said =
        cluster.node(node, &format!("ip neigh replace {server} lladdr 02:00:00:00:00:99 dev eth0 nud permanent"))?;
    ensure!(said.ok, "ip neigh on {node}: {}", said.all());
    Ok(())
}

fn join_again(cluster: &Cluster, node: &str, server: &str) -> Result<()> {
    let said = cluster.node(node, &format!("ip neigh del {server} dev eth0"))?;
    ensure!(said.ok, "ip neigh on {node}: {}", said.all());
    Ok(())
}

fn restart_agent(cluster: &Cluster, node: &str, cni: &Libcni) -> Result<()> {
    let before = machine::lab_agent(cluster.name(), node)?;
    machine::kill(before)?;
    wait("another agent that is ready", Duration::from_secs(40), || {
        ensure!(machine::lab_agent(cluster.name(), node)? != before, "process {before} is still there");
        cni.agent_is_ready()
    })
}

#[test]
fn what_runs_goes_on_and_what_is_started_again_too_while_the_api_server_is_gone() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-noapi", 2, Families::Ipv4)?;
    cluster.apply_text(&objects())?;
    let [web, friend, stranger] = ["web", "friend", "stranger"].map(|name| cluster.wait_pod(name));
    let (web, friend, stranger) = (web?, friend?, stranger?);
    let pod = SocketAddr::new(address(&web.ip)?, 80);
    let service = SocketAddr::new(address(&field(&cluster.get("svc", "web")?, "/spec/clusterIP"))?, 80);
    let (from_friend, from_stranger) = (Place::of_pod(&cluster, &friend)?, Place::of_pod(&cluster, &stranger)?);
    let refused = |place: &Place, to: SocketAddr| place.enter(|| Ok(Session::open(to, REFUSED).is_err()));
    wait("the Service to answer and the policy to hold", Duration::from_secs(10), || {
        from_friend.enter(|| Session::open(service, ANSWER)?.ask(ANSWER))?;
        if refused(&from_stranger, pod)? { Ok(()) } else { bail!("the stranger still reaches the server") }
    })?;
    let mut open = from_friend.enter(|| Session::open(service, ANSWER))?;
    let state = PathBuf::from(field(&configuration(&cluster, "n1")?, "/stateDir"));
    wait("n1 to have kept what it knows", Duration::from_secs(30), || {
        let kept = std::fs::read_to_string(state.join("last-known/pods.jsonl"))?;
        if kept.contains(&friend.ip) && kept.contains(&stranger.ip) { Ok(()) } else { bail!("{kept}") }
    })?;

    let server = api_server(&cluster, "n1")?;
    for node in ["n1", "n2"] {
        cut_off(&cluster, node, &server)?;
    }
    let cni = Libcni::of_node(&cluster, "n1")?;
    restart_agent(&cluster, "n1", &cni)?;

    open.ask(ANSWER).context("the connection that was open")?;
    from_friend.enter(|| Session::open(service, ANSWER)?.ask(ANSWER)).context("a new one through the Service")?;
    ensure!(refused(&from_stranger, pod)?, "the stranger reaches the server");
    let names = cluster.exec("web", "timeout 5 nslookup web.default.svc.cluster.local")?;
    ensure!(names.out.contains(&service.ip().to_string()), "no names: {}", names.all());
    let status = status_text(&cluster)?;
    ensure!(status.contains("earlier run"), "status says nothing of it: {status}");

    // As kubelet does for a pod whose sandbox died.
    let again = Sandbox::make("e2e-noapi-web")?;
    let of_web = cni.for_pod("web", &web.uid);
    let new = SocketAddr::new(address(&address_of(&of_web.succeed("ADD", Some(&again), "1.1.0", &json!({}))?)?)?, 8080);
    let inside = Place::of_netns("the new sandbox", &again.netns())?;
    let _listening = inside.enter(|| TcpListener::bind(new).context("listen in the sandbox"))?;
    from_friend.enter(|| Session::open(new, ANSWER)).context("the friend to the pod's new address")?;
    ensure!(refused(&from_stranger, new)?, "the new sandbox is not isolated");
    of_web.succeed("DEL", Some(&again), "1.1.0", &json!({}))?;
    // Of which nothing is known: its own node reaches it, nobody else until its labels are known.
    let unknown = Sandbox::make("e2e-noapi-unknown")?;
    let of_unknown = cni.for_pod("unknown", "3f6f4c4e-0000-4000-8000-000000000000");
    let at = address_of(&of_unknown.succeed("ADD", Some(&unknown), "1.1.0", &json!({}))?)?;
    ensure!(cluster.node("n1", &format!("ping -c 1 -W 2 {at}"))?.ok, "its node does not reach {at}");
    ensure!(!cluster.exec("friend", &format!("ping -c 1 -W 1 {at}"))?.ok, "others reach what nobody knows");
    of_unknown.succeed("DEL", Some(&unknown), "1.1.0", &json!({}))?;

    for node in ["n1", "n2"] {
        join_again(&cluster, node, &server)?;
    }
    cluster.apply_text(&RULES.replace("app: friend}}}", "app: stranger}}}"))?;
    wait("the agents to follow a policy again", Duration::from_secs(60), || {
        from_stranger.enter(|| Session::open(pod, ANSWER)?.ask(ANSWER))?;
        if refused(&from_friend, pod)? { Ok(()) } else { bail!("who is no friend any more still reaches the server") }
    })?;
    // Each kind comes back by itself, half a minute later at most.
    wait("everything to be listed again", Duration::from_secs(60), || {
        let status = status_text(&cluster)?;
        if status.contains("earlier run") { bail!("{status}") } else { Ok(()) }
    })?;
    cluster.down()
}
