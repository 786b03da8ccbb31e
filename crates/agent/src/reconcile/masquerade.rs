//! Destinations that see pods' own addresses: followed without a new start.

use tracing::{info, warn};

use super::Reconciler;
use crate::index::Kind;
use crate::read;

impl Reconciler {
    /// What the API says of them, and the kernel's rules by it.
    pub(super) async fn follow_non_masquerade(&mut self) -> Result<(), String> {
        if !self.due.any(&[Kind::IpMasqAgent]) {
            return Ok(());
        }
        let Some(data) = read(&self.index).ip_masq_agent().cloned() else { return Ok(()) };
        match self.non_masquerade.follow(&data) {
            Ok(false) => {}
            Ok(true) => info!(
                destinations = ?self.non_masquerade.in_force(),
                "pods' own addresses are seen at these destinations now"
            ),
            Err(error) => warn!("ConfigMap kube-system/ip-masq-agent: {error:#}; what it said before holds"),
        }
        if let Err(error) = self.non_masquerade.keep() {
            warn!("{error:#}: a start without the API server masquerades what pods send to other destinations");
        }
        self.datapath.follow_non_masquerade(self.non_masquerade.in_force()).await.map_err(|error| error.to_string())
    }
}
