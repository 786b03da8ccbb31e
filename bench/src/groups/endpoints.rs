//! What many Services cost: how soon a change of endpoints is in force while others change, the agent's memory, the maps'.

use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;

use super::Run;
use super::services::{MEASURED, answers, cluster_ip, empty, fill, filler, nobodys, service, slice};
use crate::interrupt;
use crate::lab::Lab;
use crate::load::{Ends, PORT};
use crate::noise::{Own, Snapshot};
use crate::row::{About, Goal, Row, Unit};
use crate::stats;
use crate::swap::{self, Request};
use crate::worker::Worker;

/// Endpoints of each Service.
const ENDPOINTS: usize = 10;
/// Other Services' changes a second.
const OTHERS: u32 = 100;
/// Longest wait for one answer of the client.
const SLACK: Duration = Duration::from_secs(20);

/// Measures it.
///
/// # Errors
/// A Service does not answer in time, or an object is refused.
pub(super) fn measure(run: &mut Run, lab: &mut Lab) -> Result<()> {
    let (near, server) = (lab.pod("near", "n1")?, lab.pod("server", "n1")?);
    let ends = Ends::start("a Service", &near.place, &server.place, run.cpus)?;
    let idle = lab.agent_memory()?.into_iter().fold(0.0, f64::max);
    let many = run.options.services;
    crate::report::progress(&format!("making {many} Services of {ENDPOINTS} endpoints"));
    let begun = Instant::now();
    fill(lab, many, ENDPOINTS, server.ip)?;
    lab.api.create(&[service(MEASURED), slice(MEASURED, &[])])?;
    let (last, address) = (cluster_ip(lab, &filler(many - 1))?, cluster_ip(lab, MEASURED)?);
    answers(&ends, last)?;
    let made = begun.elapsed().as_secs_f64();

    let mut client = Worker::start("a client", &near.place, &["until-it-answers"])?;
    let own = Own { pids: [std::process::id(), client.pid()].into(), cgroup: Some(lab.cgroup_name()) };
    let stop = AtomicBool::new(false);
    let mut others = lab.api.changer()?;
    let before = Snapshot::take()?;
    let (times, changed) = std::thread::scope(|scope| {
        let changing = scope.spawn(|| change_others(&mut others, many, &stop));
        let times = swaps(run, lab, &mut client, SocketAddr::new(address, PORT), server.ip);
        stop.store(true, Ordering::Relaxed);
        let changed = changing.join().unwrap_or_else(|_| anyhow::bail!("the thread of the other changes died"));
        (times, changed)
    });
    let (times, rate) = (times?, changed?);
    let noise = before.until(&Snapshot::take()?, &own);
    crate::report::progress("");
    let note = format!(
        "{many} Services of {ENDPOINTS} endpoints (made in {made:.0} s), {rate:.0} other changes a second, {} changes; from the request to the API server to the first connection that is let in",
        times.len()
    );
    for (id, what, goal, value) in [
        ("endpoints.p50", "median", 2.0, stats::median(&times)),
        ("endpoints.p99", "99th percentile", 10.0, stats::percentile(&times, 99.0)),
    ] {
        let about = About {
            id: id.to_owned(),
            title: format!("a Service gets its first endpoint, {what}"),
            goal: Some(Goal::AtMost(goal)),
        };
        let row =
            Row::of_samples(about, Unit::Milliseconds, value.into_iter().collect(), note.clone(), &mut run.random);
        run.add(row.taken_with(noise, run.protocol.limits));
    }
    memory(run, lab, idle, many)?;
    empty(lab, many)
}

/// Milliseconds from each change to the first connection.
fn swaps(run: &Run, lab: &mut Lab, client: &mut Worker, to: SocketAddr, server: std::net::IpAddr) -> Result<Vec<f64>> {
    let mut times = Vec::new();
    for number in 0..run.options.swaps {
        interrupt::check()?;
        if number % 10 == 0 {
            crate::report::progress(&format!("changes of endpoints, {number} of {}", run.options.swaps));
        }
        let asked = std::thread::scope(|scope| {
            let waiting = scope.spawn(|| client.ask::<u64>(&Request { to, answers: true }, SLACK));
            std::thread::sleep(Duration::from_millis(20));
            let begun = swap::now()?;
            lab.api.put(&slice(MEASURED, &[server]))?;
            let let_in = waiting.join().unwrap_or_else(|_| anyhow::bail!("the thread of the client died"))?;
            Ok::<_, anyhow::Error>((begun, let_in))
        });
        let (begun, let_in) = asked?;
        times.push(Duration::from_nanos(let_in.saturating_sub(begun)).as_secs_f64() * 1000.0);
        lab.api.put(&slice(MEASURED, &[]))?;
        client.ask::<u64>(&Request { to, answers: false }, SLACK)?;
    }
    Ok(times)
}

/// Has endpoints of other Services come and go until told to stop; changes a second.
fn change_others(changer: &mut crate::api::Changer, many: usize, stop: &AtomicBool) -> Result<f64> {
    let begun = Instant::now();
    let mut count = 0u32;
    while !stop.load(Ordering::Relaxed) {
        let index = count as usize % (many - 1);
        let fewer = ENDPOINTS - 1 + (count as usize / (many - 1)) % 2;
        let mut endpoints = nobodys(index, ENDPOINTS);
        endpoints.truncate(fewer);
        changer.put(&slice(&filler(index), &endpoints))?;
        count += 1;
        std::thread::sleep((Duration::from_secs(1) / OTHERS * count).saturating_sub(begun.elapsed()));
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64())
}

fn memory(run: &mut Run, lab: &Lab, idle: f64, many: usize) -> Result<()> {
    let held = lab.agent_memory()?.into_iter().fold(0.0, f64::max);
    let maps = lab.map_memory()?;
    let services = format!("{many} Services of {ENDPOINTS} endpoints");
    for (id, title, goal, value, note) in [
        (
            "endpoints.memory",
            "agent, resident memory",
            64.0,
            held,
            format!("VmRSS, the largest of 3 agents; {idle:.1} MiB before"),
        ),
        (
            "endpoints.maps",
            "kernel maps of a node",
            48.0,
            maps,
            "what the kernel counts to all maps that an agent holds".to_owned(),
        ),
    ] {
        let about = About { id: id.to_owned(), title: format!("{title}, {services}"), goal: Some(Goal::AtMost(goal)) };
        let row = Row::of_samples(about, Unit::Mebibytes, vec![value], note, &mut run.random);
        run.add(row);
    }
    Ok(())
}
