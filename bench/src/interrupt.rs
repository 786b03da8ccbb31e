//! Ctrl-C: the signal becomes a flag that the work asks between its steps, so that everything made is taken away on the way out.

use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{SigSet, Signal};

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From here on SIGINT, SIGTERM and SIGHUP only set the flag. Call it before any other thread is started; processes that are
/// started later get an empty signal mask from the standard library.
///
/// # Errors
/// The kernel refuses the signal mask, or no thread can be made.
pub(crate) fn watch() -> Result<()> {
    let mut signals = SigSet::empty();
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        signals.add(signal);
    }
    signals.thread_block().context("block SIGINT")?;
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            while signals.wait().is_ok() {
                INTERRUPTED.store(true, Ordering::SeqCst);
            }
        })
        .context("start the thread that waits for signals")?;
    Ok(())
}

/// Fails once a signal has come.
///
/// # Errors
/// That it has.
pub(crate) fn check() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted; everything made for the run is being removed");
    }
    Ok(())
}
