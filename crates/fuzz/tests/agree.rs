//! A bounded run of what `make fuzz` does for as long as one likes, with seeds that are always the same.

use std::time::Duration;

use towpath_fuzz::run::{CLUSTERS, PACKETS, Plan, run};

/// As many chunks as a machine of two processors does in some fifteen seconds.
const CHUNKS: u64 = 24;

#[test]
fn oracle_evaluator_image_and_kernel_agree_about_random_cases() {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        assert!(std::env::var("CI").as_deref() != Ok("true"), "CI must ask the kernel, as root");
        println!("without the kernel: loading BPF programs needs root (sudo -E cargo nextest run -p towpath-fuzz)");
    }
    let plan = Plan { seed: 5, chunks: CHUNKS, time: Duration::from_secs(30), jobs: 2, kernel: root };
    let (tally, failures) = run(&plan).unwrap();
    println!("{tally}");
    if let Some(failure) = failures.first() {
        panic!("{failure}");
    }
    // Every kind of answer is among them, or it would be no wonder that nobody differs.
    assert!(tally.cases >= CLUSTERS * u64::try_from(PACKETS).unwrap(), "{tally}");
    let [allowed, denied] = tally.by_rule;
    for (kind, count) in [("allowed", allowed), ("denied", denied), ("default", tally.by_default), ("open", tally.open)]
    {
        assert!(count * 40 > tally.ends, "{kind}: {tally}");
    }
    assert!(tally.passed * 200 > tally.ends && tally.unknown * 200 > tally.ends, "{tally}");
    assert!(tally.oracle * 2 > tally.ends, "{tally}");
    assert!(!root || (tally.kernel * 4 > tally.cases * 3 && tally.rules * 4 > tally.cases), "{tally}");
}
