//! ADDs: a device for a pod, made when the policy that isolates it is in the kernel.

use std::future::Future;

use towpath_model::desired::{LocalPod, PodSets, TranslatedAt};
use tracing::warn;

use super::bandwidth::Limits;
use super::{Attach, Reconciler};
use crate::cni_server::{AttachRequest, Attached, Isolation, PlumbError};

impl Reconciler {
    /// Has devices made; the policy that was applied before names their pods. They have their place before whatever the loop applies next,
    /// which does not wait for them.
    pub(super) async fn attach_all(&mut self, attaches: Vec<Attach>, synced: bool) {
        while self.attaching.try_join_next().is_some() {}
        if attaches.is_empty() {
            return;
        }
        let policy_failed = self.with_report(|report| report.failures.get("policy").cloned());
        let mtu = self.datapath.facts().await.map(|facts| facts.pod_mtu).map_err(|e| e.to_string());
        for (request, reply) in attaches {
            // Nobody waits any more: its lease is released, and its addresses may be another pod's by now.
            if reply.is_closed() {
                continue;
            }
            let mtu = match (&policy_failed, request.isolation, &mtu) {
                (Some(error), Isolation::Policy, _) => {
                    let why = format!("the pod's policy is not in the kernel yet: {error}");
                    drop(reply.send(Err(PlumbError::Again(why))));
                    continue;
                }
                (_, _, Err(error)) => {
                    drop(reply.send(Err(PlumbError::Failed(error.clone()))));
                    continue;
                }
                (_, _, Ok(mtu)) => *mtu,
            };
            let limits = match self.limits_of(&request.pod, request.bandwidth) {
                Ok(limits) => limits,
                Err(why) => {
                    drop(reply.send(Err(PlumbError::Asked(why))));
                    continue;
                }
            };
            let (attached, datapath) = (self.attach(*request, synced, limits), self.datapath.clone());
            self.attaching.spawn(async move {
                let answer = attached.await.map(|pod| Attached { pod, mtu });
                if let Err(Ok(Attached { pod, .. })) = reply.send(answer) {
                    let container_id = pod.container_id.clone();
                    if let Err(error) = datapath.take_back_pod(pod).await {
                        warn!(container_id, %error, "a device that nobody waited for cannot be removed; its DEL tries again");
                    }
                }
            });
        }
    }

    /// Hands a device over to be made, with the sets that the pod has now.
    fn attach(
        &self,
        request: AttachRequest,
        synced: bool,
        Limits { bandwidth, runtime_bandwidth }: Limits,
    ) -> impl Future<Output = Result<LocalPod, PlumbError>> + Send + use<> {
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
        let attach = self.datapath.attach_pod(towpath_datapath::AttachRequest {
            netns: request.netns,
            ifname: request.attachment.ifname().to_owned(),
            container_id: request.attachment.container_id().to_owned(),
            pod: request.pod,
            addresses: request.addresses,
            mac: request.mac,
            mtu: None,
            sets,
            translated_at,
            bandwidth,
            runtime_bandwidth,
        });
        let failed = |error: towpath_datapath::Error| {
            let said = error.to_string();
            if error.is_choice() { PlumbError::Choice(said) } else { PlumbError::Failed(said) }
        };
        async move { attach.await.map_err(failed) }
    }
}
