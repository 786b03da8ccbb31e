//! The backend `udp`, as far as it is the agent's: has `towpath carry` carry packets between the device and other nodes, and says whether it does.
//!
//! Carry goes on by itself. The agent is there to open what it needs, once, and to notice when it is gone: then this node sends envelopes, and
//! says that it takes no other.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;
use std::num::NonZero;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use towpath_carry::udp::client::{Answer, Connection};
use towpath_datapath::Datapath;
use towpath_wire::udp::{MAX_QUEUES, UdpCounters, UdpWork};
use tracing::{info, warn};

/// A queue takes two threads.
const QUEUES: usize = 4;
/// Carry is asked again so often.
const ASK: Duration = Duration::from_secs(2);
/// Between attempts.
const RETRY: Duration = Duration::from_millis(20);
/// As many at once, before it counts as gone: one that hands over to its successor is back before.
const ATTEMPTS: u32 = 10;
/// Later, more rarely.
const RETRY_LATER: Duration = Duration::from_millis(500);
/// How long the device may take to get its carrier.
const CARRIER: Duration = Duration::from_secs(5);

/// Nodes at IPv6 addresses, to which carry sends only when it knows them.
pub type Nodes = Arc<BTreeSet<Ipv6Addr>>;

/// Whether packets are carried.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Carried {
    /// Nobody has asked yet, or it is not wanted.
    #[default]
    Unknown,
    /// They are.
    Yes {
        /// What was counted when carry was asked last.
        counters: UdpCounters,
        /// The nodes at IPv6 addresses that it knows.
        nodes: Nodes,
    },
    /// They are not; why, for people.
    No(String),
}

impl Carried {
    /// Whether they are for sure.
    pub fn is_yes(&self) -> bool {
        matches!(self, Self::Yes { .. })
    }

    /// The nodes at IPv6 addresses to which they are carried; none: packets are not carried at all.
    pub fn nodes(&self) -> Option<Nodes> {
        if let Self::Yes { nodes, .. } = self { Some(Arc::clone(nodes)) } else { None }
    }

    /// Whether they are as far as is known: an earlier agent's carry goes on.
    pub fn may_be(&self) -> bool {
        !matches!(self, Self::No(_))
    }
}

/// As many queues as there are processors, within bounds.
pub(crate) fn queues() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get).clamp(1, QUEUES.min(MAX_QUEUES))
}

/// Has carried what is wanted, for ever; tells of every change.
pub(crate) async fn keep(
    socket: PathBuf,
    datapath: Datapath,
    mut wanted: watch::Receiver<Option<UdpWork>>,
    mut nodes: watch::Receiver<Nodes>,
    told: watch::Sender<Carried>,
) {
    loop {
        let Some(work) = wanted.borrow_and_update().clone() else {
            told.send_if_modified(|old| std::mem::take(old) != Carried::Unknown);
            if wanted.changed().await.is_err() {
                return;
            }
            continue;
        };
        tokio::select! {
            () = keep_one(&socket, &datapath, &work, &mut nodes, &told) => {}
            changed = wanted.changed() => if changed.is_err() { return },
        }
    }
}

async fn keep_one(
    socket: &Path,
    datapath: &Datapath,
    work: &UdpWork,
    nodes: &mut watch::Receiver<Nodes>,
    told: &watch::Sender<Carried>,
) {
    let mut failed = 0;
    loop {
        let why = match follow(socket, datapath, work, nodes, told, &mut failed).await {
            Ok(()) => "it ended".to_owned(),
            Err(why) => why,
        };
        failed += 1;
        if failed < ATTEMPTS {
            sleep(RETRY).await;
            continue;
        }
        let no = Carried::No(format!("`towpath carry` does not carry packets of the backend udp: {why}"));
        if *told.borrow() != no {
            warn!(why, "packets are not carried by way of user space (udp); they go in envelopes until they are");
            told.send_replace(no);
        }
        sleep(RETRY_LATER).await;
    }
}

/// One connection, until it breaks.
async fn follow(
    socket: &Path,
    datapath: &Datapath,
    work: &UdpWork,
    nodes: &mut watch::Receiver<Nodes>,
    told: &watch::Sender<Carried>,
    failed: &mut u32,
) -> Result<(), String> {
    let words = |error: &dyn std::fmt::Display| error.to_string();
    let mut connection = Connection::open(socket).await.map_err(|e| words(&e))?;
    let mut known = None::<Nodes>;
    loop {
        // First, so that who carries from now on knows to whom.
        let now = Arc::clone(&nodes.borrow_and_update());
        if work.address.is_ipv6() && known.as_ref() != Some(&now) {
            connection.know(now.iter().copied()).await.map_err(|e| words(&e))?;
            known = Some(now);
        }
        let counters = match connection.carry(work).await.map_err(|e| words(&e))? {
            Answer::Carrying(counters) => counters,
            Answer::Give => {
                let ends = datapath.open_udp(work.address, work.queues).await.map_err(|e| words(&e))?;
                let all = [ends.queues.queues, ends.receivers, ends.senders];
                connection.give(all, ends.queues.cuts_udp).await.map_err(|e| words(&e))?
            }
        };
        has_carrier(datapath).await?;
        *failed = 0;
        let nodes_known = known.clone().unwrap_or_default();
        let was = told.send_replace(Carried::Yes { counters, nodes: nodes_known }).is_yes();
        if !was {
            info!(port = work.port, queues = work.queues, "packets are carried by way of user space (udp)");
        }
        tokio::select! {
            () = sleep(ASK) => {}
            // The end of the connection is the end of carry.
            () = connection.is_over() => return Ok(()),
            changed = nodes.changed() => changed.map_err(|e| words(&e))?,
        }
    }
}

async fn has_carrier(datapath: &Datapath) -> Result<(), String> {
    let works = async {
        while !datapath.udp_works().await.map_err(|error| error.to_string())? {
            sleep(RETRY).await;
        }
        Ok(())
    };
    timeout(CARRIER, works).await.unwrap_or_else(|_| Err("its device did not get a carrier".to_owned()))
}
