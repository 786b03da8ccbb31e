//! The pod's side of devices that are being attached, done by a few threads beside the data path's own: it takes as long as all the rest, most of it
//! waiting for the kernel, and needs nothing of the node's state.
//!
//! When it begins, programs and entries are in place and the host side is up; so whatever its order among pods, no packet of a pod passes unjudged.

use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use ipnet::IpNet;
use tokio::sync::oneshot;
use towpath_model::desired::LocalPod;

use crate::error::Error;
use crate::net::bucket::Bucket;
use crate::net::netlink::Netlink;
use crate::net::pod::Mtu;
use crate::net::{self, link, pod};

/// Pods' sides that are set up at once. The kernel has one lock for all changes of devices: more would wait for that.
const THREADS: usize = 3;
/// The kernel's link watcher runs at least once a second.
const CARRIER_PATIENCE: Duration = Duration::from_secs(2);

/// A pod whose device is there and up on the host's side.
#[derive(Debug)]
pub(crate) struct Begun {
    /// The pod, with the device's indexes.
    pub(super) pod: LocalPod,
    /// Its network namespace.
    pub(super) netns: OwnedFd,
    /// Name of its device there.
    pub(super) ifname: String,
    /// Its addresses with their gateways.
    pub(super) pairs: Vec<(IpAddr, IpAddr)>,
    /// As [`Mtu`] has them.
    pub(super) mtu: u32,
    pub(super) elsewhere: u32,
    pub(super) cluster: Vec<IpNet>,
    /// Where what it sends waits for its turn.
    pub(super) sends: Option<Bucket>,
}

/// A pod whose side somebody is at.
#[derive(Debug)]
pub(crate) struct Finishing {
    /// The pod.
    pub(super) pod: LocalPod,
    /// What comes of it.
    pub(super) outcome: oneshot::Receiver<Result<(), Error>>,
}

type Job = (Begun, oneshot::Sender<Result<(), Error>>);

/// A handle on the threads; dropping it ends them when what was handed over is done.
#[derive(Debug)]
pub(super) struct Finishers {
    jobs: mpsc::Sender<Job>,
}

impl Finishers {
    /// Starts the threads, in the network namespace of the caller's thread.
    pub(super) fn start() -> Result<Self, Error> {
        let (jobs, inbox) = mpsc::channel::<Job>();
        let inbox = Arc::new(Mutex::new(inbox));
        for _ in 0..THREADS {
            let (mut netlink, inbox) = (Netlink::open()?, inbox.clone());
            let next = move || inbox.lock().unwrap_or_else(PoisonError::into_inner).recv();
            let run = move || {
                while let Ok((begun, answer)) = next() {
                    // Nobody waits: whoever gave up removes the device.
                    let _ = answer.send(begun.finish(&mut netlink));
                }
            };
            let thread = std::thread::Builder::new().name("towpath-pods".to_owned()).spawn(run);
            thread.map_err(|e| net::Error::system("start a thread that sets up pods", e))?;
        }
        Ok(Self { jobs })
    }

    /// Has a pod's side set up.
    pub(super) fn finish(&self, begun: Begun) -> oneshot::Receiver<Result<(), Error>> {
        let (answer, outcome) = oneshot::channel();
        // Threads that have ended drop the sender, which says so.
        let _ = self.jobs.send((begun, answer));
        outcome
    }
}

impl Begun {
    /// Addresses and routes inside, and the device up there; returns when it sends.
    pub(super) fn finish(&self, netlink: &mut Netlink) -> Result<(), Error> {
        let pod = &self.pod;
        let mtu = Mtu { device: self.mtu, elsewhere: self.elsewhere, cluster: &self.cluster };
        pod::set_up_inside(self.netns.as_fd(), &self.ifname, &self.pairs, pod.host_mac, mtu, self.sends)?;
        if !link::operational(netlink, &pod.host_device, CARRIER_PATIENCE)? {
            tracing::warn!(pod = %pod.name, device = pod.host_device, "the pod's device has no carrier yet");
        }
        Ok(())
    }
}
