//! The end of a pod: its containers within their grace, then its network and files, last its object.

use std::time::Duration;

use kube::ResourceExt;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::{RETRY, Worker};
use crate::kernel::cgroup;
use crate::kubelet::events::Severity;
use crate::kubelet::probes;
use crate::kubelet::slot::{Kind, State};
use crate::runtime::container::Container;

impl Worker {
    /// How long containers may take to end.
    pub(super) fn grace(&self) -> Duration {
        let chosen = self.pod.metadata.deletion_grace_period_seconds;
        let own = self.pod.spec.as_ref().and_then(|s| s.termination_grace_period_seconds);
        let seconds = chosen.or(own).and_then(|s| u64::try_from(s).ok()).unwrap_or(30);
        if self.gone { Duration::ZERO } else { Duration::from_secs(seconds) }
    }

    /// Ends all containers: main ones together, then sidecars from the last to the first. Messages are heard meanwhile, for
    /// the grace period may be cut short.
    pub(super) async fn stop_containers(&mut self) {
        // Starts under way are not waited for; what they started is found by its cgroup.
        let mains: Vec<usize> =
            (0..self.slots.len()).filter(|i| self.slots.get(*i).is_some_and(|s| s.kind != Kind::Sidecar)).collect();
        let sidecars = (0..self.slots.len()).rev().filter(|i| !mains.contains(i)).collect::<Vec<_>>();
        self.stop_group(&mains).await;
        for index in sidecars {
            self.stop_group(&[index]).await;
        }
        self.tasks.shutdown().await;
        let path = self.context.layout.pod_cgroup(&self.context.node.name, &self.uid);
        let removed =
            tokio::task::spawn_blocking(move || cgroup::kill_and_remove(&path, Duration::from_secs(10))).await;
        if let Ok(Err(error)) = removed {
            tracing::warn!(pod = %self.label(), error = %format!("{error:#}"), "cgroup stays");
        }
        for index in 0..self.slots.len() {
            let Some(slot) = self.slots.get(index).filter(|s| s.is_running()) else { continue };
            if let Some(ended) = slot.container.as_ref().and_then(Container::ended) {
                self.has_ended(index, &ended);
            }
        }
        if self.is_deleted() {
            self.finished = true;
            self.forget_waiting();
        }
    }

    /// Containers that wait when a pod is deleted show how they ended last.
    fn forget_waiting(&mut self) {
        for slot in &mut self.slots {
            if let (State::Waiting { .. }, Some(last)) = (&slot.state, slot.last.clone()) {
                slot.state = State::Terminated(last);
            }
        }
    }

    async fn stop_group(&mut self, group: &[usize]) {
        let deadline = Instant::now() + self.grace();
        let mut stops = JoinSet::new();
        let mut containers = Vec::new();
        for index in group {
            let Some(slot) = self.slots.get(*index) else { continue };
            let Some(container) = slot.container.clone().filter(|c| c.ended().is_none()) else { continue };
            self.event(
                Some(Self::field(slot)),
                Severity::Normal,
                "Killing",
                format!("Stopping container {}", slot.name()),
            );
            let hook = slot.spec.lifecycle.as_ref().and_then(|l| l.pre_stop.clone());
            let hook = hook.and_then(|hook| self.target(*index).map(|target| (target, hook)));
            containers.push(container.clone());
            stops.spawn(async move {
                if let Some((target, hook)) = hook {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let _ = tokio::time::timeout(left, probes::run_hook(&target, &hook, left)).await;
                }
                container.terminate();
                if tokio::time::timeout_at(deadline, container.wait()).await.is_err() {
                    container.kill();
                    container.wait().await;
                }
            });
        }
        while !stops.is_empty() {
            tokio::select! {
                _ = stops.join_next() => {}
                Some(message) = self.inbox.recv() => {
                    self.take(message);
                    if Instant::now() + self.grace() < deadline {
                        let left = self.grace();
                        for container in containers.clone() {
                            stops.spawn(async move {
                                if tokio::time::timeout(left, container.wait()).await.is_err() {
                                    container.kill();
                                }
                            });
                        }
                    }
                }
            }
        }
    }

    /// Network and files go; retried until the network plugin agrees.
    pub(super) async fn tear_down(&mut self) {
        let mut wait = RETRY.0;
        while let Err(error) = self.remove_sandbox().await {
            let message = format!("error killing pod: failed to \"KillPodSandbox\" for {:?}: {error:#}", self.uid);
            self.event(None, Severity::Warning, "FailedKillPod", message);
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(RETRY.1);
        }
        let dir = self.context.layout.pod_run(&self.uid);
        if let Err(error) = std::fs::remove_dir_all(&dir)
            && error.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(pod = %self.label(), %error, "runtime directory stays");
        }
    }

    /// A pod that ended stays until it is deleted.
    pub(super) async fn wait_for_deletion(&mut self) {
        while !self.is_deleted() {
            match self.inbox.recv().await {
                Some(message) => self.note(message),
                None => return,
            }
        }
    }

    /// The last report, then the object goes.
    pub(super) async fn finish(mut self) {
        if !self.gone {
            self.reporter.flush().await;
            self.reporter.delete(&self.pod).await;
        }
        let (namespace, name) = (self.pod.namespace().unwrap_or_default(), self.pod.name_any());
        let logs = self.context.layout.pod_logs(&self.context.node.name, &namespace, &name, &self.uid);
        let _ = std::fs::remove_dir_all(logs);
        self.context.registry.take(&self.uid);
    }
}
