//! How much one check may cost: what it costs is bounded by what the policies in force can tell apart, which policies can be written to make
//! as large as anybody likes.

/// Peers asked of steps, and steps of peers. The largest compilation that is not given up takes an eighth of it.
const MOST: usize = 64 << 20;

/// There is more to look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct TooMuch;

/// What may still be looked at.
#[derive(Debug)]
pub(super) struct Effort(usize);

impl Effort {
    pub(super) fn new() -> Self {
        Self(MOST)
    }

    pub(super) fn take(&mut self, steps: usize) -> Result<(), TooMuch> {
        self.0 = self.0.checked_sub(steps).ok_or(TooMuch)?;
        Ok(())
    }
}
