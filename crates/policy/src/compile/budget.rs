//! What one compilation may cost at most.
//!
//! Policies can ask for more than any kernel table holds in a few hundred kilobytes of text: peers times ports, sets times peers. Such a
//! compilation is given up before it has cost much, instead of taking the node's memory and minutes.

use std::fmt;

/// Steps of a compilation: clauses looked at for rows, what regions match, and [`ROW`] for each row that is new.
pub(super) const STEPS: usize = 16 << 20;

/// Steps of a row. So there are two million rows at most in what is new at once: twice what the kernel's table of rows holds by default.
pub(super) const ROW: usize = 8;

/// The policies in force on a node ask for more than is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLarge;

impl fmt::Display for TooLarge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "the policies that select pods of this node ask for more than a node's tables hold (peers times ports, or policies times \
             peers): look for rules with thousands of both",
        )
    }
}

impl std::error::Error for TooLarge {}

/// What is left of [`STEPS`].
#[derive(Debug)]
pub(super) struct Budget(usize);

impl Budget {
    pub(super) fn new() -> Self {
        Self(STEPS)
    }

    /// One that never ends.
    pub(super) fn boundless() -> Self {
        Self(usize::MAX)
    }

    /// Takes steps.
    ///
    /// # Errors
    /// There are not so many left.
    pub(super) fn spend(&mut self, steps: usize) -> Result<(), TooLarge> {
        self.0 = self.0.checked_sub(steps).ok_or(TooLarge)?;
        Ok(())
    }
}
