//! What the paths to the other nodes really carry: each is tried every now and then with an echo as large as what pods may send makes packets between
//! nodes, that nobody may cut on its way.
//!
//! One echo is under way at a time, and a round over all nodes takes a minute at least (`pathRoundSeconds`), so what this adds to a network is next to nothing. Where echoes are not let
//! through nothing is known, and nothing is said.

mod echo;

use std::net::IpAddr;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep, sleep_until};
use towpath_datapath::Datapath;
use towpath_model::desired::NodePeer;
use towpath_plan::path::{Found, Search, needed, pod_mtu_for};
use tracing::{debug, info, warn};

use crate::reconcile::SharedReport;

/// After something was changed the first round comes so soon.
const SOON: Duration = Duration::from_secs(2);
/// Between two nodes.
const PACE: Duration = Duration::from_millis(50);
/// What any path carries (RFC 791, RFC 8200 §5); the latter is also the least that the configuration takes.
const LEAST: (u32, u32) = (576, 1280);

/// A path that carries less than it has to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SmallPath {
    /// The node that it leads to.
    pub node: String,
    /// By which of its addresses.
    pub address: IpAddr,
    /// The largest IP packet that gets through, in bytes.
    pub carries: u32,
    /// What has to.
    pub needed: u32,
    /// What pods could have so that all fits.
    pub pod_mtu: u32,
}

impl SmallPath {
    /// For people.
    pub fn in_words(&self) -> String {
        let Self { node, address, carries, needed, pod_mtu } = self;
        let mut words = format!(
            "the path to node {node} ({address}) carries {carries} bytes and not {needed}: what pods send that is larger is lost; repair the path"
        );
        if *pod_mtu >= LEAST.1 {
            words.push_str(&format!(", or set spec.mtu of NetworkConfig default to {pod_mtu} (pods that run follow)"));
        }
        words
    }
}

/// What was found out in the last round; none: there was none yet.
pub type Paths = Option<Vec<SmallPath>>;

/// Tries paths for ever; `round`: from the begin of a round to that of the next.
pub async fn probe(
    datapath: Datapath,
    report: SharedReport,
    own: Vec<IpAddr>,
    round: Duration,
    found: watch::Sender<Paths>,
) {
    let mut before: Option<(u32, Vec<NodePeer>)> = None;
    loop {
        let begun = Instant::now();
        let Ok(facts) = datapath.facts().await else { return };
        let peers: Vec<NodePeer> = {
            let report = report.read().unwrap_or_else(std::sync::PoisonError::into_inner);
            report.peers.iter().filter(|peer| !peer.local).cloned().collect()
        };
        let needed = needed(facts.pod_mtu, facts.uplink_mtu, facts.tunnel_mtu);
        let mut small = Vec::new();
        for peer in &peers {
            for address in peer.addresses.iter().filter(|to| own.iter().any(|own| own.is_ipv4() == to.is_ipv4())) {
                if let Some(carries) = carries(*address, needed).await {
                    let pod_mtu = pod_mtu_for(carries, facts.uplink_mtu, facts.tunnel_mtu);
                    small.push(SmallPath { node: peer.name.to_string(), address: *address, carries, needed, pod_mtu });
                }
            }
            sleep(PACE).await;
        }
        found.send_if_modified(|known| {
            for path in small.iter().filter(|path| !known.iter().flatten().any(|known| known == *path)) {
                warn!(path = path.in_words(), "a path is smaller than assumed");
            }
            if small.is_empty() && known.as_ref().is_some_and(|known| !known.is_empty()) {
                info!("all paths that answer carry what they have to again");
            }
            let another = known.as_ref() != Some(&small);
            *known = Some(small);
            another
        });
        let now = (needed, peers);
        let until = begun + round;
        before.replace(now);
        // What pods may send, or who is there, is another: then it is looked at again soon.
        while Instant::now() < until {
            sleep_until((Instant::now() + SOON).min(until)).await;
            let Ok(facts) = datapath.facts().await else { return };
            let same = before.as_ref().is_some_and(|(before, peers)| {
                let report = report.read().unwrap_or_else(std::sync::PoisonError::into_inner);
                let names = || report.peers.iter().filter(|peer| !peer.local).map(|peer| (&peer.name, &peer.addresses));
                *before == self::needed(facts.pod_mtu, facts.uplink_mtu, facts.tunnel_mtu)
                    && names().eq(peers.iter().map(|peer| (&peer.name, &peer.addresses)))
            });
            if !same {
                break;
            }
        }
    }
}

/// What the path to an address carries, if that is known and less than `needed`.
async fn carries(to: IpAddr, needed: u32) -> Option<u32> {
    let least = if to.is_ipv4() { LEAST.0 } else { LEAST.1 };
    let mut search = Search::new(needed, least);
    loop {
        let size = match search.next() {
            Ok(size) => size,
            Err(Found::Only(carries)) => return Some(carries),
            Err(Found::Whole) => return None,
            Err(Found::Nothing) => {
                debug!(%to, "nobody answers echoes: what the path carries is not known");
                return None;
            }
        };
        // Its own thread: it waits for the answer.
        let answered = tokio::task::spawn_blocking(move || echo::is_answered(to, size)).await;
        match answered {
            Ok(Ok(answered)) => search.heard(answered),
            Ok(Err(error)) => {
                debug!(%to, %error, "no echo can be sent: what the path carries is not known");
                return None;
            }
            Err(_) => return None,
        }
    }
}
