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
    let cluster = Cluster::up(name, 3, families)?;
    let mut failures = Vec::new();
    for row in ROWS {
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
