//! The promises of the pool, by example and for random sequences.
