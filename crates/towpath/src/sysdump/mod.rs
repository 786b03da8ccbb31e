//! `towpath sysdump`: what somebody else needs to find out what is wrong, in one file, with nothing in it that is secret.
//!
//! ```text
//! cluster (objects, logs, by the API) ─┐
//! each node (`sysdump --node` there) ──┼─► Collection: every text goes through redact ─► archive (tar.gz with a MANIFEST.json)
//! ```
//!
//! No Secret is ever asked for. What could not be collected is in the manifest with the reason, and holds up nothing else.

mod archive;
mod cluster;
mod node;
mod redact;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use towpath_lab::layout::LabName;

/// Options of `towpath sysdump`.
#[derive(clap::Args, Debug)]
pub(crate) struct Options {
    /// Kubeconfig; else KUBECONFIG and the usual places.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
    /// A lab of this machine instead.
    #[arg(long, conflicts_with = "kubeconfig")]
    lab: Option<LabName>,
    /// The file [default: towpath-sysdump-TIME.tar.gz here].
    #[arg(short, long)]
    output: Option<PathBuf>,
    /// Lines of each container's log, from its end.
    #[arg(long, default_value_t = 5000)]
    log_lines: i64,
    /// Only this node, by what can be seen on it; asks no API server.
    #[arg(long, conflicts_with_all = ["kubeconfig", "lab"])]
    this_node: bool,
    /// The agent's configuration on this node [default: /etc/towpath/agent.yaml, if it is there].
    #[arg(long)]
    config: Option<PathBuf>,
    /// As `--this-node`, as JSON on standard output: what a sysdump of the cluster asks each node for.
    #[arg(long, hide = true)]
    node_facts: bool,
}

/// What was collected, redacted already, and what could not be.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Collection {
    files: BTreeMap<String, String>,
    missing: BTreeMap<String, String>,
}

impl Collection {
    /// A text, or why there is none.
    pub(crate) fn text(&mut self, path: &str, outcome: Result<impl AsRef<str>>) {
        self.put(path, outcome.map(|text| redact::text(text.as_ref())));
    }

    fn put(&mut self, path: &str, redacted: Result<String>) {
        match redacted {
            Ok(text) => drop(self.files.insert(path.to_owned(), text)),
            Err(error) => drop(self.missing.insert(path.to_owned(), redact::text(&format!("{error:#}")))),
        }
    }

    /// A document, or why there is none.
    pub(crate) fn json(&mut self, path: &str, outcome: Result<impl Serialize>) {
        let outcome = outcome.and_then(|value| {
            let mut value = serde_json::to_value(value)?;
            redact::value(&mut value);
            Ok(serde_json::to_string_pretty(&value)?)
        });
        // Every text in it was looked at by itself; over the whole, patterns would eat its punctuation.
        self.put(path, outcome);
    }

    /// Another collection, below a directory. It was redacted where it was made, by what may be another version: here again.
    pub(crate) fn below(&mut self, directory: &str, other: Self) {
        for (path, text) in other.files {
            // What a node says its files are called is a node's word.
            if path.split('/').any(|part| part.is_empty() || part == ".." || part == ".") {
                self.missing.insert(format!("{directory}/refused"), format!("a file called {path:?}"));
                continue;
            }
            let path = format!("{directory}/{path}");
            match serde_json::from_str::<serde_json::Value>(&text) {
                Ok(value) => self.json(&path, Ok(value)),
                Err(_) => self.text(&path, Ok(text)),
            }
        }
        for (path, why) in other.missing {
            self.missing.insert(format!("{directory}/{path}"), redact::text(&why));
        }
    }
}

/// What is in the archive.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct Manifest<'a> {
    version: &'static str,
    created: String,
    removed: &'static [&'static str],
    collected: BTreeMap<&'a str, usize>,
    missing: &'a BTreeMap<String, String>,
}

/// Collects and writes.
///
/// # Errors
/// There is no cluster to talk to, or the file cannot be written.
pub(crate) async fn run(options: &Options) -> Result<bool> {
    if options.node_facts {
        crate::print(&serde_json::to_string(&node::collect(options.config.as_deref()).await?)?)?;
        return Ok(true);
    }
    let mut collection = Collection::default();
    if options.this_node {
        collection.below("node", node::collect(options.config.as_deref()).await?);
    } else {
        let kubeconfig = match &options.lab {
            Some(lab) => Some(towpath_lab::commands::kubeconfig(lab)?),
            None => options.kubeconfig.clone(),
        };
        let client = crate::kubernetes::client(kubeconfig.as_deref()).await?;
        cluster::collect(&client, options.log_lines, &mut collection).await?;
        match &options.lab {
            Some(lab) => node::of_lab(lab, &mut collection)?,
            None => cluster::nodes(&client, &mut collection).await,
        }
    }
    let now = k8s_openapi::jiff::Timestamp::now();
    let path = options
        .output
        .clone()
        .unwrap_or_else(|| format!("towpath-sysdump-{}.tar.gz", now.strftime("%Y%m%d-%H%M%S")).into());
    let manifest = Manifest {
        version: env!("CARGO_PKG_VERSION"),
        created: now.to_string(),
        removed: &redact::REMOVED,
        collected: collection.files.iter().map(|(path, text)| (path.as_str(), text.len())).collect(),
        missing: &collection.missing,
    };
    let manifest = serde_json::to_string_pretty(&manifest)?;
    let files = std::iter::once(("MANIFEST.json", manifest.as_str()))
        .chain(collection.files.iter().map(|(path, text)| (path.as_str(), text.as_str())));
    archive::write(&path, "towpath-sysdump", now.as_second(), files)
        .with_context(|| format!("could not write {}", path.display()))?;
    crate::print(&format!("{}: {} files", path.display(), collection.files.len() + 1))?;
    for (what, why) in &collection.missing {
        crate::print(&format!("  not collected: {what}: {}", why.lines().next().unwrap_or_default()))?;
    }
    Ok(true)
}
