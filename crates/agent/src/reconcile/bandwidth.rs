//! How much this node's pods may receive and send, as their annotations say.

use towpath_model::{Bandwidth, NamespacedName};
use tracing::{info, warn};

use super::Reconciler;
use crate::read;

/// What a pod gets with its device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) bandwidth: Bandwidth,
    /// What holds where its annotations ask for nothing any more.
    pub(super) runtime_bandwidth: Bandwidth,
}

impl Reconciler {
    /// The limits of a pod that gets its device. What the runtime asks for comes from the same annotations, as a rule, and is of another time: it counts
    /// where the pod has none of its own, or is not known.
    ///
    /// # Errors
    /// An annotation that means nothing.
    pub(super) fn limits_of(&self, pod: &NamespacedName, runtime: Bandwidth) -> Result<Limits, String> {
        let index = read(&self.index);
        let Some(asked) = index.world().pods.get(pod).and_then(|pod| pod.bandwidth.as_deref()) else {
            return Ok(Limits { bandwidth: runtime, runtime_bandwidth: runtime });
        };
        match asked.misunderstood().next() {
            Some(why) => Err(format!("pod {pod}: {why}")),
            None => {
                let runtime_bandwidth = asked.leaves(runtime);
                Ok(Limits { bandwidth: asked.over(Bandwidth::default(), runtime_bandwidth), runtime_bandwidth })
            }
        }
    }

    /// As pods say now.
    pub(super) async fn apply_bandwidth(&mut self) -> Result<(), String> {
        let plan = towpath_plan::bandwidth::plan(read(&self.index).world(), &self.leases.pod_addresses());
        self.with_report(|report| report.misread_bandwidth = plan.refusals);
        if self.bandwidth.as_ref() == Some(&plan.asked) {
            return Ok(());
        }
        self.bandwidth = None;
        let applied = self.datapath.apply_bandwidth(plan.asked.clone()).await.map_err(|e| e.to_string())?;
        for change in applied.changes {
            info!(change, "the bandwidth of a pod is another now");
        }
        if applied.problems.is_empty() {
            self.bandwidth = Some(plan.asked);
        }
        let problems = applied.problems;
        let known = self.with_report(|report| std::mem::replace(&mut report.bandwidth_problems, problems.clone()));
        for problem in problems.iter().filter(|problem| !known.contains(problem)) {
            warn!(problem, "trying again");
        }
        Ok(())
    }

    /// What could not be done is tried again.
    pub(super) async fn retry_bandwidth(&mut self) {
        if self.bandwidth.is_none()
            && let Err(error) = self.apply_bandwidth().await
        {
            warn!(%error, "could not apply the bandwidth of pods; trying again");
        }
    }
}
