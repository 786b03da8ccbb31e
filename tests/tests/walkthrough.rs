//! The walkthrough, every row in order, in a lab of each address family.

use anyhow::Result;
use towpath_walkthrough::cluster::{Cluster, Families};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::machine::can_run_labs;
use towpath_walkthrough::rows::ROWS;

/// All rows in a new lab; every failing check with its reason.
fn walk(name: &str, families: Families) -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    walk_in(Cluster::up(name, 3, families)?, |_| true)
}

/// The rows of these numbers.
fn walk_in(cluster: Cluster, wanted: impl Fn(&str) -> bool) -> Result<()> {
    let mut failures = Vec::new();
    for row in ROWS.iter().filter(|row| wanted(row.id)) {
        let mut log = Log::new(Voice::Plain);
        log.heading(&format!("{}  {}", row.id, row.title));
        if let Err(error) = (row.run)(&cluster, &mut log) {
            failures.push(format!("{}: could not be done: {error:#}", row.id));
        }
        if log.is_empty() {
            failures.push(format!("{}: checked nothing", row.id));
        }
        let failed = log.failures();
        failures.extend(failed.map(|c| format!("{}: {}: {}", row.id, c.what, c.failure.as_deref().unwrap_or(""))));
    }
    cluster.down()?;
    assert!(failures.is_empty(), "{} checks failed:\n{}", failures.len(), failures.join("\n"));
    Ok(())
}

#[test]
fn every_row_works_on_ipv4() -> Result<()> {
    walk("e2e-walk4", Families::Ipv4)
}

#[test]
fn every_row_works_on_dual_stack() -> Result<()> {
    walk("e2e-walk46", Families::Dual)
}

#[test]
fn every_row_works_on_ipv6() -> Result<()> {
    walk("e2e-walk6", Families::Ipv6)
}

/// Those of Services, and what they build on: pods whose sockets no hook sees have them all at their devices.
#[test]
fn services_work_without_socket_hooks() -> Result<()> {
    if !can_run_labs()? {
        return Ok(());
    }
    let mut cluster = Cluster::up("e2e-walk-veth", 3, Families::Dual)?;
    cluster.without_socket_hooks();
    let services = ["W2", "W3", "W4", "W6", "W13", "W15", "W16", "W17"];
    walk_in(cluster, |id| services.contains(&id))
}
