//! A development front end of the lab without the rest of Towpath: hidden stages, and up, down and the like.
//!
//! `labdev up [CONFLIST]`, `labdev down|stop|start|status`, `labdev node add`, `labdev node delete NODE`, `labdev exec NODE CMD…`, `labdev outside CMD…`; the lab's name
//! comes from `LAB` (default `dev`), the number of nodes from `NODES`, the IP family from `FAMILY`.
#![forbid(unsafe_code)]

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use towpath_lab::commands;
use towpath_lab::layout::LabName;
use towpath_lab::options::UpOptions;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [lab, stage, rest @ ..] = args.as_slice()
        && lab == "lab"
        && stage == "stage"
    {
        return towpath_lab::stage::main(rest);
    }
    match run(&args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<()> {
    let name: LabName = std::env::var("LAB").unwrap_or_else(|_| "dev".to_owned()).parse()?;
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let mut progress = |text: &str| eprintln!("… {text}");
    match words.as_slice() {
        ["lab", "serve", name] => {
            tracing_subscriber::fmt()
                .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
                .with_writer(std::io::stderr)
                .init();
            commands::serve(&name.parse()?)
        }
        ["up", rest @ ..] => {
            let mut options = UpOptions::new(name)?;
            options.cni_conf = rest.first().map(Into::into);
            if let Ok(nodes) = std::env::var("NODES") {
                options.nodes = nodes.parse().context("NODES")?;
            }
            if let Ok(family) = std::env::var("FAMILY") {
                options.ip_family = family.parse()?;
            }
            let begun = std::time::Instant::now();
            let status = commands::up(&options, &mut progress)?;
            eprintln!("up after {:?}; export KUBECONFIG={}", begun.elapsed(), status.kubeconfig.display());
            Ok(())
        }
        ["start"] => commands::start(&name, &mut progress).map(drop),
        ["stop"] => commands::stop(&name),
        ["down"] => commands::down(&name),
        ["node", "add"] => commands::add_node(&name).map(|node| println!("{}", node.name)),
        ["node", "delete", node] => commands::delete_node(&name, node).map(drop),
        ["status"] => {
            println!("{}", serde_json::to_string_pretty(&commands::status(&name)?)?);
            Ok(())
        }
        ["exec", node, ..] => match commands::exec(&name, node, args.get(2..).unwrap_or_default())? {},
        ["outside", ..] => match commands::outside(&name, None, args.get(1..).unwrap_or_default())? {},
        other => bail!("unknown command {other:?}"),
    }
}
