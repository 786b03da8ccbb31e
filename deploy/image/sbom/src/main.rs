//! What the image is made of: a CycloneDX 1.5 document from `cargo metadata` and a list of Debian packages, and the licence texts of
//! the crates. Run by `deploy/image/build`.
#![forbid(unsafe_code)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::Parser;
use serde::Deserialize;
use serde_json::{Value, json};

/// The programs of the image.
const PROGRAMS: [&str; 2] = ["towpath", "towpath-cni"];

#[derive(Parser, Debug)]
struct Options {
    /// The target that is built for: crates of other systems are left out.
    #[arg(long)]
    target: String,
    /// Lines of `package version architecture`: Debian's packages of the copied files.
    #[arg(long)]
    packages: PathBuf,
    /// Where the document is written.
    #[arg(long)]
    sbom: PathBuf,
    /// Directory for the licence texts.
    #[arg(long)]
    notices: PathBuf,
}

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    license_file: Option<String>,
    source: Option<String>,
    manifest_path: PathBuf,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

fn main() -> Result<()> {
    let options = Options::parse();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.args(["metadata", "--format-version", "1", "--locked", "--filter-platform", &options.target]);
    let output = cargo.output().context("run cargo metadata")?;
    ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    let metadata: Metadata = serde_json::from_slice(&output.stdout).context("understand cargo metadata")?;
    let linked = linked(&metadata);
    let mut components: Vec<Value> = linked.iter().map(|package| crate_component(package)).collect();
    let list = fs::read_to_string(&options.packages).with_context(|| options.packages.display().to_string())?;
    for line in list.lines() {
        components.push(debian_component(line)?);
    }
    let document = json!({
        "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "container", "name": "towpath", "version": env!("CARGO_PKG_VERSION"),
            "licenses": [{"license": {"id": "Apache-2.0"}}]}},
        "components": components,
    });
    fs::write(&options.sbom, serde_json::to_string_pretty(&document)? + "\n")?;
    for package in linked.iter().filter(|package| package.source.is_some()) {
        notices(package, &options.notices)?;
    }
    Ok(())
}

/// What is linked into the programs: their dependencies, but not those of builds and tests.
fn linked(metadata: &Metadata) -> Vec<&Package> {
    let nodes: BTreeMap<&str, &Node> = metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let programs = metadata.packages.iter().filter(|p| p.source.is_none() && PROGRAMS.contains(&p.name.as_str()));
    let mut waiting: Vec<&str> = programs.map(|package| package.id.as_str()).collect();
    let mut found: BTreeSet<&str> = BTreeSet::new();
    while let Some(id) = waiting.pop() {
        if !found.insert(id) {
            continue;
        }
        let normal = |dependency: &&Dependency| dependency.dep_kinds.iter().any(|kind| kind.kind.is_none());
        let deps = nodes.get(id).map(|node| node.deps.iter()).into_iter().flatten();
        waiting.extend(deps.filter(normal).map(|dependency| dependency.pkg.as_str()));
    }
    let mut linked: Vec<&Package> = metadata.packages.iter().filter(|p| found.contains(p.id.as_str())).collect();
    linked.sort_by(|a, b| (&a.name, &a.version).cmp(&(&b.name, &b.version)));
    linked
}

fn crate_component(package: &Package) -> Value {
    // Cargo once wrote "or" as a slash.
    let licences = package.license.iter().map(|licence| json!({"expression": licence.replace('/', " OR ")}));
    json!({
        "type": "library", "name": package.name, "version": package.version,
        "purl": format!("pkg:cargo/{}@{}", package.name, package.version),
        "licenses": licences.collect::<Vec<_>>(),
    })
}

fn debian_component(line: &str) -> Result<Value> {
    let fields: Vec<&str> = line.split(' ').collect();
    let [name, version, architecture] = fields.as_slice() else {
        anyhow::bail!("{line:?} is not `package version architecture`");
    };
    Ok(json!({
        "type": "library", "name": name, "version": version,
        "purl": format!("pkg:deb/debian/{name}@{}?arch={architecture}", version.replace('+', "%2B").replace(':', "%3A")),
    }))
}

/// Copies a crate's licence texts. A crate without any is listed in the document with the name of its licence.
fn notices(package: &Package, into: &Path) -> Result<()> {
    let directory = package.manifest_path.parent().context("a manifest in no directory")?;
    let wanted = |name: &str| {
        let name = name.to_ascii_uppercase();
        ["LICENSE", "LICENCE", "COPYING", "NOTICE", "COPYRIGHT"].iter().any(|begin| name.starts_with(begin))
    };
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if (wanted(&name) || package.license_file.as_deref() == Some(&name)) && entry.file_type()?.is_file() {
            let target = into.join(format!("{}-{}", package.name, package.version));
            fs::create_dir_all(&target)?;
            fs::copy(entry.path(), target.join(&name))?;
        }
    }
    Ok(())
}
