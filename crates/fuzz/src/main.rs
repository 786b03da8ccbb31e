//! `towpath-fuzz`: cases until the time is over; the first that judges differ about is cut down and printed.
#![forbid(unsafe_code)]

use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Result;
use clap::Parser;
use towpath_fuzz::run::{Plan, run};

/// Random clusters, policies and packets: the oracle, the evaluator, the compiled image and the kernel must agree about each.
#[derive(Debug, Parser)]
#[command(name = "towpath-fuzz", version, max_term_width = 100)]
struct Options {
    /// For how long
    #[arg(long, default_value_t = 2.0)]
    minutes: f64,
    /// Of the first chunk; each chunk has the next one. Without it: another one at every run
    #[arg(long)]
    seed: Option<u64>,
    /// Chunks at most (of 16 clusters with 512 packets each, and 32 policies with a wrong place)
    #[arg(long, default_value_t = u64::MAX)]
    chunks: u64,
    /// Threads [default: one a processor]
    #[arg(long)]
    jobs: Option<usize>,
    /// Leave the kernel out; then it needs no root
    #[arg(long)]
    no_kernel: bool,
}

fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let now = || SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let plan = Plan {
        // Runs that begin a second apart have no chunk in common for hours.
        seed: options.seed.unwrap_or_else(|| now() << 20),
        chunks: options.chunks,
        time: Duration::try_from_secs_f64(options.minutes * 60.0)?,
        jobs: options.jobs.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from)),
        kernel: !options.no_kernel,
    };
    println!("seed {}, {} threads", plan.seed, plan.jobs);
    let start = Instant::now();
    let (tally, failures) = run(&plan)?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{tally}");
    println!("{:.0} cases a second, {seconds:.1} s", tally.cases as f64 / seconds);
    for failure in &failures {
        println!("\n{failure}");
    }
    Ok(if failures.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
