//! Addresses that come to the node and go while the agent runs: NodePorts answer at a virtual address as soon as its new holder has it, and
//! not only after the next full check.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use towpath_datapath::Datapath;
use towpath_datapath::net::address_news::AddressNews;
use tracing::{info, warn};

/// Changes that come within it are looked at together.
const WINDOW: Duration = Duration::from_millis(20);

/// What the kernel tells of addresses.
pub(super) struct Followed {
    /// None: it tells nothing.
    news: Option<AddressNews>,
    /// When to look, since something has changed.
    due: Option<Instant>,
}

impl Followed {
    pub(super) async fn by(datapath: &Datapath) -> Self {
        let news = match datapath.address_news().await {
            Ok(news) => Some(news),
            Err(error) => {
                warn!(%error, "changes of this node's addresses are noticed by the full check only");
                None
            }
        };
        Self { news, due: None }
    }

    /// Waits until something has changed; for ever where nobody tells. Nothing is forgotten when it is dropped and called again.
    pub(super) async fn changed(&mut self) {
        if self.due.is_none() {
            let Some(news) = &mut self.news else { return std::future::pending().await };
            if let Err(error) = news.next().await {
                warn!(%error, "changes of this node's addresses are noticed by the full check only");
                self.news = None;
            }
            self.due = Some(Instant::now() + WINDOW);
        }
        if let Some(due) = self.due {
            sleep_until(due).await;
            self.due = None;
        }
    }
}

/// Has the data path look.
pub(super) async fn follow(datapath: &Datapath) {
    match datapath.follow_addresses().await {
        Ok(applied) => {
            for change in applied.changes {
                info!(change, "this node's addresses");
            }
            for problem in applied.problems {
                warn!(problem, "this node's addresses");
            }
        }
        Err(error) => warn!(%error, "could not follow a change of this node's addresses; the full check tries again"),
    }
}
