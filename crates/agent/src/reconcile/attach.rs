//! ADDs: a device for a pod, made when the policy that isolates it is in the kernel.

use towpath_model::desired::{PodSets, TranslatedAt};
use tracing::warn;

use super::{Attach, Reconciler};
use crate::cni_server::{AttachRequest, Attached, Isolation, PlumbError};

impl Reconciler {
    /// Makes devices; the policy that was applied before names their pods.
    pub(super) async fn attach_all(&mut self, attaches: Vec<Attach>, synced: bool) {
        if attaches.is_empty() {
            return;
        }
        let policy_failed = self.with_report(|report| report.failures.get("policy").cloned());
        for (request, reply) in attaches {
            // Nobody waits any more: its lease is released, and its addresses may be another pod's by now.
            if reply.is_closed() {
                continue;
            }
            let (container_id, ifname) =
                (request.attachment.container_id().to_owned(), request.attachment.ifname().to_owned());
            let answer = match (&policy_failed, request.isolation) {
                (Some(error), Isolation::Policy) => {
                    Err(PlumbError::Again(format!("the pod's policy is not in the kernel yet: {error}")))
                }
                _ => self.attach(*request, synced).await,
            };
            if let Err(Ok(_)) = reply.send(answer)
                && let Err(error) = self.datapath.detach_pod(&container_id, &ifname).await
            {
                warn!(container_id, %error, "a device that nobody waited for cannot be removed; its DEL tries again");
            }
        }
    }

    async fn attach(&self, request: AttachRequest, synced: bool) -> Result<Attached, PlumbError> {
        let sets = match request.isolation {
            Isolation::NotAPod => Some(PodSets::default()),
            Isolation::HostOnly => None,
            // Before the first full list nothing is known of its policies.
            Isolation::Policy if !synced => None,
            Isolation::Policy => request.addresses.first().and_then(|address| self.pod_sets.get(address).copied()),
        };
        let translated_at = match request.isolation {
            Isolation::NotAPod => TranslatedAt::Sockets,
            Isolation::Policy if synced && !request.addresses.iter().any(|ip| self.at_device.contains(ip)) => {
                TranslatedAt::Sockets
            }
            // What it says is not known yet, or that its sockets are to be left alone.
            Isolation::Policy | Isolation::HostOnly => TranslatedAt::Device,
        };
        let facts = self.datapath.facts().await.map_err(|e| PlumbError::Failed(e.to_string()))?;
        let attach = towpath_datapath::AttachRequest {
            netns: request.netns,
            ifname: request.attachment.ifname().to_owned(),
            container_id: request.attachment.container_id().to_owned(),
            pod: request.pod,
            addresses: request.addresses,
            mtu: None,
            sets,
            translated_at,
        };
        let pod = self.datapath.attach_pod(attach).await.map_err(|e| PlumbError::Failed(e.to_string()))?;
        Ok(Attached { pod, mtu: facts.pod_mtu })
    }
}
