//! Manifests from files, directories and standard input.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

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
pub(super) struct FileDocument {
    pub(super) at: Position,
    pub(super) before: u64,
    pub(super) root: Located,
}

/// The largest file that is read, in bytes: above it is no manifest of a person.
const LARGEST: u64 = 64 << 20;

/// Whether standard input has been read: it can be once.
static IS_STDIN_READ: AtomicBool = AtomicBool::new(false);

/// Reads all documents of files, directories (all below, `.yaml`, `.yml` and `.json`) and `-`.
///
/// # Errors
/// A path cannot be read, a directory has no manifest, a file is no YAML, or standard input is named twice.
pub(super) fn read(paths: &[PathBuf]) -> Result<Vec<FileDocument>> {
    let mut out = Vec::new();
    for path in paths {
        if path.as_os_str() == "-" {
            if IS_STDIN_READ.swap(true, Ordering::Relaxed) {
                bail!("standard input (-) is named twice and can be read once: write it to a file, and name that");
            }
            out.extend(parse("standard input", &bounded(std::io::stdin(), LARGEST, "standard input")?)?);
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

/// All of a text of up to `largest` bytes. One byte more shows that there is more.
fn bounded(source: impl Read, largest: u64, name: &str) -> Result<String> {
    let mut text = String::new();
    let read = source.take(largest.saturating_add(1)).read_to_string(&mut text);
    let length = read.with_context(|| format!("could not read {name}"))?;
    if u64::try_from(length).is_ok_and(|length| length <= largest) {
        return Ok(text);
    }
    bail!("{name} is larger than {} MiB", LARGEST >> 20)
}

/// Reads a text.
pub(super) fn parse(name: &str, text: &str) -> Result<Vec<FileDocument>> {
    let file: Arc<str> = name.into();
    let documents = documents(text).map_err(|error| {
        anyhow::anyhow!("{file}:{}: document {} is no YAML: {}", error.line, error.document, error.reason)
    })?;
    let read = documents.into_iter().map(|document| FileDocument {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_longer_than_the_limit_is_refused_and_not_cut() {
        assert_eq!(bounded(&b"a: 1"[..], 4, "it").unwrap(), "a: 1");
        let error = bounded(&b"a: 1\n"[..], 4, "it").unwrap_err().to_string();
        assert!(error.contains("it is larger"), "{error}");
    }
}
