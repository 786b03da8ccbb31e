//! What this node announced last, kept on disk for a start at which the API server is away.
//!
//! Then no Lease can be read, and nobody can take one: if this node was the last holder, nobody else is one since, or somebody took over
//! before the API server went, and answers. So such an address is announced again only after the network was asked, several times, and
//! nobody answered; and it is given up as soon as another is heard ([`super::lease`]). An address that was given back in good order is not
//! among them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use towpath_model::AddressPool;
use tracing::warn;

/// What could not be written is tried again after this time.
const REST: Duration = Duration::from_secs(10);

/// What is kept.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    /// Addresses that this node announced.
    pub(super) addresses: BTreeSet<IpAddr>,
    /// The pools, without which nothing is announced.
    pub(super) pools: BTreeMap<String, AddressPool>,
}

/// The file.
#[derive(Debug)]
pub(super) struct Held {
    file: PathBuf,
    kept: Kept,
    /// When it could not be written last; that was said.
    failed: Option<Instant>,
}

impl Held {
    /// What an earlier run left in the state directory. What is damaged, or of another version, counts as nothing.
    pub(super) fn open(state_dir: &Path) -> Self {
        let file = state_dir.join("announced.json");
        let kept = std::fs::read(&file).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { file, kept, failed: None }
    }

    /// What is kept.
    pub(super) fn kept(&self) -> &Kept {
        &self.kept
    }

    /// Whether the disk refused a moment ago: it is left alone for a while.
    pub(super) fn rests(&self) -> bool {
        self.failed.is_some_and(|at| at.elapsed() < REST)
    }

    /// Keeps this, if it is something else.
    pub(super) async fn keep(&mut self, now: Kept) {
        if now == self.kept {
            return;
        }
        let (file, text) = (self.file.clone(), serde_json::to_vec_pretty(&now));
        let write = move || crate::disk::write_atomically(&file, &text.map_err(std::io::Error::other)?);
        match tokio::task::spawn_blocking(write).await {
            Ok(Ok(())) => (self.kept, self.failed) = (now, None),
            Ok(Err(error)) => {
                if self.failed.replace(Instant::now()).is_none() {
                    let consequence = "an agent that starts without the API server will not announce what it should";
                    warn!(file = %self.file.display(), %error, "not written: {consequence}; trying again");
                }
            }
            // Cut off by the end of the process.
            Err(_) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_was_announced_is_there_at_the_next_start_and_damage_is_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let mut held = Held::open(dir.path());
        assert_eq!(*held.kept(), Kept::default());
        let pool = AddressPool {
            name: "lan".to_owned(),
            uid: "u".to_owned(),
            ranges: vec!["192.0.2.1-192.0.2.9".parse().unwrap()],
            auto_assign: true,
            services: Default::default(),
            namespaces: Default::default(),
            shared_across_namespaces: false,
            nodes: Default::default(),
        };
        let now = Kept {
            addresses: ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()].into(),
            pools: [("lan".to_owned(), pool)].into(),
        };
        held.keep(now.clone()).await;
        assert_eq!(*Held::open(dir.path()).kept(), now);
        std::fs::write(dir.path().join("announced.json"), "{\"addresses\": [").unwrap();
        assert_eq!(*Held::open(dir.path()).kept(), Kept::default());
    }
}
