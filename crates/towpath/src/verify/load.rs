//! Manifests from files, directories and standard input.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::yaml::{Located, documents};

/// Where an object was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    /// The file, or `standard input`.
    pub(super) file: Arc<str>,
    /// The document in it, from 1.
    pub(super) document: usize,
    /// The line, from 1.
    pub(super) line: u64,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.file, self.line)
    }
}

/// A document with its place.
#[derive(Debug)]
pub(super) struct Read1 {
    pub(super) at: Position,
    pub(super) before: u64,
    pub(super) root: Located,
}

/// The largest file that is read, in bytes: above it is no manifest of a person.
const LARGEST: u64 = 64 << 20;

/// Reads all documents of files, directories (all below, `.yaml`, `.yml` and `.json`) and `-`.
///
/// # Errors
/// A path cannot be read, a directory has no manifest, or a file is no YAML.
pub(super) fn read(paths: &[PathBuf]) -> Result<Vec<Read1>> {
    let mut out = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            let mut text = String::new();
            let read = std::io::stdin().take(LARGEST).read_to_string(&mut text);
            read.context("could not read standard input")?;
            out.extend(parse("standard input", &text)?);
            continue;
        }
        let mut files = Vec::new();
        if path.is_dir() {
            walk(path, &mut files)?;
            if files.is_empty() {
                bail!("{} has no .yaml, .yml or .json file", path.display());
            }
        } else {
            files.push(path.clone());
        }
        for file in files {
            let size = std::fs::metadata(&file).with_context(|| format!("could not read {}", file.display()))?.len();
            if size > LARGEST {
                bail!("{} is larger than {} MiB", file.display(), LARGEST >> 20);
            }
            let bytes = std::fs::read(&file).with_context(|| format!("could not read {}", file.display()))?;
            let text = String::from_utf8(bytes).with_context(|| format!("{} is no UTF-8 text", file.display()))?;
            out.extend(parse(&file.display().to_string(), &text)?);
        }
    }
    Ok(out)
}

/// Reads a text.
pub(super) fn parse(name: &str, text: &str) -> Result<Vec<Read1>> {
    let file: Arc<str> = name.into();
    let documents = documents(text).map_err(|error| {
        anyhow::anyhow!("{file}:{}: document {} is no YAML: {}", error.line, error.document, error.reason)
    })?;
    let read = documents.into_iter().map(|document| Read1 {
        at: Position {
            file: file.clone(),
            document: document.number,
            line: document.before + document.root.line().max(1),
        },
        before: document.before,
        root: document.root,
    });
    Ok(read.collect())
}

/// All manifests below a directory, by name. Hidden entries are left out, links to directories not followed.
fn walk(directory: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let list = std::fs::read_dir(directory).with_context(|| format!("could not read {}", directory.display()))?;
    let mut entries =
        list.collect::<Result<Vec<_>, _>>().with_context(|| format!("could not read {}", directory.display()))?;
    entries.sort_by_key(std::fs::DirEntry::file_name);
    for entry in entries {
        let (path, name) = (entry.path(), entry.file_name());
        if name.to_string_lossy().starts_with('.') {
            continue;
        }
        let kind = entry.file_type().with_context(|| format!("could not read {}", path.display()))?;
        if kind.is_dir() {
            walk(&path, files)?;
        } else if path.extension().is_some_and(|e| e == "yaml" || e == "yml" || e == "json") {
            files.push(path);
        }
    }
    Ok(())
}
