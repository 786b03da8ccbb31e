//! Connections to a ClusterIP against connections to the pod behind it, with one Service and with many.

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::{Ratio, Run};
use crate::api::Kind;
use crate::lab::{Lab, NAMESPACE, wait};
use crate::load::{Ends, Measure, PORT};
use crate::row::{About, Goal, Null, Row};

const NULL: Null = Null { one: "pod address", other: "pod address again" };
pub(super) const MEASURED: &str = "measured";

/// Measures them.
///
/// # Errors
/// A Service does not answer in time, or an object is refused.
pub(super) fn measure(run: &mut Run, lab: &mut Lab) -> Result<()> {
    let (client, server) = (lab.pod("near", "n1")?, lab.pod("server", "n1")?);
    let ends = Ends::start("a Service", &client.place, &server.place, run.cpus)?;
    lab.api.create(&[service(MEASURED), slice(MEASURED, &[server.ip])])?;
    let address = cluster_ip(lab, MEASURED)?;
    answers(&ends, address)?;
    let few = pass(run, &ends, address, server.ip, 1)?;

    let many = run.options.services;
    crate::report::progress(&format!("making {many} Services"));
    let started = Instant::now();
    fill(lab, many, 2, server.ip)?;
    let made = started.elapsed().as_secs_f64();
    let last = cluster_ip(lab, &filler(many - 1))?;
    answers(&ends, last)?;
    let ready = started.elapsed().as_secs_f64();
    let full = pass(run, &ends, address, server.ip, many)?;

    if let (Some(few), Some(full)) = (few, full) {
        let about = About {
            id: "services.crr.slope".to_owned(),
            title: format!("ClusterIP, TCP CRR: with {many} Services ÷ with 1"),
            goal: Some(Goal::AtLeast(0.98)),
        };
        let remark =
            format!("{many} Services and EndpointSlices made in {made:.1} s, the last answered after {ready:.1} s");
        let row = Row::of_rows(about, &full, &few, &mut run.random).remark(&remark);
        run.add(row);
    }
    empty(lab, many)
}

/// One measurement, its row.
fn pass(run: &mut Run, ends: &Ends, service: IpAddr, pod: IpAddr, count: usize) -> Result<Option<Row>> {
    let arms = [ends.to("ClusterIP", service), ends.to(NULL.one, pod), ends.to(NULL.other, pod)];
    let id = format!("services.crr.{count}");
    let plural = if count == 1 { "" } else { "s" };
    let ratio = Ratio {
        id: id.clone(),
        title: format!("ClusterIP ÷ pod address, TCP CRR, {count} Service{plural}"),
        over: "ClusterIP",
        under: NULL.one,
        goal: Some(Goal::AtLeast(0.95)),
    };
    run.compare(&format!("ClusterIP with {count} Service{plural}"), &arms, Measure::Crr, NULL, vec![ratio])?;
    Ok(run.rows.iter().find(|row| row.id == id).cloned())
}

pub(super) fn service(name: &str) -> Value {
    let port = json!({"name": "p", "port": PORT, "targetPort": PORT, "protocol": "TCP"});
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": NAMESPACE},
        "spec": {"ports": [port]},
    })
}

pub(super) fn slice(service: &str, endpoints: &[IpAddr]) -> Value {
    let endpoints: Vec<Value> =
        endpoints.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect();
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {
            "name": format!("{service}-a"), "namespace": NAMESPACE,
            "labels": {"kubernetes.io/service-name": service},
        },
        "addressType": "IPv4",
        "endpoints": endpoints,
        "ports": [{"name": "p", "port": PORT, "protocol": "TCP"}],
    })
}

pub(super) fn filler(index: usize) -> String {
    format!("filler-{index:05}")
}

/// Endpoints of the `index`-th Service, nobody's: 198.18.0.0/15 is for benchmarks (RFC 2544).
pub(super) fn nobodys(index: usize, count: usize) -> Vec<IpAddr> {
    let number = |which: usize| u32::try_from(index * count + which).unwrap_or(0) % 0x1_fffe + 1;
    (0..count).map(|which| IpAddr::from(Ipv4Addr::from(0xc612_0000 + number(which)))).collect()
}

/// Many Services with some endpoints each; the last one, made after all others, leads to the server.
pub(super) fn fill(lab: &mut Lab, count: usize, endpoints: usize, server: IpAddr) -> Result<()> {
    let last = count.saturating_sub(1);
    let mut objects = Vec::with_capacity(count * 2);
    for index in 0..last {
        objects.extend([service(&filler(index)), slice(&filler(index), &nobodys(index, endpoints))]);
    }
    lab.api.create(&objects)?;
    lab.api.create(&[service(&filler(last)), slice(&filler(last), &[server])])
}

/// Removes what was made; the benchmark's own lab goes away whole.
pub(super) fn empty(lab: &mut Lab, count: usize) -> Result<()> {
    if lab.is_own() {
        return Ok(());
    }
    crate::report::progress("removing the Services");
    let services: Vec<String> = (0..count).map(filler).chain([MEASURED.to_owned()]).collect();
    let slices: Vec<String> = services.iter().map(|service| format!("{service}-a")).collect();
    lab.api.delete(Kind::Service, &services)?;
    lab.api.delete(Kind::EndpointSlice, &slices)?;
    crate::report::progress("");
    Ok(())
}

pub(super) fn cluster_ip(lab: &mut Lab, name: &str) -> Result<IpAddr> {
    let service = lab.api.get(Kind::Service, name)?.with_context(|| format!("Service {name} is not there"))?;
    let text = service.pointer("/spec/clusterIP").and_then(Value::as_str).unwrap_or_default();
    text.parse().with_context(|| format!("Service {name} has the address {text:?}"))
}

/// Waits until connections to an address work.
pub(super) fn answers(ends: &Ends, address: IpAddr) -> Result<()> {
    let to = ends.to("probe", address).to;
    wait(&format!("{to} to answer"), || Ok(ends.block(Measure::Crr, to, Duration::from_millis(5)).ok()))?;
    Ok(())
}
