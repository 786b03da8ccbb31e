//! Cluster DNS (Kubernetes DNS specification, schema version 1.1.0): the world as a feed, and the feed as answers.
//!
//! The agent runs [`feed`], `towpath carry` runs [`zone`]; between them are the messages of `towpath_wire::dns`.

pub mod answer;
pub mod corefile;
pub mod feed;
pub mod records;
pub mod rules;
pub mod zone;

#[cfg(test)]
mod feed_tests;
#[cfg(test)]
mod rules_tests;
#[cfg(test)]
mod zone_tests;

pub use answer::{Answer, Data, Outcome, QueryType, Rcode, Record};
pub use feed::FeedPlanner;
pub use records::Records;
pub use zone::Zone;
