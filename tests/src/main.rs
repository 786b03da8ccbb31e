//! `make demo`: a three-node lab, the walkthrough in it, and how to go on by hand.
#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use clap::Parser;
use towpath_walkthrough::cluster::{Cluster, Driver, Families};
use towpath_walkthrough::log::{Log, Voice};
use towpath_walkthrough::rows::{ROWS, Reach, reachability};

/// Runs the walkthrough in a lab of three nodes.
#[derive(Parser, Debug)]
struct Options {
    /// Name of the lab.
    #[arg(long, default_value = "demo")]
    name: String,
    /// Address families of the lab.
    #[arg(long, value_enum, default_value = "ipv4")]
    ip_family: Families,
    /// Takes the lab down at the end (else it stays up to go on by hand).
    #[arg(long)]
    down: bool,
    /// Only these rows and those before them, for example W3.
    #[arg(long)]
    until: Option<String>,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("walkthrough: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<bool> {
    let voice = if std::io::stdout().is_terminal() { Voice::Person } else { Voice::Plain };
    let title = Log::new(voice);
    title.heading(&format!("A cluster of three nodes on this machine (lab {:?})", options.name));
    let started = Instant::now();
    let mut cluster = Cluster::up(&options.name, 3, options.ip_family)?;
    title.say(&format!("up in {:.1} s", started.elapsed().as_secs_f64()));
    if cluster.driver() == Driver::Lab {
        title.say("no kubectl of 1.31 or newer here: `towpath lab …` speaks to the same API instead");
    }
    let mut marks = Vec::new();
    let mut tables: Vec<(&str, Vec<Reach>)> = Vec::new();
    for row in ROWS {
        let mut log = Log::new(voice);
        log.heading(&format!("\n{}  {}", row.id, row.title));
        if let Err(error) = (row.run)(&cluster, &mut log) {
            log.check("the row could be done", Err(format!("{error:#}")));
        }
        if log.is_empty() {
            log.check("the row checked something", Err("it recorded no check".to_owned()));
        }
        match row.id {
            "W7" => tables.push(("before", reachability(&cluster).unwrap_or_default())),
            "W9" => tables.push(("with the policy of W8", reachability(&cluster).unwrap_or_default())),
            "W12" => tables.push(("after", reachability(&cluster).unwrap_or_default())),
            _ => {}
        }
        marks.push((row, log.len(), log.failures().count(), log.seconds()));
        if options.until.as_deref() == Some(row.id) {
            break;
        }
    }
    summary(voice, &marks, &tables);
    let passed = marks.iter().all(|(_, _, failed, _)| *failed == 0);
    if options.down {
        cluster.down()?;
    } else {
        go_on(&mut cluster, &title);
    }
    Ok(passed)
}

fn summary(
    voice: Voice,
    marks: &[(&towpath_walkthrough::rows::Row, usize, usize, f64)],
    tables: &[(&str, Vec<Reach>)],
) {
    let log = Log::new(voice);
    if let Some((_, first)) = tables.first() {
        log.heading("\nWho reaches whom");
        let names: Vec<&str> = tables.iter().map(|(name, _)| *name).collect();
        log.say(&format!("{:<12} {:<18} {}", "from", "to", names.join("   ")));
        for (index, line) in first.iter().enumerate() {
            let cells: Vec<String> = tables
                .iter()
                .map(|(name, table)| {
                    let mark = table.get(index).map_or("?", |r| if r.works { "yes" } else { "–" });
                    format!("{mark:<width$}", width = name.chars().count())
                })
                .collect();
            log.say(&format!("{:<12} {:<18} {}", line.from, line.to, cells.join("   ")));
        }
    }
    log.heading("\nThe walkthrough");
    for (row, checks, failed, seconds) in marks {
        let mark = if *failed == 0 { "passed" } else { "FAILED" };
        log.say(&format!("{:<4} {mark}  {:>2} checks, {:>4.1} s  {}", row.id, checks, seconds, row.title));
    }
}

fn go_on(cluster: &mut Cluster, log: &Log) {
    cluster.keep();
    let towpath = cluster.towpath().display().to_string();
    let name = cluster.name().to_owned();
    log.heading("\nThe lab stays up. Go on by hand:");
    log.say(&format!("export KUBECONFIG={}", cluster.kubeconfig().display()));
    log.say("kubectl get pods -o wide");
    log.say(&format!("{towpath} status --lab {name}"));
    log.say(&format!("{towpath} explain pod/busybox pod/nginx 80"));
    log.say(&format!("{towpath} lab exec --name {name} n1 -- ip route"));
    log.say(&format!("{towpath} lab down --name {name}"));
}
