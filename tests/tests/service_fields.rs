//! Every field of a Service and of its EndpointSlices, with real packets from a pod (translated in its socket, and at its device), a node and
//! a host outside. One lab serves all: dual-stack, three nodes that check return paths strictly (`rp_filter` 1), on an underlay that drops
//! whatever has a pod's address. Which test covers which field is a table in `docs/conformance.md`.

#[path = "service_fields/endpoints.rs"]
mod endpoints;
#[path = "service_fields/packets.rs"]
mod packets;
#[path = "service_fields/policies.rs"]
mod policies;
#[path = "service_fields/scene.rs"]
mod scene;
#[path = "service_fields/types.rs"]
mod types;

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::Result;
use scene::Scene;
use towpath_walkthrough::machine::can_run_labs;

/// As many are tried side by side: most of them wait most of the time.
const AT_ONCE: usize = 6;

/// A field, or several that only mean something together.
type Scenario = (&'static str, fn(&Scene) -> Result<()>);

const SCENARIOS: &[Scenario] = &[
    ("ports by name and number, TCP and UDP, both families", types::ports),
    ("NodePorts at every node, with the client's address", types::node_ports),
    ("a load balancer without NodePorts", types::without_node_ports),
    ("NodePorts beyond the configured range", types::node_port_range),
    ("service-proxy-name", types::of_another_proxy),
    ("headless", types::headless),
    ("externalTrafficPolicy Local and healthCheckNodePort", policies::external_local),
    ("internalTrafficPolicy Local", policies::internal_local),
    ("sessionAffinity and its timeout", policies::affinity),
    ("trafficDistribution", policies::distribution),
    ("publishNotReadyAddresses", endpoints::not_ready),
    ("terminating endpoints", endpoints::terminating),
    ("several slices, and Endpoints", endpoints::by_hand),
    ("ICMP errors", packets::errors),
    ("fragments", packets::fragments),
];

#[test]
fn every_field_is_honoured_from_pod_node_and_outside() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let scene = Scene::set_up()?;
    let only = std::env::var("ONLY").unwrap_or_default();
    let wanted: Vec<&Scenario> = SCENARIOS.iter().filter(|(name, _)| name.contains(&only)).collect();
    let (next, failures) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(|| {
                while let Some((name, run)) = wanted.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let begun = Instant::now();
                    let outcome = run(&scene);
                    println!(
                        "{name}: {} after {:.1} s",
                        if outcome.is_ok() { "ok" } else { "FAILED" },
                        begun.elapsed().as_secs_f64()
                    );
                    if let (Err(error), Ok(mut failures)) = (outcome, failures.lock()) {
                        failures.push(format!("{name}: {error:#}"));
                    }
                }
            });
        }
    });
    scene.down()?;
    let failures = failures.into_inner().unwrap_or_default();
    assert!(failures.is_empty(), "{} of {} fail:\n{}", failures.len(), wanted.len(), failures.join("\n"));
    Ok(())
}
