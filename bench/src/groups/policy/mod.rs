//! What policies cost: packets and connections with few and many rules, how soon a change of one is enforced, what a large cluster's cost a
//! node, and what it costs when somebody listens to drops.

mod changes;
mod listening;
mod scale;
mod traffic;

use anyhow::Result;

use super::Run;
use crate::interrupt;

/// Measures how soon changes are enforced, and what is measured with them.
///
/// # Errors
/// An agent does not come up, or does not enforce a change.
pub(super) fn measure_changes(run: &mut Run) -> Result<()> {
    changes::measure(run)
}

/// Measures it all.
///
/// # Errors
/// An agent does not come up, a policy is not enforced, or the kernel refuses one.
pub(super) fn measure(run: &mut Run) -> Result<()> {
    traffic::same_node(run)?;
    interrupt::check()?;
    traffic::across_nodes(run)?;
    interrupt::check()?;
    listening::measure(run)?;
    interrupt::check()?;
    changes::measure(run)?;
    interrupt::check()?;
    scale::measure(run)
}
