//! Who among the endpoints is for whom: policies of traffic, affinity, distribution.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use towpath_walkthrough::cluster::{field, wait};
use towpath_walkthrough::place::Place;

use crate::scene::{NODES, Outcome, PATIENCE, Scene, ask, ask_often, connect, ends, only, who, whole};

/// Endpoints on n1 and n2, none on n3.
pub(crate) fn external_local(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: local}\nspec:\n  type: LoadBalancer\n  externalTrafficPolicy: Local\n  \
         selector: {role: pair}\n  ports: [{port: 80, nodePort: 30130}]\n",
    )?;
    let check: u16 = field(&scene.cluster.get("service", "local")?, "/spec/healthCheckNodePort").parse()?;
    for node in ["n1", "n2"] {
        let (port, pod) = (scene.at_node(node, 30130)?, format!("web-{node}"));
        only("outside", &scene.outside, port, &[&pod])?;
        let client = ask(&scene.outside, port)?.client;
        ensure!(client.to_string() == "192.168.26.10", "{node}: the host outside is seen as {client}");
        // Who is inside is no traffic from outside: at its own node's address it gets all endpoints.
        let own = if node == "n1" { [Some(&scene.hooked), Some(&scene.node)] } else { [Some(&scene.plain), None] };
        for from in own.into_iter().flatten() {
            only(from.name(), from, port, &["web-n1", "web-n2"])?;
        }
    }
    ensure!(connect(&scene.outside, scene.at_node("n3", 30130)?)? != Outcome::Connected, "n3 has no endpoint of it");
    let balancer = SocketAddr::new(scene.balancer("local")?, 80);
    for (what, from, _) in scene.inside() {
        only(what, from, balancer, &["web-n1", "web-n2"])?;
    }
    let seen = wait("the load balancer's address", PATIENCE, || ask(&scene.outside, balancer))?;
    ensure!(seen.client.to_string() == "192.168.26.10", "{seen:?}");
    healthy_where_local(scene, check)
}

fn healthy_where_local(scene: &Scene, check: u16) -> Result<()> {
    for (node, count) in NODES.iter().zip([1, 1, 0]) {
        let to = scene.at_node(node, check)?;
        let status = if count > 0 { "HTTP/1.1 200" } else { "HTTP/1.1 503" };
        for (what, from) in [("outside", &scene.outside), ("a node", &scene.node), ("a pod's device", &scene.plain)] {
            let text = wait(&format!("{status} of {to} for {what}"), PATIENCE, || {
                let text = whole(from, to, "/healthz")?;
                if text.starts_with(status) { Ok(text) } else { bail!("{text}") }
            })?;
            let (head, body) = text.split_once("\r\n\r\n").context("no body")?;
            let head = head.to_ascii_lowercase();
            for header in [
                "content-type: application/json".to_owned(),
                "x-content-type-options: nosniff".to_owned(),
                format!("x-load-balancing-endpoint-weight: {count}"),
            ] {
                ensure!(head.contains(&header), "{node} says no {header}: {text}");
            }
            let body: serde_json::Value = serde_json::from_str(body)?;
            let wanted = serde_json::json!({
                "service": {"namespace": "default", "name": "local"}, "localEndpoints": count, "serviceProxyHealthy": true,
            });
            ensure!(body == wanted, "{node}: {body}");
        }
    }
    Ok(())
}

pub(crate) fn internal_local(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: within}\nspec:\n  type: NodePort\n  internalTrafficPolicy: Local\n  \
         selector: {role: pair}\n  ports: [{port: 80, nodePort: 30131}]\n",
    )?;
    let vip = scene.at_vip("within", 80)?;
    only("a pod's socket", &scene.hooked, vip, &["web-n1"])?;
    only("a node", &scene.node, vip, &["web-n1"])?;
    only("a pod's device", &scene.plain, vip, &["web-n2"])?;
    ensure!(connect(&scene.third, vip)? != Outcome::Connected, "n3 has no endpoint of it");
    // It says nothing of what comes from outside.
    NODES
        .iter()
        .try_for_each(|node| only("outside", &scene.outside, scene.at_node(node, 30131)?, &["web-n1", "web-n2"]))
}

const AFFINITY: Duration = Duration::from_secs(3);

/// The same endpoint while it is asked again in time; sooner or later another when it is not.
fn stays_and_leaves(what: &str, from: &Place, to: SocketAddr) -> Result<()> {
    let first = wait("an answer", PATIENCE, || ask(from, to))?;
    // Asked for twice the time, with pauses that are shorter.
    let begun = Instant::now();
    while begun.elapsed() < AFFINITY * 2 {
        let answers = ask_often(from, to, 5)?;
        let others = answers.iter().filter(|answer| answer.pod != first.pod).count();
        ensure!(others == 0, "{what}: {others} of 5 went elsewhere than {}, after {:?}", first.pod, begun.elapsed());
        std::thread::sleep(AFFINITY / 3);
    }
    // Each time another is as likely as two of three.
    for _ in 0..10 {
        std::thread::sleep(AFFINITY + Duration::from_millis(600));
        if ask(from, to)?.pod != first.pod {
            return Ok(());
        }
    }
    bail!("{what}: it is {} for ever", first.pod)
}

pub(crate) fn affinity(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: sticky}\nspec:\n  type: NodePort\n  sessionAffinity: ClientIP\n  \
         sessionAffinityConfig: {clientIP: {timeoutSeconds: 3}}\n  selector: {app: web}\n  ports: [{port: 80, nodePort: 30132}]\n",
    )?;
    let (vip, port) = (scene.at_vip("sticky", 80)?, scene.at_node("n2", 30132)?);
    let aims = [
        ("a pod's socket", &scene.hooked, vip),
        ("a pod's device", &scene.plain, vip),
        ("a node", &scene.node, vip),
        ("outside", &scene.outside, port),
    ];
    for (what, from, to) in &aims {
        // All three endpoints are there before one is settled on: else the first would be the only one.
        wait("the Service", PATIENCE, || ask(from, *to)).with_context(|| (*what).to_owned())?;
    }
    std::thread::scope(|scope| {
        let threads = aims.map(|(what, from, to)| scope.spawn(move || stays_and_leaves(what, from, to)));
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?)
    })
}

/// As the controller of slices writes it for `trafficDistribution`: hints on every endpoint. n1 is in the zone east, the others in west.
fn hinted(
    scene: &Scene,
    (name, port): (&str, u16),
    distribution: &str,
    hint: fn(&str, &str) -> String,
) -> Result<String> {
    let mut endpoints = Vec::new();
    for (node, zone) in NODES.iter().zip(["east", "west", "west"]) {
        let ip = scene.web_ip(node, false)?;
        endpoints
            .push(format!("{{addresses: [{ip}], nodeName: {node}, zone: {zone}, hints: {{{}}}}}", hint(node, zone)));
    }
    Ok(format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: NodePort\n  trafficDistribution: {distribution}\n  \
         ports: [{{name: http, port: 80, nodePort: {port}}}]\n---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\naddressType: IPv4\n\
         ports: [{{name: http, protocol: TCP, port: 80}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    ))
}

pub(crate) fn distribution(scene: &Scene) -> Result<()> {
    let by_zone = |_: &str, zone: &str| format!("forZones: [{{name: {zone}}}]");
    let by_node = |node: &str, zone: &str| format!("forZones: [{{name: {zone}}}], forNodes: [{{name: {node}}}]");
    let none_for_n1 = |node: &str, zone: &str| match node {
        "n1" => "forZones: [{name: west}], forNodes: [{name: n2}]".to_owned(),
        _ => format!("forZones: [{{name: {zone}}}], forNodes: [{{name: {node}}}]"),
    };
    scene.apply(&hinted(scene, ("same-zone", 30133), "PreferSameZone", by_zone)?)?;
    scene.apply(&hinted(scene, ("same-node", 30134), "PreferSameNode", by_node)?)?;
    scene.apply(&hinted(scene, ("others", 30135), "PreferSameNode", none_for_n1)?)?;
    let east: &[&str] = &["web-n1"];
    let west: &[&str] = &["web-n2", "web-n3"];
    let all: &[&str] = &["web-n1", "web-n2", "web-n3"];
    for (service, port, wanted) in [
        ("same-zone", 30133, [east, west]),
        ("same-node", 30134, [east, &["web-n2"]]),
        ("others", 30135, [all, &["web-n1", "web-n2"]]),
    ] {
        let vip = scene.at_vip(service, 80)?;
        only("a pod's socket", &scene.hooked, vip, wanted[0])?;
        only("a node", &scene.node, vip, wanted[0])?;
        only("a pod's device", &scene.plain, vip, wanted[1])?;
        // Where they come in, clients from outside are where the node is.
        only("outside", &scene.outside, scene.at_node("n1", port)?, wanted[0])?;
        only("outside", &scene.outside, scene.at_node("n2", port)?, wanted[1])?;
    }
    let left = who(&scene.third, scene.at_vip("same-node", 80)?, 20)?;
    ensure!(left.len() == 1 && left.contains("web-n3"), "{left:?}");
    ends("a pod's device", &scene.plain, scene.at_vip("same-node", 81)?, Outcome::Refused)
}
