//! Benchmarks that compare paths side by side in one run.
//!
//! Traffic stays inside network namespaces made here or by the lab. Nothing of the machine's own network is touched, and all
//! that was made goes away at the end, also after an error or Ctrl-C.
#![forbid(unsafe_code)]

mod api;
mod baseline;
mod burst;
mod cluster;
mod cni;
mod datagrams;
mod fresh;
mod groups;
mod image;
mod interrupt;
mod lab;
mod load;
mod netns;
mod noise;
mod options;
mod packet;
mod place;
mod programs;
mod report;
mod rounds;
mod row;
mod rulesets;
mod stats;
mod swap;
mod wires;
mod worker;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Parser;

use groups::Run;
use options::{Cli, Hidden, Inside, Options};
use place::Place;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let outcome = match cli.hidden {
        Some(Hidden::Inside { place, what }) => inside(&place, what),
        None => run(cli.options),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("towpath-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// What a process that the benchmark started does. It has no thread but this one.
fn inside(place: &Place, what: Inside) -> Result<()> {
    place.enter()?;
    match what {
        Inside::Hold { name: _ } => {
            worker::say_ready()?;
            std::io::stdin().read_to_end(&mut Vec::new()).context("wait for the end")?;
            Ok(())
        }
        Inside::ServeTcp => load::server::tcp(),
        Inside::ServeUdp => load::server::udp(),
        Inside::Client => worker::answer_questions(load::client::block),
        Inside::Plugins => worker::answer_questions(cni::block),
        Inside::Burst => worker::answer_questions(burst::block),
        Inside::FreshPods => worker::answer_questions(fresh::block),
        Inside::UntilItAnswers => worker::answer_questions(swap::until),
        Inside::UntilVerdict => {
            let mut client = datagrams::Client::default();
            worker::answer_questions(move |request| client.until(request))
        }
        Inside::Knock { to, a_second } => datagrams::knock(to, a_second),
        Inside::Image => {
            let mut bench = image::Bench::default();
            worker::answer_questions(move |request| bench.block(request))
        }
        Inside::Programs => {
            let mut bench = programs::Bench::default();
            worker::answer_questions(move |request| bench.block(request))
        }
        Inside::Wires => {
            let mut bench = wires::Bench::default();
            worker::answer_questions(move |request| bench.block(request))
        }
        Inside::Run { argv } => {
            let (program, args) = argv.split_first().context("no command was given")?;
            Err(Command::new(program).args(args).exec()).with_context(|| format!("run {program}"))
        }
    }
}

fn run(options: Options) -> Result<()> {
    if !nix::unistd::Uid::effective().is_root() {
        bail!("this makes network namespaces and needs root; run `sudo make bench`");
    }
    interrupt::watch()?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH).map_or(1, |now| now.as_secs());
    let seed = options.seed.unwrap_or(clock);
    let mut run = Run::new(options, seed)?;
    let measured = run.measure();
    report::progress("");
    if !run.rows.is_empty() || measured.is_ok() {
        report::write(&run, &report::Machine::this(), seed)?;
    }
    measured
}
