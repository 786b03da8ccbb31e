//! Questions about policies that need no cluster: who reaches whom, what a change changes, whether expectations hold, whether a statement
//! holds for all possible pods, and what in the policies is likely a mistake.
//!
//! All of it is exact over ports and addresses: sets of them are ranges, never samples. [`reach()`](reach::reach), [`diff()`](diff::diff) and
//! [`expect`] look at pods that exist ([`Universe`]), [`prove()`](prove::prove) at all that could. They read policies as the clauses of one
//! private module, independently of the evaluator; the tests hold both against each other, and reasons that are shown are the evaluator's.

pub mod addresses;
pub(crate) mod clauses;
pub mod diff;
mod engine;
pub mod expect;
pub mod lint;
mod membership;
pub mod ports;
pub mod prove;
pub(crate) mod ranges;
pub mod reach;
mod rows;
pub mod statement;
pub mod universe;
pub mod words;

pub use addresses::Addresses;
pub use diff::Change;
pub use expect::{Expectation, Outcome};
pub use ports::Ports;
pub use rows::{Parties, Row};
pub use statement::Statement;
pub use universe::{Owners, Universe, Workload};
