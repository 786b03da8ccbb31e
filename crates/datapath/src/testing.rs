//! What tests that touch the kernel share.

use nix::sched::{CloneFlags, unshare};

/// Whether tests that need root can run; says so when they cannot, and fails where that is not acceptable.
pub(crate) fn root() -> bool {
    let root = nix::unistd::geteuid().is_root();
    assert!(root || std::env::var_os("CI").is_none_or(|v| v != "true"), "these tests need root, and CI=true");
    if !root {
        println!("skipped: needs root; run `sudo -E cargo nextest run -p towpath-datapath`");
    }
    root
}

/// In a network namespace of its own, by a thread of its own; none: not as root.
pub(crate) fn alone<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    if !root() {
        return None;
    }
    let thread = std::thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        work()
    });
    Some(thread.join().unwrap())
}
