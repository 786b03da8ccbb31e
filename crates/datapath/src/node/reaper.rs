//! Deletes pods' devices behind the caller's back: the kernel takes tens of milliseconds for one, waiting for every packet
//! in flight, and nobody needs to wait with it once programs and routes no longer know the pod.
//!
//! What a crash leaves undone is a device without a record, which the next `open` or `audit` finds.

use std::sync::mpsc;

use crate::error::Error;
use crate::net::{self, link, netlink::Netlink};

/// A handle on the thread; dropping it ends the thread when its queue is done.
#[derive(Debug)]
pub(super) struct Reaper {
    queue: mpsc::Sender<(u32, String)>,
}

impl Reaper {
    /// Starts the thread, in the network namespace of the caller's thread.
    pub(super) fn start() -> Result<Self, Error> {
        let mut netlink = Netlink::open()?;
        let (queue, inbox) = mpsc::channel::<(u32, String)>();
        let run = move || {
            for (index, name) in inbox {
                if let Err(error) = link::delete(&mut netlink, index, &name) {
                    tracing::warn!(device = name, %error, "deleting a pod's device failed; the next check tries again");
                }
            }
        };
        std::thread::Builder::new()
            .name("towpath-reaper".to_owned())
            .spawn(run)
            .map_err(|e| net::Error::system("start the thread that deletes devices", e))?;
        Ok(Self { queue })
    }

    /// Has the device deleted soon.
    pub(super) fn bury(&self, index: u32, name: &str) {
        if self.queue.send((index, name.to_owned())).is_err() {
            tracing::warn!(device = name, "the thread that deletes devices has ended; the next check tries again");
        }
    }
}
