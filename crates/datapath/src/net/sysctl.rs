//! Sysctls of the calling thread's network namespace.

use std::fs;
use std::io;
use std::path::Path;

use super::error::Error;

/// Sets `name` (path below /proc/sys/net, `ipv4/ip_forward`) to `value`; whether it had another value before.
pub fn set(name: &str, value: &str) -> Result<bool, Error> {
    if get(name)? == value {
        return Ok(false);
    }
    let path = Path::new("/proc/sys/net").join(name);
    fs::write(&path, value).map_err(|source| Error::Sysctl { path, source })?;
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
