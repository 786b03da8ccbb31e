//! Pods whose sockets are left alone, and those whose sockets are translated.

use tracing::info;

use super::Reconciler;
use crate::read;

impl Reconciler {
    /// As pods and namespaces say now.
    pub(super) async fn apply_socket_services(&mut self) -> Result<(), String> {
        let plan = towpath_plan::socket_services::plan(read(&self.index).world(), &self.leases.pod_addresses());
        // First: a pod that comes begins as it asks, also while another one's cannot be changed.
        self.at_device.clone_from(&plan.at_device);
        self.with_report(|report| {
            report.at_device = plan.asked.iter().map(ToString::to_string).collect();
            report.misread_pods = plan.refusals;
        });
        let changed = self.datapath.apply_translated_at(plan.at_device).await.map_err(|e| e.to_string())?;
        if changed > 0 {
            info!(
                pods = changed,
                "what these send to Services is translated elsewhere from now on (socket or device); open connections go on"
            );
        }
        Ok(())
    }
}
