//! New pods: many ADDs at once, and each one's address from the answer to ADD until the policies of all other nodes know it.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::Run;
use crate::api::Kind;
use crate::burst;
use crate::cni::{Plugin, first_plugin};
use crate::fresh::Request;
use crate::interrupt;
use crate::lab::{Lab, NAMESPACE, beside, wait};
use crate::load::PORT;
use crate::noise::{Own, Snapshot};
use crate::place::Place;
use crate::row::{About, Goal, Row, Unit};
use crate::stats;
use crate::worker::Worker;

/// Longest time for one container, and for the rest.
const SLACK: Duration = Duration::from_secs(15);
/// Between two bursts.
const REST: Duration = Duration::from_secs(3);
/// Only these pods may talk to the servers.
const LABEL: &str = "fresh";

/// Measures it.
///
/// # Errors
/// A server does not let a pod in.
pub(super) fn measure(run: &mut Run, lab: &mut Lab) -> Result<()> {
    let count = run.options.fresh_pods;
    let peers = [lab.pod("peer-2", "n2")?, lab.pod("peer-3", "n3")?];
    let servers = peers.iter().map(|peer| Worker::start("a peer", &peer.place, &["serve-udp"]));
    let _servers: Vec<Worker> = servers.collect::<Result<_>>()?;
    lab.api.create(&["peer-2", "peer-3"].map(isolation))?;
    crate::report::progress(&format!("making {count} pods"));
    let names: Vec<String> = (0..count).map(|number| format!("fresh-{number}")).collect();
    let objects: Vec<Value> = names.iter().map(|name| pending(name)).collect();
    lab.api.create(&objects)?;
    let mut pods = Vec::new();
    for name in &names {
        let uid = wait(&format!("pod {name}"), || {
            let pod = lab.api.get(Kind::Pod, name)?;
            Ok(pod.and_then(|pod| Some(pod.pointer("/metadata/uid")?.as_str()?.to_owned())))
        })?;
        pods.push(format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={name};K8S_POD_UID={uid}"));
    }

    let file = lab.node_run("n1").join("cni/net.d/10-towpath.conflist");
    let text = std::fs::read(&file).with_context(|| format!("read {}", file.display()))?;
    let config = first_plugin(&serde_json::from_slice(&text)?)?;
    let plugin = Plugin::new(beside("towpath-cni")?);
    let node = Place { netns: Some(lab.node_netns("n1")), ..Place::default() };
    let at_once = burst::Request {
        plugin: plugin.clone(),
        config: config.clone(),
        pods: pods.iter().take(run.options.at_once).cloned().collect(),
    };
    burst_of(run, lab, &node, &at_once)?;

    let mut runtime = Worker::start("the runtime of n1", &node, &["fresh-pods"])?;
    let servers: Vec<SocketAddr> = peers.iter().map(|peer| SocketAddr::new(peer.ip, PORT)).collect();

    let own = Own { pids: [std::process::id(), runtime.pid()].into(), cgroup: Some(lab.cgroup_name()) };
    let before = Snapshot::take()?;
    let mut times: Vec<f64> = Vec::new();
    for (number, some) in pods.chunks(10).enumerate() {
        interrupt::check()?;
        crate::report::progress(&format!("new pods, {} of {count}", number * 10));
        let request =
            Request { plugin: plugin.clone(), config: config.clone(), pods: some.to_vec(), servers: servers.clone() };
        times.extend(runtime.ask::<Vec<f64>>(&request, SLACK * 10)?);
    }
    crate::report::progress("");
    let noise = before.until(&Snapshot::take()?, &own);
    lab.api.delete(Kind::Pod, &names)?;
    lab.api.delete(Kind::NetworkPolicy, &["peer-2".to_owned(), "peer-3".to_owned()])?;

    let median = stats::median(&times).unwrap_or(0.0);
    let (late, worst) = (stats::percentile(&times, 99.0), times.iter().copied().fold(0.0, f64::max));
    let about = About {
        id: "fresh.p99".to_owned(),
        title: "new pod, from the answer to ADD until all peers' policies know it, 99th percentile".to_owned(),
        goal: Some(Goal::AtMost(100.0)),
    };
    let note = format!("3 nodes, {} pods; median {median:.1} ms, worst {worst:.1} ms", times.len());
    let row = Row::of_samples(about, Unit::Milliseconds, late.into_iter().collect(), note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));
    Ok(())
}

/// All of these at once, several times.
fn burst_of(run: &mut Run, lab: &Lab, node: &Place, request: &burst::Request) -> Result<()> {
    let mut runtime = Worker::start("the runtime of n1", node, &["burst"])?;
    let own = Own { pids: [std::process::id(), runtime.pid()].into(), cgroup: Some(lab.cgroup_name()) };
    let before = Snapshot::take()?;
    let (mut last, mut all) = (Vec::new(), burst::Done::default());
    for number in 0..run.options.bursts {
        interrupt::check()?;
        crate::report::progress(&format!("{} ADDs at once, {number} of {}", request.pods.len(), run.options.bursts));
        let done: burst::Done = runtime.ask(request, SLACK * 10)?;
        last.push(done.adds.iter().copied().fold(0.0, f64::max));
        all.adds.extend(done.adds);
        all.dels.extend(done.dels);
        // The devices of these are taken away behind the runtime's back.
        std::thread::sleep(REST);
    }
    crate::report::progress("");
    let noise = before.until(&Snapshot::take()?, &own);
    let at = |times: &[f64], share: f64| stats::percentile(times, share).unwrap_or(0.0);
    let note = format!(
        "ADD: median {:.0} ms, 99th percentile {:.0} ms; DEL, all at once, too: median {:.0} ms, 99th percentile {:.0} ms",
        at(&all.adds, 50.0),
        at(&all.adds, 99.0),
        at(&all.dels, 50.0),
        at(&all.dels, 99.0)
    );
    let about = About {
        id: "fresh.burst".to_owned(),
        title: format!("{} ADDs at once, until the last is answered", request.pods.len()),
        goal: Some(Goal::AtMost(1500.0)),
    };
    let row = Row::of_samples(about, Unit::Milliseconds, last, note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));
    Ok(())
}

/// Nobody talks to this pod but those with the label.
fn isolation(pod: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": pod, "namespace": NAMESPACE},
        "spec": {
            "podSelector": {"matchLabels": {"app": pod}},
            "ingress": [{"from": [{"podSelector": {"matchLabels": {LABEL: "yes"}}}]}],
        },
    })
}

/// A pod that its kubelet does not start, because a volume is missing: its sandbox is ours to make.
fn pending(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {LABEL: "yes"}},
        "spec": {
            "nodeName": "n1",
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "never", "configMap": {"name": "never-there"}}],
            "containers": [{"name": "sleep", "image": "busybox", "command": ["sleep", "1"], "volumeMounts": [{"name": "never", "mountPath": "/never"}]}],
        },
    })
}
