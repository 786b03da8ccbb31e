//! Sysctls of the calling thread's network namespace.
//!
//! A container's own `/proc/sys` is mounted read-only; the DaemonSet mounts the node's `/proc/sys/net` a second time at
//! [`MOUNTED`]. Through both the kernel shows the namespace of the thread that looks.

use std::fs;
use std::io;
use std::path::Path;

use super::error::Error;

/// Where a container finds the sysctls that it may write.
const MOUNTED: &str = "/host/proc/sys/net";

/// Sets `name` (path below /proc/sys/net, `ipv4/ip_forward`) to `value`; whether it had another value before.
pub fn set(name: &str, value: &str) -> Result<bool, Error> {
    if get(name)? == value {
        return Ok(false);
    }
    let path = Path::new("/proc/sys/net").join(name);
    match fs::write(&path, value) {
        Err(source) if source.kind() == io::ErrorKind::ReadOnlyFilesystem => {
            let mounted = Path::new(MOUNTED).join(name);
            fs::write(mounted, value).map_err(|_| Error::Sysctl { path, source })?;
        }
        written => written.map_err(|source| Error::Sysctl { path, source })?,
    }
    Ok(true)
}

/// As [`set`], but false where the kernel has no such sysctl (IPv6 not built in).
pub fn set_if_known(name: &str, value: &str) -> Result<bool, Error> {
    match set(name, value) {
        Err(Error::Sysctl { source, .. }) if source.kind() == io::ErrorKind::NotFound => Ok(false),
        other => other,
    }
}

/// The value of `name`, without its newline.
pub fn get(name: &str) -> Result<String, Error> {
    let path = Path::new("/proc/sys/net").join(name);
    let text = fs::read_to_string(&path).map_err(|source| Error::Sysctl { path, source })?;
    Ok(text.trim().to_owned())
}
