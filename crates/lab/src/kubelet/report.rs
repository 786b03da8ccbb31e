//! Sends a pod's status to the API server: the newest only, in order, retried, without holding up the worker.

use std::time::Duration;

use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use tokio::sync::watch;
use tokio_util::task::AbortOnDropHandle;

use super::status;

/// How long a last report is waited for.
const FLUSH_LIMIT: Duration = Duration::from_secs(10);

/// The reporter of one pod; dropping it ends its task.
pub(crate) struct Reporter {
    wanted: watch::Sender<(u64, Option<Value>)>,
    sent: watch::Receiver<u64>,
    last: Option<PodStatus>,
    api: Api<Pod>,
    _task: AbortOnDropHandle<()>,
}

impl Reporter {
    /// A reporter for this pod.
    pub(crate) fn new(client: Client, pod: &Pod) -> Self {
        let api: Api<Pod> = Api::namespaced(client, &pod.namespace().unwrap_or_default());
        let (wanted, wants) = watch::channel((0, None));
        let (done, sent) = watch::channel(0);
        let task = tokio::spawn(send_all(api.clone(), pod.name_any(), wants, done));
        Self { wanted, sent, last: None, api, _task: AbortOnDropHandle::new(task) }
    }

    /// Reports `status` unless it is what was reported last.
    pub(crate) fn report(&mut self, pod: &Pod, status: &PodStatus) {
        let before = self.last.replace(settle(status.clone(), self.last.as_ref()));
        let status = self.last.as_ref().unwrap_or(status);
        if before.as_ref() == Some(status) {
            return;
        }
        let patch = status::patch(pod, status);
        self.wanted.send_modify(|(number, value)| {
            *number += 1;
            *value = Some(patch);
        });
    }

    /// Waits until the newest report has arrived.
    pub(crate) async fn flush(&mut self) {
        let number = self.wanted.borrow().0;
        let _ = tokio::time::timeout(FLUSH_LIMIT, self.sent.wait_for(|sent| *sent >= number)).await;
    }

    /// Deletes the object for good, as the kubelet does when everything of a pod is gone.
    pub(crate) async fn delete(&self, pod: &Pod) {
        let params = DeleteParams {
            grace_period_seconds: Some(0),
            preconditions: Some(Preconditions { uid: pod.uid(), resource_version: None }),
            ..DeleteParams::default()
        };
        let mut wait = Duration::from_millis(50);
        loop {
            match self.api.delete(&pod.name_any(), &params).await {
                Ok(_) => return,
                // Gone, or another pod of that name.
                Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => return,
                Err(error) => tracing::debug!(pod = %pod.name_any(), %error, "pod not deleted yet"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(5));
        }
    }
}

/// Transition times of conditions that did not change are kept from the report before.
fn settle(mut status: PodStatus, before: Option<&PodStatus>) -> PodStatus {
    let Some(before) = before else { return status };
    for condition in status.conditions.iter_mut().flatten() {
        let old =
            before.conditions.iter().flatten().find(|c| c.type_ == condition.type_ && c.status == condition.status);
        if let Some(old) = old {
            condition.last_transition_time.clone_from(&old.last_transition_time);
        }
    }
    status
}

async fn send_all(
    api: Api<Pod>,
    name: String,
    mut wants: watch::Receiver<(u64, Option<Value>)>,
    done: watch::Sender<u64>,
) {
    let mut wait = Duration::from_millis(50);
    while wants.changed().await.is_ok() {
        loop {
            let (number, value) = wants.borrow_and_update().clone();
            let Some(value) = value else { break };
            match api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(value)).await {
                Ok(_) => {
                    wait = Duration::from_millis(50);
                    let _ = done.send(number);
                    break;
                }
                // Gone, or the name belongs to another pod: nobody waits for this report.
                Err(kube::Error::Api(error)) if error.code == 404 || error.code == 409 => {
                    let _ = done.send(number);
                    break;
                }
                Err(error) => tracing::debug!(pod = name, %error, "status not reported yet"),
            }
            tokio::time::sleep(wait).await;
            wait = (wait * 2).min(Duration::from_secs(5));
        }
    }
}
