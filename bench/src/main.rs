//! Benchmarks that compare paths side by side in one run.
#![forbid(unsafe_code)]

fn main() {}
