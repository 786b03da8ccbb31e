//! `towpath ipam check` and `--repair`: see [`crate::ipam::check`].

use std::collections::BTreeMap;
use std::time::Duration;

use towpath_wire::cni::{Attachment, CniError, ErrorCode};
use towpath_wire::ipam::{Finding, NodeAddresses};

use super::operations::{Operations, plumb_error};
use super::ports::{PodIndex, PodPlumber};
use crate::conflist::NETWORK;
use crate::ipam::check::{Facts, check};
use crate::ipam::{AttachedDevice, Lease};

/// Between two looks: what is there both times is not in work. Devices of former pods are taken away within half a second.
const AGAIN: Duration = Duration::from_secs(2);

impl<I: PodIndex, P: PodPlumber> Operations<I, P> {
    /// What of this node's addresses does not fit together, after a repair if one is asked for.
    pub(super) async fn addresses(&self, repair: bool) -> Result<NodeAddresses, CniError> {
        let repaired = if repair { self.repair().await? } else { Vec::new() };
        let mut findings = self.differences().await?;
        if !findings.is_empty() {
            tokio::time::sleep(AGAIN).await;
            let still = self.differences().await?;
            findings.retain(|finding| still.contains(finding));
        }
        Ok(NodeAddresses {
            ranges: self.leases.range_use(),
            leases: self.leases.leases().len(),
            without_pods: self.index.of_this_node().is_none(),
            findings,
            repaired,
            ..NodeAddresses::default()
        })
    }

    async fn differences(&self) -> Result<Vec<Finding>, CniError> {
        // Before leases are read: one that is being made is one or the other.
        let busy = self.turns.busy();
        let survey = self.plumber.survey().await.map_err(|error| failed("look at", &error))?;
        let queued = self.queue.list().map_err(|error| failed("read the queue of", &error))?;
        let facts = Facts {
            ranges: self.leases.ranges(),
            leases: self.leases.leases(),
            busy: busy.into_iter().chain(self.turns.busy()).collect(),
            queued,
            survey,
            pods: self.index.of_this_node(),
            elsewhere: self.leases.held_for_predecessor(),
        };
        Ok(check(&facts, |owner| self.plumber.device_name(owner)))
    }

    /// Does what is queued, releases what no device has, writes down what devices have and nobody knows, and has the kernel's side checked.
    async fn repair(&self) -> Result<Vec<String>, CniError> {
        let before: BTreeMap<Attachment, Lease> =
            self.leases.leases().into_iter().map(|lease| (lease.owner.clone(), lease)).collect();
        self.drain_queue().await;
        self.reconcile().await.map_err(|error| failed("compare leases with", &error))?;
        let released = before.values().filter(|lease| self.leases.lease(&lease.owner).is_none());
        let mut repaired: Vec<String> =
            released.map(|lease| format!("released {:?} of {}", lease.addresses, lease.owner)).collect();
        repaired.extend(self.adopt().await?);
        repaired.extend(self.plumber.repair().await.map_err(|error| failed("repair", &error))?);
        Ok(repaired)
    }

    /// Leases for devices that have none, by what was written down when they were made.
    async fn adopt(&self) -> Result<Vec<String>, CniError> {
        let survey = self.plumber.survey().await.map_err(|error| failed("look at", &error))?;
        let mut adopted = Vec::new();
        for (pod, ifname) in survey.records {
            if survey.devices.get(&pod.host_device) != Some(&pod.ifindex) {
                continue;
            }
            let Ok(owner) = Attachment::new(&pod.container_id, &ifname) else { continue };
            let _turn = self.turns.take(&owner).await;
            // Since then it may have been deleted, or made anew.
            let there = self.plumber.list().await.map_err(|error| plumb_error("look at", &owner, &error))?;
            if self.leases.lease(&owner).is_some() || !there.iter().any(|device| device.name == pod.host_device) {
                continue;
            }
            let lease = Lease {
                owner: owner.clone(),
                network: NETWORK.to_owned(),
                pod: Some(pod.name.clone()).filter(|pod| !pod.namespace.is_empty()),
                uid: String::new(),
                netns: String::new(),
                addresses: pod.addresses.clone(),
                attached: Some(AttachedDevice { pod: pod.clone(), mtu: survey.pod_mtu }),
            };
            let device = pod.host_device.clone();
            match self.on_disk(move |leases, lease| leases.adopt(lease, &device), lease).await {
                Ok(()) => adopted.push(format!("wrote down that {:?} are of {owner}", pod.addresses)),
                Err(error) => tracing::warn!(attachment = %owner, %error, "its lease cannot be written down again"),
            }
        }
        Ok(adopted)
    }
}

fn failed(what: &str, error: &dyn std::fmt::Display) -> CniError {
    CniError::new(ErrorCode::TryAgain, format!("cannot {what} this node's pod devices: {error}"))
}
