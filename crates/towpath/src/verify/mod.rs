//! `towpath verify`: questions about policies, answered from manifests or a live API, without a cluster and without root.
//!
//! This is the shell around [`towpath_policy::verify`]: it reads files, asks, prints. The exit code is 0 when the answer is what was wished, 1
//! when it is not, 2 when the question or the objects could not be understood.

mod lint;
mod live;
mod load;
mod objects;
mod questions;
mod show;
mod yaml;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use ipnet::IpNet;
use serde_json::{Value, json};
use towpath_model::{AUDIT_ANNOTATION, Enforcement, World};
use towpath_policy::verify::diff::diff;
use towpath_policy::verify::expect::Checker;
use towpath_policy::verify::prove::{Answer, Limits, prove};
use towpath_policy::verify::reach::reach;
use towpath_policy::verify::{Change, Statement, Universe};

use self::objects::Loaded;
use self::questions::Question;
use self::show::{Came, Case};

/// Subcommands of `towpath verify`.
#[derive(clap::Subcommand, Debug)]
pub(crate) enum Command {
    /// The table of who reaches whom on which ports, by workload.
    Reach(ReachOptions),
    /// Checks a file of expectations; exit code 0 if they all hold, 1 if one does not, 2 if one cannot be understood.
    Assert(AssertOptions),
    /// Proves a statement over all possible pods, or shows a counterexample.
    Prove(ProveOptions),
    /// What a change newly allows and newly denies; exit code 0 if nothing, 1 if something.
    Diff(DiffOptions),
    /// What enforcing the policies that are only audited would newly allow and deny; exit code 0 if nothing, 1 if something.
    Audit(AuditOptions),
    /// What in the policies is likely a mistake, each with a code, its place and what to do.
    Lint(lint::Options),
}

/// Where the objects come from.
#[derive(clap::Args, Debug)]
pub(crate) struct Source {
    /// Ask the cluster of the kubeconfig; objects of files take the place of its own.
    #[arg(long)]
    live: bool,
    /// Kubeconfig for --live; else KUBECONFIG and the usual places.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// Where pods have their addresses (may be given twice). Else what the nodes say, else 10.244.0.0/16.
    #[arg(long, value_name = "CIDR")]
    pod_cidr: Vec<IpNet>,
    /// Namespace of objects that name none.
    #[arg(long, value_name = "NAMESPACE", default_value = "default")]
    default_namespace: String,
    /// As if policies that are only audited (towpath.dev/audit: "true") were enforced. Else they are left out.
    #[arg(long)]
    as_if_enforced: bool,
}

/// Options of `towpath verify reach`.
#[derive(clap::Args, Debug)]
pub(crate) struct ReachOptions {
    /// Manifests: files, directories, - for standard input.
    paths: Vec<PathBuf>,
    /// Only rows that begin or end in this namespace.
    #[arg(short, long)]
    namespace: Option<String>,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// Options of `towpath verify assert`.
#[derive(clap::Args, Debug)]
pub(crate) struct AssertOptions {
    /// Manifests: files, directories, - for standard input.
    paths: Vec<PathBuf>,
    /// The expectations: a list of `allow: {from, to, port}` and `deny: {from, to, port}`.
    #[arg(short, long, required = true)]
    file: Vec<PathBuf>,
    /// Write a JUnit report there.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// Options of `towpath verify prove`.
#[derive(clap::Args, Debug)]
pub(crate) struct ProveOptions {
    /// The statement (without --file), then manifests: files, directories, - for standard input.
    #[arg(value_name = "STATEMENT|PATH")]
    words: Vec<String>,
    /// Statements from files: a list of texts, or of nothing/everything, reaches, on, but.
    #[arg(short, long)]
    file: Vec<PathBuf>,
    /// Write a JUnit report there.
    #[arg(long, value_name = "FILE")]
    junit: Option<PathBuf>,
    /// How long to search: looks at a label, an address or a port.
    #[arg(long, default_value_t = Limits::default().steps)]
    steps: u64,
    /// Only namespaces that are there are possible, with the labels they have.
    #[arg(long)]
    known_namespaces: bool,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// Options of `towpath verify diff`.
#[derive(clap::Args, Debug)]
pub(crate) struct DiffOptions {
    /// Before and after: two paths. With --live one: before is the cluster, after is the cluster with these objects.
    #[arg(required = true, num_args = 1..=2)]
    paths: Vec<PathBuf>,
    /// Objects of both sides, such as the workloads.
    #[arg(long, value_name = "PATH")]
    with: Vec<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// Options of `towpath verify audit`.
#[derive(clap::Args, Debug)]
pub(crate) struct AuditOptions {
    /// Manifests: files, directories, - for standard input.
    paths: Vec<PathBuf>,
    #[command(flatten)]
    source: Source,
    /// text or json.
    #[arg(short, long, value_enum, default_value = "text")]
    output: crate::Output,
}

/// Runs a subcommand.
pub(crate) fn run(command: &Command) -> ExitCode {
    let answer = match command {
        Command::Reach(options) => run_reach(options),
        Command::Assert(options) => run_assert(options),
        Command::Prove(options) => run_prove(options),
        Command::Diff(options) => run_diff(options),
        Command::Audit(options) => run_audit(options),
        Command::Lint(options) => lint::run(options),
    };
    match answer {
        Ok(Exit::Good) => ExitCode::SUCCESS,
        Ok(Exit::Bad) => ExitCode::FAILURE,
        Ok(Exit::Unclear) => ExitCode::from(2),
        Err(error) => {
            eprintln!("towpath: {error:#}");
            ExitCode::from(2)
        }
    }
}

/// The exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Exit {
    Good,
    Bad,
    Unclear,
}

impl Source {
    /// Reads the cluster, if asked for, and the manifests over it.
    fn load(&self, paths: &[PathBuf]) -> Result<Loaded> {
        if paths.is_empty() && !self.live {
            bail!("name manifests (files, directories, - for standard input), or ask a cluster with --live");
        }
        let mut loaded = match self.live {
            true => live::load(self.kubeconfig.as_deref())?,
            false => Loaded::default(),
        };
        self.add(&mut loaded, paths)?;
        if self.as_if_enforced {
            loaded.world.enforce_all();
        }
        Ok(loaded)
    }

    fn add(&self, loaded: &mut Loaded, paths: &[PathBuf]) -> Result<()> {
        loaded.add(&load::read(paths)?, &self.default_namespace);
        Ok(())
    }

    /// As [`Source::load`], for who needs every object to be as the API server would have it.
    fn universe(&self, paths: &[PathBuf]) -> Result<Universe> {
        let loaded = self.load(paths)?;
        told(&loaded.notes);
        told(&about_names(&loaded));
        told(&about_audited(&loaded.world));
        without_problems(&loaded)?;
        let universe = Universe::of(loaded.world, &loaded.owners, &self.pod_cidr);
        has_addresses(&universe)?;
        Ok(universe)
    }

    /// What both sides have, once, and over it what each has of its own.
    fn change(&self, common: &[PathBuf], before: Option<&PathBuf>, after: &PathBuf) -> Result<Change> {
        let mut was = match self.live {
            true => live::load(self.kubeconfig.as_deref())?,
            false => Loaded::default(),
        };
        self.add(&mut was, common)?;
        let mut is = was.clone();
        self.add(&mut was, before.map(std::slice::from_ref).unwrap_or_default())?;
        self.add(&mut is, std::slice::from_ref(after))?;
        if self.as_if_enforced {
            was.world.enforce_all();
            is.world.enforce_all();
        }
        told(&was.notes.union(&is.notes).cloned().collect());
        told(&about_names(&is));
        told(&about_audited(&is.world));
        without_problems(&was)?;
        without_problems(&is)?;
        let change = Change::of((was.world, &was.owners), (is.world, &is.owners), &self.pod_cidr);
        for side in [change.before(), change.after()] {
            has_addresses(side)?;
        }
        Ok(change)
    }
}

fn told(notes: &BTreeSet<String>) {
    for note in notes {
        eprintln!("towpath: note: {note}");
    }
}

/// What is left out, or taken wide, of policies that name domains.
fn about_names(loaded: &Loaded) -> BTreeSet<String> {
    let named = loaded.world.cluster_policies.values().filter(|policy| policy.has_domain_names());
    let named: Vec<&str> = named.map(|policy| policy.name.as_str()).collect();
    let note = format!(
        "what domainNames stand for is known on nodes only (ClusterNetworkPolicy {}): reach, assert and diff leave them out, prove takes \
         them as any address outside",
        named.join(", ")
    );
    (!named.is_empty()).then_some(note).into_iter().collect()
}

fn without_problems(loaded: &Loaded) -> Result<()> {
    let Some(first) = loaded.problems.first() else { return Ok(()) };
    let place = first.at.as_ref().map(|at| format!("{at}: ")).unwrap_or_default();
    let more = loaded.problems.len() - 1;
    let more = if more == 0 { String::new() } else { format!(" (and {more} more: see `towpath verify lint`)") };
    bail!("{place}{}{more}", first.invalid)
}

/// Whether every pod has an address: one without is in no answer, which would read as if it were closed.
fn has_addresses(universe: &Universe) -> Result<()> {
    if universe.unplaced == 0 {
        return Ok(());
    }
    bail!(
        "{} pods have no address, and {} has none left for them: name a larger range with --pod-cidr",
        universe.unplaced,
        ranges(universe)
    )
}

/// What is left out of policies that are only audited.
fn about_audited(world: &World) -> BTreeSet<String> {
    let audited = audited(world);
    let note = format!("only audited, and so left out (--as-if-enforced has them): {}", audited.join(", "));
    (!audited.is_empty()).then_some(note).into_iter().collect()
}

/// The policies that are only audited.
fn audited(world: &World) -> Vec<String> {
    let namespaced = world.policies.values().filter(|policy| policy.enforcement.is_audited());
    let namespaced = namespaced.map(|policy| format!("NetworkPolicy {}", policy.name));
    let cluster = world.cluster_policies.values().filter(|policy| policy.enforcement.is_audited());
    namespaced.chain(cluster.map(|policy| format!("ClusterNetworkPolicy {}", policy.name))).collect()
}

fn ranges(universe: &Universe) -> String {
    universe.pod_ranges.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
}

fn run_reach(options: &ReachOptions) -> Result<Exit> {
    let universe = options.source.universe(&options.paths)?;
    if let Some(namespace) = &options.namespace
        && !universe.endpoints.iter().any(|e| e.namespace() == Some(namespace))
    {
        bail!("no workload on the pod network is in namespace {namespace}");
    }
    let table = reach(&universe, options.namespace.as_deref());
    match options.output {
        crate::Output::Json => crate::print_json(&table)?,
        crate::Output::Text => crate::print(&show::reach(&table, &ranges(&universe)))?,
    }
    Ok(Exit::Good)
}

/// Prints what came of questions, and writes the report.
fn conclude(
    verb: &str,
    cases: &[Case],
    details: &serde_json::Value,
    output: crate::Output,
    junit: Option<&PathBuf>,
) -> Result<Exit> {
    if let Some(file) = junit {
        std::fs::write(file, show::junit(&format!("towpath verify {verb}"), cases))
            .with_context(|| format!("could not write {}", file.display()))?;
    }
    let mut exit = Exit::Good;
    for case in cases {
        exit = exit.max(match case.came {
            Came::Good => Exit::Good,
            Came::Bad(_) => Exit::Bad,
            Came::Unclear(_) => Exit::Unclear,
        });
    }
    if output == crate::Output::Json {
        crate::print_json(details)?;
        return Ok(exit);
    }
    for case in cases {
        let (word, why) = match &case.came {
            Came::Good => ("ok  ", ""),
            Came::Bad(why) => ("FAIL", why.as_str()),
            Came::Unclear(why) => ("????", why.as_str()),
        };
        crate::print(&format!("{word} {}", case.name))?;
        for line in why.lines() {
            crate::print(&format!("     {line}"))?;
        }
    }
    let count = |wanted: fn(&Came) -> bool| cases.iter().filter(|case| wanted(&case.came)).count();
    let (good, bad) = (count(|c| matches!(c, Came::Good)), count(|c| matches!(c, Came::Bad(_))));
    let unclear = count(|c| matches!(c, Came::Unclear(_)));
    let unclear = if unclear == 0 { String::new() } else { format!(", {unclear} could not be answered") };
    let (held, not) = if verb == "prove" { ("proved", "disproved") } else { ("hold", "do not") };
    crate::print(&format!("{good} {held}, {bad} {not}{unclear}"))?;
    Ok(exit)
}

fn place<T>(question: &Question<T>) -> String {
    question.at.as_ref().map(ToString::to_string).unwrap_or_default()
}

fn run_assert(options: &AssertOptions) -> Result<Exit> {
    let expectations = questions::expectations(&load::read(&options.file)?)?;
    let universe = options.source.universe(&options.paths)?;
    let mut checker = Checker::of(&universe);
    let (mut cases, mut details) = (Vec::new(), Vec::new());
    for question in &expectations {
        let place = place(question);
        let (came, detail) = match checker.check(&question.asked) {
            Ok(outcome) if outcome.failures.is_empty() => (Came::Good, json!({"holds": true, "pairs": outcome.pairs})),
            Ok(outcome) => {
                let detail = json!({"holds": false, "pairs": outcome.pairs, "failures": outcome.failures});
                (Came::Bad(outcome.failures.iter().map(show::failure).collect::<Vec<_>>().join("\n")), detail)
            }
            Err(why) => (Came::Unclear(format!("{place}: {why}")), json!({"holds": null, "error": why.to_string()})),
        };
        details.push(named(detail, &question.name, &place));
        cases.push(Case { name: question.name.clone(), place, came });
    }
    let details = json!({"expectations": details, "placed": universe.placed, "innerBlocks": universe.inner_blocks});
    let exit = conclude("assert", &cases, &details, options.output, options.junit.as_ref())?;
    let assumed = show::assumed(universe.placed, universe.inner_blocks, &ranges(&universe));
    if let Some(assumed) = assumed.filter(|_| options.output == crate::Output::Text) {
        crate::print(&assumed)?;
    }
    Ok(exit)
}

/// The detail of a question, with its name and where it was asked.
fn named(mut detail: Value, name: &str, place: &str) -> Value {
    if let Some(fields) = detail.as_object_mut() {
        fields.insert("name".to_owned(), json!(name));
        fields.insert("place".to_owned(), json!(place));
    }
    detail
}

fn run_prove(options: &ProveOptions) -> Result<Exit> {
    let (statements, paths) = match (options.file.is_empty(), options.words.split_first()) {
        (false, _) => (questions::statements(&load::read(&options.file)?)?, options.words.as_slice()),
        (true, Some((text, paths))) => {
            let asked = Statement::parse(text).with_context(|| format!("{text:?} is no statement"))?;
            (vec![Question { name: text.clone(), at: None, asked }], paths)
        }
        (true, None) => bail!("write a statement, or name a file of them with --file"),
    };
    let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
    let universe = options.source.universe(&paths)?;
    let limits = Limits { steps: options.steps, known_namespaces: options.known_namespaces };
    let (mut cases, mut details) = (Vec::new(), Vec::new());
    for question in &statements {
        let place = place(question);
        let (came, detail) = match prove(&universe, &question.asked, &limits) {
            Ok(Answer::Proved { steps }) => (Came::Good, json!({"proved": true, "steps": steps})),
            Ok(Answer::Disproved(found)) => {
                (Came::Bad(found.to_string()), json!({"proved": false, "counterexample": found}))
            }
            Err(why) => (Came::Unclear(why.to_string()), json!({"proved": null, "error": why.to_string()})),
        };
        details.push(named(detail, &question.name, &place));
        cases.push(Case { name: question.name.clone(), place, came });
    }
    let pods = ranges(&universe);
    let exit = conclude(
        "prove",
        &cases,
        &json!({"podCidrs": universe.pod_ranges, "statements": details}),
        options.output,
        options.junit.as_ref(),
    )?;
    if options.output == crate::Output::Text {
        crate::print(&format!("For all pods with an address in {pods} (--pod-cidr)."))?;
    }
    Ok(exit)
}

fn run_diff(options: &DiffOptions) -> Result<Exit> {
    let (before, after) = match (options.paths.as_slice(), options.source.live) {
        ([before, after], false) => (Some(before), after),
        ([after], true) => (None, after),
        (_, false) => bail!("name two sides, before and after, or one with --live"),
        (_, true) => bail!("with --live name one side: what the cluster is to become"),
    };
    let change = options.source.change(&options.with, before, after)?;
    let difference = diff(&change);
    match options.output {
        crate::Output::Json => crate::print_json(&difference)?,
        crate::Output::Text => crate::print(&show::difference(&difference, &ranges(change.after())))?,
    }
    Ok(if difference.is_empty() { Exit::Good } else { Exit::Bad })
}

fn run_audit(options: &AuditOptions) -> Result<Exit> {
    let loaded = options.source.load(&options.paths)?;
    told(&loaded.notes);
    told(&about_names(&loaded));
    without_problems(&loaded)?;
    if audited(&loaded.world).is_empty() {
        bail!("no policy is only audited (annotation {AUDIT_ANNOTATION}: \"{}\")", Enforcement::AUDITED);
    }
    let mut enforced = loaded.world.clone();
    enforced.enforce_all();
    let change = Change::of((loaded.world, &loaded.owners), (enforced, &loaded.owners), &options.source.pod_cidr);
    has_addresses(change.before())?;
    let difference = diff(&change);
    match options.output {
        crate::Output::Json => crate::print_json(&difference)?,
        crate::Output::Text => crate::print(&show::difference(&difference, &ranges(change.after())))?,
    }
    Ok(if difference.is_empty() { Exit::Good } else { Exit::Bad })
}
