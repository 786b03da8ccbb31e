//! What a Service does not get is refused with real packets, said on the Service, and shown by `towpath service`, with the connections
//! that are open.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use towpath_walkthrough::cluster::{Cluster, Families, field, wait};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::place::{Place, Session, address};
use towpath_walkthrough::pods::{server, shell};
use towpath_walkthrough::udp::Joined;

const PATIENCE: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(3);
/// Refusals are said when they have stood for a moment.
const SAID: Duration = Duration::from_secs(30);
/// Whoever says them too, or says them again, has done so by then.
const SAID_AGAIN: Duration = Duration::from_secs(12);

/// Oracle Cloud's metadata service: no link-local address, so an API server lets a slice name it.
const METADATA: &str = "192.0.0.192";

const OBJECTS: &str = r#"---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  externalTrafficPolicy: Local
  selector: {app: web}
  ports: [{name: http, port: 80}]
---
apiVersion: v1
kind: Service
metadata: {name: stolen}
spec:
  ports: [{name: http, port: 80}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: stolen-1, labels: {kubernetes.io/service-name: stolen}}
addressType: IPv4
ports: [{name: http, protocol: TCP, port: 80}]
endpoints: [{addresses: ["192.0.0.192"]}]
"#;

fn shown(cluster: &Cluster, args: &[&str]) -> Result<(bool, Value)> {
    let mut command = Command::new(cluster.towpath());
    command.env("KUBECONFIG", cluster.kubeconfig()).arg("service").args(args).args(["-o", "json"]);
    let output = command.output().context("towpath service")?;
    let value = serde_json::from_slice(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    Ok((output.status.success(), value.with_context(|| format!("towpath service {args:?}: {said}"))?))
}

fn events(cluster: &Cluster, service: &str) -> Result<Vec<Value>> {
    let all = cluster.list("events", "")?;
    let about = |event: &&Value| {
        let name = [field(event, "/involvedObject/name"), field(event, "/regarding/name")];
        name.contains(&service.to_owned()) && field(event, "/reason") == "EndpointRefused"
    };
    Ok(all.iter().filter(about).cloned().collect())
}

fn endpoint_is_refused(cluster: &Cluster, asks: &Place, node: &Place) -> Result<()> {
    let vip = SocketAddr::new(address(&field(&cluster.get("service", "stolen")?, "/spec/clusterIP"))?, 80);
    // The metadata service: anybody on the node gets there, and only there.
    let added = cluster.node("n1", &format!("ip addr add {METADATA}/32 dev lo"))?;
    ensure!(added.ok, "{}", added.all());
    let secret = SocketAddr::new(address(METADATA)?, 80);
    let listener = node.enter(|| Ok(TcpListener::bind(secret)?))?;
    listener.set_nonblocking(true)?;
    node.enter(|| Ok(TcpStream::connect_timeout(&secret, ANSWER)?))?;
    ensure!(listener.accept().is_ok(), "the node itself reaches it");
    for (who, place) in [("a pod", asks), ("the node", node)] {
        for hooked in [true, false] {
            let joined = if hooked { Some(Joined::node(cluster, "n1")?) } else { None };
            let reached = place.enter(|| Ok(TcpStream::connect_timeout(&vip, Duration::from_secs(1)).is_ok()))?;
            drop(joined);
            ensure!(
                !reached && listener.accept().is_err(),
                "{who} reaches it through the Service (in a cgroup: {hooked})"
            );
        }
    }
    Ok(())
}

/// Since when it is said.
fn refusal_is_said(cluster: &Cluster) -> Result<Instant> {
    let event = wait("an Event on the Service", SAID, || {
        let events = events(cluster, "stolen")?;
        events.first().cloned().context("there is none")
    })?;
    let since = Instant::now();
    let note = [field(&event, "/note"), field(&event, "/message")].concat();
    ensure!(note.contains(METADATA) && note.contains("metadata"), "{event}");
    ensure!(field(&event, "/type") == "Warning", "{event}");
    let uid = field(&cluster.get("service", "stolen")?, "/metadata/uid");
    ensure!([field(&event, "/regarding/uid"), field(&event, "/involvedObject/uid")].contains(&uid), "{event}");
    let (leads, view) = shown(cluster, &["show", "default/stolen", "--no-connections"])?;
    ensure!(!leads && view.pointer("/ports/0/backends/0/state") == Some(&Value::from("refused")), "{view}");
    ensure!(view.pointer("/refused/0").is_some_and(|why| why.to_string().contains(METADATA)), "{view}");
    Ok(since)
}

fn connections_are_counted(cluster: &Cluster, asks: &Place) -> Result<()> {
    let vip = SocketAddr::new(address(&field(&cluster.get("service", "web")?, "/spec/clusterIP"))?, 80);
    let open = || asks.enter(|| Session::open(vip, ANSWER));
    let first = wait("the Service", PATIENCE, || {
        let mut session = open()?;
        session.ask(ANSWER)?;
        Ok(session)
    })?;
    let mut sessions = vec![first];
    // At the pod's device, and in the sockets.
    sessions.push(open()?);
    let joined = Joined::node(cluster, "n1")?;
    for _ in 0..3 {
        sessions.push(open()?);
    }
    drop(joined);
    for session in &mut sessions {
        session.ask(ANSWER)?;
    }
    let count = |wanted: u64| {
        wait(&format!("{wanted} connections"), PATIENCE, || {
            let (leads, view) = shown(cluster, &["show", "web"])?;
            let backend = view.pointer("/ports/0/backends/0").cloned().unwrap_or_default();
            if !leads || backend.get("connections") != Some(&Value::from(wanted)) {
                bail!("{view}");
            }
            Ok(view)
        })
    };
    let view = count(5)?;
    let backend = view.pointer("/ports/0/backends/0").cloned().unwrap_or_default();
    ensure!(field(&backend, "/state") == "ready" && field(&backend, "/node") == "n2", "{view}");
    ensure!(field(&backend, "/pod") == "default/web", "{view}");
    ensure!(backend.pointer("/outside/usedBy") == Some(&serde_json::json!(["n2"])), "{view}");
    ensure!(backend.pointer("/inside/usedBy") == Some(&serde_json::json!(["n1", "n2"])), "{view}");
    ensure!(view.pointer("/countedOn") == Some(&serde_json::json!(["n1", "n2"])), "{view}");
    sessions.truncate(1);
    count(1)?;
    let (_, list) = shown(cluster, &["list", "--connections", "-n", "default"])?;
    let names: Vec<String> = list.as_array().into_iter().flatten().map(|one| field(one, "/name")).collect();
    ensure!(names.contains(&"web".to_owned()) && names.contains(&"stolen".to_owned()), "{names:?}");
    Ok(())
}

/// The same words are said by one node, and once.
fn is_said_once(cluster: &Cluster, since: Instant) -> Result<()> {
    std::thread::sleep(SAID_AGAIN.saturating_sub(since.elapsed()));
    let events = events(cluster, "stolen")?;
    ensure!(events.len() == 1, "{} Events: {events:#?}", events.len());
    Ok(())
}

fn metrics_have_the_names_of_kube_proxy(cluster: &Cluster) -> Result<()> {
    let config = cluster.node("n1", "for p in 9116; do wget -qO- http://127.0.0.1:$p/metrics; done")?;
    let text = config.out;
    for name in [
        "kubeproxy_network_programming_duration_seconds_bucket",
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
        "kubeproxy_sync_proxy_rules_endpoint_changes_total",
        "kubeproxy_conntrack_reconciler_deleted_entries_total",
        "towpath_udp_sockets_released_total",
    ] {
        ensure!(text.contains(name), "{name} is missing: {} {text}", config.err);
    }
    let local = r#"kubeproxy_sync_proxy_rules_no_local_endpoints_total{ip_family="IPv4",traffic_policy="external"} 1"#;
    ensure!(text.contains(local), "n1 has no endpoint of a Service with a Local policy: {text}");
    ensure!(text.trim_end().ends_with("# EOF"), "the end");
    Ok(())
}

#[test]
fn a_service_is_shown_and_what_it_does_not_get_is_said() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let cluster = Cluster::up("e2e-service", 2, Families::Ipv4)?;
    cluster.apply_text(&(server("web", "n2", "app: web") + &shell("asks", "n1", "") + OBJECTS))?;
    cluster.wait_pod("web")?;
    let asks = cluster.wait_pod("asks")?;
    let (asks, node) = (Place::of_pod(&cluster, &asks)?, Place::of_node(&cluster, "n1")?);
    endpoint_is_refused(&cluster, &asks, &node)?;
    let since = refusal_is_said(&cluster)?;
    connections_are_counted(&cluster, &asks)?;
    metrics_have_the_names_of_kube_proxy(&cluster)?;
    is_said_once(&cluster, since)?;
    cluster.down()
}
