//! What many Services cost a node: the start of an agent that finds nothing in the kernel, its memory and its maps', and how soon a
//! change of endpoints is in force while others change.

use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Run;
use crate::cluster::{MEASURED, Node, PORT, address, filler, nobodys, service, slice};
use crate::interrupt;
use crate::lab::wait;
use crate::noise::{Noise, Own, Snapshot, process_seconds};
use crate::place::Place;
use crate::row::{About, Goal, Row, Unit};
use crate::stats;
use crate::swap::{self, Request};
use crate::worker::Worker;

/// Endpoints of each Service.
const ENDPOINTS: usize = 10;
/// Other Services' changes a second.
const OTHERS: u32 = 100;
/// Longest wait for one answer of the client.
const SLACK: Duration = Duration::from_secs(70);
/// How long the agent is left alone before its memory is read.
const IDLE: Duration = Duration::from_secs(3);
/// How long it is looked at while nothing changes: longer than all that it does now and then is apart.
const QUIET: Duration = Duration::from_secs(31);
/// How long an attempt to connect may take.
const PATIENCE: u64 = 20;
/// Time that the agent spent planning and applying Services, all told.
const SERVICES_SECONDS: &str = "kubeproxy_sync_proxy_rules_duration_seconds_sum";

/// Measures it.
///
/// # Errors
/// The agent does not come up, or a Service does not answer in time.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    let many = run.options.many;
    let mut node = Node::new(many)?;
    node.start_agent()?;
    node.until_ready()?;
    let (near, server) = (node.pod("near")?, node.pod("server")?);
    std::thread::sleep(IDLE);
    let (idle, _) = node.agent_memory()?;
    let few = idle_percent(&node)?;
    node.stop_agent();
    crate::report::progress(&format!("making {many} Services of {ENDPOINTS} endpoints"));
    for index in 0..many.saturating_sub(1) {
        node.api.apply(service(&filler(index)))?;
        node.api.apply(slice(&filler(index), &nobodys(index, ENDPOINTS)))?;
    }
    node.api.apply(service(MEASURED))?;
    node.api.apply(slice(MEASURED, &[server.ip]))?;
    let _server = Worker::start("the server", &server.place, &["serve-tcp"])?;
    cold(run, &mut node, &near.place, many)?;
    // By then the connections that the starts left behind are forgotten.
    nothing_changes(run, &node, few, many)?;
    memory(run, &node, idle, many)?;
    changes(run, &node, &near.place, server.ip, many)
}

fn measured() -> SocketAddr {
    SocketAddr::new(address(MEASURED).into(), PORT)
}

/// Starts of an agent, each until the last Service answers.
fn cold(run: &mut Run, node: &mut Node, client: &Place, many: usize) -> Result<()> {
    let (mut answered, mut applied, mut used, mut noise) = (Vec::new(), Vec::new(), Vec::new(), Noise::default());
    for number in 0..run.options.cold_starts.max(1) {
        interrupt::check()?;
        crate::report::progress(&format!("start of an agent, {} of {}", number + 1, run.options.cold_starts));
        // Its sockets end with the agent that it was told of.
        node.stop_agent();
        let mut client = Worker::start("a client", client, &["until-it-answers"])?;
        let own = Own { pids: [std::process::id(), client.pid()].into(), cgroup: Some(node.cgroup_name()) };
        // With the agent its programs are gone: nobody knows the Service.
        client.ask::<u64>(&Request { to: measured(), answers: false, patience: PATIENCE }, SLACK)?;
        let before = Snapshot::take()?;
        let begun = swap::now()?;
        node.start_agent()?;
        let request = Request { to: measured(), answers: true, patience: PATIENCE };
        let let_in = client.ask::<u64>(&request, SLACK).map_err(|error| error.context(node.end_of_log()))?;
        answered.push(seconds(begun, let_in));
        used.push(process_seconds(node.agent()?)?);
        noise = noise.worst(before.until(&Snapshot::take()?, &own));
        // Metrics are served a little later.
        node.until_ready()?;
        applied.push(wait("the agent's metrics", || Ok(node.metric("/metrics", SERVICES_SECONDS).ok()))?);
    }
    crate::report::progress("");
    let what = format!("{many} Services of {ENDPOINTS} endpoints");
    let times = applied.iter().map(|time| format!("{time:.2}")).collect::<Vec<_>>().join(", ");
    let rows = [
        (
            "endpoints.cold",
            format!("agent starts with {what} and nothing in the kernel, until the last Service answers"),
            3.0,
            answered,
            format!(
                "from the start of the process; programs loaded, objects listed in pages of 500 and decoded; the agent used {:.2} s of CPU \
                 time until then",
                stats::median(&used).unwrap_or(0.0)
            ),
        ),
        (
            "endpoints.cold.services",
            format!("of that, Services planned and written into the maps, {what}"),
            1.0,
            applied,
            format!("as the agent's own metrics say ({SERVICES_SECONDS}: {times})"),
        ),
    ];
    for (id, title, goal, samples, note) in rows {
        let about = About { id: id.to_owned(), title, goal: Some(Goal::AtMost(goal)) };
        let row = Row::of_samples(about, Unit::Seconds, samples, note, &mut run.random);
        run.add(row.taken_with(noise, run.protocol.limits));
    }
    Ok(())
}

fn seconds(begun: u64, ended: u64) -> f64 {
    Duration::from_nanos(ended.saturating_sub(begun)).as_secs_f64()
}

fn memory(run: &mut Run, node: &Node, idle: f64, many: usize) -> Result<()> {
    let (held, most) = node.agent_memory()?;
    let maps = node.map_memory()?;
    let services = format!("{many} Services of {ENDPOINTS} endpoints");
    for (id, title, goal, value, note) in [
        (
            "endpoints.memory",
            "agent, resident memory",
            64.0,
            held,
            format!("VmRSS half a minute after the start; {most:.1} MiB at most while it started; {idle:.1} MiB without Services"),
        ),
        (
            "endpoints.maps",
            "kernel maps of a node",
            48.0,
            maps,
            "what the kernel counts to all maps that the agent holds; the table of connections, which is empty, with them".to_owned(),
        ),
    ] {
        let about = About { id: id.to_owned(), title: format!("{title}, {services}"), goal: Some(Goal::AtMost(goal)) };
        let row = Row::of_samples(about, Unit::Mebibytes, vec![value], note, &mut run.random);
        run.add(row);
    }
    Ok(())
}

/// What the agent takes of a CPU while nothing changes.
fn nothing_changes(run: &mut Run, node: &Node, few: f64, many: usize) -> Result<()> {
    let own = Own { pids: [std::process::id()].into(), cgroup: Some(node.cgroup_name()) };
    let before = Snapshot::take()?;
    let used = idle_percent(node)?;
    let noise = before.until(&Snapshot::take()?, &own);
    let about = About {
        id: "endpoints.idle".to_owned(),
        title: format!("agent while nothing changes, {many} Services of {ENDPOINTS} endpoints: of one CPU"),
        goal: Some(Goal::AtMost(0.5)),
    };
    let note = format!("its CPU time over {} s; {few:.2} % without Services", QUIET.as_secs());
    let row = Row::of_samples(about, Unit::Percent, vec![used], note, &mut run.random);
    run.add(row.taken_with(noise, run.protocol.limits));
    Ok(())
}

fn idle_percent(node: &Node) -> Result<f64> {
    crate::report::progress(&format!("the agent is left alone for {} s", QUIET.as_secs()));
    let (agent, begun) = (node.agent()?, Instant::now());
    let before = process_seconds(agent)?;
    std::thread::sleep(QUIET);
    let used = process_seconds(agent)? - before;
    crate::report::progress("");
    Ok(100.0 * used / begun.elapsed().as_secs_f64())
}

/// How soon a Service that gets its first endpoint leads there.
fn changes(run: &mut Run, node: &Node, client: &Place, server: IpAddr, many: usize) -> Result<()> {
    let mut client = Worker::start("a client", client, &["until-it-answers"])?;
    let own = Own { pids: [std::process::id(), client.pid()].into(), cgroup: Some(node.cgroup_name()) };
    let stop = AtomicBool::new(false);
    let before = Snapshot::take()?;
    let (times, changed) = std::thread::scope(|scope| {
        let changing = scope.spawn(|| change_others(node, many, &stop));
        let times = swaps(run, node, &mut client, server);
        stop.store(true, Ordering::Relaxed);
        let changed = changing.join().unwrap_or_else(|_| anyhow::bail!("the thread of the other changes died"));
        (times, changed)
    });
    let (times, rate) = (times.map_err(|error| error.context(node.end_of_log()))?, changed?);
    let noise = before.until(&Snapshot::take()?, &own);
    crate::report::progress("");
    let note = format!(
        "{many} Services of {ENDPOINTS} endpoints, {rate:.0} other changes a second, {} changes; from the moment that the event is \
         written to the agent's socket to the SYN that is let in; a client tries every 0.1 ms",
        times.len()
    );
    for (id, what, goal, value) in [
        ("endpoints.p50", "median", 2.0, stats::median(&times)),
        ("endpoints.p99", "99th percentile", 10.0, stats::percentile(&times, 99.0)),
    ] {
        let about = About {
            id: id.to_owned(),
            title: format!("a Service gets its first endpoint, until its first SYN goes there, {what}"),
            goal: Some(Goal::AtMost(goal)),
        };
        let row =
            Row::of_samples(about, Unit::Milliseconds, value.into_iter().collect(), note.clone(), &mut run.random);
        run.add(row.taken_with(noise, run.protocol.limits));
    }
    Ok(())
}

/// Milliseconds from each change to the first connection.
fn swaps(run: &Run, node: &Node, client: &mut Worker, server: IpAddr) -> Result<Vec<f64>> {
    let to = measured();
    let refuse = Request { to, answers: false, patience: PATIENCE };
    let mut times = Vec::new();
    node.api.apply(slice(MEASURED, &[]))?;
    client.ask::<u64>(&refuse, SLACK)?;
    for number in 0..run.options.swaps {
        interrupt::check()?;
        if number % 10 == 0 {
            crate::report::progress(&format!("changes of endpoints, {number} of {}", run.options.swaps));
        }
        let request = Request { to, answers: true, patience: PATIENCE };
        let asked = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| client.ask::<u64>(&request, SLACK));
            // Not in step with the other changes.
            std::thread::sleep(Duration::from_micros(20_000 + 137 * (number as u64 % 73)));
            let begun = node.api.apply(slice(MEASURED, &[server]))?;
            let let_in = waiting.join().unwrap_or_else(|_| anyhow::bail!("the thread of the client died"))?;
            Ok::<_, anyhow::Error>((begun, let_in))
        });
        let (begun, let_in) = asked?;
        times.push(seconds(begun, let_in) * 1000.0);
        node.api.apply(slice(MEASURED, &[]))?;
        client.ask::<u64>(&refuse, SLACK)?;
    }
    Ok(times)
}

/// Has endpoints of other Services come and go until told to stop; changes a second.
fn change_others(node: &Node, many: usize, stop: &AtomicBool) -> Result<f64> {
    let others = many.saturating_sub(1).max(1);
    let begun = Instant::now();
    let mut count = 0u32;
    while !stop.load(Ordering::Relaxed) {
        let index = count as usize % others;
        let fewer = ENDPOINTS - 1 + (count as usize / others) % 2;
        let mut endpoints = nobodys(index, ENDPOINTS);
        endpoints.truncate(fewer);
        node.api.apply(slice(&filler(index), &endpoints))?;
        count += 1;
        std::thread::sleep((Duration::from_secs(1) / OTHERS * count).saturating_sub(begun.elapsed()));
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}
