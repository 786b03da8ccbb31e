//! What nodes said of backends, kept on disk: an agent that starts goes on as the one before it, before it has heard anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use towpath_model::NodeName;
use towpath_plan::backend::Says;
use tracing::warn;

/// The file, and what is in it.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    said: BTreeMap<NodeName, Says>,
}

impl Kept {
    /// What an earlier run kept; nothing where there is no such file, or it cannot be understood.
    pub fn open(state_dir: &Path) -> Self {
        let path = state_dir.join("backends.json");
        let said = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, said }
    }

    /// By node.
    pub fn said(&self) -> &BTreeMap<NodeName, Says> {
        &self.said
    }

    /// Keeps what is said now.
    pub fn keep(&mut self, now: &BTreeMap<NodeName, Says>) {
        if self.said == *now {
            return;
        }
        self.said.clone_from(now);
        let written = serde_json::to_vec(now).map_err(std::io::Error::other);
        if let Err(error) = written.and_then(|text| crate::disk::write_atomically(&self.path, &text)) {
            warn!(%error, "{} cannot be written: the next agent begins with envelopes to all nodes", self.path.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use towpath_model::custom::BackendName;

    use super::*;

    #[test]
    fn what_was_said_is_there_after_a_restart_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = Kept::open(dir.path());
        assert!(kept.said().is_empty());
        let says = Says { sends: Some(BackendName::HostGw), receives: [BackendName::HostGw].into(), ..Says::default() };
        let said = BTreeMap::from([(NodeName::new("n1"), says)]);
        kept.keep(&said);
        assert_eq!(Kept::open(dir.path()).said(), &said);
        std::fs::write(dir.path().join("backends.json"), b"{").unwrap();
        assert!(Kept::open(dir.path()).said().is_empty());
    }
}
