//! Leases of the CNI plugin `host-local`, by which Flannel's bridge and Canal give addresses: a file an address in
//! `networks/<network>/` of the CNI state directory, named by the address, with the container's id and its interface in it
//! (containernetworking plugins, `plugins/ipam/host-local/backend/disk`).
//!
//! A container runtime that asks the present configuration to remove a container asks us, also for containers that were made by the one
//! before; then its lease goes here, under the plugin's own lock.

use std::fs::{self, File};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// A lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostLocalLease {
    /// The address.
    pub address: IpAddr,
    /// The container's id.
    pub container: String,
    /// Its interface; empty: an old version did not say.
    pub ifname: String,
    /// The file.
    pub file: PathBuf,
    /// It is from before the machine booted, so its container is gone.
    pub outlived: bool,
}

/// Where the leases are.
#[derive(Clone, Debug)]
pub struct HostLocal {
    networks: PathBuf,
    booted: Option<SystemTime>,
}

/// A lease is two short lines.
const LARGEST: u64 = 4096;

impl HostLocal {
    /// Leases in the CNI state directory, `/var/lib/cni`.
    pub fn new(state_dir: &Path) -> Self {
        Self { networks: state_dir.join("networks"), booted: booted() }
    }

    /// All leases of all networks. A directory that is not there has none; a file that is no lease is passed over.
    ///
    /// # Errors
    /// A directory or a file cannot be read.
    pub fn leases(&self) -> io::Result<Vec<HostLocalLease>> {
        let mut leases = Vec::new();
        for network in entries(&self.networks)? {
            if !network.is_dir() {
                continue;
            }
            let of_network = || -> io::Result<Vec<HostLocalLease>> {
                let found = entries(&network)?.into_iter().map(|file| self.lease(file));
                Ok(found.collect::<io::Result<Vec<_>>>()?.into_iter().flatten().collect())
            };
            match of_network() {
                Ok(found) => leases.extend(found),
                // Another tool's, which root without its capabilities may not read: no network of ours to come after.
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    tracing::debug!(network = %network.display(), %error, "leases of another network are not readable");
                }
                Err(error) => return Err(error),
            }
        }
        leases.sort_by(|a, b| (a.address, &a.file).cmp(&(b.address, &b.file)));
        Ok(leases)
    }

    fn lease(&self, file: PathBuf) -> io::Result<Option<HostLocalLease>> {
        let Some(address) = file.file_name().and_then(|name| name.to_str()?.parse::<IpAddr>().ok()) else {
            return Ok(None);
        };
        let gone = |error: &io::Error| error.kind() == io::ErrorKind::NotFound;
        let meta = match fs::metadata(&file) {
            Err(error) if gone(&error) => return Ok(None),
            meta => meta?,
        };
        if !meta.is_file() || meta.len() > LARGEST {
            return Ok(None);
        }
        let text = match fs::read(&file) {
            Err(error) if gone(&error) => return Ok(None),
            text => String::from_utf8_lossy(&text?).into_owned(),
        };
        let mut lines = text.lines().map(str::trim);
        let container = lines.next().unwrap_or_default().to_owned();
        let ifname = lines.next().unwrap_or_default().to_owned();
        let outlived = self.booted.zip(meta.modified().ok()).is_some_and(|(booted, modified)| modified < booted);
        Ok(Some(HostLocalLease { address, container, ifname, file, outlived }))
    }

    /// Removes the leases of a container that is gone; their addresses.
    ///
    /// # Errors
    /// A lease cannot be read or removed.
    pub fn release(&self, container: &str) -> io::Result<Vec<IpAddr>> {
        self.remove(|lease| lease.container == container)
    }

    /// Removes leases, each network's under its lock; their addresses.
    ///
    /// # Errors
    /// A lease cannot be read or removed.
    pub fn remove(&self, which: impl Fn(&HostLocalLease) -> bool) -> io::Result<Vec<IpAddr>> {
        let mut removed = Vec::new();
        for lease in self.leases()?.into_iter().filter(|lease| !lease.container.is_empty() && which(lease)) {
            let Some(network) = lease.file.parent() else { continue };
            let lock = File::options().create(true).append(true).open(network.join("lock"))?;
            rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)?;
            // Under the lock it may be another container's by now.
            if self.lease(lease.file.clone())?.is_none_or(|now| now.container != lease.container) {
                continue;
            }
            fs::remove_file(&lease.file)?;
            removed.push(lease.address);
        }
        Ok(removed)
    }
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        entries => entries?.map(|entry| entry.map(|entry| entry.path())).collect(),
    }
}

/// When the machine booted (`btime` of /proc/stat).
fn booted() -> Option<SystemTime> {
    let stat = fs::read_to_string("/proc/stat").ok()?;
    let seconds = stat.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rig() -> (tempfile::TempDir, HostLocal) {
        let dir = tempfile::tempdir().unwrap();
        let network = dir.path().join("networks/cbr0");
        fs::create_dir_all(&network).unwrap();
        for (name, text) in [
            ("10.244.1.2", "c1\r\neth0"),
            ("10.244.1.3", "c2"),
            ("fd00::2", "c1\r\neth0"),
            ("last_reserved_ip.0", "10.244.1.3"),
            ("lock", ""),
        ] {
            fs::write(network.join(name), text).unwrap();
        }
        let host_local = HostLocal::new(dir.path());
        (dir, host_local)
    }

    #[test]
    fn a_file_named_by_an_address_is_a_lease() {
        let (_dir, host_local) = rig();
        let leases = host_local.leases().unwrap();
        let shown: Vec<_> = leases
            .iter()
            .map(|l| (l.address.to_string(), l.container.as_str(), l.ifname.as_str(), l.outlived))
            .collect();
        assert_eq!(
            shown,
            [
                ("10.244.1.2".to_owned(), "c1", "eth0", false),
                ("10.244.1.3".to_owned(), "c2", "", false),
                ("fd00::2".to_owned(), "c1", "eth0", false)
            ]
        );
    }

    #[test]
    fn a_container_that_is_gone_leaves_no_lease_and_others_keep_theirs() {
        let (_dir, host_local) = rig();
        assert_eq!(host_local.release("c1").unwrap().len(), 2);
        assert_eq!(host_local.leases().unwrap().len(), 1);
        assert!(host_local.release("c1").unwrap().is_empty());
    }

    #[test]
    fn a_lease_from_before_the_boot_is_told() {
        let (dir, host_local) = rig();
        let file = File::options().write(true).open(dir.path().join("networks/cbr0/10.244.1.3")).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(1)).unwrap();
        let outlived: Vec<bool> = host_local.leases().unwrap().iter().map(|l| l.outlived).collect();
        assert_eq!(outlived, [false, true, false]);
    }

    #[test]
    fn where_there_is_no_directory_there_are_no_leases() {
        assert!(HostLocal::new(Path::new("/nonexistent")).leases().unwrap().is_empty());
    }
}
