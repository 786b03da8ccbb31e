//! DELs that could not be done when they were asked for, as files in `deletes/` of the state directory.
//!
//! `towpath-cni` makes such a file when the agent is not there, the agent when a device could not be removed. The name,
//! `<container id>@<interface>.del`, says it all, so a file of which only the name came to the disk still counts.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::PathBuf;

use towpath_wire::cni::{Attachment, DelRequest};

/// The queue.
#[derive(Clone, Debug)]
pub(super) struct DeleteQueue {
    dir: PathBuf,
}

impl DeleteQueue {
    /// The queue in a directory, which need not exist.
    pub(super) fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    fn path_of(&self, owner: &Attachment) -> PathBuf {
        self.dir.join(owner.delete_file())
    }

    /// What is queued. Files that no DEL can have made are removed with a warning.
    pub(super) fn list(&self) -> io::Result<Vec<Attachment>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut queued = Vec::new();
        for entry in entries {
            let entry = entry?;
            let name = entry.file_name();
            match name.to_str().and_then(Attachment::from_delete_file) {
                Some(owner) => queued.push(owner),
                None => {
                    tracing::warn!(file = %entry.path().display(), "not a queued DEL; removed");
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
        queued.sort();
        Ok(queued)
    }

    /// Whether a DEL of this attachment is queued.
    pub(super) fn contains(&self, owner: &Attachment) -> bool {
        self.path_of(owner).exists()
    }

    /// Queues a DEL.
    pub(super) fn put(&self, request: &DelRequest) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path_of(&request.attachment);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)?;
        file.write_all(&serde_json::to_vec(request)?)
    }

    /// Takes a DEL out; one that is not there is no error.
    pub(super) fn take_out(&self, owner: &Attachment) -> io::Result<()> {
        match fs::remove_file(self.path_of(owner)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}
