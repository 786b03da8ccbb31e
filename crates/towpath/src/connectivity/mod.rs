//! `towpath connectivity test`: tries the network of a live cluster from pods of its own, and says of each failure what was tried
//! from which pod on which node, and what to run next.
//!
//! ```text
//! stage (namespace, pods, Services) ─► Cast ─► checks (pure) ─► remote (exec in the pods) ─► judge (pure) ─► report
//! ```
//!
//! Everything it makes is in one namespace, which is removed at the end, after Ctrl-C too. The pods run Towpath's own image, which
//! is on every node already (`towpath probe`), need no rights, and end by themselves.

mod checks;
mod judge;
mod manifests;
mod remote;
mod report;
mod stage;
#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kube::Client;
use tokio::signal::unix::{SignalKind, signal};
use towpath_lab::layout::LabName;

use checks::{Cast, Check, Phase};
use judge::CheckResult;
pub(crate) use report::escaped;
use report::{Report, Reporter};
use stage::Stage;

use crate::place::Where;
use crate::probe::Outcome;

/// Commands of `towpath connectivity`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// Runs every check.
    ///
    /// The exit code is 0 when all passed, 1 when one failed, 130 when it was interrupted.
    Test(Options),
}

/// Options of `towpath connectivity test`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Kubeconfig; else KUBECONFIG and the usual places.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// A lab of this machine instead.
    #[arg(long, conflicts_with = "kubeconfig")]
    lab: Option<LabName>,
    /// The namespace that it makes and removes.
    #[arg(long, default_value = "towpath-connectivity")]
    namespace: String,
    /// Removes the namespace first if an earlier run left it there.
    #[arg(long)]
    replace: bool,
    /// Leaves the namespace there at the end, for looking into what failed.
    #[arg(long)]
    keep: bool,
    /// How many nodes to try, each with each.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u8).range(1..=20))]
    nodes: u8,
    /// These nodes; may be given several times.
    #[arg(long = "node", value_name = "NODE")]
    named: Vec<String>,
    /// The image of the pods, with `towpath` in it [default: that of the DaemonSet kube-system/towpath].
    #[arg(long)]
    image: Option<String>,
    /// A port that is free on the nodes, and the one after it.
    #[arg(long, default_value_t = 18116)]
    host_port: u16,
    /// Port on which agents serve metrics on their node's loopback; drops of denied packets are looked for there.
    #[arg(long, default_value_t = 9116)]
    metrics_port: u16,
    /// The cluster's domain.
    #[arg(long, default_value = "cluster.local")]
    cluster_domain: String,
    /// Connects to this address and port outside the cluster, too.
    #[arg(long, value_name = "ADDRESS:PORT")]
    outside: Option<String>,
    /// Looks this name up that is not the cluster's, too.
    #[arg(long, value_name = "NAME")]
    outside_name: Option<String>,
    /// How long the pods may take to start, in seconds.
    #[arg(long, default_value_t = 120)]
    start_timeout: u64,
    /// Only checks whose name contains this.
    #[arg(long, value_name = "TEXT")]
    only: Option<String>,
    /// Writes the results as JUnit XML.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// Prints the results as JSON at the end; what is going on goes to standard error.
    #[arg(long)]
    json: bool,
}

/// The whole of it may take so long, so that what hangs ends too.
const LIMIT: Duration = Duration::from_secs(15 * 60);
/// How long the removal at the end is waited for.
const REMOVAL: Duration = Duration::from_secs(90);
/// What a shell says of a program that Ctrl-C ended.
const INTERRUPTED: i32 = 130;

/// Runs a command.
///
/// # Errors
/// The cluster cannot be used, pods do not start, or what was made could not be removed.
pub(crate) async fn run(command: &Command) -> Result<bool> {
    let Command::Test(options) = command;
    let kubeconfig = match &options.lab {
        Some(lab) => Some(towpath_lab::commands::kubeconfig(lab)?),
        None => options.kubeconfig.clone(),
    };
    let client = crate::kubernetes::client(kubeconfig.as_deref()).await?;
    let reporter = Reporter::new(options.json);
    let stage = Stage::new(client.clone(), options);
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let mut report = Report::default();
    let outcome = tokio::select! {
        outcome = test(&client, &stage, options, &reporter, &mut report) => outcome.map(|()| false),
        () = tokio::time::sleep(LIMIT) => Err(anyhow::anyhow!("not done within {} minutes: given up", LIMIT.as_secs() / 60)),
        _ = interrupt.recv() => Ok(true),
        _ = terminate.recv() => Ok(true),
    };
    let interrupted = matches!(outcome, Ok(true));
    if !stage.is_ours() {
        // Nothing was made, so nothing is removed.
    } else if options.keep {
        reporter.say(&format!("left there: kubectl delete namespace {} when done", options.namespace));
    } else {
        reporter.say(&format!("removing namespace {}", options.namespace));
        let removed = tokio::select! {
            removed = stage.remove(REMOVAL) => removed,
            _ = interrupt.recv() => Err(anyhow::anyhow!("interrupted while it was removed")),
        };
        let next = format!("namespace {0} may be left: kubectl delete namespace {0}", options.namespace);
        match (removed, &outcome) {
            (Err(error), Ok(_)) => return Err(error.context(next)),
            // What went wrong first is what matters more.
            (Err(error), Err(_)) => reporter.say(&format!("{error:#}; {next}")),
            (Ok(()), _) => {}
        }
    }
    if interrupted {
        reporter.say("interrupted");
        std::process::exit(INTERRUPTED);
    }
    outcome?;
    finish(options, &reporter, &report)
}

async fn test(
    client: &Client,
    stage: &Stage,
    options: &Options,
    reporter: &Reporter,
    report: &mut Report,
) -> Result<()> {
    report.begin();
    let place = Where { kubeconfig: options.kubeconfig.clone(), lab: options.lab.clone(), output: crate::Output::Text };
    let lab = place.named_lab()?;
    stage.claim_namespace(options.replace).await?;
    let nodes = stage.choose_nodes(&options.named, usize::from(options.nodes)).await?;
    let names: Vec<&str> = nodes.iter().map(|node| node.name.as_str()).collect();
    reporter.say(&format!("on nodes {} in namespace {}", names.join(", "), options.namespace));
    if nodes.len() < 2 {
        reporter.say("only one node: nothing between nodes is tried");
    }
    report.nodes = names.iter().map(|name| (*name).to_owned()).collect();
    let image = stage.image(options.image.as_deref()).await?;
    let cast = stage.set_up(&nodes, &image, reporter).await.context("the test could not be set up")?;
    let asked = checks::Asked {
        domain: options.cluster_domain.clone(),
        outside: options.outside.clone(),
        outside_name: options.outside_name.clone(),
    };
    if let Some(why) = &cast.no_host_port {
        let result = CheckResult::not_set_up("host-port/start", &cast, why);
        reporter.result(&result);
        report.results.push(result);
    }
    for phase in Phase::ALL {
        let planned: Vec<Check> = checks::plan(&cast, &asked, phase)?;
        let wanted: Vec<Check> = planned
            .into_iter()
            .filter(|check| options.only.as_ref().is_none_or(|text| check.name.contains(text.as_str())))
            .collect();
        if wanted.is_empty() {
            continue;
        }
        stage.enter(phase).await?;
        let before = drops(client, options, &cast, phase).await;
        let mut results = remote::run(client, &options.namespace, &wanted, reporter).await;
        if let Some((check, before)) = before {
            let after = remote::one(client, &options.namespace, &check.from.pod, check.ask(0)).await;
            results.push(CheckResult::of_drops(&check, &before, &after, options.metrics_port));
            results.last().into_iter().for_each(|result| reporter.result(result));
        }
        report.results.extend(judge::explained(client, lab.as_ref(), &options.namespace, results).await);
    }
    Ok(())
}

/// What the agent of the guarded pod's node has dropped by policy so far, where packets are about to be denied; and how to ask again.
async fn drops(client: &Client, options: &Options, cast: &Cast, phase: Phase) -> Option<(Check, Outcome)> {
    let check = checks::drops(cast, options.metrics_port).filter(|_| phase == Phase::Denied)?;
    let before = remote::one(client, &options.namespace, &check.from.pod, check.ask(0)).await;
    Some((check, before))
}

fn finish(options: &Options, reporter: &Reporter, report: &Report) -> Result<bool> {
    if let Some(path) = &options.junit {
        std::fs::write(path, report.junit()).with_context(|| format!("could not write {}", path.display()))?;
    }
    if options.json {
        crate::print_json(&report.json())?;
    }
    reporter.say(&report.summary());
    if report.results.is_empty() {
        bail!("no check was run: is there one whose name contains {:?}?", options.only.as_deref().unwrap_or_default());
    }
    Ok(report.failed() == 0)
}
