//! What a process in a container is allowed and who it is: user, groups, capabilities, environment.

use std::os::unix::process::CommandExt;
use std::process::Command;

use anyhow::{Context, Result};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};
use serde::{Deserialize, Serialize};

/// One process of a container.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct ProcessSpec {
    /// Program and arguments.
    pub(crate) argv: Vec<String>,
    /// The whole environment.
    pub(crate) env: Vec<(String, String)>,
    /// Working directory inside the container.
    pub(crate) cwd: String,
    /// User id.
    pub(crate) uid: u32,
    /// Group id.
    pub(crate) gid: u32,
    /// Supplementary groups.
    pub(crate) groups: Vec<u32>,
    /// Capabilities it can ever have, a bit each as in `/proc/PID/status`.
    pub(crate) capabilities: u64,
    /// Whether set-user-id programs and file capabilities gain nothing.
    pub(crate) no_new_privileges: bool,
    /// Whether standard input is a terminal that this process controls.
    pub(crate) tty: bool,
}

const NAMES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// The bit of a capability called `NET_ADMIN` or `CAP_NET_ADMIN`; `ALL` is all of them.
pub(crate) fn capability_bit(name: &str) -> Option<u64> {
    let upper = name.to_ascii_uppercase();
    let short = upper.strip_prefix("CAP_").unwrap_or(&upper);
    if short == "ALL" {
        return Some((1 << NAMES.len()) - 1);
    }
    NAMES.iter().position(|known| *known == short).map(|index| 1 << index)
}

/// What Docker and containerd give a container that asks for nothing: CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID,
/// SETUID, SETPCAP, NET_BIND_SERVICE, NET_RAW, SYS_CHROOT, MKNOD, AUDIT_WRITE, SETFCAP.
pub(crate) const DEFAULT_CAPABILITIES: u64 = 0xa804_25fb;

/// Takes from the calling thread, for good, the possibility to gain other capabilities than these.
pub(crate) fn bound_capabilities(allowed: u64, no_new_privileges: bool) -> Result<()> {
    let bits = (0..NAMES.len()).map(|index| CapabilitySet::from_bits_retain(1 << index));
    for bit in bits.filter(|bit| allowed & bit.bits() == 0) {
        // Bits that this kernel does not know are EINVAL.
        match rustix::thread::remove_capability_from_bounding_set(bit) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error).with_context(|| format!("give up capability {bit:?}")),
        }
    }
    if no_new_privileges {
        rustix::thread::set_no_new_privs(true).context("set no_new_privs")?;
    }
    Ok(())
}

/// Makes the calling thread what `process` says: user, groups and exactly the allowed capabilities (none unless root).
pub(crate) fn become_user(process: &ProcessSpec) -> Result<()> {
    bound_capabilities(process.capabilities, process.no_new_privileges)?;
    let groups: Vec<Gid> = process.groups.iter().map(|gid| Gid::from_raw(*gid)).collect();
    setgroups(&groups).context("set the supplementary groups")?;
    let (uid, gid) = (Uid::from_raw(process.uid), Gid::from_raw(process.gid));
    setresgid(gid, gid, gid).with_context(|| format!("become group {gid}"))?;
    setresuid(uid, uid, uid).with_context(|| format!("become user {uid}"))?;
    if process.uid == 0 {
        let have = capabilities(None).context("read capabilities")?;
        let keep = have.permitted & CapabilitySet::from_bits_retain(process.capabilities);
        set_capabilities(
            None,
            CapabilitySets { effective: keep, permitted: keep, inheritable: CapabilitySet::empty() },
        )
        .context("drop capabilities")?;
    }
    Ok(())
}

/// The command with its environment and working directory; user and capabilities are the caller's business.
pub(crate) fn command(process: &ProcessSpec) -> Result<Command> {
    let (program, args) = process.argv.split_first().context("the container has no command")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(process.env.iter().cloned()).current_dir(&process.cwd);
    Ok(command)
}

/// Replaces the calling process by `command`; the error is that of exec.
pub(crate) fn replace(mut command: Command) -> anyhow::Error {
    let error = command.exec();
    let program = command.get_program().to_string_lossy().into_owned();
    let kind = error.kind();
    let error = anyhow::Error::new(error);
    match kind {
        std::io::ErrorKind::NotFound => error.context(format!("exec: {program:?}: executable file not found in $PATH")),
        _ => error.context(format!("exec: {program:?}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn default_capabilities_are_dockers() {
        let docker = [
            "CHOWN",
            "DAC_OVERRIDE",
            "FOWNER",
            "FSETID",
            "KILL",
            "SETGID",
            "SETUID",
            "SETPCAP",
            "NET_BIND_SERVICE",
            "NET_RAW",
            "SYS_CHROOT",
            "MKNOD",
            "AUDIT_WRITE",
            "SETFCAP",
        ];
        let bits = docker.iter().filter_map(|name| capability_bit(name)).fold(0, |all, bit| all | bit);
        assert_eq!(bits, DEFAULT_CAPABILITIES);
        assert_eq!(capability_bit("cap_net_admin"), Some(1 << 12));
        assert_eq!(capability_bit("NO_SUCH"), None);
    }
}
