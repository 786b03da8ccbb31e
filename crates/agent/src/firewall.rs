//! A firewall of others that drops pods' packets, named in the status: looked for now and then, with sample packets that every
//! cluster must let pass ([`towpath_datapath::net::foreign`]). Nothing of it is ever changed.

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use towpath_datapath::net::{foreign, nft};
use towpath_datapath::{Datapath, NodeFacts};
use towpath_model::{Protocol, World, family_of};
use towpath_plan::services::api_server;
use tracing::{debug, warn};

use crate::modes;
use crate::settings::OwnNode;
use crate::{SharedIndex, counts, read};

/// After the start, when rules of others are likely to be there.
const FIRST: Duration = Duration::from_secs(15);
/// How often it is looked for: a ruleset may be megabytes of text.
const EVERY: Duration = Duration::from_secs(180);
/// What is noted of it for the status.
const NOTE: &str = "firewall";
/// The beginning of the names of pods' devices.
const POD_DEVICE: &str = "tp0";
/// DNS over UDP.
const DNS: u16 = 53;

/// What is looked for: where pods' packets come from and go to on this node.
#[derive(Debug)]
pub(crate) struct Ways {
    /// This node.
    pub(crate) own: OwnNode,
    /// Addresses of the node's own DNS server.
    pub(crate) dns: Vec<IpAddr>,
    /// Whether it serves the cluster.
    pub(crate) in_charge: watch::Receiver<modes::State>,
}

/// Looks for ever.
pub(crate) async fn look(ways: Ways, datapath: Datapath, index: SharedIndex) {
    let mut told = None;
    let mut pause = FIRST;
    loop {
        tokio::time::sleep(std::mem::replace(&mut pause, EVERY)).await;
        let Ok(facts) = datapath.facts().await else { continue };
        let samples = samples(&ways, &facts, read(&index).world());
        let ruleset = match tokio::task::spawn_blocking(nft::whole_ruleset).await {
            Ok(Ok(ruleset)) => ruleset,
            Ok(Err(error)) => {
                debug!(%error, "the rules of others cannot be read");
                continue;
            }
            Err(_) => continue,
        };
        let mut found: Vec<String> = samples
            .iter()
            .filter_map(|(what, sample)| {
                let who = foreign::dropped_by(&ruleset, sample)?;
                Some(format!("{what} are dropped by {who}, which is not Towpath's; look at it: nft -a list ruleset"))
            })
            .collect();
        found.dedup();
        let found = (!found.is_empty()).then(|| found.join("; "));
        if found != told {
            found.iter().for_each(|found| warn!("{found}"));
            counts::note(NOTE, found.clone());
            told = found;
        }
    }
}

/// The first packets of flows that no cluster does without: pods ask the API server and the node's DNS server.
fn samples(ways: &Ways, facts: &NodeFacts, world: &World) -> Vec<(String, foreign::Sample)> {
    let pod = |to: IpAddr| {
        let range = ways.own.pod_cidrs.iter().find(|range| family_of(range.addr()) == family_of(to))?;
        // Not the gateway, which is the node's own.
        range.hosts().nth(9)
    };
    let sample = |to: IpAddr, protocol: &'static str, port: u16| {
        let here = ways.own.addresses.contains(&to) || ways.dns.contains(&to);
        Some(foreign::Sample {
            hook: if here { "input" } else { "forward" },
            from_device: POD_DEVICE.to_owned(),
            to_device: (!here).then(|| facts.uplink.clone()),
            source: pod(to)?,
            destination: to,
            protocol,
            port,
        })
    };
    let mut samples = Vec::new();
    let api = api_server();
    for slice in world.slices.of(&api) {
        let ports = slice.ports.iter().filter(|port| port.protocol == Protocol::Tcp).map(|port| port.port);
        for (port, endpoint) in ports.flat_map(|port| slice.endpoints.iter().map(move |endpoint| (port, endpoint))) {
            let what = format!("pods' packets to the API server at {}, TCP port {port},", endpoint.address);
            samples.extend(sample(endpoint.address, "tcp", port).map(|sample| (what, sample)));
        }
    }
    let serves = ways.in_charge.borrow().in_charge.is_some_and(|in_charge| in_charge.dns.answers_here());
    for address in ways.dns.iter().filter(|_| serves) {
        let what = format!("pods' queries to the node's DNS server at {address}");
        samples.extend(sample(*address, "udp", DNS).map(|sample| (what, sample)));
    }
    samples
}
