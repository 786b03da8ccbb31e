//! Starting a process inside namespaces: a thread of its own enters them, the process is born there.

use std::path::PathBuf;

use anyhow::{Context, Result};
use nix::sched::{CloneFlags, unshare};
use serde::Serialize;
use tokio::process::{Child, Command};

use crate::kernel::ns;

/// Which process namespace the new process gets.
#[derive(Clone, Debug)]
pub(crate) enum ProcessNamespace {
    /// The supervisor's.
    Own,
    /// A new one, with the process as number 1.
    New,
    /// That of the machine's process with this number.
    Of(u32),
}

/// Namespaces of a process to start; `None` keeps the supervisor's.
#[derive(Clone, Debug)]
pub(crate) struct Namespaces {
    /// Network.
    pub(crate) net: Option<PathBuf>,
    /// Host name.
    pub(crate) uts: Option<PathBuf>,
    /// IPC.
    pub(crate) ipc: Option<PathBuf>,
    /// Processes.
    pub(crate) pid: ProcessNamespace,
}

/// Starts `command` inside the namespaces.
pub(crate) async fn spawn(mut command: Command, namespaces: Namespaces) -> Result<Child> {
    ns::in_thread("spawn", move || {
        for (path, kind) in [
            (&namespaces.uts, CloneFlags::CLONE_NEWUTS),
            (&namespaces.ipc, CloneFlags::CLONE_NEWIPC),
            (&namespaces.net, CloneFlags::CLONE_NEWNET),
        ] {
            if let Some(path) = path {
                ns::enter(path, kind)?;
            }
        }
        match namespaces.pid {
            ProcessNamespace::Own => {}
            ProcessNamespace::New => unshare(CloneFlags::CLONE_NEWPID).context("make a process namespace")?,
            ProcessNamespace::Of(pid) => {
                let path = PathBuf::from(format!("/proc/{pid}/ns/pid"));
                ns::enter(&path, CloneFlags::CLONE_NEWPID)?;
            }
        }
        let program = command.as_std().get_program().to_owned();
        command.spawn().with_context(|| format!("start {}", program.to_string_lossy()))
    })
    .await
}

/// How the hidden commands of this program are called.
#[derive(Clone, Debug)]
pub(crate) struct StageProgram {
    /// The program.
    pub(crate) program: PathBuf,
    /// Arguments before `lab`.
    pub(crate) args: Vec<String>,
}

impl StageProgram {
    /// `program … lab stage KIND FILE`, with `spec` written to `file` for the stage to read.
    pub(crate) fn stage(&self, kind: &str, spec: &impl Serialize, file: &std::path::Path) -> Result<Command> {
        write_private(file, &serde_json::to_vec(spec)?)?;
        let mut command = Command::new(&self.program);
        command.args(&self.args).args(["lab", "stage", kind]).arg(file);
        Ok(command)
    }
}

/// Writes a file that only root can read.
pub(crate) fn write_private(path: &std::path::Path, content: &[u8]) -> Result<()> {
    use std::io::Write;
    use std::os::unix::fs::OpenOptionsExt;
    let open = std::fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.and_then(|mut file| file.write_all(content)).with_context(|| format!("write {}", path.display()))
}
