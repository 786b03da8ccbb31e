//! Services: addresses that stay while pods come and go.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};

use super::{Hope, fetch, fetch_from_host};
use crate::cluster::{Cluster, Pod, field, host, template, wait};
use crate::log::Log;

/// Requests until every one of `names` has answered, at most `limit` of them.
fn answered_by(mut request: impl FnMut() -> Result<String>, names: &[String], limit: u32) -> Result<BTreeSet<String>> {
    let mut seen = BTreeSet::new();
    for _ in 0..limit {
        let body = request()?;
        seen.extend(names.iter().filter(|n| body.contains(n.as_str())).cloned());
        if seen.len() == names.len() {
            break;
        }
    }
    Ok(seen)
}

pub(super) fn w3(cluster: &Cluster, log: &mut Log) -> Result<()> {
    cluster.apply(log, "w03-httpd.yaml")?;
    let pods = cluster.wait_ready("run=httpd", 3)?;
    let names: Vec<String> = pods.iter().map(|p| p.name.clone()).collect();
    for pod in &pods {
        let said = cluster.exec("near", &fetch(&format!("http://{}:80/", host(&pod.ip))))?;
        log.expect(format!("pod address {}:80", pod.ip), said.ok && said.out.contains(&pod.name), said.all());
    }
    let address = field(&cluster.get("svc", "httpd-svc")?, "/spec/clusterIP");
    let by_address = fetch(&format!("http://{}:8080/", host(&address)));
    for (place, said) in [
        ("a pod", cluster.exec("near", &by_address)?),
        ("a pod on another node", cluster.exec("far", &by_address)?),
        ("a node", cluster.node("n3", &fetch_from_host(&format!("http://{}:8080/", host(&address))))?),
    ] {
        log.expect(
            format!("ClusterIP {address}:8080 from {place}"),
            said.ok && said.out.contains("httpd-"),
            said.all(),
        );
    }
    let said = cluster.exec("near", &fetch("http://httpd-svc:8080/"))?;
    log.expect("http://httpd-svc:8080 from a pod", said.ok && said.out.contains("httpd-"), said.all());
    for (node, ip) in cluster.nodes()? {
        let url = format!("http://{}:30000/", host(&ip));
        for (place, said) in [
            ("a pod", cluster.exec("far", &fetch(&url))?),
            ("a node", cluster.node("n1", &fetch_from_host(&url))?),
            ("a host outside", cluster.outside(&fetch_from_host(&url))?),
        ] {
            log.expect(
                format!("NodePort {node}:30000 from {place}"),
                said.ok && said.out.contains("httpd-"),
                said.all(),
            );
        }
    }
    let loop_of = |url: &str| format!("for i in $(seq 1 60); do {url}; done");
    let seen = answered_by(|| Ok(cluster.exec("near", &loop_of(&by_address))?.out), &names, 1)?;
    log.expect("requests of a pod reach all three replicas", seen.len() == 3, format!("reached {seen:?} of {names:?}"));
    let (_, ip) = cluster.nodes()?.into_iter().next().unwrap_or_default();
    let node_port = fetch_from_host(&format!("http://{}:30000/", host(&ip)));
    let seen = answered_by(|| Ok(cluster.outside(&loop_of(&node_port))?.out), &names, 1)?;
    log.expect(
        "requests from outside reach all three replicas",
        seen.len() == 3,
        format!("reached {seen:?} of {names:?}"),
    );
    Ok(())
}

fn scale(cluster: &Cluster, log: &Log, replicas: usize) -> Result<()> {
    cluster.kubectl(log, &["scale", "deployment", "httpd", &format!("--replicas={replicas}")])?;
    cluster.wait_ready("run=httpd", replicas)?;
    wait(&format!("{replicas} endpoints"), Duration::from_secs(10), || {
        let slices = cluster.list("endpointslices", "kubernetes.io/service-name=httpd-svc")?;
        let ready: usize = slices
            .iter()
            .flat_map(|s| s.get("endpoints").and_then(|e| e.as_array()).cloned().unwrap_or_default())
            .filter(|e| field(e, "/conditions/ready") == "true")
            .count();
        // A dual-stack Service has a slice a family.
        let families = slices.iter().map(|s| field(s, "/addressType")).collect::<BTreeSet<_>>().len().max(1);
        if ready == replicas * families { Ok(()) } else { bail!("{ready} ready endpoints in {slices:?}") }
    })
}

fn replicas_come_and_go(cluster: &Cluster, log: &mut Log, before: &[Pod]) -> Result<()> {
    let victim = before.first().map(|p| p.name.clone()).unwrap_or_default();
    let victim_uid = before.first().map(|p| p.uid.clone()).unwrap_or_default();
    cluster.kubectl(log, &["delete", "pod", &victim])?;
    let after = cluster.wait_ready("run=httpd", 3)?;
    let fresh = after.iter().find(|p| before.iter().all(|b| b.uid != p.uid));
    log.expect(
        "the deleted pod comes back as another",
        after.iter().all(|p| p.uid != victim_uid) && fresh.is_some(),
        format!("{after:?}"),
    );
    scale(cluster, log, 5)?;
    scale(cluster, log, 1)?;
    // What still goes to who has just left.
    std::thread::sleep(Duration::from_secs(1));
    Ok(())
}

pub(super) fn w4(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let before = cluster.wait_ready("run=httpd", 3)?;
    let address = field(&cluster.get("svc", "httpd-svc")?, "/spec/clusterIP");
    let url = format!("http://{}:8080/", host(&address));
    let script = format!(
        "n=0; while [ ! -e /tmp/over ]; do n=$((n+1)); timeout 4 wget -q -O /dev/null {url} || echo FAILED $n; done; \
         rm /tmp/over; echo TRIED $n"
    );
    let traffic = std::thread::scope(|scope| -> Result<_> {
        let near = scope.spawn(|| cluster.exec("near", &script));
        let far = scope.spawn(|| cluster.exec("far", &script));
        let done = replicas_come_and_go(cluster, log, &before);
        for pod in ["near", "far"] {
            let said = cluster.exec(pod, "touch /tmp/over")?;
            ensure!(said.ok, "{}", said.all());
        }
        done?;
        let ended = |thread: std::thread::ScopedJoinHandle<'_, Result<crate::cluster::Said>>| match thread.join() {
            Ok(said) => said,
            Err(_) => bail!("the traffic thread panicked"),
        };
        Ok([ended(near)?, ended(far)?])
    })?;
    for said in traffic {
        let tried: u32 =
            said.out.lines().filter_map(|l| l.strip_prefix("TRIED ")).filter_map(|n| n.parse::<u32>().ok()).sum();
        let failed = said.out.lines().filter(|l| l.starts_with("FAILED")).count();
        log.expect(
            format!("none of {tried} requests failed while a pod was deleted and replicas went 3 → 5 → 1"),
            failed == 0 && tried > 20,
            said.all(),
        );
    }
    scale(cluster, log, 0)?;
    wait("no endpoint in the data path", Duration::from_secs(2), || {
        let said = cluster.exec("near", &fetch(&url))?;
        if said.ok { bail!("still answered: {}", said.out) } else { Ok(()) }
    })?;
    for place in ["near", "far"] {
        let started = Instant::now();
        let said = cluster.exec(place, &fetch(&url))?;
        let seconds = started.elapsed().as_secs_f64();
        log.expect(
            format!("with no replica a request from {place} is refused at once ({seconds:.2} s)"),
            !said.ok && said.all().contains("refused") && seconds < 2.0,
            said.all(),
        );
    }
    let (_, node) = cluster.nodes()?.into_iter().next().unwrap_or_default();
    let started = Instant::now();
    let said = cluster.outside(&fetch_from_host(&format!("http://{}:30000/", host(&node))))?;
    let seconds = started.elapsed().as_secs_f64();
    let refused = !said.ok && said.err.contains("Failed to connect") && seconds < 2.0;
    log.expect(format!("and one from outside too ({seconds:.2} s)"), refused, said.all());
    scale(cluster, log, 3)?;
    let said = cluster.exec("near", &fetch(&url))?;
    log.expect("with three again it answers", said.ok, said.all());
    Ok(())
}

pub(super) fn w6(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let address = field(&cluster.get("svc", "httpd-svc")?, "/spec/clusterIP");
    for (place, said) in [
        ("a pod", cluster.exec("near", &Hope::Silence.ping(&address))?),
        ("a node", cluster.node("n1", &Hope::Silence.ping(&address))?),
    ] {
        log.expect(format!("ping {address} from {place} gets no reply"), !said.ok, said.all());
    }
    Ok(())
}

/// Requests by each of `names`, of which one answered each.
fn counted(said: &str, names: &[String]) -> Vec<usize> {
    names.iter().map(|name| said.matches(name.as_str()).count()).collect()
}

/// Has the Service `balanced` choose by this algorithm; its address.
fn balance(cluster: &Cluster, log: &Log, algorithm: &str) -> Result<String> {
    log.command(&format!("kubectl apply -f examples/w17-balanced.yaml   # {algorithm}"));
    cluster.apply_text(&template("w17-balanced.yaml.in")?.replace("ALGORITHM", algorithm))?;
    Ok(field(&cluster.get("svc", "balanced")?, "/spec/clusterIP"))
}

/// An algorithm, what it is to do, and whether it did.
type Claim = (&'static str, &'static str, fn(&[usize]) -> bool);

pub(super) fn w17(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let pods = cluster.wait_ready("run=httpd", 3)?;
    let names: Vec<String> = pods.iter().map(|pod| format!("pod: {}\n", pod.name)).collect();
    // What an annotation says is in force a moment later: each claim is tried until it holds, and then is exact.
    let claims: [Claim; 4] = [
        ("round-robin", "30 requests reach each of three replicas ten times", |counts| counts == [10, 10, 10]),
        ("source-hash", "30 requests of one client reach one replica", |counts| {
            let mut sorted = counts.to_vec();
            sorted.sort_unstable();
            sorted == [0, 0, 30]
        }),
        ("maglev", "30 connections reach all three", |counts| counts.iter().all(|n| *n > 0)),
        ("random", "30 requests reach all three", |counts| counts.iter().all(|n| *n > 0)),
    ];
    for (algorithm, what, holds) in claims {
        let address = balance(cluster, log, algorithm)?;
        let requests = format!("for i in $(seq 1 30); do {}; done", fetch(&format!("http://{}:8080/", host(&address))));
        let outcome = wait(algorithm, Duration::from_secs(10), || {
            let said = cluster.exec("near", &requests)?;
            let counts = counted(&said.out, &names);
            if holds(&counts) { Ok(()) } else { bail!("{counts:?}: {}", said.err) }
        });
        log.check(format!("{algorithm}: {what}"), outcome.map_err(|e| format!("{e:#}")));
    }
    // At devices a connection that was closed counts for up to twenty seconds more, those of the claims before this one among them.
    if !cluster.has_socket_hooks() {
        return Ok(());
    }
    let address = balance(cluster, log, "least-connections")?;
    // One after another: two that choose in the same moment on two processors see the same counts.
    let held = format!("for i in $(seq 1 9); do sleep 5 | timeout 6 nc {address} 8080 & sleep 0.1; done; wait");
    let open = "cat /proc/net/tcp /proc/net/tcp6 2>/dev/null | grep -c ':0050 [0-9A-F:]* 01 '";
    let outcome = wait("least-connections", Duration::from_secs(30), || {
        std::thread::scope(|scope| {
            let holding = scope.spawn(|| cluster.exec("near", &held));
            std::thread::sleep(Duration::from_millis(2500));
            let counts = pods.iter().map(|pod| Ok(cluster.exec(&pod.name, open)?.out.trim().to_owned()));
            let counts = counts.collect::<Result<Vec<_>>>();
            let said = holding.join();
            let counts = counts?;
            if counts == ["3", "3", "3"] { Ok(()) } else { bail!("{counts:?}, {said:?}") }
        })
    });
    log.check("least-connections: nine held open are three a replica", outcome.map_err(|e| format!("{e:#}")));
    Ok(())
}

pub(super) fn w15(cluster: &Cluster, log: &mut Log) -> Result<()> {
    let server = cluster.wait_pod("echo")?;
    let family = if server.ip.contains(':') { "IPv6" } else { "IPv4" };
    let manifest = template("w15-by-hand.yaml.in")?.replace("ADDRESS", &server.ip).replace("FAMILY", family);
    let file = std::env::temp_dir().join(format!("towpath-w15-{}.yaml", cluster.name()));
    std::fs::write(&file, manifest)?;
    let applied = cluster.kubectl(log, &["apply", "-f", &file.to_string_lossy()]);
    let _ = std::fs::remove_file(&file);
    applied?;
    for name in ["by-hand", "by-hand-older"] {
        let outcome = wait(name, Duration::from_secs(5), || {
            let said = cluster.exec("far", &fetch(&format!("http://{name}/")))?;
            if said.ok && said.out.contains("echo") { Ok(()) } else { bail!("{}", said.all()) }
        });
        log.check(format!("Service {name} leads to its hand-made endpoint"), outcome.map_err(|e| format!("{e:#}")));
    }
    Ok(())
}
