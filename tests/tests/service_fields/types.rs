//! Types of Services, their ports and families.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail, ensure};
use towpath_walkthrough::cluster::{field, wait};
use towpath_walkthrough::log::{Log, Voice};

use crate::scene::{NODES, Outcome, PATIENCE, Scene, ask, ask_often, ask_udp, ends, only};

const WEBS: [&str; 3] = ["web-n1", "web-n2", "web-n3"];

pub(crate) fn ports(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: ports}\nspec:\n  ipFamilyPolicy: RequireDualStack\n  selector: {app: web}\n  ports:\n  \
         - {name: named, port: 80, targetPort: http}\n  - {name: number, port: 81, targetPort: 80}\n  \
         - {name: udp, port: 80, targetPort: 80, protocol: UDP}\n",
    )?;
    for six in [false, true] {
        let vip = scene.vip("ports", six)?;
        for (what, from, pod) in scene.inside() {
            only(what, from, SocketAddr::new(vip, 80), &WEBS)?;
            only(what, from, SocketAddr::new(vip, 81), &WEBS)?;
            let answer = ask(from, SocketAddr::new(vip, 81))?;
            if !pod.is_empty() {
                ensure!(answer.client == scene.asker_ip(pod, six)?, "{what} is seen as {}", answer.client);
            }
            let mut found = BTreeSet::new();
            wait("all servers by UDP", PATIENCE, || {
                found.insert(ask_udp(from, SocketAddr::new(vip, 80))?.pod);
                if found.len() == WEBS.len() { Ok(()) } else { bail!("{what}: {found:?}") }
            })?;
            // Of the Service's address, what no port of it is never leaves the node.
            ends(what, from, SocketAddr::new(vip, 82), Outcome::Refused)?;
            match ask_udp(from, SocketAddr::new(vip, 81)) {
                // A sender whose own node rejects the packet is told at once.
                Err(error) if ["refused", "not permitted"].iter().any(|word| format!("{error:#}").contains(word)) => {}
                other => bail!("{what}: UDP to a port of TCP only: {other:?}"),
            }
        }
    }
    Ok(())
}

pub(crate) fn node_ports(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: node-ports}\nspec:\n  type: NodePort\n  ipFamilyPolicy: RequireDualStack\n  \
         selector: {app: web}\n  ports:\n  - {name: tcp, port: 80, targetPort: http, nodePort: 30110}\n  \
         - {name: udp, port: 80, targetPort: 80, nodePort: 30110, protocol: UDP}\n",
    )?;
    for six in [false, true] {
        for node in NODES {
            let to = SocketAddr::new(scene.node_ip(node, six)?, 30110);
            for (what, from) in scene.everywhere() {
                only(what, from, to, &WEBS)?;
                ask_udp(from, to)?;
            }
            // Wherever it enters and whoever serves it, the client's address is its own.
            let seen: BTreeSet<IpAddr> =
                ask_often(&scene.outside, to, 12)?.iter().map(|answer| answer.client).collect();
            let (_, own) = outside_ip(scene, six)?;
            ensure!(seen == BTreeSet::from([own]), "{to}: the host outside is seen as {seen:?}");
            ensure!(ask_udp(&scene.outside, to)?.client == own, "{to}: by UDP, too");
        }
        let loopback: IpAddr = if six { Ipv6Addr::LOCALHOST.into() } else { Ipv4Addr::LOCALHOST.into() };
        only("a node", &scene.node, SocketAddr::new(loopback, 30110), &WEBS)?;
        ends("a pod's socket", &scene.hooked, SocketAddr::new(loopback, 30110), Outcome::Refused)?;
    }
    Ok(())
}

/// The address by which the host outside reaches nodes.
fn outside_ip(scene: &Scene, six: bool) -> Result<(String, IpAddr)> {
    let to = scene.node_ip("n1", six)?;
    let said = scene.cluster.outside(&format!("ip -o route get {to}"))?.out;
    let source = said.split_whitespace().skip_while(|word| *word != "src").nth(1).unwrap_or_default();
    Ok((said.clone(), source.parse()?))
}

pub(crate) fn without_node_ports(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: portless}\nspec:\n  type: LoadBalancer\n  \
         allocateLoadBalancerNodePorts: false\n  selector: {app: web}\n  ports: [{port: 80}]\n",
    )?;
    let port = field(&scene.cluster.get("service", "portless")?, "/spec/ports/0/nodePort");
    ensure!(port.is_empty() || port == "0", "it has a NodePort: {port}");
    let to = SocketAddr::new(scene.balancer("portless")?, 80);
    for (what, from) in scene.everywhere() {
        only(what, from, to, &WEBS)?;
    }
    Ok(())
}

/// The agents' range ends before the API server's: nobody takes such a port from the node.
pub(crate) fn node_port_range(scene: &Scene) -> Result<()> {
    scene.apply(
        "apiVersion: v1\nkind: Service\nmetadata: {name: beyond}\nspec:\n  type: NodePort\n  selector: {app: web}\n  \
         ports: [{name: in, port: 80, nodePort: 31999}, {name: out, port: 81, targetPort: 80, nodePort: 32000}]\n",
    )?;
    for (what, from) in scene.everywhere() {
        only(what, from, scene.at_node("n2", 31999)?, &WEBS)?;
        ends(what, from, scene.at_node("n2", 32000)?, Outcome::Refused)?;
    }
    only("a pod's socket", &scene.hooked, scene.at_vip("beyond", 81)?, &WEBS)
}

pub(crate) fn of_another_proxy(scene: &Scene) -> Result<()> {
    let service = |labels: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: proxied, labels: {{{labels}}}}}\nspec:\n  type: NodePort\n  selector: {{app: web}}\n  \
             ports: [{{port: 80, nodePort: 30120}}]\n"
        )
    };
    scene.apply(&service("a: b"))?;
    let (vip, port) = (scene.at_vip("proxied", 80)?, scene.at_node("n2", 30120)?);
    for (what, from, _) in scene.inside() {
        only(what, from, vip, &WEBS)?;
    }
    only("outside", &scene.outside, port, &WEBS)?;
    scene.apply(&service(
        "service.kubernetes.io/proxy-name: another, service.kubernetes.io/service-proxy-name: another",
    ))?;
    ends("outside", &scene.outside, port, Outcome::Refused)?;
    for (what, from, _) in scene.inside() {
        not_served(what, scene, from, vip)?;
    }
    let log = Log::new(Voice::Plain);
    scene.cluster.kubectl(&log, &["label", "service", "proxied", "service.kubernetes.io/service-proxy-name-"])?;
    only("a pod's device", &scene.plain, vip, &WEBS)
}

/// Nobody answers; whether that is silence or a refusal is the business of whoever routes the address.
fn not_served(what: &str, _: &Scene, from: &towpath_walkthrough::place::Place, to: SocketAddr) -> Result<()> {
    wait(&format!("nobody at {to} from {what}"), PATIENCE, || match crate::scene::connect(from, to) {
        Ok(Outcome::Connected) => bail!("somebody answers"),
        _ => Ok(()),
    })
}

/// The label on a Service, and on a slice made by hand: neither is for service proxies.
pub(crate) fn headless(scene: &Scene) -> Result<()> {
    let slice = |labels: &str| {
        Ok::<_, anyhow::Error>(format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: half-1, labels: {{kubernetes.io/service-name: half{labels}}}}}\n\
             addressType: IPv4\nports: [{{name: http, protocol: TCP, port: 80}}]\nendpoints: [{{addresses: [{}]}}]\n",
            scene.web_ip("n3", false)?
        ))
    };
    let service =
        "apiVersion: v1\nkind: Service\nmetadata: {name: half}\nspec: {ports: [{name: http, port: 80}]}\n---\n";
    scene.apply(&(service.to_owned() + &slice("")?))?;
    let vip = scene.at_vip("half", 80)?;
    for (what, from, _) in scene.inside() {
        only(what, from, vip, &["web-n3"])?;
    }
    scene.apply(&slice(", service.kubernetes.io/headless: \"\"")?)?;
    for (what, from, _) in scene.inside() {
        ends(what, from, vip, Outcome::Refused)?;
    }
    scene.apply(&slice("")?)?;
    only("a pod's device", &scene.plain, vip, &["web-n3"])?;
    let log = Log::new(Voice::Plain);
    scene.cluster.kubectl(&log, &["label", "service", "half", "service.kubernetes.io/headless="])?;
    for (what, from, _) in scene.inside() {
        not_served(what, scene, from, vip)?;
    }
    Ok(())
}
