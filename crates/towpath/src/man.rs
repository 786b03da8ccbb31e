//! `towpath man DIR`: a man page (section 1) for every command that is not hidden, made of the same definitions as `--help`.

use std::path::Path;

use anyhow::{Context, Result};

/// Writes the pages of a command and of all below it.
///
/// # Errors
/// The directory cannot be made or written.
pub(crate) fn write(command: clap::Command, directory: &Path) -> Result<()> {
    std::fs::create_dir_all(directory).with_context(|| format!("could not make {}", directory.display()))?;
    let command = command.disable_help_subcommand(true);
    clap_mangen::generate_to(command, directory)
        .with_context(|| format!("could not write man pages to {}", directory.display()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use clap::CommandFactory;

    use super::*;

    /// Names of pages that a command should have.
    fn wanted(command: &clap::Command, prefix: &str, names: &mut BTreeSet<String>) {
        let name =
            if prefix.is_empty() { command.get_name().to_owned() } else { format!("{prefix}-{}", command.get_name()) };
        for below in command.get_subcommands().filter(|below| !below.is_hide_set() && below.get_name() != "help") {
            wanted(below, &name, names);
        }
        names.insert(format!("{name}.1"));
    }

    #[test]
    fn every_command_has_a_page_that_is_roff_and_no_hidden_one_has() {
        let dir = tempfile::tempdir().unwrap();
        write(crate::Cli::command(), &dir.path().join("man")).unwrap();
        let mut names = BTreeSet::new();
        wanted(&crate::Cli::command(), "", &mut names);
        let entries = std::fs::read_dir(dir.path().join("man")).unwrap();
        let have: BTreeSet<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        assert_eq!(have, names);
        assert!(names.contains("towpath-connectivity-test.1") && !names.contains("towpath-probe.1"));
        for name in &names {
            let text = std::fs::read_to_string(dir.path().join("man").join(name)).unwrap();
            for part in [".TH ", ".SH NAME", ".SH SYNOPSIS"] {
                assert!(text.contains(part), "{name} has no {part}");
            }
            assert!(!text.contains("panicked"), "{name}");
        }
        let page = std::fs::read_to_string(dir.path().join("man/towpath-connectivity-test.1")).unwrap();
        assert!(page.contains("junit") && page.contains("host\\-port"), "{page}");
    }
}
