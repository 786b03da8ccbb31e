//! Finding network namespaces by their cookie: container runtimes keep pods' in files, and processes have them.
//!
//! A namespace is entered only to ask for its cookie and, if it is wanted, to do the work; nothing in the others is looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns};

use super::error::Error;
use super::netns;

/// Where container runtimes, and `ip netns`, keep namespaces: containerd and CRI-O, and cri-dockerd.
pub const PLACES: [&str; 2] = ["/run/netns", "/run/docker/netns"];

/// Where namespaces were found: the next search begins there.
#[derive(Debug, Default)]
pub struct Namespaces {
    places: Vec<PathBuf>,
    known: BTreeMap<u64, PathBuf>,
}

impl Namespaces {
    /// Looks in these directories, then at the namespaces of the processes that this one sees.
    pub fn new(places: impl IntoIterator<Item = PathBuf>) -> Self {
        Self { places: places.into_iter().collect(), known: BTreeMap::new() }
    }

    /// Runs `work` in each of the namespaces that have these cookies; the cookies of those that were not found.
    ///
    /// # Errors
    /// No thread could be started.
    pub fn within(&mut self, cookies: &BTreeSet<u64>, work: impl FnMut(u64) + Send) -> Result<BTreeSet<u64>, Error> {
        if cookies.is_empty() {
            return Ok(BTreeSet::new());
        }
        let mut search = Search { missing: cookies.clone(), seen: BTreeSet::new(), found: BTreeMap::new(), work };
        let known: Vec<PathBuf> = cookies.iter().filter_map(|cookie| self.known.get(cookie)).cloned().collect();
        let places = &self.places;
        let search = std::thread::scope(|scope| {
            // A thread that entered a namespace never comes back.
            let thread = std::thread::Builder::new().name("towpath-netns".to_owned()).spawn_scoped(scope, move || {
                known.iter().for_each(|path| search.look(path));
                places.iter().for_each(|place| search.look_below(place, ""));
                search.look_below(Path::new("/proc"), "ns/net");
                search
            });
            let thread = thread.map_err(|e| Error::system("start a thread for pods' network namespaces", e))?;
            thread
                .join()
                .map_err(|_| Error::Refused("the thread in pods' network namespaces panicked; see the log".to_owned()))
        })?;
        for cookie in &search.missing {
            self.known.remove(cookie);
        }
        self.known.extend(search.found);
        Ok(search.missing)
    }
}

struct Search<W> {
    missing: BTreeSet<u64>,
    /// Inodes of namespaces that were looked at: many processes share one.
    seen: BTreeSet<u64>,
    found: BTreeMap<u64, PathBuf>,
    work: W,
}

impl<W: FnMut(u64)> Search<W> {
    /// The files of a directory, or one file below each of its entries.
    fn look_below(&mut self, directory: &Path, file: &str) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            if self.missing.is_empty() {
                return;
            }
            let path = entry.path();
            self.look(&if file.is_empty() { path } else { path.join(file) });
        }
    }

    /// What is no namespace, or is gone, is passed over.
    fn look(&mut self, path: &Path) {
        let Ok(metadata) = fs::metadata(path) else { return };
        if !self.seen.insert(metadata.ino()) {
            return;
        }
        // Never waits, whatever the file is.
        let opened: Result<File, _> =
            OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC).open(path);
        let Ok(namespace) = opened else { return };
        if setns(namespace, CloneFlags::CLONE_NEWNET).is_err() {
            return;
        }
        let Ok(cookie) = netns::cookie() else { return };
        if self.missing.remove(&cookie) {
            self.found.insert(cookie, path.to_owned());
            (self.work)(cookie);
        }
    }
}
