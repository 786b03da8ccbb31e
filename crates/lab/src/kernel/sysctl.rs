//! Writes to `/proc/sys/net`, which always mean the calling thread's network namespace.

use anyhow::{Context, Result};

/// Sets `net.<path with slashes>` in the calling thread's network namespace.
pub(crate) fn set_net(path: &str, value: &str) -> Result<()> {
    let file = format!("/proc/sys/net/{path}");
    std::fs::write(&file, value).with_context(|| format!("write {value:?} to {file}"))
}

/// As [`set_net`], but a kernel without this switch is fine (IPv6 compiled out or disabled).
pub(crate) fn try_set_net(path: &str, value: &str) {
    if let Err(error) = set_net(path, value) {
        tracing::debug!(%error, "sysctl not set");
    }
}
