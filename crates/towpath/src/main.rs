//! The `towpath` command line.
#![forbid(unsafe_code)]

fn main() {}
