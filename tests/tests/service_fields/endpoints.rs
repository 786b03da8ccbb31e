//! Which endpoints count: readiness, termination, and where they are listed.

use anyhow::Result;

use crate::scene::{Outcome, Scene, ends, only};

/// A NodePort Service without a selector; `more` lines of its spec.
fn service(name: &str, port: u16, more: &str) -> String {
    format!(
        "---\napiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  type: NodePort\n{more}  \
         ports: [{{name: http, port: 80, nodePort: {port}}}]\n"
    )
}

/// A slice of it, with endpoints on nodes in these conditions.
fn slice(scene: &Scene, of: &str, number: u32, endpoints: &[(&str, &str)]) -> Result<String> {
    let mut list = Vec::new();
    for (node, conditions) in endpoints {
        let ip = scene.web_ip(node, false)?;
        list.push(format!("{{addresses: [{ip}], nodeName: {node}, conditions: {{{conditions}}}}}"));
    }
    Ok(format!(
        "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {of}-{number}, labels: {{kubernetes.io/service-name: {of}}}}}\naddressType: IPv4\n\
         ports: [{{name: http, protocol: TCP, port: 80}}]\nendpoints: [{}]\n",
        list.join(", ")
    ))
}

/// From everywhere these pods answer at the cluster address, and at n2's NodePort.
fn all_get(scene: &Scene, service: &str, port: u16, pods: &[&str]) -> Result<()> {
    let (vip, node_port) = (scene.at_vip(service, 80)?, scene.at_node("n2", port)?);
    for (what, from, _) in scene.inside() {
        only(what, from, vip, pods)?;
    }
    scene.everywhere().iter().try_for_each(|(what, from)| only(what, from, node_port, pods))
}

/// From everywhere it is refused.
fn all_refused(scene: &Scene, service: &str, port: u16) -> Result<()> {
    let (vip, node_port) = (scene.at_vip(service, 80)?, scene.at_node("n2", port)?);
    for (what, from, _) in scene.inside() {
        ends(what, from, vip, Outcome::Refused)?;
    }
    scene.everywhere().iter().try_for_each(|(what, from)| ends(what, from, node_port, Outcome::Refused))
}

pub(crate) fn not_ready(scene: &Scene) -> Result<()> {
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: unready, labels: {app: unready}}\nspec:\n  nodeName: n3\n  \
               terminationGracePeriodSeconds: 0\n  containers:\n  - name: web\n    image: nginx\n    ports: [{containerPort: 80}]\n    \
               readinessProbe: {exec: {command: [\"false\"]}}\n";
    let with = |name: &str, port: u16, publish: bool| {
        service(name, port, &format!("  selector: {{app: unready}}\n  publishNotReadyAddresses: {publish}\n"))
    };
    scene.apply(&(pod.to_owned() + &with("published", 30140, true) + &with("unpublished", 30141, false)))?;
    all_get(scene, "published", 30140, &["unready"])?;
    all_refused(scene, "unpublished", 30141)
}

pub(crate) fn terminating(scene: &Scene) -> Result<()> {
    const READY: &str = "ready: true, serving: true, terminating: false";
    const GOING: &str = "ready: false, serving: true, terminating: true";
    const GONE: &str = "ready: false, serving: false, terminating: true";
    // Those that still serve, for want of others.
    let going = slice(scene, "going", 1, &[("n1", GOING), ("n2", GOING), ("n3", GONE)])?;
    scene.apply(&(service("going", 30142, "") + &going))?;
    all_get(scene, "going", 30142, &["web-n1", "web-n2"])?;
    scene.apply(&slice(scene, "going", 1, &[("n1", GOING), ("n2", READY), ("n3", GONE)])?)?;
    all_get(scene, "going", 30142, &["web-n2"])?;
    scene.apply(&slice(scene, "going", 1, &[("n1", GONE), ("n2", GONE), ("n3", GONE)])?)?;
    all_refused(scene, "going", 30142)?;
    // Each node falls back for itself where only its own count.
    let both = "  externalTrafficPolicy: Local\n  internalTrafficPolicy: Local\n";
    let leaving = slice(scene, "leaving", 1, &[("n1", GOING), ("n2", READY), ("n3", READY)])?;
    scene.apply(&(service("leaving", 30143, both) + &leaving))?;
    let vip = scene.at_vip("leaving", 80)?;
    only("a pod's socket", &scene.hooked, vip, &["web-n1"])?;
    only("a node", &scene.node, vip, &["web-n1"])?;
    only("a pod's device", &scene.plain, vip, &["web-n2"])?;
    only("outside", &scene.outside, scene.at_node("n1", 30143)?, &["web-n1"])?;
    only("outside", &scene.outside, scene.at_node("n3", 30143)?, &["web-n3"])
}

pub(crate) fn by_hand(scene: &Scene) -> Result<()> {
    let slices = slice(scene, "sliced", 1, &[("n1", "")])? + &slice(scene, "sliced", 2, &[("n2", ""), ("n3", "")])?;
    scene.apply(&(service("sliced", 30144, "") + &slices))?;
    all_get(scene, "sliced", 30144, &["web-n1", "web-n2", "web-n3"])?;
    // The older object, mirrored.
    let endpoints = format!(
        "---\napiVersion: v1\nkind: Endpoints\nmetadata: {{name: older}}\nsubsets:\n- addresses: [{{ip: {}}}, {{ip: {}}}]\n  \
         ports: [{{name: http, port: 80}}]\n",
        scene.web_ip("n1", false)?,
        scene.web_ip("n3", false)?
    );
    scene.apply(&(service("older", 30145, "") + &endpoints))?;
    all_get(scene, "older", 30145, &["web-n1", "web-n3"])
}
