//! The ranges of Service addresses: followed without a new start.

use towpath_plan::service_ranges::Own;
use tracing::{info, warn};

use super::Reconciler;
use crate::index::{Changes, Kind};
use crate::read;

impl Reconciler {
    /// What the API says of the ranges, and what follows from it: the kernel's refusal of what no Service has, and another plan of all
    /// Services.
    pub(super) async fn follow_service_ranges(&mut self) -> Result<(), String> {
        if !self.due.any(&[Kind::ServiceCidr, Kind::Node]) {
            return Ok(());
        }
        let planned = {
            let index = read(&self.index);
            let own = Own { world: index.world(), cluster: &self.parsed.ranges.cluster_cidrs, dns: &self.dns };
            self.ranges.decide(index.service_cidrs(), &own)
        };
        if let Err(error) = self.ranges.keep() {
            warn!("{error:#}: a start without the API server goes on with other ranges of Services");
        }
        let told = self.with_report(|report| {
            report.service_ranges.clone_from(&planned.ranges);
            std::mem::replace(&mut report.refused_ranges, planned.refused.clone())
        });
        for (name, reasons) in planned.refused.iter().filter(|(name, reasons)| told.get(*name) != Some(*reasons)) {
            warn!(service_cidr = name, ?reasons, "a range of Services that cannot be one");
        }
        if self.services.follow_service_ranges(&planned.ranges) {
            info!(ranges = ?planned.ranges, "the ranges of Services are others now");
            self.due.merge(Changes::all_services());
        }
        self.datapath.follow_service_ranges(planned.ranges).await.map_err(|error| error.to_string())
    }
}
