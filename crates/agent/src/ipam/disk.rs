//! The file operations of the lease store, one method a system call, so that tests can cut the power between any two.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// A lease file is a few hundred bytes; nothing larger is read.
const LARGEST: u64 = 64 << 10;

/// What the lease store does to the disk.
pub trait Disk: Send + Sync + 'static {
    /// Makes a file with these contents, in place of one that is there. Not durable until [`Disk::sync_file`].
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()>;
    /// fsync of a file.
    fn sync_file(&self, path: &Path) -> io::Result<()>;
    /// rename(2). Not durable until [`Disk::sync_dir`].
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// fsync of a directory.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// unlink(2); a file that is not there is no error.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// The contents of a file.
    fn read(&self, path: &Path) -> io::Result<Vec<u8>>;
    /// Names of the files in a directory, sorted; a name that is not UTF-8 is none of ours.
    fn list(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Time since the file was last renamed or changed (ctime); zero if that is in the future.
    fn age(&self, path: &Path) -> io::Result<Duration>;
}

/// The disk itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct RealDisk;

impl Disk for RealDisk {
    fn write(&self, path: &Path, contents: &[u8]) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(contents)
    }

    fn sync_file(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        File::open(path)?.sync_all()
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    fn read(&self, path: &Path) -> io::Result<Vec<u8>> {
        let mut contents = Vec::new();
        File::open(path)?.take(LARGEST).read_to_end(&mut contents)?;
        Ok(contents)
    }

    fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_file()
                && let Ok(name) = entry.file_name().into_string()
            {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn age(&self, path: &Path) -> io::Result<Duration> {
        let changed = fs::metadata(path)?.ctime();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        Ok(Duration::from_secs(now.saturating_sub(u64::try_from(changed).unwrap_or(0))))
    }
}
